"""How far a study is, for a person: moving bars on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from locogen.pictures.progress import Counts, read_progress
from locogen.studies.estimates import Costs, duration
from locogen.studies.planning import Planned
from locogen.studies.records import read_record
from locogen.studies.worker import Outcome

QUIET = 60.0  # seconds after which a log gets a line about the runs at work
SOON = 1.0  # seconds of work before which a run's speed says nothing


@dataclass(frozen=True)
class RunProgress:
    """How far a run at work is.

    Attributes:
        seconds: Since it was first seen.
        pictures: Made so far.
        total: Pictures to make, as far as the run knows by now; 0 before the first.
        making: Seconds in which these pictures were made: neither loading nor scoring.
    """

    seconds: float
    pictures: int
    total: int
    making: float = 0.0

    def __str__(self) -> str:
        if not self.pictures:
            return f"{duration(self.seconds)}, no picture yet"
        if self.making < SOON:
            return f"{self.pictures}/{self.total} pictures"
        speed = self.pictures / self.making
        text = f"{self.pictures}/{self.total} pictures, {speed:.1f}/s"
        missing = self.total - self.pictures
        return f"{text}, {duration(missing / speed)} left" if missing > 0 else text


class Board:
    """The lines about a study: one for each run when it is over, and the runs at work in between.

    On a terminal the runs at work are bars below these lines. In a log nothing is written over, so
    they get a line of their own, but only after a while without any.
    """

    def __init__(self, results: Path, todo: Sequence[Planned], workers: int, costs: Costs) -> None:
        self.results = results
        self.workers = max(workers, 1)
        self.costs = costs
        self.total = len(todo)
        self.left = {run.slug: run for run in todo}
        self.first_seen: dict[str, float] = {}  # folder of a run at work → when
        self.counts: dict[str, Counts] = {}  # by slug
        self.last_line = time.monotonic()
        self.end = self._estimate_end()
        self.bars = Bars(self.total) if sys.stdout.isatty() else None

    def __enter__(self) -> Board:
        if self.bars:
            self.bars.progress.start()
        return self

    def __exit__(self, *about: object) -> None:
        if self.bars:
            self.bars.progress.stop()

    def at_work(self) -> dict[str, RunProgress]:
        """Slug → how far it is, for the runs that have a folder to work in."""
        now = time.monotonic()
        running: dict[str, RunProgress] = {}
        for folder in sorted(self.results.glob(".partial-*")):
            slug = folder.name.removeprefix(".partial-").rpartition("-")[0]
            if slug not in self.left:
                continue
            since = self.first_seen.setdefault(folder.name, now)
            # A run that is about to be published has deleted its file: what was last read holds.
            counts = max(self.counts.get(slug, Counts(0, 0, 0.0)), read_progress(folder))
            self.counts[slug] = counts
            running[slug] = RunProgress(now - since, counts.pictures, counts.total, counts.seconds)
        return running

    def finish(self, run: Planned, outcome: Outcome) -> None:
        """Print the line of a run that has come to its end."""
        self.left.pop(run.slug, None)
        if not outcome.error:
            self.costs.add(read_record(run.folder / "result.json").facts)
        self.end = self._estimate_end()

        state = "failed" if outcome.error else "done"
        line = f"[{self.total - len(self.left)}/{self.total}] {run.slug}  "
        line += f"{state} in {duration(outcome.seconds)}"
        if outcome.pictures:
            line += f" · {outcome.pictures} pictures"
            if outcome.making >= SOON:
                line += f", {outcome.pictures / outcome.making:.1f}/s"
        self.print(f"{line} · {outcome.error or outcome.summary}{self._remaining()}")

    def refresh(self) -> None:
        """Show the runs at work; to be called again and again."""
        # Looked at each time, also where nothing is printed: a speed needs the run's beginning.
        running = self.at_work()
        if self.bars:
            self.bars.show(running, self.total - len(self.left), self._remaining())
        elif time.monotonic() - self.last_line > QUIET:
            each = "; ".join(f"{slug} {run}" for slug, run in running.items())
            self.print(f"at work: {each or 'nothing yet'}{self._remaining()}")

    def stopped(self) -> str:
        """Where the runs at work were stopped, in words; empty if none has asked for pictures."""
        running = self.at_work().values()
        pictures = sum(run.pictures for run in running)
        total = sum(run.total for run in running)
        return f"stopped at {pictures} of {total} pictures; they are kept" if total else ""

    def print(self, line: str) -> None:
        """Print a line, above the bars if there are any."""
        self.last_line = time.monotonic()
        if self.bars:
            # No markup: a run may be called "[red]".
            console = self.bars.progress.console
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def _estimate_end(self) -> float | None:
        """When the study will be over, by the runs so far; None while that is not known."""
        left = self.costs.left(self.left.values(), self.workers)
        if left is None:
            return None
        # What the runs at work have done already is part of what is left.
        spent = sum(run.seconds for run in self.at_work().values())
        return time.monotonic() + left - spent / self.workers

    def _remaining(self) -> str:
        if self.end is None or not self.left:
            return ""
        seconds = self.end - time.monotonic()
        return f" · about {duration(seconds)} left" if seconds > 1 else ""


class Bars:
    """A bar for the study and one for each run at work, moved by rich."""

    def __init__(
        self,
        total: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),  # a run may be called "[red]"
            BarColumn(24),
            _StateColumn(),
            console=console,
            get_time=clock,
            refresh_per_second=4,
            transient=True,
        )
        self.total = total
        self.all = self.progress.add_task("all", total=total, state=f"0/{total} runs")
        self.runs: dict[str, TaskID] = {}

    def show(self, running: Mapping[str, RunProgress], done: int, remaining: str) -> None:
        """Move the bars to where the runs are; those that are over lose theirs.

        Args:
            running: Slug → how far it is.
            done: Runs that are over.
            remaining: The time that is left, in words; empty if that is not known.
        """
        for slug in self.runs.keys() - running.keys():
            self.progress.remove_task(self.runs.pop(slug))
        for slug, run in running.items():
            if slug not in self.runs:
                self.runs[slug] = self.progress.add_task(slug, total=None)
            # Without a total the bar pulses: nobody knows yet how many pictures there will be.
            self.progress.update(
                self.runs[slug],
                completed=run.pictures,
                total=run.total or None,
                making=run.making,
            )
        state = f"{done}/{self.total} runs{remaining}"
        self.progress.update(self.all, completed=done, state=state)


class _StateColumn(ProgressColumn):
    """What a bar says: a state in words, or else the pictures, speed and time left of a run."""

    def render(self, task: Task) -> Text:
        if "state" in task.fields:
            return Text(task.fields["state"], no_wrap=True)
        run = RunProgress(
            seconds=task.elapsed or 0.0,
            pictures=int(task.completed),
            total=int(task.total or 0),
            making=task.fields.get("making", 0.0),
        )
        return Text(str(run), no_wrap=True)
