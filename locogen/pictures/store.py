"""A folder of pictures keyed by everything that makes them; damaged files are never used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from locogen.errors import LocogenError
from locogen.files import replacing

WRITERS = 4  # threads; a card makes small pictures faster than one thread writes them


def content_key(parts: Mapping[str, Any]) -> str:
    """The name of a picture: a hash of all that makes it, the same on every machine."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def png(pixels: np.ndarray[Any, Any], **texts: str) -> bytes:
    """A picture as a PNG file, (height, width, 3) bytes; `texts` become its text chunks."""
    # Pillow tries five filters a row and compresses at length, holding Python's lock all the while,
    # so that a second thread gains nothing. Here each row is stored as its difference from the row
    # above, and runs of equal bytes are all that is searched for: seven times as fast, files of
    # about the same size, and zlib releases the lock.
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)  # (height, width x 3)
    filtered = np.empty((height, 1 + rows.shape[1]), np.uint8)  # (height, filter and bytes)
    # Filter 2, "up", of the PNG specification's section 9.2; above the first row there are zeros.
    filtered[:, 0] = 2
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # modulo 256, as the filter is defined
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    data = packer.compress(filtered.data) + packer.flush()
    # 8 bits a channel, RGB, not interlaced.
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    words = [_chunk(b"tEXt", f"{key}\0{text}".encode("latin-1")) for key, text in texts.items()]
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", header),
            *words,
            _chunk(b"IDAT", data),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def _digest(picture: Image.Image) -> str:
    return hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes()).hexdigest()


class PictureStore:
    """Pictures as 8-bit PNG files named by their key, each carrying a digest of its own pixels.

    Files are replaced atomically: after a kill at any moment a picture is there whole or not at
    all. The folder is made when something is first written, so that a store that is only read needs
    no permission to write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """The file of that key's picture, whether it exists or not."""
        return self.folder / f"{key}.png"

    def get(self, key: str) -> Image.Image | None:
        """The picture; None if it is missing, or if its pixels are not those that were written."""
        try:
            with Image.open(self.path(key)) as file:
                file.load()
                picture = file.convert("RGB")
                digest = getattr(file, "text", {}).get("digest")
        except (OSError, SyntaxError, ValueError):  # missing, cut short, or not a PNG
            return None
        return picture if digest == _digest(picture) else None

    def put(self, key: str, pixels: np.ndarray[Any, Any]) -> None:
        """Write a picture, (height, width, 3) bytes; raises as `write` does."""
        self.write(f"{key}.png", png(pixels, digest=_digest(Image.fromarray(pixels))))

    def write(self, name: str, content: bytes) -> None:
        """Replace a file of the store atomically.

        Raises:
            LocogenError: The disk is full or read-only.
        """
        # Each writer has a suffix of its own: several threads and processes write at once.
        suffix = f"{os.getpid()}-{threading.get_ident()}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / name, suffix) as partial:
                partial.write_bytes(content)
        except OSError as error:
            remedy = (
                "free some space"
                if error.errno == errno.ENOSPC
                else "give store= a folder that can, or None for a temporary one"
            )
            raise LocogenError(
                f"the store {self.folder} cannot be written ({error.strerror}): {remedy}, and call "
                "again; what it holds is kept and not made again"
            ) from None


class Record:
    """The file `run-….json` of a run: its settings, the names of its pictures, its batch size.

    It is written at once: a store that cannot be written should not cost a batch.

    Attributes:
        batch: The batch size that this run, or an earlier call of it, settled on; None: not yet.
    """

    def __init__(self, shelf: PictureStore, facts: Mapping[str, Any]) -> None:
        self.shelf = shelf
        self.facts = dict(facts)
        self.name = f"run-{content_key(facts)}.json"
        self.batch = self._earlier_batch()
        self._write()

    def _earlier_batch(self) -> int | None:
        """What an earlier call of the same run left; None if the file is missing or damaged."""
        try:
            batch = json.loads((self.shelf.folder / self.name).read_text("utf-8")).get("batch")
        except (OSError, ValueError, AttributeError):
            return None
        return batch if isinstance(batch, int) and batch > 0 else None

    def settle(self, batch: int) -> None:
        """Note the batch size, if there is none yet."""
        if self.batch is None:
            self.batch = batch
            self._write()

    def _write(self) -> None:
        content = dict(self.facts)
        if self.batch is not None:
            content["batch"] = self.batch
        self.shelf.write(self.name, json.dumps(content, indent=1, default=str).encode())


class Writer:
    """Within the context, several threads write the pictures of a batch while the next one is made.

    When it ends, even by an error, all are written. One batch at most is waiting: memory stays
    flat, and a full disk costs no more than a batch.
    """

    def __init__(self, shelf: PictureStore) -> None:
        self.shelf = shelf
        self.pool = ThreadPoolExecutor(WRITERS, "locogen-writer")
        self.writing: list[Future[None]] = []

    def __enter__(self) -> Writer:
        return self

    def put(self, batch: list[tuple[str, np.ndarray[Any, Any]]]) -> None:
        """Begin to write (key, pixels in 0..1), (height, width, 3) each; raises what went wrong."""
        self._wait()  # for the batch before
        self.writing = [self.pool.submit(self._write, key, pixels) for key, pixels in batch]

    def _write(self, key: str, pixels: np.ndarray[Any, Any]) -> None:
        self.shelf.put(key, (pixels * 255).round().astype("uint8"))

    def _wait(self) -> None:
        writing = self.writing
        self.writing = []
        # All are tried before the first error is raised: what fits the disk is kept.
        wait(writing)
        for picture in writing:
            picture.result()

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.pool.shutdown(wait=True)
        # An error on its way out is not replaced by one of the disk.
        if kind is None:
            self._wait()
