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
_KOHYA = {"add_embedding.linear_1": "label_emb.0.0"}  # diffusers drops its own name for it, and says nothing


def write_edit(path: Path, told: Mapping[str, Any], changes: Mapping[str, LowRank]) -> None:
    """Factors as tensors, what is told of them as metadata."""
    from safetensors.torch import save_file

    # Keys and values share a factor, which the format refuses to hold twice.
    tensors = {f"{n}/{part}": getattr(c, part).contiguous().clone() for n, c in changes.items() for part in _PARTS}
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
        raise LocogenError(f"{path} is no edit of locogen's: give the file that Edit.save wrote") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LocogenError(f"{path} is cut short or damaged ({error}): save the edit again") from None


def write_lora(path: Path, name: str, changes: Mapping[str, LowRank], style: str, denoiser: str) -> None:
    """The changes as LoRA, in the names of diffusers (peft) or of kohya-style tools; factors balanced, in float32.

    All have one rank, padded with zeros: diffusers reads one alpha for all of a kohya-style file.
    """
    from safetensors.torch import save_file

    if style not in LORA_STYLES:
        raise LocogenError(f"style is {style!r}: take 'diffusers' or 'kohya'")
    balanced = {name: change.balanced() for name, change in changes.items()}
    rank = max(even.rank for even in balanced.values())
    tensors: dict[str, Tensor] = {}
    for key, even in balanced.items():
        tensors |= _lora_tensors(key.removesuffix(".weight"), even, rank, style, denoiser)
    _written(path, lambda partial: save_file(tensors, partial, {"format": "pt", "locogen": name}))


def _lora_tensors(module: str, change: LowRank, rank: int, style: str, denoiser: str) -> dict[str, Tensor]:
    import torch
    from torch.nn.functional import pad

    up = pad(change.up.float(), (0, rank - change.rank)).contiguous()  # (out, rank)
    down = pad(change.down.float(), (0, 0, 0, rank - change.rank)).contiguous()  # (rank, in)
    if style == "diffusers":
        return {f"{denoiser}.{module}.lora_B.weight": up, f"{denoiser}.{module}.lora_A.weight": down}
    stem = "lora_unet_" + _KOHYA.get(module, module).replace(".", "_")
    parts = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(float(rank))}
    return {f"{stem}.{part}": value for part, value in parts.items()}


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
