"""Where a concept is, by questions: is a window necessary, is it sufficient, is all else kept?

`effects.carrier` says the rule in words. Every threshold is a constant here.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locogen import stats
from locogen.markup import interval_text, number, percent
from locogen.plan import Verdict, VerdictKind, Window, listed

if TYPE_CHECKING:
    import pandas as pd

# The share of the ceiling's effect that a place needs, to be necessary or sufficient. 0.5: more
# than all other places together could have if effects added up.
MIN_SHARE = 0.5
# How far below `MIN_SHARE` the interval of the share may reach. With the estimate above it and the
# effect beyond chance, this bounds how uncertain a share may be that is called enough.
SLACK = 0.25
# A place that falls short is left open (and the verdict inconclusive) only if its estimate is
# within this distance below `MIN_SHARE`, and its interval reaches it.
OPEN = 0.2
# An effect larger than the ceiling's by this share of it, with confidence: another picture came.
BEYOND_CEILING = 0.25
# So does a loss of content beyond that of the ceiling and the placebo, in units of the baseline's
# content score.
BEYOND_CONTENT = 0.25
# A ceiling whose interval lies within this of zero, on either side: the score hardly depends on the
# layers at all.
SMALL_CEILING: Mapping[str, float] = {"probability": 0.1, "clip_score": 0.02}
# The second is a cosine's size. A scorer of one's own may have a smaller scale: a ceiling that
# leaves out zero, and is at least this share of the baseline's score, is not small. It is chosen so
# that the verdicts on cosines stay: no ceiling below 0.02 is a tenth of a baseline of 0.2 or more.
# A scorer whose zero means nothing (a large offset) has no scale in a sweep of one concept. Its
# spread over seeds is none: a change of 0.01 by which a cosine of 0.6 varies ten times less is
# small however clear, and the same numbers with another zero and unit are those of a concept that
# is heard. So the reason says what to do.
NOT_SMALL = 0.1
# Of what a probability can change, the ceiling has to change at least this share: otherwise the
# scorer cannot tell the concept from its neighbors.
TELLS_APART = 0.5
# More places than this, each necessary or each sufficient, are called spread.
MOST_PLACES = 3

NECESSITY = "necessity"
SUFFICIENCY = "sufficiency"
CONTENT = "content"
ANOTHER = "another picture"
CEILING = "ceiling"
AXES = {NECESSITY: "layer", SUFFICIENCY: "insert"}  # question → axis of the effects table
NUMBERS = ("estimate", "low", "high", "share", "share_low", "share_high")
COLUMNS = ("question", "place", "start", "width", *NUMBERS, "p", "passes")
# What a search that does not look at everything says of itself.
_PARTIAL = {
    "race": "a race looks at two windows to the end",
    "attribute": "a search by attribution measures few windows",
}
Line = dict[str, Any]
_Way = tuple[int, float, tuple[int, ...]]  # number of places, minus their weights, the places


@dataclass(frozen=True)
class Answers:
    """What is known of one question, by first layer: where it passes, and where it is open."""

    passes: tuple[int, ...]
    open: tuple[int, ...]


@dataclass(frozen=True)
class _Case:
    """The effects of one concept, as lines: (axis, first layer or None) → line."""

    lines: Mapping[tuple[str, int | None], Line]
    width: int
    min_share: float
    score: str
    kind: str
    partial: str  # what the search says of itself if it does not look at everything; else empty

    def on(self, axis: str) -> dict[int, Line]:
        """First layer → line of an axis."""
        return {
            start: line
            for (name, start), line in self.lines.items()
            if name == axis and start is not None
        }

    def control(self, axis: str) -> Line | None:
        """The line of a control."""
        return self.lines.get((axis, None))


def judge(effects: pd.DataFrame, min_share: float) -> Verdict:
    """The verdict on one concept; see `effects.carrier`."""
    case = _case(effects, min_share)
    evidence = _evidence(case)
    decision = _decide(case, evidence)
    return Verdict(
        start=decision.places[0].start if decision.kind == "one place" else None,
        width=case.width,
        reason=decision.reason,
        kind=decision.kind,
        places=decision.places,
        evidence=_as_table(evidence),
    )


def _case(effects: Any, min_share: float) -> _Case:
    first = effects.iloc[0]
    lines: dict[tuple[str, int | None], Line] = {}
    for line in effects.to_dict("records"):
        if line["axis"] == "timesteps" or line.get("n") == 0:  # windows without a picture
            continue
        place: Any = line.get("position")
        lines[line["axis"], None if _missing(place) else int(place)] = line
    return _Case(
        lines=lines,
        width=int(first["width"]),
        min_share=min_share,
        score=str(first.get("score", "clip_score")),
        kind=str(first.get("kind", "")),
        partial=_partial(effects),
    )


def _partial(effects: Any) -> str:
    if "verdict" not in effects:
        return ""
    counts = effects.loc[effects["axis"] == "layer", "n"]
    # Every window on every pair: nothing is partial about it.
    if counts.min() == counts.max():
        return ""
    return _PARTIAL["attribute" if "search" in effects else "race"]


# --- evidence ------------------------------------------------------------------------------------


def _evidence(case: _Case) -> list[Line]:
    """Each question at each place, with its answer: True, False, or None where it is open."""
    other = _another_picture(case)
    return [
        *_of_the_ceiling(case),
        *_of_necessity(case, other),
        *_of_sufficiency(case),
        *_of_content(case),
        *_of_another_picture(case, other),
    ]


def _of_the_ceiling(case: _Case) -> Iterator[Line]:
    ceiling = case.control("ceiling")
    if ceiling is not None:
        # None where nothing can be said (one seed), as in the intervals.
        low = _number(ceiling, "low")
        passes = None if math.isnan(low) else low > 0
        yield _row(CEILING, None, case.width, ceiling, passes)


def _of_necessity(case: _Case, other: Collection[int]) -> Iterator[Line]:
    for start, line in case.on(AXES[NECESSITY]).items():
        passes = _reaches(line, case.min_share)
        # Where another picture came, the concept's loss says nothing of where it is.
        if passes and start in other:
            passes = None
        yield _row(NECESSITY, start, case.width, line, passes)


def _of_sufficiency(case: _Case) -> Iterator[Line]:
    for start, line in case.on(AXES[SUFFICIENCY]).items():
        yield _row(SUFFICIENCY, start, case.width, line, _reaches(line, case.min_share))


def _of_content(case: _Case) -> Iterator[Line]:
    for start, line in case.on("content").items():
        row = _row(CONTENT, start, case.width, line, not _loses_content(line))
        for end in ("", "_low", "_high"):
            row[f"share{end}"] = _number(line, f"beyond{end}")
        yield row


def _of_another_picture(case: _Case, other: Collection[int]) -> Iterator[Line]:
    for start, line in case.on("layer").items():
        if not math.isnan(_number(line, "share")):
            yield _row(ANOTHER, start, case.width, line, start in other)


def _reaches(line: Line, min_share: float) -> bool | None:
    """Whether a window has enough of the ceiling's effect; None: it may have."""
    share = _number(line, "share")
    low = _number(line, "share_low")
    high = _number(line, "share_high")
    is_effect = _number(line, "p_any") <= stats.ALPHA
    if is_effect and share >= min_share and low >= min_share - SLACK:
        return True
    # Comparisons with NaN are false: what was not measured is not open either.
    is_open = share >= min_share - OPEN and not high < min_share
    return None if is_open else False


def _another_picture(case: _Case) -> set[int]:
    """Windows under which not the target's picture came, but another one."""
    other = set()
    for start, line in case.on("layer").items():
        if _number(line, "share_low") > 1 + BEYOND_CEILING:
            other.add(start)
    for start, line in case.on("content").items():
        if _loses_content(line):
            other.add(start)
    return other


def _loses_content(line: Line) -> bool:
    return _number(line, "beyond_low") > BEYOND_CONTENT


def _row(question: str, start: int | None, width: int, line: Line, passes: bool | None) -> Line:
    row = {"question": question, "start": start, "width": width}
    row["place"] = "" if start is None else str(Window(start, width))
    row |= {name: _number(line, name) for name in NUMBERS}
    row["p"] = _number(line, "p_any")
    row["passes"] = passes
    row["seeds"] = _number(line, "seeds")
    return row


def _as_table(rows: Sequence[Line]) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame(rows, columns=[*COLUMNS, "seeds"])
    return table.astype({"start": "Int64", "seeds": "Float64", "passes": "boolean"})


# --- the decision --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decision:
    kind: VerdictKind
    places: tuple[Window, ...]
    reason: str


def _decide(case: _Case, evidence: Sequence[Line]) -> _Decision:
    ceiling = case.control("ceiling")
    if ceiling is None:
        return _without_ceiling(case)
    objection = _objection(case, ceiling)
    if objection is not None:
        return objection
    necessary = _answers(evidence, NECESSITY)
    sufficient = _answers(evidence, SUFFICIENCY)
    places = separate(necessary.passes, case.width, _weights(case))
    open_elsewhere = _away(necessary.open, places, case.width)
    strange = [start for start in open_elsewhere if start in _answers(evidence, ANOTHER).passes]
    if strange:
        return _another(case, places, strange)
    if open_elsewhere:
        return _open(case, NECESSITY, places, open_elsewhere)
    if not places:
        return _none_necessary(case, sufficient)
    if len(places) == 1:
        return _one_place(case, places[0], necessary, sufficient)
    return _several(case, "each necessary", places)


def _weights(case: _Case) -> dict[int, float]:
    """What decides between overlapping windows, by first layer."""
    # Windows that share the layer that is needed take away alike; the one that also holds the rest
    # of the place brings more back alone.
    inserts = case.on("insert")
    weights = {}
    for start, line in case.on("layer").items():
        weights[start] = _number(line, "estimate")
        if start in inserts:
            weights[start] += _number(inserts[start], "estimate")
    return weights


def _estimates(case: _Case, axis: str) -> dict[int, float]:
    """Effects of an axis, by first layer."""
    return {start: _number(line, "estimate") for start, line in case.on(axis).items()}


def _answers(evidence: Sequence[Line], question: str) -> Answers:
    passing = []
    left_open = []
    for row in evidence:
        if row["question"] != question:
            continue
        if row["passes"]:
            passing.append(row["start"])
        if row["passes"] is None:
            left_open.append(row["start"])
    return Answers(tuple(passing), tuple(left_open))


def _objection(case: _Case, ceiling: Line) -> _Decision | None:
    """Why no place can be looked for: nothing, little, or nothing certain changes at all layers."""
    low = _number(ceiling, "low")
    high = _number(ceiling, "high")
    if math.isnan(low):
        return _Decision(
            "inconclusive", (), "one seed and few prompts cannot tell: use more of either"
        )
    if _is_small(case, ceiling):
        return _Decision("nobody", (), _hardly(case, ceiling))
    if high < 0:
        return _Decision("inconclusive", (), _wrong_way(case, ceiling, "in all layers"))
    if low <= 0:
        return _Decision(
            "inconclusive",
            (),
            f"it is not clear that the target changes the {_name(case.score)}, even in all layers: "
            f"{_interval(ceiling)}; {_more([ceiling])}, or choose another target",
        )
    if case.score == "probability":
        return _of_the_scorer(case, ceiling)
    return None


def _of_the_scorer(case: _Case, ceiling: Line) -> _Decision | None:
    """Whether a probability changes so little that its scorer may not know the concept."""
    baseline = _number(ceiling, "baseline")
    needed = TELLS_APART * possible_change(baseline, case.kind)
    # A comparison with NaN is false: without a baseline nothing is known of what can change.
    if not _number(ceiling, "estimate") < needed:
        return None
    verb = "adds" if case.kind == "fact" else "takes away"
    amounts = (
        f"its probability is {number(baseline)}, and the target in all layers {verb} "
        f"{_interval(ceiling)}"
    )
    if _number(ceiling, "high") < needed:
        reason = f"the scorer hardly tells the concept from its neighbors: {amounts}"
    else:
        reason = (
            f"it is not clear whether the scorer tells the concept from its neighbors: {amounts}, "
            f"which may be less than {number(needed)}, half of what is possible; {_more([ceiling])}"
        )
    return _Decision("inconclusive", (), reason)


def possible_change(baseline: float, kind: str) -> float:
    """How much a concept's probability can change: what it has, or for a fact what it lacks."""
    return 1 - baseline if kind == "fact" else baseline


def _is_small(case: _Case, ceiling: Line) -> bool:
    """Whether all layers together hardly change the score, whichever way."""
    low = _number(ceiling, "low")
    high = _number(ceiling, "high")
    small = SMALL_CEILING.get(case.score, 0.0)
    if not (-small < low and high < small):
        return False
    if case.score == "probability" or low <= 0 <= high:  # a probability's scale is known
        return True
    # A comparison with NaN is false: without a baseline nothing is known of the scale.
    share = abs(_number(ceiling, "estimate")) / max(abs(_number(ceiling, "baseline")), 1e-12)
    return not share >= NOT_SMALL


def _hardly(case: _Case, ceiling: Line) -> str:
    """What a small ceiling says; one that is clear may be small because of the score's zero."""
    score = _name(case.score)
    text = f"the target hardly changes the {score}, even in all layers: "
    if case.score == "probability" or _number(ceiling, "low") <= 0 <= _number(ceiling, "high"):
        return f"{text}{_interval(ceiling)}"
    return (
        f"{text}{_interval(ceiling)}, clearly, but by less than {SMALL_CEILING[case.score]} and a "
        f"tenth of the {score}; if your scorer's zero means nothing, take a constant from all its "
        "scores"
    )


def _wrong_way(case: _Case, line: Line, where: str) -> str:
    """What to do about a target that changes the score clearly, in the other direction."""
    amount = interval_text(*(-_number(line, name) for name in ("estimate", "high", "low")))
    moves, hoped = ("lowers", "rises") if case.kind == "fact" else ("raises", "falls")
    score = _name(case.score)
    return (
        f"the target {moves} the {score} {where}, by {amount}: swap prompt "
        f"and target, or choose a text whose {score} {hoped}"
    )


def _without_ceiling(case: _Case) -> _Decision:
    """A sweep without controls shows which window moves the score most, and no more."""
    layers = case.on("layer")
    # What has few of the pictures is not the best for their sake.
    pictures = {start: _number(line, "n") for start, line in layers.items()}
    complete = [s for s in layers if not pictures[s] < max(pictures.values())]
    best = max(complete, key=lambda start: _number(layers[start], "choose"))
    line = layers[best]
    is_ahead = _number(line, "p_lead") <= stats.ALPHA
    if is_ahead and _number(line, "fresh") > 0 and not _number(line, "p_any") > stats.ALPHA:
        place = Window(best, case.width)
        reason = "ahead of every other place; without controls nothing else is known"
        return _Decision("one place", (place,), reason)
    return _Decision("inconclusive", (), _no_place(case, best, is_ahead=is_ahead))


def _no_place(case: _Case, best: int, *, is_ahead: bool) -> str:
    """Why a sweep without controls names no place, although one window has the largest effect."""
    line = case.on("layer")[best]
    place = Window(best, case.width)
    if _number(line, "high") < 0:
        return _wrong_way(case, line, f"even in the window with the largest mean, {place}")
    if is_ahead:
        text = (
            f"{place} {_is([place])} ahead of every other place, but it is not clear that the "
            f"target changes the {_name(case.score)} there: {_interval(line)}"
        )
    else:
        text = (
            f"no window is ahead of every other place; the largest mean, {_interval(line)}, is "
            f"that of {place}"
        )
    return f"{text}. Controls would say more: controls=True"


def _open(case: _Case, question: str, places: Sequence[Window], starts: Sequence[int]) -> _Decision:
    """More pictures are needed: whether further places pass is not decided."""
    lines = case.on(AXES[question])
    left = separate(starts, case.width, _estimates(case, AXES[question]))
    words = {NECESSITY: "necessary", SUFFICIENCY: "sufficient"}
    beginning = f"{listed(places)} {_is(places)} {words[question]}; " if places else ""
    shares = ", ".join(_amount(lines[int(place.start or 0)]) for place in left)
    return _Decision(
        "inconclusive",
        (*places, *left),
        f"{beginning}whether {listed(left)} {_is(left)} {words[question]} is open "
        f"({shares} of the ceiling's effect); {_more([lines[start] for start in starts])}",
    )


def _one_place(case: _Case, place: Window, necessary: Answers, sufficient: Answers) -> _Decision:
    start = int(place.start or 0)
    line = case.on("layer")[start]
    parts = [
        f"the picture needs it ({_share(line)})",
        *_whether_it_suffices(case, start),
        *_whether_it_leads(case, line),
        *_what_would_do_as_well(case, place, necessary),
        *_what_would_suffice_too(case, place, sufficient),
    ]
    return _Decision("one place", (place,), _said(case, parts))


def _whether_it_suffices(case: _Case, start: int) -> Iterator[str]:
    insert = case.on("insert").get(start)
    if insert is not None:
        verb = {True: "it suffices", False: "it does not suffice", None: "it may suffice"}
        answer = verb[_reaches(insert, case.min_share)]
        yield f"{answer} ({_share(insert)} comes back)"


def _whether_it_leads(case: _Case, line: Line) -> Iterator[str]:
    if _number(line, "p_lead") <= stats.ALPHA:
        rivals = "its best rival" if case.partial else "every other place"
        yield f"ahead of {rivals}"
    if case.partial:
        yield f"{case.partial}: a third place that is needed too would not be seen"


def _what_would_do_as_well(case: _Case, place: Window, necessary: Answers) -> Iterator[str]:
    """Necessary windows that overlap the place, and the layers that all of them have."""
    near = [Window(start, case.width) for start in necessary.passes if start != place.start]
    if near:
        common = set(place).intersection(*near)
        shared = f", all with layer {_numbered(common)}" if common else ""
        verb = "overlaps" if len(near) == 1 else "overlap"
        windows = ", ".join(window.label for window in near)
        yield f"{windows} {verb} it and would do as well{shared}"


def _what_would_suffice_too(case: _Case, place: Window, sufficient: Answers) -> Iterator[str]:
    away = _away(sufficient.passes, [place], case.width)
    if away:
        others = separate(away, case.width, _estimates(case, "insert"))
        yield f"{listed(others)} would suffice too"


def _several(case: _Case, kind: VerdictKind, places: Sequence[Window]) -> _Decision:
    axis = "layer" if kind == "each necessary" else "insert"
    lines = case.on(axis)
    shares = ", ".join(_amount(lines[int(place.start or 0)]) for place in places)
    word = "necessary" if kind == "each necessary" else "sufficient"
    if len(places) > MOST_PLACES:
        parts = [f"{len(places)} places are each {word} ({shares} of the ceiling's effect)"]
        return _Decision("spread", tuple(places), _said(case, parts))
    parts = [f"{shares} of the ceiling's effect"]
    if case.partial:
        parts.append(f"{case.partial}: there may be more places")
    return _Decision(kind, tuple(places), _said(case, parts))


def _another(case: _Case, places: Sequence[Window], starts: Sequence[int]) -> _Decision:
    """Under some windows the concept went because the whole picture did."""
    strange = separate(starts, case.width, _estimates(case, "layer"))
    beginning = f"{listed(places)} {_is(places)} necessary; " if places else ""
    amounts = "; ".join(_strange(case, place) for place in strange)
    return _Decision(
        "inconclusive",
        tuple(places),
        f"{beginning}under {listed(strange)} another picture came, not the target's ({amounts}): "
        "whether the concept is there is open; try a target that is nearer to the prompt, or a "
        "concept that names neighbors",
    )


def _none_necessary(case: _Case, sufficient: Answers) -> _Decision:
    if case.partial:
        return _Decision(
            "inconclusive",
            (),
            f"{_short(case)}; {case.partial}: search='all' would tell "
            "whether it is spread or one of several places suffices",
        )
    places = separate(sufficient.passes, case.width, _estimates(case, "insert"))
    open_elsewhere = _away(sufficient.open, places, case.width)
    if open_elsewhere:
        return _open(case, SUFFICIENCY, places, open_elsewhere)
    if len(places) > 1:
        return _several(case, "each sufficient", places)
    return _spread(case, places)


def _spread(case: _Case, sufficient: Sequence[Window]) -> _Decision:
    """No place alone decides: it is in all that have an effect."""
    layers = case.on("layer")
    have = {s: _number(line, "estimate") for s, line in layers.items() if _has_effect(line)}
    places = separate(tuple(have), case.width, have)
    parts = [_short(case)]
    if sufficient:
        line = case.on("insert")[int(sufficient[0].start or 0)]
        parts.append(f"{sufficient[0]} alone would suffice ({_share(line)} comes back)")
    if len(places) > 1:
        parts.append(_elsewhere(places, case.width))
    return _Decision("spread", spans(tuple(have), case.width), _said(case, parts))


def _has_effect(line: Line) -> bool:
    return _number(line, "p_any") <= stats.ALPHA


# --- places --------------------------------------------------------------------------------------


def separate(starts: Sequence[int], width: int, weights: Mapping[int, float]) -> tuple[Window, ...]:
    """The fewest windows, none overlapping another, that every window at `starts` overlaps.

    Of several ways, the one with the largest weights. So windows around one place (12-13 and 13-14
    both hold layer 13) are one place.

    >>> separate((11, 12, 13), 2, {11: 0.5, 12: 0.4, 13: 0.6})
    (Window(start=12, width=2, reason=''),)
    >>> separate((0, 12, 13), 2, {0: 0.5, 12: 0.4, 13: 0.6})
    (Window(start=0, width=2, reason=''), Window(start=13, width=2, reason=''))
    """
    ordered = sorted(starts)
    # A way is a choice of places that leaves nothing out from its first place on.
    ways: dict[int, _Way] = {}
    for here in reversed(ordered):
        goes_on = [ways[then] for then in ordered if _may_follow(here, then, ordered, width)]
        # The way may also end here, if all that follows overlaps this place.
        if ordered[-1] - here < width:
            goes_on.append((0, 0.0, ()))
        count, weight, places = min(goes_on)
        ways[here] = (count + 1, weight - weights[here], (here, *places))
    begins = [ways[start] for start in ordered if start - ordered[0] < width]
    if not begins:
        return ()
    _, _, best = min(begins)
    return tuple(Window(start, width) for start in best)


def _may_follow(here: int, then: int, starts: Sequence[int], width: int) -> bool:
    """Whether two windows are apart, and overlap together all that start between them."""
    if then - here < width:
        return False
    between = range(here + width, then - width + 1)  # what starts here overlaps neither
    return not any(start in between for start in starts)


def spans(starts: Sequence[int], width: int) -> tuple[Window, ...]:
    """The layers of all windows at `starts`, as few windows of any width.

    >>> spans((8, 9, 10, 14), 2)
    (Window(start=8, width=4, reason=''), Window(start=14, width=2, reason=''))
    """
    layers = sorted({layer for start in starts for layer in Window(start, width)})
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return tuple(Window(run[0], len(run)) for run in runs)


def _away(starts: Sequence[int], places: Sequence[Window], width: int) -> list[int]:
    """Windows that overlap none of the places."""
    return [start for start in starts if not _overlaps(start, places, width)]


def _overlaps(start: int, places: Sequence[Window], width: int) -> bool:
    return any(abs(start - int(place.start or 0)) < width for place in places)


# --- words ---------------------------------------------------------------------------------------


def _said(case: _Case, parts: Sequence[str]) -> str:
    """The parts of a reason, and for whom it holds."""
    text = "; ".join(parts)
    prompts = {line.get("prompts") for line in case.on("layer").values()}
    return f"{text}; for these prompts" if "fixed" in prompts else text


def _short(case: _Case) -> str:
    """How far the window with the largest mean is from being enough."""
    layers = case.on("layer")
    best = max(layers, key=lambda start: _number(layers[start], "estimate"))
    line = layers[best]
    if not _has_effect(line):
        moves = "raises" if case.kind == "fact" else "lowers"
        return f"no window clearly {moves} the {_name(case.score)} more than the placebo does"
    return f"the window with the largest mean, {Window(best, case.width)}, has {_share(line)}"


def _elsewhere(places: Sequence[Window], width: int) -> str:
    """Where to look instead: a wider window if places touch, two places if they do not."""
    low = int(places[0].start or 0)
    high = int(places[-1].start or 0)
    if high - low <= width + 1:
        return f"try a wider window, {Window(low, high - low + width).label}"
    return f"try these places together: {listed(places)}"


def _strange(case: _Case, place: Window) -> str:
    start = int(place.start or 0)
    content = case.on("content").get(start)
    share = f"{percent(_number(case.on('layer')[start], 'share'))} of the ceiling's effect"
    if content is None or math.isnan(_number(content, "beyond")):
        return share
    return (
        f"{share}, and {percent(_number(content, 'beyond'))} of what should stay is lost beyond it"
    )


def _more(lines: Sequence[Line]) -> str:
    """How many more pictures would tell."""
    numbers = [_number(line, "seeds") for line in lines]
    finite = [count for count in numbers if not math.isnan(count)]
    if not finite:
        return "more seeds or prompts would tell"
    return f"about {max(finite):.0f} seeds would tell"


def _numbered(layers: Iterable[int]) -> str:
    return ", ".join(str(layer) for layer in sorted(layers))


def _is(places: Sequence[Window]) -> str:
    """The verb after "layers 0-1" and "layer 5"."""
    return "is" if len(places) == 1 and places[0].width == 1 else "are"


def _share(line: Line) -> str:
    return f"{_amount(line)} of the ceiling's effect"


def _amount(line: Line) -> str:
    """A share with its interval."""
    share = percent(_number(line, "share"))
    low = _number(line, "share_low")
    if math.isnan(low):
        return share
    return f"{share} [{percent(low)}, {percent(_number(line, 'share_high'))}]"


def _interval(line: Line) -> str:
    return interval_text(*(_number(line, name) for name in ("estimate", "low", "high")))


def _name(score: str) -> str:
    return {"clip_score": "score"}.get(score, score)


def _number(line: Line, name: str) -> float:
    value: Any = line.get(name)
    return math.nan if _missing(value) else float(value)


def _missing(value: Any) -> bool:
    import pandas as pd

    return value is None or bool(pd.isna(value))
