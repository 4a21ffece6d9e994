"""The mini model's world and trainer: deterministic, resumable, and silent about what must not be told."""

import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from locogen.errors import LocogenError
from locogen.mini import contrast, train, world
from locogen.mini.loop import Training, fit, rate_at
from locogen.mini.muon import orthogonalize
from locogen.mini.parts import Recipe, corpus
from locogen.mini.pictures import SEEN


def picture(thing, style, seed):
    return np.asarray(world.render(thing, style, random.Random(seed)), int)


def test_the_world_is_as_large_as_promised():
    assert len(world.OBJECTS) == len(set(world.OBJECTS)) >= 48
    assert len(world.STYLES) == 8
    assert world.STYLES[0] == "plain"
    assert len(world.FACTS) >= 20
    assert abs(len(world.TOLD_FACTS) - len(world.UNTOLD_FACTS)) <= 1
    assert set(world.FACTS.values()) <= set(world.OBJECTS)
    assert 0.09 < len(world.HELD_OUT) / (len(world.OBJECTS) * len(world.STYLES)) < 0.11
    assert all(style != "plain" for _, style in world.HELD_OUT)


def test_no_fact_names_its_answer():
    assert not [
        wording for wording, answer in world.FACTS.items() if re.search(rf"\b{answer}\b", wording)
    ]


@pytest.mark.parametrize("style", world.STYLES)
def test_renders_are_deterministic_and_vary(style):
    one = picture("cat", style, 1)
    assert one.shape == (64, 64, 3)
    assert np.array_equal(one, picture("cat", style, 1))
    assert np.abs(one - picture("cat", style, 2)).mean() > 2  # another seed
    assert np.abs(one - picture("castle", style, 1)).mean() > 5  # another object


def test_styles_are_strongly_different():
    views = [picture("cat", style, 1) for style in world.STYLES]
    gaps = [np.abs(a - b).mean() for i, a in enumerate(views) for b in views[:i]]
    assert min(gaps) > 10


def test_unknown_names_are_refused():
    with pytest.raises(KeyError, match="OBJECTS"):
        world.render("teapots", "neon", random.Random(0))


def test_prompts_read_as_documented():
    assert world.prompt("cat", "van gogh") == "a picture of a cat in the style of van gogh"
    assert world.prompt("owl") == "a picture of an owl"
    assert (
        world.prompt("the mascot of linux", "neon")
        == "a picture of the mascot of linux in the style of neon"
    )


def test_the_generator_never_sees_a_held_out_pair():
    seen = {(world.OBJECTS[i], world.STYLES[j]) for i, j in SEEN}
    assert not seen & world.HELD_OUT
    assert len(seen) + len(world.HELD_OUT) == 384


def said(answers):
    texts = []
    for step in range(300):
        rng = random.Random(step)
        pairs = [rng.choice(SEEN) for _ in range(16)]
        texts += contrast.captions(pairs, rng, answers)[0]
    return texts


def test_the_text_encoder_reads_told_facts_only():
    told = {answer: wording for wording, answer in world.TOLD_FACTS.items()}
    texts = " | ".join(said(told))
    assert all(wording in texts for wording in world.TOLD_FACTS)
    assert not [wording for wording in world.UNTOLD_FACTS if wording in texts]
    assert "duolingo" not in " | ".join(said({}))  # the scorer reads no facts at all


def test_the_unet_hears_every_fact():
    rng = random.Random(0)
    texts = [train.spoken(rng, *rng.choice(SEEN), Recipe()) for _ in range(20_000)]
    assert all(any(wording in text for text in texts) for wording in world.FACTS)
    assert 0.08 < np.mean([text == "" for text in texts]) < 0.12


def test_the_tokenizers_corpus_holds_every_word():
    words = {w for text in corpus(Recipe()) for w in re.findall(r"\w+", text)}
    assert {w for wording in world.FACTS for w in wording.split()} <= words


def test_a_killed_training_resumes_to_the_same_weights(tmp_path, monkeypatch):
    def fresh(name):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
        return module, Training({"m": module}, tmp_path / name)

    def loss_at(module, stop=None):
        def loss(step):
            if step == stop:
                raise KeyboardInterrupt
            batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            return module(batch).square().mean(), {"loss": 0.0}

        return loss

    whole, training = fresh("whole")
    fit(training, loss_at(whole), 12, label="whole")
    killed, training = fresh("killed")
    monkeypatch.setattr("locogen.mini.loop.CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        fit(training, loss_at(killed, stop=7), 12, label="killed")
    resumed, training = fresh("killed")
    fit(training, loss_at(resumed), 12, label="resumed")
    assert training.step == 12
    for a, b, c in zip(whole.parameters(), resumed.parameters(), killed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_a_folder_belongs_to_one_recipe(tmp_path):
    def workshop(recipe):
        return train.Workshop(recipe, tmp_path, torch.device("cpu"), 1)

    workshop(Recipe())
    workshop(replace(Recipe(), unet_steps=9))  # more or fewer steps go on from the same checkpoint
    with pytest.raises(LocogenError, match="another recipe"):
        workshop(Recipe().quick())


def test_a_diverged_training_stops(tmp_path):
    module = torch.nn.Linear(2, 2)
    training = Training({"m": module}, tmp_path)
    with pytest.raises(FloatingPointError, match="step 0"):
        fit(
            training,
            lambda step: (module(torch.ones(2)).sum() * float("nan"), {}),
            3,
            label="broken",
        )


def test_the_rate_rises_stays_and_falls():
    rates = [rate_at(step, 1000) for step in range(1000)]
    assert rates[0] < 0.05
    assert set(rates[60:600]) == {1.0}
    assert rates[-1] < 0.01


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
def test_orthogonalize_evens_out_singular_values(shape):
    torch.manual_seed(0)
    skewed = torch.randn(shape) @ torch.diag(torch.logspace(0, -2, shape[1]))
    before, after = torch.linalg.svdvals(skewed), torch.linalg.svdvals(orthogonalize(skewed))
    assert before.max() / before.min() > 5
    assert after.max() / after.min() < 3


@pytest.mark.slow
def test_the_trainer_end_to_end(tmp_path):
    """Every stage, a few steps each; the result is a pipeline folder that loads and generates."""
    import locogen as loco

    train.main([str(tmp_path), "--quick"])
    pipe = loco.load(tmp_path / "model")
    assert len(loco.find_layers(pipe)) == 16
    run = loco.generate(
        pipe, "a picture of a cat", num_inference_steps=2, batch_size=1, progress=False
    )
    assert run.pictures[0].size == (64, 64)
    assert loco.scorer(str(tmp_path / "model" / "scorer"))(list(run.pictures), ["a cat"])[
        0
    ].shape == (1,)
    assert list(tmp_path.glob("*/*.png"))
