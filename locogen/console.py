"""What a person reads while work goes on: text on any console, and one bar that says what is done.

`open_bar(shown)` opens the bar. Calls within it that would open one of their own use it instead, so
that there is one bar, whatever calls whatever. `current()` is that bar, or one that shows nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from locogen.errors import name_interrupt

# Ways of handling a character that the console's encoding lacks which never fail.
_NEVER_FAIL = ("backslashreplace", "replace", "ignore", "namereplace", "xmlcharrefreplace")

# The environment variable by which a study asks its kernels to write how far they are into a file:
# bars would only stand in the saved notebook.
ASKED = "LOCOGEN_PROGRESS"

OFTEN = 0.1  # seconds between two changes of a bar on a terminal or in a notebook
SELDOM = 10.0  # and in a log, where each of them is a line
# Seconds of work before which a rate says more about start-up than about the work.
SETTLED = 1.0


def show_any_text() -> None:
    """Let standard output and error write the codes of characters that their encoding lacks.

    On a console with an old code page, or with `PYTHONIOENCODING=ascii`, a study would otherwise
    end at the first name with an accent. A handling that somebody has chosen is left unchanged.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors not in _NEVER_FAIL:
            stream.reconfigure(errors="backslashreplace")


class Bar:
    """Says what is done: a phase in words, or things that are counted, with their rate.

    Time in which nothing is made (loading, encoding, scoring) is no part of the rate, nor are
    things that were there before.
    """

    def __init__(self, line: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.line = line  # tqdm's; None: nothing is shown
        self.thing = ""
        self.done = 0.0  # things, those that were there before included
        self.total = 0.0
        self._clock = clock
        self._doing = ""  # a phase in words, while nothing is counted
        self._made = 0.0  # things, within the time that is counted
        self._seconds = 0.0  # of work, up to the last pause
        self._since: float | None = None  # when the work that goes on began
        self._is_counting = False
        self._step = ""
        self._begun = 0.0  # of the things that are being made, the part that is done
        self._last_shown: float | None = None

    def say(self, doing: str) -> None:
        """Say what is done now, in words: "encoding prompts". The clock of the work stops."""
        self._pause()
        self._doing = doing
        self._show(at_once=True)

    @contextlib.contextmanager
    def counting(self, thing: str, total: int, done: int = 0) -> Iterator[None]:
        """Within the context, things are counted.

        Several such contexts of one bar add up, as the looks of a race do.

        Args:
            thing: What is counted, in the singular.
            total: How many there will be in this context, those that are there included.
            done: How many are there already.
        """
        self.expect(thing, total)
        self.done += done
        self._is_counting = True
        self.work()
        try:
            yield
        finally:
            self._pause()
            self._is_counting = False
            self._step = ""
            self._begun = 0.0

    def expect(self, thing: str, more: int) -> None:
        """Announce that at least so many more of a thing will be counted."""
        if thing != self.thing:
            self.thing = thing
            self.done = self.total = self._made = self._seconds = 0.0
        self.total = max(self.total, self.done + more)

    def work(self) -> None:
        """The work itself goes on: from here its time counts, if things are counted."""
        if self._is_counting and self._since is None:
            self._since = self._clock()
            self._doing = ""
            self._show(at_once=True)

    def add(self, count: int) -> None:
        """So many more are there."""
        self.done += count
        self._made += count
        self._begun = 0.0
        self._step = ""
        self._show(at_once=self.done >= self.total)

    def step(self, number: int, of: int, things: int) -> None:
        """Step `number` of `of` is done, of so many things that are made together."""
        self._step = f" · step {number} of {of}"
        self._begun = things * number / of
        self._show()

    def _pause(self) -> None:
        if self._since is not None:
            self._seconds += self._clock() - self._since
            self._since = None

    @property
    def seconds(self) -> float:
        """Time of the work so far."""
        now = 0.0 if self._since is None else self._clock() - self._since
        return self._seconds + now

    @property
    def rate(self) -> float | None:
        """Things a second; None while too little has been done to say."""
        work = self._made + self._begun
        return work / self.seconds if work and self.seconds >= SETTLED else None

    @property
    def seconds_left(self) -> float | None:
        """Time until everything is counted, at the rate so far; None while that is unknown."""
        if self.rate is None:
            return None
        return max(self.total - self.done - self._begun, 0.0) / self.rate

    def __str__(self) -> str:
        if self._doing or not self._is_counting:
            return self._doing
        here = min(int(self.done) + 1, int(self.total))
        return f"{self.thing} {here} of {int(self.total)}{self._step}"

    @property
    def pace(self) -> str:
        """Rate and time left in words; empty while too little is known."""
        if self.rate is None or self.seconds_left is None:
            return ""
        return f"{_rate_text(self.rate)} · {clock_text(self.seconds_left)} left"

    def _show(self, *, at_once: bool = False) -> None:
        if self.line is None:
            return
        now = self._clock()
        is_due = self._last_shown is None or now - self._last_shown >= self.line.mininterval
        # In a log each change is a line: there even what is new waits.
        if not is_due and not (at_once and self.line.mininterval <= OFTEN):
            return
        self._last_shown = now
        # tqdm puts its own values into braces: words have none.
        words = _without_braces(str(self))
        if self._since is None:
            self.line.bar_format = f"{words} …"
        else:
            self.line.total = int(self.total)
            self.line.n = min(self.done + self._begun, self.total)
            self.line.bar_format = f"{words} |{{bar}}| {_without_braces(self.pace)}"
            _set_maximum(self.line, self.total)
        self.line.refresh()

    def close(self) -> None:
        """End the bar; it leaves no line behind."""
        if self.line is not None:
            # A notebook's bar stays, in red, unless it has come to its end.
            self.line.n = self.line.total
            self.line.close()


def _set_maximum(line: Any, total: float) -> None:
    """Tell the widget of a notebook's bar how much there is; a console's has none."""
    children = getattr(getattr(line, "container", None), "children", ())
    if len(children) == 3:
        children[1].max = total


def _without_braces(text: str) -> str:
    return text.replace("{", "(").replace("}", ")")


def _rate_text(rate: float) -> str:
    """Things a second, or seconds for each where that reads better."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"


def clock_text(seconds: float) -> str:
    """Such as 0:42 or 1:03:20."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


_SILENT = Bar()
_current: ContextVar[Bar | None] = ContextVar("the bar that is shown", default=None)


def current() -> Bar:
    """The bar that is open; outside of `open_bar` one that shows nothing."""
    return _current.get() or _SILENT


@contextlib.contextmanager
def open_bar(shown: bool, doing: str = "") -> Iterator[Bar]:
    """Open the bar, or use the one that is open.

    An interrupt within it says in one line what was stopped.

    Args:
        shown: Whether to show it. Within a study none is.
        doing: What is done first.
    """
    outer = _current.get()
    if outer is not None:
        if doing:
            outer.say(doing)
        yield outer
        return
    bar = Bar(_line(doing) if shown and not os.environ.get(ASKED) else None)
    bar.say(doing)
    token = _current.set(bar)
    try:
        yield bar
    except KeyboardInterrupt as interrupt:
        name_interrupt(interrupt, f"stopped while {bar}" if str(bar) else "stopped")
        raise
    finally:
        _current.reset(token)
        bar.close()


def _line(doing: str) -> Any:
    """Tqdm's bar: a widget in a notebook, else a line of standard error."""
    from tqdm.auto import tqdm

    seconds = OFTEN if _is_live() else SELDOM
    return tqdm(total=1, leave=False, bar_format=f"{_without_braces(doing)} …", mininterval=seconds)


def _is_live() -> bool:
    """Whether lines can be written over: a terminal, or a notebook."""
    return "ipykernel" in sys.modules or sys.stderr.isatty()
