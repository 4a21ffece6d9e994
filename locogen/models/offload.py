"""Where accelerate's offload keeps weights and where it computes with them: its modules hold neither by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError

if TYPE_CHECKING:
    from torch import Tensor


def computes_on(model: Any) -> Any:
    """Where offload brings the weights of a model, or of a part, when they are needed; None where none is offloaded."""
    for module in model.modules():
        for hook in _hooks(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return device
    return None


def stands_on(model: Any) -> Any:
    """Where weights of a model, or of a part, are to meet their inputs outside of a pipeline's call."""
    device = next(model.parameters()).device
    return computes_on(model) or device if device.type == "meta" else device


def resting_device(pipe: Any) -> str:
    """The type of device where a pipeline's weights are between its calls: "cpu" where they are offloaded.

    Something that works beside the pipeline, such as a scorer, belongs there: offload is for cards that
    have no room for more.
    """
    offloaded = any(
        computes_on(part) is not None
        for part in pipe.components.values()
        if hasattr(part, "modules")
    )
    return "cpu" if offloaded else pipe.device.type


@contextmanager
def taken_back(*models: Any) -> Iterator[None]:
    """After the context, whole parts that model offload brought to the device for it are off the device again.

    Within a pipeline's call each part makes room for the next one, and in the end all go. A part that runs by
    itself, outside of a call, would stay beside whatever runs next.
    """
    from accelerate.hooks import CpuOffload

    brought = []
    for model in models:
        for hook in _hooks(model):
            # Sequential offload has hooks of another class; a part on the device is in the middle of a call.
            if (
                isinstance(hook, CpuOffload)
                and next(model.parameters()).device != hook.execution_device
            ):
                brought.append((model, hook))
    try:
        yield
    finally:
        for model, hook in brought:
            hook.init_hook(model)


def weight_of(module: Any, path: str) -> Tensor:
    """A module's weight, from where offload keeps it where it is not in the module itself."""
    return kept(module, "weight", path) if module.weight.is_meta else module.weight


def kept(module: Any, name: str, path: str) -> Tensor:
    """A weight on the meta device, `path` in all, from where offload keeps it; `LocogenError` where nothing does."""
    for one in _hooks(module):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            return weights[name]
    raise LocogenError(f"the weight {path} is on the meta device: load the model's weights first")


def _hooks(module: Any) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", (hook,))
