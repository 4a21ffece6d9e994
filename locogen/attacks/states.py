"""Contexts that change what the layers get of a prompt: any states, whether text reaches them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from locogen.interventions.denoiser_calls import announced
from locogen.interventions.encoding import on_text_encoders
from locogen.models.families import family_of, text_encoders
from locogen.models.hooks import after
from locogen.models.layers import find_layers
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def changed_states(
    pipe: Pipeline, change: Callable[[Tensor], Tensor], label: str
) -> Iterator[None]:
    """Within the context, the states of every prompt but the empty one are changed.

    The empty prompt is what guidance leads away from.

    Args:
        pipe: The pipeline.
        change: States in, states out, (prompts, tokens, width).
        label: What it does, with all that makes a difference.
    """
    import torch

    tokenizer = pipe.tokenizer
    empty = tokenizer("", padding="max_length", truncation=True, return_tensors="pt").input_ids

    def hook(module: Module, args: Any, kwargs: Any, output: Any) -> Any:
        ids = args[0] if args else kwargs["input_ids"]  # (prompts, tokens)
        has_words = (ids != empty.to(ids)).any(1)  # (prompts,)
        states = output[0]  # (prompts, tokens, width)
        changed = copy.copy(output)
        new = torch.where(has_words[:, None, None], change(states), states)
        if isinstance(output, tuple):
            return (new, *output[1:])
        changed["last_hidden_state"] = new
        return changed

    encoders = text_encoders(pipe)
    hooks = [after(encoders["text_encoder"], hook, "the text encoder")]
    with on_text_encoders(pipe, encoders, hooks), announced(pipe, label):
        yield


def text_weights(pipe: Pipeline) -> list[Tensor]:
    """The key and value matrices of all layers as they are now, (out, width) each, in float64."""
    weights = []
    for layer in find_layers(pipe):
        for module in family_of(pipe).matrices(layer.module).values():
            weights.append(module.weight.detach().double().clone())
    return weights
