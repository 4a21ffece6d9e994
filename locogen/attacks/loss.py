"""The loss that a model was trained with: how far its denoiser is from the noise of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from locogen.editing.weights import refuse_edited
from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import active_contexts, bare_calls
from locogen.models.families import denoiser_of, family_of
from locogen.types import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SUPPORTED = "Stable Diffusion 1 and 2"
PREDICTIONS = ("epsilon", "v_prediction", "sample")
ENCODED_AT_ONCE = 16  # pictures

Denoiser = Callable[..., Any]


def check_attackable(pipe: Pipeline, verb: str = "attack") -> None:
    """Raise `LocogenError` for a model whose training loss or text side is not known here.

    Or for one that is edited already: what it makes would be taken for the unedited model's.
    """
    family = family_of(pipe)
    if family.name != SUPPORTED:
        raise LocogenError(
            f"attacks are written for {SUPPORTED} (the mini model is one), and this "
            f"{type(pipe).__name__} is of {family.name}: attack a pipeline of that family"
        )
    if not hasattr(pipe, "text_encoder"):
        raise LocogenError(
            f"{type(pipe).__name__} has no text encoder: give the whole pipeline, as from load()"
        )
    if active_contexts(pipe):
        raise LocogenError(
            f"the model is within another context, which {verb} would take for a part of it: "
            f"call {verb} outside of it, and give it as the edit"
        )
    refuse_edited(pipe, verb)
    prediction = pipe.scheduler.config.prediction_type
    if prediction not in PREDICTIONS or not hasattr(pipe.scheduler, "alphas_cumprod"):
        raise LocogenError(
            f"the scheduler {type(pipe.scheduler).__name__} predicts {prediction!r}, whose loss in "
            f"training is not known here: give the pipeline one of {', '.join(PREDICTIONS)}"
        )
    if any(str(part.dtype).removeprefix("torch.") == "float16" for part in _differentiated(pipe)):
        raise LocogenError(
            "gradients vanish in float16: load the model with dtype='float32' or 'bfloat16'"
        )
    if getattr(pipe, "_all_hooks", ()):
        raise LocogenError(
            "the pipeline is offloaded, and gradients need its parts where they compute: load it "
            "without offload="
        )


def _differentiated(pipe: Pipeline) -> tuple[Any, ...]:
    """What gradients pass."""
    return pipe.text_encoder, denoiser_of(pipe)


def check_gradients() -> None:
    """Raise `LocogenError` where PyTorch has turned gradients off for good."""
    import torch

    if torch.is_inference_mode_enabled():
        raise LocogenError(
            "nothing can be trained within torch.inference_mode(): call this outside of it "
            "(torch.no_grad() is no hindrance)"
        )


class Draws:
    """Rows, times and noise of a batch: drawn on the CPU, so that every device gets the same."""

    def __init__(self, seed: int, step: int) -> None:
        import torch

        self._dice = torch.Generator().manual_seed(seed * 1_000_003 + step)

    def integers(self, below: int, count: int) -> Tensor:
        """Uniform whole numbers from 0 to before `below`, (count,)."""
        import torch

        return torch.randint(0, below, (count,), generator=self._dice)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers."""
        import torch

        return torch.randn(tuple(shape), generator=self._dice)


@dataclass(frozen=True, eq=False)
class Noised:
    """Pictures with noise, and what the denoiser should say of them.

    Attributes:
        rows: Which pictures they are, (rows,).
        latents: With noise, (rows, channels, height, width).
        times: Training timesteps, (rows,).
        target: What the denoiser should predict, of the latents' shape.
    """

    rows: Tensor
    latents: Tensor
    times: Tensor
    target: Tensor


@dataclass(frozen=True, eq=False)
class DenoisingLoss:
    """The model's own loss on pictures: ε, velocity or picture, as its scheduler says.

    Attributes:
        pipe: The pipeline.
        clean: Latents of the pictures, (pictures, channels, height, width).
    """

    pipe: Pipeline
    clean: Tensor

    @classmethod
    def of(cls, pipe: Pipeline, pictures: Sequence[Image]) -> DenoisingLoss:
        """The loss on these pictures, which are resized to the model's own size."""
        return cls(pipe, latents_of(pipe, pictures))

    @cached_property
    def _signal(self) -> Tensor:
        """The share of the variance that is picture, by timestep, (timesteps,)."""
        return self.pipe.scheduler.alphas_cumprod.to(self.clean.device)

    def draw(self, seed: int, step: int, batch: int) -> Noised:
        """A batch by its step alone, so that a resumed training sees what an unbroken one sees."""
        draws = Draws(seed, step)
        places = draws.integers(len(self.clean), batch)  # (rows,)
        times = draws.integers(len(self._signal), len(places)).to(self.clean.device)  # (rows,)
        noise = draws.normal((len(places), *self.clean.shape[1:])).to(self.clean)
        return self._noised(places, times, noise)

    def fixed(self, seed: int, count: int) -> Noised:
        """A batch that is always the same: pictures in turn, times spread evenly."""
        import torch

        places = torch.arange(count) % len(self.clean)  # (rows,)
        share = (torch.arange(count) + 0.5) / count
        times = (share * len(self._signal)).long().to(self.clean.device)  # (rows,)
        noise = Draws(seed, 0).normal((count, *self.clean.shape[1:])).to(self.clean)
        return self._noised(places, times, noise)

    def _noised(self, places: Tensor, times: Tensor, noise: Tensor) -> Noised:
        clean = self.clean[places.to(self.clean.device)]  # (rows, channels, height, width)
        keep = self._signal[times].sqrt()[:, None, None, None].to(clean)  # (rows, 1, 1, 1)
        lost = (1 - self._signal[times]).sqrt()[:, None, None, None].to(clean)
        target = {
            "epsilon": noise,
            "v_prediction": keep * noise - lost * clean,  # Salimans & Ho 2022
            "sample": clean,
        }[self.pipe.scheduler.config.prediction_type]
        return Noised(places, keep * clean + lost * noise, times, target)

    def per_row(self, noised: Noised, states: Tensor, denoiser: Denoiser | None = None) -> Tensor:
        """The mean squared error of each row, (rows,), in float32.

        Args:
            noised: The batch.
            states: What the layers get of text, (rows, tokens, width).
            denoiser: What predicts; None: the pipeline's denoiser.
        """
        predict = denoiser_of(self.pipe) if denoiser is None else denoiser
        # By name: calls with the text by position are not what contexts expect. What acts at
        # inference acts here too: the attack is on the model as it is shipped.
        with bare_calls():
            predicted = predict(
                noised.latents, noised.times, encoder_hidden_states=states.to(noised.latents)
            ).sample
        error = (predicted.float() - noised.target.float()).square()
        return error.flatten(1).mean(1)


def latents_of(pipe: Pipeline, pictures: Sequence[Image]) -> Tensor:
    """What the model's encoder makes of pictures, (pictures, channels, height, width)."""
    import numpy as np
    import torch

    side = denoiser_of(pipe).config.sample_size * pipe.vae_scale_factor
    arrays = []
    for picture in pictures:
        fitting = picture.convert("RGB")
        if fitting.size != (side, side):
            fitting = fitting.resize((side, side))
        arrays.append(np.asarray(fitting))
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1
    pixels = pixels.to(pipe.vae.device, pipe.vae.dtype)  # (pictures, 3, height, width)
    with torch.no_grad():
        parts = [
            pipe.vae.encode(part).latent_dist.mode() * pipe.vae.config.scaling_factor
            for part in pixels.split(ENCODED_AT_ONCE)
        ]
    return torch.cat(parts)  # (pictures, channels, height, width)
