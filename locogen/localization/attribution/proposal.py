"""Attribution as a localizer among others, and as the proposal of a search."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.localization.attribution.attribute import POINTS, How, attribute
from locogen.localization.attribution.result import (
    Attribution,
    attribution_effect,
    attribution_window,
    window_sums,
)
from locogen.localization.attribution.search import with_rival
from locogen.plan import Concept, Pooled, Window
from locogen.types import Pipeline

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Proposal:
    """What attribution says of one concept, as every localizer does.

    Attributes:
        effects: The effects table, windows on the axis "layer".
        layers: The share of each window, (windows, prompts, seeds).
        carrier: The window that is proposed, with its reason.
        generations: How many pictures take as many rows of the denoiser.
        attribution: All shares.
    """

    effects: pd.DataFrame = field(repr=False)
    layers: Array = field(repr=False)
    carrier: Window
    generations: int
    attribution: Attribution = field(repr=False)

    @property
    def ranked(self) -> tuple[int, ...]:
        """The first layers of all windows, the largest share first: what a search looks at."""
        return self.ranked_at(self.carrier.width)

    def ranked_at(self, width: int) -> tuple[int, ...]:
        """The same with windows of another width."""
        sums = window_sums(self.attribution.layers, width).mean((1, 2))  # (windows,)
        return tuple(int(start) for start in np.argsort(-sums, kind="stable"))

    def candidates(self, count: int) -> tuple[int, ...]:
        """The best windows, and the best one that overlaps none of them, as their rival."""
        return with_rival(self.ranked, count, self.carrier.width)


def propose(
    pipe: Pipeline,
    concept: Concept,
    *,
    window: int = 2,
    seeds: Iterable[int] = range(4),
    how: How = "gradient",
    pooled: Pooled | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Proposal:
    """Propose where a concept is, with as few points as a proposal needs.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        concept: What to look for.
        window: Number of neighboring layers whose shares are summed.
        seeds: Random seeds; every prompt is run with each of them.
        how: See `attribute`.
        pooled: See `attribute`.
        num_inference_steps: Denoising steps; None: the catalog's number for this model.
        guidance_scale: Classifier-free guidance; None: the catalog's value for this model.
        batch_size: Pictures run at once.
        progress: Whether to show a progress bar.

    Raises:
        LocogenError: As `attribute`, and for a window larger than the model.
    """
    shares = attribute(
        pipe,
        concept,
        how=how,
        seeds=seeds,
        pooled=pooled,
        most_points=POINTS,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        progress=progress,
    )
    return Proposal(
        effects=attribution_effect(shares, window=window),
        layers=window_sums(shares.layers, window),
        carrier=attribution_window(shares, window=window),
        generations=math.ceil(shares.settings["pictures"]),
        attribution=shares,
    )
