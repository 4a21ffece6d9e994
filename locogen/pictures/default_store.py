"""Where pictures are kept if nobody says where: a folder of this user's cache.

`store="auto"`, the default of `generate`, `localize`, `causal_trace`, `evaluate` and `locate`,
means this folder: a sweep that was stopped or is repeated goes on. `store=None` means a temporary
folder.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from locogen.errors import LocogenError
from locogen.files import AUTO, cache_folder

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
    """How many pictures a store holds, and how large its files are."""
    pictures = 0
    size = 0
    for file in _files(folder):
        pictures += file.suffix == ".png"
        try:
            size += file.stat().st_size
        except OSError:  # another process has just replaced it
            continue
    return StoreSize(pictures, size)


def empty(folder: Path) -> None:
    """Delete the pictures of a store and the records of its runs, and nothing else.

    Raises:
        LocogenError: A file cannot be deleted.
    """
    for file in _files(folder):
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise LocogenError(
                f"{file} cannot be deleted ({error.strerror}): change the folder's permissions"
            ) from None


# What stores write: pictures by their keys, the records of runs, and what a killed process left of
# both. Nothing else is touched: LOCOGEN_CACHE may name a folder with pictures of one's own.
_STORED = re.compile(r"\.?([0-9a-f]{32}\.png|run-[0-9a-f]{32}\.json)(\.[0-9-]+\.partial)?")


def _files(folder: Path) -> list[Path]:
    """The files of a folder that a store wrote."""
    return [file for file in folder.glob("*") if _STORED.fullmatch(file.name) and file.is_file()]


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
