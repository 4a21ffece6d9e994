"""Follow the denoiser's calls: whose rows each holds, which step it is, and that every hook has fired."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError
from locogen.interventions.encoding import Encoding, Follower, calling_pipeline, following_text
from locogen.models.compilation import is_compiled, running_uncompiled
from locogen.models.denoisers import skipped_blocks
from locogen.models.families import Family, denoiser_of, family_of
from locogen.models.hooks import Hook, after, before, hooked, is_dry_run

if TYPE_CHECKING:
    from torch import Tensor

REMEDY = (
    "leave the context, call pipe.unfuse_qkv_projections() where projections are fused, load adapters and "
    "exchange modules, and then open the context again"
)


@dataclass(frozen=True, eq=False)
class _Schedule:
    """What a scheduler says of a call of the pipeline: its timesteps, and the denoising step that each belongs to."""

    tensor: Any
    timesteps: list[float]
    steps: list[int]


@dataclass(eq=False)
class Call:
    """Follows a pipeline: what its encoder returned tells which rows of the denoiser's call are conditional.

    Never guessed from their number alone, since twice as many rows may mean guidance or two pictures a prompt, and
    some pipelines (DeepFloyd IF, PixArt) tell nobody which. The encoder returns the prompts' states, a row a picture:
    the call's rows are those, or those behind as many negative ones. FLUX guides by a call of its own for the negative
    states, which has no conditional rows.

    A call belongs to the pipeline, and to the thread that opened the context: other pipelines may share the
    denoiser, and call it in between or at the same time.
    """

    pipe: Any
    family: Family
    given: dict[str, Any] = field(default_factory=dict)  # the denoiser's arguments
    rows: range = range(0)  # the conditional rows
    made: dict[str, Tensor] = field(default_factory=dict)  # what was computed once for this call
    encoding: Encoding | None = None  # of the prompts whose pictures are in the making
    on_encoded: Callable[[Encoding], None] | None = None  # hears of each encoding within `pipe(…)`
    on_prompts: Callable[[Encoding], None] | None = None  # hears which of them was the prompts'
    _thread: int = field(default_factory=threading.get_ident)
    _in_progress: bool = False
    _encoded: list[Encoding] = field(default_factory=list)
    _others: list[Encoding] = field(default_factory=list)
    _timestep: Any = None
    _read: _Schedule | None = None
    _step: tuple[Any, Any, int] | None = (
        None  # the last step that was looked up, and the call that it was for
    )

    @property
    def states(self) -> Tensor:
        """The encoded text that the denoiser is called with, all rows."""
        return self.given["encoder_hidden_states"]

    @property
    def guided(self) -> bool:
        """Whether the call holds negative rows before the conditional ones."""
        return self.rows.start > 0

    @property
    def in_progress(self) -> bool:
        """Whether the denoiser runs now, in this thread, for this pipeline."""
        return self._in_progress and threading.get_ident() == self._thread

    @property
    def is_awaited(self) -> bool:
        """Whether the pipeline has encoded prompts, and has not called the denoiser since."""
        return bool(self._encoded)

    def step(self) -> int:
        """The denoising step of this call, counted from 0, as the scheduler's order says: see `steps_of_calls`.

        Returns:
            The step; looked up once in a call of the denoiser, since timesteps may lie on a card.

        Raises:
            LocogenError: For a timestep that is none of the scheduler's.
        """
        if (
            self._step is None
            or self._step[0] is not self.made
            or self._step[1] is not self._timestep
        ):
            step = self._schedule().steps[self._position()]
            self._step = (self.made, self._timestep, step)
        return self._step[2]

    def timesteps(self) -> list[float]:
        """The timesteps at which the denoising steps begin, one a step, in order."""
        schedule = self._schedule()
        first_calls = [schedule.steps.index(step) for step in range(schedule.steps[-1] + 1)]
        return [schedule.timesteps[call] for call in first_calls]

    def _schedule(self) -> _Schedule:
        """The scheduler's timesteps, read once a call of the pipeline: to read them off a card is to wait for it."""
        scheduler = self.pipe.scheduler
        if self._read is None or self._read.tensor is not scheduler.timesteps:
            self._read = _Schedule(
                scheduler.timesteps, scheduler.timesteps.tolist(), steps_of_calls(scheduler)
            )
        return self._read

    def _position(self) -> int:
        """Which of the scheduler's timesteps this call is at: equal ones are told apart by the scheduler's count."""
        now = self.family.time(self.pipe, self._timestep)
        now = float(now.flatten()[0]) if hasattr(now, "flatten") else float(now)
        timesteps = self._schedule().timesteps
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

    def encoded(self, encoding: Encoding) -> None:
        """Take note of what the pipeline's encoder returned."""
        if not encoding.in_call:
            return
        self._check_thread()
        if self.on_encoded is not None:
            self.on_encoded(encoding)
        self._encoded.append(encoding)

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of a call of the denoiser, whoever makes it."""
        here = threading.get_ident() == self._thread
        caller = None if is_dry_run() else calling_pipeline()
        if caller is self.pipe:
            self._check_thread()
            self._begin_own(args, kwargs)
        elif here:
            self._in_progress = False
            if caller is None and not is_dry_run():
                raise LocogenError(
                    "the denoiser is called by itself: within this context call the pipeline, pipe(…)"
                )

    def end(self) -> None:
        """Take note of the end of a call of the denoiser."""
        self._in_progress = False

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise LocogenError(
                "the pipeline is called in another thread than the one that opened this context: open the context "
                "in the thread that calls the pipeline, and give each thread a pipeline of its own"
            )

    def _begin_own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._in_progress = True
        self.given = kwargs
        self.made = {}
        self._timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        if self._encoded:
            self._begin_pictures()
        if self.encoding is None:
            raise LocogenError(
                "the pipeline's call began before this context was opened: open it before you call the pipeline"
            )
        self.rows = self._conditional_rows(self.encoding.returned[0])

    def _begin_pictures(self) -> None:
        """A new call of the pipeline, whose first call of the denoiser is the conditional one."""
        same = [one for one in self._encoded if one.returned[0] is self.states]
        self.encoding = same[0] if same else self._encoded[-1]
        self._others = [one for one in self._encoded if one is not self.encoding]
        self._encoded = []
        if self.on_prompts is not None:
            self.on_prompts(self.encoding)

    def _conditional_rows(self, prompts: Tensor) -> range:
        count = len(prompts)
        all_rows = len(self.states)
        if any(self.states is other.returned[0] for other in self._others):
            return range(0)
        if all_rows in (count, 2 * count):
            return range(all_rows - count, all_rows)
        raise LocogenError(
            f"the denoiser is called with {all_rows} rows for {count} encoded prompts: unknown rows"
        )


@contextmanager
def on_denoiser(
    pipe: Any, hooks_for: Callable[[Call], Iterable[Hook]], label: str | None = None
) -> Iterator[Call]:
    """Follow the denoiser's calls with hooks that act in the pipeline's own calls alone.

    Args:
        pipe: The pipeline. Other pipelines that share its denoiser are left alone.
        hooks_for: Returns the hooks, on modules of the denoiser, for the `Call` that they may look at.
        label: What makes the pictures others than the plain pipeline's, for their key; None: nothing does.

    Yields:
        The `Call`.

    Raises:
        LocogenError: The pipeline is called in another thread, its denoiser by itself, a hooked module was
            exchanged, or a hook did not fire though the call ought to have run its module.
    """
    family = family_of(pipe)
    call = Call(pipe, family)
    watch = _Watch(call, denoiser_of(pipe, family), list(hooks_for(call)))
    modules = [hook.module for hook in watch.hooks]
    with ExitStack() as stack:

        def begins(in_call: bool) -> None:
            # Somebody may have compiled the denoiser since the context was opened.
            held = getattr(pipe, family.denoiser)
            if in_call and is_compiled(held):
                stack.enter_context(running_uncompiled(held, modules))

        stack.enter_context(running_uncompiled(getattr(pipe, family.denoiser), modules))
        stack.enter_context(following_text(pipe, Follower(begins, call.encoded)))
        stack.enter_context(hooked(watch.hooks))
        if label is not None:
            stack.enter_context(announced(pipe, label))
        yield call
        if call.is_awaited:
            raise LocogenError(
                "the pipeline was called, and its denoiser ran past the hooks of this context (or not at all): "
                f"the {family.denoiser} must be the one that was there when the context was opened"
            )


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
    with on_denoiser(pipe, lambda call: ()) as call:
        yield call


class _Watch:
    """Has hooks act in a pipeline's own calls, and counts that all of them did."""

    def __init__(self, call: Call, denoiser: Any, hooks: list[Hook]) -> None:
        self.call = call
        self.denoiser = denoiser
        names = {module: name for name, module in denoiser.named_modules()}
        self.names = {hook: names[hook.module] for hook in hooks}
        self.fired: set[str] = set()
        self.hooks = [
            before(denoiser, self._begin, "the denoiser"),
            *(self._counted(hook) for hook in hooks),
            after(denoiser, self._end, "the denoiser"),
        ]

    def _counted(self, hook: Hook) -> Hook:
        def function(module: Any, *call: Any) -> Any:
            if not self.call.in_progress:
                return None
            self.fired.add(hook.label)
            return hook.function(module, *call)

        return replace(hook, function=function)

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call.begin(args, kwargs)
        if not self.call.in_progress:
            return
        self.fired.clear()
        for hook, name in self.names.items():
            if _submodule(self.denoiser, name) is not hook.module:
                raise LocogenError(
                    f"{hook.label} was exchanged while a locogen context was open: {REMEDY}"
                )

    def _end(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self.call.in_progress:
            return
        skipped = skipped_blocks(self.call.given)
        for hook, name in self.names.items():
            if hook.label not in self.fired and not name.startswith(skipped):
                raise LocogenError(
                    f"{hook.label} was not called, so nothing could be changed or read there: {REMEDY}"
                )
        self.call.end()


def _submodule(model: Any, name: str) -> Any | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


# --- which contexts are open ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Announcement:
    label: str
    pipe: Any  # the pipeline whose pictures it changes; None: those of all that share the denoiser


_ACTIVE: WeakKeyDictionary[Any, list[_Announcement]] = WeakKeyDictionary()


@contextmanager
def announced(pipe: Any, label: str, *, all_pipelines: bool = False) -> Iterator[None]:
    """Remember an open context, so that the picture store can tell its pictures from the plain model's.

    Args:
        pipe: The pipeline.
        label: What the context does, with all that makes a difference.
        all_pipelines: Whether it changes the pictures of every pipeline that shares the denoiser.
    """
    announcement = _Announcement(label, None if all_pipelines else pipe)
    announcements = _ACTIVE.setdefault(denoiser_of(pipe), [])
    announcements.append(announcement)
    try:
        yield
    finally:
        announcements.remove(announcement)


def active_contexts(pipe: Any) -> tuple[str, ...]:
    """What is in force on the pipeline now, outermost first: part of what makes a picture."""
    announcements = _ACTIVE.get(denoiser_of(pipe), ())
    return tuple(one.label for one in announcements if one.pipe in (None, pipe))
