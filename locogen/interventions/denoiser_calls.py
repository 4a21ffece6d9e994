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
    made: dict[str, Any] = field(default_factory=dict)  # what was computed once for this call
    _encoded: list[Tensor] = field(default_factory=list)
    _prompts: Tensor | None = None
    _others: list[Tensor] = field(default_factory=list)
    _timestep: Any = None
    _timesteps: tuple[Any, list[float]] | None = None  # the scheduler's tensor, and what it holds

    @property
    def states(self) -> Tensor:
        """The encoded text that the denoiser is called with, all rows."""
        return self.given["encoder_hidden_states"]

    @property
    def guided(self) -> bool:
        """Whether the call holds negative rows before the conditional ones."""
        return self.rows.start > 0

    def step(self) -> int:
        """The denoising step, counted from 0 by distinct timesteps: PNDM calls the denoiser twice at one.

        Raises `LocogenError` for a timestep that is none of the scheduler's.
        """
        # Asked by each hook and for each row, and reading a number off a device waits for it.
        if "step" not in self.made:
            self.made["step"] = self._observed_step()
        return self.made["step"]

    def _observed_step(self) -> int:
        now = self.family.time(self.pipe, self._timestep)
        now = float(now.flatten()[0]) if hasattr(now, "flatten") else float(now)
        near = min(enumerate(self.timesteps()), key=lambda known: abs(known[1] - now))
        if abs(near[1] - now) > 1e-3 * max(1.0, abs(now)):
            raise LocogenError(
                f"timestep {now} is none of the scheduler's: the step is known in the pipeline's own call"
            )
        return near[0]

    def timesteps(self) -> list[float]:
        """The scheduler's distinct timesteps, in order."""
        tensor = self.pipe.scheduler.timesteps
        if self._timesteps is None or self._timesteps[0] is not tensor:  # read once a call of the pipeline
            self._timesteps = (tensor, list(dict.fromkeys(tensor.tolist())))
        return self._timesteps[1]

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
