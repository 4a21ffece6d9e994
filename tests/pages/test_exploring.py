"""What a run's page lets one explore: all of it from the run's tables and pictures, within so many bytes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from support.made_up import EVIL, edited, fill_store, finish, notebook, study, swept

from locogen.markup import environment
from locogen.pages.build import build, gather
from locogen.pages.cleaning import arrange, headings
from locogen.pages.entries import STATES
from locogen.pages.exploring.album import PAGE, PAGE_OF_LARGE, Album, make_album, page_limit
from locogen.pages.exploring.explorable import explorable
from locogen.pages.exploring.maps import maps_of
from locogen.pages.exploring.pairs import (
    Pair,
    arms_of,
    by_importance,
    bytes_of,
    pairs_data,
    pairs_of,
)
from locogen.pages.results import read_run, read_runs
from locogen.pages.thumbnails import Scale, cell_styles


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = study(tmp_path / "reports", ("mini",), ("neon",))
    swept("neon").to_csv(folder / "mini-0" / "pictures.csv", index=False)
    return folder


def data_of(page: Path) -> Any:
    """What the page's script reads; None if there is nothing for it."""
    text = page.read_text(encoding="utf-8")
    block = re.search(r'<script type="application/json" id="page.data">(.*?)</script>', text)
    return block and json.loads(block[1])


def test_each_window_prompt_and_seed_has_its_pictures(results: Path) -> None:
    build(results)
    data = data_of(results / "mini-0" / "index.html")
    (sweep,) = data["sweeps"]
    assert [window["label"] for window in sweep["windows"]][:2] == ["layers 0–1", "layers 1–2"]
    assert [sample["seed"] for sample in sweep["samples"]] == [0, 1]
    lines = [dict(map(tuple, window["lines"])) for window in sweep["windows"]]
    assert lines[0]["Pictures"] == "n = 12; with n = 2 seeds, intervals are hardly worth printing"
    assert [window["note"] for window in sweep["windows"]][:3] == [
        "★ the carrier",
        "(has layer 1 in common with the carrier)",
        "",
    ]
    table = swept("neon")
    for sample in sweep["samples"]:
        shown = sample["pictures"]
        for role, start in (("window", 3), ("insert", 2)):
            asked = (
                (table["role"] == role)
                & (table["start"] == start)
                & (table["seed"] == sample["seed"])
            )
            (name,) = table[asked]["image"]
            place, words = shown[role][str(start)]
            assert data["pictures"][place]["file"] == f"pictures/{name}"
            assert words == "CLIP-score 0.50 (0.00)"
        assert shown["window"]["1"][1] == "CLIP-score 0.16 (−0.34)", "the one that loses it"
    for picture in data["pictures"]:
        full = (results / "mini-0" / picture["file"]).read_bytes()
        assert full == (results / "store" / Path(picture["file"]).name).read_bytes()


def test_the_code_has_nothing_to_explore(results: Path) -> None:
    build(results)
    assert data_of(results / "mini-0" / "code.html") is None


def test_what_does_not_fit_is_left_out_and_said(results: Path) -> None:
    run, entries = only(results)
    whole = explorable(run, entries, used=0)
    size = sum(len(picture["source"]) for picture in whole.data["pictures"])
    half = explorable(run, entries, used=PAGE - 200_000 - int(0.6 * size))
    assert not whole.left_out and half.left_out == "1 of 2 prompts and seeds fit into this page."
    assert len(half.data["sweeps"][0]["samples"]) == 1
    assert explorable(run, entries, used=PAGE).data is None, "no room at all"


def test_words_take_room_too(results: Path) -> None:
    run, _ = only(results)
    groups = [["0-baseline.png"], ["0-ceiling.png"]]
    assert make_album(run, groups, 100_000, [0, 0]).groups == 2, "the twin"
    assert make_album(run, groups, 100_000, [0, 100_000]).groups == 1
    pairs = pairs_of(edited(["layers 1-2"]))
    album = Album(places={pair.before: 0 for pair in pairs} | {pair.after: 1 for pair in pairs})
    (arm,) = pairs_data(pairs, album)["arms"]
    assert len(arm["pairs"]) == len(pairs)
    page = environment("locogen.pages").from_string("{{ pairs|tojson }}")
    written = len(page.render(pairs=arm["pairs"]).encode())
    assert written <= sum(map(bytes_of, pairs)) <= written + 8 * len(pairs)


@pytest.mark.parametrize("prompt", ["a cat", "<b> & 'tis", "Gogh’s, «Nacht»"])
def test_words_take_as_many_bytes_as_the_page_writes(prompt: str) -> None:
    """Plain JSON is smaller: the page writes each of < > & ' with six bytes."""
    pair = Pair("layer 3", "efficacy", prompt, 0, "a.png", "b.png", "CLIP-score 0.82 → 0.29")
    line = {"group": "The concept", "prompt": prompt, "seed": 0, "before": 9999, "after": 9999}
    line |= {"words": pair.words}
    page = environment("locogen.pages").from_string("{{ line|tojson }}, ").render(line=line)
    assert bytes_of(pair) == len(page.encode())
    plain = json.dumps(line) + ", "
    assert (bytes_of(pair) == len(plain.encode())) == (prompt == "a cat" or "«" in prompt)


def test_every_arm_is_shown_before_further_seeds() -> None:
    table = edited(["layers 1-2", "layers 3-4", "layers 5-6"])
    pairs = pairs_of(pd.concat([table.assign(seed=seed) for seed in (7, 8)]))
    of_an_arm = len(pairs) // 3
    ordered = by_importance(pairs)
    assert sorted(map(repr, ordered)) == sorted(map(repr, pairs))
    assert {pair.arm for pair in ordered[:of_an_arm]} == {"layers 1-2"}
    following = ordered[of_an_arm : 2 * of_an_arm]
    assert {(pair.arm, pair.seed) for pair in following} == {("layers 3-4", 7), ("layers 5-6", 7)}
    assert {pair.seed for pair in ordered[2 * of_an_arm :]} == {8}


def only(folder: Path) -> tuple[Any, Any]:
    runs = read_runs(folder)
    return runs[0], gather(runs)[0]


def test_large_pictures_may_take_more(results: Path) -> None:
    run, _ = only(results)
    names = ["0-baseline.png"]
    assert page_limit(run, names) == PAGE == page_limit(run, ["missing.png"])
    fill_store(results / "store", size=200)
    (results / "mini-0" / "pictures" / names[0]).unlink()
    assert page_limit(run, names) == PAGE_OF_LARGE
    album = make_album(run, [["0-baseline.png"], ["0-ceiling.png"]], 1_000_000)
    assert album.groups == 2 and album.place("missing.png") is None
    source = album.shown[0]["source"]
    assert len(source) > 10 * len(make_album(run, [names], 4000).shown[0]["source"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda table: table.drop(columns="image"),
        lambda table: table.assign(seed="many"),
        lambda table: table.assign(start="x"),
        lambda table: table.assign(image="../../secret.png"),
        lambda table: table.iloc[:0],
    ],
)
def test_a_damaged_table_of_pictures_leaves_the_page_as_it_was(results: Path, damage: Any) -> None:
    damage(swept("neon")).to_csv(results / "mini-0" / "pictures.csv", index=False)
    run, entries = only(results)
    assert explorable(run, entries, used=0).data is None


def test_data_cannot_end_its_element(results: Path) -> None:
    table = swept("neon").assign(prompt=f"{EVIL}</script><!--")
    table.to_csv(results / "mini-0" / "pictures.csv", index=False)
    build(results)
    page = results / "mini-0" / "index.html"
    assert data_of(page)["sweeps"][0]["samples"][0]["prompt"] == f"{EVIL}</script><!--"
    assert EVIL not in page.read_text(encoding="utf-8")


def test_pairs_of_an_evaluation() -> None:
    table = edited(["no edit", "layers 1-2"])
    pairs = pairs_of(table)
    assert arms_of(pairs) == ["layers 1-2"]
    assert pairs[-1].words == "CLIP-score 0.50 → 0.10; recognized before, not after"
    assert pairs_of(table.drop(columns="image_after")) == [], "an older run"
    twice = pd.concat([table, table.assign(measure="ordinary")])
    assert len(pairs_of(twice)) == len(pairs), "probes of one prompt share their pictures"


def test_pairs_stand_under_the_group_that_the_table_names() -> None:
    """Where several concepts are erased, a prompt is of one that is gone, or of one that stays."""
    table = edited(["layers 1-2"])
    assert {pair.group for pair in pairs_of(table)} <= {"efficacy", "specificity", "generality"}
    groups = ["kept", "erased"] + ["plain"] * (len(table) - 2)
    shown = [pair.group for pair in pairs_of(table.assign(group=groups))]
    assert shown[:2] == ["erased", "kept"] and set(shown[2:]) <= {"plain"}


def test_maps_of_an_attribution(tmp_path: Path) -> None:
    cells = [("step", "0", 0.1), ("step", "1", 0.3), ("token", "2 neon", 0.4)]
    table = pd.DataFrame(cells, columns=["by", "label", "share"]).assign(concept=EVIL, layer=3)
    steps, tokens = maps_of(table)
    assert [(label, line[0][0]) for label, line in steps.rows] == [("0", "10"), ("1", "30")]
    assert tokens.title.endswith("layers × words")
    run = finish(tmp_path / "run", "neon")
    table.to_csv(run / "shares.csv", index=False)
    build(tmp_path)
    text = (run / "index.html").read_text(encoding="utf-8")
    assert 'class="map"' in text and EVIL not in text
    (run / "shares.csv").write_text("concept,by\nneon,step\n")
    assert not explorable(read_run(run), [], 0).maps


def test_colors_can_be_read_on() -> None:
    styles = cell_styles([-1.0, 0.0, 1.0, None], Scale(-1.0, 1.0))
    assert [style[-7:] for style in styles] == ["#ffffff", "#000000", "#ffffff", "#000000"]


def test_pages_without_code_drop_what_speaks_to_who_runs_the_notebook(tmp_path: Path) -> None:
    run = finish(tmp_path / "run", "neon")
    book = notebook("neon")
    book.cells[-1].metadata["tags"] = ["notebook"]
    (run / "notebook.ipynb").write_text(json.dumps(book), encoding="utf-8")
    build(tmp_path)
    pages = {name: (run / name).read_text(encoding="utf-8") for name in ("index.html", "code.html")}
    assert "The last words." not in pages["index.html"] and "Where is neon?" in pages["index.html"]
    assert "The last words." in pages["code.html"]


def test_headings_lead_to_themselves() -> None:
    body, _ = arrange(
        "<h1>a <b>b</b></h1><h2 id='what?'>c?</h2><h4>d</h4><h2 id='e'>&lt;e&gt;</h2>"
    )
    assert headings(body) == [("section-1", "a b"), ("section-2", "c?"), ("e", "<e>")]


def test_the_page_says_what_it_means_and_when_it_was_made(results: Path) -> None:
    build(results)
    text = (results / "mini-0" / "index.html").read_text(encoding="utf-8")
    assert "What this means" in text and "through\nthrough" not in text
    assert '<time datetime="2025-01-02">' in text and "The words of this page" in text
    for name in re.findall(r'<a href="#([^"]+)">', text):
        assert f'id="{name}"' in text, f"the table of contents leads nowhere: {name}"


@pytest.mark.parametrize("state", [state for state in STATES if state != "failed"])
def test_every_outcome_is_explained(state: str) -> None:
    entry = SimpleNamespace(concept="neon", kind="style", state=state)
    shown = SimpleNamespace(entry=entry, place="layers 12-13")
    template: Any = environment("locogen.pages").get_template("meaning.html").module
    assert "<p>" in template.outcome(shown)
    entry.state = "of no name"  # the twin
    assert "<p>" not in template.outcome(shown)


def test_a_missing_store_leaves_the_page_as_it_was(results: Path) -> None:
    (results / "store").rename(results / "gone")
    build(results)
    assert data_of(results / "mini-0" / "index.html") is None


def test_pictures_are_not_read_from_elsewhere(results: Path, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9), "red").save(tmp_path / "secret.png")
    run, _ = only(results)
    assert make_album(run, [["../../secret.png", str(tmp_path / "secret.png")]], 10**6).shown == []
