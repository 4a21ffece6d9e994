"""Edits in the weights of a denoiser: applied as a whole or not at all, and removed bit for bit.

Changing weights is a transaction. For each denoiser a frozen `_State` says which edits are applied,
what the weights were before the first of them (`originals`), and what was written last (`written`,
as hashes). Adding a change and subtracting it again would round twice; the originals are copied
back instead. That is right only while the weights still are what was written, so each write
compares first: a fused LoRA, training, or a conversion in between raises. Before pictures are made
of an edited model, `_oddities` compares as well, by cheaper checksums, and warns.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.editing.closed_form import to_float64
from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import active_contexts
from locogen.models.compilation import uncompiled_module
from locogen.models.families import denoiser_of
from locogen.models.offload import kept, weight_of
from locogen.pictures.checks import model_check
from locogen.pictures.fingerprint import Checksum, checksums
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from locogen.editing.closed_form import LowRank

COMPILED = "_orig_mod"  # the attribute under which torch.compile keeps the module that it wraps
# Cosine from which a LoRA and an edit count as the same change. Rounding lowers it by about 1e-6.
SAME_DIRECTION = 0.999
# How the labels of contexts begin that remove a concept without a change of weights.
AT_INFERENCE = ("steering ", "orthogonal values ", "clamp ")


@dataclass(frozen=True, eq=False)
class WeightChange:
    """Low-rank changes of weights that are applied and removed together.

    Attributes:
        name: For messages.
        changes: By the weights' names.
        digest: Of the weights that the changes were made for, see `digest_of`.
        dtype: The types of those weights, if known.
        hashed_as: The spelling in which a name entered the digest, where it is another one.
    """

    name: str
    changes: Mapping[str, LowRank]
    digest: str
    dtype: tuple[str, ...] = ()
    hashed_as: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """Equal for equal changes, such as one that was written to a file and read again."""
        factors: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            factors[f"{name} up"] = change.up
            factors[f"{name} down"] = change.down
        return f"{self.digest} {digest_of(factors)}"

    def was_made_for(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether these are, to the bit, the weights that the change was made for."""
        as_hashed = {self.hashed_as.get(name, name): weight for name, weight in weights.items()}
        return digest_of(as_hashed) == self.digest


@dataclass(frozen=True, eq=False)
class _Applied:
    """A change in force. `stacked`: it was made for weights that earlier changes had altered."""

    change: WeightChange
    strength: float
    stacked: bool


@dataclass(frozen=True, eq=False)
class _State:
    """The edits of one denoiser. Replaced as a whole, so that an interrupt never finds half of it.

    `originals`: edited weights as they were before any edit. `written`: digests of what was written
    last, by name. `checksums`: of the same, quicker to compare.
    """

    applied: tuple[_Applied, ...] = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    checksums: Mapping[str, Checksum] = field(default_factory=dict)


# By denoiser, without compiled wrappers. A copied denoiser is not in it: its weights are its own.
_STATES: WeakKeyDictionary[Any, _State] = WeakKeyDictionary()


def plain_name(name: str) -> str:
    """The name of a parameter or module without what `torch.compile` adds to it."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a weight is: its parent calls `module`, and `owner` holds the weight.

    The two differ where peft has put its own module around the one that it adapts.
    """

    name: str
    parent: Any
    module: Module
    owner: Any

    @property
    def path(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def carries_lora(self) -> bool:
        """Whether peft has put LoRA around the module."""
        return self.owner is not self.module

    @property
    def is_fused(self) -> bool:
        """Whether the parent computes with a joint copy of several matrices instead."""
        by_processor = "Fused" in type(getattr(self.parent, "processor", None)).__name__
        by_itself = hasattr(self.parent, "unfuse_projections") and self.parent.fused_projections
        return by_processor or bool(by_itself)


def _place(denoiser: Module, name: str) -> _Place | None:
    """Where the weight `name` is; None if the denoiser has no such weight."""
    path = name.rpartition(".")[0]
    try:
        module = denoiser.get_submodule(path)
        parent = denoiser.get_submodule(path.rpartition(".")[0])
    except AttributeError:
        return None
    owner = getattr(module, "base_layer", module)  # peft's name for the module that it adapts
    if not hasattr(owner, "weight"):
        return None
    return _Place(name, parent, module, owner)


def weights_of(denoiser: Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Weights by name, where they are stored: writing to them changes the model.

    Raises:
        LocogenError: A weight is missing, wrapped by LoRA, fused with others, quantized, stored in
            float8, or offloaded to the disk.
    """
    weights: dict[str, Tensor] = {}
    for name in names:
        place = _place(denoiser, name)
        if place is None:
            raise LocogenError(
                f"{type(uncompiled_module(denoiser)).__name__} has no {name}: the edit was fitted "
                "on another model; fit it again with edit.refit(pipe)"
            )
        if place.carries_lora:
            raise LocogenError(
                f"{place.path} has a LoRA: fuse it permanently (fuse_lora, then "
                "unload_lora_weights) or unload it first"
            )
        if place.is_fused:
            raise LocogenError(
                f"{place.path} is fused with its neighbors, so the model does not read it: call "
                "pipe.unfuse_qkv_projections() first"
            )
        weights[name] = _weight_at(place)
        _check_type(name, weights[name])
    return weights


def _weight_at(place: _Place) -> Tensor:
    """The weight where it is stored, so that writing to it changes the model."""
    weight = place.owner.weight
    if not weight.is_meta:
        return weight
    weight = kept(place.owner, "weight", place.name)
    # Offload to the disk reads a fresh copy each time: what is written to it would be lost.
    if kept(place.owner, "weight", place.name) is not weight:
        raise LocogenError(
            f"{place.name} is offloaded to the disk: to edit it, load the model with another "
            "offload"
        )
    return weight


def _check_type(name: str, weight: Tensor) -> None:
    stored_as = _type_name(weight)
    if stored_as.startswith("float8"):
        raise LocogenError(
            f"{name} is stored as {stored_as} (layerwise casting): an edit needs weights of 16 "
            "bits or more; load the model without enable_layerwise_casting, edit it there, and use "
            "the edit as LoRA here"
        )
    if not weight.is_floating_point() or weight.ndim != 2:
        raise LocogenError(
            f"{name} is stored as {stored_as} of shape {tuple(weight.shape)}: quantized weights "
            "cannot be edited in place; load the model unquantized, or use the edit as LoRA"
        )


def _type_name(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, types and bits."""
    import torch

    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        values = weight.detach().contiguous().cpu().reshape(-1)  # (out * in,)
        digest.update(values.view(torch.uint8).numpy().data)  # numpy does not know bfloat16
    return digest.hexdigest()[:16]


def _digests(weights: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: digest_of({name: weight}) for name, weight in weights.items()}


# --- applying and removing -----------------------------------------------------------------------


def apply_change(denoiser: Module, change: WeightChange, strength: float = 1.0) -> None:
    """Add a change, `strength` times, to the weights: all of it or, whatever interrupts, nothing.

    Raises:
        LocogenError: The change is applied already; the weights are not those it was made for,
            cannot hold the sum, or were changed by something else while another edit was applied.
    """
    if not math.isfinite(strength):
        raise LocogenError(f"strength is {strength}: give a finite number")
    denoiser = uncompiled_module(denoiser)
    state = _STATES.get(denoiser, _State())
    if is_applied(denoiser, change):
        raise LocogenError(f"the edit of {change.name!r} is applied already: undo it first")
    if _own_lora(denoiser, change):
        raise LocogenError(
            f"the LoRA of the edit of {change.name!r} is loaded, so the change would count twice: "
            "call pipe.unload_lora_weights() first, or use the LoRA alone"
        )
    weights = weights_of(denoiser, change.changes)
    _check_shapes(change, weights)
    _check_unchanged(state, weights)

    # A change was made for the original weights, or for what earlier edits made of them. Only in
    # the second case those edits must not be removed before it.
    originals = {name: state.originals.get(name, weight) for name, weight in weights.items()}
    stacked = not change.was_made_for(originals)
    if stacked and not change.was_made_for(weights):
        raise LocogenError(_made_for_others(change, weights, bool(state.applied)))
    _commit(denoiser, weights, (*state.applied, _Applied(change, float(strength), stacked)))


def is_applied(denoiser: Module, change: WeightChange) -> bool:
    """Whether the change, or one that is equal to it, is applied."""
    state = _STATES.get(uncompiled_module(denoiser), _State())
    return any(applied.change.key == change.key for applied in state.applied)


def refuse_edited(pipe: Pipeline, verb: str) -> None:
    """Refuse a model that is edited already, for a verb whose "before" is the model without edits.

    Args:
        pipe: The pipeline.
        verb: Who asks, such as "evaluate", for the message.

    Raises:
        LocogenError: An edit is applied, or the call is within one that holds at inference.
    """
    applied = _STATES.get(denoiser_of(pipe), _State()).applied
    if applied:
        edits = " + ".join(repr(one.change.name) for one in applied)
        raise LocogenError(
            f"the edit of {edits} is applied to this model, and {verb} applies edits itself: what "
            f"it calls unedited would be edited. Give {verb} the edit, and undo it first: "
            "edit.undo_(pipe), undo_all(pipe), or the end of its applied(pipe)"
        )
    within = [label for label in active_contexts(pipe) if label.startswith(AT_INFERENCE)]
    if within:
        raise LocogenError(
            f"{verb} is called within an edit that holds at inference ({within[0].split()[0]}), "
            f"and applies edits itself: call {verb} outside of that context and give it the edit"
        )


def remove_change(denoiser: Module, change: WeightChange) -> None:
    """Remove a change, or one that is equal to it; weights without edits get their bits back.

    Interrupted, it is finished first. Warns where LoRA has applied the same change a second time.

    Raises:
        LocogenError: The change is not applied, one that was applied later was made for its result,
            or something else has changed the weights since.
    """
    denoiser = uncompiled_module(denoiser)
    applied = _STATES.get(denoiser, _State()).applied
    keys = [one.change.key for one in applied]
    if change.key not in keys:
        raise LocogenError(
            f"the edit of {change.name!r} is not applied to this model, so it cannot be undone. A "
            "copy of an edited model keeps the edit: load the model again"
        )
    place = keys.index(change.key)
    for later in reversed(applied[place + 1 :]):
        if later.stacked and set(later.change.changes) & set(change.changes):
            raise LocogenError(
                f"{later.change.name!r} was fitted on top of {change.name!r}: undo the later edit "
                "first"
            )
    others = applied[:place] + applied[place + 1 :]
    _remove(denoiser, change.changes, others, overwrite=False)


def remove_all(denoiser: Module, *, overwrite: bool = False) -> bool:
    """Remove every change: all weights get their original bits back. Returns whether there was one.

    Args:
        denoiser: The denoiser.
        overwrite: Whether to do it also if something else has changed the weights since; its
            changes of these weights are lost.

    Raises:
        LocogenError: Something else has changed the weights, and `overwrite` is not set.
    """
    denoiser = uncompiled_module(denoiser)
    state = _STATES.get(denoiser, _State())
    if state.applied:
        _remove(denoiser, state.originals, (), overwrite=overwrite)
    return bool(state.applied)


def _remove(
    denoiser: Module, names: Iterable[str], remaining: tuple[_Applied, ...], *, overwrite: bool
) -> None:
    """Set these weights to what they are with only the `remaining` edits applied."""
    state = _STATES[denoiser]
    weights: dict[str, Tensor] = {}
    for name in names:
        place = _place(denoiser, name)
        if place is None:
            raise LocogenError(
                f"{name} was edited and is no longer in the model: load the model again"
            )
        if place.is_fused:
            raise LocogenError(
                f"the projections of {place.path} were fused while it was edited, and the fused "
                "copy holds the edit, so nothing was undone: call pipe.unfuse_qkv_projections(), "
                "then undo the edit"
            )
        weights[name] = _weight_at(place)  # LoRA around the weight leaves the weight itself alone
    if not overwrite:
        _check_unchanged(state, weights)
    for applied in state.applied:
        if applied not in remaining and _own_lora(denoiser, applied.change):
            warnings.warn(
                f"the edit of {applied.change.name!r} was applied twice, because its own LoRA is "
                "loaded as well: pictures made with both show the change twice. Use one of them",
                stacklevel=4,
            )
    _commit(denoiser, weights, remaining)


def _commit(denoiser: Module, weights: Mapping[str, Tensor], applied: tuple[_Applied, ...]) -> None:
    """Set these weights to originals plus the edits in `applied`, as a transaction.

    Interrupted while adding an edit, it goes back; while removing one, it goes forward: in the end
    there is less of an edit, never half of it.
    """
    state = _STATES.get(denoiser, _State())
    adding = len(applied) > len(state.applied)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    originals = {**before, **state.originals}
    after = {name: _sum(originals[name], name, applied) for name in weights}
    final = _next_state(state, applied, originals, after)
    try:
        # Adding: known before the first write, so that after an interrupt anywhere, undoing finds
        # the originals. Removing: known after the last write, when they are no longer needed.
        if adding:
            _STATES[denoiser] = final
        _write(weights, after)
        _STATES[denoiser] = final
    except BaseException:
        _write_to_the_end(weights, before if adding else after)
        _STATES[denoiser] = state if adding else final
        raise


def _next_state(
    state: _State,
    applied: tuple[_Applied, ...],
    originals: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> _State:
    """The state once `after` is written; weights that no edit changes any longer are forgotten."""
    digests = {**state.written, **_digests(after)}
    sums = {**state.checksums, **checksums(after)}
    edited: set[str] = set()
    for one in applied:
        edited |= set(one.change.changes)
    return _State(
        applied,
        originals={name: originals[name] for name in originals if name in edited},
        written={name: digests[name] for name in digests if name in edited},
        checksums={name: sums[name] for name in sums if name in edited},
    )


def _write(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(values[name])


def _write_to_the_end(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write all of them, from the start again when Ctrl-C is pressed once more.

    A model is never left half edited.
    """
    while True:
        try:
            return _write(weights, values)
        except KeyboardInterrupt:
            continue


def _sum(original: Tensor, name: str, applied: Iterable[_Applied]) -> Tensor:
    """The original plus all changes of that weight, added in float64 and rounded once, (out, in).

    Without a change of it, the original itself.
    """
    edits = [one for one in applied if name in one.change.changes]
    if not edits:
        return original
    total = to_float64(original)  # (out, in)
    for edit in edits:
        change = edit.change.changes[name]
        total = total + edit.strength * (change.up.to(total) @ change.down.to(total))  # (out, in)
    total = total.to(original.dtype).to(original.device)
    if not total.isfinite().all():
        raise LocogenError(
            f"the edit makes {name} overflow in {_type_name(total)}: use less strength, or load "
            "the model in float32"
        )
    return total


# --- checks --------------------------------------------------------------------------------------


def _check_unchanged(state: _State, weights: Mapping[str, Tensor]) -> None:
    """Raise where an edited weight is not what was written: restoring would mix two models."""
    edited = {name: weight for name, weight in weights.items() if name in state.written}
    digests = _digests(edited)
    changed = [name for name in digests if digests[name] != state.written[name]]
    if not changed:
        return
    first = changed[0]
    more = f" and {len(changed) - 1} more weights" if len(changed) > 1 else ""
    edits = " + ".join(
        repr(one.change.name) for one in state.applied if first in one.change.changes
    )
    raise LocogenError(
        f"{first}{more} changed while the edit of {edits} was applied "
        f"({_difference(state, first, weights[first])}). Nothing is undone, because putting the "
        "old weights back would mix two models. Revert what changed them and undo the edit "
        "again, or call undo_all(pipe, overwrite=True): it restores the weights from before the "
        "edit over the change. If other weights changed too, load the model again"
    )


def _difference(state: _State, name: str, weight: Tensor) -> str:
    """What may have changed a weight, in words."""
    original = state.originals[name]
    if weight.dtype != original.dtype:
        return f"{_type_name(original)} is now {_type_name(weight)}"
    if weight.shape != original.shape:
        return f"another layer of shape {tuple(weight.shape)} is in its place"
    return "a LoRA was fused or unfused, the model was trained, or other weights were loaded"


def _own_lora(denoiser: Module, change: WeightChange) -> bool:
    """Whether LoRA is loaded that is the change itself, at any scale, on one of its weights."""
    for name, factors in change.changes.items():
        place = _place(denoiser, name)
        if place is None or not place.carries_lora:
            continue
        delta = to_float64(factors.change.detach())  # (out, in)
        for lora in _lora_deltas(place.module):
            if lora.shape != delta.shape:
                continue
            cosine = (lora * delta).sum() / (lora.norm() * delta.norm()).clamp_min(1e-300)
            if abs(float(cosine)) > SAME_DIRECTION:
                return True
    return False


def _lora_deltas(module: Module) -> Iterator[Tensor]:
    """What each active adapter of peft's adds to a weight, without its scale, (out, in)."""
    for adapter in _active_lora(module):
        up = to_float64(module.lora_B[adapter].weight.detach())  # (out, rank)
        down = to_float64(module.lora_A[adapter].weight.detach())  # (rank, in)
        yield up @ down


def _active_lora(module: Module) -> list[str]:
    """The names of peft's LoRA adapters that take part in a module's calls."""
    if getattr(module, "disable_adapters", False):
        return []
    lora = getattr(module, "lora_A", {})  # other kinds of adapters have none
    return [name for name in getattr(module, "active_adapters", ()) if name in lora]


@model_check
def _oddities(pipe: Pipeline) -> Iterator[str]:
    """What else changes the edited matrices of a pipeline whose pictures are to be made."""
    denoiser = denoiser_of(pipe)
    state = _STATES.get(denoiser, _State())
    for applied in state.applied:
        change = applied.change
        if _own_lora(denoiser, change):
            yield (
                f"the edit of {change.name!r} is applied, and its own LoRA is loaded as well: the "
                "change counts twice in these pictures. Undo the edit, or call "
                "pipe.unload_lora_weights()"
            )
            continue
        adapted = _with_lora(denoiser, change)
        if adapted:
            yield (
                f"the edit of {change.name!r} is applied, and LoRA on {len(adapted)} of the same "
                f"matrices too (the first is {adapted[0]}): these pictures show both. For the edit "
                "alone call pipe.disable_lora()"
            )

    changed = _changed_since(denoiser, state)
    if changed:
        more = f" and {len(changed) - 1} more weights" if len(changed) > 1 else ""
        edits = " + ".join(repr(applied.change.name) for applied in state.applied)
        yield (
            f"{changed[0]}{more} changed while the edit of {edits} was applied: these pictures are "
            "of the model as it is now. Revert what changed them (such as a fused LoRA), or "
            "call undo_all(pipe, overwrite=True) and apply the edit again"
        )


def _with_lora(denoiser: Module, change: WeightChange) -> list[str]:
    """The names of a change's weights on which LoRA of any kind is active."""
    names: list[str] = []
    for name in change.changes:
        place = _place(denoiser, name)
        if place is not None and place.carries_lora and _active_lora(place.module):
            names.append(name)
    return names


def _changed_since(denoiser: Module, state: _State) -> list[str]:
    """The names of edited weights that are not what was written last, or are gone."""
    weights: dict[str, Tensor] = {}
    for name in state.checksums:
        place = _place(denoiser, name)
        if place is not None:
            weights[name] = weight_of(place.owner, name)
    # Pointers and versions of tensors would be cheaper still, and miss a LoRA that was fused.
    sums = checksums(weights)
    return [name for name in state.checksums if sums.get(name) != state.checksums[name]]


def _check_shapes(change: WeightChange, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        factors = change.changes[name]
        made_for = (factors.up.shape[0], factors.down.shape[1])
        if tuple(weight.shape) != made_for:
            raise LocogenError(
                f"{name} has shape {tuple(weight.shape)}, and the edit of {change.name!r} was made "
                f"for {made_for}: fit it again with edit.refit(pipe)"
            )


def _made_for_others(change: WeightChange, weights: Mapping[str, Tensor], others: bool) -> str:
    """The message for a model with other weights. `others`: whether other edits are applied."""
    types = ", ".join(sorted({_type_name(weight) for weight in weights.values()}))
    made_for = f", {', '.join(change.dtype)} where it was made," if change.dtype else ","
    also = " (or other edits are in the way: undo them)" if others else ""
    return (
        f"the edit of {change.name!r} was made for other weights: names and shapes agree, but the "
        f"bits of {next(iter(weights))} and {len(weights) - 1} more, {types} here{made_for} do "
        f"not{also}; fit it again with edit.refit(pipe)"
    )
