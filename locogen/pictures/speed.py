"""How fast pictures are made: `speed(pipe, …)`, a context that says what it changed and what it measured."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import active_contexts, announced
from locogen.models.families import denoiser_of
from locogen.models.memory import out_of_memory
from locogen.pictures.batches import Texts, _batch
from locogen.plan import Intervention, Settings

if TYPE_CHECKING:
    import torch

Mode = Literal["exact", "close", "auto", "compile"]
MODES = ("exact", "close", "auto", "compile")
GAIN = 1.1  # a way must be so many times as fast as what it replaces: less is noise, and not worth other pictures
REPEATS, STEPS = 3, 2
SIZES, MIDDLE = (
    (2, 8, 32, 128),
    32,
)  # of batches that are tried, and the largest that ways are tried at
LONG = 5.0  # seconds that a batch may take before no larger one is tried, and before it is not repeated
COMPILED = (
    "ResnetBlock2D",
    "FeedForward",
)  # parts of a denoiser that never hold a layer: hooks keep firing
BOUNDS = {
    "exact": "bit for bit the plain pipeline",
    "close": "as the plain pipeline but for the order of sums: in float32 pictures differ by at most 1 of 255",
    "half": "matrix products in half precision: on the mini model one call is within 3 % of the plain one (root mean "
    "square), pictures within 1 of 255 on average; compare pictures with those made in the same way",
}


@dataclass(frozen=True)
class Way:
    """What is done to make pictures faster; as it stands, nothing."""

    threads: int | None = None
    channels_last: bool = False
    half: str | None = (
        None  # "bfloat16" or "float16": what the denoiser computes matrix products in
    )
    compiled: bool = False

    def __str__(self) -> str:
        told = [f"{self.threads} threads"] if self.threads else []
        told += ["channels-last"] if self.channels_last else []
        told += [self.half] if self.half else []
        return " + ".join(told + (["compiled"] if self.compiled else [])) or "plain"


@dataclass(frozen=True)
class Pace:
    """What `speed` chose: the way, how many pictures at once, and the bound of how far pictures move.

    `measured`: pictures per second by way; `sizes`: by batch size, in the chosen way; both at few steps.
    """

    mode: str
    device: str
    way: Way
    batch_size: int
    measured: dict[str, float] = field(default_factory=dict)
    sizes: dict[int, float] = field(default_factory=dict)

    @property
    def bound(self) -> str:
        """How far pictures may be from the plain pipeline's."""
        return BOUNDS["exact" if self.way == Way() else "half" if self.way.half else "close"]

    def __repr__(self) -> str:
        told = [
            f"speed {self.mode!r} on {self.device}: {self.way}, {self.batch_size} at once",
            self.bound,
        ]
        for what, rates in (("way", self.measured), ("pictures at once", self.sizes)):
            tried = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
            told += [f"pictures/s of {STEPS} steps by {what}: {tried}"] if tried else []
        return "\n  ".join(told)


@contextmanager
def speed(pipe: Any, mode: Mode = "auto", *, batch_size: int | None = None) -> Iterator[Pace]:
    """Within the context, the pipeline makes pictures in the fastest way that the mode allows; gives a `Pace`.

    - "exact": the plain pipeline, bit for bit.
    - "close": as many threads as there are processors, weights channels-last: other orders of the same sums.
    - "auto": the same, and a float32 model's denoiser in half precision where the device computes with it (bfloat16, on
      older GPUs float16; by autocast: the weights stay as they are, normalizations and sums in float32).
    - "compile": the same, and its convolution blocks and feed-forwards through `torch.compile`, region by region: none
      holds a layer, so interventions go on being heard. Minutes to begin with.

    Each is tried on this model and kept if at least 1.1 × as fast as without, with as many pictures at once as fit the
    memory and take seconds, at most 32 or `batch_size`; what was kept is in the `Pace`, in the run's settings, and in
    the key of every picture, so none is taken for another's. Without a `batch_size`, more and fewer are tried in the
    end, up to 128 and as far as memory and seconds go, and the smallest taken that none larger beats by as much: hand
    it on, `localize(…, batch_size=pace.batch_size)`, and it is in these too.
    Attention is the pipeline's own (diffusers' is `scaled_dot_product_attention`). Afterwards the model is as it was.
    Only the CPU was tested; on GPUs the same code ran on none yet. Raises `LocogenError` for an unknown mode, a
    `batch_size` below 1, or within another `speed`.
    """
    if mode not in MODES:
        raise LocogenError(f"speed is {mode!r}: take one of {', '.join(MODES)}")
    if batch_size is not None and batch_size < 1:
        raise LocogenError(f"batch_size is {batch_size}: give at least 1")
    if any(told.startswith("speed ") for told in active_contexts(pipe)):
        raise LocogenError("speed is chosen already: leave that context first")
    pace = _chosen(pipe, mode, batch_size)
    with _done(pipe, pace.way):
        yield pace


def _chosen(pipe: Any, mode: Mode, batch_size: int | None) -> Pace:
    """Try one change after another, each on top of those that have shown a gain."""
    device, way, measured = pipe._execution_device.type, Way(), {}
    changes = list(_changes(pipe, mode))
    size = max(_by_size(pipe, way, min(batch_size or MIDDLE, MIDDLE))) if changes else 0
    for change in changes:
        trial = replace(way, **change)
        for one in (way, trial):
            if str(one) not in measured:
                measured[str(one)] = _rate(pipe, one, size)
        if measured[str(trial)] >= GAIN * measured[str(way)]:
            way = trial
    if batch_size is not None:
        return Pace(mode, device, way, batch_size, measured)
    sizes = _by_size(pipe, way)
    return Pace(mode, device, way, _enough(sizes), measured, sizes)


def _by_size(pipe: Any, way: Way, most: int = SIZES[-1]) -> dict[int, float]:
    """Pictures per second by batch size up to `most`, as far as the memory and a user's patience go."""
    sizes: dict[int, float] = {}
    for size in sorted({*(size for size in SIZES if size < most), most}):
        try:
            sizes[size] = _rate(pipe, way, size)
        except Exception as error:
            if not sizes or not out_of_memory(error):
                raise
            break
        if size / sizes[size] > LONG:
            break
    return sizes


def _enough(sizes: dict[int, float]) -> int:
    """The smallest size that no larger one beats by `GAIN`."""
    return next(size for size, rate in sizes.items() if max(sizes.values()) < GAIN * rate)


def _changes(pipe: Any, mode: Mode) -> Iterator[dict[str, Any]]:
    """What the mode allows and the device and model can do."""
    import torch

    if mode == "exact":
        return
    denoiser, device = denoiser_of(pipe), pipe._execution_device
    processors = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if device.type == "cpu" and torch.get_num_threads() != processors:
        yield {"threads": processors}
    if any(p.dim() == 4 for p in denoiser.parameters()) and not hasattr(denoiser, "_hf_hook"):
        yield {"channels_last": True}
    half = half_of(device)
    if mode != "close" and half is not None and denoiser.dtype == torch.float32:
        yield {"half": half}
    if mode == "compile":
        yield {"compiled": True}


def half_of(device: torch.device) -> str | None:
    """The half precision that a device computes with; None where it would only emulate it."""
    import torch

    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return (
        "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") or able.get("bf16") else None
    )


def _rate(pipe: Any, way: Way, batch_size: int) -> float:
    """Pictures per second of a batch in that way: the best of a few, since other work only slows; one to warm up."""
    plan = [
        Intervention("a picture", "a picture", (), seed, "baseline") for seed in range(batch_size)
    ]
    texts, chosen, took = Texts(pipe, plan), Settings(STEPS, 7.5, batch_size), []
    with _done(pipe, way):
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            _batch(
                pipe, plan, texts, batch_size, chosen
            )  # its pictures are in main memory: no GPU is still at work
            took.append(time.perf_counter() - start)
            if took[-1] > LONG and (
                took[1:] or not way.compiled
            ):  # what takes so long needs no warming up
                break
    return batch_size / min(took[1:] or took)


@contextmanager
def _done(pipe: Any, way: Way) -> Iterator[None]:
    with ExitStack() as stack:
        if way.threads is not None:
            stack.enter_context(_threads(way.threads))
        if way.channels_last:
            stack.enter_context(_channels_last(pipe))
        if way.half is not None:
            stack.enter_context(_autocast(denoiser_of(pipe), pipe._execution_device.type, way.half))
        if way.compiled:
            stack.enter_context(_compiled(denoiser_of(pipe)))
        if way != Way():
            stack.enter_context(announced(pipe, f"speed {way}", all_pipelines=True))
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _channels_last(pipe: Any) -> Iterator[None]:
    """Weights of convolutions channel by channel at each place; the same values, and afterwards the same strides."""
    import torch

    parts = [denoiser_of(pipe), *([pipe.vae] if getattr(pipe, "vae", None) is not None else [])]
    held = [p for part in parts for p in part.parameters() if p.dim() == 4]
    own = [(p, p.data) for p in held]
    try:
        for p in held:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for p, data in own:
            p.data = data.copy_(p.data)  # an edit of these weights within the context stays
        del own


@contextmanager
def _autocast(denoiser: Any, device: str, half: str) -> Iterator[None]:
    """Only the denoiser's own calls: whatever else runs within the context stays in its precision."""
    import torch

    forward, own = denoiser.forward, vars(denoiser).get("forward")

    @wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, getattr(torch, half)):
            found = forward(*args, **kwargs)
        if isinstance(found, tuple):
            return tuple(one.float() for one in found)
        return type(found)(sample=found.sample.float())

    denoiser.forward = cast
    try:
        yield
    finally:
        if own is None:
            del denoiser.forward
        else:
            denoiser.forward = own


@contextmanager
def _compiled(denoiser: Any) -> Iterator[None]:
    """Region by region, so that one compilation serves all that are alike; hooks on other modules are untouched."""
    regions = [module for module in denoiser.modules() if type(module).__name__ in COMPILED]
    before = [module._compiled_call_impl for module in regions]
    with _compilations_for(len(regions)):
        try:
            for module in regions:
                module.compile()
            yield
        finally:
            for module, compiled_call in zip(regions, before, strict=True):
                module._compiled_call_impl = compiled_call


@contextmanager
def _compilations_for(regions: int) -> Iterator[None]:
    """Let dynamo compile each region as often as it lets one function be compiled, 8 times by default.

    It counts by function, and all regions of a class share one: Stable Diffusion 1.5 has 14 kinds of them by
    their numbers of channels alone. What comes after the limit runs uncompiled, and only a log says so.
    """
    import torch._dynamo

    config = torch._dynamo.config
    each = max(1, regions)
    limits = {
        "recompile_limit": config.recompile_limit * each,
        "accumulated_recompile_limit": config.accumulated_recompile_limit * each,
    }
    with config.patch(limits):
        yield
