"""What is printed reaches a console whatever its encoding."""

from __future__ import annotations

import io
import sys

_SHOWS_ANYTHING = ("backslashreplace", "replace", "ignore", "namereplace", "xmlcharrefreplace")


def show_any_text() -> None:
    """Have standard output and error write the codes of the characters that they lack.

    A console of an old code page, or `PYTHONIOENCODING=ascii`, otherwise ends a study at the first name with an
    accent. How such characters are shown stays as it is where somebody has chosen it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors not in _SHOWS_ANYTHING:
            stream.reconfigure(errors="backslashreplace")
