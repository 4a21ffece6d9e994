"""Where accelerate's offload keeps weights and where it computes with them: its modules hold neither by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError

if TYPE_CHECKING:
    from torch import Tensor


def computes_on(model: Any) -> Any:
    """Where offload brings the weights of a model, or of a part, when they are needed; None where none is offloaded."""
    found = (getattr(one, "execution_device", None) for module in model.modules() for one in _hooks(module))
    return next((device for device in found if device is not None), None)


def stands_on(model: Any) -> Any:
    """Where weights of a model, or of a part, are to meet their inputs outside of a pipeline's call."""
    device = next(model.parameters()).device
    return computes_on(model) or device if device.type == "meta" else device


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
