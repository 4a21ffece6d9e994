"""Localizers compared: on the same concept and settings, what each says and costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from locogen.errors import LocogenError, unknown
from locogen.files import AUTO
from locogen.localization.attention import (
    attention_contribution,
    contribution_effect,
    contribution_window,
    contributions,
)
from locogen.localization.attribution.proposal import propose
from locogen.localization.causal_tracing import causal_trace
from locogen.localization.effects import Scores, carrier, effect, score_used
from locogen.localization.localize import localize
from locogen.localization.trace_effects import (
    LAYERS,
    best_state,
    layer_found,
    recovered,
    sides,
    trace_effect,
)
from locogen.markup import interval_text, percent
from locogen.pictures.default_store import Place
from locogen.plan import Concept, Window
from locogen.stats import rank_correlation
from locogen.types import Pipeline

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.score import Scorer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Located:
    """What one localizer says about one concept.

    Attributes:
        method: Name of the localizer.
        concept: Name of the concept.
        effects: The effects table.
        layers: Effect of each layer or window, (positions, prompts, seeds).
        carrier: The layers it names, with its reason.
        generations: Pictures it took.
        seconds: Time it took here, less where pictures were in the store already.
        side: "text encoder" or "denoiser"; None if it did not look at both or cannot tell.
        remark: What else it says, in words.
    """

    method: str
    concept: str
    effects: pd.DataFrame = field(repr=False)
    layers: Array = field(repr=False)
    carrier: Window
    generations: int
    seconds: float
    side: str | None = None
    remark: str = ""

    # The old name of `remark`, for one version.
    @property
    def told(self) -> str:
        """The same as `remark`."""
        return self.remark


class Agreement(NamedTuple):
    """How far two localizers agree on one concept: one row of a table.

    `correlation`: Spearman's, over the layers, with its 95 % interval; `same`: whether the layers
    they name overlap, None if one of them names none; `layers_first`, `layers_second`: these
    layers. `agreement` sums up several concepts, beside what chance would give.
    """

    concept: str
    first: str
    second: str
    correlation: float
    low: float
    high: float
    same: bool | None
    carrier_first: str
    carrier_second: str
    generations_first: int
    generations_second: int
    layers_first: tuple[int, ...] = ()
    layers_second: tuple[int, ...] = ()


def localizers() -> pd.DataFrame:
    """List the localizers that `locate` knows.

    Returns:
        One row a localizer: its `name`, what it `asks`, and the `generations` (pictures) it takes.

    Example:
        >>> localizers()["name"].to_list()
        ['locogen', 'causal tracing', 'attention contribution', 'attribution']
    """
    import pandas as pd

    lines = [(name, method.asks, method.generations) for name, method in _LOCALIZERS.items()]
    return pd.DataFrame(lines, columns=["name", "asks", "generations"])


def locate(
    pipe: Pipeline,
    concept: Concept,
    method: str = "locogen",
    *,
    window: int = 2,
    seeds: Iterable[int] = range(4),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    scorer: Scorer | str | None = None,
    store: Place = AUTO,
    progress: bool = True,
) -> Located:
    """Ask one localizer where a concept is; `agree` compares two answers.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        concept: What to look for.
        method: Name of a localizer, see `localizers`.
        window: Number of neighboring layers that are taken together.
        seeds: Random seeds.
        num_inference_steps: Denoising steps; None: the catalog's number for this model.
        guidance_scale: Classifier-free guidance; None: the catalog's value for this model.
        batch_size: Pictures made at once.
        scorer: A scorer or its name; None: the catalog's for this model. Not every localizer
            scores.
        store: Folder for the pictures; "auto": `store_folder`; None: a temporary folder.
        progress: Whether to show a progress bar.

    Returns:
        The localizer's effects table, the layers it names, and its cost.

    Raises:
        LocogenError: For an unknown method, and as the localizer itself does.

    Example:
        >>> pipe = load("mini")
        >>> cat = Concept("cat", "object", (PromptPair("a picture of a cat", "a picture"),))
        >>> few = {"seeds": [0], "num_inference_steps": 1, "progress": False}
        >>> answer = locate(pipe, cat, "attention contribution", **few)
        >>> answer.generations, answer.layers.shape
        (1, (16, 1, 1))
    """
    if method not in _LOCALIZERS:
        raise unknown("localizer", method, _LOCALIZERS)
    # What all localizers take, and what only those take that score pictures.
    common: dict[str, Any] = {"seeds": tuple(seeds), "num_inference_steps": num_inference_steps}
    common |= {"guidance_scale": guidance_scale, "batch_size": batch_size, "progress": progress}
    scored: dict[str, Any] = {"scorer": scorer, "store": store}
    start = time.perf_counter()
    answer = _LOCALIZERS[method].ask(pipe, concept, window, common, scored)
    return replace(answer, method=method, seconds=time.perf_counter() - start)


def agree(first: Located, second: Located) -> Agreement:
    """Measure how far two localizers agree: rank correlation, same carrier, cost.

    Args:
        first: The answer of one localizer, from `locate`.
        second: The answer of another, on the same concept. If one moved windows and the other
            looked at single layers, these are averaged over the windows.

    Returns:
        One row of a table: `pandas.DataFrame([agree(a, b), agree(a, c)])`.

    Raises:
        LocogenError: For different concepts, or windows of different widths.

    Example:
        >>> import numpy as np
        >>> import pandas as pd
        >>> layers = np.linspace(0, 1, 12).reshape(4, 1, 3)  # (layers, prompts, seeds)
        >>> effects = pd.DataFrame({"width": [1]})
        >>> rising = Located("rising", "cat", effects, layers, Window(3, 1), 12, 0.5)
        >>> falling = Located("falling", "cat", effects, -layers, Window(0, 1), 12, 0.5)
        >>> agree(rising, falling).correlation, agree(rising, falling).same
        (-1.0, False)
    """
    if first.concept != second.concept:
        raise LocogenError(
            f"{first.concept!r} and {second.concept!r} are two concepts: compare localizers on one"
        )
    widths = {int(answer.effects["width"].iloc[0]) for answer in (first, second)}
    if len(widths - {1}) > 1:
        raise LocogenError(
            "both localizers moved windows, of different widths: use the same window"
        )
    # As many places in both: a window's effect is compared with the mean of its layers.
    count = min(len(first.layers), len(second.layers))
    correlation = rank_correlation(_windowed(first.layers, count), _windowed(second.layers, count))
    # If one of them names no layers, there is nothing to compare.
    same = None
    if len(first.carrier) and len(second.carrier):
        same = bool(set(first.carrier) & set(second.carrier))
    return Agreement(
        concept=first.concept,
        first=first.method,
        second=second.method,
        correlation=correlation.estimate,
        low=correlation.low,
        high=correlation.high,
        same=same,
        carrier_first=_named(first.carrier),
        carrier_second=_named(second.carrier),
        generations_first=first.generations,
        generations_second=second.generations,
        layers_first=tuple(first.carrier),
        layers_second=tuple(second.carrier),
    )


def agreement(rows: Iterable[Agreement], *, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """How far localizers agree over several concepts, beyond what a constant answer would.

    Two localizers that name the same few layers for every concept agree often, and say nothing
    about the concepts. So the share of concepts on which they overlap is set beside the share with
    concepts shuffled: what is left is `kappa` (after Cohen 1960), 1 where they always overlap, 0
    where the concept makes no difference, NaN where even shuffled answers always overlap.

    Args:
        rows: Of `agree`, one or several pairs of localizers, each on several concepts.
        draws: How often concepts are shuffled for `p_value`.
        seed: Seed of the shuffling.

    Returns:
        One row a pair of localizers: `first`, `second`; `concepts`, for which both name layers;
        `same`, the share of them on which these overlap; `shuffled`, the same with the answer to
        any of these concepts in place of the concept's own; `kappa`; `p_value` of "the concept
        makes no difference"; `constant`, the share on which the first localizer is met by the one
        answer of the second that meets it most often, whatever the concept.

    Raises:
        LocogenError: For no rows, or a pair of localizers with a concept twice.

    Example:
        >>> row = Agreement("cat", "a", "b", 0.9, 0.8, 1.0, True, "layers 3-4", "layer 4", 9, 9)
        >>> cat = row._replace(layers_first=(3, 4), layers_second=(4,))
        >>> dog = cat._replace(concept="dog", layers_first=(8, 9), layers_second=(9,))
        >>> agreement([cat, dog])[["concepts", "same", "shuffled", "kappa", "constant"]]
           concepts  same  shuffled  kappa  constant
        0         2   1.0       0.5    1.0       0.5
    """
    import pandas as pd

    pairs: dict[tuple[str, str], list[Agreement]] = {}
    for row in rows:
        pairs.setdefault((row.first, row.second), []).append(row)
    if not pairs:
        raise LocogenError("there is nothing to sum up: give the rows of agree, one a concept")
    lines = []
    for (first, second), answers in pairs.items():
        names = [answer.concept for answer in answers]
        if len(set(names)) < len(names):
            raise LocogenError(f"{first} and {second} have a concept twice: give each once")
        both = [answer for answer in answers if answer.layers_first and answer.layers_second]
        line = {"first": first, "second": second, "concepts": len(both)}
        lines.append(line | _beyond_chance(both, draws, seed))
    return pd.DataFrame(lines)


def _beyond_chance(answers: Sequence[Agreement], draws: int, seed: int) -> dict[str, float]:
    """The columns of `agreement` for one pair of localizers."""
    if not answers:
        return dict.fromkeys(("same", "shuffled", "kappa", "p_value", "constant"), np.nan)
    overlap = np.array(
        [[bool(set(a.layers_first) & set(b.layers_second)) for b in answers] for a in answers]
    )  # (concepts of the first, concepts of the second)
    same = float(overlap.diagonal().mean())
    shuffled = float(overlap.mean())
    kappa = (same - shuffled) / (1 - shuffled) if shuffled < 1 else np.nan
    dice = np.random.default_rng(seed)
    count = len(answers)
    by_luck = [overlap[np.arange(count), dice.permutation(count)].mean() for _ in range(draws)]
    as_good = np.sum(np.array(by_luck) >= same - 1e-12)
    return {
        "same": same,
        "shuffled": shuffled,
        "kappa": kappa,
        "p_value": float(1 + as_good) / (1 + draws),
        "constant": float(overlap.mean(0).max()),
    }


def _windowed(values: Array, count: int) -> Array:
    """Means over windows of neighbors, so that `count` are left, (count, prompts, seeds)."""
    width = len(values) - count + 1
    return np.stack([values[start : start + width].mean(0) for start in range(count)])


def _named(window: Window) -> str:
    return "none" if window.start is None else str(window)


# --- the localizers ------------------------------------------------------------------------------

# `locate` fills in the time that each one takes.


def _locogen(
    pipe: Pipeline, concept: Concept, window: int, common: dict[str, Any], scored: dict[str, Any]
) -> Located:
    run = localize(pipe, concept, window=window, **common, **scored)
    effects = effect(run.table)
    best = carrier(effects)
    return Located(
        method="locogen",
        concept=concept.name,
        effects=effects,
        layers=Scores(run.table, score_used(run.table)).effect_of("window"),
        carrier=best,
        generations=len(run),
        seconds=0.0,
        remark=best.reason if best.kind == "one place" else str(best),
    )


def _causal_tracing(
    pipe: Pipeline, concept: Concept, window: int, common: dict[str, Any], scored: dict[str, Any]
) -> Located:
    run = causal_trace(pipe, concept, **common, **scored)
    effects = trace_effect(run.table)
    best = best_state(run.table)
    both = sides(run.table)
    state = f"{best.axis}, layer {best.position}"
    amount = interval_text(best.estimate, best.low, best.high)
    remark = f"{state}, brings back {amount}, {percent(best.share)} of what the noise took"
    # With a reason, nothing was taken for sure, or no state is sure to bring enough of it back.
    if best.reason:
        remark = f"the state looked at is {state}: {best.reason}"
    return Located(
        method="causal tracing",
        concept=concept.name,
        effects=effects,
        layers=recovered(run.table)[LAYERS],
        carrier=layer_found(effects),
        generations=run.settings["generations"],
        seconds=0.0,
        side=None if both is None else both.side,
        remark=remark,
    )


def _attention_contribution(
    pipe: Pipeline, concept: Concept, window: int, common: dict[str, Any], scored: dict[str, Any]
) -> Located:
    # It scores no pictures, so `scored` is not needed.
    table = attention_contribution(pipe, concept, **common)
    best = contribution_window(table, window=window)
    return Located(
        method="attention contribution",
        concept=concept.name,
        effects=contribution_effect(table),
        layers=contributions(table),
        carrier=best,
        generations=len(table) // len(set(table["layer"])),
        seconds=0.0,
        remark=best.reason,
    )


def _attribution(
    pipe: Pipeline, concept: Concept, window: int, common: dict[str, Any], scored: dict[str, Any]
) -> Located:
    # It scores no pictures, so `scored` is not needed.
    proposal = propose(pipe, concept, window=window, **common)
    return Located(
        method="attribution",
        concept=concept.name,
        effects=proposal.effects,
        layers=proposal.layers,
        carrier=proposal.carrier,
        generations=proposal.generations,
        seconds=0.0,
        remark=proposal.carrier.reason,
    )


class _Localizer(NamedTuple):
    """A localizer: `ask` runs it; its question and the pictures it takes, in words."""

    ask: Callable[..., Located]
    asks: str
    generations: str


_LOCALIZERS = {
    "locogen": _Localizer(
        _locogen,
        "what is missing when a window of layers gets another prompt",
        "prompts x seeds x (2 windows + 3)",
    ),
    "causal tracing": _Localizer(
        _causal_tracing,
        "what comes back when one state is clean and the concept's words are noise",
        "prompts x seeds x (states + 2), and clean ones with them",
    ),
    "attention contribution": _Localizer(
        _attention_contribution,
        "how much the concept's words write in each layer",
        "prompts x seeds",
    ),
    "attribution": _Localizer(
        _attribution,
        "what each layer adds to what the target does to the denoiser, by gradients",
        "about 2.5 x prompts x seeds, where a gradient counts three",
    ),
}
