"""Follow a pipeline's own `encode_prompt`: what it was called with, and what it returned."""

from __future__ import annotations

import dis
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import update_wrapper
from inspect import signature
from types import FrameType
from typing import Any

from locogen.errors import LocogenError
from locogen.models.compilation import running_uncompiled
from locogen.models.hooks import Hook, hooked
from locogen.types import Module, Pipeline

COPIES = ("num_images_per_prompt", "num_videos_per_prompt")  # pictures of each prompt
_LOCK = threading.RLock()


# --- calls of pipelines --------------------------------------------------------------------------


@dataclass(frozen=True)
class PipelineCall:
    """A call `pipe(…)`, in progress or over, known by its frame in the stack of calls."""

    pipe: Pipeline
    frame: FrameType

    @property
    def raised(self) -> bool:
        """Whether the call has ended by an error; to be asked only of a call that is over."""
        # Nobody reports this: the error may have been caught. But the last thing that a frame did
        # was to return, or else to run what raised the error.
        last = self.frame.f_code.co_code[self.frame.f_lasti]
        return not dis.opname[last].startswith("RETURN")


def pipeline_call() -> PipelineCall | None:
    """The innermost call of a pipeline that is in progress in this thread; None outside of all.

    The stack of calls alone says so: neither the denoiser, nor the encoded text, nor the thread
    belongs to one pipeline.
    """
    from diffusers import DiffusionPipeline

    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            candidate = frame.f_locals.get("self")
            if isinstance(candidate, DiffusionPipeline):
                return PipelineCall(candidate, frame)
        frame = frame.f_back
    return None


def calling_pipeline() -> Any | None:
    """The pipeline whose call is in progress in this thread, the innermost; None outside of all."""
    call = pipeline_call()
    return None if call is None else call.pipe


# --- calls of `encode_prompt` --------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoding:
    """One call of a pipeline's `encode_prompt`.

    Attributes:
        arguments: The arguments by name, defaults included.
        returned: What it returned.
        encode: The pipeline's method itself, for other prompts with the same arguments.
        call: The call of the pipeline, `pipe(…)`, that made it; None if it was made outside of one.
    """

    arguments: dict[str, Any]
    returned: tuple[Any, ...]
    encode: Callable[..., tuple[Any, ...]]
    call: PipelineCall | None

    @property
    def prompts(self) -> list[str] | None:
        """The prompts, or None if the call brought their encoding instead."""
        if self.arguments.get("prompt_embeds") is not None:
            return None
        prompt = self.arguments.get("prompt")
        return [prompt] if isinstance(prompt, str) else prompt

    @property
    def pictures_per_prompt(self) -> int:
        """How many rows each prompt has in what was returned."""
        counts = [self.arguments.get(name) for name in COPIES]
        return next((count for count in counts if count), 1)

    def again(self, **changes: Any) -> tuple[Any, ...]:
        """What the pipeline returns for the same arguments but for some.

        Args:
            changes: Arguments to exchange; those that this pipeline does not have are left out.
        """
        accepted = {name: value for name, value in changes.items() if name in self.arguments}
        return self.encode(**_with_own_lists({**self.arguments, **accepted}))


@dataclass(frozen=True, eq=False)
class Follower:
    """What to call before each encoding, with whether `pipe(…)` makes it, and after it."""

    before: Callable[[bool], None]
    after: Callable[[Encoding], None]


class _FollowedMethod:
    """Stands in for a pipeline's `encode_prompt` while it is followed."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        self.encode_prompt = pipe.encode_prompt
        self.instance_attribute = vars(pipe).get("encode_prompt")
        self.followers: list[Follower] = []
        update_wrapper(self, self.encode_prompt)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = pipeline_call()
        if call is not None and call.pipe is not self.pipe:
            if type(call.pipe) is type(self.pipe):
                # A shallow copy of the pipeline took this along: it encodes by itself.
                return type(call.pipe).encode_prompt(call.pipe, *args, **kwargs)
            call = None  # another pipeline's, which encodes with this one

        followers = list(self.followers)  # a follower may open or leave contexts
        for follower in followers:
            follower.before(call is not None)
        arguments = _with_own_lists(self._by_name(args, kwargs))
        # The caller's lists stay as they are, to be used again.
        returned = self.encode_prompt(*map(_copied, args), **_with_own_lists(kwargs))
        encoding = Encoding(arguments, returned, self.encode_prompt, call)
        for follower in followers:
            follower.after(encoding)
        return returned

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call by their names in the pipeline's class, defaults included."""
        bound = signature(type(self.pipe).encode_prompt).bind(self.pipe, *args, **kwargs)
        bound.apply_defaults()
        by_name = dict(bound.arguments)
        del by_name["self"]
        return {**by_name.pop("kwargs", {}), **by_name}

    def __reduce__(self) -> Any:
        """A copied pipeline gets the plain method, which is not followed."""
        return _itself, (self.encode_prompt,)


def brought_encoding(call: PipelineCall) -> Encoding | None:
    """The text that a call brought as `prompt_embeds` alone; None if it brought prompts.

    Z-Image's pipeline does not call its `encode_prompt` for it. To be asked within the call.
    """
    variables = call.frame.f_locals
    if variables.get("prompt") is not None or variables.get("prompt_embeds") is None:
        return None
    method = call.pipe.encode_prompt
    if isinstance(method, _FollowedMethod):
        method = method.encode_prompt
    bound = signature(type(call.pipe).encode_prompt).bind_partial(call.pipe)
    bound.apply_defaults()
    arguments = dict.fromkeys(signature(type(call.pipe).encode_prompt).parameters)
    arguments |= bound.arguments
    arguments |= {name: variables[name] for name in arguments if name in variables}
    del arguments["self"]
    returned = (variables["prompt_embeds"], variables.get("negative_prompt_embeds"))
    return Encoding(arguments, returned, method, call)


def _with_own_lists(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with copies of lists: Z-Image's pipeline writes its template into the prompts'."""
    return {name: _copied(value) for name, value in arguments.items()}


def _copied(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def _itself(method: Any) -> Any:
    return method


@contextmanager
def following_text(pipe: Pipeline, follower: Follower) -> Iterator[None]:
    """Within the context, call the follower around every call of the pipeline's `encode_prompt`.

    Contexts may be left in any order: the last one puts the pipeline's own method back.

    Args:
        pipe: The pipeline.
        follower: What to call before and after.
    """
    with _LOCK:
        method = vars(pipe).get("encode_prompt")
        # A copied pipeline may hold the stand-in of the one that it was copied from.
        if not isinstance(method, _FollowedMethod) or method.pipe is not pipe:
            method = _FollowedMethod(pipe)
            pipe.encode_prompt = method
        method.followers.append(follower)
    try:
        yield
    finally:
        with _LOCK:
            method.followers.remove(follower)
            # The user may have set another method in the meantime, which stays.
            still_there = vars(pipe).get("encode_prompt") is method
            if still_there and not method.followers:
                _put_back(pipe, method.instance_attribute)


def _put_back(pipe: Pipeline, instance_attribute: Any) -> None:
    if instance_attribute is None:
        del pipe.encode_prompt
    else:
        pipe.encode_prompt = instance_attribute


@contextmanager
def on_text_encoders(
    pipe: Pipeline, encoders: Mapping[str, Any], hooks: Sequence[Hook]
) -> Iterator[None]:
    """Within the context, hooks on text encoders act while this pipeline encodes in this thread.

    Args:
        pipe: The pipeline. Others that share its encoders are left alone.
        encoders: The text encoders by name.
        hooks: On modules of the encoders.

    Raises:
        LocogenError: A hook did not fire when prompts were encoded.
    """
    counted = _CountedInEncoders(hooks)
    modules = [hook.module for hook in hooks]
    with ExitStack() as stack:
        for name in encoders:
            stack.enter_context(running_uncompiled(getattr(pipe, name), modules))
        stack.enter_context(following_text(pipe, Follower(counted.begin, counted.end)))
        stack.enter_context(hooked(counted.hooks))
        yield


class _CountedInEncoders:
    """Has hooks act while a pipeline encodes prompts, and counts that all of them did."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = [self._counted(hook) for hook in hooks]
        self.thread = threading.get_ident()
        self.is_encoding = False
        self.fired: set[str] = set()

    def begin(self, in_call: bool) -> None:
        if threading.get_ident() == self.thread:
            self.is_encoding = True
            self.fired.clear()

    def end(self, encoding: Encoding) -> None:
        if threading.get_ident() != self.thread:
            return
        self.is_encoding = False
        missing = [hook.label for hook in self.hooks if hook.label not in self.fired]
        if missing and encoding.prompts is not None:
            raise LocogenError(
                f"{missing[0]} was not called when prompts were encoded, so nothing could be "
                "changed there: load adapters and replace modules before you open the context"
            )

    def _counted(self, hook: Hook) -> Hook:
        def function(module: Module, *call: Any) -> Any:
            if not self.is_encoding or threading.get_ident() != self.thread:
                return None
            self.fired.add(hook.label)
            return hook.function(module, *call)

        return replace(hook, function=function)
