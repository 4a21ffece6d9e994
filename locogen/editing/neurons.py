"""Neurons: which output channels of a layer's key and value matrices tell that a concept is in the prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen import stats
from locogen.errors import LocogenError
from locogen.interventions.clamping import Place, Selection
from locogen.interventions.layer_inputs import TOKENS, LayerInputs, Tokens
from locogen.interventions.prompts import active_contexts
from locogen.models.families import check_phrasings, denoiser_of, family_of, warn_unread
from locogen.models.layers import Layer, find_layers
from locogen.models.offload import stands_on
from locogen.phrasings import Phrasing, own_phrasings, subject_in
from locogen.plan import Concept, PromptPair

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

MATRICES = ("k", "v")


@dataclass(frozen=True, eq=False)
class Neurons:
    """Every neuron of some layers with how surely it tells a concept.

    `table`, one row a neuron: `layer matrix channel z mean_with mean_without p_value`. z is Welch's, positive where
    the neuron puts out more with the concept; the means are its output at the chosen tokens; `p_value` is two-sided
    and adjusted for all rows of the table (Benjamini & Hochberg), since among thousands of neurons some stand out by
    chance. `without`: see `Selection`.
    """

    concept: str
    table: pd.DataFrame
    without: Mapping[Place, Tensor] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.table)

    def top(self, k: int, *, matrices: Iterable[str] = MATRICES) -> Selection:
        """The `k` neurons of each matrix (each layer's, keys and values apart, as published) with the largest |z|.

        `matrices`: "k", "v" or both. Raises `LocogenError` where a matrix has not so many.
        """
        order = {
            place: np.argsort(-rows["z"].abs().to_numpy(), kind="stable")
            for place, rows in self._by_place()
        }
        return self._select(k, matrices, order)

    def random(self, k: int, seed: int = 0, *, matrices: Iterable[str] = MATRICES) -> Selection:
        """As many neurons of each matrix, drawn from all of them: what `top` is compared with."""
        rng = np.random.default_rng(seed)
        return self._select(
            k, matrices, {place: rng.permutation(len(rows)) for place, rows in self._by_place()}
        )

    def _by_place(self) -> list[tuple[Place, pd.DataFrame]]:
        table: Any = self.table
        return [
            (place, table[(table.layer == place[0]) & (table.matrix == place[1])])
            for place in self.without
        ]

    def _select(self, k: int, matrices: Iterable[str], order: Mapping[Place, Any]) -> Selection:
        wanted = set(matrices)
        if not wanted or not wanted <= set(MATRICES):
            raise LocogenError(f"matrices {sorted(wanted)}: take 'k', 'v', or both")
        narrow = min(map(len, order.values()))
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 0 <= k <= narrow:
            raise LocogenError(
                f"k is {k!r}: give how many neurons a matrix, a whole number from 0 to {narrow}"
            )
        channels = {
            place: tuple(map(int, found[:k]))
            for place, found in order.items()
            if place[1] in wanted
        }
        return Selection(channels, {place: self.without[place] for place in channels})

    def _repr_html_(self) -> str:
        table: Any = self.table
        sure = int((table["p_value"] <= 0.05).sum())
        told = " · ".join(f"{escape(str(k))} {escape(str(v))}" for k, v in self.settings.items())
        head = (
            table.sort_values("z", key=abs, ascending=False, kind="stable").head(10)._repr_html_()
        )
        return f"<p><b>Neurons</b> of {escape(self.concept)}: {sure} of {len(self)} at p ≤ 0.05</p><p>{told}</p>{head}"


@dataclass(frozen=True)
class _Question:
    """Two prompts, and the token positions at which each is listened to."""

    source: str
    target: str
    at_source: tuple[int, ...]
    at_target: tuple[int, ...]


def find_neurons(
    pipe: Any,
    concept: Concept,
    *,
    layers: Iterable[int],
    phrasings: Sequence[Phrasing | PromptPair | tuple[str, str]] | None = None,
    subject: str | None = None,
    tokens: Tokens | None = None,
) -> Neurons:
    """Score each output channel of `to_k` and `to_v` by how it differs between prompts with and without a concept.

    Welch's z (Basu et al. 2024, section 6) over the concept's pairs, prompts against targets, or over your own
    `phrasings` (source, target) that share the `subject` words (default: the concept's name). What a layer's matrices
    put out depends on the text alone, so no picture is made; where text evolves from block to block (SD 3, FLUX), a
    short run of each prompt is read, on average over its steps. `layers`: a window, or any ints.

    `tokens`, where to listen (None: "subject" for families with T5, else "last_subject"): "last_subject", the last
    token of the subject against that of the words in its place, or else the target's last word; "subject", all its
    tokens; "end", the state after the prompt; "all", every position but the start mark, padding included where it is
    heard. A prompt counts once: several positions are averaged.

    Raises `LocogenError` for fewer than two pairs, a prompt without its subject, layers that are not there, non-finite
    outputs, and within `intervene` or `clamp`.
    """
    tokens = tokens or family_of(pipe).tokens
    if tokens not in TOKENS:
        raise LocogenError(f"tokens is {tokens!r}: take one of {', '.join(TOKENS)}")
    if active_contexts(pipe):
        raise LocogenError(
            "the model is clamped or intervened on: find neurons outside of these contexts"
        )
    chosen = _chosen(find_layers(pipe), layers)
    reader = LayerInputs(pipe, chosen)
    told = _phrasings(concept, phrasings, subject)
    check_phrasings(pipe, told)
    warn_unread(pipe, [text for phrasing in told for text in (phrasing.source, phrasing.target)])
    asked = [_question(reader, phrasing, tokens) for phrasing in told]
    if len(asked) < 2:
        raise LocogenError(
            f"{concept.name!r} has {len(asked)} pair of prompts: a spread needs at least two"
        )
    return _score(reader, concept.name, asked, tokens)


def _chosen(found: Sequence[Layer], layers: Iterable[int]) -> list[Layer]:
    wanted = list(dict.fromkeys(int(i) for i in layers))
    if not wanted:
        raise LocogenError(
            "there are no layers to search: give a window or some of find_layers(pipe)"
        )
    beyond = [i for i in wanted if not 0 <= i < len(found)]
    if beyond:
        raise LocogenError(f"layers {beyond} are not there: the model has 0 to {len(found) - 1}")
    return [found[i] for i in wanted]


def _phrasings(
    concept: Concept, own: Sequence[Any] | None, subject: str | None
) -> Sequence[Phrasing]:
    """Prompts with and without the concept: its pairs, whose subject follows from the kind, or the user's own."""
    if own is not None or subject is not None:
        return own_phrasings(concept.pairs if own is None else own, subject or concept.name)
    return [Phrasing(pair.prompt, pair.target, subject_in(concept, pair)) for pair in concept.pairs]


def _question(reader: LayerInputs, told: Phrasing, tokens: Tokens) -> _Question:
    source, target = told.source, told.target
    if tokens in ("all", "end"):
        return _Question(
            source, target, reader.places(source, tokens), reader.places(target, tokens)
        )
    instead = told.instead
    other = (
        reader.places(target, "last_subject", instead)
        if instead
        else reader.places(target, "last_subject")
    )
    return _Question(source, target, reader.places(source, tokens, told.subject), other)


def _score(reader: LayerInputs, name: str, asked: Sequence[_Question], tokens: Tokens) -> Neurons:
    import pandas as pd

    parts, without = [], {}
    for layer in reader.layers:
        for matrix, module in reader.family.matrices(layer.module).items():
            a = _outputs(
                module, reader, [q.source for q in asked], layer, matrix
            )  # (prompts, tokens, channels)
            b = _outputs(module, reader, [q.target for q in asked], layer, matrix)
            x = _heard(a, [q.at_source for q in asked])  # (prompts, channels)
            y = _heard(b, [q.at_target for q in asked])
            without[layer.index, matrix] = b.mean(0).float().cpu()
            part = {
                "layer": layer.index,
                "matrix": matrix,
                "channel": range(x.shape[1]),
                "z": stats.welch_z(x, y),
            }
            means = {"mean_with": x.mean(0), "mean_without": y.mean(0)}
            parts.append(pd.DataFrame(part | means | {"p_value": stats.welch_p(x, y)}))
    table = pd.concat(parts, ignore_index=True)
    table["p_value"] = stats.false_discovery(table["p_value"].to_numpy())
    told = {
        "pairs": len(asked),
        "tokens": tokens,
        "p_value": "Welch t, Benjamini-Hochberg over all neurons",
    }
    return Neurons(name, table, without, told)


def _outputs(
    module: Any, reader: LayerInputs, prompts: Sequence[str], layer: Layer, matrix: str
) -> Tensor:
    """What a matrix puts out, adapters included, in float64."""
    import torch

    states = torch.stack(
        [reader.states(prompt, layer) for prompt in prompts]
    )  # (prompts, tokens, width)
    dtype = next(module.parameters()).dtype
    if (
        dtype.itemsize < 2
    ):  # how the weights are stored (float8, quantized): the states are not rounded to that
        dtype = denoiser_of(reader.pipe).dtype
    with torch.no_grad():
        outputs = (
            module(states.to(stands_on(module), dtype)).cpu().double()
        )  # (prompts, tokens, channels)
    if not torch.isfinite(outputs).all():
        raise LocogenError(
            f"to_{matrix} of layer {layer.index} puts out non-finite values: load the model in float32"
        )
    return outputs


def _heard(outputs: Tensor, places: Sequence[tuple[int, ...]]) -> np.ndarray[Any, Any]:
    """Each prompt's mean over its positions, (prompts, channels)."""
    import torch

    picked = (rows[list(at)] for rows, at in zip(outputs, places, strict=True))
    return torch.stack([rows.mean(0) for rows in picked]).cpu().numpy()
