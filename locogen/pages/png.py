"""PNG files, read with care: size from the first bytes, and the same picture in fewer bytes."""

from __future__ import annotations

import base64
import io

# A file of a few kilobytes may claim more pixels than fit into memory ("decompression bomb").
MOST_PIXELS = 50_000_000


def size_of(png: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the first 24 bytes of a PNG; zeros for anything else."""
    # Signature (8 bytes), then the chunk IHDR: length, name, width, height (4 bytes each).
    if png[:4] != b"\x89PNG":
        return 0, 0
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def check_size(png: bytes) -> None:
    """Raise `ValueError` for a PNG that would take too much memory; its first 24 bytes suffice."""
    width, height = size_of(png)
    if width * height > MOST_PIXELS:
        raise ValueError(f"a picture of {width} × {height} pixels is too large to be opened")


def shrink(data: str) -> str:
    """A base64 PNG in fewer bytes, without loss: no unused alpha, a palette for few colors.

    Args:
        data: The PNG, in base64.

    Returns:
        It, or a smaller one that looks the same.

    Raises:
        ValueError: It is not base64, or too large a picture; if it is not a PNG, Pillow's error.
    """
    from PIL import Image

    original = base64.b64decode(data)
    check_size(original)
    image = Image.open(io.BytesIO(original), formats=["PNG"])
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert("RGB")
    # `getcolors` returns None for more than 256 colors.
    if image.mode == "RGB" and image.getcolors(256) is not None:
        image = image.quantize(256)
    smaller = io.BytesIO()
    image.save(smaller, "PNG")
    best = min(original, smaller.getvalue(), key=len)
    return base64.b64encode(best).decode()
