"""Make the pictures of rows in batches that fit the memory, each padded to one size."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np

from locogen.console import current
from locogen.errors import LocogenError
from locogen.interventions.prompts import generators, intervene_encoded
from locogen.models.families import encode_guided, family_of
from locogen.models.memory import memory_named, out_of_memory
from locogen.models.text import PromptEncoding
from locogen.pictures.checks import check_flags, from_the_seed_alone, scheduler_errors
from locogen.plan import Intervention, Settings, missing_target_runs
from locogen.types import Pipeline

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
Row = TypeVar("Row")

RESERVE = 0.9  # the share of the free memory that is used: allocators leave gaps

# Pixels a side from which pictures are decoded one by one: smaller ones take little memory at once.
SLICED_FROM = 256

SMALLER = (
    "load the model with dtype='float16' or 'bfloat16', or with offload='model' or 'sequential'"
)


class Batch(NamedTuple, Generic[Row]):
    """Rows and their pictures.

    Attributes:
        rows: The rows, without padding.
        pixels: Their pictures in 0..1, (rows, height, width, 3).
        batch_size: Places of the batches that follow.
    """

    rows: Sequence[Row]
    pixels: Array
    batch_size: int


def pictures_of(
    pipe: Pipeline,
    missing_rows: Sequence[Intervention],
    settings: Settings,
    *,
    all_rows: Sequence[Intervention] | None = None,
    known_batch_size: int | None = None,
) -> Iterator[Batch[Intervention]]:
    """Make pictures batch by batch, in the order of the rows.

    On a GPU the first batch is as small as possible, and what it takes says how many pictures fit
    the free memory. If memory runs out, half as many are tried, with a warning.

    Args:
        pipe: The pipeline.
        missing_rows: The rows to make.
        settings: How pictures are made; `batch_size` is the largest number at once.
        all_rows: All rows of the run, of which `missing_rows` lack a picture; None: the same. The
            batch size is computed from these, so that a resumed run uses the batches of a fresh one
            and repeats it bit for bit if at least one full batch was missing.
        known_batch_size: The batch size that an interrupted run used; None: choose one.

    Yields:
        The batches; after the first, `batch_size` is the number of places in each.

    Raises:
        LocogenError: The smallest batch does not fit the memory.
    """
    texts = Texts(pipe, missing_rows)
    rides_along = family_of(pipe).joint_attention
    smallest = 2 if rides_along else 1  # a row and its target's own run
    all_places = _places(missing_rows if all_rows is None else all_rows, rides_along)

    memory = GpuMemory(pipe)
    if known_batch_size is not None:
        memory.is_to_be_measured = False
    if memory.is_to_be_measured:
        size = smallest
    else:
        size = known_batch_size or _even_size(all_places, settings.batch_size)
        size = max(min(size, _places(missing_rows, rides_along)), smallest)

    start = 0
    while start < len(missing_rows):
        rows = _next_rows(missing_rows[start:], size, rides_along)
        try:
            with memory.watching_decode(pipe):
                pixels = make_batch(pipe, rows, texts, size, settings)
        except Exception as error:
            size = halved_batch_size(pipe, error, size, smallest)
            memory.is_to_be_measured = False
        else:
            if memory.is_to_be_measured:
                fitting = min(settings.batch_size, memory.fitting(size))
                size = max(smallest, _even_size(all_places, fitting))
            yield Batch(rows, pixels, size)
            start += len(rows)
        # Not within `except`: there the error still holds the tensors of the batch that failed.
        memory.release()


def _even_size(places: int, largest: int) -> int:
    """The size of batches that are as few as `largest` allows, and alike: little is padded."""
    batches = math.ceil(places / max(largest, 1))
    return math.ceil(places / batches)


def _next_rows(
    rows: Sequence[Intervention], size: int, rides_along: bool
) -> Sequence[Intervention]:
    """The rows of the next batch, which also holds the targets' own runs if they ride along."""
    count = 1
    while count < len(rows) and _places(rows[: count + 1], rides_along) <= size:
        count += 1
    return rows[:count]


def _places(rows: Sequence[Intervention], rides_along: bool) -> int:
    return len(rows) + (len(missing_target_runs(rows)) if rides_along else 0)


class Texts:
    """The text of each distinct prompt, encoded alone so that its neighbors cannot move a bit.

    Attributes:
        of: Encoded text by prompt, each one row.
        negative: The encoded negative prompt; None without guidance.
    """

    def __init__(self, pipe: Pipeline, plan: Sequence[Intervention]) -> None:
        prompts = dict.fromkeys(text for row in plan for text in (row.prompt, row.target))
        too_small = (
            f"the text encoders do not fit the memory of {pipe._execution_device}: {SMALLER}"
        )
        current().say("encoding prompts")
        with from_the_seed_alone(pipe), memory_named(too_small):
            encoded = {prompt: encode_guided(pipe, [prompt]) for prompt in prompts}
        # All of one length, whichever of them are stacked: only families with a mask pad any.
        longest = max((text.states.shape[1] for text, _ in encoded.values()), default=0)
        self.of = {prompt: text.padded(longest) for prompt, (text, _) in encoded.items()}
        self.negative = next(iter(encoded.values()))[1]

    def stack(self, prompts: Iterable[str]) -> PromptEncoding:
        """The text of prompts, one row each."""
        return PromptEncoding.stack(self.of[prompt] for prompt in prompts)

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The arguments of a call of the pipeline with these prompts."""
        return self.with_negative(self.stack(prompts), len(prompts))

    def with_negative(self, text: PromptEncoding, count: int) -> dict[str, Any]:
        """The arguments of a call of the pipeline with this text of `count` rows."""
        if self.negative is None:
            return text.arguments()
        return text.arguments() | self.negative.expanded(count).arguments("negative_")


def make_batch(
    pipe: Pipeline, rows: Sequence[Intervention], texts: Texts, size: int, settings: Settings
) -> Array:
    """The pictures of one batch in 0..1, (rows, height, width, 3)."""
    padded = list(rows)
    if family_of(pipe).joint_attention:
        padded += missing_target_runs(rows)
    # All batches of a run have one size, so that sums are taken in the same order in each.
    padded += [padded[-1]] * (size - len(padded))
    with intervene_encoded(pipe, padded, texts.stack(row.target for row in padded)):
        arguments = texts.arguments([row.prompt for row in padded])
        pixels = call_pipeline(pipe, padded, arguments, settings)  # (size, height, width, 3)
    return pixels[: len(rows)]


def call_pipeline(
    pipe: Pipeline,
    rows: Sequence[Intervention],
    arguments: dict[str, Any],
    settings: Settings,
    output_type: str = "np",
) -> Any:
    """The images of one call of the pipeline; our bar says its steps, its own is not shown.

    `arguments` holds the encoded prompts, one row for each of `rows`, which give the seeds.
    """
    family = family_of(pipe)
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    current().work()
    try:
        with from_the_seed_alone(pipe), scheduler_errors(pipe), _decoding_in_slices(pipe):
            output = pipe(
                **family.options(pipe),
                **arguments,
                **{family.guidance_argument: settings.guidance_scale},
                **_saying_steps(pipe, settings.num_inference_steps, len(rows)),
                generator=generators(rows),
                num_inference_steps=settings.num_inference_steps,
                output_type=output_type,
            )
    finally:
        pipe.set_progress_bar_config(**bar)
    check_flags(output, rows)
    return family.pictures(output, output_type)


def _saying_steps(pipe: Pipeline, steps: int, pictures: int) -> dict[str, Any]:
    """The argument by which a pipeline's call lets our bar say its steps; none if no bar is shown.

    Diffusers' own bar cannot be read: in a notebook it would be a widget below ours.
    """
    bar = current()
    if bar.line is None:
        return {}

    def say(step: int) -> None:
        # Schedulers of several calls a step count beyond it.
        bar.step(min(step + 1, steps), steps, pictures)

    def after_step(_pipe: Any, step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        say(step)
        return values

    parameters = signature(type(pipe).__call__).parameters
    if "callback_on_step_end" in parameters:
        return {"callback_on_step_end": after_step}
    if "callback" in parameters:  # older pipelines
        return {"callback": lambda step, *_: say(step)}
    return {}


# --- memory --------------------------------------------------------------------------------------


@contextmanager
def _decoding_in_slices(pipe: Pipeline) -> Iterator[None]:
    """Within the context large pictures are decoded one by one.

    A batch that the denoiser has room for can be several times what the decoder has room for:
    SD-XL's, in float32, takes about 4 GB for each picture of 1024 pixels. Pictures differ from
    those decoded together by the order of sums. Small pictures are decoded together, as the
    pipeline does it.
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


def _sliced_vae(pipe: Pipeline) -> Any:
    """The pipeline's VAE if its pictures are to be decoded one by one; else None."""
    vae: Any = getattr(pipe, "vae", None)
    if not hasattr(vae, "use_slicing"):
        return None
    # Sana's VAE does not say its size: its pictures are large.
    pixels = getattr(vae.config, "sample_size", SLICED_FROM)
    return vae if pixels >= SLICED_FROM else None


def halved_batch_size(
    pipe: Pipeline, error: Exception, size: int, smallest: int = 1, *, stacklevel: int = 6
) -> int:
    """The batch size to go on with after an error that means a full memory; warns of it.

    Args:
        pipe: The pipeline.
        error: What was raised by a batch.
        size: Places of that batch.
        smallest: The smallest possible batch.
        stacklevel: As of `warnings.warn`, counted from here; it is to reach the user's own line.

    Raises:
        LocogenError: The smallest batch did not fit. An error that means something else is raised
            as it is.
    """
    if not out_of_memory(error):
        raise error
    if size <= smallest:
        raise LocogenError(
            f"a batch of {size} does not fit the memory of {pipe._execution_device}: {SMALLER}, "
            "or call pipe.vae.enable_tiling(); pictures made before are kept"
        ) from error
    half = max(size // 2, smallest)
    warnings.warn(
        f"a batch of {size} does not fit the memory: going on with {half}", stacklevel=stacklevel
    )
    return half


class GpuMemory:
    """Measures how many pictures fit the memory of the GPU that the pipeline computes on.

    A batch has two peaks: the denoiser's grows with the batch, the decoder's does not, since it
    works on one picture at a time. They are read apart, so that a large decoder does not make
    batches small.

    Attributes:
        is_to_be_measured: Whether the next batch is to say how many fit; False without a GPU.
        before: Bytes in use before the first batch.
        denoising: Bytes at the denoiser's peak; None until the decoder has begun.
    """

    def __init__(self, pipe: Pipeline) -> None:
        import torch

        self.device: torch.device = pipe._execution_device
        self.is_to_be_measured = self.device.type == "cuda" and torch.cuda.is_available()
        self.before = 0
        self.denoising: int | None = None
        if self.is_to_be_measured:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)

    @contextmanager
    def watching_decode(self, pipe: Pipeline) -> Iterator[None]:
        """Within the context, the denoiser's peak is read when the decoder begins."""
        vae = _sliced_vae(pipe)
        if vae is None or not self.is_to_be_measured:
            yield
            return
        handle = vae.decoder.register_forward_pre_hook(self._begin_decoding)
        try:
            yield
        finally:
            handle.remove()

    def _begin_decoding(self, *_: Any) -> None:
        import torch

        # The decoder is called once a picture: the first call is the end of the denoiser's work.
        if self.denoising is None:
            self.denoising = torch.cuda.max_memory_allocated(self.device) - self.before
            torch.cuda.reset_peak_memory_stats(self.device)

    def fitting(self, size: int) -> int:
        """The number of pictures that fit, by the peak of a batch of `size`."""
        import torch

        self.is_to_be_measured = False
        last_peak = torch.cuda.max_memory_allocated(self.device) - self.before
        growing = last_peak if self.denoising is None else self.denoising
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(RESERVE * free / max(growing / size, 1))

    def release(self) -> None:
        """Give cached memory back, so that a smaller batch finds it."""
        import torch

        is_cuda = self.device.type == "cuda" and torch.cuda.is_available()
        if is_cuda and not self.is_to_be_measured:
            torch.cuda.empty_cache()
