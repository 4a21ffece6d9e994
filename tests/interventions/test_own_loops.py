"""Whoever calls the denoiser: a loop of one's own, and modular pipelines beside their classic twins."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support import tiny

from locogen.errors import LocogenError, UnsupportedModel
from locogen.interventions.clamping import Selection, clamp
from locogen.interventions.prompts import intervene, record
from locogen.models.families import denoiser_of, encode, family_of
from locogen.models.layers import find_layers
from locogen.models.text import PromptEncoding
from locogen.plan import Intervention, with_target_runs

PROMPT, TARGET = "a cat in b", "a dog"


@pytest.fixture(scope="module")
def pipe():
    return tiny.small()


def plan(layers, seeds=(0, 1), **more):
    return [Intervention(PROMPT, TARGET, layers, seed, **more) for seed in seeds]


def every(pipe):
    return tuple(range(len(find_layers(pipe))))


@torch.no_grad()
def loop(pipe, states, *, negative_last=False, steps=2):
    """Guided denoising as one writes it oneself, by the denoiser's arguments in their places."""
    count = len(states)
    negative = encode(pipe, [""] * count).states
    halves = [states, negative] if negative_last else [negative, states]
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(steps)
    for time in pipe.scheduler.timesteps:
        first, second = pipe.unet(torch.cat([latents] * 2), time, torch.cat(halves)).sample.chunk(2)
        away, near = (second, first) if negative_last else (first, second)
        latents = pipe.scheduler.step(away + 3 * (near - away), time, latents).prev_sample
    return latents


@pytest.mark.parametrize("negative_last", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_all_layers_of_a_loop_of_ones_own_are_the_targets_run(pipe, bare, negative_last):
    prompts, targets = (encode(pipe, [text] * 2) for text in (PROMPT, TARGET))
    rows = range(2) if negative_last else range(2, 4)
    own = loop(pipe, targets.states, negative_last=negative_last)
    model = pipe.unet if bare else pipe
    for told in (rows, prompts, lambda call: rows):
        with intervene(model, plan(every(pipe)), targets=targets, rows=told):
            made = loop(pipe, prompts.states, negative_last=negative_last)
        assert torch.equal(made, own)
    wrong = range(2, 4) if negative_last else range(2)
    with intervene(model, plan(every(pipe)), targets=targets, rows=wrong):
        assert not torch.equal(loop(pipe, prompts.states, negative_last=negative_last), own)


def test_a_loop_of_ones_own_is_recorded_and_clamped(pipe):
    states = encode(pipe, [PROMPT] * 2).states
    plain = loop(pipe, states)
    with record(pipe, rows=range(2, 4)) as heard:
        assert torch.equal(loop(pipe, states), plain)
    assert torch.equal(heard[0][0][2:], states)
    some = Selection({(0, "v"): (0, 1, 2)})
    with clamp(pipe, some, to="zero", rows=range(2, 4), steps=[1]):
        late = loop(pipe, states)
    with clamp(pipe, some, to="zero", rows=range(2), steps=[1]):  # the twin: the negative's rows
        assert not torch.equal(loop(pipe, states), late)
    assert not torch.equal(late, plain)


def test_steps_of_a_loop_are_those_of_the_pipelines_scheduler(pipe):
    prompts, targets = (encode(pipe, [text] * 2) for text in (PROMPT, TARGET))
    made = {}
    for span in ((0, 0), (1, 1), (0, 1)):
        rows = plan(every(pipe), timesteps=span)
        with intervene(pipe, rows, targets=targets, rows=prompts):
            made[span] = loop(pipe, prompts.states)
    assert torch.equal(made[0, 1], loop(pipe, targets.states))
    assert not torch.equal(made[0, 0], made[1, 1])


def test_what_a_loop_must_say_is_asked_for(pipe):
    targets = encode(pipe, [TARGET] * 2)
    states = encode(pipe, [PROMPT] * 2).states
    with pytest.raises(LocogenError, match="say by rows="), intervene(pipe, plan((0,))):
        loop(pipe, states)
    with (
        pytest.raises(LocogenError, match="nobody encodes the targets"),
        intervene(pipe, plan((0,)), rows=range(2, 4)),
    ):
        pass
    for rows in (targets, range(0), lambda arguments: range(0)):
        with (
            pytest.raises(LocogenError, match="no call of the denoiser held the prompts"),
            intervene(pipe, plan((0,)), targets=targets, rows=rows),
        ):
            loop(pipe, states)
    for rows, words in ((range(2, 5), "called with 4 rows"), (range(1, 4), "give as many")):
        with (
            pytest.raises(LocogenError, match=words),
            intervene(pipe, plan((0,)), targets=targets, rows=rows),
        ):
            loop(pipe, states)


# --- modular pipelines ---------------------------------------------------------------------------


def modular(pipe):
    """The modular pipeline of a classic one, of the same parts."""
    from diffusers.modular_pipelines.flux import FluxAutoBlocks
    from diffusers.modular_pipelines.qwenimage import QwenImageAutoBlocks
    from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks

    blocks = {
        "FluxPipeline": FluxAutoBlocks,
        "QwenImagePipeline": QwenImageAutoBlocks,
        "StableDiffusionXLPipeline": StableDiffusionXLAutoBlocks,
    }
    made = blocks[type(pipe).__name__]().init_pipeline()
    parts = {name: part for name, part in pipe.components.items() if part is not None}
    made.update_components(**{n: parts[n] for n in parts if n in made.component_names})
    made.set_progress_bar_config(disable=True)
    return made


def made_by(modular_pipe, prompts):
    """The pictures, and what the denoiser got as text in each of its calls."""
    negative = {}
    if "QwenImage" in type(modular_pipe).__name__:
        negative["negative_prompt"] = [" "] * len(prompts)
    denoiser = denoiser_of(modular_pipe)
    texts = []

    def note(module, args, kwargs):
        texts.append(kwargs["encoder_hidden_states"])

    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        made = modular_pipe(
            prompt=list(prompts),
            generator=[torch.Generator().manual_seed(0) for _ in prompts],
            num_inference_steps=2,
            height=16,
            width=16,
            output_type="np",
            output="images",
            **negative,
        )
    finally:
        handle.remove()
    return np.asarray(made), texts


def prompts_among(texts, others):
    """What the denoiser got for the prompts: the one that another run, of other prompts, has not."""
    own = [
        text
        for text in texts
        if not any(text.shape == other.shape and torch.equal(text, other) for other in others)
    ]
    assert all(torch.equal(text, own[0]) for text in own)
    return PromptEncoding(own[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd-xl", "flux", "qwen-image"])
def test_all_layers_of_a_modular_pipeline_are_the_targets_run(name):
    """Its blocks call the denoiser: which rows are the prompts' is known by their text."""
    pipe = tiny.FAMILIES[name]()
    other = modular(pipe)
    layers = every(pipe)
    assert [layer.name for layer in find_layers(other)] == [x.name for x in find_layers(pipe)]
    family = family_of(pipe)
    pooled = {"pooled": "target"} if family.pooled is not None else {}
    rows = plan(layers, seeds=(0,), **pooled)
    rows = with_target_runs(rows) if family.joint_attention else rows
    own, target_texts = made_by(other, [row.target for row in rows])
    plain, texts = made_by(other, [row.prompt for row in rows])
    targets = encode(pipe, [row.target for row in rows])
    with intervene(other, rows, targets=targets, rows=prompts_among(texts, target_texts)):
        made, _ = made_by(other, [row.prompt for row in rows])
    assert np.abs(made[0] - own[0]).max() < 1e-5
    assert np.abs(plain[0] - own[0]).max() > 1e-4  # the twin
    with pytest.raises(UnsupportedModel, match=f"build the classic {type(pipe).__name__}"):
        encode(other, [PROMPT])


@torch.no_grad()
def called_with(pipe, states):
    """One call of the denoiser, as a loop of one's own makes it."""
    count = len(states)
    return pipe.unet(torch.zeros(count, 4, 8, 8), torch.tensor(1), states).sample


def test_prompts_that_a_call_holds_twice_must_be_told_apart(pipe):
    prompt, target, negative = (encode(pipe, [text]) for text in (PROMPT, TARGET, ""))
    twice = torch.cat(
        [negative.states, prompt.states, prompt.states]
    )  # as perturbed attention does
    with intervene(pipe, plan(every(pipe), (0,)), targets=target, rows=prompt):
        called_with(pipe, twice[:2])  # the twin: once
        with pytest.raises(LocogenError, match="2 times, from rows 1, 2 on"):
            called_with(pipe, twice)


def test_a_loop_in_another_thread_is_refused(pipe):
    prompt, target = (encode(pipe, [text]) for text in (PROMPT, TARGET))
    with (
        intervene(pipe, plan(every(pipe), (0,)), targets=target, rows=range(1)),
        ThreadPoolExecutor(1) as threads,
    ):
        called_with(pipe, prompt.states)
        with pytest.raises(LocogenError, match="another thread"):
            threads.submit(called_with, pipe, prompt.states).result()
