"""Whatever is in one run's folder, it is shown as damaged and all others as they are.

Forty mutations of what a run leaves are built in one study, beside a run that is whole: old results, files edited by
hand, disks that lost half a file.
"""

import base64
import errno
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat.v4 as nb
import pandas as pd
import pytest
from PIL import Image
from support.made_up import effects, fill_store, finish, nbformat_write, notebook, pictures, png
from test_report import Reader

from locogen import files
from locogen.files import CannotWrite
from locogen.pages import build as building, results as reading
from locogen.pages.build import build
from locogen.pages.png import shrink
from locogen.pages.thumbnails import small_picture
from locogen.studies.records import Record, read_record

Mutation = Callable[[Path], Any]


def said(**keys: Any) -> Mutation:
    """Other values in `result.json`."""

    def mutate(folder: Path) -> None:
        file = folder / "result.json"
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **keys}))

    return mutate


def written(name: str, content: str | bytes) -> Mutation:
    """Another content of a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def tabled(**columns: Any) -> Mutation:
    """Other columns in `effects.csv`; None takes one away."""

    def mutate(folder: Path) -> None:
        table = effects("other")
        for name, value in columns.items():
            table = table.drop(columns=name) if value is None else table.assign(**{name: value})
        table.to_csv(folder / "effects.csv", index=False)

    return mutate


def booked(change: Callable[[Any], Any]) -> Mutation:
    """Another notebook."""

    def mutate(folder: Path) -> None:
        (folder / "notebook.ipynb").write_text(json.dumps(change(notebook("other"))))

    return mutate


def with_figure(data: str) -> Mutation:
    output = nb.new_output(
        "display_data", data={"image/png": data}, metadata={"image/png": {"alt": "x"}}
    )
    return booked(lambda _: nb.new_notebook(cells=[nb.new_code_cell("x", outputs=[output])]))


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a hundred bytes that claims more pixels than a memory holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(bytes(99))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def a_folder(name: str) -> Mutation:
    def mutate(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return mutate


WINDOWS = [dict(concept="other", start=1, width=2, reason="ahead")]


def a_file(name: str) -> Mutation:
    def mutate(folder: Path) -> None:
        (folder / name).rename(folder / "moved")
        (folder / name).write_text("x")

    return mutate


DEEP = "[" * 100_000 + "]" * 100_000
HUGE = 10**400
FINDINGS: dict[str, Mutation] = {  # result.json and effects.csv
    "half a file": lambda folder: os.truncate(folder / "result.json", 200),
    "no object": written("result.json", "[1, 2]"),
    "no text": written("result.json", b"\xff\xfe\x00{"),
    "NaN": said(seconds=float("nan")),
    "infinity": written("result.json", '{"seconds": 1e999, "carriers": []}'),
    "a huge number": said(pictures=HUGE),
    "a number of many digits": written("result.json", f'{{"pictures": {"9" * 5000}}}'),
    "nested deeply": written("result.json", f'{{"settings": {DEEP}}}'),
    "nested settings": said(settings={"a": json.loads("[" * 60 + "]" * 60)}),
    "half a character": said(title="\ud800"),
    "half a character inside": said(parameters={"concept": "\udfff"}),
    "a title that is a list": said(title=["x"]),
    "a model that is a number": said(model=3),
    "a model that is a table": said(model={"name": "mini"}),
    "concepts that are a text": said(concepts="neon"),
    "seconds that are a text": said(seconds="131"),
    "negative seconds": said(seconds=-1),
    "pictures that are true": said(pictures=True),
    "carriers that are a text": said(carriers="layers 1-2"),
    "carriers that are numbers": said(carriers=[1, 2]),
    "a carrier without a concept": said(carriers=[{"start": 1, "width": 2}]),
    "a carrier that is half": said(carriers=[dict(concept="other", start=1.5, width=2)]),
    "a carrier of no width": said(carriers=[dict(concept="other", start=1, width=0)]),
    "a carrier beyond the table": said(carriers=[dict(concept="other", start=99, width=2)]),
    "settings with a huge number": said(settings={"scale": HUGE}),
    "versions that are a list": said(versions=["2.13"]),
    "a folder in its place": a_folder("result.json"),
    "an empty table": written("effects.csv", ""),
    "a table of other columns": written("effects.csv", "a,b\n1,2\n"),
    "zeros": written("effects.csv", bytes(4096)),
    "ragged lines": written("effects.csv", "concept,axis\nx,layer,1,2,3\ny\n"),
    "no estimate": tabled(estimate=None),
    "estimates that are words": tabled(estimate="much"),
    "estimates that are missing": tabled(estimate=float("nan")),
    "estimates without end": tabled(estimate=float("inf")),
    "estimates that are huge": tabled(estimate=1e308),
    "an interval of words": tabled(low="low"),
    "an interval without end": tabled(high=float("inf")),
    "positions between layers": tabled(position=0.5),
    "positions that are huge": tabled(position=10**18),
    "positions twice": tabled(position=1),
    "widths of words": tabled(width="two"),
    "no concept": tabled(concept=""),
    "the table is gone": lambda folder: (folder / "effects.csv").unlink(),
}
NOTEBOOKS: dict[str, Mutation] = {
    "half a notebook": lambda folder: os.truncate(folder / "notebook.ipynb", 300),
    "cells that are a table": booked(lambda book: {**book, "cells": {"a": 1}}),
    "cells that are numbers": booked(lambda book: {**book, "cells": [1, 2]}),
    "a notebook nested deeply": written("notebook.ipynb", DEEP),
    "a notebook of zeros": written("notebook.ipynb", bytes(4096)),
    "a picture bomb in the notebook": with_figure(base64.b64encode(bomb()).decode()),
    "a picture that is none": with_figure(base64.b64encode(b"no picture").decode()),
    "no base64": with_figure("x"),
}
DAMAGED = {**FINDINGS, **NOTEBOOKS}
# What is odd beside the finding: the run is shown with it, less what cannot be shown.
ODD: dict[str, Mutation] = {
    "null for a value": said(seconds=None, settings=None, title=None),
    "a byte-order mark": lambda folder: [
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
        for name in ("result.json", "effects.csv", "notebook.ipynb")
    ],
    "a picture bomb": lambda folder: (folder / "pictures" / "0-baseline.png").write_bytes(bomb()),
    "half a picture": lambda folder: os.truncate(folder / "pictures" / "0-baseline.png", 99),
    "a table of pictures of words": written("pictures.csv", "concept,seed,start\nother,many,x\n"),
    "seeds without end": written("pictures.csv", "concept,seed\nother,inf\n"),
    "seeds far apart": written("pictures.csv", f"concept,seed\nother,0\nother,1\nother,{10**15}\n"),
    "pictures that are a file": a_file("pictures"),
    "a folder for a page": lambda folder: (folder / "index.html").mkdir(),
    "a second table in ruins": written("summary.csv", bytes(99)),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    books = list(NOTEBOOKS.values())
    for number, mutate in enumerate({**DAMAGED, **ODD}.values()):
        run = finish(folder / f"run-{number}", "other", carriers=[] if mutate in books else WINDOWS)
        if mutate in books:  # a notebook that localizes nothing has no curve to draw
            (run / "effects.csv").unlink()
        else:
            nbformat_write(nb.new_notebook(), run)  # soon shown
        pictures("other").to_csv(run / "pictures.csv", index=False)
        fill_store(run / "pictures")
        mutate(run)
    finish(folder / "whole", "neon", model="another")
    (folder / "study.json").write_text('{"title": "\\ud800", "runs": 3}')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        build(folder)
    return folder


def page_of(folder: Path) -> str:
    return Reader((folder / "index.html").read_text(encoding="utf-8")).text


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_run_says_so(built: Path, name: str) -> None:
    run = built / f"run-{list(DAMAGED).index(name)}"
    assert "Failed: " in page_of(run)
    assert f"{run.name}/index.html" in (built / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_beside_the_finding_is_left_out(built: Path, name: str) -> None:
    run = built / f"run-{len(DAMAGED) + list(ODD).index(name)}"
    if name != "a folder for a page":
        assert "other: found" in page_of(run) and "Failed: " not in page_of(run)


def test_a_whole_run_is_shown_beside_forty_damaged_ones(built: Path) -> None:
    assert len(DAMAGED) > 40
    index = Reader((built / "index.html").read_text(encoding="utf-8"))
    alts = [attrs["alt"] or "" for tag, attrs in index.tags if tag == "img"]
    assert any(
        "another, neon: the window of layers 1-2, effect 0.34 [0.28, 0.40]" in alt for alt in alts
    )
    assert "neon: found" in page_of(built / "whole")
    assert (built / "model-another.html").exists() and (built / "study.html").exists()


def test_what_nobody_thought_of_damages_its_run_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard around each run, for what the checks on reading let through."""
    finish(tmp_path / "odd", "other")
    finish(tmp_path / "whole", "neon")
    monkeypatch.setattr(reading, "read_record", lambda file: mistaken(file))
    index = Reader(build(tmp_path).read_text(encoding="utf-8")).text
    assert "its results are damaged: " in index and "neon: found" in page_of(tmp_path / "whole")


def mistaken(file: Path) -> Record:
    """A record of which the check forgot a key."""
    record = read_record(file)
    if file.parent.name != "odd":
        return record
    return replace(record, facts={**record.facts, "seconds": "many"})


def test_a_fault_of_the_pages_themselves_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: what no run is to blame for is raised."""
    finish(tmp_path / "whole", "neon")
    monkeypatch.setattr(building, "_remove_stale", lambda folder, current: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(tmp_path)


def test_a_picture_bomb_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb())
    assert small_picture(tmp_path / "bomb.png", 64) is None
    with pytest.raises(ValueError, match="60000 × 60000 pixels is too large"):
        shrink(base64.b64encode(bomb()).decode())
    Image.new("RGB", (9, 9)).save(tmp_path / "small.png")
    assert small_picture(tmp_path / "small.png", 64), "the twin"
    assert shrink(png())


@pytest.mark.parametrize("content", ["1", "null", '"x"', "NaN", "{", ""])
def test_a_record_never_raises(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    record = read_record(tmp_path / "result.json")
    assert record.facts == {} and record.damage.startswith("result.json ")
    (tmp_path / "result.json").write_text(
        '{"seconds": 1.5, "title": "x", "own": [1, {"a": true}], "cell": null}'
    )
    record = read_record(tmp_path / "result.json")
    assert record.damage == "" and record.facts == {
        "seconds": 1.5,
        "title": "x",
        "own": [1, {"a": True}],
    }


# --- where pages are written ---------------------------------------------------------------------


def test_nothing_is_written_through_links(tmp_path: Path) -> None:
    """Neither into a folder of pictures that leads elsewhere, nor into a file that a half-made page would be."""
    folder, outside = tmp_path / "study", tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    for name in ("links", "parts", "whole"):
        run = finish(folder / name, "neon")
        pictures("neon").to_csv(run / "pictures.csv", index=False)
    fill_store(folder / "store")
    (folder / "links" / "pictures").symlink_to(outside)
    (folder / "parts" / ".index.html.part").symlink_to(outside / "mine.txt")
    (folder / "parts" / "code.html").symlink_to(outside / "mine.txt")
    build(folder)
    assert [file.name for file in outside.iterdir()] == ["mine.txt"]
    assert (outside / "mine.txt").read_text() == "mine"
    assert (
        "neon: found" in page_of(folder / "parts")
        and not (folder / "parts" / "code.html").is_symlink()
    )
    assert (folder / "whole" / "pictures" / "0-baseline.png").is_file(), "the twin"


def test_links_in_the_store_are_not_followed(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    pictures("neon").to_csv(finish(folder / "run", "neon") / "pictures.csv", index=False)
    fill_store(folder / "store")
    (folder / "store" / "0-baseline.png").rename(tmp_path / "private.png")
    (folder / "store" / "0-baseline.png").symlink_to(tmp_path / "private.png")
    build(folder)
    assert not (folder / "run" / "pictures" / "0-baseline.png").exists()
    assert (folder / "run" / "pictures" / "0-ceiling.png").exists(), "the twin"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.ENOSPC, "Free some space"), (errno.EROFS, "Copy it"), (errno.EACCES, "permissions")],
)
def test_a_folder_that_takes_no_files_is_named(
    tmp_path: Path, monkeypatch, number: int, remedy: str
) -> None:
    finish(tmp_path / "run", "neon")

    def refuse(*names: Any) -> None:
        raise OSError(number, os.strerror(number), str(names[0]))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", refuse)
        with pytest.raises(CannotWrite, match=remedy) as caught:
            build(tmp_path)
    assert str(tmp_path / "run") in str(caught.value) and 'results = "…"' in str(caught.value)
    assert build(tmp_path).exists(), "the twin"


def test_a_table_as_excel_saves_it(tmp_path: Path) -> None:
    """With a byte-order mark, which is no part of the first column's name."""
    (tmp_path / "effects.csv").write_bytes(effects("neon").to_csv(index=False).encode("utf-8-sig"))
    assert reading.read_effects(tmp_path / "effects.csv").columns[0] == "method"


def test_a_window_that_was_not_looked_at_has_no_number_and_others_need_one(tmp_path: Path) -> None:
    lines = [{"concept": "neon", "axis": "layer", "position": 3, "estimate": 0.4, "n": 4}]
    unseen = {"concept": "neon", "axis": "layer", "position": 4, "estimate": None, "n": 0}
    file = tmp_path / "effects.csv"
    pd.DataFrame([*lines, unseen]).to_csv(file, index=False)
    assert len(reading.read_effects(file)) == 2
    pd.DataFrame([*lines, unseen | {"n": 4}]).to_csv(file, index=False)
    with pytest.raises(ValueError, match="a window without estimate"):
        reading.read_effects(file)
