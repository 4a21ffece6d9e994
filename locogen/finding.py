"""What a notebook reports of its run: it writes a `Finding`, a study publishes it, pages read it.

Standard library only. Results come from anywhere and any time: another version, another machine, an
editor. So what is read is checked value by value, here, and whoever uses a finding may rely on its
types.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locogen.files import load_json, write_json
from locogen.plan import VERDICT_KINDS, Verdict, Window

# In the folder of a run, until the study publishes it as part of `result.json`.
FILE = "finding.json"

LARGEST_NUMBER = 2**64  # the largest seed
DEEPEST = 20  # tables within tables


@dataclass(frozen=True)
class Finding:
    """What one run has found, and from what: the part of a result that its notebook knows.

    What is left out means: the notebook does not say. A study then fills in model, concepts and
    kind from the run's parameters.

    Attributes:
        model: The model's name, as in `model_table`, a folder or a hub id.
        concepts: The names of the concepts that were looked at.
        kind: Of these concepts: "style", "object" or "fact"; "" where there are several kinds.
        finding: The result in a sentence or two, for pages and for the index.
        carriers: Concept → the window that carries it; `Window(None, width, reason)` if none does.
        settings: What the result depends on besides: seeds, steps, guidance. Plain values.
        pictures: The number of pictures that the result rests on.
        published: The first layer of the published window, where the model's authors name one.
        more: Whatever else a notebook of your own writes, by its key. Values that are not of the
            type above are here too: they are passed on, and the run's page says what is wrong.

    Example:
        >>> found = Finding("mini", ["neon"], "style", "neon: layers 12-13",
        ...                 carriers={"neon": Window(12, 2)}, pictures=384)
        >>> found.facts()["carriers"]
        [{'concept': 'neon', 'start': 12, 'width': 2, 'reason': ''}]
        >>> Finding.from_facts(found.facts()) == found
        True
    """

    model: str = ""
    concepts: Sequence[str] = ()
    kind: str = ""
    finding: str = ""
    carriers: Mapping[str, Window] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    pictures: int = 0
    published: int | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A list may be given, and read: two findings are equal whichever it was.
        object.__setattr__(self, "concepts", tuple(self.concepts))

    def facts(self) -> dict[str, Any]:
        """The finding as plain values: the content of its file, and of `result.json`."""
        facts: dict[str, Any] = {
            "model": self.model,
            "concepts": list(self.concepts),
            "kind": self.kind,
            "finding": self.finding,
            "carriers": [_row(concept, window) for concept, window in self.carriers.items()],
            "settings": dict(self.settings),
            "pictures": self.pictures,
        }
        if self.published is not None:
            facts["published"] = self.published
        return facts | dict(self.more)

    def write(self, folder: Path | str) -> None:
        """Write `finding.json` into a run's folder; values that are not plain become text."""
        write_json(Path(folder) / FILE, self.facts())

    @classmethod
    def read(cls, folder: Path | str) -> Finding:
        """Read `finding.json`, each value checked; an empty finding where there is no such file."""
        return cls.from_facts(load_json(Path(folder) / FILE))

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Finding:
        """The finding among the facts of a file, each value checked; bad ones raise nothing."""
        # What a notebook wrote by mistake stays in `more`: the page of the run has to say so.
        fields: dict[str, Any] = {}
        more: dict[str, Any] = {}
        for name, value in facts.items():
            if value is None:
                continue
            if name in EXPECTED and EXPECTED[name][0](value):
                fields[name] = value
            else:
                more[name] = value
        if "carriers" in fields:
            fields["carriers"] = {row["concept"]: _window(row) for row in fields["carriers"]}
        return cls(**fields, more=more)


def _row(concept: str, window: Window) -> dict[str, Any]:
    """A carrier as plain values; of a `Verdict` also its kind and the places that it names."""
    row: dict[str, Any] = {"concept": concept, "start": window.start, "width": window.width}
    row["reason"] = window.reason
    if isinstance(window, Verdict):
        row["kind"] = window.kind
        row["places"] = [{"start": place.start, "width": place.width} for place in window.places]
    return row


def _window(row: Mapping[str, Any]) -> Window:
    start = row.get("start")
    width = row.get("width", 1)
    reason = str(row.get("reason") or "")
    kind = row.get("kind")
    # Findings of older versions have no kind.
    if kind is None:
        return Window(start, width, reason)
    places = tuple(Window(place["start"], place["width"]) for place in row.get("places", ()))
    return Verdict(start, width, reason, kind=kind, places=places)


# --- what the values should be -------------------------------------------------------------------


def is_text(value: Any) -> bool:
    """Whether it is text that a page can hold: JSON can have halves of characters."""
    if not isinstance(value, str):
        return False
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_number(value: Any) -> bool:
    """Whether it is a finite number that can be computed with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST_NUMBER and math.isfinite(value)


def is_amount(value: Any) -> bool:
    """Whether it is a number from 0 up."""
    return is_number(value) and value >= 0


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0 up."""
    return isinstance(value, int) and is_amount(value)


def is_plain(value: Any, depth: int = 0) -> bool:
    """Whether it is a text, a number, true, false, null, or lists and tables of these."""
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, str):
        return is_text(value)
    if not isinstance(value, list | Mapping):
        return is_number(value)
    # Python gives up on a few hundred levels, with an error that is no `ValueError`.
    if depth >= DEEPEST:
        return False
    parts = list(value)
    if isinstance(value, Mapping):
        if not all(is_text(name) for name in value):
            return False
        parts = list(value.values())
    return all(is_plain(part, depth + 1) for part in parts)


def are_texts(value: Any) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, list) and all(is_text(inner) for inner in value)


def is_table(value: Any) -> bool:
    """Whether it maps names to plain values."""
    return isinstance(value, Mapping) and is_plain(value)


def is_window(value: Any) -> bool:
    """Whether it is a carrier: concept, start (null: no single window), width, reason."""
    if not isinstance(value, Mapping) or not is_text(value.get("concept")):
        return False
    start = value.get("start")
    width = value.get("width", 1)
    if not (start is None or is_count(start)):
        return False
    if not (is_count(width) and width > 0 and is_plain(value)):
        return False
    return value.get("kind") in (None, *VERDICT_KINDS) and _are_places(value.get("places", []))


def _are_places(value: Any) -> bool:
    """Whether it is a list of windows with a start, as a verdict names them."""
    if not isinstance(value, list) or not all(isinstance(place, Mapping) for place in value):
        return False
    return all(is_count(place.get("start")) and is_count(place.get("width")) for place in value)


def are_windows(value: Any) -> bool:
    """Whether it is a list of carriers."""
    return isinstance(value, list) and all(is_window(inner) for inner in value)


# Key of the file → its check, and what the check asks for, in words.
EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (is_text, "a text"),
    "concepts": (are_texts, "a list of texts"),
    "kind": (is_text, "a text"),
    "finding": (is_text, "a text"),
    "carriers": (are_windows, "a list of windows, each with concept, start and width"),
    "settings": (is_table, "a table of plain values"),
    "pictures": (is_count, "a whole number from 0 up"),
    "published": (is_count, "a whole number from 0 up"),
}
