"""Changes of a denoiser's weights that come off again: its originals are kept, and put back bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError

if TYPE_CHECKING:
    from torch import Tensor

    from locogen.solve import LowRank


@dataclass(frozen=True, eq=False)
class Patch:
    """Named changes of weights, made for weights with that `digest` (see `digest_of`)."""

    name: str
    changes: Mapping[str, LowRank]
    digest: str


@dataclass(eq=False)
class _Worn:
    """A patch in force. `stacked`: made for weights that other patches had changed, so they must stay under it."""

    patch: Patch
    strength: float
    stacked: bool


@dataclass(eq=False)
class _Wardrobe:
    originals: dict[str, Tensor] = field(default_factory=dict)
    worn: list[_Worn] = field(default_factory=list)


_KEPT: WeakKeyDictionary[Any, _Wardrobe] = WeakKeyDictionary()


def weights_of(denoiser: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Parameters by name. Raises `LocogenError` for one that is missing, wrapped by LoRA, or quantized."""
    found = {}
    for name in names:
        module = name.rpartition(".")[0]
        try:
            wrapped, weight = hasattr(denoiser.get_submodule(module), "base_layer"), denoiser.get_parameter(name)
        except AttributeError:
            raise LocogenError(
                f"{type(denoiser).__name__} has no {name}: the edit was made for another model; refit it"
            ) from None
        if wrapped:
            raise LocogenError(
                f"{module} carries LoRA: fuse it for good (fuse_lora, then unload_lora_weights) or unload it first"
            )
        if not weight.is_floating_point() or weight.ndim != 2:
            raise LocogenError(
                f"{name} is stored as {str(weight.dtype).removeprefix('torch.')} of shape {tuple(weight.shape)}: "
                "quantized weights cannot be edited in place; load the model unquantized, or use the edit as LoRA"
            )
        found[name] = weight
    return found


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, types and bits."""
    import torch

    told = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        told.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        told.update(weight.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return told.hexdigest()[:16]


def put_on(denoiser: Any, patch: Patch, strength: float = 1.0) -> None:
    """Add a patch, `strength` times its change, to the weights; all of it or, whatever interrupts, nothing.

    Raises `LocogenError` when the patch is on already, and when the weights are not those it was made for.
    """
    wardrobe = _KEPT.setdefault(denoiser, _Wardrobe())
    if any(worn.patch is patch for worn in wardrobe.worn):
        raise LocogenError(f"the edit of {patch.name!r} is applied already: undo it first")
    now = weights_of(denoiser, patch.changes)
    _check_shapes(patch, now)
    first = {name: wardrobe.originals.get(name, weight) for name, weight in now.items()}
    if digest_of(first) == patch.digest:
        stacked = False
    elif digest_of(now) == patch.digest:
        stacked = True
    else:
        raise LocogenError(_stranger(patch, now, bool(wardrobe.worn)))
    fresh = {n: w.detach().clone() for n, w in now.items() if n not in wardrobe.originals}
    wardrobe.originals |= fresh
    _wear(denoiser, wardrobe, [*wardrobe.worn, _Worn(patch, float(strength), stacked)])


def take_off(denoiser: Any, patch: Patch) -> None:
    """Remove a patch. What no other patch changes gets its original bits back.

    Raises `LocogenError` when the patch is not on, or when one put on later was made for its result.
    """
    wardrobe = _KEPT.get(denoiser, _Wardrobe())
    place = next((i for i, worn in enumerate(wardrobe.worn) if worn.patch is patch), None)
    if place is None:
        raise LocogenError(f"the edit of {patch.name!r} is not applied to this model: there is nothing to undo")
    over = [w.patch.name for w in wardrobe.worn[place + 1 :] if w.stacked and set(w.patch.changes) & set(patch.changes)]
    if over:
        raise LocogenError(f"{over[-1]!r} was fitted on top of {patch.name!r}: undo it first, last one first")
    _wear(denoiser, wardrobe, [w for w in wardrobe.worn if w.patch is not patch])


def _wear(denoiser: Any, wardrobe: _Wardrobe, worn: list[_Worn]) -> None:
    """Set the weights to originals plus the sum of what is worn, all or none of them."""
    import torch

    names = dict.fromkeys(name for w in (*wardrobe.worn, *worn) for name in w.patch.changes)
    now = weights_of(denoiser, names)
    before = {name: weight.detach().clone() for name, weight in now.items()}
    after = {name: _sum(wardrobe.originals[name], name, worn) for name in names}
    try:
        with torch.no_grad():
            for name, weight in now.items():
                weight.copy_(after[name])
        wardrobe.worn = worn
    except BaseException:
        with torch.no_grad():
            for name, weight in now.items():
                weight.copy_(before[name])
        raise
    finally:
        still = {name for w in wardrobe.worn for name in w.patch.changes}
        wardrobe.originals = {name: value for name, value in wardrobe.originals.items() if name in still}


def _sum(original: Tensor, name: str, worn: Iterable[_Worn]) -> Tensor:
    """The original plus all changes of that weight, added in float64 and rounded once; the very original for none."""
    changes = [(w.patch.changes[name], w.strength) for w in worn if name in w.patch.changes]
    if not changes:
        return original
    total = original.double()
    for change, strength in changes:
        total = total + strength * (change.up.to(total) @ change.down.to(total))
    return total.to(original.dtype)


def _check_shapes(patch: Patch, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        made_for = (patch.changes[name].up.shape[0], patch.changes[name].down.shape[1])
        if tuple(weight.shape) != made_for:
            raise LocogenError(
                f"{name} is {tuple(weight.shape)} here, the edit of {patch.name!r} was made for {made_for}: refit it"
            )


def _stranger(patch: Patch, weights: Mapping[str, Tensor], busy: bool) -> str:
    kinds = sorted({str(w.dtype).removeprefix("torch.") for w in weights.values()})
    also = " (or other edits are in the way: undo them)" if busy else ""
    return (
        f"the edit of {patch.name!r} was made for other weights: names and shapes agree, but the bits of "
        f"{next(iter(weights))} and {len(weights) - 1} more, {', '.join(kinds)} here, do not{also}; make it anew with "
        "edit.refit(pipe)"
    )
