"""A context in which pictures are given but for a hole: what does the model put there?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locogen.attacks.loss import Draws
from locogen.interventions.denoiser_calls import announced
from locogen.interventions.steps import DenoisingSteps
from locogen.models.families import denoiser_of, family_of
from locogen.models.hooks import before, hooked, is_dry_run
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def cropped(share: float) -> Callable[[Image], Image]:
    """What shows the middle square of a picture, of this share of its sides, at its full size."""

    def crop(picture: Image) -> Image:
        width, height = picture.size
        left, top = round(width * (1 - share) / 2), round(height * (1 - share) / 2)
        middle = picture.crop((left, top, width - left, height - top))
        return middle.resize((width, height))

    return crop


def smallest_hole(pipe: Pipeline) -> int:
    """The least percent of a picture's sides whose hole holds a latent, and its crop a pixel."""
    latents = denoiser_of(pipe).config.sample_size
    sides = (latents, latents * pipe.vae_scale_factor)
    percents = range(1, 101)
    return next(
        percent
        for percent in percents
        if all(side > 2 * round(side * (1 - percent / 100) / 2) for side in sides)
    )


@dataclass(eq=False)
class _Filling:
    """Which pictures the running call of the denoiser makes: they come in the order of the plan."""

    pipe: Pipeline
    clean: Tensor  # (pictures, channels, height, width)
    share: float
    seed: int
    done: int = 0

    def __post_init__(self) -> None:
        self.steps = DenoisingSteps(self.pipe, family_of(self.pipe))
        side = self.clean.shape[-1]
        edge = round(side * (1 - self.share) / 2)
        self.outside = self.clean.new_ones(1, 1, *self.clean.shape[2:])  # (1, 1, height, width)
        self.outside[..., edge : side - edge, edge : side - edge] = 0
        noise = Draws(self.seed, 0).normal(self.clean.shape)
        self.noise = noise.to(self.clean)  # (pictures, channels, height, width)

    def hook(self, module: Module, args: Any, kwargs: Any) -> Any:
        """Put the given pictures, as noisy as the step, around the hole."""
        import torch

        if is_dry_run():
            return None
        named = dict(zip(("sample", "timestep"), args, strict=False)) | kwargs
        sample, timestep = named["sample"], named["timestep"]
        halves = 2 if self.pipe.do_classifier_free_guidance else 1
        size = len(sample) // halves
        last = len(self.clean) - 1
        places = [min(self.done + place, last) for place in range(size)] * halves
        signal = self.pipe.scheduler.alphas_cumprod.to(sample)  # (timesteps,)
        keep = signal[torch.as_tensor(timestep).long().flatten()[0]]
        around = keep.sqrt() * self.clean[places] + (1 - keep).sqrt() * self.noise[places]
        named["sample"] = torch.where(self.outside.bool(), around.to(sample), sample)
        # A batch that did not get to its end is made again.
        if self.steps.at(timestep) == len(self.steps.begin()) - 1:
            self.done += size
        return (), named


@contextmanager
def filling(pipe: Pipeline, clean: Tensor, share: float, seed: int) -> Iterator[None]:
    """Within the context, the pictures of one run are given but for their middle.

    The denoiser sees the given pictures around the hole at every step; what it puts into the hole
    is its own. Only the hole of the results means something.

    Args:
        pipe: The pipeline; one run is made within the context, with a store of its own.
        clean: Latents of the pictures in the order of the run's plan,
            (pictures, channels, height, width).
        share: Of the picture's sides: how large the hole is.
        seed: Of the noise that is added to what is given.
    """
    state = _Filling(pipe, clean, share, seed)
    hook = before(denoiser_of(pipe), state.hook, "the denoiser")
    label = f"all but the middle {share} is given"
    with hooked([hook]), announced(pipe, label):
        yield
