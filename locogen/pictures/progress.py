"""How far a run is: its kernel tells by a small file, and whoever started the study reads it, from wherever.

Without a study nobody asks, and nothing is written.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from locogen.files import load_json, write_json

ASKED = "LOCOGEN_PROGRESS"  # the environment variable that names the file


class Heartbeat:
    """Counts the pictures of this process over several calls of `generate`."""

    def __init__(self) -> None:
        self.made = self.asked = 0

    def ask(self, pictures: int) -> None:
        """So many more are to be made."""
        self.asked = self.made + pictures
        self._tell()

    def add(self, pictures: int) -> None:
        """So many more are made."""
        self.made += pictures
        self._tell()

    def _tell(self) -> None:
        if place := os.environ.get(ASKED):
            with contextlib.suppress(
                OSError
            ):  # the folder is gone, or the disk full: no reason to stop
                write_json(Path(place), {"made": self.made, "asked": self.asked})


def read_progress(folder: Path) -> tuple[int, int]:
    """Pictures made so far, and to make in all, by the run that works in the folder."""
    counts = load_json(folder / "progress.json")
    return int(counts.get("made", 0)), int(counts.get("asked", 0))


beat = Heartbeat()
