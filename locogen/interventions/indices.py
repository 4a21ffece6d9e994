"""Indices that hooks reach into tensors with, kept where the tensors are."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def index_on(device: Any, places: Iterable[int]) -> Tensor:
    """The places as a tensor on the device, (places,), copied there once.

    A list as an index is copied to the device each time, and the processor waits for it: in a hook
    that is once a layer and a denoising step, which leaves a graphics card idle.

    Args:
        device: Where the tensor is that the index reaches into.
        places: Rows, tokens or channels, counted from 0.

    Returns:
        The index. It is shared: do not write to it.
    """
    return _copied(device, tuple(places))


@lru_cache(maxsize=1024)
def _copied(device: Any, places: tuple[int, ...]) -> Tensor:
    import torch

    with torch.inference_mode(mode=False):  # or it would be of no use outside of that mode
        return torch.tensor(places, dtype=torch.long, device=device)
