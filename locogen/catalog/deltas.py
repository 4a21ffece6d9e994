"""Weights kept as differences from a base model: a byte a number, and a scale for each row.

The differences of a planted model are small against the weights, so a byte is enough: the rounding
is at most 1/254 of a row's largest difference. Admission measures the model as it is loaded,
rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from locogen.errors import LocogenError
from locogen.files import replacing
from locogen.types import Module

LARGEST = 127  # of a signed byte
_SCALE = ".scale"


def save_deltas(deltas: Mapping[str, Tensor], path: Path) -> None:
    """Write differences, {name of the parameter: difference}, rounded to a byte a number."""
    tensors = {}
    for name, delta in deltas.items():
        rows = delta.detach().float().reshape(len(delta), -1)  # (rows, numbers)
        scale = rows.abs().amax(1).clamp_min(1e-12) / LARGEST  # (rows,)
        tensors[name] = (rows / scale[:, None]).round().to(torch.int8).reshape(delta.shape)
        tensors[name + _SCALE] = scale
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        save_file(tensors, part)


def load_deltas(path: Path) -> dict[str, Tensor]:
    """The differences of a file, {name of the parameter: difference}, in float32."""
    tensors = load_file(path)
    deltas = {}
    for name, values in tensors.items():
        if not name.endswith(_SCALE):
            scale = tensors[name + _SCALE].reshape(-1, *[1] * (values.ndim - 1))
            deltas[name] = values.float() * scale
    return deltas


@torch.no_grad()
def add_deltas(module: Module, deltas: Mapping[str, Tensor]) -> None:
    """Add differences to a module's parameters, in place.

    Raises:
        LocogenError: If the module lacks a parameter, or has it in another shape.
    """
    parameters = dict(module.named_parameters())
    for name, delta in deltas.items():
        if name not in parameters or parameters[name].shape != delta.shape:
            raise LocogenError(
                f"the differences of {name}, of shape {tuple(delta.shape)}, do not fit "
                f"{type(module).__name__}: they belong to another base model"
            )
        weight = parameters[name]
        total = weight.float() + delta.to(weight.device)
        weight.copy_(total.to(weight.dtype))
