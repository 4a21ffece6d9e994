"""Progress of a run: its kernel writes a small file, which the process that plans the study reads.

Outside of a study nothing is written.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

from locogen.console import ASKED
from locogen.files import CannotWrite, load_json, write_json


class Heartbeat:
    """Counts the pictures of this process over several calls of `generate`."""

    def __init__(self) -> None:
        self.made = 0
        self.asked = 0
        self.seconds = 0.0  # spent making them: neither loading nor scoring

    def ask(self, pictures: int) -> None:
        """Note that this many more are to be made."""
        # What an interrupted call asked for and did not make is not waited for.
        self.asked = self.made + pictures
        self._write()

    def add(self, pictures: int, seconds: float = 0.0) -> None:
        """Note that this many more are made, and the time that it took."""
        self.made += pictures
        self.seconds += seconds
        self._write()

    def _write(self) -> None:
        place = os.environ.get(ASKED)
        if not place:
            return
        # The folder is gone, or the disk full: that should not stop the run.
        with contextlib.suppress(OSError, CannotWrite):
            counts = {"made": self.made, "asked": self.asked}
            write_json(Path(place), counts | {"seconds": round(self.seconds, 3)})


class Counts(NamedTuple):
    """How far a run is."""

    pictures: int  # made
    total: int  # asked for
    seconds: float  # spent making them


def read_progress(folder: Path) -> Counts:
    """What the run that works in the folder has made so far, and what it was asked for."""
    counts = load_json(folder / "progress.json")
    pictures, total = int(counts.get("made", 0)), int(counts.get("asked", 0))
    return Counts(pictures, total, float(counts.get("seconds", 0.0)))


beat = Heartbeat()
