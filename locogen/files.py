"""Files and folders that are there whole or not at all, after a kill at any moment."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from locogen.errors import LocogenError

# How our text is read: editors on Windows put a byte-order mark before it.
ENCODING = "utf-8-sig"

# What a system error means for the person who reads it, and what helps.
_REMEDIES = {
    errno.ENOSPC: "the disk is full. Free some space there",
    errno.EDQUOT: "your quota of that disk is used up. Free some space there",
    errno.EROFS: "it is on a read-only file system. Copy it to a place that can be written",
    errno.EACCES: "you may not write there. Change the folder's permissions (chmod u+w)",
    errno.EPERM: "you may not write there. Change the folder's permissions (chmod u+w)",
}


class CannotWrite(LocogenError):
    """A folder in which no file can be written: full, read-only, or owned by somebody else."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Explain where and why nothing can be written, if that happens in the block.

    Args:
        folder: Where files are written, for the message.

    Raises:
        CannotWrite: The disk is full, or it is not permitted to write there. Other errors pass
            unchanged.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        file = f" ({error.filename})" if error.filename else ""
        raise CannotWrite(
            f"cannot write into {folder}{file}: {remedy}, "
            'or choose another folder (results = "…" in the study\'s file)'
        ) from error


@contextlib.contextmanager
def replacing(path: Path, suffix: str = "part") -> Iterator[Path]:
    """Write a file whole or not at all: it appears under its name when the block has ended well.

    Args:
        path: The file. A link of that name is replaced by the file, and never followed.
        suffix: Of the file's name until then. Give different ones to writers who may write the same
            file at the same time.

    Returns:
        The path that the block writes to: in the same folder, since only a rename within one file
        system is a single step.
    """
    part = path.with_name(f".{path.name}.{suffix}")
    # A killed process may have left one. It could also be a link, which writing would follow.
    part.unlink(missing_ok=True)
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and never through a link to another place.

    Args:
        path: The file. A link of that name is replaced by the file.
        content: All of it.

    Raises:
        CannotWrite: The folder is full or may not be written.
    """
    # "x": if somebody puts a link there after all, this fails and does not follow it.
    with writing(path.parent), replacing(path) as part, part.open("xb") as stream:
        stream.write(content)


AUTO = "auto"  # as the place of pictures: a folder of the user's cache


def cache_folder() -> Path:
    """Where this user's cache of locogen is: hashes of weights, and pictures of runs.

    `LOCOGEN_CACHE` if that is set; else `locogen` in the folder that the system has for caches; for
    a user without a home, in that for temporary files.
    """
    from platformdirs import user_cache_path

    folder = os.environ.get("LOCOGEN_CACHE")
    if folder:
        # Not every place that sets variables expands "~", and a relative one would move with us.
        return Path(folder).expanduser().absolute()
    place = user_cache_path("locogen", appauthor=False)
    # Without a home "~" stays as it is, and would be a folder of that name right here.
    return place if place.is_absolute() else Path(tempfile.gettempdir(), "locogen")


# --- folders of runs -----------------------------------------------------------------------------


def data_uri(content: bytes, mime: str = "image/png") -> str:
    """An address that holds the file itself, for pictures inside of HTML."""
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def publish(partial: Path, folder: Path) -> None:
    """Put a finished folder in its place: a reader sees the old one or the new one, never a half.

    Raises `LocogenError` where the place is taken by something that is not a run.
    """
    check_place(folder)
    # A folder cannot replace another in one step. After a kill between these two, the old one is
    # left under its other name, and `locked` puts it back.
    old = folder.with_name(f".old-{folder.name}")
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def check_place(folder: Path) -> None:
    """Raise `LocogenError` if a run's folder would replace something that is not a run."""
    if not os.path.lexists(folder):
        return
    if any((folder / name).is_file() for name in ("result.json", "error.json")):
        return
    # An empty folder holds nothing that could be lost.
    if not folder.is_dir() or any(folder.iterdir()):
        raise LocogenError(
            f"{folder} exists and is not a run of locogen "
            "(it holds neither result.json nor error.json): move it, give the run another name, "
            'or the study another folder with results = "…"'
        )


@contextlib.contextmanager
def locked(results: Path) -> Iterator[None]:
    """Hold the results folder for this process, and remove what a killed process has left.

    The operating system releases the lock when its process ends, whatever ended it.
    """
    from filelock import FileLock, Timeout

    # Not `with lock`: an error of the block itself would then look as if the lock had failed.
    lock = FileLock(results / ".lock")
    try:
        with writing(results):
            lock.acquire(blocking=False)
    except Timeout:
        raise LocogenError(
            f"another locogen is working in {results}: wait for it, or stop it"
        ) from None
    try:
        _restore_old_folders(results)
        remove_leftovers(results)
        yield
    finally:
        lock.release()


def _restore_old_folders(results: Path) -> None:
    """Put back the runs whose process was killed in the middle of `publish`."""
    for old in results.glob(".old-*"):
        folder = results / old.name.removeprefix(".old-")
        if not folder.exists():
            os.replace(old, folder)


def remove_leftovers(results: Path) -> None:
    """Delete unfinished run folders. A kernel that still works in one notices, and stops."""
    for pattern in (".gone-*", ".partial-*", ".old-*"):
        for folder in list(results.glob(pattern)):
            # Renamed first, in one step: files that a kernel writes meanwhile could otherwise keep
            # the folder from being deleted, and so the kernel alive.
            gone = folder.with_name(f".gone-{folder.name.lstrip('.')}")
            with contextlib.suppress(OSError):
                os.replace(folder, gone)
            shutil.rmtree(gone, ignore_errors=True)


# --- JSON ----------------------------------------------------------------------------------------


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of ours; a damaged or missing one is empty, so that its run is repeated."""
    try:
        content = json.loads(path.read_text(encoding=ENCODING))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all; infinities and NaN, which JSON lacks, become null."""
    text = json.dumps(_without_infinities(value), indent=1, ensure_ascii=False, default=str)
    # Half of a surrogate pair, which JSON can hold, cannot be written as text.
    write_whole(path, (text + "\n").encode("utf-8", errors="replace"))


def _without_infinities(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_infinities(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(inner) for inner in value]
    return value


# --- TOML ----------------------------------------------------------------------------------------


def toml_lines(values: Mapping[str, Any]) -> list[str]:
    """One line of TOML for each value; TOML has no null: what is None is left out."""
    return [f"{key} = {toml_text(value)}" for key, value in values.items() if value is not None]


def toml_text(value: Any) -> str:
    """A plain value as TOML, which is written like JSON but for tables and one character."""
    if isinstance(value, Mapping):
        pairs = [f"{json.dumps(str(key))} = {toml_text(inner)}" for key, inner in value.items()]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_text(inner) for inner in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # "nan", "inf" or "-inf": JSON's words for them are none of TOML's
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007F")
