"""Files and folders that are there whole or not at all, after a kill at any moment."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locogen.errors import LocogenError


def publish(partial: Path, folder: Path) -> None:
    """Put the finished folder in its place: whoever looks finds the old one or the new, never half of it.

    A kill between the two steps leaves the old one under its other name, and `alone` puts it back. Raises
    `LocogenError` where what is there is none of our runs.
    """
    check_place(folder)
    old = folder.with_name(f".old-{folder.name}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def check_place(folder: Path) -> None:
    """Raise `LocogenError` where a run's folder would take the place of something that no run has made."""
    if not os.path.lexists(folder) or any((folder / name).is_file() for name in ("result.json", "error.json")):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise LocogenError(
            f"{folder} is there and no run of locogen's (it holds neither result.json nor error.json): "
            'move it, give the run another name, or the study another folder with results = "…"'
        )


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
        for old in results.glob(".old-*"):
            if not (folder := results / old.name.removeprefix(".old-")).exists():
                os.replace(old, folder)
        clear(results)
        yield


def clear(results: Path) -> None:
    """Take away every half-made folder, and with it the right to live of a kernel that still works in it."""
    for left in (*results.glob(".partial-*"), *results.glob(".old-*"), *results.glob(".gone-*")):
        gone = left.with_name(f".gone-{left.name.lstrip('.')}")
        with contextlib.suppress(OSError):
            os.replace(left, gone)  # in one step: a kernel that still writes cannot keep the folder alive
        shutil.rmtree(gone, ignore_errors=True)


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file of ours; one that is damaged counts as empty, so its run is done again."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


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
