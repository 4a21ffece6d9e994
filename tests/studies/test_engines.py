"""Every engine does the same work, tells how far it is, and survives `kill -9` of any of its processes."""

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import torch
from rich.console import Console
from test_study import result, wait_for, write_notebook

from locogen.errors import LocogenError
from locogen.files import locked, publish
from locogen.pictures.progress import Heartbeat, read_progress
from locogen.studies import engines, worker
from locogen.studies.estimates import Costs
from locogen.studies.planning import Planned, read_study
from locogen.studies.progress import Bars, Board, RunProgress
from locogen.studies.study import run_study
from locogen.studies.worker import Outcome

PARAMETERS = """
number: int = 0  # which
device: str = "cpu"  # where
wait: float = 0.1  # seconds a part
results: str = ""  # tables
"""
PARTS = """
import json, os, pathlib, time
for part in range(4):
    with open("parts.txt", "a") as file:
        print(part, file=file)
    time.sleep(wait)
told = {name: os.environ.get(name, "") for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
pathlib.Path(results, "finding.json").write_text(json.dumps({"finding": "whole", "settings": told}))
"""
needs_signals = pytest.mark.skipif(sys.platform == "win32", reason="there are no such signals")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a study of so many runs of a notebook that takes four parts to be whole."""
    write_notebook(tmp_path / "parts.ipynb", PARTS, parameters=PARAMETERS)

    def write(count: int, **defaults: Any) -> Path:
        path = tmp_path / "many.toml"
        common = "".join(f"{name} = {json.dumps(value)}\n" for name, value in defaults.items())
        numbers = list(range(count))
        path.write_text(
            f'notebook = "parts.ipynb"\n[grid]\nnumber = {numbers}\n[defaults]\n{common}'
        )
        return path

    return write


def command(path: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "locogen",
        "run",
        str(path),
        "--keep-going",
        "--retry",
        "failed",
        *options,
    ]


def results_of(path: Path) -> dict[str, dict[str, Any]]:
    """Slug → result of the finished runs. Whatever looks finished is whole, and what is not whole says so."""
    found: dict[str, dict[str, Any]] = {}
    for folder in path.with_suffix("").glob("[!.]*/"):
        file = folder / "result.json"
        if not file.exists():
            assert (folder / "error.json").exists(), f"{folder.name} is neither finished nor failed"
            continue
        told = json.loads(file.read_text())
        assert told["finding"] == "whole" and (folder / "parts.txt").read_text() == "0\n1\n2\n3\n"
        assert nbformat.read(folder / "notebook.ipynb", as_version=4).cells
        found[folder.name] = told
    return found


# --- the engines ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "engine, seen",
    [
        ("serial", {"5"}),
        pytest.param("processes", {"5", "7"}, marks=pytest.mark.slow),  # make demo runs so
        pytest.param("dask", {"5", "7"}, marks=pytest.mark.slow),
    ],
)
def test_engines_do_the_same_work(write, engine: str, seen: set[str]) -> None:
    """One run a GPU, and it sees no other. There need be none for this: it is in the kernel's environment."""
    path = write(2, device="cuda", wait=0.5)
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "5,7"}
    done = subprocess.run(
        command(path, "--engine", engine), capture_output=True, text=True, env=env
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = results_of(path)
    assert sorted(found) == ["run-number-0", "run-number-1"]
    assert {told["settings"]["CUDA_VISIBLE_DEVICES"] for told in found.values()} == seen
    assert f"{engine}: {len(seen)} at once" in done.stdout and done.stdout.count(" done in ") == 2
    assert not list(path.with_suffix("").glob(".[pog]*-*"))


def test_threads_share_the_gpus_out(write, monkeypatch) -> None:
    """Each minds one GPU for as long as it lives."""
    seen: list[str] = []

    def execute(notebook: Path, folder: Path, parameters: Any, environment: dict[str, str]) -> None:
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        time.sleep(0.3)

    monkeypatch.setattr(worker, "execute", execute)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    run_study(write(4, device="cuda"))
    assert sorted(seen) == ["5", "5", "7", "7"]


def test_gpus_are_those_that_this_process_sees(monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, GPU-ab")
    assert engines.visible_gpus() == ["1", "GPU-ab"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert engines.visible_gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert engines.visible_gpus() == []


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
def test_a_device_that_is_not_here_is_refused_before_a_kernel_starts(
    write, monkeypatch, capsys, device: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(engines, "torch_sees", lambda kind: False)
    monkeypatch.setattr(worker, "execute", lambda *args: pytest.fail("a kernel was started"))
    path = write(2, device=device)
    with pytest.raises(LocogenError, match=f"device is '{device}', .* use device 'cpu'"):
        run_study(path)
    capsys.readouterr()
    run_study(path, dry_run=True)  # planned here, run elsewhere
    said = capsys.readouterr().out
    assert "2 runs, 2 to do" in said
    assert said.splitlines()[-1].startswith(f"cannot run here: device is '{device}', ")
    run_study(path, dry_run=True, engine="dask", scheduler="tcp://elsewhere:1")
    assert "cannot run here" not in capsys.readouterr().out
    assert not list(path.with_suffix("").glob("[!.]*/error.json"))
    # The twin: with a GPU that only torch knows, a kernel is started.
    started: list[Path] = []
    monkeypatch.setattr(engines, "torch_sees", lambda kind: True)
    monkeypatch.setattr(worker, "execute", lambda notebook, folder, *rest: started.append(folder))
    run_study(path)
    assert len(started) == 2
    capsys.readouterr()
    run_study(path, dry_run=True, force=True)
    assert "cannot run here" not in capsys.readouterr().out


def test_a_gpu_beyond_the_last_one_is_refused(write, monkeypatch) -> None:
    monkeypatch.setattr(worker, "execute", lambda *args: pytest.fail("a kernel was started"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    with pytest.raises(LocogenError, match=r"device is 'cuda:7', and the last .* is 'cuda:0'"):
        run_study(write(1, device="cuda:7"))
    # Each kernel is given one of two: there is no second one in it.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,9")
    with pytest.raises(LocogenError, match=r"device is 'cuda:1', .*CUDA_VISIBLE_DEVICES=9 to"):
        run_study(write(1, device="cuda:1"))
    # GPUs that only torch knows are all seen by each kernel.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(engines, "torch_sees", lambda kind: True)
    monkeypatch.setattr(engines, "torch_gpus", lambda: 2)
    with pytest.raises(LocogenError, match=r"device is 'cuda:2', and the last .* is 'cuda:1'"):
        run_study(write(1, device="cuda:2"))
    started: list[Path] = []
    monkeypatch.setattr(worker, "execute", lambda notebook, folder, *rest: started.append(folder))
    run_study(write(1, device="cuda:1"))
    assert len(started) == 1


def test_torch_knows_the_devices_of_this_machine() -> None:
    assert engines.torch_sees("cuda") == torch.cuda.is_available()
    assert engines.torch_sees("mps") == torch.backends.mps.is_available()


@pytest.mark.parametrize(
    "cores, gigabytes, model, count", [(1, 64, "mini", 1), (8, 64, "mini", 4), (8, 5, "mini", 2)]
)
def test_as_many_as_fit(
    tmp_path: Path, monkeypatch, cores: int, gigabytes: int, model: str, count: int
) -> None:
    path = tmp_path / "study.toml"
    path.write_text(f'model = "{model}"\nconcepts = ["mini/neon"]\n')
    runs = read_study(path)[2]
    monkeypatch.setattr(engines, "cores", lambda: cores)
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: type("Memory", (), {"available": gigabytes * 2**30})
    )
    assert engines.fit_at_once(runs, 0) == count
    assert engines.fit_at_once([_on_cuda(run) for run in runs], 3) == 3


def _on_cuda(run: Planned) -> Planned:
    told = {**vars(run), "parameters": {**run.parameters, "device": "cuda"}}
    return Planned(**told)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"engine": "slurm"}, "no engine 'slurm': use one of dask, processes, serial"),
        ({"scheduler": "tcp://127.0.0.1:1"}, "--scheduler is for Dask"),
        ({"workers": 0}, "workers is 0: give a whole number"),
        (
            {"engine": "dask", "scheduler": "tcp://127.0.0.1:1"},
            "no Dask scheduler answers at tcp://127.0.0.1:1",
        ),
    ],
)
def test_engines_that_cannot_be_had(
    write, monkeypatch, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(engines, "PATIENCE", "1s")
    with pytest.raises(LocogenError, match=words):
        run_study(write(1), **options)


def test_dask_is_an_extra(write, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(LocogenError, match=r"pip install 'locogen\[dask\]'"):
        run_study(write(1), engine="dask")


@pytest.mark.slow
def test_a_scheduler_of_ones_own(write) -> None:
    """As on many machines: a scheduler and a worker started by hand, the study somewhere else."""
    path = write(2)
    python = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
    ]
    place = path.with_name("scheduler.json")
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": path.parent}
    with subprocess.Popen(
        [*python, "--no-dashboard", "--scheduler-file", str(place)], **quiet
    ) as scheduler:
        try:
            wait_for(lambda: place.exists() and place.read_text().endswith("}"))
            address = json.loads(place.read_text())["address"]
            worker_of = [
                sys.executable,
                "-m",
                "distributed.cli.dask_worker",
                address,
                "--nthreads",
                "1",
                "--no-dashboard",
            ]
            with subprocess.Popen(worker_of, **quiet) as one:
                try:
                    done = subprocess.run(
                        command(path, "--scheduler", address), capture_output=True, text=True
                    )
                finally:
                    one.terminate()
        finally:
            scheduler.terminate()
    assert done.returncode == 0, done.stderr
    assert len(results_of(path)) == 2


# --- what a person sees --------------------------------------------------------------------------


def test_a_kernel_tells_how_far_it_is(tmp_path: Path, monkeypatch) -> None:
    beat = Heartbeat()
    beat.ask(3)
    assert not list(tmp_path.iterdir()), "nobody asked"
    monkeypatch.setenv("LOCOGEN_PROGRESS", str(tmp_path / "progress.json"))
    beat.add(2, 0.5)
    assert read_progress(tmp_path) == (2, 3, 0.5)
    beat.add(1, 0.25)
    beat.ask(4)  # another call of generate
    assert read_progress(tmp_path) == (3, 7, 0.75)
    monkeypatch.setenv("LOCOGEN_PROGRESS", str(tmp_path / "gone" / "progress.json"))
    beat.add(1)
    assert read_progress(tmp_path / "gone") == (0, 0, 0.0)

    def is_full(*about: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("LOCOGEN_PROGRESS", str(tmp_path / "progress.json"))
    monkeypatch.setattr(os, "replace", is_full)
    beat.add(1)
    assert read_progress(tmp_path) == (3, 7, 0.75), "a full disk stops no pictures"


def test_pictures_are_told_as_they_are_made(tmp_path: Path, monkeypatch) -> None:
    from support import tiny

    from locogen.pictures.runs import generate

    monkeypatch.setenv("LOCOGEN_PROGRESS", str(tmp_path / "progress.json"))
    before = read_progress(tmp_path)
    generate(
        tiny.pipeline(),
        ["a cat", "a dog"],
        num_inference_steps=1,
        batch_size=1,
        store=tmp_path,
        progress=False,
    )
    after = read_progress(tmp_path)
    assert before == (0, 0, 0.0) and after.pictures == after.total >= 2
    assert after.seconds > 0, "of the work alone"


def test_a_pace_in_words() -> None:
    assert str(RunProgress(60.0, 20, 60, 10.0)) == "20/60 pictures, 2.0/s, 20 s left"
    assert str(RunProgress(3.0, 0, 0)) == "3 s, no picture yet"
    assert str(RunProgress(60.0, 60, 60, 10.0)) == "60/60 pictures, 6.0/s"
    assert str(RunProgress(0.0, 180, 264, 0.1)) == "180/264 pictures", "not 1800.0/s, 0 s left"


@pytest.fixture
def board(write, capsys) -> Board:
    path = write(3)
    runs = read_study(path)[2]
    path.with_suffix("").mkdir()
    return Board(path.with_suffix(""), runs, 2, Costs(path.with_suffix("")))


def test_a_log_has_a_line_a_run(board: Board, capsys) -> None:
    first, second, third = list(board.left.values())
    told = {
        "notebook": "parts",
        "parameters": dict(first.parameters),
        "model": "",
        "seconds": 20.0,
        "made": 40,
    }
    first.folder.mkdir()
    (first.folder / "result.json").write_text(
        json.dumps({**told, "key": first.key, "pictures": 40})
    )
    with board:
        board.finish(first, Outcome("", 20.0, 40, "layers 0-1", 20.0))
        board.finish(second, Outcome("ValueError: no", 4.0))
        board.finish(third, Outcome("", 2.0, 0, "executed"))
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] run-number-0  done in 20 s · 40 pictures, 2.0/s · layers 0-1 · about 20 s left",
        "[2/3] run-number-1  failed in 4 s · ValueError: no · about 20 s left",
        "[3/3] run-number-2  done in 2 s · executed",
    ]


def test_a_log_is_not_silent_for_long(board: Board, capsys) -> None:
    board.refresh()
    assert capsys.readouterr().out == "", "nothing was to be said yet"
    work = board.results / ".partial-run-number-1-0123abcd"
    work.mkdir()
    (work / "progress.json").write_text('{"made": 3, "asked": 12, "seconds": 6.0}')
    board.first_seen[work.name] = time.monotonic() - 6
    board.last_line -= 61
    board.refresh()
    assert capsys.readouterr().out == "at work: run-number-1 3/12 pictures, 0.5/s, 18 s left\n"
    board.refresh()
    assert capsys.readouterr().out == ""
    (work / "progress.json").unlink()  # it is about to be published
    assert board.at_work()["run-number-1"].pictures == 3


def test_a_run_is_timed_from_its_beginning_also_where_nothing_is_printed(
    board: Board, capsys
) -> None:
    """Else the first line, after a minute, has the pictures of a minute in no time."""
    work = board.results / ".partial-run-number-1-0123abcd"
    work.mkdir()
    board.refresh()
    assert capsys.readouterr().out == "" and work.name in board.first_seen


def shown(bars: Bars) -> list[str]:
    """The lines of the bars, as a terminal has them."""
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    console.print(bars.progress.get_renderable())
    return console.file.getvalue().splitlines()


def test_a_terminal_shows_what_is_at_work(board: Board) -> None:
    work = board.results / ".partial-run-number-1-0123abcd"
    work.mkdir()
    seconds = 0.0
    bars = Bars(3, clock=lambda: seconds)
    bars.show(board.at_work(), 0, "")
    assert "0 s, no picture yet" in shown(bars)[1]
    (work / "progress.json").write_text('{"made": 3, "asked": 12, "seconds": 6.0}')
    seconds = 6.0
    bars.show(board.at_work(), 0, " · about 1 min left")
    first, last = shown(bars)
    assert first.startswith("all") and "0/3 runs · about 1 min left" in first
    assert last.startswith("run-number-1") and "3/12 pictures, 0.5/s, 18 s left" in last
    shutil.rmtree(work)
    bars.show(board.at_work(), 1, "")
    (line,) = shown(bars)
    assert "1/3 runs" in line


def test_the_speed_is_that_of_the_work() -> None:
    """A model that was loading for long says nothing of the pictures, nor do those that were there before."""
    bars = Bars(1)
    bars.show({"x": RunProgress(200.0, 60, 100, 6.0)}, 0, "")
    assert "60/100 pictures, 10.0/s, 4 s left" in shown(bars)[1]
    assert 60 / 200 < 1, "the twin: by the clock it would be 0.3/s"


def test_a_name_is_no_markup(board: Board, monkeypatch) -> None:
    """What a user calls a run is shown as it is, on a terminal too."""
    output = io.StringIO()
    monkeypatch.setattr(
        sys, "stdout", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    )
    live = Board(board.results, list(board.left.values()), 1, board.costs)
    live.bars = Bars(1, Console(file=output, width=200))
    live.print("[red]neon[/red] [1/2]")
    assert output.getvalue() == "[red]neon[/red] [1/2]\n"
    live.bars.show({"[red]neon": RunProgress(1.0, 0, 0)}, 0, "")
    assert shown(live.bars)[1].startswith("[red]neon")


# --- kill -9 -------------------------------------------------------------------------------------


def test_the_old_result_survives_a_kill_between_two_steps(write, monkeypatch) -> None:
    """The moment when the old folder has left its place, and the new one has not come."""
    path = write(1)
    monkeypatch.setattr(worker, "execute", lambda *given: None)
    run_study(path)
    folder = path.with_suffix("") / "run-number-0"
    before = result(path, "run-number-0")
    replace, calls = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(replace(source, target))

    (partial := folder.with_name(".partial-run-number-0-x")).mkdir()
    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(partial, folder)
    monkeypatch.setattr(os, "replace", replace)
    assert not folder.exists()
    monkeypatch.setattr(worker, "execute", lambda *given: pytest.fail("it was there"))
    run_study(path)
    assert result(path, "run-number-0") == before


FAKE = """
import pathlib, sys, time
from locogen.studies import worker
def execute(notebook, folder, parameters, environment):
    (folder / "notebook.ipynb").write_text(pathlib.Path(notebook).read_text())
    for part in range(4):
        with (folder / "parts.txt").open("a") as file:
            print(part, file=file)
        time.sleep(parameters["wait"] / 4)
    (folder / "finding.json").write_text('{"finding": "whole"}')
worker.execute = execute
from locogen.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@needs_signals
@pytest.mark.parametrize("kills", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_a_study_killed_at_any_moment_loses_nothing_finished(write, kills: int) -> None:
    """Without kernels, so that most moments are those of writing and publishing."""
    chance = random.Random(kills)
    path = write(8, wait=0.1)
    start = [sys.executable, "-c", FAKE, "run", str(path), "--workers", "3"]
    seen: dict[str, str] = {}
    for round in range(kills):
        with subprocess.Popen(
            [*start, "--force"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as process:
            begun(path, process)
            time.sleep(chance.random() * 0.5)
            process.kill()
        results_of(path)  # nothing half-written looks finished, right after the kill
        with locked(path.with_suffix("")):  # as the next start begins
            found = results_of(path)
        assert found.keys() >= seen.keys(), f"lost in round {round}"
        seen = {slug: told["finished"] for slug, told in found.items()}
    done = subprocess.run(start, capture_output=True, text=True, check=True)
    assert len(results_of(path)) == 8 and not list(path.with_suffix("").glob(".[pog]*-*"))
    assert done.stderr == ""


def begun(path: Path, process: subprocess.Popen[Any]) -> None:
    """Wait for a run to begin, or for the study to end all by itself; what an earlier one left does not count."""
    left = at_work(path)
    wait_for(lambda: bool(at_work(path) - left) or process.poll() is not None, 60)


def at_work(path: Path) -> set[str]:
    return {folder.name for folder in path.with_suffix("").glob(".partial-*")}


def kernels(process: psutil.Process) -> list[psutil.Process]:
    return [
        one for one in descendants(process) if any("ipykernel" in word for word in one.cmdline())
    ]


def workers(process: psutil.Process) -> list[psutil.Process]:
    """Dask's, of an embedded cluster: the parents of kernels, or about to be."""
    return [
        one for one in descendants(process) if any("spawn_main" in word for word in one.cmdline())
    ]


def descendants(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [
            one for one in process.children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE
        ]
    except psutil.NoSuchProcess:
        return []


def strike(process: subprocess.Popen[Any], victim: str, chance: random.Random) -> None:
    """Kill the study, or one of its kernels or workers once there is any."""
    study = psutil.Process(process.pid)
    if victim == "study":
        study.kill()
        return
    found: list[psutil.Process] = []
    end = time.monotonic() + 30
    while not found and process.poll() is None and time.monotonic() < end:
        found = kernels(study) if victim == "kernel" else workers(study)
        time.sleep(0.02)
    if found:
        chance.choice(found).kill()


def run_and_strike(path: Path, engine: str, victim: str, chance: random.Random) -> int:
    """Start the study, kill something of it at a moment of chance, and wait for what it says in the end."""
    start = command(path, "--engine", engine, "--workers", "2")
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        begun(path, process)
        time.sleep(chance.random() * 3)
        strike(process, victim, chance)
        return process.wait(120)


@needs_signals
@pytest.mark.parametrize(
    "kills, victims",
    [
        pytest.param(1, ["kernel"], id="kernel", marks=pytest.mark.slow),
        pytest.param(50, ["kernel", "worker", "study"], id="50", marks=pytest.mark.slow),
    ],
)
def test_whatever_is_killed_a_study_ends_complete(write, kills: int, victims: list[str]) -> None:
    """Real kernels, real workers, at random moments; what is finished stays so, the next start does the rest."""
    chance = random.Random(kills)
    for round in range(kills):
        victim = victims[round % len(victims)]
        engine = "dask" if victim == "worker" else "processes"
        path = write(3, wait=0.05 + 0.001 * round)  # other parameters: nothing is finished
        code = run_and_strike(path, engine, victim, chance)
        done = {
            run.slug for run in read_study(path)[2] if run.state == "done"
        }  # the others are of an earlier round
        ended = {slug: told["finished"] for slug, told in results_of(path).items() if slug in done}
        if victim == "worker":
            assert code == 0, "Dask gives the run to another worker"
        subprocess.run(command(path, "--workers", "2"), check=True, capture_output=True)
        found = results_of(path)
        valid = {run.slug: run.state for run in read_study(path)[2]}
        assert set(valid.values()) == {"done"} and len(found) == 3, (round, victim, valid)
        assert all(found[slug]["finished"] == finished for slug, finished in ended.items()), (
            "nothing is done twice"
        )


@needs_signals
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["processes", "dask"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_nothing_outlives_its_study(write, engine: str, name: str) -> None:
    """After Ctrl-C, which a terminal sends to the whole family, and after the study itself is killed."""
    path = write(3, wait=60)
    listen = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; from locogen.__main__ import main; sys.exit(main(sys.argv[1:]))"
    start = [sys.executable, "-c", code, "run", str(path), "--engine", engine, "--workers", "2"]
    piped: Any = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    with subprocess.Popen(start, **piped) as process:
        study = psutil.Process(process.pid)
        wait_for(lambda: len(kernels(study)) == 2, 120)
        family = descendants(study)
        if name == "SIGINT":
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.kill()
        out, error = process.communicate(timeout=60)
    wait_for(
        lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family)
    )
    # After SIGKILL, Python's own tracker of semaphores may say that it cleans up.
    assert not results_of(path) and "Traceback" not in error
    if name == "SIGINT":
        assert error == ""
        assert (
            process.returncode == 130 and "left: run-number-0, run-number-1, run-number-2." in out
        )
        assert not list(path.with_suffix("").glob(".[pog]*-*"))


GENERATES = """
import json, pathlib
import locogen as loco
pair = loco.concept(concept).pairs[0]
run = loco.generate(
    loco.load(model), [pair.prompt, pair.target], seeds=range(seeds), num_inference_steps=2, store=store, progress=False
)
sizes = [picture.size for picture in run.pictures]
pathlib.Path(results, "finding.json").write_text(json.dumps({"pictures": len(run), "settings": {"sizes": sizes}}))
"""


@needs_signals
@pytest.mark.slow
def test_forty_runs_with_dask_and_a_worker_killed_end_complete(tmp_path: Path) -> None:
    """Two models that differ, four concepts, five numbers of seeds; a worker dies when a fifth is done."""
    from support import tiny

    for name, width in (("a", 8), ("b", 16)):
        tiny.pipeline(block_out_channels=(width, width, 16, 16)).save_pretrained(tmp_path / name)
    parameters = (
        'concept: str = ""  # an id\nmodel: str = ""  # a folder\nseeds: int = 1  # how many\n'
        'store: str = ""  # pictures\nresults: str = ""  # tables\n'
    )
    write_notebook(tmp_path / "generates.ipynb", GENERATES, parameters=parameters)
    path = tmp_path / "forty.toml"
    path.write_text(
        'notebook = "generates.ipynb"\nmodels = ["./a", "./b"]\n'
        'concepts = ["mini/neon", "mini/owl", "mini/cat", "mini/robot"]\n[grid]\nseeds = [1, 2, 3, 4, 5]\n'
    )
    start = command(path, "--engine", "dask", "--workers", "2")
    with subprocess.Popen(
        start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: len(list(path.with_suffix("").glob("[!.]*/result.json"))) >= 8, 600)
        before = workers(psutil.Process(process.pid))
        before[0].kill()
        out, error = process.communicate(timeout=1800)
    assert len(before) == 2 and process.returncode == 0 and error == "", error
    runs = read_study(path)[2]
    assert (
        len(runs) == 40 and {run.state for run in runs} == {"done"} and out.count(" done in ") == 40
    )
    for run in runs:
        told = json.loads((run.folder / "result.json").read_text())
        assert (
            told["pictures"] == 2 * run.parameters["seeds"]
            and told["model"] == run.parameters["model"]
        )
    assert not list(path.with_suffix("").glob(".[pog]*-*"))
