"""Where pictures are kept if nobody says where: a folder of this user's cache.

`store="auto"`, the default of `generate`, `localize`, `causal_trace`, `evaluate` and `locate`,
means this folder: a sweep that was stopped or is repeated goes on. `store=None` means a temporary
folder.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from locogen.errors import LocogenError
from locogen.files import AUTO, cache_folder
from locogen.pictures.store import content_key

LARGE = 10 * 1000**3  # bytes from which a run says how large the folder has become

Place = str | Path | None  # what `store=` takes


def store_folder() -> Path:
    """The folder that keeps the pictures of runs with `store="auto"`, the default.

    It lies in this user's cache: in `LOCOGEN_CACHE` if that is set, else where the system keeps
    caches. `locogen clean` says how large it is, and empties it.

    Returns:
        The folder; it is made when the first picture is.

    Example:
        >>> store_folder().name
        'pictures'
    """
    return cache_folder() / "pictures"


def place_of(store: Place) -> Path | None:
    """The folder that `store=` means.

    Args:
        store: A folder; "auto": that of the user's cache; None: a temporary one.

    Returns:
        The folder; None stands for a temporary one, also where the cache cannot be written.
    """
    if store is None:
        return None
    return _folder_in_cache() if store == AUTO else Path(store)


def _folder_in_cache() -> Path | None:
    folder = store_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        _warn_not_writable(folder)
        return None
    if not os.access(folder, os.W_OK):
        _warn_not_writable(folder)
        return None
    return folder


@cache
def _warn_not_writable(folder: Path) -> None:
    """Once in a process: every run would say the same."""
    warnings.warn(
        f"{shortened(folder)} cannot be written, so pictures are kept in a temporary folder: give "
        "store= a folder, or set LOCOGEN_CACHE",
        stacklevel=2,
    )


def shortened(folder: Path) -> str:
    """A path for people, and for pages that are shared: the home folder is `~`."""
    try:
        return str(Path("~") / folder.relative_to(Path.home()))
    except (ValueError, RuntimeError):  # elsewhere; or a user without a home
        return str(folder)


@dataclass(frozen=True)
class StoreSize:
    """How much a folder of pictures holds."""

    pictures: int
    size: int  # bytes, records of runs included

    def __str__(self) -> str:
        noun = "picture" if self.pictures == 1 else "pictures"
        return f"{self.pictures} {noun}, {_in_words(self.size)}"


def size_of(folder: Path) -> StoreSize:
    """How many pictures a store holds, and how large its files are, by the names of its files.

    Every run that shows itself asks, and opening each file takes twice as long: `is_stored`, which
    does, is for what is deleted.
    """
    return total_of(named_as_stored(folder))


def total_of(files: Iterable[Path]) -> StoreSize:
    """The same of these files."""
    pictures = 0
    size = 0
    for file in files:
        pictures += file.suffix == ".png"
        try:
            size += file.stat().st_size
        except OSError:  # another process has just replaced it
            continue
    return StoreSize(pictures, size)


def delete(files: Iterable[Path]) -> None:
    """Delete files of a store.

    Raises:
        LocogenError: A file cannot be deleted.
    """
    for file in files:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise LocogenError(
                f"{file} cannot be deleted ({error.strerror}): change the folder's permissions"
            ) from None


# What stores write: pictures by their keys, the records of runs, and what a killed process left of
# both. Nothing else is touched: LOCOGEN_CACHE may name a folder with pictures of one's own.
_STORED = re.compile(r"[0-9a-f]{32}\.png|run-[0-9a-f]{32}\.json")
_PARTIAL = re.compile(rf"\.({_STORED.pattern})\.[0-9]+-[0-9]+\.partial")
# How a stored picture begins: a PNG's signature and its first chunk, then the digest of its pixels.
_STORED_PNG = re.compile(rb"\x89PNG\r\n\x1a\n.{25}\0\0\0\x47tEXtdigest\0[0-9a-f]{64}.*", re.DOTALL)
_BEGINNING = 128  # bytes that hold all of that


def named_as_stored(folder: Path) -> list[Path]:
    """The files of a folder whose names are such as a store gives."""
    return [
        file
        for file in folder.glob("*")
        if (_STORED.fullmatch(file.name) or _PARTIAL.fullmatch(file.name)) and file.is_file()
    ]


def is_stored(file: Path) -> bool:
    """Whether a store surely wrote a file of such a name.

    A name alone does not say it: pictures of other programs are called by 32 such digits as well.
    """
    if _PARTIAL.fullmatch(file.name):
        return True  # cut short, so that its content says nothing; nobody else calls a file so
    try:
        if file.suffix == ".png":
            with file.open("rb") as opened:
                return _STORED_PNG.fullmatch(opened.read(_BEGINNING)) is not None
        facts = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(facts, dict):
        return False
    facts.pop("batch", None)  # it was settled when the file had its name already
    return file.name == f"run-{content_key(facts)}.json"


def _in_words(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


@cache
def warn_if_large(folder: Path) -> None:
    """Say once in a process that the user's cache has become large."""
    size = size_of(folder)
    if size.size > LARGE:
        warnings.warn(
            f"{shortened(folder)} holds {size}: `locogen clean` empties it, and store= keeps "
            "pictures elsewhere",
            stacklevel=2,
        )
