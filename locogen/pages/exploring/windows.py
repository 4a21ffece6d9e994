"""What the windows of a sweep do, one after the other: numbers and pictures of each.

The heatmap of a concept as a row of buttons, and for each window, prompt and seed the baseline, the
picture with the window replaced, and the one with nothing but the window. All of it comes from the
run's tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locogen.markup import counted, number, precision
from locogen.pages.entries import Entry
from locogen.pages.exploring.album import Album
from locogen.pages.thumbnails import Scale, cell_styles
from locogen.plan import Window
from locogen.views.sentences import few_seeds_note
from locogen.views.tables import amount, ceiling_share, missing

# Role in the pictures table → what its picture is, in the order in which they are shown.
ROLES = {
    "baseline": "baseline",
    "window": "without it here",
    "insert": "only here",
    "ceiling": "without it anywhere",
}
ROLES_OF_FACTS = ROLES | {"window": "other answer here", "ceiling": "other answer everywhere"}
NOT_SWEPT = "first_timestep"  # pictures that get the target for a while only are not of windows
_PER_WINDOW = ("window", "insert")
Pictures = Mapping[tuple[str, int | None], tuple[str, float]]  # role and start → name and score


@dataclass(frozen=True)
class WindowCell:
    """A cell of the heatmap, as the template shows it."""

    start: int
    label: str
    """`layers 12–13`."""
    words: str
    """Its effect in words, for those who do not see the color."""
    style: str
    """Color and ink, as CSS."""
    is_marked: bool
    """Whether it is the carrier, or one of several."""


@dataclass(frozen=True)
class Sample:
    """One prompt and seed, and the picture of each role and window."""

    prompt: str
    target: str
    seed: int
    pictures: Pictures

    @property
    def names(self) -> list[str]:
        """Of all its pictures."""
        return [name for name, _ in self.pictures.values()]


@dataclass(frozen=True)
class Sweep:
    """One concept's windows."""

    entry: Entry
    cells: Sequence[WindowCell]
    samples: Sequence[Sample]
    score: str
    """The name of the score that effects are measured by."""
    bounds: tuple[str, str]
    """The ends of the color scale."""

    @property
    def concept(self) -> str:
        """The concept's name, with what tells this sweep from others of it."""
        return str(self.entry.row["label"])

    @property
    def is_fact(self) -> bool:
        """Whether the target has another answer, instead of no concept."""
        return self.entry.kind == "fact"

    @property
    def first(self) -> int:
        """The window that is shown first: the carrier, or else the largest effect."""
        return int(self.entry.row["at"])


def sweep_of(entry: Entry, table: Any) -> Sweep:
    """The windows of an entry.

    Args:
        entry: An entry of a run that succeeded.
        table: The run's pictures table.

    Raises:
        KeyError: The table has no such column, or, as `ValueError` and `TypeError`, wrong values.
    """
    rows = entry.rows.to_dict("records")
    score = str(rows[0].get("score") or "")
    column = "probability" if score == "probability" else "clip_score"
    samples = list(_samples(entry, table, column))
    words = "probability" if column == "probability" else "CLIP-score"
    scale = Scale.of([entry.rows])
    digits = precision(scale.low, scale.high)
    bounds = (number(scale.low, digits), number(scale.high, digits))
    return Sweep(entry, _cells(entry, rows, scale), samples, words, bounds)


def _cells(entry: Entry, rows: Sequence[Mapping[str, Any]], scale: Scale) -> list[WindowCell]:
    styles = cell_styles([row["estimate"] for row in rows], scale)
    places = {entry.row["start"], *(place.start for place in entry.row["places"])}
    cells = []
    for row, style in zip(rows, styles, strict=True):
        start = int(row["position"])
        words = "not looked at" if missing(row["estimate"]) else f"effect {amount(row)}"
        label = _label(start, entry.row["width"])
        cells.append(WindowCell(start, label, words, style, start in places))
    return cells


def _label(start: int, width: Any) -> str:
    return str(Window(start, int(width))).replace("-", "–")


def _samples(entry: Entry, table: Any, column: str) -> Iterator[Sample]:
    """Prompts and seeds, in the order of the table."""
    rows = table[table["concept"] == entry.concept]
    # Baselines and ceilings have no width: they belong to windows of any width.
    rows = rows[rows["width"].isna() | (rows["width"] == entry.row["width"])]
    for name in (NOT_SWEPT, "edit"):
        if name in rows:
            rows = rows[rows[name].isna()]
    for (prompt, seed), part in rows.groupby(["prompt", "seed"], sort=False):
        pictures = _pictures(part, column)
        if ("baseline", None) in pictures:
            target = part["target"].iloc[0] if "target" in part else None
            yield Sample(str(prompt), "" if missing(target) else str(target), int(seed), pictures)


def _pictures(rows: Any, column: str) -> dict[tuple[str, int | None], tuple[str, float]]:
    """The pictures of one prompt and seed."""
    pictures: dict[tuple[str, int | None], tuple[str, float]] = {}
    for row in rows.to_dict("records"):
        start = None if missing(row["start"]) else int(row["start"])
        if row["role"] in ROLES and not missing(row["image"]):
            pictures[row["role"], start] = (str(row["image"]), float(row[column]))
    return pictures


def sweep_data(sweep: Sweep, album: Album, samples: Sequence[Sample]) -> dict[str, Any]:
    """What the page's script shows: plain values, numbers already in words.

    Args:
        sweep: The windows.
        album: The page's pictures.
        samples: Those of the sweep's samples that are in the album.
    """
    others = _other_rows(sweep.entry)
    windows = []
    for row, cell in zip(sweep.entry.rows.to_dict("records"), sweep.cells, strict=True):
        lines = list(_lines(sweep, row, others))
        note = _note(sweep.entry.row, cell.start)
        windows.append({"start": cell.start, "label": cell.label, "note": note, "lines": lines})
    return {
        "concept": sweep.concept,
        "windows": windows,
        "roles": list((ROLES_OF_FACTS if sweep.is_fact else ROLES).items()),
        "samples": [_sample_data(sweep, sample, album) for sample in samples],
    }


def _note(row: Mapping[str, Any], start: int) -> str:
    """What a window has to do with the carrier: neighbors that share a layer look alike."""
    if row["start"] is None:
        return ""
    if start == row["start"]:
        return "★ the carrier"
    width = int(row["width"])
    common = sorted(set(Window(start, width)) & set(Window(int(row["start"]), width)))
    if not common:
        return ""
    place = str(Window(common[0], len(common))).replace("-", "–")
    return f"(has {place} in common with the carrier)"


def _other_rows(entry: Entry) -> dict[tuple[str, int | None], Mapping[str, Any]]:
    """The rows of the other axes, by axis and window."""
    rows = {}
    for row in entry.effects.to_dict("records"):
        place = None if missing(row["position"]) else int(row["position"])
        rows[str(row["axis"]), place] = row
    return rows


def _lines(
    sweep: Sweep, row: Mapping[str, Any], others: Mapping[tuple[str, int | None], Any]
) -> Iterator[tuple[str, str]]:
    """What was measured at one window: what it is, and how much."""
    if missing(row["estimate"]):
        yield "Effect", "this window was not looked at"
        return
    score = sweep.score[:1].upper() + sweep.score[1:]
    verb = "gained by the other answer" if sweep.is_fact else "lost"
    yield f"{score} {verb} when this window gets the target", amount(row)
    if not missing(row.get("share")):
        yield "Of what all layers together do", _share(row)
    axes = {"insert": f"{score} brought back by this window alone"}
    # A fact replaces its content: nothing should stay.
    if not sweep.is_fact:
        axes["content"] = "Lost of what should stay"
    for axis, words in axes.items():
        other = others.get((axis, int(row["position"])))
        if other is not None and not missing(other["estimate"]):
            yield words, amount(other)
    if not missing(row.get("n")):
        yield "Pictures", _count(sweep, int(row["n"]))


def _share(row: Mapping[str, Any]) -> str:
    text = ceiling_share(row)
    if row["share"] > 1.005:
        text += ": with all layers another picture comes, so that it can be more than 100 %"
    return text


def _count(sweep: Sweep, n: int) -> str:
    """`n = 8: 2 prompts × 4 seeds`, and what two seeds are worth."""
    prompts = len({sample.prompt for sample in sweep.samples})
    seeds = len({sample.seed for sample in sweep.samples})
    text = f"n = {n}"
    if n == prompts * seeds:
        text += f": {counted(prompts, 'prompt')} × {counted(seeds, 'seed')}"
    return text + few_seeds_note(seeds)


def _sample_data(sweep: Sweep, sample: Sample, album: Album) -> dict[str, Any]:
    _, before = sample.pictures["baseline", None]
    pictures: dict[str, Any] = {}
    for (role, start), (name, score) in sample.pictures.items():
        place = album.place(name)
        if place is None:
            continue
        picture = [place, _score(sweep.score, score, None if role == "baseline" else before)]
        if role in _PER_WINDOW and start is not None:
            pictures.setdefault(role, {})[str(start)] = picture
        elif role not in _PER_WINDOW:
            pictures[role] = picture
    return {
        "prompt": sample.prompt,
        "target": sample.target,
        "seed": sample.seed,
        "pictures": pictures,
    }


def _score(name: str, score: float, before: float | None) -> str:
    """`probability 0.03 (−0.80)`."""
    if missing(score):
        return ""
    text = f"{name} {number(score)}"
    if before is None or missing(before):
        return text
    change = score - before
    sign = "+" if change >= 0.005 else ""
    return f"{text} ({sign}{number(change)})"
