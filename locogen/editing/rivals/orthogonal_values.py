"""Orthogonal values: what layers read of a text loses the part that is the concept's (AdaVD)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locogen import markup
from locogen.editing.control_edits import avoided, random_words
from locogen.editing.files import read_recorded, write_recorded
from locogen.editing.fit import Options, layers_to_edit, matrices_to_edit, what_instead
from locogen.editing.rivals.at_inference import AtInference, digest_of_vectors, finite
from locogen.editing.weights import weights_of
from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, on_denoiser
from locogen.interventions.layer_inputs import LayerInputs
from locogen.models.families import denoiser_of, family_of, token_spans
from locogen.models.hooks import Hook, after
from locogen.models.layers import Layer, find_layers, select
from locogen.phrasings import phrase_in
from locogen.plan import Concept, PromptPair, one_concept
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

VALUES_FORMAT = 1  # of the file; raised when its meaning changes


@dataclass(frozen=True)
class Shift:
    """How much of the concept's part is removed, by the cosine of a value and the concept's.

    AdaVD's factor: height / (1 + exp(-slope (cosine - threshold))). Values that are the concept's
    lose more than all of it, those that only resemble it keep theirs. A slope of 0 with a height
    of 2 is the plain orthogonal complement: 1 everywhere.

    Attributes:
        threshold: The cosine at which half of the height is reached.
        slope: How sharply.
        height: The most.
    """

    threshold: float = 0.93
    slope: float = 100.0
    height: float = 2.0

    def __post_init__(self) -> None:
        for name in ("threshold", "slope", "height"):
            finite(name, getattr(self, name))

    def of(self, cosine: Tensor) -> Tensor:
        """The factor, of the cosine's shape."""
        import torch

        return self.height * torch.sigmoid(self.slope * (cosine - self.threshold))


@dataclass(frozen=True, eq=False)
class OrthogonalValues(AtInference):
    """What each layer's values are of a concept's name: from `fit_orthogonal_values`.

    It has no weights to merge, so that it cannot be written as a LoRA: it holds within
    `applied` alone.

    Attributes:
        name: The concept's name.
        values: By layer, (channels,).
        marks: Positions at a prompt's beginning that hold nothing of it, and are left alone.
        shift: How much is removed.
        text: What the values are of.
        concepts: What they were fitted for; () of values from a file.

    Example:
        >>> pipe = load("mini")
        >>> values = fit_orthogonal_values(pipe, concept("mini/neon"), threshold=0.5)
        >>> with values.applied(pipe):
        ...     run = generate(pipe, ["a neon cat"], num_inference_steps=1, progress=False)
        >>> values.text, values.layers == tuple(range(16))
        ('neon', True)
    """

    name: str
    values: Mapping[int, Tensor]
    marks: int
    shift: Shift
    text: str
    concepts: tuple[Concept, ...] = field(default=(), repr=False)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers whose values change."""
        return tuple(self.values)

    def applied(self, pipe: Pipeline, strength: float = 1.0) -> AbstractContextManager[Any]:
        """Within the context, values of the prompt lose the part along the concept's value.

        Of each position's value v, in the prompt's rows: v - strength · shift · (v·t / t·t) t, with
        t the concept's value in that layer (AdaVD, arXiv 2412.06143).

        Args:
            pipe: The pipeline.
            strength: How many times it is removed.

        Returns:
            A context manager.

        Raises:
            LocogenError: The model lacks a layer, a layer's values have another width, or the
                strength is no finite number.
        """
        layers = select(find_layers(pipe), self.layers)
        strength = finite("strength", strength)
        family = family_of(pipe)

        def hooks_for(call: Call) -> list[Hook]:
            hooks = []
            for layer in layers:
                matrix = family.matrices(layer.module)["v"]
                hook = self._hook(layer, call, strength)
                hooks.append(after(matrix, hook, f"to_v of {layer.label}"))
            return hooks

        label = f"orthogonal values {digest_of_vectors(self.values)} {self.shift} {self.marks}"
        return on_denoiser(pipe, hooks_for, f"{label} × {strength}")

    def _hook(self, layer: Layer, call: Call, strength: float) -> Any:
        target = self.values[layer.index]  # (channels,)

        def hook(module: Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if not call.rows:
                return None
            if output.shape[-1] != len(target):
                raise LocogenError(
                    f"the values of {layer.label} have {output.shape[-1]} channels, and those of "
                    f"{self.name!r} {len(target)}: fit them on this model"
                )
            rows = output[call.rows.start :, self.marks :]  # (pictures, tokens, channels)
            changed = output.clone()
            part = self._part(rows, target.to(rows))
            changed[call.rows.start :, self.marks :] = rows - strength * part
            return changed

        return hook

    def _part(self, rows: Tensor, target: Tensor) -> Tensor:
        """What is removed of values, of their shape (pictures, tokens, channels)."""
        from torch.nn.functional import cosine_similarity

        along = rows @ target / (target @ target)  # (pictures, tokens)
        shift = self.shift.of(cosine_similarity(rows, target, dim=-1))  # (pictures, tokens)
        return (shift * along)[..., None] * target

    def placebo(
        self, pipe: Pipeline, seed: int = 0, avoid: Iterable[str] | None = None
    ) -> OrthogonalValues:
        """The same with the values of a random word: what it does in itself.

        Args:
            pipe: The pipeline that the values are of.
            seed: Of the word, drawn from the tokenizer's.
            avoid: Texts whose words are not drawn, besides the concept's own and a fact's answers.
                None: the concept's answer and neighbors, which values from a file do not know.

        Returns:
            The placebo.
        """
        texts = [*avoided(self.concepts, avoid), self.text, self.name]
        word = random_words(pipe, texts, 1, seed)
        options = {"layers": self.layers, "text": word, **vars(self.shift)}
        pair = PromptPair(word, "")
        return fit_orthogonal_values(
            pipe, Concept(f"placebo ({word})", "style", (pair,)), **options
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file.

        Args:
            path: The file to write.

        Raises:
            LocogenError: The file cannot be written.
        """
        record = {"format": VALUES_FORMAT, "name": self.name, "text": self.text}
        record |= {"marks": self.marks, "shift": vars(self.shift)}
        tensors = {str(index): values for index, values in self.values.items()}
        write_recorded(Path(path), "orthogonal values", record, tensors)

    @classmethod
    def load(cls, path: str | Path) -> OrthogonalValues:
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The values.

        Raises:
            LocogenError: There is no such file, or it is from another program or a later format.
        """
        record, tensors = read_recorded(Path(path), "orthogonal values", VALUES_FORMAT)
        values = {int(name): tensors[name] for name in sorted(tensors, key=int)}
        shift = Shift(**record["shift"])
        return cls(record["name"], values, record["marks"], shift, record["text"])

    def _repr_html_(self) -> str:
        facts = {"values without": self.text, "layers": len(self.layers), **vars(self.shift)}
        return markup.shown("facts", facts=facts)


def fit_orthogonal_values(
    pipe: Pipeline,
    concept: Concept,
    *,
    layers: Iterable[int] | None = None,
    text: str | None = None,
    threshold: float = 0.93,
    slope: float = 100.0,
    height: float = 2.0,
) -> OrthogonalValues:
    """Look up a concept's values, so that pictures can be made without their part in a prompt's.

    The value of a layer is what its value matrix answers to the last token of the concept's name
    (AdaVD, arXiv 2412.06143). Nothing is trained, no picture is made, and no weight changes.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        concept: The concept.
        layers: A window, or indices of layers; None: all of them.
        text: What names the concept; None: its name alone, of a fact with what it asks for.
        threshold: The cosine at which half of `height` times the concept's part is removed.
        slope: How sharply that depends on the cosine; 0 with a height of 2: the part itself is
            removed everywhere, the plain orthogonal complement.
        height: How many times the part is removed at most.

    Returns:
        The `OrthogonalValues`.

    Raises:
        LocogenError: SD 3 and FLUX, whose text changes from step to step; an empty text; weights
            that cannot be read.

    Example:
        >>> pipe = load("mini")
        >>> values = fit_orthogonal_values(pipe, concept("mini/neon"), layers=[12, 13])
        >>> [tuple(one.shape) for one in values.values.values()]
        [(96,), (64,)]
    """
    import torch

    one_concept(concept)
    family = family_of(pipe)
    if family.joint_attention:
        raise LocogenError(
            f"the text of {family.name} changes with step and picture, so a name has no value of "
            f"its own in a layer: {what_instead(pipe)}"
        )
    words = phrase_in(concept, concept.pairs[0]) if concept.kind != "style" else concept.name
    words = words if text is None else text
    if not words.strip():
        raise LocogenError("text is empty: give words that name the concept")
    indices = [layer.index for layer in find_layers(pipe)] if layers is None else layers
    edited = layers_to_edit(pipe, indices)
    inputs = LayerInputs(pipe, edited)
    place = inputs.places(words, "last_subject")[-1]
    matrices = matrices_to_edit(pipe, edited, Options(matrices="v"))
    weights = weights_of(denoiser_of(pipe), [matrix.weight_name for matrix in matrices])

    values: dict[int, Tensor] = {}
    for layer, matrix in zip(edited, matrices, strict=True):
        weight = weights[matrix.weight_name]  # (channels, width)
        state = inputs.states(words, layer)[place]  # (width,)
        bias = family.matrices(layer.module)["v"].bias
        value = _answer(weight, bias, state)  # (channels,)
        if not torch.linalg.vector_norm(value) > 0:
            raise LocogenError(
                f"{layer.label} answers nothing to {words!r}: leave it out of layers="
            )
        values[layer.index] = value.float()
    marks = token_spans(pipe, words)[0].start
    shift = Shift(threshold, slope, height)
    return OrthogonalValues(concept.name, values, marks, shift, words, (concept,))


def _answer(weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """What a matrix answers to a state, in double precision: (channels,)."""
    value = weight.detach().double().cpu() @ state  # (channels,)
    if bias is None:
        return value
    return value + bias.detach().double().cpu()
