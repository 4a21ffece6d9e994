"""Which denoising step a call of the denoiser belongs to, as the pipeline's scheduler says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from locogen.errors import LocogenError
from locogen.models.families import Family
from locogen.types import Pipeline

EXACT = 1e-3  # part of a timestep by which it may differ, as in float16 and float32


@dataclass(frozen=True, eq=False)
class _Schedule:
    """A scheduler's timesteps, one a call of the denoiser, and the step of each."""

    tensor: Any
    timesteps: list[float]
    steps: list[int]


@dataclass(frozen=True, eq=False)
class _Known:
    """The step of the latest call: a pipeline that guides by a second call makes it at the same."""

    timestep: Any
    version: int
    calls: int
    step: int

    @classmethod
    def of(cls, timestep: Any, scheduler: Any, step: int) -> _Known | None:
        """The step at a timestep; None if it could be exchanged without a sign."""
        version = _version(timestep)
        if version is None:
            return None
        return cls(timestep, version, _calls_so_far(scheduler), step)

    def is_of(self, timestep: Any, scheduler: Any) -> bool:
        """Whether a call is at the very same timestep, and the scheduler has not stepped since."""
        return (
            timestep is self.timestep
            and _version(timestep) == self.version
            and _calls_so_far(scheduler) == self.calls
        )


def _version(timestep: Any) -> int | None:
    """How often a tensor was written to; None where nobody counts."""
    if not hasattr(timestep, "is_inference") or timestep.is_inference():
        return None
    return timestep._version


@dataclass(eq=False)
class DenoisingSteps:
    """The denoising steps of a pipeline's call, by the timesteps of its scheduler."""

    pipe: Pipeline
    family: Family
    _latest: _Schedule | None = field(default=None, init=False)
    _known: _Known | None = field(default=None, init=False)

    def begin(self) -> list[float]:
        """The timesteps at which the steps begin, one a step, in order."""
        schedule = self._schedule()
        first_calls = [schedule.steps.index(step) for step in range(schedule.steps[-1] + 1)]
        return [schedule.timesteps[call] for call in first_calls]

    def at(self, timestep: Any) -> int:
        """The step of the denoiser's call at a timestep, counted from 0.

        Raises:
            LocogenError: The timestep is none of the scheduler's.
        """
        timestep = self.family.time(self.pipe, timestep)
        # To read a number off a graphics card is to wait for it.
        latest = self._known
        if latest is not None and latest.is_of(timestep, self.pipe.scheduler):
            return latest.step
        now = float(timestep.flatten()[0]) if hasattr(timestep, "flatten") else float(timestep)
        schedule = self._schedule()
        rounding = _rounding(timestep)
        step = schedule.steps[_call_at(now, schedule.timesteps, self.pipe.scheduler, rounding)]
        self._known = _Known.of(timestep, self.pipe.scheduler, step)
        return step

    def _schedule(self) -> _Schedule:
        # A scheduler makes a new tensor for each call of the pipeline. It is read once: to read
        # numbers off a graphics card is to wait for it.
        scheduler = self.pipe.scheduler
        if self._latest is None or self._latest.tensor is not scheduler.timesteps:
            timesteps = scheduler.timesteps.tolist()
            self._latest = _Schedule(scheduler.timesteps, timesteps, steps_of_calls(scheduler))
        return self._latest


def _rounding(timestep: Any) -> float:
    """How far a timestep may be from the scheduler's, as a part of it."""
    import torch

    is_rounded = isinstance(timestep, torch.Tensor) and timestep.is_floating_point()
    return max(EXACT, torch.finfo(timestep.dtype).eps) if is_rounded else EXACT


def _call_at(now: float, timesteps: list[float], scheduler: Any, rounding: float) -> int:
    """Which of the denoiser's calls is at a timestep."""
    size = max(1.0, abs(now))
    nearest = min(range(len(timesteps)), key=lambda call: abs(timesteps[call] - now))

    # Some schedules have equal timesteps (second order; or from rounding): then the scheduler's own
    # count decides. In bfloat16 neighbors round to one number, and only a scheduler that has begun
    # to count can tell them apart.
    counted = _calls_so_far(scheduler)
    counts = getattr(scheduler, "step_index", None) is not None or counted == nearest
    tolerance = size * (rounding if counts else EXACT)
    if 0 <= counted < len(timesteps) and abs(timesteps[counted] - now) <= tolerance:
        return counted
    if abs(timesteps[nearest] - now) > size * EXACT:
        raise LocogenError(
            f"timestep {now} is none of the scheduler's, so its step is unknown: within this "
            "context call the pipeline, not its denoiser"
        )
    return nearest


def _calls_so_far(scheduler: Any) -> int:
    """How often the scheduler has stepped in this call of its pipeline; -1 if it does not count."""
    if not hasattr(scheduler, "step_index"):
        return getattr(scheduler, "counter", -1)
    if scheduler.step_index is not None:
        return scheduler.step_index
    return getattr(scheduler, "begin_index", None) or 0


def steps_of_calls(scheduler: Any) -> list[int]:
    """The denoising step that each call of the denoiser belongs to, by the scheduler's order.

    Args:
        scheduler: One of diffusers', its timesteps set.

    Returns:
        One number for each of its timesteps, counted from 0; it rises by one at most.
    """
    calls = len(scheduler.timesteps)

    # A scheduler of second order (Heun, KDPM2) calls the denoiser twice a step, but once in the
    # last.
    order = getattr(scheduler, "order", 1)
    if order > 1:
        return [call // order for call in range(calls)]

    # All others call it once a step, at equal timesteps too, except PNDM.
    surplus = calls - (scheduler.num_inference_steps or calls)
    if surplus <= 0:
        return list(range(calls))

    # PNDM begins with steps of four calls (Runge-Kutta), or repeats its second timestep.
    runge_kutta_timesteps = getattr(scheduler, "prk_timesteps", None)
    runge_kutta = 0 if runge_kutta_timesteps is None else len(runge_kutta_timesteps)
    if runge_kutta:
        first_steps = [call // 4 for call in range(runge_kutta)]
        return first_steps + [call - surplus for call in range(runge_kutta, calls)]
    distinct = list(dict.fromkeys(scheduler.timesteps.tolist()))
    return [distinct.index(timestep) for timestep in scheduler.timesteps.tolist()]
