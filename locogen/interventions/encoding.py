"""Listen to a pipeline's own `encode_prompt`: what it was called with, and what it returned."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import update_wrapper
from inspect import signature
from typing import Any

from locogen.errors import LocogenError
from locogen.models.compilation import running_uncompiled
from locogen.models.hooks import Hook, hooked

_LOCK = threading.RLock()


@dataclass(frozen=True, eq=False)
class Encoding:
    """One call of a pipeline's `encode_prompt`.

    Attributes:
        arguments: The arguments by name, defaults included.
        returned: What it returned.
        encode: The pipeline's method itself, for other prompts with the same arguments.
        in_call: Whether a call of the pipeline, `pipe(…)`, made it.
    """

    arguments: dict[str, Any]
    returned: tuple[Any, ...]
    encode: Callable[..., tuple[Any, ...]]
    in_call: bool

    @property
    def prompts(self) -> list[str] | None:
        """The prompts, or None where the call gave their encoding instead."""
        prompt = self.arguments.get("prompt")
        return [prompt] if isinstance(prompt, str) else prompt

    @property
    def pictures_per_prompt(self) -> int:
        """How many rows each prompt has in what was returned."""
        return self.arguments.get("num_images_per_prompt") or 1

    def again(self, **changes: Any) -> tuple[Any, ...]:
        """What the pipeline returns for the same arguments but for some.

        Args:
            changes: Arguments to exchange; those that this pipeline does not have are left out.
        """
        accepted = {name: value for name, value in changes.items() if name in self.arguments}
        return self.encode(**{**self.arguments, **accepted})


@dataclass(frozen=True, eq=False)
class Follower:
    """Who is to hear of each call: before it, with whether `pipe(…)` makes it, and after it."""

    begins: Callable[[bool], None]
    ends: Callable[[Encoding], None]


class _Listener:
    """Stands in for a pipeline's `encode_prompt` as long as anybody follows it."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.encode_prompt = pipe.encode_prompt
        self.instance_attribute = vars(pipe).get("encode_prompt")
        self.followers: list[Follower] = []
        update_wrapper(self, self.encode_prompt)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        caller = calling_pipeline()
        if caller is not None and caller is not self.pipe and type(caller) is type(self.pipe):
            # A shallow copy of the pipeline took this along: it encodes by itself.
            return type(caller).encode_prompt(caller, *args, **kwargs)
        followers = list(self.followers)
        in_call = caller is self.pipe
        for follower in followers:
            follower.begins(in_call)
        returned = self.encode_prompt(*args, **kwargs)
        arguments = self._by_name(args, kwargs)
        for follower in followers:
            follower.ends(Encoding(arguments, returned, self.encode_prompt, in_call))
        return returned

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call by their names in the pipeline's class, defaults included."""
        bound = signature(type(self.pipe).encode_prompt).bind(self.pipe, *args, **kwargs)
        bound.apply_defaults()
        by_name = dict(bound.arguments)
        del by_name["self"]
        return {**by_name.pop("kwargs", {}), **by_name}

    def __reduce__(self) -> Any:
        """A copied pipeline gets its own method, and nobody follows it."""
        return _itself, (self.encode_prompt,)


def _itself(method: Any) -> Any:
    return method


@contextmanager
def following_text(pipe: Any, follower: Follower) -> Iterator[None]:
    """Within the context, `follower` hears of every call of the pipeline's `encode_prompt`.

    Contexts may be left in any order: the last one puts the pipeline's own method back.

    Args:
        pipe: The pipeline.
        follower: What to call before and after.
    """
    with _LOCK:
        listener = vars(pipe).get("encode_prompt")
        if not isinstance(listener, _Listener) or listener.pipe is not pipe:
            listener = _Listener(pipe)
            pipe.encode_prompt = listener
        listener.followers.append(follower)
    try:
        yield
    finally:
        with _LOCK:
            listener.followers.remove(follower)
            still_there = vars(pipe).get("encode_prompt") is listener
            if still_there and not listener.followers:
                _put_back(pipe, listener.instance_attribute)


def _put_back(pipe: Any, instance_attribute: Any) -> None:
    if instance_attribute is None:
        del pipe.encode_prompt
    else:
        pipe.encode_prompt = instance_attribute


@contextmanager
def on_text_encoders(
    pipe: Any, encoders: Mapping[str, Any], hooks: Sequence[Hook]
) -> Iterator[None]:
    """Within the context, hooks on the text encoders act whenever this pipeline encodes prompts in this thread.

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
                f"{missing[0]} was not called when prompts were encoded, so nothing could be changed there: load "
                "adapters and exchange modules before you open the context"
            )

    def _counted(self, hook: Hook) -> Hook:
        def function(module: Any, *call: Any) -> Any:
            if not self.is_encoding or threading.get_ident() != self.thread:
                return None
            self.fired.add(hook.label)
            return hook.function(module, *call)

        return replace(hook, function=function)


def calling_pipeline() -> Any | None:
    """The pipeline whose `__call__` is in progress in this thread, the innermost one; None outside of all.

    The stack of calls alone says so: neither the denoiser, nor the encoded text, nor the thread is one
    pipeline's own.
    """
    from diffusers import DiffusionPipeline

    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__":
            candidate = frame.f_locals.get("self")
            if isinstance(candidate, DiffusionPipeline):
                return candidate
        frame = frame.f_back
    return None
