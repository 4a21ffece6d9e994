"""A picture comes from its prompt and seed alone, or there is an error that says why not."""

import types

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
)
from support import tiny

from locogen.errors import LocogenError
from locogen.localization.causal_tracing import causal_trace
from locogen.pictures.checks import (
    check_flags,
    check_scheduler,
    from_the_seed_alone,
    scheduler_errors,
)
from locogen.pictures.runs import generate
from locogen.plan import Concept, Intervention, PromptPair

FAST = {"num_inference_steps": 2, "guidance_scale": 3.0, "batch_size": 2, "progress": False}
CONCEPT = Concept("cat", "object", (PromptPair("cat in a", "dog in a"),))


@pytest.fixture
def pipe():
    return tiny.small()


class Noisy(DDIMScheduler):
    """Adds noise of torch's global state, as `DPMSolverSDEScheduler` does."""

    def step(self, model_output, timestep, sample, **options):
        return super().step(model_output, timestep, sample + torch.randn_like(sample), **options)


class NoisyInNumpy(DDIMScheduler):
    def step(self, model_output, timestep, sample, **options):
        noise = torch.tensor(np.random.standard_normal(sample.shape), dtype=sample.dtype)  # noqa: NPY002
        return super().step(model_output, timestep, sample + noise, **options)


@pytest.mark.parametrize("kind", [Noisy, NoisyInNumpy])
def test_noise_that_no_seed_decides_is_refused(pipe, tmp_path, kind):
    def picture():
        generator = torch.Generator().manual_seed(0)
        return pipe(["cat"], generator=generator, num_inference_steps=2, output_type="np").images

    assert np.array_equal(picture(), picture())
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    assert not np.array_equal(picture(), picture()), "one seed, two pictures"
    with pytest.raises(LocogenError, match=f"{kind.__name__} adds noise without a generator"):
        generate(pipe, ["cat"], store=tmp_path, **FAST)
    assert not list(tmp_path.glob("*.png"))


def test_noise_is_refused_in_a_trace_as_well(pipe, tmp_path):
    pipe.scheduler = Noisy.from_config(pipe.scheduler.config)
    options = {
        "seeds": (0,),
        "parts": ("text MLP",),
        "scorer": tiny.FakeScorer(),
        "progress": False,
    }
    with pytest.raises(LocogenError, match="Noisy adds noise without a generator"):
        causal_trace(
            pipe, CONCEPT, num_inference_steps=1, guidance_scale=1.0, store=tmp_path, **options
        )
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_dropout_in_training_mode_is_refused(pipe, part):
    layer = (
        pipe.unet.mid_block.resnets[0]
        if part == "unet"
        else pipe.text_encoder.encoder.layers[0].mlp
    )
    if part == "unet":
        layer.dropout.p = 0.5
    else:
        layer.fc1 = torch.nn.Sequential(layer.fc1, torch.nn.Dropout(0.5))
    getattr(pipe, part).eval()
    generate(pipe, ["cat"], **FAST)
    getattr(pipe, part).train()
    with pytest.raises(
        LocogenError, match=rf"training mode and drops neurons \({part}\), call eval"
    ):
        generate(pipe, ["cat"], **FAST)


def test_a_flow_with_noise_is_refused():
    """FLUX hands its scheduler no generator: with stochastic sampling the noise is anybody's."""
    pipe = tiny.flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipe.scheduler.config, stochastic_sampling=True
    )
    with pytest.raises(
        LocogenError, match="FlowMatchEulerDiscreteScheduler adds noise without a generator"
    ):
        generate(pipe, ["cat"], **FAST)


def test_a_brownian_tree_is_refused_before_any_picture(pipe, monkeypatch):
    """With a seed of its own its noise is repeated, but a picture's noise depends on its place in the batch."""
    pipe.scheduler.noise_sampler = (
        None  # as DPMSolverSDEScheduler and CosineDPMSolverMultistepScheduler have it
    )
    monkeypatch.setattr(type(pipe), "__call__", None)
    with pytest.raises(LocogenError, match="does not come from the picture's seed"):
        generate(pipe, ["cat"], **FAST)
    del pipe.scheduler.noise_sampler
    check_scheduler(pipe)


def test_a_generators_own_noise_is_fine(pipe):
    with from_the_seed_alone(pipe):
        torch.randn(3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(LocogenError, match="do not depend on the seed"), from_the_seed_alone(pipe):
        torch.randn(3)


# --- schedulers that do not fit ------------------------------------------------------------------


def test_sigmas_that_begin_with_two_equal_timesteps_are_explained(pipe):
    """As the mini model's with Karras sigmas: diffusers' own error is an IndexError that says nothing."""
    mini = dict(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    pipe.scheduler = DPMSolverMultistepScheduler(**mini, use_karras_sigmas=True)
    with pytest.raises(IndexError, match="out of bounds"):
        pipe(["cat"], num_inference_steps=4, output_type="np")
    with pytest.raises(LocogenError, match=r"first two timesteps .* are equal \(998\).*Karras"):
        generate(pipe, ["cat"], **(FAST | {"num_inference_steps": 4}))
    pipe.scheduler = DPMSolverMultistepScheduler(**mini)
    generate(pipe, ["cat"], **(FAST | {"num_inference_steps": 4}))


@pytest.mark.parametrize("kind", [KarrasVeScheduler, FlowMatchEulerDiscreteScheduler])
def test_a_scheduler_of_another_kind_is_named(pipe, kind):
    pipe.scheduler = kind()
    with pytest.raises(
        LocogenError, match=rf"the scheduler {kind.__name__} .*do not work together.*compatibles"
    ):
        generate(pipe, ["cat"], **FAST)


def test_other_errors_stay_what_they_are(pipe):
    with pytest.raises(ValueError, match="somebody else's"), scheduler_errors(pipe):
        raise ValueError("somebody else's")


# --- safety checkers -----------------------------------------------------------------------------


class Checker(torch.nn.Module):
    """Blackens the pictures at some places, as diffusers' do."""

    def __init__(self, flagged, answers):
        super().__init__()
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.flagged = flagged
        self.answers = answers

    def forward(self, images, clip_input):
        flags = [place in self.flagged for place in range(len(images))]
        for place in self.flagged:
            images[place] = 0 * images[place]
        return (images, flags, flags)[: self.answers]


def extractor(images, return_tensors):
    batch = types.SimpleNamespace(pixel_values=torch.zeros(1))
    batch.to = lambda device: batch
    return batch


@pytest.mark.parametrize(("family", "answers"), [("sd", 2), ("lcm", 2), ("if", 3)])
def test_blackened_pictures_are_never_kept(family, answers, tmp_path):
    pipe = tiny.FAMILIES[family]()
    pipe.safety_checker, pipe.feature_extractor = Checker([1], answers), extractor
    with (
        pytest.warns(UserWarning, match="the safety checker is on"),
        pytest.raises(
            LocogenError, match=r"flagged 1 pictures .*'dog' with seed 0.*safety_checker = None"
        ),
    ):
        generate(pipe, ["cat", "dog"], store=tmp_path, **FAST)
    assert not list(tmp_path.glob("*.png"))
    pipe.safety_checker.flagged = []
    with pytest.warns(UserWarning, match="the safety checker is on"):
        generate(pipe, ["cat", "dog"], store=tmp_path, **FAST)
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_a_watermark_that_is_detected_is_a_flag_too():
    rows = [Intervention("cat", "cat", (), 3)]
    check_flags(types.SimpleNamespace(nsfw_detected=[False], watermark_detected=None), rows)
    with pytest.raises(LocogenError, match=r"watermark_detected\).*'cat' with seed 3"):
        check_flags(types.SimpleNamespace(nsfw_detected=[False], watermark_detected=[True]), rows)
