"""The files of an edit: its own, and a LoRA that other tools load; safetensors, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locogen.editing.closed_form import LowRank
from locogen.errors import LocogenError

if TYPE_CHECKING:
    from torch import Tensor

LORA_STYLES = ("diffusers", "kohya")
_PARTS = ("up", "down")


def write_edit(path: Path, told: Mapping[str, Any], changes: Mapping[str, LowRank]) -> None:
    """Factors as tensors, what is told of them as metadata."""
    from safetensors.torch import save_file

    # Keys and values share a factor, which the format refuses to hold twice.
    tensors = {
        f"{n}/{part}": getattr(c, part).contiguous().clone()
        for n, c in changes.items()
        for part in _PARTS
    }
    _written(path, lambda partial: save_file(tensors, partial, {"locogen_edit": json.dumps(told)}))


def read_edit(path: Path) -> tuple[dict[str, Any], dict[str, LowRank]]:
    """What `write_edit` wrote. Raises `LocogenError` for a file that is not there, cut short, or another's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {})["locogen_edit"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
        return told, {n: LowRank(*(tensors[f"{n}/{part}"] for part in _PARTS)) for n in names}
    except FileNotFoundError:
        raise LocogenError(f"there is no edit {path}: give the file that Edit.save wrote") from None
    except KeyError:
        raise LocogenError(
            f"{path} is no edit of locogen's: give the file that Edit.save wrote"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LocogenError(
            f"{path} is cut short or damaged ({error}): save the edit again"
        ) from None


def write_lora(
    path: Path, name: str, changes: Mapping[str, LowRank], modules: Mapping[str, str], style: str
) -> None:
    """The changes as LoRA in float32, the factors of each balanced.

    All have one rank, padded with zeros: diffusers reads one alpha for all of a kohya-style file.

    Args:
        path: The file to write.
        name: Of the edit, for the file's metadata.
        changes: By the names of the weights.
        modules: For each weight the name that its module has in the file.
        style: "diffusers" or "kohya", which call the factors differently.

    Raises:
        LocogenError: An unknown style, or a place that cannot be written to.
    """
    from safetensors.torch import save_file

    if style not in LORA_STYLES:
        raise LocogenError(f"style is {style!r}: use 'diffusers' or 'kohya'")
    balanced = {weight: change.balanced() for weight, change in changes.items()}
    rank = max(change.rank for change in balanced.values())
    tensors: dict[str, Tensor] = {}
    for weight, change in balanced.items():
        tensors |= _lora_tensors(modules[weight], change, rank, style)
    _written(path, lambda partial: save_file(tensors, partial, {"format": "pt", "locogen": name}))


def _lora_tensors(module: str, change: LowRank, rank: int, style: str) -> dict[str, Tensor]:
    import torch
    from torch.nn.functional import pad

    up = pad(change.up.float(), (0, rank - change.rank)).contiguous()  # (out, rank)
    down = pad(change.down.float(), (0, 0, 0, rank - change.rank)).contiguous()  # (rank, in)
    if style == "diffusers":
        return {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}
    alpha = torch.tensor(float(rank))  # kohya's scale is alpha / rank
    return {
        f"{module}.lora_up.weight": up,
        f"{module}.lora_down.weight": down,
        f"{module}.alpha": alpha,
    }


def _written(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all."""
    from safetensors import SafetensorError

    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise LocogenError(f"{path} cannot be written ({error}): give another place") from None
    finally:
        partial.unlink(missing_ok=True)
