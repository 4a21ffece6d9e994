"""What is drawn: matrices, scales, marks and words, each against a table whose answer is known."""

import io
import math
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

from locogen.errors import LocogenError
from locogen.markup import number
from locogen.views.plots import (
    describe,
    figure_size,
    plot_curve,
    plot_effect,
    plot_scores,
    plot_strip,
    plot_timesteps,
)
from locogen.views.tables import (
    GAP,
    amount,
    carrier_cells,
    curves,
    effect_matrix,
    findings,
    score_matrix,
    strip_rows,
)

CONCEPTS = {"monet": 3, "van gogh": 1, "neon": None}
WINDOWS = 6


def window(start: int | None, width: int = 2, reason: str = "") -> SimpleNamespace:
    return SimpleNamespace(start=start, width=width, reason=reason)


CARRIERS = {
    name: window(start, reason="" if start is not None else "no effect")
    for name, start in CONCEPTS.items()
}


def estimate(concept: str, start: int) -> float:
    return 0.34 if start == CONCEPTS[concept] else 0.01 * start


def line(axis: str, concept: str, position: Any, value: float, **more: Any) -> dict[str, Any]:
    known = dict(method="locogen", concept=concept, axis=axis, position=position, estimate=value)
    return {
        **known,
        "low": value - 0.06,
        "high": value + 0.06,
        "n": 12,
        "kind": "style",
        "width": 2,
        **more,
    }


def effects(concepts: Sequence[str] = tuple(CONCEPTS), **more: Any) -> pd.DataFrame:
    rows = []
    for concept in concepts:
        for start in reversed(range(WINDOWS)):  # the order of rows must not matter
            rows.append(line("layer", concept, start, estimate(concept, start), **more))
            rows.append(line("insert", concept, start, estimate(concept, start) / 2, **more))
        rows.append(line("ceiling", concept, pd.NA, 0.4, **more))
        rows.append(line("placebo", concept, pd.NA, 0.02, **more))
    return pd.DataFrame(rows).astype({"position": "Int64"})


def pictures(concepts: Sequence[str] = tuple(CONCEPTS)) -> pd.DataFrame:
    rows = []
    for concept in concepts:
        for seed, noise in ((0, -0.05), (1, 0.05)):  # the mean over seeds is what is shown

            def add(
                role: str,
                start: Any,
                score: float,
                edit: Any = None,
                seed: int = seed,
                name: str = concept,
            ) -> None:
                rows.append(
                    dict(
                        concept=name, role=role, start=start, seed=seed, edit=edit, clip_score=score
                    )
                )

            for start in range(WINDOWS):
                add("window", start, 0.6 - estimate(concept, start) + noise)
                add("insert", start, 0.9)
            add("baseline", pd.NA, 0.6 + noise)
            add("placebo", pd.NA, 0.58 + noise)
            add("ceiling", pd.NA, 0.2 + noise)
            add("window", 0, 99.0, edit="erased")
    return pd.DataFrame(rows).astype({"start": "Int64"})


def meshes(ax: Any) -> Any:
    return next(child for child in ax.get_children() if type(child).__name__ == "QuadMesh")


def outlines(ax: Any) -> list[tuple[float, float]]:
    """(column, row) of the outlined cells."""
    return sorted(p.get_xy() for p in ax.patches if isinstance(p, Rectangle))


def stars(ax: Any) -> list[tuple[int, int]]:
    drawn = [line for line in ax.lines if line.get_marker() == "*"]
    return sorted((int(line.get_xdata()[0]), int(line.get_ydata()[0])) for line in drawn)


# Matrices


def test_effect_matrix_is_in_layer_and_table_order() -> None:
    matrix = effect_matrix(effects())
    assert list(matrix.index) == list(CONCEPTS)
    assert list(matrix.columns) == list(range(WINDOWS))
    for concept in CONCEPTS:
        assert matrix.loc[concept].tolist() == [
            estimate(concept, start) for start in range(WINDOWS)
        ]
    assert effect_matrix(effects(), axis="insert").loc["monet", 3] == pytest.approx(0.17)


def test_methods_and_widths_get_rows_of_their_own() -> None:
    both = pd.concat([effects(["monet"]), effects(["monet"], method="tracing")])
    assert list(effect_matrix(both).index) == ["monet · locogen", "monet · tracing"]
    wide = pd.concat([effects(["monet"]), effects(["monet"], width=3)])
    assert list(effect_matrix(wide).index) == ["monet · width 2", "monet · width 3"]
    assert carrier_cells(wide, window(3)) == {"monet · width 2": 3}


@pytest.mark.parametrize(
    "table, axis, words",
    [
        (effects(), "content", "no positions along 'content'"),
        (effects(), "ceiling", "no positions along 'ceiling'"),
        (pd.concat([effects(), effects()]), "layer", "more than once"),
    ],
)
def test_a_table_that_cannot_be_drawn_is_refused(
    table: pd.DataFrame, axis: str, words: str
) -> None:
    with pytest.raises(LocogenError, match=words):
        effect_matrix(table, axis=axis)


def test_score_matrix_means_over_seeds_and_sets_controls_apart() -> None:
    matrix = score_matrix(pictures())
    assert list(matrix.index) == list(CONCEPTS)
    assert list(matrix.columns) == [*range(WINDOWS), GAP, "baseline", "placebo", "ceiling"]
    assert matrix.loc["monet", [0, 3, "baseline", "placebo", "ceiling"]].tolist() == pytest.approx(
        [0.6, 0.26, 0.6, 0.58, 0.2]
    )
    assert matrix[GAP].isna().all()


def test_score_matrix_needs_a_sweep_and_only_that() -> None:
    table = pictures()
    assert list(score_matrix(table[table["role"] == "window"]).columns) == list(range(WINDOWS))
    with pytest.raises(LocogenError, match="no row of role 'window'"):
        score_matrix(table[table["role"] == "baseline"])


def test_curves_are_of_one_concept_and_sorted() -> None:
    found = curves(effects(), "monet")
    assert set(found) == {"layer", "insert", "ceiling", "placebo"}
    assert [row["position"] for row in found["layer"]] == list(range(WINDOWS))
    assert curves(effects(["monet"])).keys() == found.keys()
    for name in (None, "manet"):
        with pytest.raises(LocogenError, match="name one of monet, van gogh, neon"):
            curves(effects(), name)


# Plots


def test_effect_heatmap_draws_the_matrix_on_one_scale_around_zero() -> None:
    ax = plot_effect(effects(), carriers=CARRIERS)
    mesh, matrix = meshes(ax), effect_matrix(effects())
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(matrix.shape), matrix)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (
        0.0,
        matrix.max().max(),
    )  # nothing clipped, zero within
    neutral = mesh.cmap(mesh.norm(0.0))
    assert min(neutral[:3]) > 0.9  # zero is the pale middle of vlag
    assert max(neutral[:3]) - min(mesh.cmap(mesh.norm(0.34))[:3]) > 0.5
    assert ax.get_xlabel() == "window start (layer, execution order)"
    assert "CLIP-score lost (cosine)" in {a.get_xlabel() + a.get_ylabel() for a in ax.figure.axes}


def test_carriers_are_outlined_and_starred() -> None:
    ax = plot_effect(effects(), carriers=CARRIERS)
    assert outlines(ax) == [(1, 1), (3, 0)]  # (start, row) of van gogh and monet
    assert stars(ax) == [(1, 1), (3, 0)]
    assert "★" in ax.get_title(loc="left")
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["monet", "van gogh", "neon\n(no single window)"]


def test_without_carriers_nothing_is_marked() -> None:
    ax = plot_effect(effects())
    assert outlines(ax) == stars(ax) == [] and ax.get_title(loc="left") == ""
    assert [text.get_text() for text in ax.get_yticklabels()] == list(CONCEPTS)


def test_one_concept_takes_one_window() -> None:
    ax = plot_effect(effects(["monet"]), carriers=window(3))
    assert outlines(ax) == [(3, 0)]
    assert "CLIP-score lost (cosine)" in {
        a.get_xlabel() for a in ax.figure.axes
    }  # the bar lies below
    with pytest.raises(LocogenError, match="give a dict"):
        plot_effect(effects(), carriers=window(3))


def test_numbers_in_the_cells_up_to_twenty_columns() -> None:
    drawn = [text.get_text() for text in plot_effect(effects(["monet"])).texts]
    assert drawn == ["0.00", "0.01", "0.02", "0.34", "0.04", "0.05"]
    small = effects(["monet"]).assign(estimate=lambda table: table["estimate"] / -100)
    assert [text.get_text() for text in plot_effect(small).texts][3] == "−0.0034"
    wide = pd.DataFrame([line("layer", "monet", start, 0.1) for start in range(21)])
    assert not plot_effect(wide).texts


def test_a_flat_table_is_drawn_too() -> None:
    plot_effect(effects(["monet"]).assign(estimate=0.0)).figure.canvas.draw()


def test_names_are_text_not_formulas_and_fit() -> None:
    name = "costs $5 or $x^{$ " + "and much more of it " * 10
    ax = plot_effect(effects(["monet"]).assign(concept=name), carriers=window(None))
    figure = ax.figure
    figure.canvas.draw()  # a formula would fail here
    (label,) = ax.get_yticklabels()
    assert r"\$5" in label.get_text() and label.get_text().endswith("…\n(no single window)")
    assert label.get_window_extent().x0 >= 0


@pytest.mark.parametrize("layer_names", [None, [f"down.{i}" for i in range(16)]])
def test_no_label_is_clipped(layer_names: list[str] | None) -> None:
    for ax in (
        plot_effect(effects(), carriers=CARRIERS, layer_names=layer_names),
        plot_scores(pictures()),
    ):
        figure = ax.figure
        figure.canvas.draw()
        inside = figure.bbox
        for text in [*ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label]:
            box = text.get_window_extent()
            assert box.x0 >= inside.x0 - 1 and box.x1 <= inside.x1 + 1, text
            assert box.y0 >= inside.y0 - 1 and box.y1 <= inside.y1 + 1, text


def test_layer_names_label_the_ticks() -> None:
    ax = plot_effect(effects(), layer_names=[f"down.{i}" for i in range(16)])
    assert [text.get_text() for text in ax.get_xticklabels()][:2] == ["down.0  0", "down.1  1"]


def test_scores_heatmap_has_one_scale_and_a_gap() -> None:
    ax = plot_scores(pictures())
    mesh, matrix = meshes(ax), score_matrix(pictures())
    assert (mesh.norm.vmin, mesh.norm.vmax) == pytest.approx(
        (matrix.min().min(), matrix.max().max())
    )
    assert np.ma.getmaskarray(mesh.get_array()).reshape(matrix.shape)[:, WINDOWS].all()
    ticks = [text.get_text() for text in ax.get_xticklabels()]
    assert ticks == [*map(str, range(WINDOWS)), "", "baseline", "placebo", "ceiling"]


def test_plots_draw_on_the_axes_they_get() -> None:
    for draw in (
        lambda ax: plot_effect(effects(), ax=ax),
        lambda ax: plot_scores(pictures(), ax=ax),
        lambda ax: plot_curve(effects(), "monet", ax=ax),
    ):
        ax = plt.figure().add_subplot()
        assert draw(ax) is ax


def test_curve_shows_intervals_two_series_and_bands() -> None:
    ax = plot_curve(effects(), "monet")
    handles, labels = ax.get_legend_handles_labels()
    assert [label.split(":")[0] for label in labels] == ["window", "insert"]
    points, sweep = (handle.lines[0] for handle in handles)
    assert (
        points.get_marker() != sweep.get_marker()
        and points.get_linestyle() != sweep.get_linestyle()
    )
    assert points.get_ydata()[3] == pytest.approx(0.34) and sweep.get_ydata()[3] == pytest.approx(
        0.17
    )
    bars = handles[0].lines[2][0].get_segments()
    assert [tuple(bar[:, 1]) for bar in bars][3] == pytest.approx((0.28, 0.40))
    assert {text.get_text() for text in ax.texts} == {"ceiling", "placebo"}
    assert "monet" in ax.get_title(loc="left")


def test_curve_without_controls_or_intervals() -> None:
    table = effects(["monet"])
    bare = table[table["axis"] == "layer"].assign(low=math.nan, high=math.nan)
    ax = plot_curve(bare)
    assert not ax.texts and len(ax.get_legend_handles_labels()[1]) == 1


# Strips


def patterns(count: int, size: int = 8) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), (20 * i, 0, 0)) for i in range(count)]


def test_strip_draws_rows_and_frames_what_is_marked() -> None:
    figure = plot_strip(patterns(5), [f"window {i}" for i in range(5)], columns=3, marked=(3,))
    cells = figure.axes
    assert len(cells) == 5 and cells[0].get_gridspec().get_geometry() == (2, 3)
    assert [cell.spines["left"].get_visible() for cell in cells] == [
        False,
        False,
        False,
        True,
        False,
    ]
    assert [cell.get_xlabel() for cell in cells][2:4] == ["window 2", "★ window 3"]
    shown = [np.asarray(cell.images[0].get_array())[0, 0, 0] for cell in cells]
    assert shown == [0, 20, 40, 60, 80]


@pytest.mark.parametrize(
    "size, way", [(64, "nearest"), (512, plt.rcParamsDefault["image.interpolation"])]
)
def test_only_small_pictures_are_shown_pixel_by_pixel(size: int, way: str) -> None:
    (cell,) = plot_strip(patterns(1, size), ["one"]).axes
    assert cell.images[0].get_interpolation() == way


def test_zoom_sets_the_size() -> None:
    small, large = (
        plot_strip(patterns(2, 64), ["a", "b"], zoom=zoom).get_figwidth() for zoom in (1, 3)
    )
    assert large - small == pytest.approx(2 * 2 * 64 / 100)


def test_a_sweep_as_a_strip() -> None:
    """One prompt and seed; from a table as it is made, and as it comes back from a file."""
    table = pictures(["monet"]).query("edit.isna()").assign(prompt="a house", width=2)
    table = pd.concat([table, table.assign(prompt="a boat", seed=table["seed"] + 7)])
    read = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    for each in (table.reset_index(drop=True), read):
        rows = strip_rows(each, window(3))
        assert list(rows["label"]) == [
            "0-1",
            "1-2",
            "2-3",
            "3-4",
            "4-5",
            "5-6",
            "baseline",
            "ceiling",
        ]
        assert list(rows.loc[rows["marked"], "start"]) == [3]
        assert set(rows["prompt"]) == {"a house"} and set(rows["seed"]) == {0}
        assert not strip_rows(each, window(None))["marked"].any()
    assert list(strip_rows(read.assign(width=1), window(3, 1))["label"])[:2] == ["0", "1"]


def test_strip_refuses_what_does_not_match() -> None:
    for pictures_, labels in ((patterns(2), ["one"]), ([], [])):
        with pytest.raises(LocogenError, match="one label a picture"):
            plot_strip(pictures_, labels)


# Words


def test_the_finding_in_words() -> None:
    assert describe(effects(["monet"]), window(3)) == (
        "monet: the window of layers 3-4 lowers the CLIP-score by 0.34 [0.28, 0.40] "
        "(85 % of the ceiling); next best elsewhere 0.05 [−0.01, 0.11]."
    )


def test_what_should_stay_is_told_beside_the_controls() -> None:
    lost = {3: 0.021, 4: 0.3}
    rows = [line("content", "monet", start, value) for start, value in lost.items()]
    rows += [
        line("content_ceiling", "monet", pd.NA, -0.05),
        line("content_placebo", "monet", pd.NA, 0.01),
    ]
    table = pd.concat([effects(["monet"]), pd.DataFrame(rows)], ignore_index=True).astype(
        {"position": "Int64"}
    )
    said = describe(table, window(3))
    assert said.endswith(
        "lost of what should stay: 0.021 [−0.039, 0.081] "
        "(ceiling −0.05 [−0.11, 0.01], placebo 0.010 [−0.050, 0.070])."
    )
    bare = table[~table["axis"].str.startswith("content_")]
    assert describe(bare, window(3)).endswith("should stay: 0.021 [−0.039, 0.081].")
    unknown = bare.assign(low=math.nan, high=math.nan)
    assert describe(unknown, window(3)).endswith(
        "without an interval; lost of what should stay: 0.021."
    )
    assert "should stay" not in describe(effects(["monet"]), window(3))
    assert "should stay" not in describe(table, window(3), short=True)


def test_shares_and_rivals_have_their_intervals_where_the_table_has() -> None:
    table = effects(["monet"]).assign(share=0.85, share_low=0.7, share_high=1.02)
    said = describe(table, window(3))
    assert "(85 % [70 %, 102 %] of the ceiling); next best elsewhere 0.05 [−0.01, 0.11]." in said
    unknown = describe(table.assign(share_low=None, low=math.nan, high=math.nan), window(3))
    assert "(85 % of the ceiling); next best elsewhere 0.050, without an interval." in unknown


@pytest.mark.parametrize(
    ("low", "doubt"),
    [(-0.3, ", which may be none,"), (0.001, ""), (None, ", without an interval,")],
)
def test_a_proposal_says_whether_it_may_be_none(low: float | None, doubt: str) -> None:
    table = effects(["monet"]).assign(method="attribution", estimate=0.02, low=low, high=0.34)
    said = describe(table)
    assert re.search(rf"a share of 0\.02\d*(?: \[[^]]*\])?{doubt} of what all layers do", said)


def test_a_fact_is_raised_and_one_layer_is_a_layer() -> None:
    said = describe(effects(["monet"], kind="fact", width=1), window(3, 1))
    assert said.startswith("monet: layer 3 raises the CLIP-score by 0.34")


def test_fresh_seeds_are_told_of_only_where_there_are_some() -> None:
    table = effects(["monet"]).assign(fresh=0.30, fresh_low=0.2, fresh_high=0.4, share=0.75)
    fresh = table.assign(choose=table["estimate"])
    assert "by 0.30 [0.20, 0.40] on seeds not used to choose it (75 % of the ceiling)" in describe(
        fresh, window(3)
    )
    same = table.assign(choose=0.30)  # few seeds: chosen and measured on the same
    assert "by 0.34 [0.28, 0.40] (75 %" in describe(same, window(3))


def test_no_single_window_says_why_and_where_to_look() -> None:
    said = describe(effects(["neon"]), window(None, reason="no effect beyond the placebo's"))
    assert said == (
        "neon: no single window carries it (no effect beyond the placebo's); the largest effect, "
        "0.05 [−0.01, 0.11], is that of the window of layers 5-6."
    )


def test_without_a_verdict_it_only_says_what_is_largest() -> None:
    assert describe(effects(["monet"])).startswith(
        "monet: the largest effect is that of the window of layers 3-4"
    )
    assert not findings(effects())[0]["judged"]


def test_several_concepts_get_a_sentence_each() -> None:
    short = describe(effects(), CARRIERS, short=True)
    assert (
        short.count("effect 0.34 [0.28, 0.40]") == 2
        and "neon: no single window carries it (no effect)." in short
    )


def test_a_negative_effect_is_said_the_other_way_round() -> None:
    table = effects(["monet"]).assign(estimate=-0.2, low=-0.3, high=-0.1)
    assert "raises the CLIP-score by 0.20 [0.10, 0.30]" in describe(table, window(3))


def test_a_carrier_that_is_not_in_the_table_is_refused() -> None:
    with pytest.raises(LocogenError, match="starts at layer 9"):
        describe(effects(["monet"]), window(9))


def test_numbers_for_people() -> None:
    assert [number(value) for value in (0.344, -0.344, -0.001)] == ["0.34", "−0.34", "0.00"]
    known = {"estimate": 0.1, "low": -0.1, "high": 0.2}
    assert amount(known) == "0.10 [−0.10, 0.20]"
    for none in (math.nan, None, pd.NA):
        assert amount(known | {"low": none}) == "0.10"


def test_figures_grow_with_the_table() -> None:
    small, large = effect_matrix(effects(["monet"])), effect_matrix(effects())
    assert (
        figure_size(large)[1] > figure_size(small)[1]
        and figure_size(large)[0] == figure_size(small)[0]
    )


def timed(concepts: Sequence[str] = ("monet",)) -> pd.DataFrame:
    rows = [
        line(
            "timesteps",
            concept,
            start,
            0.1 * start - 0.02 * first,
            first_timestep=first,
            last_timestep=last,
        )
        for concept in concepts
        for first, last in [(4, 7), (0, 0), (1, 3)]  # in whichever order
        for start in range(WINDOWS)
    ]
    return pd.concat([effects(concepts), pd.DataFrame(rows)]).astype({"position": "Int64"})


def test_windows_over_time_are_drawn_from_the_first_step_down() -> None:
    ax = plot_timesteps(timed())
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "step 0",
        "steps 1-3",
        "steps 4-7",
    ]
    values = meshes(ax).get_array().reshape(3, WINDOWS)
    assert values[:, 1].tolist() == pytest.approx([0.1, 0.08, 0.02])
    low, high = meshes(ax).get_clim()
    assert low <= -0.08 and high >= 0.5
    assert ax.get_xlabel() and ax.get_ylabel()


def test_windows_over_time_are_of_one_concept() -> None:
    with pytest.raises(LocogenError, match="one concept"):
        plot_timesteps(timed(["monet", "neon"]))
    assert plot_timesteps(timed(["monet", "neon"]), "neon")
    with pytest.raises(LocogenError, match=r"sweep with timesteps="):
        plot_timesteps(effects())


def test_a_window_that_was_not_measured_is_hatched() -> None:
    table = effects(["monet"])
    unseen = (table["axis"] == "layer") & (table["position"] == 3)
    assert unseen.any()
    shown = plot_effect(table.assign(estimate=table["estimate"].mask(unseen)))
    assert shown.patch.get_hatch() == "////"
    assert "hatched: not measured" in shown.get_title(loc="left")
    whole = plot_effect(table)  # the twin
    assert whole.patch.get_hatch() is None and "hatched" not in whole.get_title(loc="left")
