"""Loading: a folder is enough, parts have one dtype, what is missing is named with its remedy."""

import pytest
import tiny
import torch

from locogen import models
from locogen.catalog import model_entry
from locogen.errors import LocogenError, UnsupportedModel
from locogen.models import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline saved as somebody's folder, its parts in different precision."""
    place = tmp_path_factory.mktemp("model")
    pipe = tiny.pipeline()
    pipe.text_encoder.half()
    pipe.save_pretrained(place)
    return place


def test_a_folder_loads_in_one_precision(folder):
    pipe = load(folder)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert {pipe.text_encoder.dtype, pipe.unet.dtype, pipe.vae.dtype} == {torch.float32}
    assert load(folder, dtype="bfloat16").unet.dtype == torch.bfloat16


def test_what_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(LocogenError, match=r"openjourn.*did you mean 'openjourney'"):
        load("openjourni")
    with pytest.raises(LocogenError, match=r"hf download nobody/nothing"):
        load("nobody/nothing", local_files_only=True)
    with pytest.raises(LocogenError, match=r"model_index\.json"):
        load(tmp_path)
    with pytest.raises(LocogenError, match="there is no folder"):
        load("runs/not/there")
    with pytest.raises(LocogenError, match="'cpu', 'cuda' or 'mps'"):
        load(folder, device="abacus")
    with pytest.raises(LocogenError, match="'float32'"):
        load(folder, dtype="float8")


def test_a_model_that_left_the_hub_is_taken_from_its_mirror(monkeypatch):
    """In turn; the revision is the original's, so that a mirror is taken as it is."""
    kept, asked = {"kept/mirror"}, []

    def fetch(source, revision, dtype, local_files_only):
        asked.append((source, revision))
        if source not in kept:
            raise OSError("404")
        return tiny.pipeline()

    monkeypatch.setattr(models, "_fetch", fetch)
    monkeypatch.setattr(models, "_sources", lambda name: (["gone/model", "gone/mirror", "kept/mirror"], "1a2b"))
    assert type(load("sd-1.5")).__name__ == "StableDiffusionPipeline"
    assert asked == [("gone/model", "1a2b"), ("gone/mirror", "main"), ("kept/mirror", "main")]
    kept.clear()
    with pytest.raises(LocogenError, match=r"'sd-1\.5' is not to be had.*hf download gone/model --revision 1a2b"):
        load("sd-1.5")
    monkeypatch.undo()
    assert models._sources("sd-1.5")[0][1:] == list(model_entry("sd-1.5").mirrors) != []


def test_unsupported_families_are_named():
    with pytest.raises(UnsupportedModel, match="StableDiffusionXLPipeline"):
        load("sd-xl")
