"""Hooks on modules: registered here alone, each acting only on its own module."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from weakref import ref

from locogen.errors import LocogenError
from locogen.models.compilation import running_uncompiled
from locogen.types import Module

_dry_run: ContextVar[bool] = ContextVar("a dry run is in progress", default=False)


@dataclass(frozen=True, eq=False)
class Hook:
    """What is to run before or after a module.

    Attributes:
        module: The module.
        function: Takes (module, args, kwargs), and the output as a fourth where it runs after the
            module. Returns the changed (args, kwargs) or output, or None to leave them.
        label: What error messages call it. Of hooks with one label, one has to fire in each call.
        runs_after: Whether it runs after the module.
    """

    module: Module
    function: Callable[..., Any]
    label: str
    runs_after: bool = False


class DenoisersInTurn:
    """Denoisers of one pipeline that take the steps in turn, seen as one (Wan 2.2).

    Names of modules and weights begin with the part's. A hook on it is one on each part. A dry run
    calls its parts in their order; else only the pipeline knows which one has its turn.

    Attributes:
        names: What the pipeline calls its parts, in the order of their turns.
    """

    def __init__(self, parts: Mapping[str, Module]) -> None:
        self.names = tuple(parts)
        # Weakly: what is remembered of a denoiser must not keep it.
        self._parts = {name: ref(part) for name, part in parts.items()}

    @property
    def parts(self) -> dict[str, Module]:
        """The denoisers by their names, in the order of their turns."""
        return {name: part() for name, part in self._parts.items()}

    @property
    def config(self) -> Any:
        """The first one's; they differ in their weights."""
        return next(iter(self.parts.values())).config

    @property
    def dtype(self) -> Any:
        """The first one's, in which the pipeline gives text to both."""
        return next(iter(self.parts.values())).dtype

    @property
    def device(self) -> Any:
        """The first one's."""
        return next(iter(self.parts.values())).device

    def part_of(self, name: str) -> Module:
        """The denoiser that holds a module or weight of this name."""
        return self.parts[name.partition(".")[0]]

    def named_modules(self) -> Iterator[tuple[str, Module]]:
        """All modules, itself first, under the name of no part."""
        yield "", self
        for name, part in self.parts.items():
            for path, module in part.named_modules():
                yield f"{name}.{path}".rstrip("."), module

    def modules(self) -> Iterator[Module]:
        """The modules of all parts."""
        for part in self.parts.values():
            yield from part.modules()

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """The weights of all parts."""
        for name, part in self.parts.items():
            for path, weight in part.named_parameters():
                yield f"{name}.{path}", weight

    def parameters(self) -> Iterator[Any]:
        """The weights of all parts."""
        for part in self.parts.values():
            yield from part.parameters()

    def get_parameter(self, name: str) -> Any:
        """A weight by its name; raises `AttributeError` if there is none."""
        return self.get_submodule(name.partition(".")[0]).get_parameter(name.partition(".")[2])

    def get_submodule(self, name: str) -> Module:
        """A module by its name; raises `AttributeError` if there is none."""
        if not name:
            return self
        part, _, path = name.partition(".")
        if part not in self.parts:
            raise AttributeError(f"there is no {part}")
        return self.parts[part].get_submodule(path)

    def __call__(self, *args: Any, **inputs: Any) -> None:
        """Run the parts in their order, in a dry run; raises `LocogenError` else."""
        if not is_dry_run():
            check_one_denoiser(self, "this")
        for part in self.parts.values():
            part(*args, **inputs)


def parts_of(model: Any) -> tuple[Any, ...]:
    """The modules that a pipeline calls: of denoisers that take turns each, else the model."""
    return tuple(model.parts.values()) if isinstance(model, DenoisersInTurn) else (model,)


def check_one_denoiser(denoiser: Any, what: str) -> None:
    """Raise `LocogenError` for denoisers that take turns, where `what` calls one by itself."""
    if isinstance(denoiser, DenoisersInTurn):
        raise LocogenError(
            f"this pipeline has denoisers that take turns, {' and '.join(denoiser.names)}, and "
            f"{what} calls a denoiser by itself, not knowing whose turn it is: use loco.localize, "
            "loco.intervene and loco.fit_edit, which follow the pipeline's calls"
        )


def part_of(model: Any, name: str) -> Any:
    """The denoiser that holds a module of this name: the model, or one of those in turn."""
    return model.part_of(name) if isinstance(model, DenoisersInTurn) else model


def before(module: Module, function: Callable[..., Any], label: str) -> Hook:
    """A hook that runs before the module: see `Hook`."""
    return Hook(module, function, label)


def after(module: Module, function: Callable[..., Any], label: str) -> Hook:
    """A hook that runs after the module: see `Hook`."""
    return Hook(module, function, label, runs_after=True)


class Registered:
    """What stands in a module's table of hooks; a copy of it acts on nothing."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook

    def __call__(self, module: Module, *call: Any) -> Any:
        """Run the hook; raises `LocogenError` for a module that is not its own."""
        if module is not self.hook.module:
            raise LocogenError(_copied(self.hook.label))
        return self.hook.function(module, *call)

    def __reduce__(self) -> Any:
        """In a copied or pickled module: `foreign_hooks` names the copy."""
        return CopiedHook, (self.hook.label,)


class CopiedHook:
    """What stands in the table of hooks of a module that was copied while a context was open."""

    def __init__(self, label: str) -> None:
        self.label = label

    def __call__(self, *call: Any) -> Any:
        """Raises `LocogenError`, always."""
        raise LocogenError(_copied(self.label))


def _copied(label: str) -> str:
    return (
        f"the hook on {label} was copied together with its model, within a locogen context: leave "
        "the context before you copy the pipeline"
    )


# --- the arguments of a call ---------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _names_by_place(kind: type) -> tuple[str, ...]:
    """The names of the arguments that a module of this class takes by their place."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]  # without `self`
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(one.name for one in parameters if one.kind in by_place)


def named_arguments(
    module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of a module's call by name, also those that came by their place."""
    return {**dict(zip(_names_by_place(type(module)), args, strict=False)), **kwargs}


def with_arguments(
    module: Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's call with other values for some arguments, each given as it was before."""
    names = _names_by_place(type(module))
    by_place = list(args)
    by_name = dict(kwargs)
    for name, value in changes.items():
        if name in names[: len(args)]:
            by_place[names.index(name)] = value
        else:
            by_name[name] = value
    return tuple(by_place), by_name


@contextmanager
def hooked(hooks: Iterable[Hook]) -> Iterator[None]:
    """Within the context, the hooks are in force.

    Args:
        hooks: Those of one module fire in the order in which they are listed.
    """
    handles = []
    try:
        for hook in hooks:  # within `try`: an error here takes the first ones off again
            for part in parts_of(hook.module):
                handles.append(_register(replace(hook, module=part)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(hook: Hook) -> Any:
    if hook.runs_after:
        return hook.module.register_forward_hook(Registered(hook), with_kwargs=True)
    return hook.module.register_forward_pre_hook(Registered(hook), with_kwargs=True)


def observed_calls(
    model: Any, modules: Iterable[Any], run: Callable[[], Any]
) -> Mapping[Any, Mapping[str, Any]]:
    """The modules that a dry run calls, by first call, each with its arguments by name.

    Contexts that are open on the model let a dry run pass.

    Args:
        model: The denoiser or encoder that contains the modules.
        modules: The modules to observe.
        run: The dry run. It computes no gradients.
    """
    import torch

    thread = threading.get_ident()
    calls: dict[Any, Mapping[str, Any]] = {}

    def note(module: Module, args: Any, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:  # another thread may use the same model
            calls.setdefault(module, named_arguments(module, args, kwargs))

    hooks = [before(module, note, "a module of a dry run") for module in dict.fromkeys(modules)]
    with running_uncompiled(model, [hook.module for hook in hooks]), hooked(hooks):
        earlier = _dry_run.set(True)
        try:
            with torch.no_grad():
                run()
        finally:
            _dry_run.reset(earlier)
    return calls


def is_dry_run() -> bool:
    """Whether `observed_calls` is running a model now, in this thread."""
    return _dry_run.get()
