"""The bar: what it says, what it counts as work, and that there is one; the libraries' own bars."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from support import tiny

from locogen import console
from locogen.console import Bar, clock_text, current, open_bar
from locogen.errors import name_interrupt
from locogen.models.load import load, without_library_bars
from locogen.pictures.runs import generate


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Line:
    """In the place of tqdm's: keeps what it was to show."""

    mininterval = 0.0

    def __init__(self) -> None:
        self.total: float = 1
        self.n: float = 0
        self.bar_format = ""
        self.shown: list[str] = []

    def refresh(self) -> None:
        self.shown.append(self.bar_format)

    def close(self) -> None:
        self.shown.append("closed")


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Line:
    shown = Line()
    monkeypatch.setattr(console, "_line", lambda doing: shown)
    return shown


# What it says


def test_rates_are_of_the_work_not_of_start_up_nor_of_what_was_there() -> None:
    clock = Clock()
    bar = Bar(clock=clock)
    bar.say("loading weights")
    clock.now += 60
    with bar.counting("picture", 132, done=100):
        bar.say("encoding prompts")
        clock.now += 30
        bar.work()
        clock.now += 4
        bar.add(8)
        assert bar.rate == 2.0 and bar.seconds_left == 12.0
        assert str(bar) == "picture 109 of 132" and bar.pace == "2.0/s · 0:12 left"
        bar.say("encoding prompts")
        assert str(bar) == "encoding prompts"
        clock.now += 50
        assert bar.rate == 2.0, "the twin: 108 of 144 seconds are 0.75/s"


def test_time_left_comes_true_within_a_factor_of_two() -> None:
    """Of batches whose last part, the decoder, takes as long as a third of the steps; the first step is slow."""
    clock = Clock()
    bar = Bar(clock=clock)
    said: list[tuple[float, float]] = []  # when, time left
    with bar.counting("picture", 40):
        for batch in range(5):
            for step in range(12):
                clock.now += 0.5 + (1.0 if batch == step == 0 else 0.0)
                bar.step(step + 1, 12, 8)
                if bar.seconds_left is not None and step > 1:
                    said.append((clock.now, bar.seconds_left))
            clock.now += 2
            bar.add(8)
    early = [(when, left) for when, left in said if clock.now - when > 5]
    assert len(early) > 30
    for when, left in early:
        assert 0.5 < left / (clock.now - when) < 2


@pytest.mark.slow
def test_time_left_comes_true_on_a_real_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the clock of the wall, pictures of the mini model, from the first time that is said."""
    said: list[tuple[float, float]] = []  # when, time left
    show = Bar._show

    def listen(bar: Bar, **options: bool) -> None:
        if bar.seconds_left is not None and bar._is_counting:
            said.append((time.monotonic(), bar.seconds_left))
        show(bar, **options)

    monkeypatch.setattr(Bar, "_show", listen)
    options = {"num_inference_steps": 12, "batch_size": 4, "progress": False, "store": None}
    generate(load("mini"), ["a picture of a cat", "an owl"], seeds=range(16), **options)
    end = said[-1][0]
    ratios = [left / (end - when) for when, left in said if end - when > 2]
    assert len(ratios) >= 4
    assert all(0.5 < ratio < 2 for ratio in ratios)
    # The twin: what is left at the rate of half of the work, as where start-up counted.
    assert not all(0.5 < 2.1 * ratio < 2 for ratio in ratios)


def test_nothing_is_said_of_the_rate_at_once() -> None:
    clock = Clock()
    bar = Bar(clock=clock)
    with bar.counting("picture", 4800):
        clock.now += 0.01
        bar.add(24)
        assert bar.rate is None and bar.pace == "", "not 2400.0/s"


def test_looks_add_up() -> None:
    bar = Bar()
    for _ in range(2):
        with bar.counting("picture", 10, done=2):
            bar.add(8)
    assert (bar.done, bar.total) == (20, 20)
    bar.expect("picture", 30)
    with bar.counting("picture", 10):
        assert str(bar) == "picture 21 of 50", "announced beforehand"
    with bar.counting("run", 3):
        assert str(bar) == "run 1 of 3"


def test_slow_work_is_given_in_seconds_each() -> None:
    clock = Clock()
    bar = Bar(clock=clock)
    with bar.counting("picture", 100):
        clock.now += 80
        bar.step(1, 2, 2)
        assert str(bar) == "picture 1 of 100 · step 1 of 2"
        assert bar.pace == "80.0 s each · 2:12:00 left"
    assert clock_text(42) == "0:42"


# That there is one


def test_what_is_called_within_uses_the_bar_that_is_open(line: Line) -> None:
    assert current().line is None
    with open_bar(True, "loading the scorer") as bar:
        with open_bar(True, "reading {the} model") as inner:
            assert inner is bar is current()
        assert current() is bar
    assert current() is not bar
    assert line.shown == ["loading the scorer …", "reading (the) model …", "closed"]


def test_a_log_is_not_flooded(line: Line) -> None:
    line.mininterval = console.SELDOM
    with open_bar(True, "loading") as bar:
        for number in range(50):
            bar.say(f"phase {number}")
    assert line.shown == ["loading …", "closed"]


def test_generate_says_what_it_does(line: Line) -> None:
    generate(tiny.small(), ["cat", "dog"], num_inference_steps=2, batch_size=1)
    said = [text.partition(" |")[0] for text in line.shown]
    assert list(dict.fromkeys(said)) == [
        "reading the model …",
        "picture 1 of 2",
        "encoding prompts …",
        "picture 1 of 2 · step 1 of 2",
        "picture 1 of 2 · step 2 of 2",
        "picture 2 of 2",
        "picture 2 of 2 · step 1 of 2",
        "picture 2 of 2 · step 2 of 2",
        "closed",
    ]


def test_a_study_s_kernel_shows_none(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(console.ASKED, "progress.json")
    with open_bar(True, "loading"):
        assert line.shown == []


def test_nothing_is_shown_unless_asked(line: Line) -> None:
    pipe = tiny.small()
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    generate(pipe, ["cat"], num_inference_steps=1, progress=False)
    assert line.shown == [] and pipe._progress_bar_config == before


@pytest.mark.slow
@pytest.mark.parametrize("name", list(tiny.FAMILIES))
def test_every_family_says_its_steps_and_makes_the_same_pictures(name: str, line: Line) -> None:
    pipe = tiny.FAMILIES[name]()
    asked = {"num_inference_steps": 2, "store": None}
    silent = generate(pipe, ["cat"], progress=False, **asked)
    shown = generate(pipe, ["cat"], **asked)
    assert any("picture 1 of 1 · step 2 of 2" in text for text in line.shown)
    assert shown.pictures[0].tobytes() == silent.pictures[0].tobytes()


def test_the_first_sign_comes_before_torch() -> None:
    """Importing torch takes seconds."""
    code = """
import sys
import locogen as loco, locogen.console
class Seen(Exception): pass
def seen(doing):
    raise Seen(doing, sorted({"torch", "diffusers", "transformers", "pandas"} & set(sys.modules)))
locogen.console._line = seen
try:
    loco.load("mini")
except Seen as sign:
    print(*sign.args)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "loading weights of mini []"


# Interrupts


def test_an_interrupt_says_what_was_stopped(line: Line) -> None:
    named = pytest.raises(KeyboardInterrupt, match=r"^stopped while encoding prompts$")
    with named as caught, open_bar(True, "encoding prompts"):
        raise KeyboardInterrupt
    assert type(caught.value) is KeyboardInterrupt, "else Python would not end with 130"
    name_interrupt(caught.value, "outer words")
    assert str(caught.value) == "stopped while encoding prompts"


# The libraries' bars


def test_bars_of_the_libraries_are_silent_and_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as bars

    before = (bars.is_progress_bar_enabled(), are_progress_bars_disabled())
    with without_library_bars():
        list(bars.tqdm(range(3)))
        assert capsys.readouterr().err == ""
    assert (bars.is_progress_bar_enabled(), are_progress_bars_disabled()) == before
    if before[0]:
        list(bars.tqdm(range(3)))
        assert capsys.readouterr().err, "the twin"


def test_bars_that_somebody_turned_off_stay_off() -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as bars

    was_on = bars.is_progress_bar_enabled()
    bars.enable_progress_bar()
    disable_progress_bars()
    try:
        with without_library_bars():
            pass
        assert bars.is_progress_bar_enabled() and are_progress_bars_disabled()
        bars.disable_progress_bar()
        with without_library_bars():
            pass
        assert not bars.is_progress_bar_enabled()
    finally:
        (bars.enable_progress_bar if was_on else bars.disable_progress_bar)()


def test_the_widget_of_a_notebook_knows_how_much_there_is() -> None:
    bar = SimpleNamespace(max=1)
    console._set_maximum(SimpleNamespace(container=SimpleNamespace(children=(0, bar, 2))), 132.0)
    assert bar.max == 132.0
    console._set_maximum(SimpleNamespace(), 132.0)  # a console's has none
