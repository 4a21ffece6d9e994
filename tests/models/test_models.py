"""Loading: a folder is enough, parts have one dtype, what is missing is named with its remedy."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny

from locogen.catalog import model_entries, model_entry, model_table, usual_settings
from locogen.errors import LocogenError, UnsupportedModel
from locogen.models import load as models
from locogen.models.checkpoint import count_layers
from locogen.models.families import encode
from locogen.models.layers import find_layers
from locogen.models.load import load
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import generate
from locogen.plan import Intervention


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


@pytest.mark.parametrize(
    "what", ["nothing", "pickled weights", "a pipeline of its own", "a part of its own"]
)
def test_neither_pickled_weights_nor_code_are_taken_from_a_folder(folder, tmp_path, what):
    """Somebody's folder is data: what it brings to be unpickled or run is refused and stays unread."""
    place = Path(shutil.copytree(folder, tmp_path / "model"))
    weights, index = (
        place / "unet" / "diffusion_pytorch_model.safetensors",
        place / "model_index.json",
    )
    told = json.loads(index.read_text())
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
    code += "from diffusers import StableDiffusionPipeline as Own, UNet2DConditionModel as Part\n"
    if what == "pickled weights":
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    elif what == "a pipeline of its own":
        (place / "own.py").write_text(code)
        told["_class_name"] = ["own", "Own"]
    elif what == "a part of its own":
        (place / "unet" / "own.py").write_text(code)
        told["unet"] = ["own", "Part"]
    index.write_text(json.dumps(told))
    if what == "nothing":  # the twin: a copy as it is loads
        assert type(load(place)).__name__ == "StableDiffusionPipeline"
    else:
        said = (
            "pickled weights are refused"
            if what == "pickled weights"
            else "locogen does not run such code"
        )
        with pytest.raises(LocogenError, match=said):
            load(place)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_left_the_hub_is_taken_from_its_mirror(monkeypatch):
    """In turn, first on this machine; the revision is the original's, and a mirror is taken as it is."""
    kept, asked = {("kept/mirror", False)}, []

    def fetch(source, revision, dtype, local_files_only):
        asked.append((source, revision, local_files_only))
        if (source, local_files_only) not in kept:
            raise OSError("404")
        return tiny.pipeline()

    sources = models._Sources(("gone/model", "gone/mirror", "kept/mirror"), "1a2b")
    monkeypatch.setattr(models, "_fetch", fetch)
    monkeypatch.setattr(models, "_sources_of", lambda name, file: sources)
    assert type(load("sd-1.5")).__name__ == "StableDiffusionPipeline"
    turns = [("gone/model", "1a2b"), ("gone/mirror", "main"), ("kept/mirror", "main")]
    assert asked == [(*turn, local) for local in (True, False) for turn in turns]
    kept.add(("gone/mirror", True))  # a mirror that is here already: no network is touched
    asked.clear()
    load("sd-1.5")
    assert asked == [(*turn, True) for turn in turns[:2]]
    kept.clear()
    with pytest.raises(
        LocogenError, match=r"'sd-1\.5'.*gone from the hub.*hf download gone/mirror$"
    ):
        load("sd-1.5")
    asked.clear()
    with pytest.raises(LocogenError):
        load("sd-1.5", local_files_only=True)
    assert {local for *_, local in asked} == {True}
    monkeypatch.undo()
    assert models._sources_of("sd-1.5", None).places[1:] == model_entry("sd-1.5").mirrors != ()


def test_a_gated_model_names_the_page_of_its_terms():
    page = (
        r"gated: accept its terms on https://huggingface\.co/black-forest-labs/FLUX\.1-dev, log in"
    )
    with pytest.raises(LocogenError, match=page):
        load("flux-dev", local_files_only=True)


@pytest.mark.parametrize("name", tiny.fast(*tiny.FAST))
def test_every_family_loads_from_a_folder(name, tmp_path):
    """Saved, loaded by its folder, and by an entry of one's own; the same pictures' text either way."""
    pipe = tiny.FAMILIES[name]()
    pipe.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert type(again) is type(pipe)
    assert count_layers(tmp_path / "model") == len(find_layers(pipe)), "by names of weights alone"
    own = tmp_path / "own.toml"
    family = type(pipe).__name__
    text = f'[models.mine]\nid = {str(tmp_path / "model")!r}\nfamily = "{family}"\nwindow = 3\nguidance_scale = 1.5\n'
    own.write_text(text)
    mine = load("mine", file=own)
    wanted, found = encode(pipe, ["cat"]), encode(tiny.like(mine, pipe), ["cat"])
    assert torch.equal(wanted.states, found.states)
    assert usual_settings(mine.config._name_or_path) == {
        "window": 3,
        "num_inference_steps": 50,
        "guidance_scale": 1.5,
    }
    assert "mine" in set(model_table(own)["name"]) - set(model_table()["name"])
    own.write_text(text.replace(str(tmp_path / "model"), "model"))
    assert usual_settings(load("mine", file=own).config._name_or_path)["window"] == 3, (
        "a folder may start where its file is"
    )


def test_layers_cannot_be_counted_where_nothing_is(tmp_path):
    assert count_layers(tmp_path) is None
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"{")
    assert count_layers(tmp_path) is None


def test_a_part_of_a_pipeline_says_what_to_load(tmp_path):
    """`load("model.safetensors")` of what is not there, of a part alone, and within its pipeline."""
    with pytest.raises(LocogenError, match=re.escape(str(Path("nowhere.safetensors").absolute()))):
        load("nowhere.safetensors")
    part = tmp_path / "vae" / "model.safetensors"
    part.parent.mkdir()
    save_file({"x": torch.zeros(1)}, part)
    with pytest.raises(LocogenError, match="a LoRA, a VAE or an embedding"):
        load(part)
    (part.parent / "config.json").write_text("{}")
    with pytest.raises(LocogenError, match="one of its parts: load the folder of the whole"):
        load(part)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(LocogenError, match=re.escape(f"load({str(tmp_path)!r})")):
        load(part)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no models"),
        ('[models.a]\nid = "x/y"', "family is missing"),
        ('[models.a]\nid = "x/y"\nfamily = "F"\nwindwo = 3', "windwo.*did you mean 'window'"),
        ('[models.mini]\nid = "x/y"\nfamily = "F"', "another name"),
        ('[models.a]\nid = "x/y"\nfamily = "F"', "a is a F: supported are"),
    ],
)
def test_an_entry_that_is_not_in_order_is_told(tmp_path, text, words):
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(LocogenError, match=words):
        load("a", file=tmp_path / "own.toml")


def test_the_catalog_knows_checkpoints_of_every_family():
    from locogen.models.families import FAMILIES

    known = {entry.family for entry in model_entries()}
    assert known == set(FAMILIES)
    with pytest.raises(UnsupportedModel, match="StableDiffusionXLPipeline"):
        find_layers(torch.nn.Linear(1, 1))


def test_offload_needs_a_device_and_says_so(folder):
    with pytest.raises(LocogenError, match="'model', 'sequential', or None"):
        load(folder, offload="disk")
    if not torch.cuda.is_available():
        with pytest.raises(LocogenError, match="'cuda' is not available"):
            load(folder, offload="model")


def test_a_model_whose_weights_are_kept_off_the_device_makes_the_same_pictures(tmp_path):
    """As sequential offload does: weights wait elsewhere, layer by layer; here the device is the CPU as well."""
    from accelerate import cpu_offload

    for name in ("sd", "if", "pixart-alpha", "sd-3"):
        plain, kept = tiny.FAMILIES[name](), tiny.FAMILIES[name]()
        for part in kept.components.values():
            if isinstance(part, torch.nn.Module):
                cpu_offload(part, torch.device("cpu"))
        plan = [Intervention("cat in a", "dog", (0, 1), seed) for seed in (0, 1)]
        options = {
            "num_inference_steps": 2,
            "guidance_scale": 3.0,
            "batch_size": 4,
            "progress": False,
        }
        assert next(
            kept.unet.parameters() if name in ("sd", "if") else kept.transformer.parameters()
        ).is_meta
        assert fingerprint(plain) == fingerprint(kept)
        one = generate(plain, plan, store=tmp_path / "one", **options)
        other = generate(kept, plan, store=tmp_path / "other", **options)
        for a, b in zip(one.pictures, other.pictures, strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))
