"""Hashes of large files, remembered by size and times.

A plan of several large models then appears at once, not after minutes. The hashes are kept for this
user, outside of results and models, in `locogen.files.cache_folder`. Without such a place, or with
a damaged file there, everything is hashed as if for the first time.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path

from locogen.errors import LocogenError
from locogen.files import cache_folder, load_json, write_json

LARGE = 4_000_000  # bytes; hashing a smaller file takes less time than looking it up

# Nanoseconds: a file just written may be written again within one tick of the file system's clock,
# and would then have the same times as before.
SETTLED = 2 * 10**9


def digest(file: Path) -> str:
    """The SHA-256 of a file's content.

    Args:
        file: Read again only when its size, its times of change or its place on the disk differ
            from those that are remembered.

    Returns:
        The hash as hexadecimal digits.
    """
    before = _identity(file)
    if before[0] < LARGE:
        return _hashed(file)

    name = str(file.resolve())
    remembered = load_json(_memory_file()).get(name)
    if isinstance(remembered, list) and remembered[:-1] == before:
        return str(remembered[-1])

    content = _hashed(file)
    # If somebody wrote to it meanwhile, nobody knows which content was hashed.
    if _identity(file) == before and _is_settled(before):
        _remember(name, [*before, content])
    return content


def _identity(file: Path) -> list[int]:
    """Size, both times of change, and number on the disk."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _is_settled(identity: list[int]) -> bool:
    return time.time_ns() - max(identity[1], identity[2]) > SETTLED


def _hashed(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _remember(name: str, entry: list[int | str]) -> None:
    """Add a file, and forget those that are gone.

    No lock: of two processes that write at once, one's entry may be lost, and its file is then
    hashed again. The memory itself is never damaged.
    """
    memory = _memory_file()
    entries = {file: value for file, value in load_json(memory).items() if Path(file).exists()}
    with contextlib.suppress(OSError, LocogenError):  # a home that nobody can write to
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, {**entries, name: entry})


def _memory_file() -> Path:
    return cache_folder() / "hashes.json"
