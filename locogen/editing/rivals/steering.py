"""Steering: a concept's direction is subtracted from what layers put out, in every call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locogen import markup
from locogen.editing.files import read_recorded, write_recorded
from locogen.editing.fit import what_instead
from locogen.editing.rivals.at_inference import AtInference, digest_of_vectors, finite
from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, on_denoiser
from locogen.interventions.prompts import active_contexts
from locogen.markup import counted
from locogen.models.families import family_of
from locogen.models.hooks import Hook, after
from locogen.models.layers import Layer, find_layers, select
from locogen.pictures.batches import Texts, call_pipeline
from locogen.plan import Concept, Intervention, Settings, distinct_seeds, one_concept
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

STEERING_FORMAT = 1  # of the file; raised when its meaning changes


@dataclass(frozen=True, eq=False)
class Steering(AtInference):
    """A concept's direction in what each layer puts out, at each step: from `fit_steering`.

    It has no weights to merge, so that it cannot be written as a LoRA: it holds within
    `applied` alone.

    Attributes:
        name: The concept's name.
        directions: By layer, of length 1, (steps, channels).
        settings: How they were measured.

    Example:
        >>> pipe = load("mini")
        >>> steering = fit_steering(pipe, concept("mini/neon").first(2), num_inference_steps=1)
        >>> with steering.applied(pipe):
        ...     run = generate(pipe, ["a neon cat"], num_inference_steps=1, progress=False)
        >>> steering.layers == tuple(range(16))
        True
    """

    name: str
    directions: Mapping[int, Tensor]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the steered layers."""
        return tuple(self.directions)

    def applied(self, pipe: Pipeline, strength: float = 1.0) -> AbstractContextManager[Any]:
        """Within the context, layers put out nothing along the concept's direction.

        Of each picture token's output the positive part along the direction is subtracted (CASteer,
        arXiv 2503.09630), in the prompt's rows, not in those that guidance leads away from. Runs of
        another number of steps take the directions of the steps at the same share of the way.

        Args:
            pipe: The pipeline.
            strength: How many times it is subtracted; 1 leaves nothing, CASteer also uses 2.

        Returns:
            A context manager.

        Raises:
            LocogenError: The model lacks a layer, a layer puts out another number of channels, or
                the strength is no finite number.
        """
        layers = select(find_layers(pipe), self.layers)
        strength = finite("strength", strength)

        def hooks_for(call: Call) -> list[Hook]:
            return [
                after(layer.module, self._hook(layer, call, strength), layer.label)
                for layer in layers
            ]

        label = f"steering {digest_of_vectors(self.directions)} × {strength}"
        return on_denoiser(pipe, hooks_for, label)

    def _hook(self, layer: Layer, call: Call, strength: float) -> Any:
        directions = self.directions[layer.index]  # (steps, channels)

        def hook(module: Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if not call.rows:
                return None
            if output.shape[-1] != directions.shape[-1]:
                raise LocogenError(
                    f"{layer.label} puts out {output.shape[-1]} channels, and the steering has "
                    f"{directions.shape[-1]}: fit it on this model"
                )
            steps = call.progress_in(len(directions))
            direction = directions[steps].to(output)[:, None]  # (1 or pictures, 1, channels)
            rows = output[call.rows.start :]  # (pictures, picture tokens, channels)
            along = (rows * direction).sum(-1, keepdim=True).clamp(min=0)  # (pictures, tokens, 1)
            changed = output.clone()
            changed[call.rows.start :] = rows - strength * along * direction
            return changed

        return hook

    def placebo(
        self, pipe: Pipeline, seed: int = 0, avoid: Iterable[str] | None = None
    ) -> Steering:
        """The same along random directions: what it does in itself.

        Args:
            pipe: Not looked at.
            seed: Of the directions.
            avoid: Not looked at: directions are drawn, not words.

        Returns:
            The placebo.
        """
        import torch

        dice = torch.Generator().manual_seed(seed)
        directions: dict[int, Tensor] = {}
        for index, old in self.directions.items():
            random = torch.randn(old.shape, generator=dice)  # (steps, channels)
            directions[index] = random / random.norm(dim=1, keepdim=True)
        return Steering(f"placebo (random directions, seed {seed})", directions, self.settings)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Args:
            path: The file to write.

        Raises:
            LocogenError: The file cannot be written.
        """
        record = {"format": STEERING_FORMAT, "name": self.name, "settings": dict(self.settings)}
        tensors = {str(index): values for index, values in self.directions.items()}
        write_recorded(Path(path), "steering", record, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Steering:
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The steering.

        Raises:
            LocogenError: There is no such file, or it is from another program or a later format.
        """
        record, tensors = read_recorded(Path(path), "steering", STEERING_FORMAT)
        directions = {int(name): tensors[name] for name in sorted(tensors, key=int)}
        return cls(record["name"], directions, record["settings"])

    def _repr_html_(self) -> str:
        facts = {"steering away from": self.name, "layers": len(self.layers), **self.settings}
        return markup.shown("facts", facts=facts)


def fit_steering(
    pipe: Pipeline,
    concept: Concept,
    *,
    layers: Iterable[int] | None = None,
    seeds: Iterable[int] = (0, 1),
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    batch_size: int = 32,
) -> Steering:
    """Measure a concept's direction in the layers' outputs, by pictures with and without it.

    The direction of a layer and step is the mean difference of its output between the prompts of
    the concept's pairs and their targets, under the same seeds, averaged over the picture (CASteer,
    arXiv 2503.09630). Nothing is trained, and no weight changes.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        concept: The concept, with its prompt pairs.
        layers: A window, or indices of layers; None: all of them.
        seeds: Of the pictures.
        num_inference_steps: Denoising steps, each with directions of its own.
        guidance_scale: Of the pictures.
        batch_size: Pictures at once.

    Returns:
        The `Steering`.

    Raises:
        LocogenError: SD 3 and FLUX, whose layers put out text and picture together; no difference
            between prompts and targets; a layer that is not run in so few steps (Wan 2.2); an open
            context.

    Example:
        >>> pipe = load("mini")
        >>> few = {"seeds": [0], "num_inference_steps": 2, "layers": [12, 13]}
        >>> steering = fit_steering(pipe, concept("mini/neon").first(1), **few)
        >>> [tuple(values.shape) for values in steering.directions.values()]
        [(2, 96), (2, 64)]
    """
    one_concept(concept)
    family = family_of(pipe)
    if family.joint_attention:
        raise LocogenError(
            f"the layers of {family.name} put out text and picture together, so there is no output "
            f"of text alone to steer: {what_instead(pipe)}"
        )
    if active_contexts(pipe):
        raise LocogenError("the model is within another context: call fit_steering outside of it")
    every = find_layers(pipe)
    steered = every if layers is None else select(every, layers)
    settings = Settings(num_inference_steps, float(guidance_scale), batch_size)
    numbers = distinct_seeds(seeds)
    means = []
    for texts in zip(*[(pair.prompt, pair.target) for pair in concept.pairs], strict=True):
        rows = [
            Intervention(text, text, (), seed, "baseline") for text in texts for seed in numbers
        ]
        means.append(_mean_outputs(pipe, steered, rows, settings))
    with_concept, without = means

    directions: dict[int, Tensor] = {}
    for layer in steered:
        difference = with_concept[layer.index] - without[layer.index]  # (steps, channels)
        lengths = difference.norm(dim=1, keepdim=True)  # (steps, 1)
        if not (lengths > 0).all():
            raise LocogenError(
                f"{layer.label} puts out the same with and without {concept.name!r}: leave it out "
                "of layers="
            )
        directions[layer.index] = (difference / lengths).float().cpu()
    record = {"seeds": list(numbers), "pairs": len(concept.pairs), **settings.as_dict()}
    return Steering(concept.name, directions, record)


def _mean_outputs(
    pipe: Pipeline, layers: Sequence[Layer], rows: Sequence[Intervention], settings: Settings
) -> dict[int, Tensor]:
    """The mean output of each layer over pictures and their tokens, (steps, channels) each."""
    import torch

    sums: defaultdict[tuple[int, int], Any] = defaultdict(float)

    def hooks_for(call: Call) -> list[Hook]:
        return [after(layer.module, adding(layer.index, call), layer.label) for layer in layers]

    def adding(index: int, call: Call) -> Any:
        def hook(module: Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if call.rows:
                pictures = output[call.rows.start :].double().mean(1)  # (pictures, channels)
                sums[index, call.step()] += pictures.sum(0)  # (channels,)

        return hook

    texts = Texts(pipe, rows)
    kind = "latent" if hasattr(pipe, "vae") else "np"  # only what the layers put out is looked at
    with on_denoiser(pipe, hooks_for):
        for part in _parts(rows, settings.batch_size):
            arguments = texts.arguments([row.prompt for row in part])
            call_pipeline(pipe, part, arguments, settings, output_type=kind)
    means: dict[int, Tensor] = {}
    for layer in layers:
        steps = _nearest_steps(layer, sums, settings.num_inference_steps)
        sums_of_layer = [sums[layer.index, step] for step in steps]  # (channels,) each
        means[layer.index] = torch.stack(sums_of_layer) / len(rows)  # (steps, channels)
    return means


def _nearest_steps(layer: Layer, sums: Iterable[tuple[int, int]], count: int) -> list[int]:
    """For each step the nearest one at which the layer was run.

    Denoisers that take turns (Wan 2.2) run at some of the steps; at the others a layer has the
    mean of the nearest one, for runs of another number of steps.
    """
    seen = sorted(step for index, step in sums if index == layer.index)
    if not seen:
        raise LocogenError(
            f"{layer.label} is not run in {counted(count, 'step')}: take more steps, or leave it "
            "out of layers="
        )
    return [min(seen, key=lambda one, step=step: abs(one - step)) for step in range(count)]


def _parts(rows: Sequence[Intervention], size: int) -> Iterator[Sequence[Intervention]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
