"""Files and folders that are there whole or not at all, after a kill at any moment."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locogen.errors import LocogenError

# How text of ours is read: editors on Windows put a byte-order mark before it.
ENCODING = "utf-8-sig"

_NO_ROOM = {
    errno.ENOSPC: "the disk is full. Free some space there",
    errno.EDQUOT: "your quota of that disk is used up. Free some space there",
    errno.EROFS: "it is on a read-only file system. Copy it to a place that can be written",
    errno.EACCES: "you may not write there. Change the folder's permissions (chmod u+w)",
    errno.EPERM: "you may not write there. Change the folder's permissions (chmod u+w)",
}


class CannotWrite(LocogenError):
    """A folder that takes no files: full, read-only or somebody else's."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say where it was and what helps, when a folder takes no files.

    Args:
        folder: Where files are written, for the message.

    Raises:
        CannotWrite: The disk is full, or nobody may write there. Any other error passes by as it is.
    """
    try:
        yield
    except OSError as error:
        reason = _NO_ROOM.get(error.errno or 0)
        if reason is None:
            raise
        file = f" ({error.filename})" if error.filename else ""
        raise CannotWrite(
            f'cannot write into {folder}{file}: {reason}, or choose another folder (results = "…" in the study\'s file)'
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and never through a link to somewhere else.

    Args:
        path: The file. A link of that name is replaced by the file.
        content: All of it.

    Raises:
        CannotWrite: The folder takes no files.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path.parent):
        part.unlink(missing_ok=True)  # of a killed process; or a link, which writing would follow
        with part.open("xb") as stream:
            stream.write(content)
        os.replace(part, path)


def data_uri(content: bytes, mime: str = "image/png") -> str:
    """An address that holds the file itself, for pictures inside of HTML."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


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
    if not os.path.lexists(folder) or any(
        (folder / name).is_file() for name in ("result.json", "error.json")
    ):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise LocogenError(
            f"{folder} is there and no run of locogen's (it holds neither result.json nor error.json): "
            'move it, give the run another name, or the study another folder with results = "…"'
        )


@contextlib.contextmanager
def alone(results: Path) -> Iterator[None]:
    """Hold the results folder for this process, and clear what a killed one has left."""
    with writing(results):
        lock = (results / ".lock").open("a")  # a link of that name empties nothing
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no such lock
            pass
        except OSError:
            raise LocogenError(
                f"another locogen is at work in {results}: wait for it, or stop it"
            ) from None
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
            os.replace(
                left, gone
            )  # in one step: a kernel that still writes cannot keep the folder alive
        shutil.rmtree(gone, ignore_errors=True)


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file of ours; one that is damaged counts as empty, so its run is done again."""
    try:
        content = json.loads(path.read_text(encoding=ENCODING))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write the file whole or not at all; numbers that JSON does not have (infinities, NaN) become null."""
    text = json.dumps(_strict(value), indent=1, ensure_ascii=False, default=str)
    # A lone half of a surrogate pair, as JSON can have it, is no text that can be written.
    write_whole(path, (text + "\n").encode("utf-8", errors="replace"))


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(inner) for key, inner in value.items()}
    return [_strict(inner) for inner in value] if isinstance(value, list | tuple) else value
