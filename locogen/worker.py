"""One notebook: find it, check values against its parameters, execute it in a kernel of its own, publish.

The kernel is always the interpreter that asks, whatever kernels are installed; it works in the folder that
the executed notebook is written to, and that folder is published whole or not at all.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locogen.errors import LocogenError, unknown

ARRANGED = ("results",)  # parameters that a study sets itself
_PACKAGE = Path(__file__).resolve().parent
# Progress bars and advice of the libraries underneath do not belong in a saved page.
_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}
_TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float), "bool": bool}


@dataclass(frozen=True)
class Failure:
    """Why a notebook did not come to its end, and the number of the cell it stopped in, as in `[5]` beside it."""

    message: str
    cell: int | None = None


def notebook_file(name: str, base: Path) -> Path:
    """A notebook by its path from `base` (with .ipynb), or one of locogen's own by its name."""
    if name.endswith(".ipynb"):
        if not (base / name).is_file():
            raise LocogenError(f"there is no notebook {base / name}")
        return base / name
    places = (_PACKAGE / "notebooks", _PACKAGE.parent / "notebooks")  # in a wheel, in a checkout
    own = {file.stem: file for place in places for file in place.glob("*.ipynb")}
    if name not in own:
        raise unknown("notebook", name, own)
    return own[name]


def source_of(notebook: Path) -> list[tuple[str, str]]:
    """The notebook's cells, (kind, source): what it does, without outputs and metadata."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (ValueError, KeyError, TypeError):
        raise LocogenError(f"{notebook} is not a notebook: save it from JupyterLab") from None


def parameters_of(notebook: Path) -> dict[str, Any]:
    """Name → type, default and help of the notebook's parameters, without starting a kernel."""
    import papermill

    source_of(notebook)  # refuses what is not a notebook in words of ours
    found = papermill.inspect_notebook(_literal(notebook))
    if not found:
        raise LocogenError(f"{notebook} has no parameters: give the cell that holds them the tag 'parameters'")
    return found


def defaults_of(notebook: Path) -> dict[str, Any]:
    """Name → default of the notebook's parameters; one that is not plainly written down is left out."""
    found: dict[str, Any] = {}
    for name, told in parameters_of(notebook).items():
        with contextlib.suppress(ValueError, SyntaxError):
            found[name] = ast.literal_eval(told["default"])
    return found


def check_parameters(values: Mapping[str, Any], notebook: Path) -> None:
    """Raise `LocogenError` for a parameter that the notebook does not have, or a value of another type."""
    valid = parameters_of(notebook)
    for name, value in values.items():
        if name in ARRANGED:
            raise LocogenError(f"{name} is set by the study itself: leave it out")
        if name not in valid:
            listed = ", ".join(each for each in valid if each not in ARRANGED)
            raise LocogenError(f"{unknown('parameter', name, valid)} ({notebook.name} takes: {listed})")
        kind = valid[name]["inferred_type_name"]
        if kind in _TYPES and not _fits(value, kind):
            raise LocogenError(f"{name} is {value!r}: {notebook.name} takes a value of type {kind}")


def _fits(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))


def plain(value: Any) -> Any:
    """The value in plain JSON types: papermill makes strings of tuples and numpy's numbers."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy's and torch's scalars (some are floats too) and arrays
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Iterable):
        return [plain(inner) for inner in value]
    raise LocogenError(f"{value!r} is no parameter: give a text, a number, true, false or a list of these")


def execute(notebook: Path, folder: Path, parameters: Mapping[str, Any]) -> Failure | None:
    """Execute into `folder/notebook.ipynb`, in a kernel that works in `folder`; None when all went well.

    The kernel is gone when this returns or raises (Ctrl-C included).
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from traitlets.config import Config

    # Sockets in a folder of their own, for its short name: a socket's path has some 100 bytes.
    with (
        tempfile.TemporaryDirectory(prefix="loco-") as sockets,
        _silence("papermill", "asyncio", "traitlets"),
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
                progress_bar=False,
                config=Config({"KernelManager": settings}),
                kernel_manager_class=_this_interpreter(log),
                resources={"metadata": {"path": str(folder)}},
            )
        except papermill.PapermillExecutionError as error:
            named = "" if error.ename == "LocogenError" else f"{error.ename}: "
            return Failure(named + re.sub(r"\x1b\[[0-9;]*m", "", str(error.evalue)), error.exec_count)
        except DeadKernelError:
            return Failure(f"the kernel died, most often for want of memory{_last_words(log)}")
        except (RuntimeError, TimeoutError) as error:
            return Failure(f"the kernel did not start ({error}){_last_words(log)}")
    return None


def forget_place(executed: Path) -> None:
    """Take out where on this machine the notebook was executed: pages are shared."""
    if book := load_json(executed):
        told = book.get("metadata", {}).get("papermill", {})
        told.update({key: Path(told[key]).name for key in ("input_path", "output_path") if told.get(key)})
        write_json(executed, book)


def _this_interpreter(log: Path) -> type:
    """A kernel manager that starts the running interpreter, and asks no installed kernel specification.

    What the kernel's process itself has to say (not the notebook) goes to `log`.
    """
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    quiet = {name: os.environ.get(name, value) for name, value in _QUIET.items()}
    environment = {**quiet, "PYTHONPATH": _python_path()}
    spec = KernelSpec(argv=command, display_name="Python 3", language="python", env=environment)

    class ThisInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

        async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
            with log.open("ab") as written:
                await super()._async_launch_kernel(kernel_cmd, stdout=written, stderr=written, **options)

    return ThisInterpreter


@contextlib.contextmanager
def _silence(*names: str) -> Iterator[None]:
    """Keep these loggers quiet: what they have to say of a failed or interrupted run, we say ourselves."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except KeyboardInterrupt:
        gc.collect()  # the interrupted task complains when it is collected
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _last_words(log: Path) -> str:
    """The last line that the kernel's process wrote."""
    text = log.read_text(encoding="utf-8", errors="replace").strip() if log.is_file() else ""
    return f": {text.splitlines()[-1]}" if text else ""


def _python_path() -> str:
    """Where the kernel, which works in another folder, finds what this process finds, locogen above all."""
    entries = [str(Path(entry).absolute()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    home = _PACKAGE.parent
    if home.name not in ("site-packages", "dist-packages"):
        entries.append(str(home))
    return os.pathsep.join(dict.fromkeys(entries))


def _literal(path: Path) -> str:
    """The path as papermill takes it, which reads its paths as templates."""
    return str(path).replace("{", "{{").replace("}", "}}")


def publish(partial: Path, folder: Path) -> None:
    """Put the finished folder in its place: whoever looks finds the old one or the new, never half of it."""
    old = folder.with_name(f".old-{folder.name}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def alone(results: Path) -> Iterator[None]:
    """Hold the results folder for this process, and clear what a killed one has left."""
    with (results / ".lock").open("w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no such lock
            pass
        except OSError:
            raise LocogenError(f"another locogen is at work in {results}: wait for it, or stop it") from None
        for left in (*results.glob(".partial-*"), *results.glob(".old-*")):
            shutil.rmtree(left, ignore_errors=True)
        yield


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file of ours; one that is damaged counts as empty, so its run is done again."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_json(path: Path, value: Any) -> None:
    """Write the file whole or not at all; numbers that JSON does not have (infinities, NaN) become null."""
    text = json.dumps(_strict(value), indent=1, ensure_ascii=False, default=str)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    return [_strict(inner) for inner in value] if isinstance(value, list | tuple) else value
