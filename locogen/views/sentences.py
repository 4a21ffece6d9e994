"""The findings of notebooks in plain words: numbers in, one or two sentences out.

`tables.describe` does the same for a sweep. A sentence compares two things only where an interval
says that they differ: see `describe_edit` and `compare_words`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from locogen import stats
from locogen.errors import LocogenError
from locogen.localization.trace_effects import noise_text
from locogen.markup import counted, interval_text, number, percent
from locogen.plan import Verdict, Window, listed

if TYPE_CHECKING:
    import pandas as pd

    from locogen.attacks.result import Attack
    from locogen.localization.trace_effects import BestState, Sides


FEW_SEEDS = 2  # an interval over so few says little


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
        '3 of 4 [30 %, 95 %]'
    """
    low, high = stats.wilson(hits, count)
    return f"{hits:.0f} of {count:.0f} [{percent(low)}, {percent(high)}]"


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
    return words.format(places=listed(places))


def verdict_note(carrier: Window) -> str:
    """Say in few words what stands in the place of one carrier.

    Args:
        carrier: A window without a start.

    Returns:
        The kind of a `Verdict`, with its places where each of them counts.

    Example:
        >>> verdict_note(Window(None, 2)), verdict_note(Verdict(None, 2, kind="nobody"))
        ('no single window', 'no layer hears it')
        >>> both = (Window(0, 2), Window(12, 2))
        >>> verdict_note(Verdict(None, 2, kind="each necessary", places=both))
        '0-1 and 12-13, each necessary'
    """
    # Runs of older versions, and windows of one's own, have no kind.
    if not isinstance(carrier, Verdict):
        return "no single window"
    if carrier.kind == "nobody":
        return "no layer hears it"
    if carrier.kind in ("each necessary", "each sufficient"):
        labels = [place.label for place in carrier.places]
        return f"{' and '.join(labels)}, {carrier.kind}"
    return carrier.kind


def describe_trace(effects: pd.DataFrame, best: BestState) -> str:
    """Put the result of a causal trace in words.

    Args:
        effects: The effects table of one concept, from `trace_effect`.
        best: Its best state, from `best_state`.

    Returns:
        Two sentences: what the noise takes from the score, and what the best state brings back.
        Where the interval of the first holds zero or lies below it, nothing was taken, and what the
        state brings back is a share of nothing. Of one or two seeds (`n_seeds`) they say what
        intervals are worth.

    Example:
        >>> import pandas as pd
        >>> from locogen.localization.trace_effects import BestState
        >>> total = pd.DataFrame([{"axis": "ceiling", "concept": "neon"}])
        >>> effects = total.assign(estimate=0.4, low=0.3, high=0.5)
        >>> best = BestState("MLP", 2, 0.3, 0.2, 0.4, share=0.75, p_value=0.01, reason="")
        >>> print(describe_trace(effects, best))
        neon: the noise takes 0.40 [0.30, 0.50] of the score. Clean output of MLP, layer 2,
        brings back 0.30 [0.20, 0.40], 75 % of it.
    """
    total = effects[effects["axis"] == "ceiling"].iloc[0]
    is_taken = bool(total["low"] > 0)
    # Where nothing was taken for sure, the first sentence has said what the reason says.
    doubt = f" ({best.reason})" if best.reason and is_taken else ""
    state = f"Clean output of {best.axis}, layer {best.position}"
    back = _brought_back(best, is_taken=is_taken)
    taken = noise_text(total["estimate"], total["low"], total["high"])
    note = "" if math.isnan(total["low"]) else few_seeds_note(total.get("n_seeds", math.nan))
    return f"{total['concept']}: {taken}. {state}, {back}{doubt}{note}."


def _brought_back(best: BestState, *, is_taken: bool) -> str:
    """What the best state brings back, as a share only of what was taken for sure."""
    amount = interval_text(best.estimate, best.low, best.high)
    if math.isnan(best.low):
        return f"has an effect of {amount}, without an interval"
    if best.high < 0:
        further = interval_text(-best.estimate, -best.high, -best.low)
        return f"brings nothing back: it lowers the score further, by {further}"
    if not best.low > 0:
        return f"has no clear effect ({amount})"
    if not is_taken or math.isnan(best.share):
        return f"has an effect of {amount}"
    return f"brings back {amount}, {percent(best.share)} of it"


def _is_clear(line: Any) -> bool:
    """Whether the interval of a line leaves out zero; without an interval nothing is clear."""
    return bool(line["low"] > 0 or line["high"] < 0)


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
    if not _is_clear({"low": sides.low, "high": sides.high}):
        gap = interval_text(sides.lead, sides.low, sides.high)
        return (
            f"No clear difference between the best state of the text encoder ({sides.text}) and "
            f"that of the denoiser ({sides.denoiser}): {gap}."
        )
    gap = f"{interval_text(sides.lead, sides.low, sides.high)} more"
    if sides.lead < 0:
        gap = f"{interval_text(-sides.lead, -sides.high, -sides.low)} less"
    verdict = "this does not decide between the sides"
    if sides.side is not None:
        verdict = f"the {sides.side} is ahead"
    return (
        f"The best state of the text encoder ({sides.text}) brings back {gap} than that of "
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
        Layers are named by one for 1 of 1 [21 %, 100 %] concepts, two for 0 of 1 [0 %, 79 %]
        concepts. Two localizers never name layers of the same concept.
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


def describe_side_counts(sided: pd.DataFrame) -> str:
    """Put in words on which side of the model causal traces find concepts, by their kinds.

    Args:
        sided: One row a concept, with its `kind` and `side` ("cannot tell" where no side is ahead).

    Returns:
        A sentence with the number of concepts of each kind and side, and 95 % intervals of the
        shares.

    Example:
        >>> import pandas as pd
        >>> rows = [("fact", "text encoder"), ("fact", "text encoder"), ("style", "cannot tell")]
        >>> print(describe_side_counts(pd.DataFrame(rows, columns=["kind", "side"])))
        Side of the model, by causal tracing: fact: text encoder for 2 of 2 [34 %, 100 %]; style:
        cannot tell for 1 of 1 [21 %, 100 %].
    """
    parts = []
    for kind, sides in sided.groupby("kind", sort=False)["side"]:
        counts = sides.value_counts()
        names = [f"{side} for {share_text(count, sides.size)}" for side, count in counts.items()]
        parts.append(f"{kind}: {', '.join(names)}")
    return f"Side of the model, by causal tracing: {'; '.join(parts)}."


def describe_clamping(effects: pd.DataFrame, width: int, *, kind: str = "style") -> str:
    """Put in words what clamped neurons do to the score of a concept.

    Args:
        effects: One row an arm ("top", "random", "edit"), number of neurons and measure, with what
            is lost of the score, for a fact gained, as `estimate`; with `n_seeds`, the number of
            seeds of each prompt.
        width: The number of neurons of each matrix.
        kind: The concept's: "style", "object" or "fact".

    Returns:
        A sentence with what is lost or gained for the strongest neurons, for random ones, and for
        the edit of the layers, each with its interval where the table has one, and what it is worth
        over one or two seeds.

    Example:
        >>> import pandas as pd
        >>> rows = [("top", 5, 0.2, 0.1, 0.3), ("random", 5, 0, -0.1, 0.1)]
        >>> rows += [("edit", 0, 0.3, 0.2, 0.4)]
        >>> columns = ["arm", "neurons", "estimate", "low", "high"]
        >>> effects = pd.DataFrame(rows, columns=columns).assign(measure="concept_score")
        >>> print(describe_clamping(effects, 96))
        Concept score lost: with 5 of 96 neurons of each matrix clamped, 0.20 [0.10, 0.30] for the
        strongest, 0.00 [−0.10, 0.10] for random ones; 0.30 [0.20, 0.40] for the edit of the layers.
    """
    rows = effects[effects["measure"] == "concept_score"]
    amounts: dict[str, str] = {}
    for arm, part in rows.groupby("arm"):
        lines: Any = part
        amounts[str(arm)] = ", ".join(map(_amount_text, lines.to_dict("records")))
    counts = ", ".join(str(count) for count in rows.loc[rows["arm"] == "top", "neurons"])
    effect = "Score of the new answer gained" if kind == "fact" else "Concept score lost"
    return (
        f"{effect}: with {counts} of {width} neurons of each matrix clamped, "
        f"{amounts['top']} for the strongest, {amounts['random']} for random ones; "
        f"{amounts['edit']} for the edit of the layers{few_seeds_note(_least_seeds(rows))}."
    )


def _least_seeds(rows: Any, column: str = "n_seeds") -> float:
    """The fewest seeds that a number of the table is over; NaN where it does not say."""
    return float(rows[column].min()) if column in rows else math.nan


def _amount_text(line: Mapping[Any, Any]) -> str:
    none = math.nan
    return interval_text(line["estimate"], line.get("low", none), line.get("high", none))


def describe_erasure(shares: pd.DataFrame, likeness: pd.Series, kind: str) -> str:
    """Put in words what is left after the last of several concepts was erased.

    Args:
        shares: Column `mean` by `way`, `count` and `group`: the share of right pictures; with
            `low` and `high`, its 95 % interval, `prompts`, the number of prompts it is of, and `n`,
            that of pictures.
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
        After erasing 2 styles: jointly, 25 % of their pictures still show them, ordinary SSIM 0.75.
    """
    last: Any = likeness.index.get_level_values("count").max()
    what = "give the new answer" if kind == "fact" else "still show them"
    parts = []
    for way in likeness.index.get_level_values("way").unique():
        row: Any = shares.loc[(way, last, "erased")]
        alike: Any = likeness[way, last]
        bounds = ""
        if "low" in row:
            bounds = f" ({percent(row['low'])} to {percent(row['high'])}{_sample_text(row)})"
        share = f"{percent(row['mean'])}{bounds} of their pictures {what}"
        parts.append(f"{way}, {share}, ordinary SSIM {number(alike)}")
    note = ""
    if {"low", "prompts", "n"} <= set(shares):
        seeds: Any = shares["n"] / shares["prompts"]
        note = few_seeds_note(seeds.min())
    return f"After erasing {counted(last, kind)}: {'; '.join(parts)}{note}."


def _sample_text(row: Mapping[str, Any]) -> str:
    """`, n = 6 prompts × 4 seeds`, as far as the row says it."""
    if "prompts" not in row:
        return ""
    prompts = f", n = {counted(row['prompts'], 'prompt')}"
    if "n" not in row:
        return prompts
    # Every prompt is made under every seed.
    return f"{prompts} × {counted(row['n'] / row['prompts'], 'seed')}"


# Measures of an edit → whose prompts they look at.
_OF_PROMPTS = {
    "efficacy": "of its own prompts",
    "generality": "said in other words",
    "specificity": "of its neighbors",
    "name": "of its name alone",
    "short": "of a short prompt",
    "long": "of its long prompts",
    "variant": "of its prompts in other words",
    "implicit": "of prompts that ask for it without its name",
    "rest": "of what else its prompts name",
    "inversion": "after token vectors were trained in the place of its words",
    "states": "after its text states were trained",
    "closed": "after its text states were solved for",
    "discrete": "with other tokens in the place of its words",
    "relearn": "after the model was trained on a few pictures",
    "completion": "where the unedited model makes the first steps",
    "noise": "under the best of the seeds",
    "inpaint": "in the hole of a picture of it",
}


def describe_edit(summary: pd.DataFrame, arm: str, leads: pd.DataFrame | None = None) -> str:
    """Put in words what an edit did, and how far it is ahead of its controls.

    Args:
        summary: The means of an evaluation, from `summary`.
        arm: The arm of the edit.
        leads: The comparison with the controls, from `lead`; None: nothing is compared.

    Returns:
        A sentence with the shares of right pictures, each with the 95 % bounds that its number of
        units allows, and with its change, which is "no clear change" where its interval holds zero;
        one about the controls, which says "better" or "worse" only where the
        interval leaves out zero; and one that says so where there are too few seeds.

    Raises:
        LocogenError: The summary lacks the arm, or the comparison is of another one.

    Example:
        >>> import pandas as pd
        >>> row = {"arm": "layer 3", "measure": "efficacy", "quantity": "right", "units": 6}
        >>> row |= {"before": 1.0, "after": 0.0, "after_low": 0.0, "after_high": 0.459}
        >>> means = pd.DataFrame([row])
        >>> leads = pd.DataFrame([{"rival": "all layers", "estimate": 0.12, "low": -0.48}])
        >>> print(describe_edit(means, "layer 3", leads.assign(high=0.81)))
        With the edit at layer 3, the picture shows what the prompt says for 0 % of its own
        prompts (0 % to 46 %, n = 6; 100 % before). At telling concept and neighbors apart:
        no clear difference from all layers (0.12 [−0.48, 0.81]).
    """
    if arm not in set(summary["arm"]):
        arms = ", ".join(map(str, dict.fromkeys(summary["arm"])))
        raise LocogenError(f"the summary has no arm {arm!r}: it has {arms}")
    if leads is not None and arm in set(leads["rival"]):
        raise LocogenError(
            f"leads has {arm!r} among the rivals: it is of another arm; give lead(table, {arm!r})"
        )
    rows: Any = summary[(summary["quantity"] == "right") & (summary["arm"] == arm)]
    by_measure = {line["measure"]: line for line in rows.to_dict("records")}
    parts = []
    for measure, words in _OF_PROMPTS.items():
        if measure in by_measure:
            parts.append(_share_after(by_measure[measure], words))
    shows = f"the picture shows what the prompt says for {', '.join(parts)}"
    if not parts:
        shows = "nothing is known of what the pictures show: no probe names what they could show"
    text = f"With the edit at {arm}, {shows}."
    if leads is not None and not leads.empty:
        text += f" At telling concept and neighbors apart: {compare_words(leads)}."
    return f"{text.removesuffix('.')}{few_seeds_note(_least_seeds(rows, 'seeds'))}."


def describe_choice(concept: str, setting: str, score: float, tries: int, outcome: str) -> str:
    """Put in words which of many settings was chosen, and what it then did elsewhere.

    Args:
        concept: The concept's name.
        setting: The setting in words.
        score: What it was chosen by, the largest of all.
        tries: The number of settings that were tried.
        outcome: What it did on prompts and noise that did not choose it, from `describe_edit`.

    Returns:
        The sentences: the first says that the best of several tries looks better than it is.

    Example:
        >>> print(describe_choice("neon", "λ = 0.01", 0.95, 96, "With the edit, 0 % of 6 prompts."))
        neon: λ = 0.01, which had the largest score of 96 settings on other prompts (0.95, without
        an interval: the best of several tries looks better than it is). On prompts and noise that
        chose nothing: With the edit, 0 % of 6 prompts.
    """
    size = f"{number(score)}, without an interval"
    if tries == 1:
        return f"{concept}: {setting}, the one setting that was tried ({size}). {outcome}"
    doubt = "the best of several tries looks better than it is"
    return (
        f"{concept}: {setting}, which had the largest score of {tries} settings on other prompts "
        f"({size}: {doubt}). On prompts and noise that chose nothing: {outcome}"
    )


def few_seeds_note(seeds: float) -> str:
    """What intervals over so few seeds are worth, to end a sentence with.

    Args:
        seeds: Their number; NaN where it is not known.

    Returns:
        A clause with its semicolon; "" for enough seeds.

    Example:
        >>> few_seeds_note(2)
        '; with n = 2 seeds, intervals are hardly worth printing'
    """
    if not seeds <= FEW_SEEDS:
        return ""
    return f"; with n = {counted(seeds, 'seed')}, intervals are hardly worth printing"


def answer_edit(
    summary: pd.DataFrame, arm: str, concept: str, attacks: Sequence[Attack] = ()
) -> str:
    """Answer in one line whether a concept is gone, for somebody who has to rely on it.

    Args:
        summary: The means of an evaluation, from `summary`.
        arm: The arm of the edit.
        concept: The concept's name.
        attacks: From `attack`, on this edit.

    Returns:
        One line: what own words still show, with the number of prompts and the bound that so many
        prompts allow, and what the strongest attack brought back, beside what the same attack
        brings of a concept that the model never had. `describe_edit` and `Attack.sentence` have
        the details: other words, the neighbors, every attack.
        "Hidden, not gone" only where own words clearly show less than before, and the interval of
        the attack is above theirs and above that of what it teaches. Where the edit does not
        clearly remove the concept by its own words, attacks say nothing. Where the unedited model
        does not show it either, or has the new answer of a fact already, nothing is said of the
        edit. Of one or two seeds it says what intervals are worth.

    Raises:
        LocogenError: The summary lacks the arm, or its own prompts.

    Example:
        >>> import pandas as pd
        >>> row = {"arm": "layer 3", "measure": "efficacy", "quantity": "right", "units": 6}
        >>> row |= {"sign": -1, "before": 1.0, "after": 0.0, "after_low": 0.0, "after_high": 0.459}
        >>> print(answer_edit(pd.DataFrame([row]), "layer 3", "neon"))
        Is neon gone? By its own words it is shown in none of the pictures of 6 prompts: in at most
        46 % of such prompts, with 95 % confidence; nobody tried to bring it back.
    """
    of_arm: Any = summary[(summary["quantity"] == "right") & (summary["arm"] == arm)]
    rows: Any = of_arm[of_arm["measure"] == "efficacy"]
    if rows.empty:
        raise LocogenError(
            f"the summary has no shares of right pictures of {arm!r} on the concept's own prompts: "
            "evaluate it with probes_for(concept, others)"
        )
    line = rows.iloc[0]
    comes = line.get("sign", -1) > 0
    question = f"Does {concept} get its new answer?" if comes else f"Is {concept} gone?"
    answer = _unanswerable(line, comes) or _edit_answer(line, comes, attacks)
    return f"{question} {answer}{few_seeds_note(_least_seeds(rows, 'seeds'))}."


def _unanswerable(line: Any, comes: bool) -> str:
    """Why nothing can be said of an edit; "" where the unedited model had what should change."""
    units = _prompts_and_seeds(line)
    if not comes and line["before"] == 0:
        return (
            f"Nothing can be said: the model without the edit shows it in none of the pictures of "
            f"{units} either. Ask with prompts whose pictures show it"
        )
    if comes and line["before"] >= 1:
        return (
            f"Nothing can be said: the model without the edit gives it in all pictures of {units}. "
            "Ask for a fact that it does not give yet"
        )
    return ""


def _edit_answer(line: Any, comes: bool, attacks: Sequence[Attack]) -> str:
    """What the edited model shows by the concept's own words, and under the strongest attack."""
    what = "the new answer" if comes else "it"
    own_words = f"By its own words {what} is shown in {_bounded_share(line)}"
    if not _has_moved(line, comes):
        # What an attack brings of a concept that is still shown was never hidden.
        doubt = "that it came" if comes else "that it was removed"
        note = ", so attacks say nothing" if attacks else ""
        return f"{own_words}; {doubt} is not certain{note}"
    if not attacks:
        return f"{own_words}; nobody tried to bring {'the old answer' if comes else 'it'} back"
    return f"{own_words}; {_attacks_answer(attacks, line, comes)}"


def _has_moved(line: Any, comes: bool) -> bool:
    """Whether an edit clearly changed a share in the direction that is meant."""
    low, high = (line.get(end, math.nan) for end in ("low", "high"))
    if math.isnan(low) or math.isnan(high):  # a table without changes: by the bounds of the share
        low = line["after_low"] - line["before"]
        high = line["after_high"] - line["before"]
    return low > 0 if comes else high < 0


def _bounded_share(line: Any) -> str:
    """A share of prompts, and what it may be at most and at least among all such prompts."""
    units = _prompts_and_seeds(line)
    # How often it was shown before the edit goes without saying only where it always was.
    before = "" if line["before"] == 1 else f"; {percent(line['before'])} before"
    low, high = percent(line["after_low"]), percent(line["after_high"])
    if line["after"] == 0:
        return (
            f"none of the pictures of {units}: in at most {high} of such prompts, with 95 % "
            f"confidence{before}"
        )
    share = percent(line["after"])
    return f"{share} of the pictures of {units} (between {low} and {high}, 95 %{before})"


def _prompts_and_seeds(line: Any) -> str:
    """`6 prompts × 4 seeds`; `6 prompts` where nothing says under how many seeds."""
    prompts = counted(line["units"], "prompt")
    seeds = line.get("seeds", math.nan)
    return prompts if math.isnan(seeds) else f"{prompts} × {counted(seeds, 'seed')}"


def _attacks_answer(attacks: Sequence[Attack], line: Any, comes: bool) -> str:
    """What the attack that brought most back says, first of those that show what was hidden."""
    attacked = []
    for attack in attacks:
        lines = attack.summary().groupby("model", sort=False).tail(1).set_index("model")
        if "edited" in lines.index:
            attacked.append((attack.kind, lines))
    if not attacked:
        return "no attack was made on the edited model"
    # By the new answer of a fact nothing is known of how often the old one is shown.
    most = 0.0 if comes else line["after_high"]
    kind, lines = max(
        attacked, key=lambda one: (_is_hidden(one[1], most), one[1].loc["edited"].after)
    )
    back = lines.loc["edited"]
    again = "the old answer" if comes else "it"
    which = "an attack" if len(attacked) == 1 else f"the strongest of {len(attacked)} attacks"
    text = f"under {which} ({kind}) {again} is shown in {_attacked_share(back)}"
    if "never had" not in lines.index:
        return f"{text}; what the attack can teach was not measured"
    taught = _attacked_share(lines.loc["never had"])
    text = f"{text}, and a concept that the model never had in {taught}"
    if _is_hidden(lines, most):
        return f"{text}: hidden, not gone"
    return f"{text}: this does not show that it was only hidden"


def _is_hidden(lines: Any, most: float) -> bool:
    """Whether an attack brings more than it teaches, and more than `most`, of own words."""
    if "never had" not in lines.index:
        return False
    back = lines.loc["edited", "low"]
    return bool(back > lines.loc["never had", "high"] and back > most)


def _attacked_share(line: Any) -> str:
    bounds = f"{percent(line['low'])} to {percent(line['high'])}"
    return f"{percent(line['after'])} ({bounds}, n = {number(line['units'], 0)})"


def _share_after(line: Mapping[Any, Any], words: str) -> str:
    """One share of right pictures, with its bounds, the number of units and the share before."""
    bounds = ""
    if not math.isnan(line.get("after_low", math.nan)):
        low = percent(line["after_low"])
        bounds = f"{low} to {percent(line['after_high'])}, n = {number(line['units'], 0)}; "
    before = f"{percent(line['before'])} before{_change_of_share(line)}"
    return f"{percent(line['after'])} {words} ({bounds}{before})"


def _change_of_share(line: Mapping[Any, Any]) -> str:
    """Whether a share changed, by the interval of its change; "" where there is none."""
    low, high = (line.get(end, math.nan) for end in ("low", "high"))
    if math.isnan(low) or math.isnan(high):
        return ""
    change, *ends = (number(100 * value, 0) for value in (line["change"], low, high))
    words = "a change of" if low > 0 or high < 0 else "no clear change:"
    return f", {words} {change} [{', '.join(ends)}] points"


def compare_words(leads: pd.DataFrame) -> str:
    """Say of which rivals something is ahead, by their intervals.

    Args:
        leads: One row a rival, with `rival`, `estimate`, `low` and `high`; above 0 is ahead.

    Returns:
        "better than …", "worse than …" for intervals that leave out zero, "no clear difference
        from …" for those that hold it, "cannot be compared with …" where there is none (NaN).
        Of each group those nearest to zero are named, at most three.

    Example:
        >>> import pandas as pd
        >>> columns = ["rival", "estimate", "low", "high"]
        >>> compare_words(pd.DataFrame([("layers 0-1", 1.0, 0.6, 1.4)], columns=columns))
        'better than layers 0-1 (1.00 [0.60, 1.40])'
    """
    groups: dict[str, list[str]] = {
        "worse than": [],
        "no clear difference from": [],
        "better than": [],
        "cannot be compared with": [],
    }
    nearest_first = leads.iloc[leads["estimate"].abs().argsort(kind="stable")]
    for line in nearest_first.to_dict("records"):
        gap = interval_text(line["estimate"], line["low"], line["high"])
        groups[_comparison(line)].append(f"{line['rival']} ({gap})")
    return "; ".join(f"{words} {_listed(names)}" for words, names in groups.items() if names)


def _comparison(line: Mapping[Any, Any]) -> str:
    """In words how something stands to a rival, by the interval of its lead."""
    # Before the signs: comparisons with NaN are false, and would read as "no clear difference".
    if math.isnan(line["low"]) or math.isnan(line["high"]):
        return "cannot be compared with"
    if line["low"] > 0:
        return "better than"
    if line["high"] < 0:
        return "worse than"
    return "no clear difference from"


def _listed(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def describe_steps(
    reached: Mapping[int, float],
    reference: int,
    enough: float,
    *,
    concepts: int | None = None,
    seeds: int | None = None,
) -> tuple[int, str]:
    """Find the fewest denoising steps that choose well, and put it in words.

    Args:
        reached: Number of steps → the least share of the reference's best effect that the choice
            of any concept reaches; NaN where it could not be judged.
        reference: The number of steps that they are compared with.
        enough: The share that has to be reached, by this and every larger number of steps.
        concepts: The number of concepts that were tried; None: not said.
        seeds: The number of seeds that effects are means over; None: not said.

    Returns:
        The number of steps (the reference where no fewer are known to do), and two sentences: the
        second says that the shares are ratios of means without intervals, and over how many.

    Example:
        >>> steps, sentence = describe_steps({4: 0.95, 20: 1.0}, 50, 0.96)
        >>> print(steps, sentence)
        20 20 steps are enough for 96 % of what 50 choose, in every concept: at least 95 % of the
        best effect with 4, 100 % with 20. These are ratios of means, without intervals.
        >>> sentence = describe_steps({4: 0.95}, 50, 0.9, concepts=1, seeds=4)[1]
        >>> print(sentence.partition(". ")[2])
        These are ratios of means over 4 seeds of 1 concept, without intervals.
    """
    if not reached:
        return reference, f"no fewer steps than {reference} were tried."
    fewest = reference
    unjudged = None
    # From the most steps down: a small number that reaches enough by chance, below one that does
    # not, proves nothing.
    for steps in sorted(reached, reverse=True):
        if not reached[steps] >= enough:
            unjudged = steps if math.isnan(reached[steps]) else None
            break
        fewest = steps
    verdict = _steps_verdict(fewest, unjudged, reference, percent(enough))
    (first, least), *others = reached.items()
    shares = [f"{_share_reached(least)} of the best effect with {first}"]
    shares += [f"{_share_reached(share)} with {steps}" for steps, share in others]
    of = "" if seeds is None else f" over {counted(seeds, 'seed')}"
    of += "" if concepts is None else f" of {counted(concepts, 'concept')}"
    doubt = f"These are ratios of means{of}, without intervals."
    return fewest, f"{verdict}: at least {', '.join(shares)}. {doubt}"


def _steps_verdict(fewest: int, unjudged: int | None, reference: int, share: str) -> str:
    """What is known of fewer steps; `unjudged`: the next fewer, where nothing is known of these."""
    if fewest == reference and unjudged is not None:
        return (
            f"whether {_steps_are(unjudged)} enough for {share} of what {reference} choose, in "
            "every concept, could not be judged"
        )
    if fewest == reference:
        return (
            f"no fewer than {reference} steps are enough for {share} of what they choose, in every "
            "concept"
        )
    verdict = (
        f"{_steps_are(fewest)} enough for {share} of what {reference} choose, in every concept"
    )
    if unjudged is None:
        return verdict
    few = "1 step" if unjudged == 1 else f"{unjudged} steps"
    return f"{verdict} (of {few} it could not be judged)"


def _steps_are(steps: int) -> str:
    return "1 step is" if steps == 1 else f"{steps} steps are"


def _share_reached(share: float) -> str:
    return "an unknown share" if math.isnan(share) else percent(share)
