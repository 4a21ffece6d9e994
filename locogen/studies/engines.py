"""Where runs are executed: an engine is a `concurrent.futures.Executor` and a number of workers.

`serial` and `processes` are threads, each of which waits for one kernel: a kernel is a process of
its own, and if it is killed it takes nothing with it. `dask` gives the same function to Dask's
workers, on this machine or on many.
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
from queue import SimpleQueue
from typing import Any

from locogen.errors import LocogenError, unknown
from locogen.studies.keys import model_place
from locogen.studies.planning import Planned
from locogen.studies.worker import take_gpu

ENGINES = ("serial", "processes", "dask")
PATIENCE = "10s"  # how long a Dask scheduler may take to answer

# Cores for each kernel, at least: more hardly make small pictures faster, but with a single one all
# kernels wait for themselves.
_CORES_EACH = 2
_GIB = 2**30

# A terminal sends Ctrl-C to all processes that it has started. Dask's workers ignore it: the study
# answers it, and ends them.
_IGNORE_INTERRUPT = (
    "import signal; from locogen.studies.kernel import hush; "
    "signal.signal(signal.SIGINT, signal.SIG_IGN); hush()"
)


@dataclass(frozen=True)
class Engine:
    """Something that executes runs.

    Attributes:
        executor: Takes the runs.
        workers: How many it executes at the same time.
        threads: Of each kernel; None leaves them to the worker's environment.
        lost: What a future raises if every worker that tried it has died.
    """

    executor: Executor
    workers: int
    threads: int | None
    lost: tuple[type[Exception], ...] = ()


@contextlib.contextmanager
def opened(
    name: str, runs: Sequence[Planned], workers: int | None, scheduler: str | None
) -> Iterator[Engine]:
    """Open an engine for the block; when it ends, runs that have not begun are canceled.

    Args:
        name: One of `ENGINES`.
        runs: What it will execute; on how much of the machine they need depends how many fit.
        workers: Runs at the same time; None for as many as fit.
        scheduler: Address of a Dask scheduler; None starts Dask on this machine.

    Returns:
        The engine.

    Raises:
        LocogenError: The engine is unknown, Dask is not installed, its scheduler does not answer,
            or a run asks for a device that this machine does not have.
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    if scheduler and name != "dask":
        raise LocogenError(
            f"--scheduler is for Dask, and the engine is {name}: use --engine dask, or leave out "
            "--scheduler"
        )
    gpus = visible_gpus() if _use(runs, "cuda") else []
    # The workers of a scheduler are machines of their own.
    reason = missing_device(runs) if scheduler is None else ""
    if reason:
        raise LocogenError(reason)
    count = 1
    if name != "serial":
        # More workers than runs would only take memory.
        count = min(workers or fit_at_once(runs, len(gpus)), len(runs))
    threads = _threads_of_each(count)

    if name == "dask":
        with _dask(count, gpus, threads, scheduler) as engine:
            yield engine
    else:
        with _threads(count, gpus) as executor:
            yield Engine(executor, count, threads)


def _threads_of_each(count: int) -> int | None:
    """Threads of the processor for each of some kernels; None: the user has said how many."""
    return None if os.environ.get("OMP_NUM_THREADS") else max(1, cores() // count)


def _use(runs: Sequence[Planned], *devices: str) -> bool:
    """Whether some run asks for a device of these kinds ("cuda" includes "cuda:1")."""
    return any(str(run.value("device")).startswith(devices) for run in runs)


def missing_device(runs: Sequence[Planned]) -> str:
    """What is wrong with a device that some run asks for and that is not here; empty if all are.

    Args:
        runs: Those to execute on this machine.

    Returns:
        The device, the reason and the remedy, in a sentence.
    """
    gpus = visible_gpus() if _use(runs, "cuda") else []
    devices = dict.fromkeys(str(run.value("device")) for run in runs)
    reasons = (_reason_without(device, gpus) for device in devices)
    return next((reason for reason in reasons if reason), "")


def _reason_without(device: str, gpus: Sequence[str]) -> str:
    """Why a run cannot have a device; empty if it can. A kernel would take seconds to fail."""
    kind, _, number = device.partition(":")
    if kind == "mps" and not torch_sees("mps"):
        return (
            f"device is {device!r}, which is a Mac's GPU, and there is none here: use device 'cpu'"
        )
    return _reason_without_gpu(device, int(number or 0), gpus) if kind == "cuda" else ""


def _reason_without_gpu(device: str, place: int, gpus: Sequence[str]) -> str:
    if not gpus and not torch_sees("cuda"):
        return (
            f"device is {device!r}, and there is no GPU here: use device 'cpu', or start it on a "
            "machine with a GPU (nvidia-smi lists them; CUDA_VISIBLE_DEVICES hides some)"
        )
    count = len(gpus) or (torch_gpus() if place else 1)
    if place >= count:
        return (
            f"device is {device!r}, and the last of the {count} GPUs here is 'cuda:{count - 1}': "
            "use device 'cuda'"
        )
    if place and gpus:
        return (
            f"device is {device!r}, and each run sees one GPU alone, which is 'cuda:0' there: use "
            f"device 'cuda', and start it with CUDA_VISIBLE_DEVICES={gpus[place]} to choose"
        )
    return ""


@contextlib.contextmanager
def _threads(count: int, gpus: Sequence[str]) -> Iterator[Executor]:
    """A thread for each kernel, with a GPU each; if there are fewer GPUs, kernels share them."""
    claim = None
    if gpus:
        free: SimpleQueue[str] = SimpleQueue()
        for number in range(count):
            free.put(gpus[number % len(gpus)])
        claim = partial(take_gpu, free)
    executor = ThreadPoolExecutor(count, "run", claim)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


# --- Dask ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _dask(
    count: int, gpus: Sequence[str], threads: int | None, scheduler: str | None
) -> Iterator[Engine]:
    """Dask on the workers of a scheduler, or on a cluster of this machine."""
    try:
        import dask
        from distributed import Client, KilledWorker
    except ImportError:
        raise LocogenError(
            "the engine dask needs Dask: pip install 'locogen[dask]', or use --engine processes"
        ) from None

    if scheduler:
        threads = None  # other machines have other numbers of cores
    elif threads is None:
        # Dask's workers set the variable to 1, whatever it was: so it is passed on explicitly.
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    options = {
        "distributed.comm.timeouts.connect": PATIENCE,
        "distributed.admin.large-graph-warning-threshold": "1GB",
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(options))
        address: Any = scheduler or stack.enter_context(_cluster(count, gpus))
        try:
            client: Any = stack.enter_context(Client(address, set_as_default=False))
        except (OSError, ValueError):
            raise LocogenError(
                f"no Dask scheduler answers at {scheduler}: start one with `dask scheduler`"
            ) from None
        # Each thread of each worker takes a run.
        workers = sum(client.nthreads().values())
        yield Engine(client.get_executor(pure=False), workers, threads, (KilledWorker,))


def _cluster(count: int, gpus: Sequence[str]) -> Any:
    """Workers of one run at a time; with GPUs one worker for each, which sees no other GPU."""
    from distributed import Nanny, Scheduler, SpecCluster

    environments: list[dict[str, str]] = [{}] * count
    if gpus:
        environments = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:count]]
    quiet: Any = logging.CRITICAL
    # Only this machine can reach it: whoever reaches a scheduler can execute anything.
    host = "127.0.0.1"
    workers: dict[int, dict[str, Any]] = {}
    for number, environment in enumerate(environments):
        options = {
            "nthreads": 1,
            "memory_limit": 0,  # none: what takes memory is the kernel, which Dask does not see
            "host": host,
            "silence_logs": quiet,
            "preload": [_IGNORE_INTERRUPT],
            "env": environment,
        }
        workers[number] = {"cls": Nanny, "options": options}
    scheduler: dict[str, Any] = {
        "host": host,
        "port": 0,
        "dashboard": False,
        "dashboard_address": f"{host}:0",
    }
    return SpecCluster(workers, {"cls": Scheduler, "options": scheduler}, silence_logs=quiet)


# --- what the machine has ------------------------------------------------------------------------


def cores() -> int:
    """Processor cores that this process may use."""
    # A container or a batch system may give it only some of the machine's.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, in the form of CUDA_VISIBLE_DEVICES.

    The driver's tool is asked and not torch, whose import takes seconds.
    """
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        names = _all_gpus().replace("\n", ",")
    return [name.strip() for name in names.split(",") if name.strip()]


def torch_sees(kind: str) -> bool:
    """Whether torch finds a GPU of this kind; it calls those of other makers cuda, too."""
    import torch

    if kind == "mps":
        return torch.backends.mps.is_available()
    return torch.cuda.is_available()


def torch_gpus() -> int:
    """How many GPUs torch finds where no driver's tool lists them."""
    import torch

    return torch.cuda.device_count()


def _all_gpus() -> str:
    """The names of the machine's GPUs, a line each; empty without any or without a driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    # By their unique ids: numbers would mean others as soon as some GPUs are hidden.
    command = [tool, "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def fit_at_once(runs: Sequence[Planned], gpus: int) -> int:
    """How many runs fit the machine at the same time, at least one.

    With a GPU, one run for each. Otherwise as many as cores (two each) and free memory allow.
    """
    import psutil

    if _use(runs, "cuda", "mps"):
        return max(gpus, 1)
    largest = max(_memory(run) for run in runs)
    by_memory = int(psutil.virtual_memory().available / largest)
    return max(1, min(cores() // _CORES_EACH, by_memory))


def _memory(run: Planned) -> float:
    """About what a run's kernel needs, in bytes."""
    libraries = 2 * _GIB  # and the pictures
    if not run.value("model"):
        return libraries
    folder = model_place(run.values(), run.base)
    if folder is None:
        return 12 * _GIB  # a model of the hub, whose size is not known
    # The factor leaves room for copies while weights are loaded, and for what they compute.
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    return libraries + 2.5 * weights
