"""What a localizer answers, whatever it is: a kind, places, a profile of the layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.errors import LocogenError, unknown
from locogen.plan import Verdict, Window

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray[Any, Any]
KINDS = ("one place", "each necessary", "each sufficient", "spread", "nobody", "inconclusive")
# An answer of these kinds says of its places that the concept comes in there.
NAMING = ("one place", "each necessary", "each sufficient")
EFFECT_COLUMNS = ("position", "estimate", "low", "high", "share", "share_low", "share_high")
CANNOT_TELL = ""  # the side of a localizer that looks at both sides of a model and names neither


@dataclass(frozen=True, eq=False)
class Answer:
    """The answer of a localizer about one concept, as `benchmark` scores it.

    Attributes:
        kind: "one place", "each necessary", "each sufficient" (several places), "spread", "nobody"
            (no layer reads it) or "inconclusive".
        places: The places that the kind speaks of, as windows.
        profile: How much the concept is at each position: one number a layer, or a window by its
            first layer, (positions,); with prompts and seeds, (positions, prompts, seeds), their
            mean counts. Only its order is scored. None: the localizer does not rank.
        width: Layers of a position.
        effects: Effects with intervals, whose zero means no effect: a table with the columns
            `position`, `estimate`, `low`, `high`, and `share`, `share_low`, `share_high` where
            there are shares of the ceiling. None: nothing like it.
        side: "text encoder" or "denoiser", the side that knows a fact; "": cannot tell; None: the
            localizer does not ask.
        pictures: How many pictures the answer rests on; None: what the benchmark counts.
        reason: Why, in words.

    Raises:
        LocogenError: For another kind, one place without one place, or a profile that is no array
            of numbers.

    Example:
        >>> Answer("one place", (Window(12, 2),)).layers
        frozenset({12, 13})
    """

    kind: str
    places: tuple[Window, ...] = ()
    profile: Array | None = field(default=None, repr=False)
    width: int = 1
    effects: pd.DataFrame | None = field(default=None, repr=False)
    side: str | None = None
    pictures: int | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("kind of answer", self.kind, KINDS)
        places = tuple(self.places)
        object.__setattr__(self, "places", places)
        if self.kind == "one place" and len(places) != 1:
            raise LocogenError(
                f"an answer is 'one place' and has {len(places)} places: give it one Window"
            )
        if self.profile is not None:
            profile = np.asarray(self.profile, np.float64)
            if profile.ndim == 0 or not np.isfinite(profile).all():
                raise LocogenError(
                    "an answer's profile is not a finite number for each layer or window: "
                    "give profile=None where there is none"
                )
            object.__setattr__(self, "profile", profile)

    @property
    def layers(self) -> frozenset[int]:
        """All layers of the places."""
        return frozenset(layer for place in self.places for layer in place)


def answer_of(window: Window, **more: Any) -> Answer:
    """The verdict of `carrier`, or the window of another localizer, as an answer.

    A verdict has a kind and places. A window without layers says that no single one was found, and
    not why: that is inconclusive.
    """
    if isinstance(window, Verdict):
        places = tuple(Window(place.start, place.width) for place in window.places)
        return Answer(window.kind, places, reason=window.reason, **more)
    if len(window):
        place = Window(window.start, window.width)
        return Answer("one place", (place,), reason=window.reason, **more)
    return Answer("inconclusive", reason=window.reason, **more)


def by_layer(profile: Array, width: int) -> Array:
    """A profile of windows as one of layers, (layers,): the mean of the windows that hold a layer.

    >>> by_layer(np.array([1.0, 3.0]), width=2).tolist()
    [1.0, 2.0, 3.0]
    """
    means = profile.reshape(len(profile), -1).mean(1)  # (positions,)
    count = len(means) + width - 1
    values = []
    for layer in range(count):
        first = max(0, layer - width + 1)
        values.append(means[first : layer + 1].mean())
    return np.array(values)
