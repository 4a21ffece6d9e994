"""A hash of a model in its present state, so that a changed model gets new pictures.

SHA-256 of all weights costs seconds for a large model, and every run needs it. It is therefore kept
for each tensor together with a checksum, computed where the tensor lies: as long as the checksum is
the same, so is the hash. Pointers and versions would be cheaper still, and miss what is written
through `.data` or by fused kernels.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.models.families import family_of
from locogen.models.offload import kept
from locogen.pictures.description import (
    Description,
    describe_component,
    describe_pipeline,
    describe_scheduler,
)
from locogen.types import Pipeline

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROW = 8192  # words that share a set of random weights
BLOCK_IN_CACHE = 2**16  # words at once on a CPU: what is copied stays in its cache
BLOCK_ON_CARD = 2**24  # words at once elsewhere: few large kernels, 128 MB of memory

# The tensor's name, shape and type, and the sum of its words.
Checksum = tuple[str, int]

_hashed: ContextVar[dict[int, str] | None] = ContextVar("weights hashed so far", default=None)
_digests: WeakKeyDictionary[Any, dict[str, tuple[Checksum, str]]] = WeakKeyDictionary()
# By pipeline, what its fingerprint could not take in when it was last computed.
_left_out: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()


@contextmanager
def same_weights() -> Iterator[None]:
    """Within the context, the weights of each pipeline are hashed once: nothing may change them."""
    before = _hashed.set({})
    try:
        yield
    finally:
        _hashed.reset(before)


def weights_of(pipe: Pipeline) -> str:
    """The fingerprint of a pipeline, remembered within `same_weights`."""
    remembered = _hashed.get()
    if remembered is None:
        return fingerprint(pipe)
    if id(pipe) not in remembered:
        remembered[id(pipe)] = fingerprint(pipe)
    return remembered[id(pipe)]


def fingerprint(pipe: Pipeline) -> str:
    """A hash of the model: weights, adapters and their scales, configs, processors, vocabulary.

    Args:
        pipe: A pipeline of diffusers, offloaded or not.

    Returns:
        16 hexadecimal digits, the same on every machine and device.

    Raises:
        LocogenError: For a weight on the meta device that nothing keeps.
    """
    skipped = {"padding_side"} if family_of(pipe).sets_padding else set()
    digest = hashlib.sha256()
    left_out: list[str] = []
    for part, component in sorted(pipe.components.items()):
        # The scheduler is in the key by itself.
        if part == "scheduler":
            continue
        description = describe_component(component, skipped)
        left_out += [f"{part}.{name}" for name in description.undescribed]
        digest.update(part.encode())
        digest.update(digest_of(description, component).encode())
    _left_out[pipe] = tuple(left_out)
    return digest.hexdigest()[:16]


def undescribed(pipe: Pipeline) -> tuple[str, ...]:
    """Paths, with their classes, of what a pipeline holds that no line and no hash can describe.

    Its pictures cannot be known again: they have to be made afresh. Of the components it says what
    `fingerprint` met when it last looked at the pipeline.
    """
    if pipe not in _left_out:
        fingerprint(pipe)
    of_pipe = [f"pipe.{name}" for name in describe_pipeline(pipe).undescribed]
    of_scheduler = [f"scheduler.{name}" for name in describe_scheduler(pipe.scheduler).undescribed]
    return (*_left_out[pipe], *of_pipe, *of_scheduler)


def digest_of(description: Description, owner: Any = None) -> str:
    """A hash of a description and its tensors; `owner`: the module that they belong to, if any."""
    digest = hashlib.sha256("\n".join(description.lines).encode())
    tensors: dict[str, Tensor] = {}
    for path, tensor in description.tensors.items():
        tensors[path] = _whole(owner, path, tensor)
    for path, tensor_digest in sorted(_tensor_digests(tensors, owner).items()):
        digest.update(f"{path} {tensor_digest}".encode())
    return digest.hexdigest()


def _whole(owner: Any, path: str, tensor: Tensor) -> Tensor:
    """A tensor; one that accelerate keeps off the device, from where it keeps it."""
    if not tensor.is_meta:
        return tensor
    place, _, name = path.strip(".").rpartition(".")
    return kept(owner.get_submodule(place), name, path)


def _tensor_digests(tensors: Mapping[str, Tensor], owner: Any) -> dict[str, str]:
    """SHA-256 of each tensor, computed for those whose checksum is not that of the last time."""
    try:
        remembered = _digests.setdefault(owner, {})
    except TypeError:  # not a module but None, or something that has no weak references
        remembered = {}
    digests: dict[str, str] = {}
    large: dict[str, Tensor] = {}
    for path, tensor in tensors.items():
        if _is_quick_to_hash(tensor):
            digests[path] = _sha256(tensor)
        else:
            large[path] = tensor
    # All checksums of a device are computed before the first is waited for.
    for path, sums in checksums(large).items():
        if path not in remembered or remembered[path][0] != sums:
            remembered[path] = (sums, _sha256(tensors[path]))
        digests[path] = remembered[path][1]
    return digests


def _is_quick_to_hash(tensor: Tensor) -> bool:
    """Whether SHA-256 takes no longer than a checksum and the wait for it."""
    return tensor.device.type == "cpu" and tensor.nbytes <= 4 * ROW


def _sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for name, plain in _plain(tensor):
        digest.update(f"{name} {tuple(plain.shape)} {plain.dtype}".encode())
        digest.update(_bytes(plain).cpu().numpy().data)
    return digest.hexdigest()


def _plain(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a tensor consists of, by name: a quantized one has integers and scales."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    inner = flatten()[0] if flatten is not None else ()
    if not inner:
        yield "", tensor
    for name in inner:
        for below, plain in _plain(getattr(tensor, name)):
            yield f"{name}.{below}", plain


def _bytes(tensor: Tensor) -> Tensor:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # (bytes,)


# --- checksums -----------------------------------------------------------------------------------


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, Checksum]:
    """A checksum of each tensor, computed on its own device; one wait for each device.

    Args:
        tensors: By any name.

    Returns:
        By the same names. Two tensors that differ, in one element or in many, share a checksum with
        a chance of about 1 in 2^31.
    """
    totals: dict[str, Checksum] = {}
    waiting: dict[Any, list[tuple[str, str, Tensor]]] = {}
    for path, tensor in tensors.items():
        for name, plain in _plain(tensor):
            described = f"{name} {tuple(plain.shape)} {plain.dtype}"
            waiting.setdefault(plain.device, []).append((path, described, checksum(plain)))
    for sums in waiting.values():
        numbers = _together([each for _, _, each in sums])
        for (path, described, _), number in zip(sums, numbers, strict=True):
            before, total = totals.get(path, ("", 0))
            totals[path] = (f"{before}{described} {number};", total + number)
    return totals


def _together(sums: list[Tensor]) -> list[int]:
    import torch

    return torch.stack(sums).tolist()


def checksum(tensor: Tensor) -> Tensor:
    """The words of a tensor, 32 bits each, times random weights, summed in 64 bits, on its device.

    Elements that change places change it too, since their weights differ.
    """
    import torch

    # A changed word changes its row's sum by (difference below 2^32) x (weight below 2^31), which
    # does not vanish in 64 bits, even for a changed sign. The rows' sums are summed the same way.

    words = _words(tensor)  # (words,)
    while words.numel() > ROW:
        words = _row_sums(words).view(torch.int32)
    return (words.to(torch.int64) * _weights(words.device)[: words.numel()]).sum()


def _words(tensor: Tensor) -> Tensor:
    import torch

    raw = _bytes(tensor)
    odd = raw.numel() % 4 or raw.storage_offset() % 4
    return raw.to(torch.int32) if odd else raw.view(torch.int32)


def _row_sums(words: Tensor) -> Tensor:
    import torch

    block = BLOCK_IN_CACHE if words.device.type == "cpu" else BLOCK_ON_CARD
    weights = _weights(words.device)
    sums = []
    for piece in words.split(block):
        padded = torch.nn.functional.pad(piece, (0, -piece.numel() % ROW))
        rows = padded.view(-1, ROW)  # (rows, ROW)
        sums.append((rows.to(torch.int64) * weights).sum(1))
    return torch.cat(sums)  # (rows of all blocks,)


@functools.cache
def _weights(device: torch.device) -> Tensor:
    import torch

    generator = torch.Generator("cpu").manual_seed(0)
    weights = torch.randint(1, 2**31, (ROW,), generator=generator, device="cpu")
    return weights.to(device)  # (ROW,)
