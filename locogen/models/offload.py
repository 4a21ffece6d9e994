"""Where accelerate's offload keeps weights, and where it computes with them.

Its modules know neither by themselves: their weights lie on the meta device between calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.models.hooks import parts_of
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor


def computes_on(model: Any) -> Any:
    """The device that offload brings a model's weights to for its calls; None: not offloaded."""
    for module in model.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return device
    return None


def stands_on(model: Any) -> Any:
    """The device on which a model takes its inputs outside of a pipeline's call."""
    device = next(model.parameters()).device
    # On the meta device a weight has no values: offload brings them for the call.
    if device.type != "meta":
        return device
    return computes_on(model) or device


def resting_device(pipe: Pipeline) -> str:
    """The type of device where a pipeline's weights are between its calls; offloaded: "cpu".

    What works next to the pipeline, such as a scorer, belongs there: offload is for cards that have
    no room for more.
    """
    for part in pipe.components.values():
        if hasattr(part, "modules") and computes_on(part) is not None:
            return "cpu"
    return pipe.device.type


@contextmanager
def taken_back(*models: Any) -> Iterator[None]:
    """After the context, parts that model offload brought to the device for it are off it again.

    Within a pipeline's call each part makes room for the next one, and in the end all go. A part
    that runs by itself, outside of a call, would stay on the device next to whatever runs then.
    """
    from accelerate.hooks import CpuOffload

    brought = []
    parts = [part for model in models for part in parts_of(model)]
    for model in parts:
        for hook in _hooks(model):
            # Sequential offload has hooks of another class, and cleans up by itself.
            if not isinstance(hook, CpuOffload):
                continue
            # A part that is on the device already is in the middle of a call.
            if next(model.parameters()).device != hook.execution_device:
                brought.append((model, hook))
    try:
        yield
    finally:
        for model, hook in brought:
            hook.init_hook(model)


def weight_of(module: Module, path: str) -> Tensor:
    """A module's weight; if it is offloaded, from where offload keeps it."""
    return kept(module, "weight", path) if module.weight.is_meta else module.weight


def kept(module: Module, name: str, path: str) -> Tensor:
    """A weight on the meta device, from where offload keeps it; `path` is its full name.

    Raises:
        LocogenError: Nothing keeps it.
    """
    for hook in _hooks(module):
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            return weights[name]
    raise LocogenError(f"the weight {path} is on the meta device: load the model's weights first")


def _hooks(module: Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    # Several hooks are one, of accelerate's `SequentialHook`.
    yield from getattr(hook, "hooks", (hook,))
