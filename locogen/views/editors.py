"""Editors side by side: measures with intervals as panels, a table for a page, and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.errors import LocogenError
from locogen.markup import counted, number, percent
from locogen.plan import listed
from locogen.views.plots import plain_label
from locogen.views.sentences import few_seeds_note

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Measures in the order of panels and columns: what a reader asks, and whether many is good: of a
# fact, whose new answer should come, the summary's sign says the contrary.
QUESTIONS: Mapping[str, tuple[str, int]] = {
    "efficacy": ("by its own words", -1),
    "generality": ("by other words", -1),
    "specificity": ("its neighbors", 1),
    "rest": ("the rest of the prompt", 1),
    "closed": ("after a solve", -1),
    "inversion": ("after a trained token", -1),
    "states": ("after trained states", -1),
    "discrete": ("by other tokens", -1),
    "relearn": ("after more training", -1),
    "noise": ("under the best seed", -1),
    "inpaint": ("in a hole of a picture", -1),
    "completion": ("after plain first steps", -1),
}
COLORS = ("#0173b2", "#b35900", "#4a7d3c", "#8a5a9e", "#7a4b3a", "#5a5a5a", "#c2185b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# Measures whose pictures before are of the unedited model; those before an attack have the edit.
OF_THE_UNEDITED = ("efficacy", "generality", "specificity", "rest")
# How often the unedited model shows what should change, where an edit can change nothing.
NEVER_SHOWN = {-1: 0.0, 1: 1.0}
FEW = 3  # others that a sentence names; more are counted
NUMBERS = ("four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
NOTHING = "–"
CONTROL = ", never had"  # of an attack: what it brings of a concept that the model never had


def _shares(summary: pd.DataFrame) -> Any:
    """Rows of shares of right pictures, with the concept that they are of."""
    rows: Any = summary[summary["quantity"] == "right"]
    if rows.empty:
        raise LocogenError(
            "the summary has no shares of right pictures: give probes with among=, as from "
            "probes_for and prompt_kind_probes"
        )
    return rows if "concept" in rows else rows.assign(concept="")


def _measures(rows: Any) -> list[str]:
    """The measures that the rows have, those with a question first."""
    present = list(dict.fromkeys(rows["measure"]))
    pairs = [(name, f"{name}{CONTROL}") for name in QUESTIONS]
    asked_about = [name for pair in pairs for name in pair if name in present]
    others = [name for name in present if name not in asked_about and name != "ordinary"]
    return asked_about + others


def _question(measure: str) -> tuple[str, int]:
    """A measure in words, and whether many is good (1), bad (-1) or neither."""
    kind = measure.removesuffix(CONTROL)
    words, sign = QUESTIONS.get(kind, (kind, 0))
    return (words, sign) if kind == measure else (f"{words}, never had", 0)


def _signs(rows: Any, measure: str) -> set[int]:
    """Whether many is good by a measure: as the summary says, if it does; empty: neither."""
    sign = _question(measure)[1]
    if not sign:
        return set()
    if "sign" not in rows:
        return {sign}
    return {int(each) for each in rows.loc[rows["measure"] == measure, "sign"]}


def _own_signs(rows: Any) -> set[int]:
    """Whether own words should show many: -1 of what is removed, 1 of facts; both of both."""
    return _signs(rows, "efficacy") | _signs(rows, "generality")


def _heading(rows: Any, measure: str, *, arrows: bool = False) -> str:
    """A measure in words, and for facts what is shown; with arrows to where it is good."""
    words, usual = _question(measure)
    arrow: dict[int, str] = dict.fromkeys((-1, 0, 1), "")
    if arrows:
        arrow |= {-1: " ←", 1: " →"}
    signs = _own_signs(rows)
    if usual >= 0 or 1 not in signs:
        return words + arrow[usual]
    answer = f"new answer{arrow[1]}" if measure in OF_THE_UNEDITED else f"old answer{arrow[-1]}"
    if -1 not in signs:
        return f"{words}, {answer}"
    line = "\n" if arrows else " "
    return f"{words}{arrow[-1]}{line}(facts: {answer})"


def plot_editors(summary: pd.DataFrame) -> Figure:
    """Draw what each editor did: a panel a measure, a line an editor, a mark a concept.

    Filled marks are after the edit, hollow ones before; bars are 95 % intervals. An arrow says
    which way is good: what was removed should not be shown, a fact's new answer, neighbors and the
    rest should.

    Args:
        summary: From `locogen.summary`; of several concepts with a column `concept`. An arm is an
            editor.

    Returns:
        The figure.

    Raises:
        LocogenError: The summary has no shares of right pictures.

    Example:
        >>> import pandas as pd
        >>> row = {"quantity": "right", "arm": "LocoEdit", "measure": "efficacy", "before": 0.9}
        >>> row |= {"after": 0.1, "after_low": 0.0, "after_high": 0.3}
        >>> [ax.get_title() for ax in plot_editors(pd.DataFrame([row])).axes]
        ['by its own words ←']
    """
    import matplotlib.pyplot as plt

    rows = _shares(summary)
    arms = list(dict.fromkeys(rows["arm"]))
    concepts = list(dict.fromkeys(rows["concept"]))
    measures = _measures(rows)
    columns = min(4, len(measures))
    lines = -(-len(measures) // columns)
    size = (2.6 * columns + 1.6, lines * (1.2 + 0.3 * len(arms) * max(1, len(concepts) * 0.6)))
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(measures) :]:
        ax.remove()
    for ax, measure in zip(axes.flat, measures, strict=False):
        ax.set_title(_heading(rows, measure, arrows=True), fontsize=10)
        for place, concept in enumerate(concepts):
            part = rows[(rows["measure"] == measure) & (rows["concept"] == concept)]
            shift = 0.6 * (place - (len(concepts) - 1) / 2) / max(1, len(concepts))
            _draw(ax, part, [arms.index(arm) + shift for arm in part["arm"]], place, str(concept))
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[max(0, len(measures) - columns) : len(measures)]:
        ax.tick_params(labelbottom=True)  # where no panel is below
    first = axes[0, 0]
    first.set_yticks(range(len(arms)), [plain_label(arm, 24) for arm in arms])
    first.set_ylim(len(arms) - 0.5, -0.5)  # the first editor on top
    first.set_xlim(-0.04, 1.04)
    figure.supxlabel("share of pictures", fontsize=10)
    if len(concepts) > 1:
        figure.legend(*first.get_legend_handles_labels(), loc="outside upper center", ncols=7)
    return figure


def _draw(ax: Any, part: Any, heights: Sequence[float], place: int, label: str) -> None:
    """One measure of one concept, an editor each at its height."""
    color, marker = COLORS[place % len(COLORS)], MARKERS[place % len(MARKERS)]
    after = part["after"].to_numpy(float)
    below = (after - part["after_low"]).clip(lower=0).fillna(0)
    above = (part["after_high"] - after).clip(lower=0).fillna(0)
    hollow = {"mfc": "none", "mec": color, "alpha": 0.5, "markersize": 4}
    ax.plot(part["before"], heights, marker, **hollow)
    looks: dict[str, Any] = {"fmt": marker, "color": color, "capsize": 2, "markersize": 4}
    ax.errorbar(after, heights, xerr=np.stack([below, above]), label=label, **looks)


def editor_table(
    summary: pd.DataFrame,
    costs: Mapping[str | tuple[str, str], Mapping[str, Any]] | None = None,
) -> pd.DataFrame:
    """Put what each editor did in a table that people read: shares with their 95 % intervals.

    Args:
        summary: From `locogen.summary`; of several concepts with a column `concept`.
        costs: By editor, or by (concept, editor), what else is to be said of it, such as seconds
            and KB; None: nothing.

    Returns:
        One row an editor (and concept), a column a measure: the share in percent, its bounds, and
        the number of prompts that they count; a dash where nothing was measured. What the unedited
        model showed follows where that was not in all pictures. Of a fact, own words and other
        words count its new answer.

    Raises:
        LocogenError: The summary has no shares of right pictures.

    Example:
        >>> import pandas as pd
        >>> row = {"quantity": "right", "arm": "LocoEdit", "measure": "efficacy", "units": 8}
        >>> row |= {"after": 0.0, "after_low": 0.0, "after_high": 0.37}
        >>> table = editor_table(pd.DataFrame([row]), {"LocoEdit": {"seconds": 0.3}})
        >>> table.iloc[0].tolist()
        ['LocoEdit', '0 % [0, 37] of 8 prompts', 0.3]
    """
    import pandas as pd

    rows = _shares(summary)
    headings = {measure: _heading(rows, measure) for measure in _measures(rows)}
    costs = costs or {}
    lines = []
    for (concept, arm), part in rows.groupby(["concept", "arm"], sort=False):
        by_measure = {line["measure"]: line for line in part.to_dict("records")}
        line = {"concept": concept, "editor": arm}
        for measure, words in headings.items():
            line[words] = _cell(by_measure[measure]) if measure in by_measure else NOTHING
        line |= dict(costs.get(str(arm), {}))
        lines.append(line | dict(costs.get((str(concept), str(arm)), {})))
    table = pd.DataFrame(lines).astype(object).fillna(NOTHING)
    has_concepts = any(line["concept"] for line in lines)
    return table if has_concepts else table.drop(columns="concept")


def _share_text(line: Mapping[Any, Any]) -> str:
    low, high = 100 * line["after_low"], 100 * line["after_high"]
    bounds = "" if np.isnan(low) else f" [{number(low, 0)}, {number(high, 0)}]"
    return f"{percent(line['after'])}{bounds} of {counted(line['units'], 'prompt')}"


def _cell(line: Mapping[Any, Any]) -> str:
    """A share, and what it was without the edit, unless it was shown in every picture."""
    before = line.get("before", np.nan)
    if line["measure"] not in OF_THE_UNEDITED or np.isnan(before) or before == 1:
        return _share_text(line)
    return f"{_share_text(line)}; {percent(before)} before"


def describe_editors(summary: pd.DataFrame, *, control: str | None = None) -> str:
    """Say which editors did best, and which others their intervals cannot tell from these.

    Args:
        summary: From `locogen.summary`, of one concept; an arm is an editor.
        control: An arm that is none, such as a placebo: it is not among the editors.

    Returns:
        A sentence for each of: own words, neighbors, and every attack. One editor has "more" or
        "less" than another only where their intervals do not overlap, and "least" or "most" only
        where this holds of all others; else there is "no clear difference". Of a fact, the best by
        its own words shows the new answer most. Where the unedited model did not show the concept
        either, or had the new answer of a fact already, nothing is said of editors and attacks.

    Raises:
        LocogenError: The summary has no shares of right pictures, or is of a fact and others.

    Example:
        >>> import pandas as pd
        >>> row = {"quantity": "right", "measure": "efficacy", "units": 8}
        >>> good = row | {"arm": "UCE", "after": 0.0, "after_low": 0.0, "after_high": 0.37}
        >>> poor = row | {"arm": "SPEED", "after": 0.9, "after_low": 0.47, "after_high": 1.0}
        >>> print(describe_editors(pd.DataFrame([good, poor])))
        Shown by its own words least with UCE (0 % [0, 37] of 8 prompts); more with SPEED.
    """
    rows = _shares(summary)
    rows = rows[rows["arm"] != control]
    is_fact = 1 in _own_signs(rows)
    nothing = _nothing_to_say(rows, "efficacy", 1 if is_fact else -1)
    sentences = [nothing] if nothing else []
    for measure in _measures(rows):
        sentence = _sentence_of(rows, measure, is_fact=is_fact)
        # Of what could not change by own words, attacks say nothing either.
        if sentence and (measure == "specificity" or not nothing):
            sentences.append(sentence)
    text = " ".join(sentences)
    if not text or "seeds" not in rows:
        return text
    return f"{text.removesuffix('.')}{few_seeds_note(rows['seeds'].min())}."


def _sentence_of(rows: Any, measure: str, *, is_fact: bool) -> str:
    """How the editors rank by one measure; empty for those that are not ranked."""
    part: Any = rows[rows["measure"] == measure]
    signs = _one_sign(rows, measure)
    if measure in ("generality", "rest") or not signs or part["after_low"].isna().any():
        return ""
    if measure == "specificity":
        lost = _nothing_to_say(rows, measure, -1)
        return lost or _ranked(part, _subject(measure, 1, is_fact), 1)
    (sign,) = signs
    return _ranked(part, _subject(measure, sign, is_fact), sign)


def _one_sign(rows: Any, measure: str) -> set[int]:
    """The sign of a measure: none, or one, for editors are ranked on one concept."""
    signs = _signs(rows, measure)
    if len(signs) > 1:
        raise LocogenError(
            f"{measure!r} is of a fact, whose new answer should be shown, and of what should not: "
            "describe the summary of one concept at a time"
        )
    return signs


def _nothing_to_say(rows: Any, measure: str, sign: int) -> str:
    """Why a measure says nothing of any editor; empty where something could change.

    `sign`: 1 where many pictures should come, as of a fact's new answer; -1 where they can be lost.
    """
    part: Any = rows[rows["measure"] == measure]
    if part.empty or "before" not in part or not (part["before"] == NEVER_SHOWN[sign]).all():
        return ""
    prompts = counted(part["units"].max(), "prompt")
    what = "Nothing can be said by its own words: the model without an edit"
    if sign > 0:
        return f"{what} gives the new answer in all pictures of {prompts}."
    if measure == "specificity":
        what = what.replace("by its own words", "of its neighbors")
        return f"{what} shows them in none of the pictures of {prompts} either."
    return f"{what} shows it in none of the pictures of {prompts} either."


def _subject(measure: str, sign: int, is_fact: bool) -> str:
    """What is shown, in the words that a sentence begins with."""
    words, usual = _question(measure)
    if usual > 0:
        return f"Right for {words}"
    if not is_fact:
        return f"Shown {words}"
    return f"The {'new' if sign > 0 else 'old'} answer is shown {words}"


def _ranked(part: Any, subject: str, sign: int) -> str:
    """One measure: the editor with the best share, and how all others stand to it."""
    by_loss = part.assign(loss=-sign * part["after"]).sort_values("loss", kind="stable")
    lines: list[dict[Any, Any]] = by_loss.to_dict("records")
    alike, worse, unclear = _apart(lines, sign)
    most = "most" if sign > 0 else "least"
    more = "less" if sign > 0 else "more"
    share = _share_text(lines[0])
    if worse and not unclear:
        return f"{subject} {most} with {_listed(alike)} ({share}); {more} with {_rest(worse)}."
    # One that the intervals cannot tell from the first may be as good: none is called best.
    best = _listed(alike)
    if len(alike) == len(lines) > FEW:
        best = f"all {_number_word(len(alike))}"
    parts = [f"{subject} with {best}: {share}"]
    parts += _no_clear_difference(alike, unclear, names_worse=bool(worse))
    if worse:
        parts.append(f"{more} with {_listed(worse)}")
    return f"{'; '.join(parts)}."


def _apart(lines: Sequence[Mapping[Any, Any]], sign: int) -> tuple[list[str], list[str], list[str]]:
    """Editors with the first one's share, those that are clearly worse, and all others."""
    alike = []
    worse = []
    unclear = []
    for line in lines:
        if _share_text(line) == _share_text(lines[0]):
            alike.append(line["arm"])
        elif _is_worse(line, lines[0], sign):
            worse.append(line["arm"])
        else:
            unclear.append(line["arm"])
    return alike, worse, unclear


def _no_clear_difference(
    alike: Sequence[str], unclear: Sequence[str], *, names_worse: bool
) -> list[str]:
    """Which editors the intervals cannot tell from the first one's share."""
    if not unclear:
        return ["no clear difference"] if len(alike) > 1 else []
    if not names_worse:
        return [f"no clear difference from {_rest(unclear)}"]
    # Those that are worse are named, so that the others need not be.
    few = len(unclear) <= FEW
    names = _listed(unclear) if few else f"{_number_word(len(unclear))} others"
    return [f"no clear difference from {names}"]


def _rest(names: Sequence[str]) -> str:
    """All that have not been named: by name, or as "the other nine" where they are many."""
    return _listed(names) if len(names) <= FEW else f"the other {_number_word(len(names))}"


def _number_word(count: int) -> str:
    """A count above three in words, as sentences have it; in digits from thirteen on."""
    place = count - FEW - 1
    return NUMBERS[place] if place < len(NUMBERS) else str(count)


def _is_worse(line: Mapping[Any, Any], best: Mapping[Any, Any], sign: int) -> bool:
    """Whether two intervals are apart, and so the interval of the difference leaves out zero."""
    # Newcombe's interval of a difference of shares (Stat. Med. 17, 1998, method 10) reaches less
    # far than the two shares' own reaches added: the root of the sum of their squares.
    if sign < 0:
        return line["after_low"] > best["after_high"]
    return line["after_high"] < best["after_low"]


def _listed(names: Sequence[str]) -> str:
    """All names; those with a comma of their own in quotes."""
    return listed(f"'{name}'" if "," in name else name for name in names)
