"""The picture store: atomic, checked, and honest about what makes a picture."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from hypothesis import given, strategies as st

from locogen.pictures.store import PictureStore, content_key

PIXELS = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def test_what_goes_in_comes_out(tmp_path):
    store = PictureStore(tmp_path)
    assert store.get("a") is None
    store.put("a", PIXELS)
    assert np.array_equal(np.asarray(store.get("a")), PIXELS)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=4))
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
