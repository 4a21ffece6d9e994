"""The errors that locogen raises: each names the thing, the place and the remedy."""

from __future__ import annotations

import difflib
import linecache
import traceback
from collections.abc import Iterable


class LocogenError(Exception):
    """A mistake that the caller can mend; the message says what, where and how."""

    def _render_traceback_(self) -> list[str]:
        """What IPython and Jupyter show: the message and the line of the cell that led to it.

        `%tb Verbose` shows the whole traceback.
        """
        from IPython.core.getipython import get_ipython

        shell = get_ipython()
        if shell is not None and shell.InteractiveTB.mode == "Verbose":
            return shell.InteractiveTB.structured_traceback(type(self), self, self.__traceback__)
        report = [f"{type(self).__name__}: {self}", ""]
        place = self._line_of_the_cell()
        if place:
            report.append(place)
        return [*report, "(for the whole traceback: %tb Verbose)"]

    def _line_of_the_cell(self) -> str:
        """The innermost line that the person has written, not the package; empty if unknown."""
        place = ""
        for frame, number in traceback.walk_tb(self.__traceback__):
            if frame.f_globals.get("__name__") == "__main__":
                source = linecache.getline(frame.f_code.co_filename, number).strip()
                place = f"in line {number} of the cell: {source}"
        return place


class UnsupportedModel(LocogenError):
    """The model belongs to a family that locogen does not support (yet)."""


def name_interrupt(interrupt: KeyboardInterrupt, words: str, *, anew: bool = False) -> None:
    """Let an interrupt say what was stopped; a notebook shows these words and no traceback.

    It stays a plain KeyboardInterrupt: Python ends with 130 for that class alone, which tells a
    shell's loop to end too.

    Args:
        interrupt: As it was raised.
        words: What was stopped, and what is kept.
        anew: Whether these words replace what an inner call has said already.
    """
    if anew or not interrupt.args:
        interrupt.args = (words,)
        # IPython asks the exception for it.
        setattr(interrupt, "_render_traceback_", lambda: [words])  # noqa: B010


def unknown(thing: str, name: str, names: Iterable[str]) -> LocogenError:
    """An error for a name that does not exist, with the nearest ones that do.

    Args:
        thing: What kind of name it is: "model", "concept", "key".
        name: As it was given.
        names: Those that exist.

    Returns:
        The error, to be raised.
    """
    choices = sorted(names)
    similar = _similar(name, choices)
    # Where nothing is similar it is not a typing mistake, and the whole list helps more.
    hint = f"use one of {', '.join(choices)}"
    if similar:
        hint = f"did you mean {' or '.join(map(repr, similar))}?"
    return LocogenError(f"no {thing} {name!r}: {hint}")


def _similar(name: str, choices: Iterable[str]) -> list[str]:
    """The choices that a name is most like, whatever the case of their letters."""
    spellings: dict[str, list[str]] = {}
    for choice in choices:
        spellings.setdefault(choice.casefold(), []).append(choice)
    alike = difflib.get_close_matches(name.casefold(), spellings, n=3, cutoff=0.5)
    # Another one that is only similar is not meant where a name differs by its case alone.
    if name.casefold() in spellings:
        alike = [name.casefold()]
    return [choice for spelling in alike for choice in spellings[spelling]]
