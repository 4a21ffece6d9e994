"""Where runs are executed: each engine is a plain `concurrent.futures.Executor`, and how many runs it takes at once.

`serial` and `processes` are threads that each mind one kernel, a process of its own: a kernel that is killed
takes nothing with it. `dask` gives the same function to Dask's workers, on this machine or on many.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from locogen.catalog import model_entries
from locogen.errors import LocogenError, unknown
from locogen.studies.planning import Planned
from locogen.studies.worker import take_gpu

ENGINES = ("serial", "processes", "dask")
_THREADS = 2  # a kernel's at least: small pictures hardly gain from more, and with one each kernel waits for itself
_GIB = 2**30
# A terminal sends Ctrl-C to all its processes; the study is the one to answer, and it ends its workers.
_DEAF = "import signal; from locogen.studies.kernel import hush; signal.signal(signal.SIGINT, signal.SIG_IGN); hush()"
PATIENCE = "10s"  # for a Dask scheduler to answer


@dataclass(frozen=True)
class Engine:
    """An executor, how many runs it takes at once, and the threads of each kernel (None: as the worker has it).

    `lost`: what a future raises whose worker died again and again.
    """

    executor: Executor
    workers: int
    threads: int | None
    lost: tuple[type[Exception], ...] = ()


@contextlib.contextmanager
def opened(
    name: str, runs: Sequence[Planned], workers: int | None, scheduler: str | None
) -> Iterator[Engine]:
    """An engine for these runs; closed without waiting for what has not begun.

    Raises `LocogenError` for an unknown engine, a scheduler that does not answer, or Dask not being installed.
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    if scheduler and name != "dask":
        raise LocogenError(
            f"a scheduler is Dask's, and the engine is {name}: add --engine dask, or leave it out"
        )
    gpus = (
        visible_gpus() if any(str(run.value("device")).startswith("cuda") for run in runs) else []
    )
    count = 1 if name == "serial" else min(workers or fit_at_once(runs, len(gpus)), len(runs))
    threads = None if os.environ.get("OMP_NUM_THREADS") else max(1, cores() // count)
    if name == "dask":
        with _dask(count, gpus, scheduler) as (executor, found, lost):
            # Dask's own workers set the variable to 1, whatever it was.
            own = threads or int(os.environ.get("OMP_NUM_THREADS", "1"))
            yield Engine(executor, found, None if scheduler else own, lost)
        return
    with _threads(count, gpus) as executor:
        yield Engine(executor, count, threads)


@contextlib.contextmanager
def _threads(count: int, gpus: Sequence[str]) -> Iterator[Executor]:
    """A thread for each kernel; with GPUs, one each, or shared in turn where there are more kernels than GPUs."""
    free: SimpleQueue[str] = SimpleQueue()
    for number in range(count if gpus else 0):
        free.put(gpus[number % len(gpus)])
    pin = partial(take_gpu, free) if gpus else None
    executor = ThreadPoolExecutor(count, "run", pin)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


_Opened = tuple[Executor, int, tuple[type[Exception], ...]]


@contextlib.contextmanager
def _dask(count: int, gpus: Sequence[str], scheduler: str | None) -> Iterator[_Opened]:
    """Dask's own executor on the scheduler's workers, or on a cluster of this machine's; and how many there are."""
    try:
        import dask
        from distributed import Client, KilledWorker
    except ImportError:
        raise LocogenError(
            "the engine dask needs Dask: pip install 'locogen[dask]', or take --engine processes"
        ) from None

    quiet = {
        "distributed.comm.timeouts.connect": PATIENCE,
        "distributed.admin.large-graph-warning-threshold": "1GB",
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(quiet))
        where: Any = scheduler or stack.enter_context(_cluster(count, gpus))
        try:
            client: Any = stack.enter_context(Client(where, set_as_default=False))
        except (OSError, ValueError):
            raise LocogenError(
                f"no Dask scheduler answers at {scheduler}: start one with `dask scheduler`"
            ) from None
        there: Any = client.nthreads()  # worker → threads, and each takes a run
        found = sum(there.values())
        yield client.get_executor(pure=False), found, (KilledWorker,)


def _cluster(count: int, gpus: Sequence[str]) -> Any:
    """Workers of one run at a time, reached from this machine only; with GPUs one for each, and it sees no other."""
    from distributed import Nanny, Scheduler, SpecCluster

    quiet: Any = logging.CRITICAL
    common = {
        "nthreads": 1,
        "memory_limit": 0,
        "host": "127.0.0.1",
        "silence_logs": quiet,
        "preload": [_DEAF],
    }
    pins = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:count]] or [{}] * count
    workers = {
        number: {"cls": Nanny, "options": {**common, "env": pin}} for number, pin in enumerate(pins)
    }
    options: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "dashboard": False,
        "dashboard_address": "127.0.0.1:0",
    }
    return SpecCluster(workers, {"cls": Scheduler, "options": options}, silence_logs=quiet)


# --- what the machine has ------------------------------------------------------------------------


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; torch is not asked, it takes seconds."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu.strip() for gpu in chosen.split(",") if gpu.strip()]
    if not (tool := shutil.which("nvidia-smi")):
        return []
    command = [tool, "--query-gpu=uuid", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        listed = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout
        return [line.strip() for line in listed.splitlines() if line.strip()]
    return []


def fit_at_once(runs: Sequence[Planned], gpus: int) -> int:
    """How many runs at once: one a GPU, or as cores (two each) and free memory allow; at least one."""
    import psutil

    if any(str(run.value("device")).startswith(("cuda", "mps")) for run in runs):
        return max(gpus, 1)
    each = max(_memory(run) for run in runs)
    return max(1, min(cores() // _THREADS, int(psutil.virtual_memory().available / each)))


def _memory(run: Planned) -> float:
    """About what a run's kernel needs, in bytes: the libraries and pictures, and the weights two and a half times."""
    name = run.value("model")
    entry = next((entry for entry in model_entries() if entry.name == name), None)
    folder = entry.folder if entry else run.base / str(name or ".") if name else None
    if folder and Path(folder).is_dir():
        return 2 * _GIB + 2.5 * sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return 12 * _GIB if name else 2 * _GIB  # a model of the hub
