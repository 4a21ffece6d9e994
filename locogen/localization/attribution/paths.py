"""The prompts' own paths: what the pipeline is called with, how it is called, what it costs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from locogen.console import current
from locogen.interventions.denoiser_calls import Call
from locogen.interventions.indices import index_on
from locogen.interventions.prompts import generators
from locogen.localization.attribution.blending import Blend, Moment
from locogen.models.families import family_of
from locogen.models.text import PromptEncoding
from locogen.pictures.batches import Texts
from locogen.pictures.checks import from_the_seed_alone, scheduler_errors
from locogen.plan import Intervention, Settings
from locogen.types import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

BACKWARD = 2  # what a backward pass costs, in forward passes


@dataclass(eq=False)
class Cost:
    """How many rows went through the denoiser; a gradient counts as the forward passes it is.

    `halves`: the rows of one picture in a call, 2 where a negative prompt guides.
    """

    rows: int = 0
    halves: int = 1

    def call(self, call: Call, *, passes: int = 1) -> None:
        """A call of the denoiser that the pipeline makes, in forward passes."""
        self.rows += len(call.states) * passes
        if call.rows:
            self.halves = len(call.states) // len(call.rows)

    def forward(self, rows: int) -> None:
        """Rows that were run."""
        self.rows += rows

    def gradient(self, rows: int) -> None:
        """Rows that were run, and run backward."""
        self.rows += rows * (1 + BACKWARD)


@dataclass(frozen=True)
class Picture:
    """A prompt and its target under one seed."""

    prompt: str
    target: str
    seed: int


@dataclass(frozen=True, eq=False)
class Paths:
    """Pictures that are run together, as rows of one batch.

    With joint attention the targets' own runs are behind them, one for each, since their keys and
    values are what a layer takes from them.
    """

    blend: Blend
    pictures: Sequence[Picture]
    texts: Texts
    settings: Settings
    cost: Cost = field(default_factory=Cost)

    @property
    def pipe(self) -> Pipeline:
        """The pipeline."""
        return self.blend.pipe

    @property
    def count(self) -> int:
        """How many pictures there are, without targets' own runs."""
        return len(self.pictures)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each row of the batch."""
        prompts = [picture.prompt for picture in self.pictures]
        targets = [picture.target for picture in self.pictures]
        return prompts + targets if self.blend.is_joint else prompts

    @property
    def plan(self) -> list[Intervention]:
        """The rows of the batch, each of which hears its prompt."""
        repeats = 2 if self.blend.is_joint else 1
        seeds = [picture.seed for picture in self.pictures] * repeats
        return [
            Intervention(prompt, prompt, (), seed)
            for prompt, seed in zip(self.prompts, seeds, strict=True)
        ]

    @property
    def tokens(self) -> int:
        """How many tokens of text the denoiser gets."""
        return self.texts.of[self.pictures[0].prompt].states.shape[1]

    def moment(self, rows: range, pictures: Sequence[int], alphas: Mapping[int, Any]) -> Moment:
        """What `rows` of a call hear; `pictures` says which pictures they are."""
        targets = [self.pictures[picture].target for picture in pictures]
        encoded = self._encoded(targets)
        sources = None
        if self.blend.is_joint:
            sources = index_on(encoded.states.device, range(rows.stop, rows.stop + len(rows)))
        return Moment(rows, alphas, self.tokens, encoded, sources)

    def _encoded(self, texts: Sequence[str]) -> PromptEncoding:
        return self.texts.stack(texts)


def run(paths: Paths, *, gradients: bool, decoded: bool = False) -> Tensor:
    """Call the pipeline as it is written: its final latents, or pixels if it has no decoder.

    Args:
        paths: Its prompts, seeds and settings.
        gradients: Whether what comes out can be differentiated by what goes in.
        decoded: Whether to return pixels in 0..1, (rows, 3, height, width), for any pipeline.
    """
    import torch

    pipe = paths.pipe
    family = family_of(pipe)
    output_type = "pt" if decoded else _undecoded(pipe)
    # Diffusers wraps a pipeline's call in `no_grad`; the function inside is the same loop.
    call = inspect.unwrap(type(pipe).__call__)
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**{**bar, "disable": True})
    current().work()
    try:
        with from_the_seed_alone(pipe), scheduler_errors(pipe), torch.set_grad_enabled(gradients):
            output = call(
                pipe,
                **family.options(pipe),
                **{family.guidance_argument: paths.settings.guidance_scale},
                **paths.texts.arguments(paths.prompts),
                generator=generators(paths.plan),
                num_inference_steps=paths.settings.num_inference_steps,
                output_type=output_type,
            )
    finally:
        pipe.set_progress_bar_config(**bar)
    if decoded and getattr(pipe, "vae", None) is None:
        return (output.images / 2 + 0.5).clamp(0, 1)  # IF leaves them between -1 and 1
    return family.pictures(output, output_type)


def _undecoded(pipe: Pipeline) -> str:
    """The output type of latents; of pixels as numbers for a pipeline without a decoder (IF)."""
    return "pt" if getattr(pipe, "vae", None) is None else "latent"
