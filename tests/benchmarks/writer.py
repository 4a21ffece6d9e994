"""How many pictures a second are written: Pillow on one thread, as it was, and `store.Writer`.

python tests/benchmarks/writer.py
"""

import io
import tempfile
import time

import numpy as np
from PIL import Image

from locogen.pictures.store import PictureStore, Writer

COUNT = 16


def picture(side: int, seed: int) -> np.ndarray:
    """Something between a photograph and noise, in 0..1."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (side // 16, side // 16, 3), np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    return np.clip(smooth / 255 + draw.normal(0, 0.015, smooth.shape), 0, 1)  # (side, side, 3)


def by_pillow(pictures: list[np.ndarray]) -> None:
    for pixels in pictures:
        Image.fromarray((pixels * 255).round().astype("uint8")).save(io.BytesIO(), "png")


def by_writer(pictures: list[np.ndarray]) -> None:
    with tempfile.TemporaryDirectory() as folder, Writer(PictureStore(folder)) as writer:
        writer.put([(f"{place}", pixels) for place, pixels in enumerate(pictures)])


if __name__ == "__main__":
    for side in (512, 768, 1024):
        pictures = [picture(side, seed) for seed in range(COUNT)]
        rates = []
        for write in (by_pillow, by_writer):
            start = (
                time.process_time()
            )  # of all threads together: other work on the machine does not count
            write(pictures)
            rates.append(COUNT / (time.process_time() - start))
        print(
            f"{side} x {side}: pictures/s of one processor: {rates[0]:.0f} by Pillow, {rates[1]:.0f} by the writer"
        )
