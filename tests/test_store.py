"""The picture store: atomic, checked, and honest about what makes a picture."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locogen.store import PictureStore, content_key

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


def _write_for_ever(folder):
    store, number = PictureStore(folder), 0
    while True:
        store.put(f"{number}", PIXELS)
        number += 1


@pytest.mark.slow
def test_a_kill_leaves_no_half_picture(tmp_path):
    """Killed at 30 moments: every file that stands under its name is whole."""
    context = multiprocessing.get_context("fork")
    for trial in range(30):
        folder = tmp_path / str(trial)
        process = context.Process(target=_write_for_ever, args=(folder,))
        process.start()
        while not list(folder.glob("[0-9]*.png")):
            time.sleep(0.01)
        time.sleep(trial * 0.003)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        store = PictureStore(folder)
        names = [path.stem for path in folder.glob("*.png") if not path.name.startswith(".")]
        assert names
        assert all(store.get(name) is not None for name in names)
