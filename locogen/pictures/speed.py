"""Make pictures faster: `speed(pipe, …)`, a context that says what it changed and measured."""

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
from locogen.models.hooks import parts_of
from locogen.models.memory import out_of_memory
from locogen.pictures.batches import Texts, make_batch
from locogen.plan import Intervention, Settings
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    import torch

Mode = Literal["exact", "close", "auto", "compile"]
MODES = ("exact", "close", "auto", "compile")

# An optimization must be this many times as fast as without it: less is noise, and not worth
# pictures that differ.
GAIN = 1.1

REPEATS = 3  # measurements of a batch; the fastest counts
STEPS = 2  # denoising steps of a measured picture
SIZES = (2, 8, 32, 128)  # batch sizes that are tried
LARGEST_FOR_CANDIDATES = 32  # the largest batch size at which optimizations are compared

# Seconds: a batch that takes longer is measured once, and no larger one is tried.
LONG = 5.0

# Parts of a denoiser that never hold a layer: compiled, they leave all hooks in force.
COMPILED = ("ResnetBlock2D", "FeedForward")

BOUNDS = {
    "exact": "bit for bit the plain pipeline",
    "close": "as the plain pipeline but for the order of sums: "
    "in float32 pictures differ by at most 1 of 255",
    "half": "matrix products in half precision: on the mini model one call is within 3 % of the "
    "plain one (root mean square), pictures within 1 of 255 on average; "
    "compare pictures with those made in the same way",
}


@dataclass(frozen=True)
class Way:
    """The optimizations in force; without arguments, none.

    Attributes:
        threads: Number of threads of the CPU; None: as many as torch uses.
        channels_last: Whether weights of convolutions lie channels-last.
        half: What the denoiser computes matrix products in, "bfloat16" or "float16"; None: in the
            model's own precision.
        compiled: Whether parts of the denoiser are compiled.
    """

    threads: int | None = None
    channels_last: bool = False
    half: str | None = None
    compiled: bool = False

    def __str__(self) -> str:
        parts = []
        if self.threads:
            parts.append(f"{self.threads} threads")
        if self.channels_last:
            parts.append("channels-last")
        if self.half:
            parts.append(self.half)
        if self.compiled:
            parts.append("compiled")
        return " + ".join(parts) or "plain"


@dataclass(frozen=True)
class Pace:
    """What `speed` chose, and what it measured.

    Attributes:
        mode: The mode that was asked for.
        device: The kind of device that the pipeline computes on.
        way: The optimizations in force.
        batch_size: The number of pictures to make at once: `localize(…, batch_size=…)`.
        measured: Pictures per second by way, at few steps.
        sizes: Pictures per second by batch size in the chosen way, at few steps.

    Example:
        >>> pipe = load("mini")
        >>> with speed(pipe, "exact", batch_size=8) as pace:
        ...     print(pace)
        speed 'exact' on cpu: plain, 8 at once
          bit for bit the plain pipeline
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
        if self.way == Way():
            return BOUNDS["exact"]
        return BOUNDS["half" if self.way.half else "close"]

    def __repr__(self) -> str:
        lines = [
            f"speed {self.mode!r} on {self.device}: {self.way}, {self.batch_size} at once",
            self.bound,
        ]
        for what, rates in (("way", self.measured), ("pictures at once", self.sizes)):
            if rates:
                listed = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
                lines.append(f"pictures/s of {STEPS} steps by {what}: {listed}")
        return "\n  ".join(lines)


@contextmanager
def speed(pipe: Pipeline, mode: Mode = "auto", *, batch_size: int | None = None) -> Iterator[Pace]:
    """Within the context, the pipeline makes pictures in the fastest way that the mode allows.

    Each optimization is tried on this model and machine, and kept if it makes pictures at least 1.1
    times as fast. What is kept is part of the run's settings and of each picture's key, so pictures
    made in different ways are never mixed. Attention is the pipeline's own (diffusers uses
    `scaled_dot_product_attention`). Afterwards the model is as before.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        mode: What is tried:
            "exact", nothing: the plain pipeline, bit for bit;
            "close", one thread for each processor and weights channels-last: other orders of sums;
            "auto", also half precision in the denoiser of a float32 model, if the device computes
            with it (bfloat16, on older GPUs float16; by autocast: weights, normalizations and sums
            stay in float32);
            "compile", also `torch.compile` of convolution blocks and feed-forwards, none of which
            holds a layer, so interventions stay in force; it takes minutes at first.
        batch_size: The number of pictures that are made at once; None: sizes up to 128, as far as
            memory and seconds allow, are timed, and the smallest is chosen that no larger one beats
            by a factor of 1.1.

    Returns:
        A context that gives a `Pace`: what was chosen and measured. Hand its batch size on:
        `localize(…, batch_size=pace.batch_size)`.

    Raises:
        LocogenError: For an unknown mode, a `batch_size` below 1, or within another `speed`.

    Example:
        >>> pipe = load("mini")
        >>> with speed(pipe, "exact", batch_size=8) as pace:
        ...     few = {"num_inference_steps": 1, "batch_size": pace.batch_size}
        ...     run = generate(pipe, "a picture of a cat", progress=False, **few)
        >>> pace.batch_size, pace.bound
        (8, 'bit for bit the plain pipeline')
    """
    if mode not in MODES:
        raise LocogenError(f"speed is {mode!r}: use one of {', '.join(MODES)}")
    if batch_size is not None and batch_size < 1:
        raise LocogenError(f"batch_size is {batch_size}: give at least 1")
    if any(label.startswith("speed ") for label in active_contexts(pipe)):
        raise LocogenError(
            "speed was called within speed: leave the first context before you open another"
        )
    pace = _choose(pipe, mode, batch_size)
    with applied(pipe, pace.way):
        yield pace


def _choose(pipe: Pipeline, mode: Mode, batch_size: int | None) -> Pace:
    """Try one optimization after another, each on top of those that have shown a gain."""
    device = pipe._execution_device.type
    way = Way()
    measured: dict[str, float] = {}

    candidates = list(_candidates(pipe, mode))
    size = 0
    if candidates:
        # The largest batch that fits: small ones may hide what an optimization gains.
        largest = min(batch_size or LARGEST_FOR_CANDIDATES, LARGEST_FOR_CANDIDATES)
        size = max(_rates_by_size(pipe, way, largest))
    for candidate in candidates:
        trial = replace(way, **candidate)
        for each in (way, trial):
            if str(each) not in measured:
                measured[str(each)] = measure_rate(pipe, each, size)
        if measured[str(trial)] >= GAIN * measured[str(way)]:
            way = trial

    if batch_size is not None:
        return Pace(mode, device, way, batch_size, measured)
    rates = _rates_by_size(pipe, way)
    return Pace(mode, device, way, _smallest_sufficient(rates), measured, rates)


def _rates_by_size(pipe: Pipeline, way: Way, largest: int = SIZES[-1]) -> dict[int, float]:
    """Pictures per second by batch size, as far as memory and a user's patience go."""
    sizes = [size for size in SIZES if size < largest]
    sizes.append(largest)
    rates: dict[int, float] = {}
    for size in sizes:
        try:
            rates[size] = measure_rate(pipe, way, size)
        except Exception as error:
            # A full memory ends the search. Where nothing fits, not even the smallest batch, it is
            # the user's to solve.
            if not rates or not out_of_memory(error):
                raise
            break
        seconds = size / rates[size]
        if seconds > LONG:
            break
    return rates


def _smallest_sufficient(rates: dict[int, float]) -> int:
    """The smallest size that no larger one beats by `GAIN`."""
    fastest = max(rates.values())
    return next(size for size, rate in rates.items() if fastest < GAIN * rate)


def _candidates(pipe: Pipeline, mode: Mode) -> Iterator[dict[str, Any]]:
    """The optimizations that the mode allows and that the device and the model can do."""
    import torch

    if mode == "exact":
        return
    denoiser = denoiser_of(pipe)
    device = pipe._execution_device
    processors = _processors()
    if device.type == "cpu" and torch.get_num_threads() != processors:
        yield {"threads": processors}
    if _has_convolutions(denoiser) and not _is_offloaded(denoiser):
        # Not with offload, which moves the weights: the layout would be lost.
        yield {"channels_last": True}
    if mode == "close":
        return
    half = half_of(device)
    if half is not None and denoiser.dtype == torch.float32:
        yield {"half": half}
    if mode == "compile":
        yield {"compiled": True}


def _has_convolutions(denoiser: Module) -> bool:
    """Whether it has weights of (output, input, height, width)."""
    return any(weight.dim() == 4 for weight in denoiser.parameters())


def _is_offloaded(denoiser: Module) -> bool:
    return any(hasattr(part, "_hf_hook") for part in parts_of(denoiser))


def _processors() -> int:
    """The number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def half_of(device: torch.device) -> str | None:
    """The half precision that a device computes with; None if it would only emulate one."""
    import torch

    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type != "cpu":
        return None
    # torch 2.6 does not say what the processor computes with: no half precision then.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_bfloat16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if has_bfloat16 else None


def measure_rate(pipe: Pipeline, way: Way, batch_size: int) -> float:
    """Pictures per second of a batch in that way.

    It is the best of a few measurements, since other work on the machine only slows; one before
    them warms up.
    """
    plan = [
        Intervention("a picture", "a picture", (), seed, "baseline") for seed in range(batch_size)
    ]
    texts = Texts(pipe, plan)
    settings = Settings(STEPS, 7.5, batch_size)
    seconds: list[float] = []
    with applied(pipe, way):
        for _ in range(1 + REPEATS):
            start = time.perf_counter()
            # Its pictures are in main memory afterwards: no GPU is still at work.
            make_batch(pipe, plan, texts, batch_size, settings)
            seconds.append(time.perf_counter() - start)
            # What takes so long needs no warming up, unless that compiled it.
            needs_another = way.compiled and len(seconds) == 1
            if seconds[-1] > LONG and not needs_another:
                break
    return batch_size / min(seconds[1:] or seconds)


# --- the optimizations ---------------------------------------------------------------------------


@contextmanager
def applied(pipe: Pipeline, way: Way) -> Iterator[None]:
    """Within the context, the optimizations are in force, and part of each picture's key."""
    denoiser = denoiser_of(pipe)
    with ExitStack() as stack:
        if way.threads is not None:
            stack.enter_context(_threads(way.threads))
        if way.channels_last:
            stack.enter_context(_channels_last(pipe))
        if way.half is not None:
            device = pipe._execution_device.type
            for part in parts_of(denoiser):
                stack.enter_context(_autocast(part, device, way.half))
        if way.compiled:
            stack.enter_context(_compiled(denoiser))
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
def _channels_last(pipe: Pipeline) -> Iterator[None]:
    """Within the context, weights of convolutions lie channels-last; their values are the same."""
    import torch

    parts = [denoiser_of(pipe)]
    if getattr(pipe, "vae", None) is not None:
        parts.append(pipe.vae)
    # Weights of convolutions, (output, input, height, width).
    weights = [p for part in parts for p in part.parameters() if p.dim() == 4]
    originals = [(weight, weight.data) for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        # Back into the old memory, by value: an edit of the weights within the context stays.
        for weight, data in originals:
            weight.data = data.copy_(weight.data)


@contextmanager
def _autocast(denoiser: Module, device: str, half: str) -> Iterator[None]:
    """Within the context, the denoiser's own calls are in half precision; all else is not."""
    import torch

    forward = denoiser.forward
    shadow = vars(denoiser).get("forward")  # what somebody put in the place of the class's method

    @wraps(forward)
    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, getattr(torch, half)):
            output = forward(*args, **kwargs)
        # The scheduler goes on in float32.
        if isinstance(output, tuple):
            return _in_float32(output)
        return type(output)(sample=_in_float32(output.sample))

    denoiser.forward = cast
    try:
        yield
    finally:
        if shadow is None:
            del denoiser.forward
        else:
            denoiser.forward = shadow


def _in_float32(output: Any) -> Any:
    """A tensor in float32, or all that lie in tuples and lists: Z-Image's output is a list."""
    if isinstance(output, (tuple, list)):
        return type(output)(_in_float32(each) for each in output)
    return output.float()


@contextmanager
def _compiled(denoiser: Module) -> Iterator[None]:
    """Within the context, parts of the denoiser are compiled; hooks on other modules stay in force.

    Part by part, so that one compilation serves all that are alike.
    """
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
    """Let dynamo compile each region as often as one function, 8 times by default.

    It counts by function, and all regions of a class share one: Stable Diffusion 1.5 has 14 kinds
    of them by their numbers of channels alone. What comes after the limit runs uncompiled, and only
    a log says so.
    """
    import torch._dynamo

    config = torch._dynamo.config
    each = max(1, regions)
    limits = {name: getattr(config, name) * each for name in _limit_names(config)}
    with config.patch(limits):
        yield


def _limit_names(config: Any) -> tuple[str, str]:
    """What this version of dynamo calls its limits: for one function, and for all."""
    if hasattr(config, "recompile_limit"):
        return "recompile_limit", "accumulated_recompile_limit"
    return "cache_size_limit", "accumulated_cache_size_limit"  # torch 2.6
