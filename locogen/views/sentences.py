"""The findings of notebooks in plain words: numbers in, one or two sentences out.

`tables.describe` and `tables.describe_edit` do the same for a sweep and for an edit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from locogen import stats
from locogen.plan import Window

if TYPE_CHECKING:
    import pandas as pd

    from locogen.localization.trace_effects import BestState, Sides


def share_text(hits: float, count: int) -> str:
    """Write a count as a share, with its 95 % interval (Wilson).

    Args:
        hits: Number of successes.
        count: Number of trials.

    Returns:
        The count and the interval, in words and percent.

    Raises:
        ValueError: If there are no trials, or more hits than trials.

    Example:
        >>> share_text(3, 4)
        '3 of 4 [30%, 95%]'
    """
    low, high = stats.wilson(hits, count)
    return f"{hits:.0f} of {count:.0f} [{low:.0%}, {high:.0%}]"


def interval_text(value: float, low: float, high: float) -> str:
    """Write an estimate with its interval.

    Args:
        value: The estimate.
        low: Lower end of its interval.
        high: Upper end.

    Returns:
        The three numbers, with two digits after the point; the estimate alone where it has no
        interval (NaN).

    Example:
        >>> interval_text(0.2, 0.104, 0.3)
        '0.20 [0.10, 0.30]'
    """
    # One prompt under one seed has no interval.
    if math.isnan(low) or math.isnan(high):
        return f"{value:.2f}"
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


# Kind of a verdict → what it says of a concept, with the {places} that it names.
_VERDICTS = {
    "each necessary": "{places} carry it, and each is necessary",
    "each sufficient": "{places} carry it, and each is sufficient",
    "spread": "it is spread, and no place alone carries it",
    "nobody": "no layer hears it",
    "inconclusive": "where it is carried is not decided",
}


def describe_verdict(kind: str, places: Sequence[Window] = ()) -> str:
    """Put in words what a verdict without one place says of a concept.

    Args:
        kind: Its `kind`; "" for a window that is no `Verdict`.
        places: The places that it speaks of.

    Returns:
        A clause.

    Example:
        >>> describe_verdict("each necessary", [Window(0, 2), Window(13, 2)])
        'layers 0-1 and layers 13-14 carry it, and each is necessary'
    """
    words = _VERDICTS.get(kind, "no single window carries it")
    named = [str(place) for place in places]
    listed = " and ".join(part for part in (", ".join(named[:-1]), *named[-1:]) if part)
    return words.format(places=listed)


def describe_trace(effects: pd.DataFrame, best: BestState) -> str:
    """Put the result of a causal trace in words.

    Args:
        effects: The effects table of one concept, from `trace_effect`.
        best: Its best state, from `best_state`.

    Returns:
        Two sentences: what the noise takes from the score, and what the best state brings back.

    Example:
        >>> import pandas as pd
        >>> from locogen.localization.trace_effects import BestState
        >>> total = pd.DataFrame([{"axis": "ceiling", "concept": "neon"}])
        >>> effects = total.assign(estimate=0.4, low=0.3, high=0.5)
        >>> best = BestState("MLP", 2, 0.3, 0.2, 0.4, share=0.75, p_value=0.01, reason="")
        >>> print(describe_trace(effects, best))
        neon: the noise takes 0.40 [0.30, 0.50] of the score. Clean output of MLP, layer 2,
        brings back 0.30 [0.20, 0.40], 75% of it.
    """
    total = effects[effects["axis"] == "ceiling"].iloc[0]
    taken = interval_text(total["estimate"], total["low"], total["high"])
    amount = interval_text(best.estimate, best.low, best.high)
    doubt = f" ({best.reason})" if best.reason else ""
    return (
        f"{total['concept']}: the noise takes {taken} of the score. Clean output of {best.axis}, "
        f"layer {best.position}, brings back {amount}, {best.share:.0%} of it{doubt}."
    )


def describe_sides(sides: Sides | None) -> str:
    """Put in words which side of the model brings back more.

    Args:
        sides: From `sides`; None where only one side was traced.

    Returns:
        A sentence, or "" for None.

    Example:
        >>> from locogen.localization.trace_effects import Sides
        >>> print(describe_sides(Sides("layer 1", "MLP 3", lead=0.2, low=0.1, high=0.3)))
        The best state of the text encoder (layer 1) brings back 0.20 [0.10, 0.30] more than that
        of the denoiser (MLP 3): the text encoder is ahead.
    """
    if sides is None:
        return ""
    ahead = interval_text(sides.lead, sides.low, sides.high)
    verdict = "this does not decide between the sides"
    if sides.side is not None:
        verdict = f"the {sides.side} is ahead"
    return (
        f"The best state of the text encoder ({sides.text}) brings back {ahead} more than that of "
        f"the denoiser ({sides.denoiser}): {verdict}."
    )


def describe_localizers(answers: pd.DataFrame, agreement: pd.DataFrame) -> str:
    """Put in words how often localizers name layers, and how often these overlap.

    Args:
        answers: One row a concept and localizer, with columns `localizer` and `names` ("none" where
            no layers are named).
        agreement: One row a concept and pair of localizers, from `agree`.

    Returns:
        Two sentences, with 95 % intervals of the shares.

    Example:
        >>> import pandas as pd
        >>> answers = pd.DataFrame({"localizer": ["one", "two"], "names": ["layer 3", "none"]})
        >>> agreement = pd.DataFrame([{"first": "one", "second": "two", "same": None}])
        >>> print(describe_localizers(answers, agreement))
        Layers are named by one for 1 of 1 [21%, 100%] concepts, two for 0 of 1 [0%, 79%] concepts.
        Two localizers never name layers of the same concept.
    """
    is_named: Any = answers["names"] != "none"
    named = []
    for localizer, hits in is_named.groupby(answers["localizer"], sort=False):
        named.append(f"{localizer} for {share_text(int(hits.sum()), hits.size)} concepts")
    # Whether two overlap is known only where both name layers.
    both: Any = agreement.dropna(subset="same")
    overlaps = []
    for (first, second), same in both.groupby(["first", "second"], sort=False)["same"]:
        overlaps.append(f"{first} and {second} for {share_text(int(same.sum()), same.size)}")
    text = f"Layers are named by {', '.join(named)}."
    if not overlaps:
        return f"{text} Two localizers never name layers of the same concept."
    return f"{text} Where two name some, these overlap: {', '.join(overlaps)}."


def describe_clamping(effects: pd.DataFrame, width: int) -> str:
    """Put in words what clamped neurons do to the score of a concept.

    Args:
        effects: One row an arm ("top", "random", "edit"), number of neurons and measure, with the
            change as `estimate`.
        width: The number of neurons of each matrix.

    Returns:
        A sentence that compares the strongest neurons, random ones, and the edit of the layers.

    Example:
        >>> import pandas as pd
        >>> rows = [("top", 5, -0.2), ("random", 5, 0), ("edit", 0, -0.3)]
        >>> effects = pd.DataFrame(rows, columns=["arm", "neurons", "estimate"])
        >>> print(describe_clamping(effects.assign(measure="concept_score"), 96))
        With 5 of 96 neurons of each matrix clamped, the concept score changes by -0.20 for the
        strongest and +0.00 for random ones; by -0.30 for the edit of the layers.
    """
    rows = effects[effects["measure"] == "concept_score"]
    changes: dict[str, str] = {}
    for arm, part in rows.groupby("arm"):
        changes[str(arm)] = ", ".join(f"{change:+.2f}" for change in part["estimate"])
    counts = ", ".join(str(count) for count in rows.loc[rows["arm"] == "top", "neurons"])
    return (
        f"With {counts} of {width} neurons of each matrix clamped, the concept score changes by "
        f"{changes['top']} for the strongest and {changes['random']} for random ones; "
        f"by {changes['edit']} for the edit of the layers."
    )


def describe_erasure(shares: pd.DataFrame, likeness: pd.Series, kind: str) -> str:
    """Put in words what is left after the last of several concepts was erased.

    Args:
        shares: Column `mean` by `way`, `count` and `group`: the share of right pictures.
        likeness: SSIM of ordinary pictures with their unedited twins, by `way` and `count`.
        kind: "style", "object" or "fact".

    Returns:
        A sentence with the shares of each way of erasing.

    Example:
        >>> import pandas as pd
        >>> names = ["way", "count", "group"]
        >>> index = pd.MultiIndex.from_tuples([("jointly", 2, "erased")], names=names)
        >>> shares = pd.DataFrame({"mean": [0.25]}, index=index)
        >>> print(describe_erasure(shares, shares["mean"].droplevel("group") * 3, "style"))
        After erasing 2 styles: jointly, 25% of their pictures still show them, ordinary SSIM 0.75.
    """
    last = likeness.index.get_level_values("count").max()
    what = "give the new answer" if kind == "fact" else "still show them"
    parts = []
    for way in likeness.index.get_level_values("way").unique():
        share = shares.loc[(way, last, "erased"), "mean"]
        parts.append(
            f"{way}, {share:.0%} of their pictures {what}, ordinary SSIM {likeness[way, last]:.2f}"
        )
    return f"After erasing {last} {kind}s: {'; '.join(parts)}."


def describe_steps(reached: Mapping[int, float], reference: int, enough: float) -> tuple[int, str]:
    """Find the fewest denoising steps that choose well, and put it in words.

    Args:
        reached: Number of steps → the least share of the reference's best effect that the choice
            of any concept reaches.
        reference: The number of steps that they are compared with.
        enough: The share that has to be reached, by this and every larger number of steps.

    Returns:
        The number of steps (the reference where no fewer will do), and a sentence.

    Example:
        >>> steps, sentence = describe_steps({4: 0.95, 20: 1.0}, 50, 0.96)
        >>> print(steps, sentence)
        20 20 steps choose as well as 50: at least 95 % of the best effect with 4, 100 % with 20.
    """
    fewest = reference
    # From the most steps down: a small number that reaches enough by chance, below one that does
    # not, proves nothing.
    for steps in sorted(reached, reverse=True):
        if not reached[steps] >= enough:
            break
        fewest = steps
    verdict = f"no fewer than {reference} steps choose well enough"
    if fewest != reference:
        verdict = f"{fewest} steps choose as well as {reference}"
    shares = ", ".join(f"{100 * share:.0f} % with {steps}" for steps, share in reached.items())
    return fewest, f"{verdict}: at least {shares}.".replace(
        " % with", " % of the best effect with", 1
    )
