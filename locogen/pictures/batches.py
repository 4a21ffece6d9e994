"""Make the pictures of rows in batches that fit the memory, each padded to one size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.interventions.prompts import generators, intervene
from locogen.models.families import encode_guided, family_of
from locogen.models.memory import memory_named, out_of_memory
from locogen.models.text import PromptEncoding
from locogen.pictures.checks import check_flags, from_the_seed_alone, scheduler_errors
from locogen.plan import Intervention, Settings, missing_target_runs

if TYPE_CHECKING:
    import numpy as np

RESERVE = 0.9  # of the free memory is used: allocators leave gaps
SLICED_FROM = 256  # pixels a side from which pictures are decoded one by one: smaller ones take little memory at once


def pictures_of(
    pipe: Any,
    plan: Sequence[Intervention],
    chosen: Settings,
    whole: Sequence[Intervention] | None = None,
    settled: int | None = None,
) -> Iterator[tuple[Sequence[Intervention], np.ndarray[Any, Any], int]]:
    """Batch by batch: rows, in the order of the plan; their pictures in 0..1, (rows, height, width, 3); batch size.

    The size is that of the batches which follow; given as `settled`, it is that of the first one too.

    Batches are as even as can be, so that little is spent on filling the last one up. Their size follows from `whole`,
    all rows that are asked for, of which `plan` is what is missing: so a resumed run repeats a fresh one, to the bit
    where a batch or more was missing, and else within the order of sums.
    On a GPU the first batch is as small as can be, and what it takes says how many fit the free memory. Where memory
    runs out, half as many are tried, with a warning. Raises `LocogenError` where the smallest batch does not fit.
    """
    texts = Texts(pipe, plan)
    ridden = family_of(pipe).joint_attention
    smallest = 2 if ridden else 1
    places, missing = _places(plan if whole is None else whole, ridden), _places(plan, ridden)
    memory = _Memory(pipe)
    memory.known = memory.known and settled is None
    size = (
        smallest
        if memory.known
        else max(min(settled or _even(places, chosen.batch_size), missing), smallest)
    )
    start = 0
    while start < len(plan):
        rows = _next(plan[start:], size, ridden)
        try:
            with memory.watching_decode(pipe):
                made = _batch(pipe, rows, texts, size, chosen)
        except Exception as error:
            size = halved(pipe, error, size, smallest)
            memory.known = False
        else:
            if memory.known:
                size = max(smallest, _even(places, min(chosen.batch_size, memory.fitting(size))))
            yield rows, made, size
            start += len(rows)
        memory.free()


def _even(places: int, most: int) -> int:
    """The size of so many batches as are needed at `most` places each, if all are alike."""
    most = max(most, 1)
    return math.ceil(places / math.ceil(places / most))


def _next(plan: Sequence[Intervention], size: int, ridden: bool) -> Sequence[Intervention]:
    """As many rows as fit a batch, with the targets' own runs that must ride along where they must; at least one."""
    count = 1
    while count < len(plan) and _places(plan[: count + 1], ridden) <= size:
        count += 1
    return plan[:count]


def _places(rows: Sequence[Intervention], ridden: bool) -> int:
    return len(rows) + (len(missing_target_runs(rows)) if ridden else 0)


class Texts:
    """Text of each distinct prompt, encoded alone so that its neighbors cannot move a bit; and the negative."""

    def __init__(self, pipe: Any, plan: Sequence[Intervention]) -> None:
        prompts = dict.fromkeys(text for row in plan for text in (row.prompt, row.target))
        too_small = (
            f"the text encoders do not fit the memory of {pipe._execution_device}: {SMALLER}"
        )
        with from_the_seed_alone(pipe), memory_named(too_small):
            found = {text: encode_guided(pipe, [text]) for text in prompts}
        self.of = {text: own for text, (own, _) in found.items()}
        self.negative = next(iter(found.values()))[1]

    def stack(self, prompts: Iterable[str]) -> PromptEncoding:
        """One row a prompt."""
        return PromptEncoding.stack(self.of[prompt] for prompt in prompts)

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What a call of the pipeline takes for these prompts."""
        negative = (
            {}
            if self.negative is None
            else self.negative.expanded(len(prompts)).arguments("negative_")
        )
        return self.stack(prompts).arguments() | negative


def _batch(
    pipe: Any, rows: Sequence[Intervention], texts: Texts, size: int, chosen: Settings
) -> Any:
    """Pictures of one batch, padded to `size` by repeating its last row, so that sums are taken alike in each."""
    padded = [*rows, *(missing_target_runs(rows) if family_of(pipe).joint_attention else ())]
    padded += [padded[-1]] * (size - len(padded))
    with intervene(pipe, padded, targets=texts.stack(row.target for row in padded)):
        made = called(pipe, padded, texts.arguments([row.prompt for row in padded]), chosen)
    return made[: len(rows)]


def called(
    pipe: Any,
    rows: Sequence[Intervention],
    arguments: dict[str, Any],
    chosen: Settings,
    output_type: str = "np",
) -> Any:
    """The images of one call of the pipeline, without its progress bar: `arguments` is what the rows hear."""
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    try:
        with from_the_seed_alone(pipe), scheduler_errors(pipe), _decoding_in_slices(pipe):
            output = pipe(
                **family_of(pipe).options(pipe),
                **arguments,
                generator=generators(rows),
                num_inference_steps=chosen.num_inference_steps,
                guidance_scale=chosen.guidance_scale,
                output_type=output_type,
            )
    finally:
        pipe.set_progress_bar_config(**bar)
    check_flags(output, rows)
    return output.images


@contextmanager
def _decoding_in_slices(pipe: Any) -> Iterator[None]:
    """Within the context large pictures are decoded one by one, so that the decoder does not limit the batch.

    A batch that the denoiser has room for can be several times what the decoder has room for: SD-XL's, in float32,
    takes about 4 GB for each picture of 1024 pixels. Pictures differ from those decoded together by the order of
    sums. Small pictures are decoded together, as the pipeline does it.
    """
    vae = _sliced_vae(pipe)
    if vae is None or vae.use_slicing:
        yield
        return
    vae.enable_slicing()
    try:
        yield
    finally:
        vae.disable_slicing()


def _sliced_vae(pipe: Any) -> Any:
    """The pipeline's VAE where its pictures are decoded one by one; None where there is no such VAE."""
    vae: Any = getattr(pipe, "vae", None)
    if not hasattr(vae, "use_slicing"):
        return None
    is_large = (
        getattr(vae.config, "sample_size", SLICED_FROM) >= SLICED_FROM
    )  # Sana's has no size of its own
    return vae if is_large else None


def halved(pipe: Any, error: Exception, size: int, smallest: int = 1) -> int:
    """The batch size to go on with, where `error` says that the memory ran out; told in a warning.

    Raises the error itself where it says something else, and `LocogenError` where the smallest batch did not fit.
    """
    if not out_of_memory(error):
        raise error
    if size <= smallest:
        raise LocogenError(_too_large(pipe, size)) from error
    half = max(size // 2, smallest)
    warnings.warn(f"a batch of {size} does not fit the memory: going on with {half}", stacklevel=5)
    return half


SMALLER = (
    "load the model with dtype='float16' or 'bfloat16', or with offload='model' or 'sequential'"
)


def _too_large(pipe: Any, size: int) -> str:
    return (
        f"a batch of {size} does not fit the memory of {pipe._execution_device}: {SMALLER}, or call "
        "pipe.vae.enable_tiling(); pictures made before are kept"
    )


class _Memory:
    """Of the GPU that the pipeline computes on; `known` is false where there is none.

    A batch has two peaks: the denoiser's grows with the batch, the decoder's does not, since it works on one
    picture at a time. They are read apart, so that a large decoder does not make batches small.
    """

    def __init__(self, pipe: Any) -> None:
        import torch

        self.device = pipe._execution_device
        self.known = self.device.type == "cuda" and torch.cuda.is_available()
        self.before = 0
        self.denoising: int | None = (
            None  # bytes at the denoiser's peak, once the decoder has begun
        )
        if self.known:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    @contextmanager
    def watching_decode(self, pipe: Any) -> Iterator[None]:
        """Within the context, the peak is read when the decoder begins; only while the size is to be found."""
        vae = _sliced_vae(pipe)
        if vae is None or not self.known:
            yield
            return
        handle = vae.decoder.register_forward_pre_hook(self._begin_decoding)
        try:
            yield
        finally:
            handle.remove()

    def _begin_decoding(self, *_: Any) -> None:
        import torch

        if self.denoising is None:
            self.denoising = torch.cuda.max_memory_allocated(self.device) - self.before
            torch.cuda.reset_peak_memory_stats(self.device)

    def fitting(self, made: int) -> int:
        """How many pictures fit, by what a batch of `made` took at its peak."""
        import torch

        self.known = False
        last_peak = torch.cuda.max_memory_allocated(self.device) - self.before
        growing = last_peak if self.denoising is None else self.denoising
        torch.cuda.empty_cache()
        return int(RESERVE * torch.cuda.mem_get_info(self.device)[0] / max(growing / made, 1))

    def free(self) -> None:
        """Give what is cached back, so that a smaller batch finds it."""
        import torch

        if self.device.type == "cuda" and torch.cuda.is_available() and not self.known:
            torch.cuda.empty_cache()
