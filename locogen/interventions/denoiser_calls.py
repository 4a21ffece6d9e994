"""What is known of the denoiser's call in progress: whose rows it holds, and which denoising step it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.models.families import Family, denoiser_of

if TYPE_CHECKING:
    from torch import Tensor

MARK = "_locogen_hook"


@dataclass(eq=False)
class Call:
    """Follows a pipeline: what its encoder returned tells which rows of the denoiser's call are conditional.

    Never guessed from their number alone, since twice as many rows may mean guidance or two pictures a prompt, and
    some pipelines (DeepFloyd IF, PixArt) tell nobody which. The encoder returns the prompts' states, a row a picture:
    the call's rows are those, or those behind as many negative ones. FLUX guides by a call of its own for the negative
    states, which has no conditional rows.
    """

    pipe: Any
    family: Family
    given: dict[str, Any] = field(default_factory=dict)  # the denoiser's arguments
    rows: range = range(0)  # the conditional rows
    made: dict[str, Tensor] = field(default_factory=dict)  # what was computed once for this call
    _encoded: list[Tensor] = field(default_factory=list)
    _prompts: Tensor | None = None
    _others: list[Tensor] = field(default_factory=list)
    _timestep: Any = None
    _step: tuple[Any, Any, int] | None = None  # the last step that was looked up, and the call that it was for

    @property
    def states(self) -> Tensor:
        """The encoded text that the denoiser is called with, all rows."""
        return self.given["encoder_hidden_states"]

    @property
    def guided(self) -> bool:
        """Whether the call holds negative rows before the conditional ones."""
        return self.rows.start > 0

    def step(self) -> int:
        """The denoising step of this call, counted from 0, as the scheduler's order says: see `steps_of_calls`.

        Returns:
            The step; looked up once in a call of the denoiser, since timesteps may lie on a card.

        Raises:
            LocogenError: For a timestep that is none of the scheduler's.
        """
        if self._step is None or self._step[0] is not self.made or self._step[1] is not self._timestep:
            step = steps_of_calls(self.pipe.scheduler)[self._position()]
            self._step = (self.made, self._timestep, step)
        return self._step[2]

    def timesteps(self) -> list[float]:
        """The timesteps at which the denoising steps begin, one a step, in order."""
        scheduler = self.pipe.scheduler
        steps = steps_of_calls(scheduler)
        first_calls = [steps.index(step) for step in range(steps[-1] + 1)]
        timesteps = scheduler.timesteps.tolist()
        return [timesteps[call] for call in first_calls]

    def _position(self) -> int:
        """Which of the scheduler's timesteps this call is at: equal ones are told apart by the scheduler's count."""
        now = self.family.time(self.pipe, self._timestep)
        now = float(now.flatten()[0]) if hasattr(now, "flatten") else float(now)
        timesteps = self.pipe.scheduler.timesteps.tolist()
        nearest = min(range(len(timesteps)), key=lambda position: abs(timesteps[position] - now))
        tolerance = 1e-3 * max(1.0, abs(now))  # in half precision a timestep may be rounded
        if abs(timesteps[nearest] - now) > tolerance:
            raise LocogenError(
                f"timestep {now} is none of the scheduler's: the step is known in the pipeline's own call"
            )
        counted = _calls_so_far(self.pipe.scheduler)
        if 0 <= counted < len(timesteps) and abs(timesteps[counted] - now) <= tolerance:
            return counted
        return nearest

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of a call of the denoiser."""
        self.given, self.made = kwargs, {}
        self._timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        if self._encoded:  # a new call of the pipeline, whose first call of the denoiser is the conditional one
            known = (e for e in self._encoded if e is self.states)
            self._prompts = next(known, self._encoded[-1])
            self._others = [e for e in self._encoded if e is not self._prompts]
            self._encoded = []
        if self._prompts is None:
            raise LocogenError("the denoiser is called by itself: within this context call the pipeline, pipe(…)")
        count, all_rows = len(self._prompts), len(self.states)
        if any(self.states is other for other in self._others):
            self.rows = range(0)
        elif all_rows in (count, 2 * count):
            self.rows = range(all_rows - count, all_rows)
        else:
            raise LocogenError(f"the denoiser is called with {all_rows} rows for {count} encoded prompts: unknown rows")


def steps_of_calls(scheduler: Any) -> list[int]:
    """The denoising step that each call of the denoiser belongs to, by the scheduler's order.

    A scheduler of second order (Heun, KDPM2) calls the denoiser twice a step, but once in the last. PNDM repeats its
    second timestep, or begins with steps of four calls (Runge-Kutta). All others call it once a step, at equal
    timesteps too.

    Args:
        scheduler: One of diffusers', its timesteps set.

    Returns:
        One number for each of its timesteps, counted from 0; it rises by one at most.
    """
    calls = len(scheduler.timesteps)
    order = getattr(scheduler, "order", 1)
    if order > 1:
        return [call // order for call in range(calls)]
    surplus = calls - (scheduler.num_inference_steps or calls)
    if surplus <= 0:
        return list(range(calls))
    runge_kutta_timesteps = getattr(scheduler, "prk_timesteps", None)
    runge_kutta = 0 if runge_kutta_timesteps is None else len(runge_kutta_timesteps)
    if runge_kutta:
        first_steps = [call // 4 for call in range(runge_kutta)]
        return first_steps + [call - surplus for call in range(runge_kutta, calls)]
    distinct = list(dict.fromkeys(scheduler.timesteps.tolist()))
    return [distinct.index(timestep) for timestep in scheduler.timesteps.tolist()]


def _calls_so_far(scheduler: Any) -> int:
    """How often the scheduler has stepped in this call of its pipeline; -1 where it does not count."""
    if hasattr(scheduler, "step_index"):
        stepped = scheduler.step_index
        return (getattr(scheduler, "begin_index", None) or 0) if stepped is None else stepped
    return getattr(scheduler, "counter", -1)


@contextmanager
def following(pipe: Any, family: Family) -> Iterator[Call]:
    """Within the context, know each call of the pipeline's denoiser: see `Call`."""
    call = Call(pipe, family)
    encode_prompt, own = pipe.encode_prompt, vars(pipe).get("encode_prompt")

    @wraps(encode_prompt)
    def listening(*args: Any, **kwargs: Any) -> Any:
        found = encode_prompt(*args, **kwargs)
        call._encoded.append(found[0])
        return found

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        call.begin(args, kwargs)

    pipe.encode_prompt = listening
    try:
        with hooked([(before(denoiser_of(pipe, family)), begin)]):
            yield call
    finally:
        if own is None:
            del pipe.encode_prompt
        else:
            pipe.encode_prompt = own


def before(module: Any) -> Any:
    """What registers a hook that runs before the module, with its keyword arguments."""
    return partial(module.register_forward_pre_hook, with_kwargs=True)


@contextmanager
def hooked(hooks: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Within the context, hooks are in force, each given with what registers it; marked as locogen's."""
    handles = []
    try:
        for register, hook in hooks:
            marked = partial(hook)
            setattr(marked, MARK, True)
            handles.append(register(marked))
        yield
    finally:
        for handle in handles:
            handle.remove()
