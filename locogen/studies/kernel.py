"""One notebook in one kernel: executed into a folder by papermill, for as long as that folder is there.

The kernel is always the interpreter that asks, whatever kernels are installed; it works in the folder that
the executed notebook is written to. Whoever takes the folder away stops the kernel, from wherever that may be.
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
# Progress bars and advice of the libraries underneath do not belong in a saved page.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


@dataclass(frozen=True)
class Failure:
    """Why a notebook did not come to its end, and the number of the cell it stopped in, as in `[5]` beside it."""

    message: str
    cell: int | None = None


def execute(
    notebook: Path,
    folder: Path,
    parameters: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
) -> Failure | None:
    """Execute into `folder/notebook.ipynb`, in a kernel that works in `folder`; None when all went well.

    `environment`: of the kernel, beside what it inherits. The kernel is gone when this returns or raises, and it
    goes when the folder does: the notebook has failed then, or papermill finds no place to write it to.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    # Sockets in a folder of their own, for its short name: a socket's path has some 100 bytes.
    with (
        _event_loop(),
        tempfile.TemporaryDirectory(prefix="loco-") as sockets,
        _watched(folder) as started,
    ):
        settings: dict[str, Any] = {
            "connection_file": str(Path(sockets, "kernel.json")),
            "shutdown_wait_time": 2,
        }
        if sys.platform != "win32":
            settings["transport"] = "ipc"  # no ports, so no race for them
        log = Path(sockets, "kernel.log")
        try:
            papermill.execute_notebook(
                _literal(notebook),
                _literal(folder / "notebook.ipynb"),
                dict(parameters),
                kernel_name="python3",
                language="python",
                progress_bar=False,
                config=Config({"KernelManager": settings}),
                kernel_manager_class=_this_interpreter(log, environment or {}, started),
                resources={"metadata": {"path": str(folder)}},
            )
        except papermill.PapermillExecutionError as error:
            named = "" if error.ename == "LocogenError" else f"{error.ename}: "
            return Failure(
                named + re.sub(r"\x1b\[[0-9;]*m", "", str(error.evalue)), error.exec_count
            )
        except DeadKernelError:
            return Failure(f"the kernel died, most often for want of memory{_last_words(log)}")
        except (RuntimeError, TimeoutError) as error:
            return Failure(f"the kernel did not start ({error}){_last_words(log)}")
        except (ValueError, papermill.exceptions.PapermillException) as error:
            return Failure(f"papermill does not take the notebook: {error}")
    return None


@contextlib.contextmanager
def _event_loop() -> Iterator[None]:
    """Papermill's loop of this thread, which otherwise nobody closes."""
    from jupyter_core.utils import ensure_event_loop

    loop = ensure_event_loop()
    try:
        yield
    finally:
        if not loop.is_running():
            loop.close()


@contextlib.contextmanager
def _watched(folder: Path) -> Iterator[list[int]]:
    """Kill the processes in the list that this gives, once the folder is gone; looks five times a second."""
    processes: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            if processes and not folder.is_dir():
                with contextlib.suppress(OSError):
                    os.kill(
                        processes[0], signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL
                    )
                return

    watcher = threading.Thread(target=watch, name=f"watch {folder.name}", daemon=True)
    watcher.start()
    try:
        yield processes
    finally:
        over.set()
        watcher.join()


def _this_interpreter(log: Path, environment: Mapping[str, str], started: list[int]) -> type:
    """A kernel manager that starts the running interpreter, and asks no installed kernel specification.

    What the kernel's process itself has to say (not the notebook) goes to `log`, its number to `started`.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    quiet = {name: os.environ.get(name, value) for name, value in _QUIET.items()}
    environment = {**quiet, **environment, "PYTHONPATH": _python_path()}
    spec = KernelSpec(argv=command, display_name="Python 3", language="python", env=environment)

    class ThisInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

        async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
            with log.open("ab") as written:
                await super()._async_launch_kernel(
                    kernel_cmd, stdout=written, stderr=written, **options
                )
            started.extend(pid for pid in [getattr(self.provisioner, "pid", None)] if pid)

    return ThisInterpreter


def hush() -> dict[str, int]:
    """Keep the libraries underneath quiet: what they say of a failed or stopped run, we say; the levels before."""
    levels = {
        name: logging.getLogger(name).level
        for name in ("papermill", "asyncio", "traitlets", "distributed")
    }
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return levels


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """`hush` for a while."""
    levels = hush()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _last_words(log: Path) -> str:
    """The last line that the kernel's process wrote."""
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.is_file() else ""
    return f": {text.splitlines()[-1]}" if text else ""


def _python_path() -> str:
    """Where the kernel, which works in another folder, finds what this process finds, locogen above all."""
    entries = [
        str(Path(entry).absolute())
        for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if entry
    ]
    home = _PACKAGE.parent
    if home.name not in ("site-packages", "dist-packages"):
        entries.append(str(home))
    return os.pathsep.join(dict.fromkeys(entries))


def _literal(path: Path) -> str:
    """The path as papermill takes it, which reads its paths as templates."""
    return str(path).replace("{", "{{").replace("}", "}}")
