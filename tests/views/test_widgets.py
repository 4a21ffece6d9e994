"""`explore`, driven from Python: what is clicked is shown, what is shown is what it says, and the model stays as found.

In a browser: `test_lab.py`.
"""

import dataclasses
import gc
import html
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import ipywidgets
import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib.colors import to_rgb
from support import tiny

from locogen.editing.edit import fit_edit
from locogen.editing.fit import Options
from locogen.editing.neurons import find_neurons
from locogen.errors import LocogenError
from locogen.interventions.clamping import clamp
from locogen.localization.attribution.attribute import attribute
from locogen.localization.effects import effect
from locogen.localization.localize import localize
from locogen.pages.cleaning import clean
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import Run, generate
from locogen.plan import Concept, Intervention, PromptPair
from locogen.views.explorer import Explorer, Look
from locogen.views.widgets import ExplorerBox, _score, explore

STEPS, GUIDANCE = 2, 5.0
NASTY = "<img src=x onerror=alert(1)>"


def concept(name: str) -> Concept:
    pairs = (PromptPair(f"a cat in {name}", "a cat"), PromptPair(f"a dog in {name}", "a dog"))
    return Concept(name, "style", pairs)


@pytest.fixture(scope="module", name="pipe")
def make_pipe() -> Any:
    return tiny.pipeline()


@pytest.fixture(scope="module", name="run")
def make_run(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return localize(
        pipe,
        [concept("blue"), concept("neon")],
        window=2,
        seeds=(0, 1),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        scorer=tiny.FakeScorer(),
        store=tmp_path_factory.mktemp("store"),
        progress=False,
    )


@pytest.fixture(name="box")
def make_box(run: Run) -> ExplorerBox:
    return explore(run, tokens="end", ridge=0.5)


def look(**changes: Any) -> Look:
    return Look(**(dict(concept="blue", prompt="a dog in blue", first=3, last=4, seed=1) | changes))


def made(pipe: Any, row: Intervention) -> bytes:
    run = generate(
        pipe,
        [row],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        batch_size=1,
        progress=False,
    )
    return run.pictures[0].tobytes()


def test_the_run_s_own_pictures_are_shown(run: Run) -> None:
    """Baseline, window and ceiling of the prompt and seed asked for, with the scores of the table."""
    shown = list(Explorer(run).show(look()))
    table = run.table[(run.table.prompt == "a dog in blue") & (run.table.seed == 1)]
    rows = [table[table.role == role].index[0] for role in ("baseline", "ceiling")]
    rows.insert(1, table[(table.role == "window") & (table.start == 3)].index[0])
    assert [one.label for one in shown] == [
        "baseline",
        "layers 3-4 hearing “a dog”",
        "all layers hearing “a dog”",
    ]
    assert [one.picture.tobytes() for one in shown] == [
        run.pictures[int(i)].tobytes() for i in rows
    ]
    assert [one.score for one in shown] == list(run.table.clip_score[rows])


def test_what_is_missing_is_made_as_by_hand(run: Run, pipe: Any) -> None:
    """Another seed and window, an edit and a clamp: the pictures that the plain functions make; nothing stays."""
    before = fingerprint(pipe)
    explorer = Explorer(run, pipe, {"tokens": "end", "ridge": 0.5})
    shown = list(explorer.show(look(seed=7, last=9, strength=0.5, neurons=3)))
    plain = Intervention("a dog in blue", "a dog", (), 7)
    layers = range(3, 10)
    with fit_edit(pipe, concept("blue"), layers=layers, tokens="end", ridge=0.5).applied(pipe, 0.5):
        edited = made(pipe, plain)
    with clamp(pipe, find_neurons(pipe, concept("blue"), layers=layers).top(3)):
        clamped = made(pipe, plain)
    assert [one.picture.tobytes() for one in shown[3:]] == [edited, clamped]
    window = Intervention("a dog in blue", "a dog", tuple(layers), 7)
    fresh = [made(pipe, row) for row in (plain, window)]
    for one, other in zip(
        shown[:2], fresh, strict=True
    ):  # made in a batch of three: equal within one step
        assert max(abs(a - b) for a, b in zip(one.picture.tobytes(), other, strict=True)) <= 1
    assert len({one.picture.tobytes() for one in shown}) == 5, "each is another picture"
    assert all(one.score is None for one in shown)
    assert fingerprint(pipe) == before


def test_what_is_made_is_scored_as_the_run_was(run: Run, pipe: Any) -> None:
    """So that "did the edit work?" is read off; by another scorer, nothing is."""
    explorer = Explorer(run, pipe, {"tokens": "end", "ridge": 0.5}, scorer=tiny.FakeScorer())
    asked = look(seed=7, strength=0.5, neurons=3)
    shown = list(explorer.show(asked))
    red = [np.asarray(one.picture, float)[..., 0].mean() / 255 for one in shown]
    assert [one.score for one in shown] == pytest.approx(red)
    said = explorer.outcome(asked, shown)
    assert said.count("on this picture, where “a dog” in all layers makes it ") == 2
    assert said.startswith("Edit of layers 3-4, strength 0.5: score ")
    assert " Layers 3-4 with 3 of each" in said
    assert explorer.outcome(asked, shown[:3]) == "", "nothing was done"

    class Other(tiny.FakeScorer):
        settings: ClassVar = {"scorer": "fake", "scale": 2.5}

    other = Explorer(run, pipe, scorer=Other())
    assert all(one.score is None for one in other.show(look(seed=7)))
    box = explore(run, pipe=pipe, scorer=tiny.FakeScorer(), tokens="end", ridge=0.5)
    box.strength.value = 0.5
    assert "score" in box.status.value and "in all layers makes it" in box.status.value


def test_changes_have_true_signs_and_none_where_nothing_changed() -> None:
    assert _score(0.5, 0.7) == "0.50 (−0.20)" and _score(0.7, 0.5) == "0.70 (+0.20)"
    assert _score(0.5, 0.5001) == _score(0.5, 0.4999) == "0.50 (0.00)"
    assert _score(0.5, None) == _score(0.5, 0.5) == "0.50" and not _score(None, 0.5)


def test_every_control_has_a_name_and_says_what_it_does(box: ExplorerBox) -> None:
    controls = [box.prompt, box.seed, box.window, box.strength, box.neurons]
    assert all(control.description and control.tooltip for control in controls)
    assert not ipywidgets.IntSlider().tooltip, "the twin: it is not there by itself"
    names = box.heatmap.names
    assert names["layers"]["handles"] == ["first layer", "last layer"]
    assert {name: words["hint"] for name, words in names.items()} == {
        slider.description: slider.tooltip for slider in (box.window, box.strength, box.neurons)
    }


def test_what_is_heard_beside_the_layers_is_the_run_s(tmp_path: Path) -> None:
    pipe = tiny.sdxl()
    options: dict[str, Any] = dict(num_inference_steps=1, progress=False, store=tmp_path)
    swept = dict(
        window=2, seeds=(0,), guidance_scale=GUIDANCE, scorer=tiny.FakeScorer(), pooled="target"
    )
    run = localize(pipe, concept("blue"), **swept, **options)
    asked = look(first=0, last=1, seed=0)
    explorer = Explorer(run, pipe)
    own = list(explorer.show(asked))
    assert all(one.score is not None for one in own), "the run has these"
    explorer._rows = {}
    for one, other in zip(
        own, explorer.show(asked), strict=True
    ):  # made in another batch: equal within one step
        gaps = zip(one.picture.tobytes(), other.picture.tobytes(), strict=True)
        assert max(abs(a - b) for a, b in gaps) <= 1, one.label


def test_pictures_are_made_once(run: Run, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = Explorer(run, pipe)
    asked = look(seed=3, strength=1.0, neurons=1)
    first = list(explorer.show(asked))
    monkeypatch.setattr(
        "locogen.views.explorer.generate", lambda *args, **options: pytest.fail("made again")
    )
    assert [one.picture for one in explorer.show(asked)] == [one.picture for one in first]
    with pytest.raises(pytest.fail.Exception):  # the twin: this one was not asked for before
        list(explorer.show(look(seed=4)))


def test_cells_windows_and_pictures_go_together(box: ExplorerBox) -> None:
    """A click sets the window, the window's slider the cell; another width is no cell of the heatmap."""
    box.heatmap.selected = ("neon", 5)
    assert box.window.value == (5, 6) and box.look.concept == "neon"
    assert box.prompt.options == ("a cat in neon", "a dog in neon")
    assert (
        "layers 5-6 hearing" in box.pictures.value
        and "neon, layers 5-6: effect" in box.status.value
    )
    box.window.value = (2, 3)
    assert box.heatmap.selected == ("neon", 2) and "layers 2-3 hearing" in box.pictures.value
    box.window.value = (2, 8)
    assert box.heatmap.selected is None and "not a window of this run" in box.status.value
    assert "layers 2-8 hearing" in box.pictures.value
    box.heatmap.set_state({"selected": ["blue", 0]})  # as the browser says it
    assert box.window.value == (0, 1) and box.prompt.value == "a cat in blue"


def test_every_cell_says_its_effect(box: ExplorerBox, run: Run) -> None:
    """In figures, and pointed at in words with its interval: those of the sentence below."""
    effects = (
        effect(run.table)
        .query("axis == 'layer' and concept == 'neon'")
        .set_index("position")
        .estimate
    )
    assert [row["concept"] for row in box.heatmap.rows] == ["blue", "neon"]
    cells = box.heatmap.rows[1]["cells"]
    assert len(cells) == len(effects) == 15
    for cell in cells:
        text = cell["effect"].replace("−", "-")
        assert float(text) == pytest.approx(
            effects[cell["start"]], abs=6e-4 if len(text.split(".")[1]) == 3 else 6e-3
        )
        box.heatmap.selected = ("neon", cell["start"])
        assert cell["words"] in html.unescape(box.status.value)
    assert len({cell["words"] for cell in cells}) == 15


def test_cells_can_be_read_on_their_colors(box: ExplorerBox) -> None:
    """Contrast of at least 4.5 (WCAG AA), by the relative luminance of both colors."""
    for row in box.heatmap.rows:
        for cell in row["cells"]:
            assert contrast(cell["color"], cell["ink"]) >= 4.5
    assert contrast("#777777", "#888888") < 4.5  # the twin


def contrast(one: str, other: str) -> float:
    lights = sorted(0.05 + luminance(color) for color in (one, other))
    return lights[1] / lights[0]


def luminance(color: str) -> float:
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(color)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_explore_takes_every_option_of_an_edit() -> None:
    """Spelled out, so that an editor can complete them; none is forgotten where edits get a further one."""
    options = {field.name for field in dataclasses.fields(Options)} | {
        "phrasings",
        "subject",
        "becomes",
    }
    parameters = inspect.signature(explore).parameters
    assert options == set(parameters) - {"run", "pipe", "attribution", "scorer"}
    assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def test_strength_neurons_and_seed_change_the_view(box: ExplorerBox) -> None:
    start = box.pictures.value
    box.strength.value = 1.0
    assert "strength 1" in box.pictures.value and box.pictures.value.count("<figure") == 4
    box.neurons.value = 2
    assert "with 2 of each" in box.pictures.value and box.pictures.value.count("<figure") == 5
    box.neurons.value = box.strength.value = 0
    assert box.pictures.value == start
    box.seed.value = 12345
    assert box.pictures.value.count("<figure") == 3 and "CLIP-score" not in box.pictures.value
    assert box.neurons.max == box.explorer.narrowest(box.look) > 1


def test_without_a_model_only_the_run_is_shown(run: Run) -> None:
    box = ExplorerBox(Explorer(run))
    assert box.strength.disabled and box.neurons.disabled
    box.heatmap.selected = ("neon", 1)
    assert box.pictures.value.count("<figure") == 3
    box.seed.value = 99
    assert not box.pictures.value and "explore(run, pipe=…)" in box.status.value
    box.seed.value = 1
    assert box.pictures.value.count("<figure") == 3


def test_where_no_edit_can_be_fitted_its_control_says_why(tmp_path: Path) -> None:
    pipe = tiny.FAMILIES["lumina-2"]()
    pair = PromptPair("cat in a", "dog in a")  # as many tokens
    options: dict[str, Any] = {"num_inference_steps": 1, "progress": False, "store": tmp_path}
    options |= {"window": 2, "seeds": (0,), "controls": False, "scorer": tiny.FakeScorer()}
    run = localize(pipe, Concept("cat", "object", (pair,)), **options)
    box = explore(run)
    assert box.strength.disabled and not box.neurons.disabled
    assert "read text and picture with the same matrices" in str(box.strength.tooltip)
    remarks = [one.value for one in box.children if isinstance(one, ipywidgets.HTML)]
    assert any("Edit strength is off: the layers of Lumina" in value for value in remarks)
    # By code it can be set all the same: the error is said, and the pictures stay.
    before = box.pictures.value
    box.strength.value = 1.0
    assert box.pictures.value == before and before.count("<figure") == 3
    assert "with the same matrices" in box.status.value


def test_an_edit_that_cannot_be_fitted_leaves_the_pictures(run: Run, pipe: Any) -> None:
    box = explore(run, pipe=pipe, tokens="end", ridge=0.0)
    assert not box.strength.disabled, "the twin: this family has edits"
    assert "Edit strength is off" not in "".join(
        one.value for one in box.children if isinstance(one, ipywidgets.HTML)
    )
    before = box.pictures.value
    box.strength.value = 1.0
    assert box.pictures.value == before and before.count("<figure") == 3
    assert "ridge is 0.0" in box.status.value


def test_a_run_knows_its_pipeline_and_does_not_keep_it() -> None:
    pipe = tiny.pipeline()
    run = generate(pipe, "a cat", num_inference_steps=1, progress=False)
    assert run.made_by is not None and run.made_by() is pipe
    del pipe
    gc.collect()
    assert run.made_by() is None


def test_what_cannot_be_explored_is_refused(run: Run, pipe: Any) -> None:
    plain = generate(pipe, "a cat", num_inference_steps=1, progress=False)
    with pytest.raises(LocogenError, match="give explore a run of localize"):
        explore(plain)
    with pytest.raises(LocogenError, match="weights are not the run's"):
        explore(run, pipe=tiny.pipeline(attention_head_dim=4))
    box = explore(run, pipe=pipe)
    edit = fit_edit(pipe, concept("blue"), layers=[1])
    with edit.applied(pipe):
        box.seed.value = 50
        assert "the model&#39;s weights changed since the run" in box.status.value
    box.seed.value = 51
    assert "effect" in box.status.value, "and goes on where it is undone"


@pytest.fixture(name="shell")
def make_shell() -> Iterator[InteractiveShell]:
    InteractiveShell.clear_instance()
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


def test_beside_the_widget_stands_its_twin(box: ExplorerBox, shell: InteractiveShell) -> None:
    """Two outputs: the living one, and HTML that pages keep, which follows what is changed."""
    with capture_output() as captured:
        shell.display_formatter.format(box)
        box.heatmap.selected = ("neon", 7)
    widget, first, *_, last = captured.outputs
    assert (
        "application/vnd.jupyter.widget-view+json" in widget.data and "text/html" not in widget.data
    )
    assert first.data["text/html"] != last.data["text/html"] == box.twin() == box.heatmap.twin
    kept = clean(box.twin())
    assert (
        kept.count("<img") == 4
        and "layers 7-8 hearing" in kept
        and "neon, layers 7-8: effect" in kept
    )
    assert (
        kept.count('src="data:image/png;base64,') == 4
        and "Heatmap of the effect of each window. blue:" in kept
    )


def test_the_attribution_stands_under_the_heatmap(run: Run, pipe: Any) -> None:
    """Its maps, in the widget and in its twin, and only where the concept has one."""
    few: dict[str, Any] = {"seeds": [0], "num_inference_steps": STEPS, "progress": False}
    proposed = attribute(pipe, concept("neon"), most_points=3, **few)
    box = explore(run, attribution=proposed)
    assert not box.map.value and box.twin().count("<img") == 4  # "blue" is shown first
    box.heatmap.selected = ("neon", 7)
    assert box.map.value.count("<img") == 2 and proposed.remark in box.map.value
    twin = box.twin()
    assert twin.count("<img") == 6
    assert (
        twin.index("Heatmap of the effect")
        < twin.index("Map of the shares")
        < twin.index("hearing")
    )
    with pytest.raises(LocogenError, match="is of 'red'"):
        explore(run, attribution=dataclasses.replace(proposed, concept="red"))


def test_a_search_by_attribution_brings_its_map_and_leaves_cells_empty(pipe: Any) -> None:
    options: dict[str, Any] = {"seeds": (0, 1), "num_inference_steps": 1, "progress": False}
    options |= {"window": 2, "search": "attribute", "scorer": tiny.FakeScorer()}
    run = localize(pipe, concept("blue"), **options)
    box = explore(run)
    assert box.map.value.count("<img") == 2
    unseen = [start for start, cell in box.explorer.cells("blue").items() if not cell["n"]]
    assert unseen
    box.heatmap.selected = ("blue", unseen[0])
    assert "was not looked at" in box.status.value
    assert "<img" in box.pictures.value  # its pictures can still be made


def test_effects_over_few_seeds_say_what_their_intervals_are_worth(run: Run) -> None:
    explorer = Explorer(run)
    note = "; with n = 2 seeds, intervals are hardly worth printing."
    assert note in explorer.finding(look())
    explorer.effects["n_seeds"] = 4
    assert "hardly" not in explorer.finding(look()), "the twin"


def test_names_are_escaped(run: Run) -> None:
    rows = run.table[run.table.concept == "blue"]
    table = run.table.assign(concept=run.table.concept.replace({"blue": NASTY}))
    assert len(rows) and (table.concept == NASTY).any()
    box = ExplorerBox(Explorer(run.with_table(table)))
    assert NASTY not in box.twin() + box.status.value + box.pictures.value
    assert "&lt;img src=x" in box.status.value
    # The browser sets the cells' words as text: `heatmap.js` has no markup.
    script = str(box.heatmap._esm)
    assert "textContent" in script and "innerHTML" not in script
