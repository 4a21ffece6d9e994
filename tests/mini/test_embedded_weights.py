"""The shipped weights: small, quick to load, with the layers of Stable Diffusion 1, and they know their world."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

import locogen as loco
from locogen.catalog import mini_folder
from locogen.mini import world


@pytest.fixture(scope="module")
def pipe():
    return loco.load("mini")


def test_they_fit_the_package():
    files = [path for path in mini_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_the_second_model_is_a_u_net_of_another_seed_and_shares_the_rest(pipe):
    files = [path for path in mini_folder("mini-b").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    other = loco.load("mini-b")
    assert Path(other.config._name_or_path) == mini_folder("mini-b")
    for part, same in (("unet", False), ("vae", True), ("text_encoder", True)):
        one, two = (getattr(p, part).state_dict() for p in (pipe, other))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one) == same
    prompts = [world.prompt(thing, "neon") for thing in ("cat", "castle")]
    run = loco.generate(other, prompts, seeds=(0, 1), num_inference_steps=8)
    right, wrong = loco.scorer("mini")(
        run.pictures, *([world.prompt(t, "neon")] * 4 for t in ("cat", "castle"))
    )
    assert (right[:2] > wrong[:2]).all()
    assert (right[2:] < wrong[2:]).all()


def test_they_load_quickly(pipe):
    start = time.perf_counter()
    loco.load("mini")
    assert time.perf_counter() - start < 3


def test_a_plain_pipeline_with_the_layers_of_stable_diffusion_1(pipe):
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    names = [layer.name for layer in loco.find_layers(pipe)]
    assert len(names) == 16
    assert names[8] == "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    assert Path(pipe.config._name_or_path) == mini_folder()


def test_prompt_and_seed_both_show(pipe):
    run = loco.generate(
        pipe, [world.prompt("cat"), world.prompt("castle")], seeds=(0, 1), num_inference_steps=8
    )
    one, other_seed, other_prompt, _ = (np.asarray(picture, float) for picture in run.pictures)
    assert np.abs(one - other_seed).mean() > 3
    assert np.abs(one - other_prompt).mean() > 10


def test_the_scorer_prefers_the_right_style(pipe):
    """Generated pictures of a cat, each scored against every style: most find their own."""
    styles = world.STYLES[1:]
    run = loco.generate(
        pipe, [world.prompt("cat", style) for style in styles], num_inference_steps=12, batch_size=7
    )
    clip = loco.scorer("mini")
    texts = [[world.prompt("cat", style)] * len(styles) for style in styles]
    scores = np.stack(clip(list(run.pictures), *texts))  # (texts, pictures)
    assert (scores.argmax(0) == np.arange(len(styles))).mean() >= 5 / 7
