"""Studies on machines as people have them: old consoles, other editors, full disks, lost schedulers, large models."""

import contextlib
import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_engines import PARAMETERS, PARTS, command
from test_study import wait_for, write_notebook

from locogen import __main__, files
from locogen.catalog import concept, read_toml
from locogen.console import show_any_text
from locogen.files import CannotWrite, write_whole
from locogen.pages.build import build
from locogen.studies import digests, engines, keys, study
from locogen.studies.engines import Engine
from locogen.studies.estimates import Costs
from locogen.studies.planning import read_study
from locogen.studies.study import StudyFailed
from locogen.studies.worker import run_one

NAME = "Мунк ☃ 猫"
CONCEPTS = f'["my/cry"]\nname = "{NAME}"\nkind = "style"\n'
CONCEPTS += 'prompt = "a {} by Munk"\ntarget = "a {}"\nplacebo = "the {} by Munk"\nfill = ["house", "tree"]\n'
FIND = """
import json, pathlib
about = {"finding": concept + ": found", "concepts": [concept]}
pathlib.Path(results, "finding.json").write_text(json.dumps(about))
"""
TAKES = 'concept: str = ""  # an id\nconcepts_file: str = ""  # own\nnumber: int = 0\nresults: str = ""  # tables\n'


def write_study(folder: Path, encoding: str = "utf-8") -> Path:
    """One run of a concept whose name no old code page has."""
    folder.mkdir(parents=True, exist_ok=True)
    write_notebook(folder / "small.ipynb", FIND, parameters=TAKES)
    (folder / "own.toml").write_text(CONCEPTS, encoding=encoding)
    path = folder / "mine.toml"
    path.write_text(
        f'title = "{NAME}"\nnotebook = "small.ipynb"\nconcept = "my/cry"\n[defaults]\nconcepts_file = "own.toml"\n',
        encoding=encoding,
    )
    return path


# --- consoles ------------------------------------------------------------------------------------

ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp1252"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


def locogen(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locogen", *arguments]
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG"))
    }
    return subprocess.run(
        command, capture_output=True, text=True, env={**clean, **environment}, errors="replace"
    )


@pytest.mark.parametrize("environment", ENCODINGS, ids=lambda names: " ".join(names.values()))
def test_a_console_that_lacks_characters_is_no_crash(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    path = write_study(tmp_path)
    shown = locogen("run", str(path), "--dry-run", **environment)
    assert shown.returncode == 0 and r"\u2603 \u732b: 1 run, 1 to do" in shown.stdout, shown.stderr
    mistaken = locogen("run", str(path), "--only", NAME, **environment)
    assert mistaken.returncode == 2 and "locogen: no run" in mistaken.stderr
    assert "Traceback" not in shown.stderr + mistaken.stderr


@pytest.mark.slow
def test_a_whole_study_on_such_a_console(tmp_path: Path) -> None:
    """Progress lines and the pages too; the lists besides."""
    path = write_study(tmp_path)
    done = locogen("run", str(path), **ENCODINGS[0])
    assert done.returncode == 0 and "done in" in done.stdout, done.stderr
    assert locogen("report", str(path.with_suffix("")), **ENCODINGS[0]).returncode == 0
    assert NAME in (path.with_suffix("") / "index.html").read_text(encoding="utf-8")
    listed = locogen("concepts", "--file", str(path.with_name("own.toml")), **ENCODINGS[0])
    assert listed.returncode == 0 and r"\u2603" in listed.stdout


def test_what_somebody_has_chosen_for_the_console_stays(capsys: pytest.CaptureFixture[str]) -> None:
    sys.stdout.reconfigure(encoding="ascii", errors="replace")  # type: ignore[union-attr]
    show_any_text()
    print("☃")
    assert capsys.readouterr().out == "?\n"
    sys.stdout.reconfigure(errors="strict")  # type: ignore[union-attr]
    with pytest.raises(UnicodeEncodeError):  # the twin
        print("☃")
    show_any_text()
    print("☃")
    assert capsys.readouterr().out == "\\u2603\n"


# --- editors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_toml_with_a_byte_order_mark_is_read(tmp_path: Path, encoding: str) -> None:
    path = write_study(tmp_path, encoding)
    assert path.read_bytes().startswith(b"\xef\xbb\xbf") is (encoding == "utf-8-sig")
    assert read_study(path)[0] == NAME
    assert read_toml(path)["title"] == NAME
    assert concept("my/cry", file=tmp_path / "own.toml").name == NAME
    assert __main__.main(["concepts", "--file", str(tmp_path / "own.toml")]) == 0


# --- disks ---------------------------------------------------------------------------------------

FULL = [
    (errno.ENOSPC, "the disk is full"),
    (errno.EROFS, "read-only"),
    (errno.EACCES, "you may not write"),
]


@pytest.mark.parametrize(("number", "words"), FULL)
@pytest.mark.parametrize("step", ["the folder", "the lock", "a run", "a result"])
def test_a_results_folder_that_takes_no_files_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: str,
    number: int,
    words: str,
) -> None:
    path = write_study(tmp_path)

    def refuse(name: Any, *more: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number), str(name))

    if step == "the folder":
        monkeypatch.setattr(Path, "mkdir", refuse)
    elif step == "a run":
        path.with_suffix("").mkdir()
        (path.with_suffix("") / ".lock").touch()
        mkdir = Path.mkdir
        monkeypatch.setattr(
            Path, "mkdir", lambda at, **how: refuse(at) if at.name[0] == "." else mkdir(at, **how)
        )
    elif step == "the lock":
        path.with_suffix("").mkdir()
        opens = os.open
        monkeypatch.setattr(
            os,
            "open",
            lambda at, *how, **more: (refuse if str(at).endswith(".lock") else opens)(
                at, *how, **more
            ),
        )
    else:
        monkeypatch.setattr("locogen.studies.worker.execute", lambda *about: None)
        monkeypatch.setattr("locogen.studies.worker.write_json", refuse)
    assert __main__.main(["run", str(path), "--engine", "serial"]) == 2
    told = capsys.readouterr().err
    assert (
        words in told
        and str(path.with_suffix("")) in told
        and 'results = "…"' in told
        and told.count("\n") == 1
    )


def test_a_file_is_whole_or_not_at_all_and_no_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".x.json.part").symlink_to(tmp_path / "mine")
    (tmp_path / "x.json").symlink_to(tmp_path / "mine")
    write_whole(tmp_path / "x.json", b"new")
    assert (tmp_path / "x.json").read_text() == "new" and (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "x.json").is_symlink() and not (tmp_path / ".x.json.part").exists()


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as part:
        part.write_text("half of the ne")
        _ = 1 / 0
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.replacing(path, suffix="mine") as part:  # the twin
        part.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32", reason="links need permission there")
def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError), files.locked(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
    (tmp_path / ".lock").unlink()
    with files.locked(tmp_path):  # the twin
        assert (tmp_path / ".lock").is_file()


def test_what_is_no_want_of_room_passes_by(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.writing(tmp_path):
        (tmp_path / "none" / "x").write_text("x")
    with pytest.raises(CannotWrite), files.writing(tmp_path):  # the twin
        raise OSError(errno.EDQUOT, "quota")


# --- schedulers ----------------------------------------------------------------------------------


class Lost(Executor):
    """As Dask's is when its scheduler goes away: what has not ended is canceled by nobody here."""

    def __init__(self, ends: int) -> None:
        self.ends = ends

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if self.ends:
            self.ends -= 1
            future.set_result(fn(*args, **kwargs))
        else:
            future.cancel()
            future.set_running_or_notify_cancel()
        return future


@pytest.mark.parametrize("keep_going", [False, True])
@pytest.mark.parametrize("ends", [0, 1, 3])
def test_runs_that_nobody_heard_of_again_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: int, keep_going: bool
) -> None:
    path = write_study(tmp_path)
    path.write_text(
        path.read_text(encoding="utf-8") + "[grid]\nnumber = [1, 2, 3]\n", encoding="utf-8"
    )
    monkeypatch.setattr("locogen.studies.worker.execute", lambda *about: None)
    opened = contextlib.nullcontext(Engine(Lost(ends), 1, None))
    monkeypatch.setattr(engines, "opened", lambda *about: opened)
    run = functools.partial(study.run_study, path, keep_going=keep_going)
    if ends == 3:
        run()
        return
    with pytest.raises(StudyFailed, match=f"{3 - ends} of 3 runs failed.*(?s:.)*scheduler"):
        run()
    assert [each.state for each in read_study(path)[2]] == ["done"] * ends + ["new"] * (3 - ends)


@contextlib.contextmanager
def started(*arguments: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of Dask's, ended afterwards with all that it has started."""
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")
def test_a_scheduler_that_is_killed_fails_the_study(tmp_path: Path) -> None:
    write_notebook(tmp_path / "parts.ipynb", PARTS, parameters=PARAMETERS)
    path = tmp_path / "many.toml"
    path.write_text(
        'notebook = "parts.ipynb"\n[grid]\nnumber = [1, 2, 3, 4]\n[defaults]\nwait = 60.0\n'
    )
    place = tmp_path / "scheduler.json"
    serve = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(place))
    with started("distributed.cli.dask_scheduler", *serve, folder=tmp_path) as scheduler:
        wait_for(lambda: place.exists() and place.read_text().endswith("}"))
        address = json.loads(place.read_text())["address"]
        work = (address, "--nthreads", "1", "--no-dashboard")
        with started("distributed.cli.dask_worker", *work, folder=tmp_path):
            go = command(path, "--scheduler", address)
            with subprocess.Popen(
                go, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process:
                wait_for(lambda: bool(list(path.with_suffix("").glob(".partial-*/parts.txt"))), 120)
                scheduler.send_signal(signal.SIGKILL)
                _, error = process.communicate(timeout=120)
    assert process.returncode == 1 and "4 of 4 runs failed" in error and "scheduler" in error
    assert not list(path.with_suffix("").glob(".partial-*"))


# --- results of others ---------------------------------------------------------------------------

ODD = [
    '{"seconds": "much", "pictures": 3, "made": 3}',
    '{"seconds": 1e999}',
    '{"made": [1], "seconds": 2}',
    "[]",
]


@pytest.mark.parametrize("content", ODD)
def test_an_odd_result_costs_nothing(tmp_path: Path, content: str) -> None:
    """Neither a plan nor a study stops at it."""
    path = write_study(tmp_path)
    (path.with_suffix("") / "odd").mkdir(parents=True)
    (path.with_suffix("") / "odd" / "result.json").write_text(content)
    study.run_study(path, dry_run=True)
    assert Costs(path.with_suffix("")).seconds(read_study(path)[2][0]) in (None, 2)


@pytest.mark.parametrize("carriers", ["layers 1-2", [3], {"a": 1}, [{"start": "x"}]])
def test_a_notebook_may_say_odd_things(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carriers: Any
) -> None:
    path = write_study(tmp_path)

    def execute(notebook: Path, folder: Path, *more: Any) -> None:
        (folder / "finding.json").write_text(json.dumps({"carriers": carriers}))

    monkeypatch.setattr("locogen.studies.worker.execute", execute)
    path.with_suffix("").mkdir()
    assert run_one(read_study(path)[2][0]).summary == "executed"
    assert "result.json is damaged: carriers" in build(path.with_suffix("")).read_text(
        encoding="utf-8"
    )


# --- large models --------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A large file that was written some time ago, for a user who has planned nothing yet."""
    monkeypatch.setenv("LOCOGEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "LARGE", 1)
    monkeypatch.setattr(digests, "SETTLED", -(10**12))
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "unet.safetensors"
    file.write_bytes(b"weights")
    return file


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read, whole, to be hashed."""
    names: list[str] = []
    hashed = digests._hashed
    monkeypatch.setattr(digests, "_hashed", lambda file: names.append(file.name) or hashed(file))
    return names


def plan_anew(base: Path) -> list[Any]:
    """The weights' part of a key, as another process has it."""
    keys._digest.cache_clear()
    return keys._weights_hash("./model", base)


def test_a_plan_reads_a_large_model_once(weights: Path, reads: list[str], tmp_path: Path) -> None:
    first = plan_anew(tmp_path)
    assert plan_anew(tmp_path) == first and reads == ["unet.safetensors"]
    before = weights.stat()
    weights.write_bytes(b"another")  # as long, and dated back
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert plan_anew(tmp_path) != first and len(reads) == 2
    weights.write_bytes(b"larger weights")
    assert plan_anew(tmp_path) != first and len(reads) == 3


@pytest.mark.parametrize("content", ["{", "[]", '{"x": 1}', ""])
def test_memory_that_is_damaged_or_nowhere_costs_time_only(
    weights: Path, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    first = plan_anew(tmp_path)
    (tmp_path / "cache" / "hashes.json").write_text(content)
    assert plan_anew(tmp_path) == first and len(reads) == 2
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("LOCOGEN_CACHE", str(tmp_path / "file"))
    assert plan_anew(tmp_path) == first and len(reads) == 3


def test_a_file_just_written_is_not_remembered(
    weights: Path, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be written again within one tick of the clock that dates it."""
    monkeypatch.setattr(digests, "SETTLED", 2 * 10**9)
    plan_anew(tmp_path)
    plan_anew(tmp_path)
    assert len(reads) == 2
    monkeypatch.setattr(time, "time_ns", lambda: weights.stat().st_ctime_ns + 3 * 10**9)
    plan_anew(tmp_path)
    plan_anew(tmp_path)
    assert len(reads) == 3, "the twin"
