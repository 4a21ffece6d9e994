"""Studies: everything is checked before a kernel starts, runs are published whole, finished ones are skipped.

Most tests put a function in the place of the kernel; those at the end start real ones.
"""

import _thread
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from locogen import __main__
from locogen.errors import LocogenError
from locogen.files import CannotWrite, publish
from locogen.studies import kernel as kernels, keys, study, worker
from locogen.studies.kernel import Failure
from locogen.studies.notebooks import plain
from locogen.studies.planning import read_study, slugify
from locogen.studies.study import StudyFailed

run_study = functools.partial(study.run_study, engine="serial")  # in the order of the plan

PARAMETERS = """
concept: str = "mini/neon"  # an id
model: str = "mini"  # a model
seeds: int = 4  # how many
scale: float = 7.5  # guidance
fast: bool = False  # or slow
concepts_file: str = ""  # own concepts
store: str = ""  # pictures
results: str = ""  # tables
"""
FINDING = {
    "concepts": ["neon"],
    "kind": "style",
    "finding": "neon: layers 0-1",
    "carriers": [{"concept": "neon", "start": 0, "width": 2, "reason": ""}],
    "settings": {"steps": 3, "limit": float("-inf")},
    "pictures": 5,
}


def write_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook whose kernel, by its own account, is one that nobody has."""
    first = new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]})
    kernel = {"name": "no-such-kernel", "display_name": "None", "language": "python"}
    nbformat.write(
        new_notebook(cells=[first, *map(new_code_cell, cells)], metadata={"kernelspec": kernel}),
        path,
    )
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write `mini.toml` beside a small notebook."""
    write_notebook(tmp_path / "small.ipynb", "1 + 1")

    def write(runs: str, head: str = 'model = "mini"') -> Path:
        path = tmp_path / "mini.toml"
        path.write_text(
            f'title = "A study"\nnotebook = "small.ipynb"\n{head}\n{runs}', encoding="utf-8"
        )
        return path

    return write


class Kernel:
    """In the place of `execute`: writes what a notebook writes, fails where it is told to, counts."""

    def __init__(self) -> None:
        self.calls: list[Mapping[str, Any]] = []
        self.fails: dict[str, Failure | BaseException] = {}
        self.waits: set[str] = set()  # for a second
        self.interrupts = ""  # the concept at which somebody presses Ctrl-C

    def __call__(
        self, notebook: Path, folder: Path, parameters: Mapping[str, Any], environment: Any
    ) -> Failure | None:
        self.calls.append(parameters)
        (folder / "notebook.ipynb").write_text("{}")
        if parameters["concept"] in self.waits:
            time.sleep(1)
        if parameters["concept"] == self.interrupts:
            _thread.interrupt_main()
            wait_for(lambda: not folder.exists())  # as the kernel is ended then
        outcome = self.fails.get(parameters["concept"])
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is None:
            (folder / "finding.json").write_text(json.dumps(FINDING))
            (folder / "effects.csv").write_text("a,b\n")
        return outcome

    @property
    def concepts(self) -> list[str]:
        return [call["concept"] for call in self.calls]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    fake = Kernel()
    monkeypatch.setattr(worker, "execute", fake)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored in a shell's background jobs
    yield fake
    signal.signal(signal.SIGINT, before)


TWO = '[[run]]\nconcept = "mini/neon"\n[[run]]\nconcept = "mini/blueprint"\nseeds = 2\n'


def result(path: Path, slug: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(
        (path.with_suffix("") / slug / "result.json").read_text(), parse_constant=refuse
    )


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith((".partial", ".old"))]


# --- a study as it should be ---------------------------------------------------------------------


def test_runs_are_published_with_what_they_found(write, kernel: Kernel, capsys) -> None:
    path = write(TWO, head='model = "mini"\n[defaults]\nscale = 3\n')
    folder = run_study(path)
    assert folder == path.parent / "mini"
    assert sorted(file.name for file in (folder / "neon").iterdir()) == [
        "effects.csv",
        "notebook.ipynb",
        "result.json",
    ]
    told = result(path, "neon")
    assert told["title"] == "neon" and told["notebook"] == "small" and told["model"] == "mini"
    assert told["parameters"] == {"model": "mini", "scale": 3, "concept": "mini/neon"}
    assert {
        key: told[key] for key in ("concepts", "kind", "finding", "carriers", "pictures")
    }.items() <= FINDING.items()
    assert told["settings"] == {"steps": 3, "limit": None}, "infinities are no JSON"
    assert {"locogen", "python", "torch", "diffusers"} <= set(told["versions"])
    assert told["seconds"] >= 0 and datetime.fromisoformat(told["finished"]).tzinfo
    assert len(told["key"]) == 64
    assert json.loads((folder / "study.json").read_text()) == {
        "title": "A study", "base": "..", "runs": ["neon", "blueprint"]
    }  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A study: 2 runs, 2 to do") and lines[1:3] == [
        "  neon       new",
        "  blueprint  new",
    ]
    assert re.fullmatch(r"\[1/2\] neon  done in \d+ s · layers 0-1.*", lines[5])
    assert not left_over(folder)


def test_the_kernel_is_given_paths_from_its_own_folder(write, kernel: Kernel) -> None:
    path = write('[[run]]\nconcept = "my/x"\nconcepts_file = "my.toml"\n')
    (path.parent / "my.toml").write_text(
        '["my/x"]\nname = "x"\nkind = "style"\nprompt = "a"\ntarget = "b"'
    )
    run_study(path)
    (call,) = kernel.calls
    assert (call["results"], call["store"], call["model"]) == (".", "../store", "mini")
    assert call["concepts_file"] == "../../my.toml"
    assert result(path, "my-x")["parameters"]["concepts_file"] == "my.toml"


def test_finished_runs_are_skipped(write, kernel: Kernel, capsys) -> None:
    path = write(TWO)
    run_study(path)
    run_study(path)
    assert kernel.concepts == ["mini/neon", "mini/blueprint"]
    assert "2 runs, 0 to do" in capsys.readouterr().out
    run_study(path, force=True, only="neon")
    assert kernel.concepts[2:] == ["mini/neon"]
    assert not left_over(path.with_suffix(""))


@pytest.mark.parametrize(
    "change", ["parameter", "notebook", "code", "weights", "versions", "damage"]
)
def test_a_run_is_redone_when_what_it_rests_on_changes(
    write, kernel: Kernel, monkeypatch, change: str
) -> None:
    path = write(TWO)
    run_study(path)
    if change == "parameter":
        write(TWO.replace("seeds = 2", "seeds = 3"))
    elif change == "notebook":
        write_notebook(path.parent / "small.ipynb", "1 + 2")
    elif change == "code":
        monkeypatch.setattr(keys, "_code_hash", lambda: "other")
    elif change == "weights":
        monkeypatch.setattr(keys, "_weights_hash", lambda name, base: "other")
    elif change == "versions":
        monkeypatch.setattr(keys, "versions", lambda: {"torch": "99"})
    else:
        (path.parent / "mini" / "blueprint" / "result.json").write_text('{"key": "')
    run_study(path)
    some = change in ("parameter", "damage")
    assert kernel.concepts[2:] == (["mini/blueprint"] if some else ["mini/neon", "mini/blueprint"])


def test_outputs_and_metadata_do_not_count_as_a_change(write, kernel: Kernel) -> None:
    path = write(TWO)
    run_study(path)
    book = nbformat.read(path.parent / "small.ipynb", as_version=4)
    book.cells[1].outputs = [nbformat.v4.new_output("stream", text="2")]
    book.metadata["kernelspec"]["name"] = "another"
    nbformat.write(book, path.parent / "small.ipynb")
    run_study(path)
    assert len(kernel.calls) == 2


def test_a_folder_of_weights_counts_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "unet.safetensors").write_bytes(b"1")
    before = keys._weights_hash("./model", tmp_path)
    assert keys._weights_hash("./model", tmp_path) == before
    os.utime(tmp_path / "model" / "unet.safetensors", (1, 1))
    assert keys._weights_hash("./model", tmp_path) == before, "a copy is as good"
    (tmp_path / "model" / "unet.safetensors").write_bytes(b"2")
    assert keys._weights_hash("./model", tmp_path) != before
    assert keys._weights_hash("sd-1.4", tmp_path) != keys._weights_hash("sd-1.5", tmp_path)
    assert keys._weights_hash("someone/model", tmp_path) == ["someone/model"]
    assert len(keys._weights_hash("mini", tmp_path)) > 10, "embedded weights are a folder too"


@pytest.mark.parametrize("asked", ['model = "./own"', 'scorer = "./own"', ""])
def test_weights_of_ones_own_are_in_the_key(tmp_path: Path, write, asked: str) -> None:
    """Whether the study names them or the notebook by default: trained again, the run is done again."""
    default = 'scorer: str = ""  # a scorer' if asked else 'scorer: str = "./own"  # a scorer'
    write_notebook(tmp_path / "small.ipynb", parameters=f"{PARAMETERS}{default}")
    path = write(f"[[run]]\nseeds = 2\n{asked}", head="")
    (tmp_path / "own").mkdir()
    keys = []
    for content in (b"1", b"2", b"1"):
        (tmp_path / "own" / "model.safetensors").write_bytes(content)
        keys.append(read_study(path)[2][0].key)
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(
    ("model", "source"), [("a/b", "a/b"), ("sd-1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5")]
)
def test_a_run_is_done_again_when_the_hub_s_weights_moved(
    write, kernel, tmp_path, monkeypatch, model, source
) -> None:
    """Not when the run itself has fetched them, nor when they are gone from the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    path = write('[[run]]\nconcept = "mini/neon"\n', head=f'model = "{model}"')
    ref = tmp_path / "hub" / f"models--{source.replace('/', '--')}" / "refs" / "main"
    execute = worker.execute

    def fetches(*given: Any) -> Any:
        ref.parent.mkdir(parents=True, exist_ok=True)
        if not ref.exists():
            ref.write_text("1" * 40)
        return execute(*given)

    monkeypatch.setattr(worker, "execute", fetches)
    states = []
    for commit in (None, "2" * 40):
        if commit:
            ref.write_text(commit)
        states.append(read_study(path)[2][0].state)
        run_study(path)
        states.append(read_study(path)[2][0].state)
        assert result(path, "mini-neon")["commits"] == {"model": f"{source}@{ref.read_text()}"}
    ref.unlink()
    assert [*states, read_study(path)[2][0].state] == ["new", "done", "outdated", "done", "done"]


def test_the_second_model_s_key_has_the_parts_of_the_first(tmp_path: Path, monkeypatch) -> None:
    before = keys._weights_hash("mini-b", tmp_path)
    monkeypatch.setattr(keys, "mini_folder", lambda: tmp_path)
    assert keys._weights_hash("mini-b", tmp_path) != before


def test_what_the_notebook_takes_by_default_is_in_the_key(write, monkeypatch) -> None:
    path, hashed = write("[[run]]\nseeds = 2", head=""), []
    monkeypatch.setattr(keys, "_weights_hash", lambda name, base: hashed.append(name))
    monkeypatch.setattr(keys, "concept", lambda name, file=None: hashed.append(name))
    read_study(path)
    assert hashed == ["mini/neon", "mini"]


def test_a_concept_that_changes_changes_the_key(tmp_path: Path, write) -> None:
    path = write('[[run]]\nconcept = "my/x"\nconcepts_file = "my.toml"\n')
    keys = []
    for target in ("b", "c"):
        own = f'["my/x"]\nname = "x"\nkind = "style"\nprompt = "a"\ntarget = "{target}"'
        (tmp_path / "my.toml").write_text(own)
        keys.append(read_study(path)[2][0].key)
    assert keys[0] != keys[1]


# --- failures ------------------------------------------------------------------------------------


def test_failed_runs_leave_an_error_and_are_tried_again(write, kernel: Kernel, capsys) -> None:
    path = write(TWO)
    kernel.fails["mini/neon"] = Failure("ValueError: no\nmore", 3)
    with pytest.raises(
        StudyFailed, match=r"1 of 2 runs failed; add --retry failed .*\n  neon: ValueError: no$"
    ):
        run_study(path, keep_going=True)
    folder = path.with_suffix("")
    error = json.loads((folder / "neon" / "error.json").read_text())
    assert (error["error"], error["cell"]) == ("ValueError: no\nmore", 3)
    assert (error["title"], error["model"], error["concepts"]) == ("neon", "mini", ["neon"])
    assert (folder / "neon" / "notebook.ipynb").exists() and not (
        folder / "neon" / "result.json"
    ).exists()
    assert result(path, "blueprint")["pictures"] == 5, "the rest goes on"
    assert "[1/2] neon  failed in 0 s · ValueError: no" in capsys.readouterr().out
    kernel.fails.clear()
    with pytest.raises(
        StudyFailed, match=r"1 of 2 runs failed, 1 of them before; .*\n  neon: ValueError: no$"
    ):
        run_study(path)
    assert kernel.concepts == ["mini/neon", "mini/blueprint"], "it is kept until it is asked for"
    run_study(path, retry_failed=True)
    assert kernel.concepts == ["mini/neon", "mini/blueprint", "mini/neon"]
    assert not (folder / "neon" / "error.json").exists() and result(path, "neon")
    assert not left_over(folder)


def test_a_failure_holds_what_has_not_begun(write, kernel: Kernel, capsys) -> None:
    """Unless it is told to keep going, as `make` does."""
    path = write(TWO + '[[run]]\nconcept = "mini/cat"\n')
    kernel.fails["mini/neon"] = Failure("no")
    kernel.waits.add("mini/blueprint")
    with pytest.raises(StudyFailed, match="1 of 3 runs failed"):
        run_study(path)
    said, begun = (
        capsys.readouterr().out,
        kernel.concepts == ["mini/neon", "mini/blueprint"],
    )  # or it was held as well
    assert begun or kernel.concepts == ["mini/neon"]
    assert f"stopped at the first failure; left: {'cat' if begun else 'blueprint, cat'}." in said
    assert (path.with_suffix("") / "blueprint" / "result.json").exists() == begun, (
        "what is at work is finished"
    )
    assert not (path.with_suffix("") / "cat").exists()


def test_a_failure_under_other_parameters_does_not_count(write, kernel: Kernel) -> None:
    path = write(TWO)
    kernel.fails["mini/blueprint"] = Failure("no")
    with pytest.raises(StudyFailed):
        run_study(path)
    kernel.fails.clear()
    run_study(write(TWO.replace("seeds = 2", "seeds = 3")))
    assert kernel.concepts == ["mini/neon", "mini/blueprint", "mini/blueprint"]


def test_ctrl_c_keeps_what_is_done_and_says_what_is_left(write, kernel: Kernel, capsys) -> None:
    path = write(TWO + '[[run]]\nconcept = "mini/cat"\n')
    kernel.interrupts = "mini/blueprint"
    with pytest.raises(KeyboardInterrupt):
        run_study(path)
    assert "left: blueprint, cat. Run the same command again to continue" in capsys.readouterr().out
    assert not left_over(path.with_suffix("")) and result(path, "neon")
    kernel.interrupts = ""
    run_study(path)
    assert kernel.concepts == ["mini/neon", "mini/blueprint", "mini/blueprint", "mini/cat"]


def test_ctrl_c_before_an_end_was_noticed(write, kernel: Kernel, capsys, monkeypatch) -> None:
    """As on a busy machine: the run before is finished, though nobody has looked yet."""
    look = study.wait

    def blind(futures: Any, **how: Any) -> Any:
        return (set(), look(futures, 0.01)) if "return_when" in how else look(futures, **how)

    monkeypatch.setattr(study, "wait", blind)
    path = write(TWO + '[[run]]\nconcept = "mini/cat"\n')
    kernel.interrupts = "mini/blueprint"
    with pytest.raises(KeyboardInterrupt):
        run_study(path)
    assert "left: blueprint, cat. Run the same command again to continue" in capsys.readouterr().out


def test_what_a_killed_process_left_is_cleared(write, kernel: Kernel) -> None:
    path = write(TWO)
    partial = path.with_suffix("") / ".partial-neon"
    partial.mkdir(parents=True)
    (partial / "result.json").write_text("{}")
    (path.with_suffix("") / ".old-neon").mkdir()
    run_study(path)
    assert len(kernel.calls) == 2 and not left_over(path.with_suffix(""))


def test_a_result_appears_whole(write, kernel: Kernel, monkeypatch) -> None:
    """A disk that fills up at the last file leaves the old result, and no half of a new one."""
    path = write(TWO)
    run_study(path)
    before = result(path, "neon")

    def full(file: Path, value: Any) -> None:
        if file.name == "result.json":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker, "write_json", full)
    with pytest.raises(CannotWrite, match="the disk is full"):
        run_study(path, force=True)
    assert result(path, "neon") == before
    monkeypatch.undo()
    monkeypatch.setattr(worker, "execute", kernel)
    run_study(path, force=True)
    assert result(path, "neon")["key"] == before["key"] and not left_over(path.with_suffix(""))


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_two_at_once_are_refused(write, kernel: Kernel) -> None:
    import fcntl

    path = write(TWO)
    path.with_suffix("").mkdir()
    with (path.with_suffix("") / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LocogenError, match="another locogen is working in"):
            run_study(path)
    run_study(path)
    assert len(kernel.calls) == 2


# --- what is refused before any kernel starts ----------------------------------------------------

BAD = {
    "misspelt parameter": ("[[run]]\nsedes = 2", r"run 1: no parameter 'sedes': did you mean 'seeds'.*takes: concept"),
    "misspelt default": ('[defaults]\nscal = 1\n[[run]]\nseeds = 1', "no parameter 'scal': did you mean 'scale'"),
    "arranged": ('[[run]]\nresults = "x"', "results is set by the study itself"),
    "text for a number": ('[[run]]\nseeds = "2"', "seeds is '2': small.ipynb takes a value of type int"),
    "fraction for a whole number": ("[[run]]\nseeds = 2.5", "type int"),
    "truth for a number": ("[[run]]\nseeds = true", "seeds is True"),
    "number for truth": ("[[run]]\nfast = 1", "fast is 1: small.ipynb takes a value of type bool"),
    "date": ("[[run]]\nscale = 2026-01-01", "is not a parameter: give a text"),
    "unknown concept": ('[[run]]\nconcept = "mini/nen"', "no concept 'mini/nen': did you mean 'mini/neon'"),
    "unknown model": ('[[run]]\nmodel = "minni"', "no model 'minni': did you mean 'mini'"),
    "no runs": ("", "has no runs: add some"),
    "runs that are none": ("run = 3", "run is not a list of tables"),
    "unknown key": ("runs = 3", "no key 'runs': did you mean 'run'"),
    "defaults that are none": ("defaults = 3\n[[run]]\nseeds = 1", "defaults is not a table"),
    "twice the same": ("[[run]]\nseeds = 1\n[[run]]\nseeds = 1\n[[run]]\nseeds = 1", "is in the study twice"),
    "no notebook": ('[[run]]\nnotebook = "none.ipynb"', "there is no notebook"),
    "unknown notebook": ('[[run]]\nnotebook = "localise"', "no notebook 'localise': did you mean 'localize'"),
    "broken notebook": ('[[run]]\nnotebook = "broken.ipynb"', "is not a notebook"),
    "no parameters": ('[[run]]\nnotebook = "bare.ipynb"', "has no parameters: give the cell"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_found_first(write, kernel: Kernel, tmp_path: Path, name: str) -> None:
    (tmp_path / "broken.ipynb").write_text("nothing")
    nbformat.write(new_notebook(cells=[new_code_cell("1")]), tmp_path / "bare.ipynb")
    runs, words = BAD[name]
    good = (
        '[[run]]\nconcept = "mini/neon"\n'
        if runs.startswith("[[run]]") and "twice" not in name
        else ""
    )
    path = write(runs + "\n" + good, head="")
    with pytest.raises(LocogenError, match=words) as caught:
        run_study(path)
    assert str(path) in str(caught.value)
    assert not kernel.calls and not path.with_suffix("").exists()


def test_a_folder_that_no_run_has_made_is_left_alone(write, kernel: Kernel, tmp_path: Path) -> None:
    path = write(TWO, head='model = "mini"\nresults = "."\n')
    (tmp_path / "neon").mkdir()
    run_study(path, dry_run=True)  # an empty one may be taken
    (tmp_path / "neon" / "mine.txt").write_text("mine")
    with pytest.raises(LocogenError, match=r"neon exists and is not a run of locogen.*results = "):
        run_study(path)
    assert not kernel.calls
    (partial := tmp_path / ".partial-neon-x").mkdir()
    with pytest.raises(LocogenError, match="neon exists and is not a run"):
        publish(partial, tmp_path / "neon")
    assert (tmp_path / "neon" / "mine.txt").read_text() == "mine"


def test_only_takes_slugs_of_the_plan(write, kernel: Kernel) -> None:
    path = write(TWO)
    with pytest.raises(LocogenError, match="no run 'blue': did you mean 'blueprint'"):
        run_study(path, only=["neon", "blue"])
    run_study(path, only=["blueprint"])
    assert kernel.concepts == ["mini/blueprint"]


def test_a_dry_run_starts_nothing(write, kernel: Kernel, capsys) -> None:
    path = write(TWO)
    run_study(path, dry_run=True)
    assert "2 runs, 2 to do" in capsys.readouterr().out
    assert not kernel.calls and not path.with_suffix("").exists()


# --- names ---------------------------------------------------------------------------------------

NAMES = [
    "../x",
    "a/b",
    "a\\b",
    "<script>",
    "x" * 300,
    "ж" * 300,
    "van Gogh",
    "",
    "...",
    "CON",
    "com1",
    "store",
    "日本",
    "a:b*c?",
]


@pytest.mark.parametrize("name", NAMES)
def test_slugs_are_safe(name: str) -> None:
    slug = slugify(name)
    assert (
        slug and len(slug.encode()) <= 130 and slug == slug.lower() == slugify(slug + " ").strip()
    )
    assert not re.search(r'[\s/\\:*?"<>|.{}]', slug) and not slug.startswith("-")
    assert slug not in ("con", "com1", "store")


def test_slugs_read_well() -> None:
    assert slugify("van Gogh, wide") == "van-gogh-wide"
    assert (
        slugify("../x") == "x" and slugify("<script>alert(1)</script>") == "script-alert-1-script"
    )


def test_slugs_alike_are_told_apart(write) -> None:
    path = write(
        '[[run]]\nname = "a/b"\n[[run]]\nname = "a b"\nseeds = 3\n[[run]]\nname = "A-B"\nseeds = 5'
    )
    slugs = [run.slug for run in read_study(path)[2]]
    assert slugs[0] == "a-b" and len(set(slugs)) == 3
    assert all(re.fullmatch(r"a-b-[0-9a-f]{6}", slug) for slug in slugs[1:])
    assert [run.slug for run in read_study(path)[2]] == slugs, "the same every time"


def test_titles_and_names(write) -> None:
    path = write(
        '[[run]]\nconcept = "mini/van-gogh"\n[[run]]\ntitle = "Wide ones"\nseeds = 7\n[[run]]\nname = "n"\n'
    )
    _, _, runs = read_study(path)
    assert [(run.slug, run.title) for run in runs] == [
        ("van-gogh", "van gogh"),
        ("wide-ones", "Wide ones"),
        ("n", "n"),
    ]


def test_values_become_plain() -> None:
    """Papermill turns tuples and numpy's numbers into strings, and refuses paths."""
    given = {
        "a": (1, 2),
        "b": np.int64(3),
        "c": Path("x"),
        "d": np.float64(0.5),
        "e": np.array([1]),
        "f": None,
        "g": True,
    }
    told = plain(given)
    assert told == {"a": [1, 2], "b": 3, "c": "x", "d": 0.5, "e": [1], "f": None, "g": True}
    assert [type(told[key]) for key in "bd"] == [int, float] and told["g"] is True
    with pytest.raises(LocogenError, match="is not a parameter"):
        plain(object())


# --- the command line ----------------------------------------------------------------------------


def test_exit_codes(write, kernel: Kernel, capsys) -> None:
    path = write(TWO)
    kernel.fails["mini/neon"] = Failure("no")
    assert __main__.main(["run", str(path)]) == 1
    assert capsys.readouterr().err.startswith("locogen: 1 of 2 runs failed")
    kernel.fails.clear()
    kernel.interrupts = "mini/neon"
    assert __main__.main(["run", str(path), "--retry", "failed"]) == 130
    kernel.interrupts = ""
    assert __main__.main(["run", str(path)]) == 1, (
        "one failed before, and nobody asked for it again"
    )
    assert __main__.main(["run", str(path), "--retry", "failed"]) == 0
    assert __main__.main(["run", str(path), "--force", "--only", "neon"]) == 0
    capsys.readouterr()
    assert __main__.main(["run", str(path.with_name("none.toml"))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("locogen: cannot read") and error.count("\n") == 1


def test_lists(capsys) -> None:
    assert __main__.main(["models"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["mini", "yes"]
    assert __main__.main(["concepts", "mini"]) == 0
    told = capsys.readouterr().out
    assert "mini/van-gogh" in told and "sd/" not in told
    assert __main__.main(["concepts", "minni"]) == 2
    assert "did you mean 'mini'" in capsys.readouterr().err


def test_report_says_where_the_page_is(monkeypatch, tmp_path: Path, capsys) -> None:
    opened: list[str] = []
    fake = type(sys)("locogen.pages.build")
    fake.build = lambda folder: folder / "index.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "locogen.pages.build", fake)
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert __main__.main(["report", str(tmp_path), "--open"]) == 0
    address = capsys.readouterr().out.strip()
    assert address == (tmp_path / "index.html").as_uri() and not opened
    monkeypatch.setenv("DISPLAY", ":0")
    assert __main__.main(["report", str(tmp_path)]) == 0 and not opened
    assert __main__.main(["report", str(tmp_path), "--open"]) == 0 and opened == [address]


def test_lists_fit_a_terminal_and_are_data_on_demand(capsys) -> None:
    assert __main__.main(["models"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100
    for command, name in (("models", "mini"), ("concepts", "mini/neon")):
        assert __main__.main([command, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert name in {row.get("id") for row in rows} | {row["name"] for row in rows}
    assert __main__.main(["models", "--json"]) == 0
    assert "license" in json.loads(capsys.readouterr().out)[0]


def test_without_a_command_the_next_steps_are_named(capsys) -> None:
    assert __main__.main([]) == 0
    said = capsys.readouterr().out
    assert "locogen localize neon" in said and "locogen notebooks" in said


def test_an_example_study_is_one_that_runs(tmp_path: Path, capsys) -> None:
    file = tmp_path / "mine.toml"
    assert __main__.main(["new", str(file)]) == 0
    assert __main__.main(["run", str(file), "--dry-run"]) == 0
    assert "4 runs" in capsys.readouterr().out
    before = file.read_text()
    assert __main__.main(["new", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err and file.read_text() == before
    assert __main__.main(["new", str(tmp_path / "mine")]) == 2


def test_notebooks_are_copied_and_never_written_over(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "notebooks"
    assert __main__.main(["notebooks", str(folder)]) == 0
    assert "00_start_here.ipynb" in capsys.readouterr().out
    assert (folder / "localize.ipynb").is_file()
    (folder / "localize.ipynb").write_text("mine")
    assert __main__.main(["notebooks", str(folder)]) == 2
    assert (folder / "localize.ipynb").read_text() == "mine"


def test_help_is_quick() -> None:
    code = "import sys; from locogen.__main__ import _parser; _parser().format_help(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"pandas", "numpy", "papermill", "torch"} & set(done.stdout.split())


# --- with real kernels ---------------------------------------------------------------------------

WRITES = """
import json, os, pathlib, sys, locogen
told = {"python": sys.executable, "locogen": locogen.__file__, "here": os.getcwd(), "seeds": seeds, "store": store}
pathlib.Path(results, "finding.json").write_text(json.dumps({"settings": told}))
print("concept is", concept)
"""


def test_a_kernel_is_this_interpreter(write, tmp_path: Path, monkeypatch) -> None:
    """Whatever kernels are installed, from wherever it is called, braces in the path included."""
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    folder = tmp_path / "a {folder} of mine"
    folder.mkdir()
    write_notebook(folder / "small.ipynb", WRITES)
    path = write('[[run]]\nconcept = "mini/neon"\nseeds = 2').rename(folder / "mini.toml")
    run_study(path)
    told = result(path, "neon")["settings"]
    assert (
        Path(told["python"]).samefile(sys.executable)
        and Path(told["locogen"]).parent == Path(study.__file__).parent.parent
    )
    assert Path(told["here"]).parent == folder / "mini" and told["seeds"] == 2
    executed = nbformat.read(folder / "mini" / "neon" / "notebook.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].text == "concept is mini/neon\n"
    injected = next(
        cell.source for cell in executed.cells if "injected-parameters" in cell.metadata.tags
    )
    assert str(tmp_path) not in injected, "pages do not tell where they were made"


def test_a_notebook_that_fails_says_where(write, tmp_path: Path) -> None:
    cell = "from locogen.errors import LocogenError\nraise LocogenError('do this instead')"
    write_notebook(tmp_path / "small.ipynb", "1", cell, "2")
    path = write('[[run]]\nconcept = "mini/neon"')
    with pytest.raises(StudyFailed, match="neon: do this instead"):
        run_study(path)
    error = json.loads((tmp_path / "mini" / "neon" / "error.json").read_text())
    assert error["error"] == "do this instead"
    executed = nbformat.read(tmp_path / "mini" / "neon" / "notebook.ipynb", as_version=4)
    (failed,) = [
        each
        for each in executed.cells
        if each.cell_type == "code" and each.execution_count == error["cell"]
    ]
    assert failed.source == cell


def test_a_kernel_that_dies_is_a_failed_run(tmp_path: Path) -> None:
    book = write_notebook(
        tmp_path / "small.ipynb", "import os\nos.write(2, b'out of luck')\nos._exit(3)"
    )
    (tmp_path / "out").mkdir()
    failure = kernels.execute(book, tmp_path / "out", {})
    assert (
        failure
        and failure.message.startswith("the kernel died")
        and failure.message.endswith("out of luck")
    )


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGKILL", marks=pytest.mark.slow)])
def test_no_kernel_outlives_its_study(write, tmp_path: Path, name: str) -> None:
    write_notebook(
        tmp_path / "small.ipynb",
        "import os\nopen('../../pid', 'w').write(f'{os.getpid()} ')\nwhile True: pass",
    )
    path = write(TWO)
    # Jobs in the background of a shell are started with Ctrl-C ignored, and so are the tests' own children then.
    listen = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"{listen}; from locogen.__main__ import main; sys.exit(main(['run', {str(path)!r}]))"
    command = [sys.executable, "-c", start]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            pid = tmp_path / "pid"
            wait_for(lambda: pid.exists() and pid.read_text().endswith(" "))
            process.send_signal(getattr(signal, name))
            out, error = process.communicate(timeout=20)
        finally:
            process.kill()
    wait_for(lambda: not alive(int(pid.read_text())))
    assert error == ""
    if name == "SIGINT":
        assert process.returncode == 130 and out.endswith(
            "stopped\nleft: neon, blueprint. Run the same command again to continue.\n"
        )
        assert not left_over(tmp_path / "mini")


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Running, and not merely waiting for its parent to take note of its end."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")


def test_a_run_of_another_notebook_takes_the_defaults_that_it_knows(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(
        'model = "mini"\n[defaults]\nwindow = 3\nnum_inference_steps = 5\n[[run]]\nconcept = "mini/neon"\n'
        '[[run]]\nnotebook = "edit"\nname = "edited"\nconcept = "mini/neon"\n'
    )
    _, _, (swept, edited) = read_study(path)
    assert swept.parameters["window"] == 3
    assert edited.parameters["num_inference_steps"] == 5 and edited.parameters["model"] == "mini"
    assert "window" not in edited.parameters
    path.write_text(path.read_text().replace('name = "edited"', 'name = "edited"\nwindow = 2'))
    with pytest.raises(LocogenError, match="window"):
        read_study(path)
