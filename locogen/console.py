"""Text reaches a console whatever its encoding."""

from __future__ import annotations

import io
import sys

# Ways of handling a character that the console's encoding lacks which never fail.
_NEVER_FAIL = ("backslashreplace", "replace", "ignore", "namereplace", "xmlcharrefreplace")


def show_any_text() -> None:
    """Let standard output and error write the codes of characters that their encoding lacks.

    On a console with an old code page, or with `PYTHONIOENCODING=ascii`, a study would otherwise
    end at the first name with an accent. A handling that somebody has chosen is left unchanged.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors not in _NEVER_FAIL:
            stream.reconfigure(errors="backslashreplace")
