"""What a notebook reports is read back as it was written; what is odd never stops the reader."""

import json
from pathlib import Path
from typing import Any

import pytest

from locogen.finding import Finding
from locogen.plan import Verdict, Window

WHOLE = Finding(
    model="mini",
    concepts=["neon", "owl"],
    kind="style",
    finding="neon: layers 12-13",
    carriers={"neon": Window(12, 2, "ahead"), "owl": Window(None, 2, "no effect")},
    settings={"seeds": [0, 1], "steps": 20},
    pictures=384,
    published=3,
    more={"accuracy": 0.5},
)


def test_a_finding_is_read_as_it_was_written(tmp_path: Path) -> None:
    WHOLE.write(tmp_path)
    assert Finding.read(tmp_path) == WHOLE


def test_the_file_has_the_form_that_finished_runs_have(tmp_path: Path) -> None:
    WHOLE.write(tmp_path)
    facts = json.loads((tmp_path / "finding.json").read_text(encoding="utf-8"))
    assert facts["carriers"] == [
        {"concept": "neon", "start": 12, "width": 2, "reason": "ahead"},
        {"concept": "owl", "start": None, "width": 2, "reason": "no effect"},
    ]
    assert facts["finding"] == "neon: layers 12-13" and facts["accuracy"] == 0.5


def test_a_verdict_keeps_its_kind_and_its_places(tmp_path: Path) -> None:
    places = (Window(0, 2), Window(13, 2))
    verdict = Verdict(None, 2, "83%, 80%", kind="each necessary", places=places)
    Finding(carriers={"neon": verdict}).write(tmp_path)
    assert Finding.read(tmp_path).carriers == {"neon": verdict}
    odd = {"concept": "neon", "start": 1, "width": 2}
    for row in (odd | {"kind": "sure"}, odd | {"kind": "spread", "places": [3]}):
        assert not Finding.from_facts({"carriers": [row]}).carriers


def test_what_a_notebook_does_not_say_is_empty(tmp_path: Path) -> None:
    assert Finding.read(tmp_path) == Finding()
    (tmp_path / "finding.json").write_text('{"finding": "gone", "published": null}')
    assert Finding.read(tmp_path) == Finding(finding="gone")


@pytest.mark.parametrize(
    "name, value",
    [
        ("model", 3),
        ("concepts", "neon"),
        ("finding", ["gone"]),
        ("carriers", [{"concept": "neon", "start": -1}]),
        ("carriers", [{"start": 1}]),
        ("settings", [1]),
        ("pictures", -1),
    ],
)
def test_a_value_of_another_type_is_passed_on_but_not_used(name: str, value: Any) -> None:
    """The page of the run says that it is damaged: it must still be in `result.json` then."""
    read = Finding.from_facts({name: value})
    assert getattr(read, name) == getattr(Finding(), name)
    assert read.more == {name: value} and read.facts()[name] == value


def test_a_damaged_file_counts_as_empty(tmp_path: Path) -> None:
    (tmp_path / "finding.json").write_text('{"finding": "go')
    assert Finding.read(tmp_path) == Finding()
