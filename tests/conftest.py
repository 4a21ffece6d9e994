"""What every test shares: nothing leaves the machine, nothing opens a window, two threads."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Set before anything imports torch, diffusers or matplotlib, and inherited by the processes that tests start.
# Torch takes its number of threads from here, when it comes. pytest-xdist's workers inherit what their parent has set,
# and two threads each on two cores wait for each other: ten times slower.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["JUPYTER_PLATFORM_DIRS"] = "1"
if "LOCOGEN_CACHE" not in os.environ:  # hashes of one session, its workers included
    os.environ["LOCOGEN_CACHE"] = tempfile.mkdtemp(prefix="loco-cache-")
    atexit.register(shutil.rmtree, os.environ["LOCOGEN_CACHE"], ignore_errors=True)

# What is imported stays to the end: nothing is looked for among its millions of objects, now or later.
gc.disable()

settings.register_profile("locogen", deadline=None, derandomize=True)  # a test fails today or never
settings.load_profile("locogen")


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def no_default_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test does not keep on purpose is made anew: a picture of another call would hide a difference.

    Nothing reaches the user's own cache either way: `LOCOGEN_CACHE` is set above.
    """
    monkeypatch.setattr("locogen.pictures.default_store._folder_in_cache", lambda: None)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def close_figures():
    """No figure outlives its test."""
    yield
    if (pyplot := sys.modules.get("matplotlib.pyplot")) is not None:
        pyplot.close("all")


@pytest.fixture
def one_noise(monkeypatch):
    """Let a seed be one noise in every precision: torch 2.6 draws other numbers in half precision."""
    import torch

    randn = torch.randn

    def drawn(*shape, dtype=None, **options):
        return randn(*shape, dtype=torch.float32, **options).to(dtype)

    monkeypatch.setattr(torch, "randn", drawn)
