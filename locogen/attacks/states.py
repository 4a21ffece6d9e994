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


def closed_form_map(old: list[Tensor], new: list[Tensor], ridge: float) -> Tensor:
    """Which change of a state makes edited matrices say of it what the old ones said.

    It is RECE's equation (Gong et al. 2024, arXiv 2407.12383) with the change, not the state
    itself, kept small, so that without an edit nothing changes: over d, for a state c, minimize

        Σ ‖W' (c + d) - W c‖² + λ ‖d‖²,   d = (λ I + Σ W'ᵀ W')⁻¹ Σ W'ᵀ (W - W') c

    with λ = ridge times the mean of the diagonal of Σ W'ᵀ W'.

    Args:
        old: The matrices W before the edit, (out, width) each.
        new: The matrices W' after it.
        ridge: How much the state is held, above 0.

    Returns:
        The matrix D of d = D c, (width, width).
    """
    import torch

    first = new[0]
    width = first.shape[1]
    moment = torch.zeros(width, width, dtype=first.dtype, device=first.device)
    pull = torch.zeros_like(moment)  # (width, width)
    for before, behind in zip(old, new, strict=True):
        moment += behind.T @ behind
        pull += behind.T @ (before - behind)
    held = ridge * moment.trace() / width * torch.eye(width).to(moment)
    return torch.linalg.solve(moment + held, pull)  # (width, width)
