"""What `reports/studies.md` says of a notebook of one's own is true: its cells run in a study, and the page shows them."""

import json
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from locogen.pages.build import build
from locogen.pages.results import TABLES
from locogen.studies.planning import read_study
from locogen.studies.study import run_study

ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = (ROOT / "reports" / "studies.md").read_text(encoding="utf-8")
PART = TEXT.partition("## A notebook of your own\n")[2].partition("\n## ")[0]
STUDY = """
title = "Mine"
notebook = "mine.ipynb"
[[run]]
concept = "mini/owl"
seeds = 1
"""


@pytest.fixture(name="study")
def write_study(tmp_path: Path) -> Path:
    """The notebook of the document, and a study of it."""
    sources = re.findall(r"```python\n(.*?)```", PART, re.DOTALL)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in sources])
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, tmp_path / "mine.ipynb")
    (tmp_path / "mine.toml").write_text(STUDY)
    return tmp_path / "mine.toml"


def test_its_parameters_are_read(study: Path) -> None:
    [run] = read_study(study)[2]
    assert run.parameters == {"concept": "mini/owl", "seeds": 1}
    assert set(run.values()) == {"model", "concept", "seeds", "store", "results"}


def test_the_tables_that_pages_link_are_all_named() -> None:
    [line] = [part for part in PART.split("\n- ") if part.startswith("Tables given to `save`")]
    assert [name for name in TABLES if not re.search(rf"\b{name}\b", line)] == []


@pytest.mark.slow
def test_it_runs_and_has_its_page(study: Path) -> None:
    results = run_study(study)
    folder = read_study(study)[2][0].folder
    record = json.loads((folder / "result.json").read_text())
    assert record["finding"] == "owl: looked at 2 pictures." and record["pictures"] == 2
    assert (record["model"], record["concepts"], record["kind"]) == ("mini", ["owl"], "object")
    assert len(pd.read_csv(folder / "pictures.csv")) == 2
    assert len(list((results / "store").glob("*.png"))) == 2, "the study's own store"
    build(results)
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "owl: looked at 2 pictures." in page and 'alt="Pictures of owl."' in page
    assert "pictures.csv" in page
