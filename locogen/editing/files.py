"""The files of an edit, as safetensors: its own format, and a LoRA that other tools load."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locogen.editing.closed_form import LowRank
from locogen.errors import LocogenError
from locogen.files import CannotWrite, write_whole

if TYPE_CHECKING:
    from torch import Tensor

LORA_STYLES = ("diffusers", "kohya")


def write_edit(path: Path, metadata: Mapping[str, Any], changes: Mapping[str, LowRank]) -> None:
    """Write factors as tensors, everything else as metadata."""
    tensors: dict[str, Tensor] = {}
    for name, change in changes.items():
        # Keys and values share a factor, which the format refuses to hold twice.
        tensors[f"{name}/up"] = change.up.contiguous().clone()
        tensors[f"{name}/down"] = change.down.contiguous().clone()
    _write(path, tensors, {"locogen_edit": json.dumps(metadata)})


def read_edit(path: Path) -> tuple[dict[str, Any], dict[str, LowRank]]:
    """What `write_edit` wrote: metadata and changes.

    Raises:
        LocogenError: There is no such file, or it is cut short or from another program.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    changes: dict[str, LowRank] = {}
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["locogen_edit"])
            for key in file.keys():  # noqa: SIM118
                tensors[key] = file.get_tensor(key)
        for key in tensors:
            name = key.rpartition("/")[0]
            changes[name] = LowRank(tensors[f"{name}/up"], tensors[f"{name}/down"])
    except FileNotFoundError:
        raise LocogenError(f"there is no edit {path}: give the file that Edit.save wrote") from None
    except KeyError:
        raise LocogenError(
            f"{path} is not an edit that locogen saved: give the file that Edit.save wrote"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LocogenError(
            f"{path} is cut short or damaged ({error}): save the edit again"
        ) from None
    return metadata, changes


def write_recorded(
    path: Path, kind: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors with a record of what they are: the file of an attack, or of a steering.

    Raises:
        LocogenError: The file cannot be written there.
    """
    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    _write(path, values, {f"locogen {kind}": json.dumps(record)})


def read_recorded(path: Path, kind: str, format: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_recorded` wrote: the record and the tensors.

    Raises:
        LocogenError: There is no such file, or it is from another program or a later format.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), framework="pt") as file:
            record = json.loads((file.metadata() or {})[f"locogen {kind}"])
            for name in file.keys():  # noqa: SIM118
                tensors[name] = file.get_tensor(name)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise LocogenError(
            f"{path} is no {kind} that locogen saved ({type(error).__name__}): give the file that "
            "its save wrote"
        ) from error
    if record["format"] != format:
        raise LocogenError(
            f"{path} is of format {record['format']} of a {kind}, and this locogen reads format "
            f"{format}: load it with the locogen that saved it"
        )
    return record, tensors


def kilobytes(edit: Any) -> float | None:
    """Measure the file that an edit is kept in.

    Args:
        edit: An `Edit`, or anything else with its `save`.

    Returns:
        KB of 1024 bytes; None for what has no file.

    Example:
        >>> edit = fit_edit(load("mini"), concept("mini/neon"), layers=[12, 13])
        >>> 1 < kilobytes(edit) < 10_000
        True
        >>> kilobytes(()) is None
        True
    """
    if not hasattr(edit, "save"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edit.safetensors"
        edit.save(path)
        return path.stat().st_size / 1024


def write_lora(
    path: Path, name: str, changes: Mapping[str, LowRank], modules: Mapping[str, str], style: str
) -> None:
    """Write the changes as LoRA in float32, the factors of each balanced.

    Args:
        path: The file to write.
        name: Of the edit, for the file's metadata.
        changes: By the names of the weights.
        modules: For each weight the name that its module has in the file.
        style: "diffusers" or "kohya", which call the factors differently.

    Raises:
        LocogenError: An unknown style, or a place that cannot be written to.
    """
    if style not in LORA_STYLES:
        raise LocogenError(f"style is {style!r}: use 'diffusers' or 'kohya'")
    balanced = {weight: change.balanced() for weight, change in changes.items()}
    # All get one rank, padded with zeros: diffusers reads one alpha for all of a kohya-style file.
    rank = max(change.rank for change in balanced.values())
    tensors: dict[str, Tensor] = {}
    for weight, change in balanced.items():
        tensors |= _lora_tensors(modules[weight], change, rank, style)
    _write(path, tensors, {"format": "pt", "locogen": name})


def _lora_tensors(module: str, change: LowRank, rank: int, style: str) -> dict[str, Tensor]:
    import torch
    from torch.nn.functional import pad

    up = pad(change.up.float(), (0, rank - change.rank)).contiguous()  # (out, rank)
    down = pad(change.down.float(), (0, 0, 0, rank - change.rank)).contiguous()  # (rank, in)
    if style == "diffusers":
        return {f"{module}.lora_B.weight": up, f"{module}.lora_A.weight": down}
    alpha = torch.tensor(float(rank))  # kohya's scale is alpha / rank: 1
    return {
        f"{module}.lora_up.weight": up,
        f"{module}.lora_down.weight": down,
        f"{module}.alpha": alpha,
    }


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save

    try:
        write_whole(path, save(dict(tensors), dict(metadata)))
    except (OSError, CannotWrite) as error:
        reason = error.__cause__ or error  # the system's words, without advice about a study
        raise LocogenError(f"{path} cannot be written ({reason}): give another path") from None
