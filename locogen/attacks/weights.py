"""Contexts in which a denoiser has other weights, at once or from a step on; then its old ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from locogen.interventions.denoiser_calls import announced
from locogen.interventions.steps import DenoisingSteps
from locogen.models.families import denoiser_of, family_of
from locogen.models.hooks import before, hooked, is_dry_run
from locogen.models.layers import find_layers
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]


def text_names(pipe: Pipeline, *, everything: bool = False) -> list[str]:
    """Names of the weights that read text: keys and values, or all of the layers that hold them."""
    family = family_of(pipe)
    modules: list[Any] = []
    for layer in find_layers(pipe):
        modules += [layer.module] if everything else family.matrices(layer.module).values()
    ids = {id(weight) for module in modules for weight in module.parameters()}
    named = denoiser_of(pipe).named_parameters()
    return [name for name, weight in named if id(weight) in ids]


def weights_now(pipe: Pipeline, names: list[str]) -> dict[str, Tensor]:
    """Copies of some weights of the denoiser as they are now."""
    by_name = dict(denoiser_of(pipe).named_parameters())
    return {name: by_name[name].detach().clone() for name in names}


def put(pipe: Pipeline, weights: Weights) -> None:
    """Copy values into weights of the denoiser, as long as they have the same shape."""
    import torch

    by_name = dict(denoiser_of(pipe).named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            by_name[name].copy_(value)


@contextmanager
def with_weights(pipe: Pipeline, weights: Weights) -> Iterator[None]:
    """Within the context the denoiser has these weights; after it, its own, bit for bit."""
    originals = weights_now(pipe, list(weights))
    try:
        put(pipe, weights)
        yield
    finally:
        put(pipe, originals)


@contextmanager
def with_weights_from(pipe: Pipeline, weights: Weights, step: int, label: str) -> Iterator[None]:
    """Within the context, each picture's denoising has other weights from a step on.

    Args:
        pipe: The pipeline.
        weights: The weights from that step on; before it the denoiser has its own.
        step: A denoising step, counted from 0.
        label: What the weights are, with all that makes a difference.
    """
    originals = weights_now(pipe, list(weights))
    steps = DenoisingSteps(pipe, family_of(pipe))
    is_late: list[bool] = [False]

    def switch(module: Module, args: Any, kwargs: Any) -> None:
        if is_dry_run():
            return
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        late = steps.at(timestep) >= step
        if late != is_late[0]:
            is_late[0] = late
            put(pipe, weights if late else originals)

    hook = before(denoiser_of(pipe), switch, "the denoiser")
    try:
        with hooked([hook]), announced(pipe, f"from step {step}: {label}"):
            yield
    finally:
        put(pipe, originals)
