"""Compiled parts of a model, and how to run them uncompiled for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from locogen.types import Module

_COMPILED_NAMES = ("forward", "_compiled_call_impl")  # where a module may have compiled code
_LOCK = threading.RLock()


@dataclass(eq=False)
class _Suspended:
    """A module whose compiled code is put aside: by how many contexts, and how to put it back."""

    contexts: int
    put_back: Callable[[], None]


_SUSPENDED: WeakKeyDictionary[Any, _Suspended] = WeakKeyDictionary()


def uncompiled_module(module: Module) -> Any:
    """The module that `torch.compile(module)` wraps; any other module is its own.

    Args:
        module: A module, compiled or not.
    """
    return module._orig_mod if _is_wrapper(module) else module


def is_compiled(model: Any) -> bool:
    """Whether a module, or any part of it, is compiled.

    So it is, too, within contexts that put its compiled code aside.

    Args:
        model: A denoiser, an encoder, or any other component of a pipeline.
    """
    if not hasattr(model, "modules"):
        return False
    return any(module in _SUSPENDED or _has_compiled_code(module) for module in model.modules())


@contextmanager
def running_uncompiled(model: Any, modules: Iterable[Any]) -> Iterator[None]:
    """Within the context, run some modules, and all that contain them, without their compiled code.

    Compiled code was made of the hooks that there were when it was traced: dynamo does not look
    whether hooks have come or gone since (PyTorch issue 117758). What contains no hook keeps its
    compiled code.

    Args:
        model: The denoiser or encoder that contains the modules, as the pipeline holds it.
        modules: The modules that hooks are registered on.
    """
    inside = set(modules)
    with ExitStack() as stack:
        for part in model.modules():
            may_skip_hooks = _has_compiled_code(part) or part in _SUSPENDED
            if may_skip_hooks and not inside.isdisjoint(part.modules()):
                stack.enter_context(_suspended(part))
        yield


@contextmanager
def _suspended(module: Module) -> Iterator[None]:
    """Contexts may be left in any order, in several threads: the last one puts the code back."""
    with _LOCK:
        suspended = _SUSPENDED.setdefault(module, _Suspended(0, lambda: None))
        suspended.contexts += 1
        # The user may compile a module anew within a context: then that code is put back.
        if _has_compiled_code(module):
            suspended.put_back = _take_out(module)
    try:
        yield
    finally:
        with _LOCK:
            suspended.contexts -= 1
            if not suspended.contexts:
                del _SUSPENDED[module]
                suspended.put_back()


def _is_wrapper(module: Module) -> bool:
    """Whether this is what `torch.compile(module)` returns."""
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def _has_compiled_code(module: Module) -> bool:
    forward = vars(module).get("forward")
    if _is_wrapper(module):
        return forward != module._orig_mod.__call__
    # `module.compile()` sets the first, `module.forward = torch.compile(module.forward)` the
    # second.
    has_compiled_call = getattr(module, "_compiled_call_impl", None) is not None
    return has_compiled_call or hasattr(forward, "_torchdynamo_orig_callable")


def _take_out(module: Module) -> Callable[[], None]:
    """Have the module run as it was written; returns what puts the compiled code back."""
    compiled = {name: vars(module)[name] for name in _COMPILED_NAMES if name in vars(module)}
    if _is_wrapper(module):
        module.forward = module._orig_mod.__call__
    else:
        module._compiled_call_impl = None
        if "forward" in compiled:
            module.forward = getattr(
                compiled["forward"], "_torchdynamo_orig_callable", compiled["forward"]
            )

    def put_back() -> None:
        for name, code in compiled.items():
            setattr(module, name, code)

    return put_back
