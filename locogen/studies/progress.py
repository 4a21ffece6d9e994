"""How a study goes on, for a person: live on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locogen.pictures.progress import heard
from locogen.studies.estimates import Costs, duration
from locogen.studies.planning import Planned
from locogen.studies.records import read_record
from locogen.studies.worker import Outcome

QUIET = 60.0  # seconds after which a log gets a line about what is at work


@dataclass(frozen=True)
class Pace:
    """How far a run at work is: seconds since it was first seen, pictures made and asked for so far."""

    seconds: float
    made: int
    asked: int

    @property
    def left(self) -> float | None:
        """Seconds until the pictures asked for are made; None before the first."""
        return self.seconds * (self.asked - self.made) / self.made if self.made else None

    def __str__(self) -> str:
        if not self.made:
            return f"{duration(self.seconds)}, no picture yet"
        told = f"{self.made}/{self.asked} pictures, {self.made / max(self.seconds, 0.1):.1f}/s"
        return f"{told}, {duration(self.left)} left" if self.left else told


class Board:
    """The lines about a study: one a run when it is over, and what is at work in between.

    On a terminal, the runs at work stand below and move (rich); elsewhere nothing is ever written over.
    """

    def __init__(self, results: Path, todo: Sequence[Planned], workers: int, costs: Costs) -> None:
        self.results, self.workers, self.costs = results, max(workers, 1), costs
        self.left = {run.slug: run for run in todo}
        self.total = len(todo)
        self.seen: dict[str, float] = {}  # folder of a run at work → when it was first seen
        self.last: dict[str, tuple[int, int]] = {}  # slug → pictures made and asked for
        self.told = time.monotonic()
        self.end = self._end()
        self.live = self._display() if sys.stdout.isatty() else None

    def _display(self) -> Any:
        from rich.live import Live

        return Live(get_renderable=self._table, refresh_per_second=4, transient=True)

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *about: object) -> None:
        if self.live:
            self.live.stop()

    def at_work(self) -> dict[str, Pace]:
        """Slug → how far it is, of the runs that have a folder to work in."""
        now, found = time.monotonic(), {}
        for folder in sorted(self.results.glob(".partial-*")):
            slug = folder.name.removeprefix(".partial-").rpartition("-")[0]
            if slug in self.left:
                since = self.seen.setdefault(folder.name, now)
                # A run that is being published has put its file away: what was heard last holds.
                self.last[slug] = max(self.last.get(slug, (0, 0)), heard(folder))
                found[slug] = Pace(now - since, *self.last[slug])
        return found

    def over(self, run: Planned, outcome: Outcome) -> None:
        """A run has come to its end: its line."""
        self.left.pop(run.slug, None)
        if not outcome.error:
            self.costs.add(read_record(run.folder / "result.json").facts)
        self.end = self._end()
        state = "failed" if outcome.error else "done"
        rate = (
            f" · {outcome.made} pictures, {outcome.made / outcome.seconds:.1f}/s"
            if outcome.made
            else ""
        )
        told = f"[{self.total - len(self.left)}/{self.total}] {run.slug}  {state} in {duration(outcome.seconds)}{rate}"
        self.say(f"{told} · {outcome.error or outcome.said}{self._remaining()}")

    def look(self) -> None:
        """Called again and again: in a log, a line about the runs at work once nothing was said for a while."""
        if self.live is None and time.monotonic() - self.told > QUIET:
            each = "; ".join(f"{slug} {pace}" for slug, pace in self.at_work().items())
            self.say(f"at work: {each or 'nothing yet'}{self._remaining()}")

    def say(self, line: str) -> None:
        """One line, above what moves."""
        self.told = time.monotonic()
        if self.live:
            self.live.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def _end(self) -> float | None:
        """When the study will be over, by the runs so far; None while there is nothing to tell it by."""
        left = self.costs.left(self.left.values(), self.workers)
        if left is None:
            return None
        spent = sum(pace.seconds for pace in self.at_work().values())
        return time.monotonic() + left - spent / self.workers

    def _remaining(self) -> str:
        seconds = (self.end or 0.0) - time.monotonic()
        return f" · about {duration(seconds)} left" if self.left and seconds > 1 else ""

    def _table(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        for slug, pace in self.at_work().items():
            bar = ProgressBar(pace.asked or None, pace.made, width=24, pulse=not pace.asked)
            table.add_row(
                Text(slug, overflow="ellipsis", no_wrap=True), bar, Text(str(pace), no_wrap=True)
            )
        done = self.total - len(self.left)
        told = Text(f"{done}/{self.total} runs{self._remaining()}", no_wrap=True)
        table.add_row(Text("all"), ProgressBar(self.total, done, width=24), told)
        return table
