"""A denoiser, each of whose layers gets a text of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from locogen.models.layers import Layer


@contextmanager
def texts_by_layer(layers: Sequence[Layer], states: Tensor, indices: Tensor) -> Iterator[None]:
    """Within the context, each layer gets its own encoder states, in every row of a batch.

    Args:
        layers: All layers of the denoiser.
        states: Encoder states of distinct captions, (captions, tokens, width).
        indices: Which of them a row's layer gets, (rows, layers).
    """
    handles = []

    def hook_for(index: int) -> Any:
        def replace_text(module: Any, args: Any, kwargs: Any) -> Any:
            text = states[indices[:, index]]  # (rows, tokens, width)
            return args, kwargs | {"encoder_hidden_states": text}

        return replace_text

    try:
        for layer in layers:
            handles.append(
                layer.module.register_forward_pre_hook(hook_for(layer.index), with_kwargs=True)
            )
        yield
    finally:
        for handle in handles:
            handle.remove()
