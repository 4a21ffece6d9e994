"""The theorems of the intervention, with every scheduler that diffusers has for a family."""

import diffusers
import numpy as np
import pytest
import torch
from support import tiny

from locogen.errors import LocogenError
from locogen.interventions import steps as step_module
from locogen.interventions.clamping import Selection, clamp
from locogen.interventions.denoiser_calls import following
from locogen.interventions.steps import DenoisingSteps, steps_of_calls
from locogen.models.families import family_of
from locogen.models.layers import find_layers
from locogen.pictures.batches import pictures_of
from locogen.plan import Intervention, Settings

# Some of diffusers' schedulers take the logarithm of 0, and mix numpy's arrays with torch's in an old way.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::DeprecationWarning")
STEPS = 4
SCHEDULERS = sorted(
    name
    for name in dir(diffusers)
    if name.endswith("Scheduler")
    and name != "SchedulerMixin"
    and hasattr(getattr(diffusers, name), "from_config")
)
NOT_OF_THIS_KIND = {  # cannot be made of the config, or of another kind of model: named in the refusal
    *(
        "AmusedScheduler",
        "BlockRefinementScheduler",
        "CogVideoXDPMScheduler",
        "DDPMWuerstchenScheduler",
    ),
    *("DiscreteDDIMScheduler", "EntropyBoundScheduler"),
    *(
        "FlowMapEulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
    ),
    *("FlowMatchLCMScheduler", "HeliosDMDScheduler", "HeliosScheduler", "KarrasVeScheduler"),
    *(
        "LTXEulerAncestralRFScheduler",
        "MiniMaxH3Scheduler",
        "PiflowScheduler",
        "RFD4ProteinaScheduler",
    ),
    *(
        "RePaintScheduler",
        "SCMScheduler",
        "ScoreSdeVeScheduler",
        "UnCLIPScheduler",
        "VQDiffusionScheduler",
    ),
}
WITH_A_TREE = {
    "CosineDPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
}  # need torchsde, and are refused


@pytest.fixture(scope="module")
def pipe():
    return tiny.small()


def scheduler_of(pipe, name):
    try:
        return getattr(diffusers, name).from_config(pipe.scheduler.config)
    except (ImportError, TypeError):
        return None  # torchsde is not installed; or it needs what the config does not have


def pictures(pipe, rows):
    """The rows' pictures from one batch, where sums are taken alike."""
    batches = pictures_of(pipe, rows, Settings(STEPS, 3.0, 2 * len(rows)))
    return np.concatenate([pixels for _, pixels, _ in batches])


def check_theorems(pipe, layers):
    """All layers, and all steps, are the target's own run; no layer is the plain run; first and last step are not."""
    pooled = "keep" if family_of(pipe).pooled is None else "target"

    def row(timesteps):
        return Intervention("cat in a", "dog on b", layers, 0, timesteps=timesteps, pooled=pooled)

    rows = [
        Intervention("cat in a", "dog on b", (), 0),
        Intervention("dog on b", "dog on b", (), 0),
        row(None),
        row((0, STEPS - 1)),
        row((0, STEPS - 2)),
    ]
    plain, own, every_layer, every_step, not_the_last = pictures(pipe, rows)
    assert np.array_equal(every_layer, own)
    assert np.array_equal(every_step, own)
    assert not np.array_equal(plain, own), "the twin: another prompt is another picture"
    assert not np.array_equal(not_the_last, own), "the twin: so is one step less"
    alone = pictures(pipe, [rows[0]] * len(rows))
    assert np.array_equal(alone[0], plain)


def quick_or_slow(name):
    """One of each kind always; the others where there is time."""
    kinds = {
        "DDIMScheduler",
        "EulerAncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "PNDMScheduler",
    }
    return pytest.param(name, marks=() if name in kinds else pytest.mark.slow)


FITTING = sorted(set(SCHEDULERS) - NOT_OF_THIS_KIND - WITH_A_TREE)


@pytest.mark.parametrize("name", [quick_or_slow(name) for name in FITTING])
def test_every_scheduler_keeps_the_theorems(pipe, monkeypatch, name):
    monkeypatch.setattr(pipe, "scheduler", scheduler_of(pipe, name))
    check_theorems(pipe, tuple(range(4)))


@pytest.mark.parametrize("name", sorted(NOT_OF_THIS_KIND & set(SCHEDULERS)))
def test_schedulers_of_other_models_are_refused_by_name(pipe, monkeypatch, name):
    scheduler = scheduler_of(pipe, name)
    if scheduler is None:
        return  # diffusers itself refuses to make it
    monkeypatch.setattr(pipe, "scheduler", scheduler)
    with pytest.raises(LocogenError, match=rf"the scheduler {name} .*do not work together"):
        pictures(pipe, [Intervention("cat", "dog", (), seed) for seed in (0, 1)])


SECOND_ORDER = {
    "DDIMScheduler": [0, 1, 2, 3],
    "HeunDiscreteScheduler": [0, 0, 1, 1, 2, 2, 3],
    "KDPM2DiscreteScheduler": [0, 0, 1, 1, 2, 2, 3],
    "KDPM2AncestralDiscreteScheduler": [0, 0, 1, 1, 2, 2, 3],
    "PNDMScheduler": [0] * 4 + [1] * 4 + [2] * 4 + [3],
}


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_calls_are_counted_as_the_schedulers_order_says(pipe, monkeypatch, name):
    monkeypatch.setattr(pipe, "scheduler", scheduler_of(pipe, name))
    steps = []
    with following(pipe, family_of(pipe)) as call:
        handle = pipe.unet.register_forward_pre_hook(lambda *_: steps.append(call.step()))
        try:
            pipe(["cat"], num_inference_steps=STEPS, output_type="latent")
        finally:
            handle.remove()
        assert len(call.timesteps()) == STEPS
    assert steps == SECOND_ORDER[name] == steps_of_calls(pipe.scheduler)


def test_equal_timesteps_are_steps_of_their_own(pipe, monkeypatch):
    """Rounding makes them: here the second and third; the call was refused for having too few steps."""
    monkeypatch.setattr(pipe, "scheduler", with_equal_timesteps())
    timesteps, steps = [], []
    with following(pipe, family_of(pipe)) as call:
        handle = pipe.unet.register_forward_pre_hook(lambda *_: steps.append(call.step()))
        try:
            pipe(["cat"], num_inference_steps=12, output_type="latent")
        finally:
            handle.remove()
        timesteps = call.timesteps()
    assert len(set(timesteps)) < len(timesteps) == 12, "the twin: distinct ones are fewer"
    assert steps == list(range(12))
    everything = Selection({(2, "v"): (0, 1, 2, 3)})
    with clamp(pipe, everything, to="zero", steps=range(12)):
        pipe(["cat"], num_inference_steps=12, output_type="latent")


def with_equal_timesteps():
    return diffusers.DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", use_lu_lambdas=True
    )


COMPATIBLE = {
    "lcm": ("LCMScheduler",),
    "sd-xl": (
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "UniPCMultistepScheduler",
    ),
    "if": ("DDPMScheduler", "DPMSolverMultistepScheduler"),
    "sd-3": ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "flux": ("FlowMatchEulerDiscreteScheduler",),
    "pixart-alpha": ("DPMSolverMultistepScheduler", "KDPM2DiscreteScheduler"),
    "sana": ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"),
}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=[] if family in tiny.FAST else pytest.mark.slow)
        for family, names in COMPATIBLE.items()
        for name in names
    ],
)
def test_every_family_keeps_the_theorems_with_its_schedulers(family, name):
    pipe = tiny.FAMILIES[family]()
    pipe.scheduler = scheduler_of(pipe, name)
    check_theorems(pipe, tuple(range(len(find_layers(pipe)))))


def test_a_step_is_read_off_the_device_once(monkeypatch):
    """At the very same timestep, as for a negative prompt; but not once it has moved on."""
    pipe = tiny.small()
    pipe.scheduler.set_timesteps(STEPS)
    steps, reads = DenoisingSteps(pipe, family_of(pipe)), []

    def reading(now, *of_scheduler):
        reads.append(now)
        return read_step(now, *of_scheduler)

    read_step = step_module._call_at
    monkeypatch.setattr(step_module, "_call_at", reading)
    now = pipe.scheduler.timesteps[1].clone()
    assert [steps.at(now), steps.at(now)] == [1, 1] and len(reads) == 1
    now.copy_(pipe.scheduler.timesteps[2])  # a loop of one's own may write into one tensor
    assert steps.at(now) == 2 and len(reads) == 2
    with torch.inference_mode():  # where nobody counts what is written
        now = pipe.scheduler.timesteps[1].clone()
        assert steps.at(now) == 1
        now.copy_(pipe.scheduler.timesteps[2])
        assert steps.at(now) == 2
