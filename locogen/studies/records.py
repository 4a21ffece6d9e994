"""What a run says of itself (`result.json`, `error.json`), read without trust.

Results come from anywhere and any time: another version, another machine, an editor. So each key is
checked, once, here. What reads them afterwards may rely on the types below, and shows `damage`
where there is some.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from locogen.files import ENCODING
from locogen.finding import (
    EXPECTED,
    are_texts,
    is_amount,
    is_count,
    is_plain,
    is_table,
    is_text,
)

LARGEST_FILE = 20_000_000  # bytes


@dataclass(frozen=True)
class Record:
    """The keys of a file that are as they should be, and what is wrong with the others.

    Attributes:
        facts: Key → value. What was null is absent.
        damage: In words; empty where all is well.
    """

    facts: Mapping[str, Any] = field(default_factory=dict)
    damage: str = ""


def read_record(path: Path) -> Record:
    """Read one of the JSON files that a run leaves.

    Args:
        path: `result.json`, `error.json`, or a study's `study.json`.

    Returns:
        What can be relied on, and what is damaged. Never raises for what is in the file.
    """
    try:
        content = _parsed(path)
    except (OSError, ValueError, RecursionError) as error:
        return Record({}, f"{path.name} cannot be read: {_reason(error)}")
    if not isinstance(content, dict):
        return Record({}, f"{path.name} does not hold an object")
    facts: dict[str, Any] = {}
    complaints: list[str] = []
    for name, value in content.items():
        if value is None or not is_text(name):
            continue
        is_right, expected = _EXPECTED.get(name, (is_plain, "a plain value"))
        if is_right(value):
            facts[name] = value
        else:
            complaints.append(f"{name} is {_shown(value)}, not {expected}")
    return Record(facts, f"{path.name} is damaged: {'; '.join(complaints)}" if complaints else "")


def _parsed(path: Path) -> Any:
    if not path.is_file():
        raise OSError("it is not a file")  # nor wait for what a pipe has to say
    if path.stat().st_size > LARGEST_FILE:
        raise OSError(f"it is larger than {LARGEST_FILE // 1_000_000} MB")
    return json.loads(path.read_text(encoding=ENCODING), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    strerror = getattr(error, "strerror", None)  # without the path, which is this machine's
    return str(strerror or error)


def _shown(value: Any) -> str:
    """A value for a message: short, and text that can be written."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a whole number of more than 4300 digits
        text = f"a {type(value).__name__}"
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    return text if len(text) <= 60 else f"{text[:60]}…"


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **EXPECTED,  # what the notebook reports
    **dict.fromkeys(("title", "finished", "notebook", "key", "error", "base"), (is_text, "a text")),
    **dict.fromkeys(("parameters", "versions", "commits"), (is_table, "a table of plain values")),
    **dict.fromkeys(("made", "cell"), (is_count, "a whole number from 0 up")),
    "runs": (are_texts, "a list of texts"),
    "seconds": (is_amount, "a number from 0 up"),
}
