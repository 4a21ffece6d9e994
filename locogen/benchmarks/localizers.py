"""The localizers that the benchmark knows, each as one function; your own has the same form.

A localizer takes the pipeline and the concept, and as keywords what `localize` calls window, seeds,
guidance_scale, store and progress. It does not know what was planted. Two that look at nothing
stand beside the others: what they score is what a score is worth.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.benchmarks.answers import CANNOT_TELL, EFFECT_COLUMNS, Answer, answer_of
from locogen.catalog.plants import plant_entries
from locogen.localization.attribution.attribute import How
from locogen.localization.attribution.proposal import propose
from locogen.localization.attribution.result import attribution_effect
from locogen.localization.causal_tracing import causal_trace
from locogen.localization.comparison import locate
from locogen.localization.effects import carrier, effect
from locogen.localization.localize import Search, localize
from locogen.localization.trace_effects import LAYERS, TOTAL, layer_found, sides, trace_effect
from locogen.models.defaults import name_of
from locogen.models.layers import find_layers
from locogen.plan import Concept, Window, windows
from locogen.types import Pipeline

if TYPE_CHECKING:
    import pandas as pd

Localizer = Callable[..., Answer]


def locogen(pipe: Pipeline, concept: Concept, **settings: Any) -> Answer:
    """LocoGen's exhaustive sweep, and the verdict of `carrier`."""
    run = localize(pipe, concept, **settings)
    effects = effect(run.table)
    return answer_of(carrier(effects), pictures=len(run), **_along(effects, "layer"))


def race(pipe: Pipeline, concept: Concept, **settings: Any) -> Answer:
    """LocoGen with windows dropped as soon as they cannot be the best."""
    return _searched(pipe, concept, "race", **settings)


def proposed_first(pipe: Pipeline, concept: Concept, **settings: Any) -> Answer:
    """LocoGen on the windows that gradients propose, with a random sample of the others."""
    return _searched(pipe, concept, "attribute", **settings)


def _searched(pipe: Pipeline, concept: Concept, search: Search, **settings: Any) -> Answer:
    run = localize(pipe, concept, search=search, **settings)
    effects = effect(run.table)
    along = _along(effects, "layer")
    shares = run.attributions.get(concept.name)
    if shares is not None:
        # Most windows have a picture or none; what ranks the layers is what proposed them.
        proposed = attribution_effect(shares, window=run.settings["window"])
        along |= {"profile": _along(proposed, "layer")["profile"]}
    pictures = run.settings.get("generations", len(run))  # a proposal's cost included
    return answer_of(carrier(effects), pictures=pictures, **along)


def bare_argmin(pipe: Pipeline, concept: Concept, **settings: Any) -> Answer:
    """The paper's rule: the window with the largest mean effect on the CLIP-score, always."""
    run = localize(pipe, concept, controls=False, **settings)
    effects = effect(run.table, score="clip_score")
    along = _along(effects, "layer")
    start = int(along["profile"].argmax())
    place = Window(start, along["width"])
    return Answer("one place", (place,), pictures=len(run), reason="an argmin", **along)


def causal_tracing(pipe: Pipeline, concept: Concept, **settings: Any) -> Answer:
    """Causal tracing of the cross-attention layers; of facts, of both sides of the model."""
    # Only of a fact is it asked which side knows it: other states cost pictures and change nothing.
    parts = {} if concept.kind == "fact" else {"parts": (LAYERS,)}
    del settings["window"]  # it restores one layer at a time
    run = causal_trace(pipe, concept, **parts, **settings)
    effects = trace_effect(run.table)
    along = _along(effects, LAYERS) | {"pictures": run.settings["generations"]}
    if concept.kind == "fact":
        both = sides(run.table)
        along["side"] = CANNOT_TELL if both is None or both.side is None else both.side
    traced = layer_found(effects)
    taken: Any = effects.loc[effects["axis"] == TOTAL, ["low", "high"]].iloc[0]
    if not len(traced) and taken["low"] <= 0 <= taken["high"]:
        # Noise in place of the concept's words changes nothing: that is what nobody's hearing is.
        # Noise that clearly moves the score the other way is heard.
        return Answer("nobody", reason=traced.reason, **along)
    return answer_of(traced, **along)


def attention(pipe: Pipeline, concept: Concept, **settings: Any) -> Answer:
    """Attention contribution: the layers in which the concept's words write most."""
    located = locate(pipe, concept, "attention contribution", **settings)
    # Its estimates are norms, and never zero: their intervals are not tried.
    return answer_of(located.carrier, profile=located.layers)


def attribution(pipe: Pipeline, concept: Concept, **settings: Any) -> Answer:
    """The direct effect by integrated gradients: a proposal, which always names a window."""
    return _proposed("gradient", pipe, concept, **settings)


def chained_attribution(pipe: Pipeline, concept: Concept, **settings: Any) -> Answer:
    """The total effect by gradients through the whole sampling chain; it names a window, too."""
    return _proposed("chain", pipe, concept, **settings)


def _proposed(how: How, pipe: Pipeline, concept: Concept, **settings: Any) -> Answer:
    del settings["store"]  # it makes no pictures
    proposal = propose(pipe, concept, how=how, **settings)
    along = _along(proposal.effects, "layer") | {"pictures": proposal.generations}
    return answer_of(proposal.carrier, **along)


def constant(pipe: Pipeline, concept: Concept, **settings: Any) -> Answer:
    """Always the window that fits most of the plants for tuning; it looks at nothing."""
    count = len(find_layers(pipe))
    return _blind(constant_place(count, settings["window"]), count, "always the same")


def random_window(pipe: Pipeline, concept: Concept, **settings: Any) -> Answer:
    """A window drawn at random, another for each model and concept; it looks at nothing."""
    count = len(find_layers(pipe))
    window = settings["window"]
    dice = random.Random(f"{name_of(pipe)}/{concept.name}/{window}")
    place = Window(dice.randrange(count - window + 1), window)
    return _blind(place, count, "drawn at random")


LOCALIZERS: Mapping[str, Localizer] = MappingProxyType(
    {
        "locogen": locogen,
        "locogen race": race,
        "locogen (attribute)": proposed_first,
        "causal tracing": causal_tracing,
        "attention contribution": attention,
        "attribution": attribution,
        "attribution (chain)": chained_attribution,
        "bare argmin": bare_argmin,
        "constant": constant,
        "random window": random_window,
    }
)


def constant_place(n_layers: int, window: int) -> Window:
    """The window that shares most layers with the single places of the plants for tuning."""
    planted = []
    for plant in plant_entries():
        if plant.set == "tune":
            places = [one for one in plant.plantings.values() if one.answer == "one place"]
            planted += [layer for one in places for layer in one.layers]
    places = windows(n_layers, window)
    shared = [sum(planted.count(layer) for layer in place) for place in places]
    return places[int(np.argmax(shared))]


def _blind(place: Window, n_layers: int, reason: str) -> Answer:
    """One place, with the layers ranked by how near they are to its middle."""
    middle = (place.start or 0) + (place.width - 1) / 2
    profile = -np.abs(np.arange(n_layers) - middle)
    return Answer("one place", (place,), profile=profile, pictures=0, reason=reason)


def _along(effects: pd.DataFrame, axis: str) -> dict[str, Any]:
    """The effects along one axis, as the fields of an answer."""
    rows: Any = effects[effects["axis"] == axis]
    lines = rows.sort_values("position")
    return {
        "profile": lines["estimate"].to_numpy(np.float64),
        "width": int(lines["width"].iloc[0]),
        "effects": lines.reindex(columns=list(EFFECT_COLUMNS)).reset_index(drop=True),
    }
