"""The picture store: atomic, checked, and honest about what makes a picture."""

import io
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given, strategies as st
from PIL import Image

from locogen.errors import LocogenError
from locogen.pictures.store import PictureStore, Writer, content_key, png

PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def test_what_goes_in_comes_out(tmp_path):
    store = PictureStore(tmp_path)
    assert store.get("a") is None
    store.put("a", PIXELS)
    assert np.array_equal(np.asarray(store.get("a")), PIXELS)


@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([1, 8, 256])
)
def test_a_png_file_holds_the_pixels_and_the_words(height, width, seed, colors):
    """Read back by Pillow, which did not write it; noise, few colors, and one color."""
    pixels = np.random.default_rng(seed).integers(0, colors, (height, width, 3)).astype(np.uint8)
    with Image.open(io.BytesIO(png(pixels, digest="1a2b"))) as file:
        file.load()
        assert file.mode == "RGB" and file.text == {"digest": "1a2b"}
        assert np.array_equal(np.asarray(file), pixels)


def test_a_png_file_is_written_faster_than_pillow_writes_it_and_is_no_larger():
    smooth = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    ).resize((384, 384))
    noise = np.random.default_rng(1).normal(0, 4, (384, 384, 3))
    pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)

    def by_pillow():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        return buffer.getvalue()

    def seconds(write):
        times = []
        for _ in range(3):
            start = (
                time.thread_time()
            )  # the processor's time of this thread: other work does not count
            write()
            times.append(time.thread_time() - start)
        return min(times)

    assert seconds(lambda: png(pixels)) < seconds(by_pillow) / 2
    assert len(png(pixels)) < 1.2 * len(by_pillow())


class Meeting(PictureStore):
    """Each picture waits for another one to be written beside it."""

    def put(self, key, pixels):
        self.barrier.wait(timeout=5)
        super().put(key, pixels)


def test_pictures_of_a_batch_are_written_side_by_side(tmp_path):
    """One thread alone would wait for ever."""
    store = Meeting(tmp_path)
    store.barrier = threading.Barrier(2)
    with Writer(store) as writer:
        writer.put([(f"{i}", np.full((2, 2, 3), i / 255)) for i in range(6)])
    assert [int(np.asarray(store.get(f"{i}")).max()) for i in range(6)] == list(range(6))


def test_a_picture_that_cannot_be_written_costs_no_other(tmp_path, monkeypatch):
    write = PictureStore.write

    def refuse(self, name, content):
        if name == "1.png":
            raise LocogenError("no room")
        write(self, name, content)

    monkeypatch.setattr(PictureStore, "write", refuse)
    with pytest.raises(LocogenError, match="no room"), Writer(PictureStore(tmp_path)) as writer:
        writer.put([(f"{i}", np.zeros((2, 2, 3))) for i in range(4)])
    assert {path.name for path in tmp_path.glob("*.png")} == {"0.png", "2.png", "3.png"}


@given(
    st.dictionaries(
        st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=4
    )
)
def test_keys_depend_on_content_alone(parts):
    assert content_key(parts) == content_key(dict(reversed(parts.items())))
    assert content_key(parts) != content_key({**parts, "another": 1})


class Careless(PictureStore):
    """Writes under the final name, piece by piece."""

    def write(self, name, content):
        self.folder.mkdir(exist_ok=True)
        with (self.folder / name).open("wb", buffering=0) as file:
            file.write(content[: len(content) // 2])
            time.sleep(0.005)
            file.write(content[len(content) // 2 :])


def _write_for_ever(store):
    number = 0
    while True:
        store.put(f"{number}", PIXELS)
        number += 1


def killed(store, seconds):
    """For each file that a writer killed after its first one has left under its name: whether it is whole."""
    process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(store,))
    process.start()
    while not list(store.folder.glob("[0-9]*.png")):
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return [store.get(path.stem) is not None for path in store.folder.glob("[0-9]*.png")]


@pytest.mark.slow
def test_a_kill_leaves_no_half_picture(tmp_path):
    """Killed at 30 moments: every file that stands under its name is whole."""
    for trial in range(30):
        left = killed(PictureStore(tmp_path / str(trial)), trial * 0.003)
        assert left and all(left)


@pytest.mark.slow
def test_a_kill_of_a_careless_writer_is_noticed(tmp_path):
    """The twin of the test above."""
    left = [killed(Careless(tmp_path / str(trial)), trial * 0.003) for trial in range(30)]
    assert not all(whole for files in left for whole in files)
