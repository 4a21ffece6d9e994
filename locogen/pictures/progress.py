"""Progress of a run: its kernel writes a small file, which the process that plans the study reads.

Outside of a study nothing is written.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from locogen.files import CannotWrite, load_json, write_json

ASKED = "LOCOGEN_PROGRESS"  # the environment variable that names the file


class Heartbeat:
    """Counts the pictures of this process over several calls of `generate`."""

    def __init__(self) -> None:
        self.made = 0
        self.asked = 0

    def ask(self, pictures: int) -> None:
        """Note that this many more are to be made."""
        # What an interrupted call asked for and did not make is not waited for.
        self.asked = self.made + pictures
        self._write()

    def add(self, pictures: int) -> None:
        """Note that this many more are made."""
        self.made += pictures
        self._write()

    def _write(self) -> None:
        place = os.environ.get(ASKED)
        if not place:
            return
        # The folder is gone, or the disk full: that should not stop the run.
        with contextlib.suppress(OSError, CannotWrite):
            write_json(Path(place), {"made": self.made, "asked": self.asked})


def read_progress(folder: Path) -> tuple[int, int]:
    """Pictures made and asked for so far by the run that works in the folder."""
    counts = load_json(folder / "progress.json")
    return int(counts.get("made", 0)), int(counts.get("asked", 0))


beat = Heartbeat()
