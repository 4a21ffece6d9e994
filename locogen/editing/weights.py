"""Changes of a denoiser's weights that come off again: its originals are kept, and put back bit for bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.editing.closed_form import doubled
from locogen.errors import LocogenError
from locogen.models.offload import kept

if TYPE_CHECKING:
    from torch import Tensor

    from locogen.editing.closed_form import LowRank


@dataclass(frozen=True, eq=False)
class Patch:
    """Named changes of weights, made for weights with that `digest` (see `digest_of`), and of these types if known."""

    name: str
    changes: Mapping[str, LowRank]
    digest: str
    dtype: tuple[str, ...] = ()

    @cached_property
    def key(self) -> str:
        """What tells it from other patches: one read from a file is the one that was written to it."""
        factors = {f"{name} {part}": getattr(c, part) for name, c in self.changes.items() for part in ("up", "down")}
        return f"{self.digest} {digest_of(factors)}"


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


def weights_of(denoiser: Any, names: Iterable[str], *, under_lora: bool = False) -> dict[str, Tensor]:
    """Parameters by name. Raises `LocogenError` for one that is missing, fused, quantized, or wrapped by LoRA.

    `under_lora`: take the weight that LoRA wraps instead.
    """
    return {name: _weight_of(denoiser, name, under_lora) for name in names}


def _weight_of(denoiser: Any, name: str, under_lora: bool) -> Tensor:
    path = name.rpartition(".")[0]
    try:
        module = denoiser.get_submodule(path)
        parent = denoiser.get_submodule(path.rpartition(".")[0])
        wrapped = hasattr(module, "base_layer")
        owner = module.base_layer if wrapped else module
        weight = owner.weight
    except AttributeError:
        raise LocogenError(
            f"{type(denoiser).__name__} has no {name}: the edit was made for another model; refit it"
        ) from None
    if wrapped and not under_lora:
        raise LocogenError(
            f"{path} carries LoRA: fuse it for good (fuse_lora, then unload_lora_weights) or unload it first"
        )
    if "Fused" in type(getattr(parent, "processor", None)).__name__ and not under_lora:
        raise LocogenError(f"{path} is fused with its neighbors and not read: call pipe.unfuse_qkv_projections() first")
    if weight.is_meta:
        weight = kept(owner, "weight", name)
        if kept(owner, "weight", name) is not weight:  # written to, it would change nothing
            raise LocogenError(f"{name} is offloaded to the disk: load the model with another offload to edit it")
    if not weight.is_floating_point() or weight.ndim != 2:
        raise LocogenError(
            f"{name} is stored as {str(weight.dtype).removeprefix('torch.')} of shape {tuple(weight.shape)}: "
            "quantized weights cannot be edited in place; load the model unquantized, or use the edit as LoRA"
        )
    return weight


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

    Raises `LocogenError` when the patch is on already, when the weights are not those it was made for, and when they
    cannot hold the sum.
    """
    if not math.isfinite(strength):
        raise LocogenError(f"strength is {strength}: give a finite number")
    wardrobe = _KEPT.setdefault(denoiser, _Wardrobe())
    if is_on(denoiser, patch):
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
    _wear(denoiser, wardrobe, [*wardrobe.worn, _Worn(patch, float(strength), stacked)])


def is_on(denoiser: Any, patch: Patch) -> bool:
    """Whether the patch, or one that is equal to it, is on."""
    return any(worn.patch.key == patch.key for worn in _KEPT.get(denoiser, _Wardrobe()).worn)


def take_off(denoiser: Any, patch: Patch) -> None:
    """Remove a patch, or one that is equal to it. What no other patch changes gets its original bits back.

    Interrupted, it goes on to its end first. Raises `LocogenError` when the patch is not on, or when one put on later
    was made for its result.
    """
    wardrobe = _KEPT.get(denoiser, _Wardrobe())
    place = next((i for i, worn in enumerate(wardrobe.worn) if worn.patch.key == patch.key), None)
    if place is None:
        raise LocogenError(f"the edit of {patch.name!r} is not applied to this model: there is nothing to undo")
    over = [w.patch.name for w in wardrobe.worn[place + 1 :] if w.stacked and set(w.patch.changes) & set(patch.changes)]
    if over:
        raise LocogenError(f"{over[-1]!r} was fitted on top of {patch.name!r}: undo it first, last one first")
    _wear(denoiser, wardrobe, wardrobe.worn[:place] + wardrobe.worn[place + 1 :])


def take_all_off(denoiser: Any) -> None:
    """Remove every patch: all weights get their original bits back."""
    if denoiser in _KEPT:
        _wear(denoiser, _KEPT[denoiser], [])


def _wear(denoiser: Any, wardrobe: _Wardrobe, worn: list[_Worn]) -> None:
    """Set the weights to originals plus the sum of what is worn; what is interrupted ends with less worn, not more."""
    names = dict.fromkeys(name for w in (*wardrobe.worn, *worn) for name in w.patch.changes)
    adding = len(worn) > len(wardrobe.worn)
    now = weights_of(denoiser, names, under_lora=not adding)
    before = {name: weight.detach().clone() for name, weight in now.items()}
    originals = {name: wardrobe.originals.get(name, value) for name, value in before.items()}
    after = {name: _sum(originals[name], name, worn) for name in names}
    was, needed = (wardrobe.worn, wardrobe.originals), _needed(originals, worn)
    try:
        if adding:  # told before the first write: wherever an interrupt falls, undoing knows the originals
            wardrobe.originals = needed
            wardrobe.worn = worn
        _write(now, after)
        wardrobe.worn, wardrobe.originals = worn, needed
    except BaseException:
        _write_on(now, before if adding else after)
        wardrobe.worn, wardrobe.originals = was if adding else (worn, needed)
        raise


def _needed(originals: dict[str, Tensor], worn: list[_Worn]) -> dict[str, Tensor]:
    changed = {name for w in worn for name in w.patch.changes}
    return {name: value for name, value in originals.items() if name in changed}


def _write(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])


def _write_on(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write all of them, begun again when Ctrl-C is pressed once more: a model is never left half edited."""
    while True:
        try:
            return _write(weights, values)
        except KeyboardInterrupt:
            continue


def _sum(original: Tensor, name: str, worn: Iterable[_Worn]) -> Tensor:
    """The original plus all changes of that weight, added in float64 and rounded once; the very original for none."""
    changes = [(w.patch.changes[name], w.strength) for w in worn if name in w.patch.changes]
    if not changes:
        return original
    total = doubled(original)
    for change, strength in changes:
        total = total + strength * (change.up.to(total) @ change.down.to(total))
    total = total.to(original.dtype).to(original.device)
    if not total.isfinite().all():
        raise LocogenError(
            f"{name} cannot hold the edit in {str(total.dtype).removeprefix('torch.')}: it would overflow; take less "
            "strength, or load the model in float32"
        )
    return total


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
    made_for = f", {', '.join(patch.dtype)} where it was made," if patch.dtype else ","
    return (
        f"the edit of {patch.name!r} was made for other weights: names and shapes agree, but the bits of "
        f"{next(iter(weights))} and {len(weights) - 1} more, {', '.join(kinds)} here{made_for} do not{also}; make it "
        "anew with edit.refit(pipe)"
    )
