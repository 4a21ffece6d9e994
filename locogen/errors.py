"""The errors that locogen raises: each names the thing, the place and the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LocogenError(Exception):
    """Something that the caller can mend; the message says what, where and how."""


class UnsupportedModel(LocogenError):
    """The model is of a family that locogen does not know (yet)."""


def unknown(thing: str, name: str, known: Iterable[str]) -> LocogenError:
    """An error for a name that is not there, with the nearest ones that are."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {', '.join(choices)}"
    return LocogenError(f"no {thing} {name!r}: {hint}")
