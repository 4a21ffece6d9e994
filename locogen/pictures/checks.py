"""Checks that pictures come from their prompts and seeds alone."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from locogen.errors import LocogenError
from locogen.types import Pipeline

if TYPE_CHECKING:
    from locogen.plan import Intervention

# Fields of diffusers' outputs, with one value for each picture.
FLAGS = ("nsfw_content_detected", "nsfw_detected", "watermark_detected")

# What diffusers raises if a scheduler does not fit the pipeline: it checks little by itself.
MISFITS = (
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    ImportError,
    AssertionError,
    RuntimeError,
)

# Given a pipeline, says what is odd about it, each in a sentence with its remedy.
ModelCheck: TypeAlias = Callable[[Any], Iterator[str]]

_model_checks: list[ModelCheck] = []


def model_check(check: ModelCheck) -> ModelCheck:
    """Have a check called with the pipeline before the pictures of a run are made.

    For rooms that this one does not import: what they do to a model, they check themselves.
    """
    _model_checks.append(check)
    return check


def oddities(pipe: Pipeline) -> Iterator[str]:
    """What the registered checks say of the model as it is now."""
    for check in _model_checks:
        yield from check(pipe)


def check_scheduler(pipe: Pipeline) -> None:
    """Refuse a scheduler whose noise does not come from each picture's own generator.

    A Brownian tree (`DPMSolverSDEScheduler`, `CosineDPMSolverMultistepScheduler`) takes its noise
    from torch's global state or, with `noise_sampler_seed`, from one seed for the whole batch: then
    a picture depends on its neighbors.

    Raises:
        LocogenError: For such a scheduler.
    """
    if hasattr(pipe.scheduler, "noise_sampler"):
        raise LocogenError(
            f"{_name(pipe)} adds noise that does not come from the picture's seed: use another "
            "scheduler, such as EulerAncestralDiscreteScheduler or DPMSolverMultistepScheduler "
            "with algorithm_type='sde-dpmsolver++', which take a generator"
        )


@contextmanager
def from_the_seed_alone(pipe: Pipeline) -> Iterator[None]:
    """Within the context, nothing may draw from a global random state.

    Raises:
        LocogenError: When the context ends, if something has drawn from torch's or numpy's.
    """
    before = _random_states(pipe)
    yield
    if _random_states(pipe) != before:
        raise LocogenError(
            "the pipeline drew random numbers that do not depend on the seed, so no picture could "
            f"be made again. If {_name(pipe)} adds noise without a generator, use another one, or "
            "its deterministic setting. If a part of the model is in training mode and drops "
            f"neurons ({_dropping(pipe)}), call eval() on it"
        )


def _random_states(pipe: Pipeline) -> list[bytes]:
    """Torch's state on the CPU and on the card that the pipeline computes on, and numpy's."""
    import torch

    device = pipe._execution_device
    states = [torch.get_rng_state().numpy().tobytes()]
    if device.type == "cuda" and torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    if device.type == "mps":
        states.append(torch.mps.get_rng_state().numpy().tobytes())
    # numpy's global state itself is what is compared, so the newer generators do not help.
    name, numbers, *position = np.random.get_state()  # noqa: NPY002
    return [*states, np.asarray(numbers).tobytes(), repr((name, position)).encode()]


def _dropping(pipe: Pipeline) -> str:
    """The components that drop neurons in their present mode."""
    names = []
    for part, component in pipe.components.items():
        if not hasattr(component, "named_modules"):
            continue
        # `p` is a dropout layer's probability.
        if any(layer.training and getattr(layer, "p", 0) for layer in component.modules()):
            names.append(part)
    return ", ".join(names) or "none was found"


@contextmanager
def scheduler_errors(pipe: Pipeline) -> Iterator[None]:
    """Within the context, an error that comes from the scheduler says so, and what to do.

    Raises:
        LocogenError: For a scheduler that does not fit the pipeline, or that starts at its second
            step.
    """
    try:
        yield
    except MISFITS as error:
        if not _comes_from_scheduler(pipe, error):
            raise
        _check_first_timesteps(pipe)
        raise LocogenError(
            f"{_name(pipe)} and {type(pipe).__name__} do not work together with these settings "
            f"({type(error).__name__}: {error}). Use another scheduler: pipe.scheduler.compatibles "
            "names some, or another num_inference_steps"
        ) from error
    _check_first_timesteps(pipe)


def _comes_from_scheduler(pipe: Pipeline, error: Exception) -> bool:
    # A full memory is not the scheduler's fault: a smaller batch may help.
    if "memory" in str(error):
        return False
    innermost = traceback.extract_tb(error.__traceback__)[-1].filename.replace("\\", "/")
    return "/schedulers/" in innermost or type(pipe.scheduler).__name__ in str(error)


def _check_first_timesteps(pipe: Pipeline) -> None:
    """Refuse a scheduler whose first two timesteps are equal.

    Diffusers finds its place by the value of the first timestep: then it skips a step silently.
    """
    scheduler = pipe.scheduler
    timesteps = getattr(scheduler, "timesteps", ())
    # Some count their steps, or are told where to begin: these do not look for a value.
    begins_by_index = getattr(scheduler, "begin_index", None) is not None
    if begins_by_index or not hasattr(scheduler, "step_index"):
        return
    if len(timesteps) < 2 or timesteps[0] != timesteps[1]:
        return
    raise LocogenError(
        f"the first two timesteps of {_name(pipe)} are equal ({float(timesteps[0]):g}), so "
        "diffusers begins with the second step and has none left at the end: these sigmas (Karras, "
        "exponential, beta) do not fit the model's noise schedule. Make the scheduler without "
        "them, or call with fewer num_inference_steps"
    )


def _name(pipe: Pipeline) -> str:
    return f"the scheduler {type(pipe.scheduler).__name__}"


def check_flags(output: Any, rows: Sequence[Intervention]) -> None:
    """Refuse pictures that a safety checker has flagged: it has made them black.

    Args:
        output: What a call of the pipeline gave.
        rows: Its rows, in order.

    Raises:
        LocogenError: A picture is flagged; names its prompt and seed.
    """
    for name in FLAGS:
        flags = getattr(output, name, None)
        flagged = [row for row, flag in zip(rows, flags or (), strict=False) if flag]
        if flagged:
            raise LocogenError(
                f"the safety checker flagged {len(flagged)} pictures ({name}) and made them black, "
                f"the first of {flagged[0].prompt!r} with seed {flagged[0].seed}: none of the "
                "batch is kept. Turn it off with pipe.safety_checker = None"
            )
