"""What attribution says: an `Attribution`, its tables, and the window that it proposes."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen import stats
from locogen.errors import LocogenError
from locogen.localization.attribution.quadrature import Integral
from locogen.localization.effects import effects_table, estimates
from locogen.plan import Window, windows

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, Any]
METHOD = "attribution"


@dataclass(frozen=True, eq=False)
class Attribution:
    """Shares of what the target does in all layers together, which is 1 for each prompt and seed.

    Attributes:
        concept: Name of the concept.
        kind: Its kind.
        how: "gradient", "rows" or "chain": see `attribute`.
        prompts: The prompts.
        seeds: The seeds.
        steps: The denoising steps, counted from 0.
        words: For each prompt the word at each token position; empty where tokens are not told
            apart.
        shares: (prompts, seeds, steps, layers, tokens), weighed by step: their sum over steps,
            layers and tokens is the prompt's and seed's, 1 - `residual`. Without tokens, the last
            axis has one entry.
        pooled: The same of the pooled text, (prompts, seeds, steps), or with encoder layers of the
            mask, which says how many tokens there are; None: it did not move.
        heads: The same by attention head in place of token, (prompts, seeds, steps, layers,
            heads); None: not asked for.
        weights: What a step counts, (prompts, seeds, steps): see `step_weights`. 1 in a chain,
            which knows by itself.
        residual: 1 - the sum of all shares, (prompts, seeds).
        points: Points of the integral, the most of any step, (prompts, seeds).
        bound: How far from 1 sums were allowed to be.
        axis: What `layers` are: "layer", of the denoiser, or "encoder layer".
        numbers: The number of each encoder layer, counted as the encoder's hidden states are.
        settings: Settings of the runs; `denoiser_rows`, the rows that went through the denoiser,
            where a gradient counts three; `pictures`, how many pictures take as many; `seconds`.
    """

    concept: str
    kind: str
    how: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    words: tuple[tuple[str, ...], ...]
    shares: Array = field(repr=False)
    pooled: Array | None = field(repr=False)
    heads: Array | None = field(repr=False)
    weights: Array = field(repr=False)
    residual: Array = field(repr=False)
    points: Array = field(repr=False)
    bound: float
    settings: Mapping[str, Any]
    axis: str = "layer"
    numbers: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, whole: Integral, *, how: str, has_pooled: bool, has_heads: bool, **facts: Any
    ) -> Attribution:
        """Weigh what was integrated; arrays begin with (prompts, seeds)."""
        shape = whole.pooled.shape  # (prompts, seeds, steps)
        weights = np.ones(shape) if how == "chain" else step_weights(whole.norm)
        shares = whole.layers * weights[..., None, None, None]
        residual = whole.residual[..., 0] if how == "chain" else (whole.residual * weights).sum(2)
        return cls(
            how=how,
            shares=shares.sum(5),
            pooled=whole.pooled * weights if has_pooled else None,
            heads=shares.sum(4) if has_heads else None,
            weights=weights,
            residual=residual,
            points=whole.points.max(2),
            **facts,
        )

    @property
    def layers(self) -> Array:
        """The share of each layer, (layers, prompts, seeds)."""
        return np.moveaxis(self.shares.sum((2, 4)), 2, 0)

    @property
    def positions(self) -> tuple[int, ...]:
        """The number of each layer: its index, or that of an encoder's layer."""
        return self.numbers or tuple(range(self.shares.shape[3]))

    def leading(self, share: float = 0.9) -> tuple[int, ...]:
        """The fewest layers that make up a share of the layers' whole: where to edit together.

        Args:
            share: From 0 to 1, of the sum of the layers' shares above 0, on average over prompts
                and seeds.

        Returns:
            Their indices, in order; of encoder layers, their numbers.

        Raises:
            LocogenError: A share out of its range.
        """
        if not 0 < share <= 1:
            raise LocogenError(f"share is {share}: give a number above 0, up to 1")
        means = np.clip(self.layers.mean((1, 2)), 0, None)  # (layers,)
        ranked = np.argsort(-means, kind="stable")
        reached = np.cumsum(means[ranked]) >= share * means.sum() * (1 - 1e-9)
        return tuple(sorted(self.positions[i] for i in ranked[: int(reached.argmax()) + 1]))

    @property
    def is_complete(self) -> bool:
        """Whether every sum of shares is within `bound` of 1."""
        return bool((abs(self.residual) <= self.bound).all())

    @property
    def remark(self) -> str:
        """How near to 1 the sums of shares are, in words."""
        sums = 1 - self.residual
        low, high = sums.min(), sums.max()
        amount = (
            f"shares sum to {low:.2f}"
            if high - low < 0.005
            else (f"shares sum to {low:.2f} to {high:.2f}")
        )
        if self.is_complete:
            return amount
        missed = int((abs(self.residual) > self.bound).sum())
        far = f"{amount}: {missed} of {sums.size} further from 1 than {self.bound:g}"
        if self.how == "rows":
            return f"{far}, where layers act together"
        return f"{far} with {self.points.max()} points, where the picture tips over on the way"

    @property
    def table(self) -> pd.DataFrame:
        """The shares, one row each: concept, kind, prompt, seed, step, layer, token, word, share.

        Pooled text has no layer, token and word; rows without tokens have no token and word. With
        encoder layers, these are in "layer" by their numbers, and a column "axis" says so.
        """
        import pandas as pd

        axes = [range(count) for count in self.shares.shape]
        index = pd.MultiIndex.from_product(axes, names=["prompt", "seed", "step", "layer", "token"])
        table: Any = pd.DataFrame({"share": self.shares.reshape(-1)}, index=index).reset_index()
        table["word"] = None
        table["layer"] = np.asarray(self.positions)[table["layer"]]
        if self.words:
            lists = [word for words in self.words for word in words]
            places = table["prompt"] * self.shares.shape[4] + table["token"]
            table["word"] = np.asarray(lists, dtype=object)[places]
        else:
            table["token"] = None
        if self.pooled is not None:
            axes = [range(count) for count in self.pooled.shape]
            index = pd.MultiIndex.from_product(axes, names=["prompt", "seed", "step"])
            vector = pd.DataFrame({"share": self.pooled.reshape(-1)}, index=index).reset_index()
            vector = vector.assign(layer=None, token=None, word=None)
            table = pd.concat([table.astype({"layer": object, "token": object}), vector])
        table["prompt"] = np.asarray(self.prompts, dtype=object)[table["prompt"]]
        table["seed"] = np.asarray(self.seeds)[table["seed"]]
        table["step"] = np.asarray(self.steps)[table["step"]]
        table = table.assign(concept=self.concept, kind=self.kind)
        columns = ["concept", "kind", "prompt", "seed", "step", "layer", "token", "word", "share"]
        table = table[columns].astype({"layer": "Int64", "token": "Int64"})
        if self.axis != "layer":
            table["axis"] = self.axis
        return table.reset_index(drop=True)

    def _repr_html_(self) -> str:
        first = self.positions[int(self.layers.mean((1, 2)).argmax())]
        lines = [
            f"<b>Attribution</b> of {html.escape(self.concept)} ({self.how}): "
            f"{len(self.prompts)} prompts, {len(self.seeds)} seeds, steps {list(self.steps)}",
            html.escape(self.remark),
            f"largest share: {self.axis} {first}; {self.settings['denoiser_rows']} denoiser rows",
        ]
        return "".join(f"<p>{line}</p>" for line in lines)


def step_weights(norms: Array) -> Array:
    """What each step counts, from how far the target moves the denoiser there.

    Shares of different steps are shares of different things: d is large at the first step, where
    the picture is decided, and small later, where residues are drawn. Counted alike, many late
    steps outvote the first one, and a concept that enters early is proposed where it is refined
    (mini-b's neon and blueprint: layers 12-13 for 0-1). The first step alone misses what enters
    late (mini-b's van gogh). Counted by ‖d‖, all of mini-b's concepts and the planted ones that
    were tried came out where LocoGen or the judge has them; ‖d‖² gave the same windows, and lets
    one step decide more. `tests/benchmarks/attribution.py weightings` has them side by side.

    Args:
        norms: ‖d‖ of each step, (..., steps).

    Returns:
        Weights that sum to 1 over the steps.
    """
    return norms / np.maximum(norms.sum(-1, keepdims=True), np.finfo(float).tiny)


def attribution_effect(
    attribution: Attribution, *, window: int = 1, level: float = 0.95
) -> pd.DataFrame:
    """Compute the effects table of an attribution.

    Args:
        attribution: From `attribute`.
        window: Neighboring layers whose shares are summed.
        level: Coverage of the intervals, over prompts and seeds.

    Returns:
        One row a window, with the axis "layer" and the columns of `effect`; estimates are shares of
        what the target does in all layers. Also the axes "pooled", the share of the pooled text,
        and "ceiling", the sum of all shares: how near to 1 it is says how far they may be trusted.
        Of encoder layers the axis is "encoder layer", the position its number; and "mask" in place
        of "pooled", what it does that target and prompt have different numbers of tokens.

    Raises:
        LocogenError: For a window larger than the model.

    Example:
        >>> pipe = load("mini")
        >>> pair = PromptPair("a picture of a cat in the style of neon", "a picture of a cat")
        >>> few = {"seeds": [0], "steps": [0], "num_inference_steps": 2, "progress": False}
        >>> found = attribute(pipe, Concept("neon", "style", (pair,)), **few)
        >>> attribution_effect(found, window=2)["axis"].value_counts().to_dict()
        {'layer': 15, 'ceiling': 1}
    """
    sums = window_sums(attribution.layers, window)
    lines = estimates(attribution.axis, attribution.positions[: len(sums)], sums, level)
    if attribution.pooled is not None:
        beside = "pooled" if attribution.axis == "layer" else "mask"
        lines += estimates(beside, [None], attribution.pooled.sum(2)[None], level)
    lines += estimates("ceiling", [None], 1 - attribution.residual[None], level)
    return effects_table(
        lines,
        method=METHOD,
        concept=attribution.concept,
        kind=attribution.kind,
        width=window,
    )


def attribution_window(attribution: Attribution, *, window: int = 2) -> Window:
    """The window of layers with the largest share.

    It is a proposal, which `localize` can measure: it always names one, and the reason says whether
    its lead is established.

    Args:
        attribution: From `attribute`.
        window: Number of neighboring layers.

    Returns:
        The window.

    Raises:
        LocogenError: For a window larger than the model, or shares of encoder layers.

    Example:
        >>> pipe = load("mini")
        >>> pair = PromptPair("a picture of a cat in the style of neon", "a picture of a cat")
        >>> few = {"seeds": [0], "steps": [0], "num_inference_steps": 2, "progress": False}
        >>> found = attribute(pipe, Concept("neon", "style", (pair,)), **few)
        >>> attribution_window(found).start
        13
    """
    if attribution.axis != "layer":
        raise LocogenError(
            "these are shares of encoder layers, and a window is of the denoiser's layers: take "
            "attribute(pipe, concept), without axis="
        )
    sums = window_sums(attribution.layers, window)
    start = int(sums.mean((1, 2)).argmax())
    # A wide window may overlap all others: then there is nothing to lead.
    has_rivals = any(abs(place - start) >= window for place in range(len(sums)))
    is_ahead = has_rivals and _leads(sums, start, window)
    lead = "ahead of every other place" if is_ahead else "its lead is not established"
    return Window(start, window, f"a proposal always names one; {lead}; {attribution.remark}")


def window_sums(layers: Array, window: int) -> Array:
    """Shares of windows, (windows, prompts, seeds), from those of layers."""
    places: Sequence[Any] = windows(len(layers), window)
    return np.stack([layers[list(place)].sum(0) for place in places])


def _leads(sums: Array, start: int, window: int) -> bool:
    """Whether a window is ahead of all that it does not overlap; `sums`: (windows, ...)."""
    lead = stats.simultaneous_lead(sums, start, apart=window, alpha=stats.ALPHA)
    return bool(lead.p_value <= stats.ALPHA)
