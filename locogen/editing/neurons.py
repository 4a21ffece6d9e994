"""Neurons: output channels of key and value matrices that differ with and without a concept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen import markup, stats
from locogen.errors import LocogenError
from locogen.interventions.clamping import Place, Selection
from locogen.interventions.layer_inputs import TOKENS, LayerInputs, Tokens
from locogen.interventions.prompts import active_contexts
from locogen.models.families import check_phrasings, denoiser_of, family_of, warn_unread
from locogen.models.layers import Layer, find_layers, select
from locogen.models.offload import stands_on
from locogen.phrasings import Phrasing, own_phrasings, subject_in
from locogen.plan import Concept, PromptPair, one_concept
from locogen.stats import Array
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

MATRICES = ("k", "v")


@dataclass(frozen=True, eq=False)
class Neurons:
    """Every neuron of some layers, and how clearly it separates prompts with and without a concept.

    Attributes:
        concept: The concept's name.
        table: One row a neuron: `layer matrix channel z mean_with mean_without p_value`. `z` is
            Welch's, positive if the neuron's output is larger with the concept; the means are of
            its output at the chosen tokens. `p_value` is two-sided and adjusted for all rows
            (Benjamini & Hochberg): among thousands of neurons some stand out by chance.
        without: What each matrix puts out on prompts without the concept, see `Selection`.
        settings: How it was measured.

    Example:
        >>> pipe = load("mini")
        >>> neurons = find_neurons(pipe, concept("mini/neon"), layers=[2, 3])
        >>> with clamp(pipe, neurons.top(5)):  # 5 of the keys and 5 of the values in each layer
        ...     run = generate(pipe, ["a picture of a cat"], num_inference_steps=1, progress=False)
        >>> neurons.random(5, seed=1).overlap(neurons.random(5, seed=1)).shared
        20
    """

    concept: str
    table: pd.DataFrame
    without: Mapping[Place, Tensor] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    def top(self, k: int, *, matrices: Iterable[str] = MATRICES) -> Selection:
        """The `k` neurons of each matrix with the largest |z|.

        Each layer's keys and values are ranked separately, as published.

        Args:
            k: Number of neurons a matrix.
            matrices: "k", "v" or both.

        Returns:
            A `Selection`, for `clamp`.

        Raises:
            LocogenError: A matrix has fewer neurons, or there is no such matrix.
        """
        order: dict[Place, list[int]] = {}
        for place, rows in self._by_place():
            order[place] = np.argsort(-rows["z"].abs().to_numpy(), kind="stable").tolist()
        return self._first(k, matrices, order)

    def random(self, k: int, seed: int = 0, *, matrices: Iterable[str] = MATRICES) -> Selection:
        """`k` random neurons of each matrix: what `top` is compared with.

        Args:
            k: Number of neurons a matrix, drawn from all of them.
            seed: Seed of the draw.
            matrices: "k", "v" or both.

        Returns:
            A `Selection`, for `clamp`.

        Raises:
            LocogenError: As `top`.
        """
        dice = np.random.default_rng(seed)
        order: dict[Place, list[int]] = {}
        for place, rows in self._by_place():
            order[place] = dice.permutation(len(rows)).tolist()
        return self._first(k, matrices, order)

    def _by_place(self) -> list[tuple[Place, pd.DataFrame]]:
        """The rows of each matrix, in the order of their channels."""
        rows_by_place = []
        for layer, matrix in self.without:
            inside = (self.table["layer"] == layer) & (self.table["matrix"] == matrix)
            rows_by_place.append(((layer, matrix), self.table[inside]))
        return rows_by_place

    def _first(
        self, k: int, matrices: Iterable[str], order: Mapping[Place, Sequence[int]]
    ) -> Selection:
        """The first `k` channels of each matrix, in an order of all of them."""
        selected = set(matrices)
        if not selected or not selected <= set(MATRICES):
            raise LocogenError(f"matrices is {sorted(selected)}: use 'k', 'v', or both")
        smallest = min(map(len, order.values()))
        is_whole = isinstance(k, (int, np.integer)) and not isinstance(k, bool)
        if not is_whole or not 0 <= k <= smallest:
            raise LocogenError(
                f"k is {k!r}: give the number of neurons per matrix, from 0 to {smallest}"
            )
        channels: dict[Place, tuple[int, ...]] = {}
        for place, ranked in order.items():
            if place[1] in selected:
                channels[place] = tuple(ranked[:k])
        return Selection(channels, {place: self.without[place] for place in channels})

    def _repr_html_(self) -> str:
        table: Any = self.table
        distinct = int((table["p_value"] <= stats.ALPHA).sum())
        strongest = table.sort_values("z", key=abs, ascending=False, kind="stable").head(10)
        return markup.shown(
            "neurons",
            concept=self.concept,
            distinct=distinct,
            count=len(self),
            alpha=stats.ALPHA,
            settings=self.settings,
            table=markup.table_html(strongest),
        )


def find_neurons(
    pipe: Pipeline,
    concept: Concept,
    *,
    layers: Iterable[int],
    phrasings: Sequence[Phrasing | PromptPair | tuple[str, str]] | None = None,
    subject: str | None = None,
    tokens: Tokens | None = None,
) -> Neurons:
    """Score each output channel of `to_k` and `to_v` by how it differs with and without a concept.

    Welch's z (Basu et al. 2024, section 6) over prompts with the concept against prompts without
    it. A prompt counts once: outputs at several positions are averaged. No picture is made.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        concept: What to look for.
        layers: A window, or indices of layers, counted from 0.
        phrasings: Texts (source, target) with and without the concept, at least two; None: the
            concept's pairs.
        subject: Words of the sources that are the concept; None: the concept's name.
        tokens: Where outputs are read. "last_subject": the subject's last token, in the target
            the last one of the words in its place, or of the target if nothing is in its place.
            "subject": all its tokens. "end": the state after the prompt. "all": every position
            but the start mark, with padding if the model reads it. None: "subject" for families
            with T5, else "last_subject".

    Returns:
        The `Neurons` of all these layers.

    Raises:
        LocogenError: Fewer than two pairs, a prompt without its subject, a layer that the model
            does not have, outputs that are not finite, prompts of different lengths for Lumina 2,
            or an open `intervene` or `clamp`.

    Example:
        >>> pipe = load("mini")
        >>> neurons = find_neurons(pipe, concept("mini/neon"), layers=[2, 3], tokens="end")
        >>> sorted(neurons.top(1).channels)
        [(2, 'k'), (2, 'v'), (3, 'k'), (3, 'v')]
    """
    # What the matrices put out depends on the text alone, so no picture is needed. Where text
    # evolves from block to block (SD 3, FLUX), a short run of each prompt is read, on average over
    # its steps (`layer_inputs.LayerInputs`).
    one_concept(concept)
    tokens = tokens or family_of(pipe).tokens
    if tokens not in TOKENS:
        raise LocogenError(f"tokens is {tokens!r}: use one of {', '.join(TOKENS)}")
    if active_contexts(pipe):
        raise LocogenError(
            "the model is within clamp or intervene: call find_neurons outside of these contexts"
        )
    inputs = LayerInputs(pipe, select(find_layers(pipe), layers))
    phrasings_to_read = _phrasings(concept, phrasings, subject)
    check_phrasings(pipe, phrasings_to_read)
    prompts: list[str] = []
    for phrasing in phrasings_to_read:
        prompts += [phrasing.source, phrasing.target]
    warn_unread(pipe, prompts)

    pairs = [_pair(inputs, phrasing, tokens) for phrasing in phrasings_to_read]
    if len(pairs) < 2:
        raise LocogenError(
            f"{concept.name!r} has {len(pairs)} pair of prompts, and a spread needs two: add "
            "prompt pairs, or give phrasings="
        )
    table, without = _scored(inputs, pairs)
    settings = {
        "pairs": len(pairs),
        "tokens": tokens,
        "p_value": "Welch t, Benjamini-Hochberg over all neurons",
    }
    return Neurons(concept.name, table, without, settings)


def _phrasings(
    concept: Concept,
    phrasings: Sequence[Phrasing | PromptPair | tuple[str, str]] | None,
    subject: str | None,
) -> Sequence[Phrasing]:
    """Prompts with and without the concept: its pairs, or the user's phrasings."""
    if phrasings is None and subject is None:
        return [
            Phrasing(pair.prompt, pair.target, subject_in(concept, pair)) for pair in concept.pairs
        ]
    if phrasings is None:
        phrasings = concept.pairs
    return own_phrasings(phrasings, subject or concept.name)


@dataclass(frozen=True)
class _At:
    """A prompt, and the token positions at which outputs are read."""

    prompt: str
    positions: tuple[int, ...]


def _pair(inputs: LayerInputs, phrasing: Phrasing, tokens: Tokens) -> tuple[_At, _At]:
    """Where to read the source, which has the concept, and the target, which does not."""
    source = phrasing.source
    target = phrasing.target
    if tokens in ("all", "end"):
        of_source = inputs.places(source, tokens)
        of_target = inputs.places(target, tokens)
    else:
        of_source = inputs.places(source, tokens, phrasing.subject)
        # The words in the subject's place; of a target that only leaves it out, the last word.
        of_target = inputs.places(target, "last_subject", phrasing.instead or None)
    return _At(source, of_source), _At(target, of_target)


def _scored(
    inputs: LayerInputs, pairs: Sequence[tuple[_At, _At]]
) -> tuple[pd.DataFrame, dict[Place, Tensor]]:
    """The table of `Neurons`, and each matrix' mean output without the concept."""
    import pandas as pd

    with_concept = [source for source, _ in pairs]
    without_concept = [target for _, target in pairs]
    parts: list[pd.DataFrame] = []
    without: dict[Place, Tensor] = {}
    for layer in inputs.layers:
        for matrix, module in inputs.family.matrices(layer.module).items():
            # (prompts, tokens, channels) each
            outputs_with = _outputs(module, inputs, with_concept, layer, matrix)
            outputs_without = _outputs(module, inputs, without_concept, layer, matrix)
            x = _mean_at_positions(outputs_with, with_concept)  # (prompts, channels)
            y = _mean_at_positions(outputs_without, without_concept)  # (prompts, channels)
            part = {
                "layer": layer.index,
                "matrix": matrix,
                "channel": range(x.shape[1]),
                "z": stats.welch_z(x, y),
                "mean_with": x.mean(0),
                "mean_without": y.mean(0),
                "p_value": stats.welch_p(x, y),
            }
            parts.append(pd.DataFrame(part))
            # By position: a clamped neuron must not put a word's value at the start mark, which
            # is the same in every prompt and gets most of the attention.
            without[layer.index, matrix] = outputs_without.mean(0).float().cpu()
    table = pd.concat(parts, ignore_index=True)
    table["p_value"] = stats.false_discovery(table["p_value"].to_numpy())
    return table, without


def _outputs(
    module: Module, inputs: LayerInputs, prompts: Iterable[_At], layer: Layer, matrix: str
) -> Tensor:
    """What a matrix puts out, adapters included, in float64, (prompts, tokens, channels)."""
    import torch

    of_prompts = [inputs.states(at.prompt, layer) for at in prompts]
    if len({len(states) for states in of_prompts}) > 1:  # means are taken position by position
        raise LocogenError(
            f"{inputs.family.name} reads these prompts as different numbers of tokens, so that no "
            "position is the same in all: give phrasings= of as many tokens each"
        )
    states = torch.stack(of_prompts)
    dtype = next(module.parameters()).dtype
    # Weights stored in 8 bits (float8, quantized) compute in another type: states are not rounded
    # to how weights are stored.
    if dtype.itemsize < 2:
        dtype = denoiser_of(inputs.pipe).dtype
    with torch.no_grad():
        outputs = module(states.to(stands_on(module), dtype)).cpu().double()
    outputs = outputs[..., inputs.family.columns(layer.module)[matrix]]
    if not torch.isfinite(outputs).all():
        raise LocogenError(
            f"to_{matrix} of layer {layer.index} has non-finite outputs: load the model in float32"
        )
    return outputs


def _mean_at_positions(outputs: Tensor, prompts: Sequence[_At]) -> Array:
    """Each prompt's mean over its positions, (prompts, tokens, channels) -> (prompts, channels)."""
    import torch

    means: list[Tensor] = []
    for states, at in zip(outputs, prompts, strict=True):
        means.append(states[list(at.positions)].mean(0))
    return torch.stack(means).cpu().numpy()
