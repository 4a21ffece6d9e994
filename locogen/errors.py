"""The errors that locogen raises: each names the thing, the place and the remedy."""

from __future__ import annotations

import difflib
import linecache
import traceback
from collections.abc import Iterable


class LocogenError(Exception):
    """Something that the caller can mend; the message says what, where and how."""

    def _render_traceback_(self) -> list[str]:
        """What IPython and Jupyter show: the message and the line that was typed; all of it on `%tb Verbose`."""
        from IPython.core.getipython import get_ipython

        shell = get_ipython()
        if shell is not None and shell.InteractiveTB.mode == "Verbose":
            return shell.InteractiveTB.structured_traceback(type(self), self, self.__traceback__)
        frames = [
            at
            for at in traceback.walk_tb(self.__traceback__)
            if at[0].f_globals.get("__name__") == "__main__"
        ]
        at = [
            f"in line {line} of the cell: {linecache.getline(f.f_code.co_filename, line).strip()}"
            for f, line in frames[-1:]
        ]
        return [f"{type(self).__name__}: {self}", "", *at, "(the whole traceback: %tb Verbose)"]


class UnsupportedModel(LocogenError):
    """The model is of a family that locogen does not know (yet)."""


def unknown(thing: str, name: str, known: Iterable[str]) -> LocogenError:
    """An error for a name that is not there, with the nearest ones that are."""
    choices = sorted(known)
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"there are: {', '.join(choices)}"
    )
    return LocogenError(f"no {thing} {name!r}: {hint}")
