"""Localizers side by side: the same concept, prompts, seeds and settings; what each says, how surely, and its cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from locogen.errors import LocogenError, unknown
from locogen.localization.attention import (
    attention_contribution,
    contribution_effect,
    contribution_window,
    contributions,
)
from locogen.localization.causal_tracing import causal_trace
from locogen.localization.effects import _cube, carrier, effect
from locogen.localization.localize import localize
from locogen.localization.trace_effects import LAYERS, best_state, layer_found, recovered, sides, trace_effect
from locogen.plan import Concept, Window, sign_of
from locogen.stats import rank_correlation

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.score import Scorer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Located:
    """What one localizer says of one concept.

    `effects`: the effects table; `layers`: effect of each layer or window, (positions, prompts, seeds); `carrier`: the
    layers it names, with its reason; `side`: "text encoder" or "denoiser" where it looked at both and can tell, and
    `told`, what else it says, in words; `generations`: pictures it took; `seconds`: that it took here, where nothing
    was in the store before.
    """

    method: str
    concept: str
    effects: pd.DataFrame = field(repr=False)
    layers: Array = field(repr=False)
    carrier: Window
    generations: int
    seconds: float
    side: str | None = None
    told: str = ""


class Agreement(NamedTuple):
    """How far two localizers agree on one concept: one row of a table.

    `correlation`: Spearman's, over the layers, with its 95 % interval; `same`: whether the layers they name overlap,
    None where one of them names none.
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


def localizers() -> pd.DataFrame:
    """The localizers that `locate` knows: `name`, what each one `asks`, and the `generations` it takes."""
    import pandas as pd

    return pd.DataFrame(
        [(name, *told) for name, (_, *told) in _METHODS.items()], columns=["name", "asks", "generations"]
    )


def locate(
    pipe: Any,
    concept: Concept,
    method: str = "locogen",
    *,
    window: int = 2,
    seeds: Iterable[int] = range(4),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    scorer: Scorer | str | None = None,
    store: str | Path | None = None,
    progress: bool = True,
) -> Located:
    """Ask one localizer, by its name in `localizers()`, where a concept is; arguments as in `localize`.

    The same arguments give comparable answers: `agree` takes two of them. Raises `LocogenError` for an unknown method,
    and as the localizer itself does.
    """
    if method not in _METHODS:
        raise unknown("localizer", method, _METHODS)
    common: dict[str, Any] = {"seeds": tuple(seeds), "num_inference_steps": num_inference_steps}
    common |= {"guidance_scale": guidance_scale, "batch_size": batch_size, "progress": progress}
    start = time.perf_counter()
    found = _METHODS[method][0](pipe, concept, window, common, {"scorer": scorer, "store": store})
    return Located(method, concept.name, seconds=time.perf_counter() - start, **found)


def agree(first: Located, second: Located) -> Agreement:
    """How far two localizers agree: rank correlation of the layers, the same carrier or not, and the cost.

    Single layers are averaged over the windows of the other. Raises `LocogenError` for different concepts, or windows
    of different widths.
    """
    if first.concept != second.concept:
        raise LocogenError(f"{first.concept!r} and {second.concept!r} are two concepts: compare localizers on one")
    widths = {int(found.effects["width"].iloc[0]) for found in (first, second)} - {1}
    if len(widths) > 1:
        raise LocogenError("both localizers moved windows, of different widths: use the same window")
    count = min(len(first.layers), len(second.layers))
    one, two = (_windowed(found.layers, len(found.layers) - count + 1) for found in (first, second))
    same = bool(set(first.carrier) & set(second.carrier)) if len(first.carrier) and len(second.carrier) else None
    found = rank_correlation(one, two)
    return Agreement(
        concept=first.concept,
        first=first.method,
        second=second.method,
        correlation=found.estimate,
        low=found.low,
        high=found.high,
        same=same,
        carrier_first=_place(first.carrier),
        carrier_second=_place(second.carrier),
        generations_first=first.generations,
        generations_second=second.generations,
    )


def _windowed(values: Array, width: int) -> Array:
    """Means over windows of neighboring layers, (layers - width + 1, prompts, seeds)."""
    return np.stack([values[start : start + width].mean(0) for start in range(len(values) - width + 1)])


def _place(found: Window) -> str:
    return "none" if found.start is None else str(found)


# --- the localizers ------------------------------------------------------------------------------


def _locogen(
    pipe: Any, concept: Concept, window: int, common: dict[str, Any], scored: dict[str, Any]
) -> dict[str, Any]:
    run = localize(pipe, concept, window=window, **common, **scored)
    _, base = _cube(run.table, "baseline", "clip_score")
    _, moved = _cube(run.table, "window", "clip_score")
    effects = effect(run.table)
    found = carrier(effects)
    return {
        "effects": effects,
        "layers": sign_of(concept.kind) * (moved - base),
        "carrier": found,
        "generations": len(run),
        "told": found.reason,
    }


def _traced(pipe: Any, concept: Concept, window: int, common: dict[str, Any], scored: dict[str, Any]) -> dict[str, Any]:
    run = causal_trace(pipe, concept, **common, **scored)
    effects, best, both = trace_effect(run.table), best_state(run.table), sides(run.table)
    told = f"{best.axis}, layer {best.position}, brings back {best.share:.0%} of what the noise took"
    return {
        "effects": effects,
        "layers": recovered(run.table)[LAYERS],
        "carrier": layer_found(effects),
        "generations": run.settings["generations"],
        "side": both and both.side,
        "told": f"{told}; {best.reason}" if best.reason else told,
    }


def _listened(
    pipe: Any, concept: Concept, window: int, common: dict[str, Any], scored: dict[str, Any]
) -> dict[str, Any]:
    table = attention_contribution(pipe, concept, **common)
    found = contribution_window(table, window=window)
    return {
        "effects": contribution_effect(table),
        "layers": contributions(table),
        "carrier": found,
        "generations": len(table) // table["layer"].nunique(),
        "told": found.reason,
    }


_METHODS: dict[str, tuple[Callable[..., dict[str, Any]], str, str]] = {
    "locogen": (
        _locogen,
        "what is missing when a window of layers hears another prompt",
        "prompts x seeds x (2 windows + 3)",
    ),
    "causal tracing": (
        _traced,
        "what comes back when one state is clean and the concept's words are noise",
        "prompts x seeds x (states + 2), and clean ones beside them",
    ),
    "attention contribution": (
        _listened,
        "how much the concept's words write in each layer",
        "prompts x seeds",
    ),
}
