"""One notebook in one kernel: executed into a folder by papermill, while that folder exists.

The kernel is always the interpreter that runs this, whatever kernels are installed. It works in the
folder that the executed notebook is written to. Whoever deletes the folder stops the kernel, from
any process or machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent

# Progress bars and advice of the libraries do not belong in a saved page.
_QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
_COLORS = re.compile(r"\x1b\[[0-9;]*m")  # of a terminal, as IPython writes them into errors


@dataclass(frozen=True)
class Failure:
    """Why a notebook did not come to its end.

    Attributes:
        message: For a person.
        cell: The number of the cell that it stopped in, as in `[5]` next to it.
    """

    message: str
    cell: int | None = None


def execute(
    notebook: Path,
    folder: Path,
    parameters: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
) -> Failure | None:
    """Execute a notebook in a new kernel, which has ended when this returns or raises.

    The kernel also ends as soon as the folder is deleted. The notebook has then failed, or
    papermill raises because it cannot write it.

    Args:
        notebook: What to execute.
        folder: Where the kernel works and `notebook.ipynb` is written.
        parameters: Name → value, in plain JSON types.
        environment: Variables for the kernel, in addition to those of this process.

    Returns:
        None if all went well.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    # Sockets lie in a folder with a short name: a socket's path may have some 100 bytes only.
    with (
        _event_loop(),
        tempfile.TemporaryDirectory(prefix="loco-") as sockets,
        _watched(folder) as processes,
    ):
        log = Path(sockets, "kernel.log")
        try:
            papermill.execute_notebook(
                _literal(notebook),
                _literal(folder / "notebook.ipynb"),
                dict(parameters),
                kernel_name="python3",
                language="python",
                progress_bar=False,
                config=_kernel_settings(sockets),
                kernel_manager_class=_this_interpreter(log, environment or {}, processes),
                resources={"metadata": {"path": str(folder)}},
            )
        except papermill.PapermillExecutionError as error:
            # Our own errors are written for the reader, so their type says nothing more.
            name = "" if error.ename == "LocogenError" else f"{error.ename}: "
            return Failure(name + _COLORS.sub("", str(error.evalue)), error.exec_count)
        except DeadKernelError:
            return Failure(f"the kernel died, most often because memory ran out{_last_line(log)}")
        except (RuntimeError, TimeoutError) as error:
            return Failure(f"the kernel did not start ({error}){_last_line(log)}")
        except (ValueError, papermill.exceptions.PapermillException) as error:
            return Failure(f"papermill cannot execute the notebook: {error}")
    return None


def _kernel_settings(sockets: str) -> Any:
    from traitlets.config import Config

    settings: dict[str, Any] = {
        "connection_file": str(Path(sockets, "kernel.json")),
        "shutdown_wait_time": 2,  # seconds
    }
    if sys.platform != "win32":
        # Not by ports: of kernels that start at once, two could choose the same one.
        settings["transport"] = "ipc"
    return Config({"KernelManager": settings})


@contextlib.contextmanager
def _event_loop() -> Iterator[None]:
    """Close papermill's event loop of this thread, which otherwise nobody closes."""
    from jupyter_core.utils import ensure_event_loop

    loop = ensure_event_loop()
    try:
        yield
    finally:
        if not loop.is_running():
            loop.close()


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[list[int]]:
    """Kill a kernel when its folder is gone.

    Args:
        folder: Looked at five times a second.

    Returns:
        A list for the kernel's process id, to be filled when it has started.
    """
    processes: list[int] = []
    has_ended = threading.Event()

    def watch() -> None:
        while not has_ended.wait(0.2):
            if processes and not folder.is_dir():
                # A cell may be in the middle of anything, so it is not asked to end by itself.
                kill = signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    os.kill(processes[0], kill)
                return

    watcher = threading.Thread(target=watch, name=f"watch {folder.name}", daemon=True)
    watcher.start()
    try:
        yield processes
    finally:
        has_ended.set()
        watcher.join()


def _this_interpreter(log: Path, environment: Mapping[str, str], processes: list[int]) -> type:
    """A kernel manager that starts the running interpreter, whatever kernels are installed.

    Args:
        log: Where the kernel's process writes; what cells print goes into the notebook.
        environment: Variables for the kernel.
        processes: Gets the kernel's process id.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    # What somebody has set for these libraries wins over our wish for quiet.
    quiet = {name: os.environ.get(name, value) for name, value in _QUIET_LIBRARIES.items()}
    environment = {**quiet, **environment, "PYTHONPATH": _python_path()}
    spec = KernelSpec(argv=command, display_name="Python 3", language="python", env=environment)

    class ThisInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

        async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
            with log.open("ab") as stream:
                await super()._async_launch_kernel(
                    kernel_cmd, stdout=stream, stderr=stream, **options
                )
            process = getattr(self.provisioner, "pid", None)
            if process:
                processes.append(process)

    return ThisInterpreter


def _last_line(log: Path) -> str:
    """The last line that the kernel's process wrote, for the end of a message."""
    if not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f": {lines[-1]}" if lines else ""


def _python_path() -> str:
    """Where the kernel finds what this process finds, locogen above all.

    Made absolute, since the kernel works in another folder.
    """
    entries = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    paths = [str(Path(entry).absolute()) for entry in entries]
    # An installed locogen is found anyway, and its folder would put all else there first.
    home = _PACKAGE.parent
    if home.name not in ("site-packages", "dist-packages"):
        paths.append(str(home))
    return os.pathsep.join(dict.fromkeys(paths))


def _literal(path: Path) -> str:
    """The path in the form that papermill expects, which reads its paths as templates."""
    return str(path).replace("{", "{{").replace("}", "}}")


# --- the libraries' own messages -----------------------------------------------------------------


def hush() -> dict[str, int]:
    """Keep the libraries underneath quiet about failed and stopped runs, which we report ourselves.

    Returns:
        Logger → the level that it had before.
    """
    levels: dict[str, int] = {}
    for name in ("papermill", "asyncio", "traitlets", "distributed"):
        logger = logging.getLogger(name)
        levels[name] = logger.level
        logger.setLevel(logging.CRITICAL + 1)
    return levels


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """`hush` for the time of the block."""
    levels = hush()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
