"""The pages over many runs: models × concepts, one scale, what failed and where, how to make it again."""

import io
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from support.made_up import EVIL, effects, fail, finish, pictures, study
from test_report import Reader, complaints, pages

from locogen.pages.build import build, gather
from locogen.pages.entries import addresses, entries
from locogen.pages.index import comparison_page, index_page
from locogen.pages.provenance import study_toml
from locogen.pages.results import read_run, read_runs
from locogen.pages.thumbnails import CELL, Scale, heat_strip, small_picture

MODELS, CONCEPTS = ("mini", "mini-b"), ("neon", "van gogh", "owl")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, three concepts, a failed run of one of them, a concept that only fails."""
    folder = study(tmp_path_factory.mktemp("made") / "reports", MODELS, CONCEPTS)
    fail(
        folder / "late",
        "neon, wide",
        "out of memory",
        model="mini-b",
        parameters={"concept": "mini/neon"},
    )
    fail(folder / "lost", EVIL, f"there is no {EVIL}")
    build(folder)
    return folder


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def cell(index: str, concept: str, model: str) -> str:
    """What the index's matrix has where a row and a column meet."""
    row = index.partition(f'<tr data-concept="{concept}">')[2].partition("</tr>")[0]
    return row.partition(f'<td data-model="{model}"')[2].partition("</td>")[0]


def test_all_pages_follow_the_rules(built: Path) -> None:
    made = dict(pages(built))
    names = {path.name for path in made if path.parent == built}
    assert {
        "index.html",
        "study.html",
        "model-mini.html",
        "model-mini-b.html",
        "concept-owl.html",
    } <= names
    assert not [complaint for path, page in made.items() for complaint in complaints(path, page)]


def test_a_row_a_concept_and_a_column_a_model(built: Path) -> None:
    index = text(built / "index.html")
    heads = re.findall(r'<th scope="col" data-model="[^"]+"><a href="([^"]+)">([^<]+)', index)
    assert heads == [("model-mini.html", "mini"), ("model-mini-b.html", "mini-b")]
    for model in MODELS:
        for number, concept in enumerate(CONCEPTS):
            slug = f"{model}-{number + 3 * (model == 'mini-b')}"
            assert f'href="{slug}/index.html"' in cell(index, concept, model)
            assert f'href="{slug}/effects.csv"' in cell(index, concept, model)
    told = Reader(cell(index, "neon", "mini")).text
    assert "layers 0–1" in told and "0.34 [0.28, 0.40], 85 %" in told and "localized" in told
    assert "no single window" in Reader(cell(index, "van gogh", "mini-b")).text


def test_a_failed_run_stands_where_it_belongs_with_its_error_and_cell(built: Path) -> None:
    index = text(built / "index.html")
    there = cell(index, "neon", "mini-b")
    assert "failed</strong>: out of memory" in there and ">wide</a>" in there
    assert 'href="late/code.html#cell-id-5"' in there
    assert "failed" not in Reader(cell(index, "neon", "mini")).text
    assert 'id="cell-id-5"' in text(built / "late" / "code.html"), "the link leads to the cell"
    assert 'href="code.html#cell-id-5"' in text(built / "late" / "index.html")
    assert EVIL in Reader(index).text, "one whose concept nobody knows has a row of its own"


def test_one_scale_for_all_strips_of_a_page(built: Path) -> None:
    """The same effect has the same color in every run of a page: the strips are drawn on the page's scale."""
    found = entries(read_runs(built))
    scale = Scale.of(entry.rows for entry in found if entry.rows is not None)
    assert scale.high == pytest.approx(4 * 0.34) and scale.low == 0
    weak, strong = (
        Image.open(io.BytesIO(heat_strip([value, 0.0], scale))).convert("RGB")
        for value in (0.34, 1.36)
    )
    assert _red(weak) < _red(strong)
    alone = Image.open(io.BytesIO(heat_strip([0.34, 0.0], Scale(0, 0.34)))).convert("RGB")
    assert _red(alone) == _red(strong), "the twin: on a scale of its own the weak one looks strong"
    assert "from 0.00 to 1.36" in Reader(text(built / "index.html")).text
    page = Reader(text(built / "concept-neon.html"))
    assert (
        "mini" in page.text
        and "mini-b" in page.text
        and "all figures here have one scale" in " ".join(page.text.split())
    )


def test_shares_that_gradients_propose_do_not_pale_what_was_measured(tmp_path: Path) -> None:
    folder = study(tmp_path / "reports", ("mini",), ("neon", "owl"))
    build(folder)
    before = Reader(text(folder / "index.html")).text
    place = folder / "mini-1" / "effects.csv"
    table = pd.read_csv(place)
    table.assign(method="attribution", estimate=10 * table["estimate"]).to_csv(place, index=False)
    build(folder)
    page = Reader(text(folder / "index.html")).text
    scale = "from 0.00 to 0.34"
    assert "from 0.00 to 0.68" in before and scale in page
    assert "each on a scale of its own" in page and "scale of its own" not in before


def test_an_attribution_is_a_proposal_and_says_of_what(tmp_path: Path) -> None:
    """In the index, its filter and counts, on the pages of model and concept, and on its own."""
    folder = study(tmp_path / "reports", ("mini",), ("neon", "owl"))
    place = folder / "mini-0"
    table = pd.read_csv(place / "effects.csv")
    facts = json.loads((place / "result.json").read_text())
    facts |= {"carriers": [], "finding": ""}
    (place / "result.json").write_text(json.dumps(facts))
    build(folder)
    unjudged = Reader(text(folder / "index.html")).text
    assert "not judged" in unjudged and "gradients" not in unjudged, "the twin: effects, no verdict"

    table.assign(method="attribution").to_csv(place / "effects.csv", index=False)
    build(folder)
    index = text(folder / "index.html")
    assert "not judged" not in Reader(index).text
    shown = Reader(cell(index, "neon", "mini")).text
    words = "gradients propose layers 0–1, a share of 0.34 [0.28, 0.40] of what all layers do"
    assert "proposal, not tested by pictures" in shown and words in shown
    assert "2 outcomes: 1 localized, 1 proposal, not tested by pictures." in Reader(index).text
    assert '<option value="proposed">proposal, not tested by pictures</option>' in index
    for page in ("model-mini.html", "concept-neon.html"):
        assert words in Reader(text(folder / page)).text
    own = Reader(text(place / "index.html")).text
    assert "neon: gradients propose the window of layers 0-1, a share of 0.34" in own
    assert "That is a proposal" in " ".join(own.split()) and "CLIP-score by" not in own


OF_EFFECTS = (
    "on one scale",
    "how much of the score is lost with a window",
    "Red: the window carries the concept",
    "The carrier is outlined",
    "A positive effect means",
    "what carries them",
    "what replacing a window takes away",
)


@pytest.mark.parametrize("proposed", [(), (0,), (0, 1)], ids=["none", "one", "all"])
def test_proposals_alone_are_not_called_effects(tmp_path: Path, proposed: tuple[int, ...]) -> None:
    """Pages of attributions alone have no word of what only measured windows show."""
    folder = study(tmp_path / "reports", ("mini",), ("neon", "owl"))
    for number in proposed:
        place = folder / f"mini-{number}"
        table = pd.read_csv(place / "effects.csv")
        table.assign(method="attribution").to_csv(place / "effects.csv", index=False)
        facts = json.loads((place / "result.json").read_text())
        (place / "result.json").write_text(json.dumps(facts | {"carriers": [], "finding": ""}))
    runs = read_runs(folder)
    found, models, concepts = gather(runs)
    index = index_page(runs, found, models, concepts)
    comparison = comparison_page("mini", found, by="concept", others=concepts)
    words = " ".join(" ".join(Reader(page).text.split()) for page in (index, comparison))
    are_all = len(proposed) == 2
    # The twin: where something was measured, all of this stands there.
    assert [each in words for each in OF_EFFECTS] == [not are_all] * len(OF_EFFECTS)
    assert ("no picture has tested them" in words) == bool(proposed)
    assert ("No picture was made with a window's prompt changed" in words) == are_all
    legend = index.partition('<div class="legend">')[2].partition("</div>")[0]
    assert ('class="bar"' in legend) != are_all


@pytest.mark.parametrize("seeds", [2, 4, [0, 1], [0, 1, 2, 3], None, "many"])
def test_lines_over_few_seeds_say_what_their_intervals_are_worth(
    tmp_path: Path, seeds: Any
) -> None:
    """The line of an entry in the index and on the pages of model and concept, without scripts.

    The table says how many seeds there are (`n_seeds`), or else the run's settings.
    """
    folder = study(tmp_path / "reports", ("mini",), ("neon",))
    place = folder / "mini-0"
    table = pd.read_csv(place / "effects.csv")
    facts = json.loads((place / "result.json").read_text())
    facts["settings"]["seeds"] = seeds
    if isinstance(seeds, int):
        table.assign(n_seeds=seeds).to_csv(place / "effects.csv", index=False)
        del facts["settings"]["seeds"]
    (place / "result.json").write_text(json.dumps(facts))
    runs = read_runs(folder)
    found, models, concepts = gather(runs)
    index = index_page(runs, found, models, concepts)
    comparison = comparison_page("mini", found, by="concept", others=concepts)
    note = "; with n = 2 seeds, intervals are hardly worth printing"
    is_few = seeds in (2, [0, 1])
    assert (note in Reader(cell(index, "neon", "mini")).text) == is_few
    # The line of the table, and the sentence below the curve.
    assert Reader(comparison).text.count(note) == 2 * is_few


def _red(strip: Image.Image) -> int:
    """How far the first cell is from white."""
    red, green, blue = strip.getpixel((CELL // 2, 6))
    return 2 * red - green - blue


def test_the_carrier_is_outlined_and_not_only_colored() -> None:
    values, scale = [0.0, 0.3, 0.1], Scale(0, 0.3)
    plain, marked = (
        Image.open(io.BytesIO(heat_strip(values, scale, marked=at))).convert("L")
        for at in (None, 1)
    )
    assert plain.size == marked.size == (3 * CELL, 12)
    dark = np.asarray(marked) == 0
    assert (
        dark[0, CELL : 2 * CELL].all()
        and not dark[:, :CELL].any()
        and not dark[:, 2 * CELL :].any()
    )
    assert not (np.asarray(plain) == 0).any()


def test_every_figure_has_its_numbers_in_a_table(built: Path) -> None:
    page = text(built / "concept-owl.html")
    numbers = page.partition("The numbers behind the figures")[2]
    assert len(re.findall("<tr>", numbers)) == 1 + 6  # the head and six windows
    assert "[" in Reader(numbers).text
    run = text(built / "mini-0" / "index.html")
    assert "The numbers behind the figures: effects" in run and "ceiling" in Reader(run).text


def test_pictures_are_small_in_the_page_and_whole_beside_it(built: Path) -> None:
    index = text(built / "index.html")
    shown = cell(index, "neon", "mini")
    assert shown.count("data:image/webp") == 2
    linked = re.findall(r'href="(mini-0/pictures/[^"]+)"', shown)
    assert [Path(name).name for name in linked] == ["0-baseline.png", "0-window-0.png"]
    for name in linked:
        assert (built / name).read_bytes() == (built / "store" / Path(name).name).read_bytes()
    assert text(built / "model-mini.html").count("data:image/webp") == 3 * 3, "with the ceiling"


def test_results_without_their_store_keep_their_pictures(tmp_path: Path) -> None:
    folder = study(tmp_path / "reports", ["mini"], ["neon"])
    build(folder)
    before = text(folder / "index.html")
    (folder / "store").rename(tmp_path / "gone")
    build(folder)
    assert text(folder / "index.html") == before and "image/webp" in before


def test_only_pictures_of_the_store_are_taken(tmp_path: Path) -> None:
    """A table that names another file gets nothing of it."""
    folder = study(tmp_path / "reports", ["mini"], ["neon"])
    Image.new("RGB", (9, 9), "red").save(tmp_path / "secret.png")
    (folder / "store" / "words.png").write_text("no picture")
    table = pictures("neon").assign(image=["../../secret.png", "words.png"] * 8)
    table.to_csv(folder / "mini-0" / "pictures.csv", index=False)
    assert "image/webp" not in text(build(folder))
    assert not list((folder / "mini-0").rglob("secret.png"))


@pytest.mark.parametrize(
    ("place", "asked", "shown"),
    [
        ("kept", "kept", True),
        ("a/kept", "kept", False),
        ("../kept", "../kept", False),
        ("kept", None, True),
    ],
)
def test_a_store_of_its_own_is_one_in_the_studys_folder(
    tmp_path: Path, place: str, asked: str | None, shown: bool
):
    base = tmp_path / "study"
    folder = study(base / "a" / "b", ["mini"], ["neon"])
    store = base / place
    (folder / "store").rename(store)
    told = json.loads((folder / "mini-0" / "result.json").read_text())
    told["parameters"]["store"] = str(store) if asked is None else asked
    (folder / "mini-0" / "result.json").write_text(json.dumps(told))
    about = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps({**about, "base": "../.."}))
    assert "image/webp" not in text(build(folder)), "a folder of pictures that is no store"
    (store / "run-0.json").write_text("{}")
    assert ("image/webp" in text(build(folder))) is shown


@pytest.mark.slow
def test_the_index_of_100_runs_is_under_1_mb(tmp_path: Path) -> None:
    """With pictures of pure noise, which no format makes small."""
    folder = study(tmp_path / "reports", MODELS, [f"concept {number}" for number in range(50)])
    runs = read_runs(folder)
    found, models, concepts = gather(runs)
    index = index_page(runs, found, models, concepts)
    single = sum(entry.row["start"] is not None for entry in found)
    assert index.count('class="run"') == 100 and index.count("image/webp") == 100 + single > 150
    assert len(index.encode()) < 1_000_000


def test_the_study_page_makes_the_same_runs_again(built: Path) -> None:
    page = Reader(text(built / "study.html")).text
    for words in (
        "8 runs on mini, mini-b: 2304 pictures in",
        "2.13.0",
        "0, 1",
        "locogen run reports.toml",
        "A study",
        "torch",
    ):
        assert words in page, words
    runs = [run for run in read_runs(built) if not run.error]
    again = tomllib.loads(study_toml(runs, title='A "study"\x7f\n'))
    assert again["title"] == 'A "study"\x7f\n' and again["notebook"] == "localize"
    assert [run["name"] for run in again["run"]] == [run.folder.name for run in runs]
    for given, run in zip(again["run"], runs, strict=True):
        own = {key: value for key, value in given.items() if key not in ("name", "title")}
        assert again["defaults"] | own == run.facts["parameters"]


def test_what_differs_between_runs_is_told(tmp_path: Path) -> None:
    finish(tmp_path / "a", "neon", settings={"steps": 50, "dtype": "float32"})
    finish(
        tmp_path / "b",
        "owl",
        settings={"steps": 20, "dtype": "float32"},
        versions={"torch": "2.14.0"},
    )
    build(tmp_path)
    page = text(tmp_path / "study.html")
    differing = Reader(page.partition("What differs between runs")[2]).text
    assert all(words in differing for words in ("steps", "50", "20", "torch", "2.14.0"))
    assert "dtype" not in differing and "dtype" in Reader(page).text


def test_different_scorers_are_told_about(tmp_path: Path) -> None:
    finish(tmp_path / "a", "neon", settings={"scorer": "one"})
    finish(tmp_path / "b", "neon", settings={"scorer": "one"}, model="sd")
    assert "different scorers" not in Reader(text(build(tmp_path))).text
    finish(tmp_path / "c", "neon", settings={"scorer": "two"}, model="sd-2")
    assert "different scorers (one, two)" in Reader(text(build(tmp_path))).text


def test_a_run_of_several_widths_has_an_entry_for_each(tmp_path: Path) -> None:
    folder = finish(tmp_path / "a", "neon")
    both = [effects("neon"), effects("neon", 3).assign(width=4)]
    pd.concat(both).to_csv(folder / "effects.csv", index=False)
    found = entries([read_run(folder)])
    assert [entry.name for entry in found] == ["neon · width 2", "neon · width 4"]
    assert [set(entry.effects["width"]) for entry in found] == [{2}, {4}]
    page = comparison_page("neon", found, by="model", others={"mini": "model-mini.html"})
    assert page.count("<figure>") == 2


def test_a_run_is_named_by_what_its_place_does_not_say(tmp_path: Path) -> None:
    for number, title in enumerate(("neon", "neon, mini", "neon, mini, seeds 2", "wide")):
        finish(tmp_path / f"{number}", "neon", title=title)
    names = [entry.name for entry in entries(read_runs(tmp_path))]
    assert names == ["neon, 0", "neon, 1", "seeds 2", "wide"], (
        "two that are called alike get their folders' names"
    )


def test_names_that_slug_alike_have_pages_of_their_own(tmp_path: Path) -> None:
    found = addresses("concept", ["Neon!", "neon", "NEON", "neon"])
    assert len(found) == 3 and len({address.lower() for address in found.values()}) == 3
    assert all(re.fullmatch(r"concept-neon(-\w{6})?\.html", address) for address in found.values())
    finish(tmp_path / "a", "Neon!")
    finish(tmp_path / "b", "neon")
    build(tmp_path)
    assert len(list(tmp_path.glob("concept-neon*.html"))) == 2


def test_what_has_not_changed_is_not_made_again(tmp_path: Path) -> None:
    for name in ("one", "two"):
        finish(tmp_path / name, name)
    build(tmp_path)
    before = {path: path.stat().st_mtime_ns for path, _ in pages(tmp_path)}
    told = json.loads(text(tmp_path / "two" / "result.json"))
    (tmp_path / "two" / "result.json").write_text(json.dumps(told | {"finding": "quite another"}))
    build(tmp_path)
    same = {path for path, at in before.items() if path.stat().st_mtime_ns == at}
    assert same == {
        tmp_path / name for name in ("one/index.html", "one/code.html", "concept-one.html")
    }
    assert "quite another" in text(tmp_path / "two" / "index.html")


def test_pages_of_what_is_gone_go_too(tmp_path: Path) -> None:
    finish(tmp_path / "a", "neon")
    finish(tmp_path / "b", "owl")
    build(tmp_path)
    (tmp_path / "concept-mine.html").write_text("<p>somebody's own</p>")
    for path in (tmp_path / "b").iterdir():
        path.unlink()
    build(tmp_path)
    assert {path.name for path in tmp_path.glob("concept-*")} == {
        "concept-neon.html",
        "concept-mine.html",
    }


def test_a_picture_that_is_none_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<svg onload=alert(1)>")
    assert small_picture(tmp_path / "a.png", 64) is None
    Image.new("RGB", (300, 200)).save(tmp_path / "b.png")
    data = small_picture(tmp_path / "b.png", 64)
    assert data is not None and Image.open(io.BytesIO(data)).size == (64, 43)
