"""Follow the denoiser's calls: whose rows each holds, which step it is, whether all hooks fired."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError
from locogen.interventions.encoding import (
    Encoding,
    Follower,
    brought_encoding,
    calling_pipeline,
    following_text,
    pipeline_call,
)
from locogen.interventions.steps import DenoisingSteps
from locogen.models.compilation import is_compiled, running_uncompiled
from locogen.models.denoisers import check_call, skipped_blocks
from locogen.models.families import Family, denoiser_of, family_of, held_denoisers
from locogen.models.hooks import (
    DenoisersInTurn,
    Hook,
    after,
    before,
    hooked,
    is_dry_run,
    named_arguments,
    parts_of,
)
from locogen.models.layers import Layer, possible_layers
from locogen.models.text import PromptEncoding
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

_bare_calls: ContextVar[bool] = ContextVar("trainings call the denoiser", default=False)
REMEDY = (
    "leave the context, unfuse projections (pipe.unfuse_qkv_projections()), load adapters and "
    "replace modules, and then open the context again"
)


# Which rows of a call of the denoiser are the prompts', where no pipeline's encoder says so: the
# same in each call; a function of the arguments by name; or the prompts as they were encoded, whose
# rows are those that hold them.
Rows = range | Callable[[Mapping[str, Any]], range] | PromptEncoding


class Call:
    """The denoiser's call in progress: its arguments, its conditional rows, its step.

    Which rows are conditional is known from what the pipeline's encoder returned, a row a picture:
    the call's rows are those, or those behind an equal number of negative ones. It is never guessed
    from the number of rows alone, since twice as many may mean guidance or two pictures a prompt,
    and some pipelines (DeepFloyd IF, PixArt) say nowhere which. FLUX guides by a second call for
    the negative states, which has no conditional rows.

    A call belongs to the pipeline, and to the thread that opened the context: other pipelines may
    share the denoiser, and call it in between or at the same time.

    Attributes:
        denoiser: The module that is called: of denoisers that take turns, the one whose turn it is.
        arguments: The arguments that the denoiser is called with, by name.
        rows: The conditional rows.
        cache: What was computed once for this call, by name.
        on_encoded: Called with each encoding within `pipe(…)`, before the denoiser's first call.
        on_prompts: Called with the one among them that is the prompts'.
        on_brought: Called before the first step of a call that brought its prompts encoded.
        rows_of: Which rows are conditional, for calls that anybody may make: see `Rows`. None: the
            calls are the pipeline's own.
        keeps_prompts: Whether a call of the pipeline whose prompts are exchanged while it makes a
            picture, as a callback can, is refused.
    """

    def __init__(self, pipe: Pipeline, family: Family) -> None:
        self.pipe = pipe
        self.family = family
        self.denoiser = parts_of(denoiser_of(pipe, family))[0]
        self.arguments: dict[str, Any] = {}
        self.rows = range(0)
        self.cache: dict[str, Any] = {}
        self.on_encoded: Callable[[Encoding], None] | None = None
        self.on_prompts: Callable[[Encoding], None] | None = None
        self.on_brought: Callable[[], None] | None = None
        self.rows_of: Rows | None = None
        # Whether a call had rows that `rows_of` names; None before the first call.
        self._had_rows: bool | None = None
        self.keeps_prompts = False
        self._thread = threading.get_ident()
        self._opened_within = pipeline_call()
        self._in_progress = False
        self._waiting: list[Encoding] = []  # made within `pipe(…)`, before its first denoiser call
        # Of the pictures in the making. Not the encodings: their frames would keep all that a call
        # has computed.
        self._prompts: Tensor | None = None  # (pictures, tokens, width)
        self._rows_of_prompts: Any = None  # the same as the encoder returned it
        self._negatives: list[Tensor] = []
        self._first_text: Tensor | None = None  # conditional rows of the first denoiser call
        self._checked_states: list[Tensor] = []  # what the denoiser got with that text
        self._of_masks: list[tuple[Any, dict[str, Any]]] = []
        self._timestep: Any = None
        self._is_bare = False  # the call in progress is of the denoiser alone, see `bare_calls`
        self._steps = DenoisingSteps(pipe, family)

    @property
    def states(self) -> Tensor:
        """The encoded text that the denoiser is called with, (rows, tokens, width)."""
        text = self.arguments[self.family.text_argument]
        if not isinstance(text, list):
            return text
        if "text" not in self.cache:
            self.cache["text"] = self.family.encoding_of((text,)).states
        return self.cache["text"]

    def text_tokens(self, layer: Layer) -> slice:
        """Which tokens of what a layer's matrices read are text: all, unless the picture joins."""
        if not layer.joined:
            return slice(None)
        by_mask = self.of_mask()
        if "text_tokens" not in by_mask:
            tokens = self.family.joined_text(self.arguments, self.states.shape[1])
            by_mask["text_tokens"] = tokens
        return by_mask["text_tokens"]

    def of_mask(self) -> dict[str, Any]:
        """What was computed of this call's `joined_mask`; without one, of this call alone.

        Pipelines hand over one mask at all steps: to read from it once is to wait for the device
        once.
        """
        name = self.family.joined_mask
        if name is None:
            return self.cache
        mask = self.arguments[name]
        for earlier_mask, computed in self._of_masks:
            if earlier_mask is mask:
                return computed
        computed: dict[str, Any] = {}
        self._of_masks = [*self._of_masks[-1:], (mask, computed)]  # the prompts' and the negative's
        return computed

    def is_text(self, layer: Layer) -> Tensor | None:
        """Which of `text_tokens` are text, (rows, tokens, 1); None: all of them are, in every row.

        In Lumina 2 the picture follows where a row's own text ends.
        """
        if not layer.joined or self.family.joined_mask is None:
            return None
        mask = self.arguments[self.family.joined_mask].bool()  # (rows, all tokens of text)
        return mask[:, self.text_tokens(layer), None]

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
        """Whether the pipeline has encoded prompts, and has not called the denoiser since.

        A call of the pipeline that raised an error between the two is not waited for.
        """
        return any(not _raised(encoding) for encoding in self._waiting)

    @property
    def missed_prompts(self) -> bool:
        """Whether anybody called the denoiser, and never with rows that `rows_of` names."""
        return self._had_rows is False

    def step(self) -> int:
        """The denoising step of this call, counted from 0, as the scheduler's order says.

        Raises:
            LocogenError: The timestep is none of the scheduler's.
        """
        # Once in a call of the denoiser: timesteps may lie on a graphics card.
        if "step" not in self.cache:
            self.cache["step"] = self._steps.at(self._timestep)
        return self.cache["step"]

    def timesteps(self) -> list[float]:
        """The timesteps at which the denoising steps begin, one a step, in order."""
        return self._steps.begin()

    def progress_in(self, count: int) -> list[int]:
        """The part of the denoising that this call is in, of so many equal ones, counted from 0.

        One number, or one a row of a bare call.

        Raises:
            LocogenError: The timestep is none of the scheduler's.
        """
        # In whole numbers: 29 of 50 parts is 28.999… of them as a share times a count.
        if not self._is_bare:
            return [self.step() * count // len(self.timesteps())]
        last = self.pipe.scheduler.config.num_train_timesteps - 1
        times = self._timestep.flatten().expand(len(self.states)).tolist()
        return [int((last - time) * count // (last + 1)) for time in times]

    def encoded(self, encoding: Encoding) -> None:
        """Take note of what the pipeline's encoder returned."""
        if encoding.call is None:
            return
        self._check_thread()
        if self.on_encoded is not None:
            self.on_encoded(encoding)

        # An earlier call of the pipeline may have failed before it reached the denoiser, and its
        # error been caught.
        self._waiting = [
            one for one in self._waiting if one.call == encoding.call or not _raised(one)
        ]
        self._waiting.append(encoding)

    def begin(self, denoiser: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of a call of the denoiser, whichever pipeline makes it."""
        if is_dry_run():
            self._pause()
            return
        if threading.get_ident() == self._thread:
            self.denoiser = denoiser
        if self.rows_of is not None:
            self._begin_anybodys(args, kwargs)
            return
        caller = calling_pipeline()
        if caller is self.pipe:
            self._check_thread()
            self._begin_own(args, kwargs)
            return
        if not self._pause() or caller is not None:
            return
        if not _bare_calls.get():
            raise LocogenError(
                "the denoiser is called without its pipeline: within this context call pipe(…), "
                "or say by rows= which rows of your own calls are the prompts'"
            )
        self._take_arguments(args, kwargs, is_bare=True)
        self.rows = range(len(self.states))

    def end(self) -> None:
        """Take note of the end of a call of the denoiser."""
        self._in_progress = False

    def _pause(self) -> bool:
        """Let a call pass that is not this pipeline's; whether it is in this thread."""
        is_here = threading.get_ident() == self._thread
        if is_here:
            self._in_progress = False
        return is_here

    def _check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise LocogenError(
                "the pipeline is called in another thread than the one that opened this context: "
                "open the context in the thread that calls the pipeline, and give each thread its "
                "own pipeline"
            )

    def _take_arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_bare: bool = False
    ) -> None:
        self._in_progress = True
        self._is_bare = is_bare
        self.arguments = named_arguments(self.denoiser, args, kwargs)
        check_call(self.arguments)
        self.cache = {}
        self._timestep = self.arguments[self.family.time_argument]

    def _begin_anybodys(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call by a loop of one's own, by a modular pipeline, or by the pipeline itself."""
        self._check_thread()
        self._take_arguments(args, kwargs)
        self.rows = self._rows_by_argument()
        self._had_rows = self._had_rows or bool(self.rows)

    def _rows_by_argument(self) -> range:
        """The rows of this call that are the prompts', as the user says."""
        count = len(self.states)
        if isinstance(self.rows_of, PromptEncoding):
            return self._rows_that_hold(self.rows_of.states)
        rows = self.rows_of(self.arguments) if callable(self.rows_of) else self.rows_of
        if not isinstance(rows, range) or rows.step != 1 or not 0 <= rows.start <= rows.stop:
            raise LocogenError(f"rows is {rows!r}: give a range of rows of the denoiser's calls")
        if rows.stop > count:
            raise LocogenError(f"rows is {rows!r}, and the denoiser is called with {count} rows")
        return rows

    def _rows_that_hold(self, prompts: Tensor) -> range:
        """The rows of this call whose text these prompts are; none in a call for the negative."""
        import torch

        states = self.states
        count = len(prompts)
        places = [
            first
            for first in range(len(states) - count + 1)
            if states[first].shape == prompts[0].shape
            and torch.equal(states[first : first + count], prompts.to(states))
        ]
        if len(places) > 1:
            raise LocogenError(
                f"the denoiser is called with these prompts {len(places)} times, from rows "
                f"{', '.join(map(str, places))} on: say by rows=range(…) which of them are meant"
            )
        return range(places[0], places[0] + count) if places else range(0)

    def _begin_own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._take_arguments(args, kwargs)
        if not self._waiting and isinstance(self.arguments[self.family.text_argument], list):
            self._take_brought()
        if self._waiting:
            self._begin_pictures()
        if self._prompts is None:
            raise LocogenError(
                "the pipeline's call began before this context was opened: open it before you call "
                "the pipeline"
            )
        self.rows = self._conditional_rows(self._prompts)
        if self.keeps_prompts and self.rows:
            self._check_text()

    def _take_brought(self) -> None:
        """Take note of encoded prompts that a call was given, if its rows are not known ones.

        Z-Image's pipeline does not encode where it is given `prompt_embeds` alone.
        """
        if self._places_among(self._rows_of_prompts or ()):
            return  # a later step
        call = pipeline_call()
        encoding = None if call is None or call == self._opened_within else brought_encoding(call)
        if encoding is None:
            return
        if self.on_brought is not None:
            self.on_brought()
        prompts, negatives = encoding.returned
        _check_apart(prompts, negatives or ())
        self.encoded(encoding)

    def _begin_pictures(self) -> None:
        """A new call of the pipeline, whose first call of the denoiser is the conditional one."""
        # Of several encodings the prompts' is the one whose states arrive here as they were
        # returned: FLUX makes another for its negative prompt. With guidance they arrive joined to
        # the negative ones, as a new tensor: then the pipeline has made one encoding for both, the
        # last.
        prompts = self._waiting[-1]
        for encoding in self._waiting:
            if encoding.returned[0] is self.states:
                prompts = encoding
                break
        self._prompts = self.family.encoding_of(prompts.returned).states
        self._rows_of_prompts = prompts.returned[0]
        # Wan's one encoding returns both, for two calls.
        others = [one.returned[0] for one in self._waiting if one is not prompts]
        self._negatives = [*others, *(one for one in prompts.returned[1:] if hasattr(one, "dtype"))]
        self._waiting = []
        self._first_text = None
        self._checked_states = []
        if self.on_prompts is not None:
            self.on_prompts(prompts)

    def _check_text(self) -> None:
        """The conditional rows must be those of the pipeline call's first denoiser call."""
        import torch

        # Pipelines hand over one tensor at all steps, and SD 3's skipped layers get a second one.
        # Only where another comes are values compared: that waits for the device.
        # A list's rows are known by what they are: see `_rows_among`.
        is_list = isinstance(self._rows_of_prompts, list)
        if is_list or any(self.states is states for states in self._checked_states):
            return
        text = self.states[self.rows.start : self.rows.stop]  # (pictures, tokens, width)
        if self._first_text is None:
            self._first_text = text
        elif not torch.equal(text, self._first_text):
            raise LocogenError(
                f"the prompts were replaced at step {self.step()}, while the picture was made: "
                "within this context do not change prompt_embeds in callback_on_step_end"
            )
        self._checked_states = [*self._checked_states[:1], self.states]  # the first and the latest

    def _conditional_rows(self, prompts: Tensor) -> range:
        if self._is_negative(prompts):
            return range(0)
        count = len(prompts)
        all_rows = len(self.states)
        if isinstance(self._rows_of_prompts, list):
            return self._rows_among(self._rows_of_prompts)
        if all_rows in (count, 2 * count):
            return range(all_rows - count, all_rows)  # guidance puts the negative rows first
        raise LocogenError(
            f"the denoiser is called with {all_rows} rows for {count} encoded prompts, so it is "
            "unknown which rows are the prompts': call the pipeline with guidance or without, and "
            "nothing that adds rows"
        )

    def _rows_among(self, prompts: list[Any]) -> range:
        """The rows of a denoiser that is called with a list: those that the encoder returned."""
        called_with = self.arguments[self.family.text_argument]
        rows = self._places_among(prompts)
        if rows and rows[-1] - rows[0] + 1 == len(rows):
            return range(rows[0], rows[-1] + 1)
        raise LocogenError(
            f"the denoiser is called with {len(called_with)} rows, and it is unknown which of them "
            "are the prompts': call the pipeline with its own prompts"
        )

    def _places_among(self, prompts: Sequence[Any]) -> list[int]:
        """Which rows of a list that the denoiser is called with are these very tensors."""
        of_prompts = {id(row) for row in prompts}
        called_with = self.arguments[self.family.text_argument]
        return [place for place, row in enumerate(called_with) if id(row) in of_prompts]

    def _is_negative(self, prompts: Tensor) -> bool:
        """Whether the denoiser is called for a negative prompt alone."""
        import torch

        if any(self.states is negative for negative in self._negatives):
            return True
        if isinstance(self._rows_of_prompts, list):
            return False
        if self.states.dtype == prompts.dtype:
            return False
        # Wan's pipeline makes other tensors of both, in the type of its denoiser.
        equal = [
            one.shape == self.states.shape and torch.equal(one.to(self.states), self.states)
            for one in (*self._negatives, prompts)
        ]
        if equal[-1] and any(equal[:-1]):
            raise LocogenError(
                "prompt and negative prompt are the same text, so it is unknown which call of the "
                "denoiser is which: call the pipeline without guidance"
            )
        return any(equal[:-1])


@contextmanager
def bare_calls() -> Iterator[None]:
    """Within the context, others act in calls of the denoiser without its pipeline as well.

    Trainings make them. All their rows count as the prompts', and each has a timestep of its own,
    of those that the model was trained on.
    """
    earlier = _bare_calls.set(True)
    try:
        yield
    finally:
        _bare_calls.reset(earlier)


def _check_apart(prompts: Sequence[Any], negatives: Sequence[Any]) -> None:
    if {id(row) for row in prompts} & {id(row) for row in negatives}:
        raise LocogenError(
            "prompt_embeds and negative_prompt_embeds hold the same tensors, so it is unknown "
            "which rows of the denoiser's call are the prompts': give copies (.clone())"
        )


def _raised(encoding: Encoding) -> bool:
    """Whether the pipeline's call that made the encoding has ended by an error."""
    return encoding.call is not None and encoding.call.raised


@contextmanager
def on_denoiser(
    pipe: Pipeline,
    hooks_for: Callable[[Call], Iterable[Hook]],
    label: str | None = None,
    rows: Rows | None = None,
) -> Iterator[Call]:
    """Follow the denoiser's calls with hooks that act in the pipeline's own calls alone.

    Args:
        pipe: The pipeline. Other pipelines that share its denoiser are left alone.
        hooks_for: Returns the hooks, on modules of the denoiser, for the `Call` that they may look
            at.
        label: What makes the pictures differ from the plain pipeline's, for their key; None if
            nothing does.
        rows: Which rows of a call are conditional; then anybody's calls in this thread count.

    Yields:
        The `Call`.

    Raises:
        LocogenError: Nobody says which rows are the prompts', the pipeline is called in another
            thread, its denoiser by itself, a hooked module was exchanged, a layer was added, or a
            hook did not fire though the call ought to have run its module.
    """
    family = family_of(pipe)
    _check_rows_are_known(pipe, rows)
    denoiser = denoiser_of(pipe, family)
    call = Call(pipe, family)
    call.rows_of = rows
    guard = _FiringGuard(denoiser, hooks_for(call))

    def begin(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call.begin(module, args, kwargs)
        if call.in_progress:
            guard.begin()

    def end(module: Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if call.in_progress:
            guard.check_fired((*skipped_blocks(call.arguments), *guard.names_of_others(module)))
            call.end()

    # Hooks of one module fire in this order: `begin` must know the call before any other hook looks
    # at it.
    hooks = [
        before(denoiser, begin, "the denoiser"),
        *(guard.counted(hook, while_=lambda: call.in_progress) for hook in guard.hooks),
        after(denoiser, end, "the denoiser"),
    ]
    modules = [module for hook in hooks for module in parts_of(hook.module)]
    with ExitStack() as stack:
        # Compiled code passes hooks by, so that it is put aside before they are registered.
        for current in held_denoisers(pipe, family).values():
            stack.enter_context(running_uncompiled(current, modules))
        if rows is None:
            before_encoding = _before_encoding(pipe, guard, modules, stack)
            call.on_brought = guard.check_none_was_added
            stack.enter_context(following_text(pipe, Follower(before_encoding, call.encoded)))
        stack.enter_context(hooked(hooks))
        if label is not None:
            stack.enter_context(announced(pipe, label))
        yield call
        _check_prompts_came(call)


def _check_prompts_came(call: Call) -> None:
    """What was called must have reached the denoiser, with the prompts."""
    if call.missed_prompts:
        raise LocogenError(
            "no call of the denoiser held the prompts that rows= gives, so nothing was changed "
            "or read: give encoded prompts to the bit as your loop hands them over, or a range "
            "that is not empty in every call"
        )
    if call.is_awaited:
        raise LocogenError(
            "the pipeline was called, but its denoiser did not run, or without the hooks of "
            f"this context: replace the {call.family.denoiser} before you open the context, not "
            "within it"
        )


def _check_rows_are_known(pipe: Pipeline, rows: Rows | None) -> None:
    """Whose rows a call holds is known from the pipeline's encoder, if it has one, or said."""
    if rows is None and not hasattr(
        pipe, "encode_prompt"
    ):  # a modular pipeline, or a denoiser by itself
        raise LocogenError(
            f"{type(pipe).__name__} has no encode_prompt, from which it would be known whose rows "
            "a call of the denoiser holds: say by rows= which of them are the prompts'"
        )


def _before_encoding(
    pipe: Pipeline, guard: _FiringGuard, modules: Sequence[Module], stack: ExitStack
) -> Callable[[bool], None]:
    """What is done when the pipeline begins to encode: the denoiser may be another one by then."""

    def before_encoding(in_call: bool) -> None:
        if not in_call:
            return
        # Somebody may have compiled the denoiser since the context was opened.
        for current in held_denoisers(pipe, family_of(pipe)).values():
            if is_compiled(current):
                stack.enter_context(running_uncompiled(current, modules))
        guard.check_turns(denoiser_of(pipe))
        guard.check_none_was_added()

    return before_encoding


@contextmanager
def following(pipe: Pipeline, family: Family) -> Iterator[Call]:
    """Within the context, know each call of the pipeline's denoiser: see `Call`."""
    with on_denoiser(pipe, lambda call: ()) as call:
        yield call


class _FiringGuard:
    """Refuses a call that did not fire every hook: nothing was changed or read there."""

    def __init__(self, denoiser: Module, hooks: Iterable[Hook]) -> None:
        names = {module: name for name, module in denoiser.named_modules()}
        self.denoiser = denoiser
        self.names = {hook: names[hook.module] for hook in hooks}
        self.fired: set[str] = set()
        self.layers_at_opening = possible_layers(denoiser)

    @property
    def hooks(self) -> Iterable[Hook]:
        """Those that are to fire."""
        return self.names

    def counted(self, hook: Hook, while_: Callable[[], bool]) -> Hook:
        """The hook, acting while the condition holds, and then counted."""

        def function(module: Module, *call: Any) -> Any:
            if not while_():
                return None
            self.fired.add(hook.label)
            return hook.function(module, *call)

        return replace(hook, function=function)

    def names_of_others(self, part: Module) -> tuple[str, ...]:
        """How the names of modules begin that a call of one denoiser does not run: the others'."""
        if not isinstance(self.denoiser, DenoisersInTurn):
            return ()
        others = [name for name, one in self.denoiser.parts.items() if one is not part]
        return tuple(f"{name}." for name in others)

    def check_turns(self, denoiser: Any) -> None:
        """Of denoisers that take turns, each must still be there: the others would hide it."""
        if isinstance(self.denoiser, DenoisersInTurn) and denoiser is not self.denoiser:
            raise LocogenError(
                f"{' or '.join(self.denoiser.names)} was replaced while a locogen context was "
                "open: replace it before you open the context"
            )

    def check_none_was_added(self) -> None:
        """A layer that was added has no hook: nothing would be changed or read there."""
        if not self.names:
            return
        # Once in a call of the pipeline: to list a large denoiser's modules takes milliseconds. A
        # dry run would tell layers from self-attention, but would also fire hooks of copied blocks.
        layers = possible_layers(self.denoiser)
        new_modules = layers.keys() - self.layers_at_opening.keys()
        # `torch.compile` renames a module that was there; an exchanged one has the old name.
        new_names = {layers[module] for module in new_modules}
        added = sorted(new_names.difference(self.layers_at_opening.values()))
        if added:
            raise LocogenError(
                f"{' and '.join(added)} was added to the {type(self.denoiser).__name__} while a "
                f"locogen context was open: {REMEDY}"
            )

    def begin(self) -> None:
        """Count anew, for another call; the hooked modules must still be there."""
        self.fired.clear()
        for hook, name in self.names.items():
            if _submodule(self.denoiser, name) is not hook.module:
                raise LocogenError(
                    f"{hook.label} was replaced while a locogen context was open: {REMEDY}"
                )

    def check_fired(self, skipped: tuple[str, ...]) -> None:
        """All must have fired, except in blocks that the call skipped."""
        for hook, name in self.names.items():
            if hook.label not in self.fired and not name.startswith(skipped):
                raise LocogenError(
                    f"{hook.label} was not called, so nothing could be changed or read there: "
                    f"{REMEDY}"
                )


def _submodule(model: Any, name: str) -> Any | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


# --- which contexts are open ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Announcement:
    label: str
    pipe: Pipeline  # whose pictures it changes; None: those of all that share the denoiser


_ACTIVE: WeakKeyDictionary[Any, list[_Announcement]] = WeakKeyDictionary()


@contextmanager
def announced(pipe: Pipeline, label: str, *, all_pipelines: bool = False) -> Iterator[None]:
    """Remember an open context, so that the store keys its pictures apart from the plain model's.

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


def active_contexts(pipe: Pipeline) -> tuple[str, ...]:
    """What is in force on the pipeline now, outermost first: part of what makes a picture."""
    announcements = _ACTIVE.get(denoiser_of(pipe), ())
    return tuple(one.label for one in announcements if one.pipe in (None, pipe))
