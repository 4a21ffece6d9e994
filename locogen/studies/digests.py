"""Hashes of large files, remembered by size and times: a plan of several models is shown at once, not after minutes.

They are kept for this user, outside of results and models: in `LOCOGEN_CACHE`, or else `XDG_CACHE_HOME/locogen`, or
`~/.cache/locogen`. Without such a place, or with a damaged file there, everything is hashed as if for the first time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

from locogen.errors import LocogenError
from locogen.files import load_json, write_json

LARGE = 4_000_000  # bytes; a smaller file is hashed sooner than looked up
SETTLED = (
    2 * 10**9
)  # nanoseconds: a file just written may be written again within one tick of its clock


def digest(file: Path) -> str:
    """The SHA-256 of a file's content.

    Args:
        file: Read again only when its size, times of change or place on the disk are others than before.

    Returns:
        The hash as hexadecimal digits.
    """
    before = _identity(file)
    if before[0] < LARGE:
        return _hashed(file)
    name = str(file.resolve())
    remembered = load_json(_place()).get(name)
    if isinstance(remembered, list) and remembered[:-1] == before:
        return str(remembered[-1])
    content = _hashed(file)
    if _identity(file) == before and _is_settled(before):
        _remember(name, [*before, content])
    return content


def _identity(file: Path) -> list[int]:
    """Size, both times of change, and number on the disk."""
    about = file.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _is_settled(identity: list[int]) -> bool:
    return time.time_ns() - max(identity[1], identity[2]) > SETTLED


def _hashed(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remember(name: str, entry: list[int | str]) -> None:
    """Add one, and forget the files that are gone; two processes at once may lose one, never damage any."""
    place = _place()
    entries = {file: value for file, value in load_json(place).items() if Path(file).exists()}
    with contextlib.suppress(OSError, LocogenError):  # a home that takes no files
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, {**entries, name: entry})


def _place() -> Path:
    own = os.environ.get("LOCOGEN_CACHE")
    if own:
        return Path(own, "hashes.json")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return caches.expanduser() / "locogen" / "hashes.json"
    except RuntimeError:  # a user of a container who has no home
        return Path(tempfile.gettempdir(), "locogen-hashes.json")
