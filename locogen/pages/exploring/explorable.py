"""All that can be explored on a run's page, and the data that its script shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locogen.files import CannotWrite
from locogen.pages.entries import Entry
from locogen.pages.exploring.album import Album, make_album, page_limit
from locogen.pages.exploring.maps import Map, maps_of
from locogen.pages.exploring.pairs import (
    Pair,
    arms_of,
    by_importance,
    bytes_of,
    pairs_data,
    pairs_of,
)
from locogen.pages.exploring.windows import Sample, Sweep, sweep_data, sweep_of
from locogen.pages.results import Finished, read_table

RESERVE = 200_000  # bytes of a page for all but the notebook and the small pictures
MOST_ROWS = 20_000  # of a table of pictures


@dataclass(frozen=True)
class Explorable:
    """What the template shows, and what the script shows. Without pictures it is empty."""

    sweeps: Sequence[Sweep] = ()
    arms: Sequence[str] = ()
    maps: Sequence[Map] = ()
    data: Mapping[str, Any] | None = None
    """What the script shows; None without pictures."""
    left_out: str = ""
    """What did not fit into the page, in words."""

    @property
    def script(self) -> str:
        """The template of the page's script; empty if there is nothing for it to show."""
        return "" if self.data is None else "run.js"


def explorable(run: Finished, entries: Sequence[Entry], used: int) -> Explorable:
    """Gather what of a run can be explored.

    Args:
        run: The run.
        entries: What it says about concepts.
        used: The bytes that the rest of its page takes.

    Returns:
        What there is; without anything to look at where the run left no usable pictures.
    """
    sweeps = _swept(run, entries)
    pairs = _paired(run)
    groups = [sample.names for sweep in sweeps for sample in sweep.samples]
    # Of sweeps the page says little beside the notebook.
    words = [0] * len(groups)
    for pair in by_importance(pairs):
        groups.append([pair.before, pair.after])
        words.append(bytes_of(pair))
    limit = page_limit(run, (name for group in groups for name in group))
    try:
        album = make_album(run, groups, limit - used - RESERVE, words)
    except CannotWrite:
        raise
    except (OSError, ValueError):  # `pictures/` may be anything but a folder
        album = Album()
    maps = _mapped(run)
    if not album.shown:
        return Explorable(maps=maps)
    return _with_album(sweeps, pairs, maps, album, len(groups))


def _with_album(
    sweeps: Sequence[Sweep],
    pairs: Sequence[Pair],
    maps: Sequence[Map],
    album: Album,
    groups: int,
) -> Explorable:
    samples = [(sweep, sample) for sweep in sweeps for sample in sweep.samples]
    within: dict[str, list[Sample]] = {}
    for sweep, sample in samples[: album.groups]:
        within.setdefault(sweep.concept, []).append(sample)
    shown = [sweep for sweep in sweeps if sweep.concept in within]
    arms = pairs_data(pairs, album)["arms"]
    left_out = ""
    if album.groups < groups:
        what = "prompts and seeds" if samples else "pairs"
        left_out = f"{album.groups} of {groups} {what} fit into this page."
    data = {
        "pictures": album.shown,
        "sweeps": [sweep_data(sweep, album, within[sweep.concept]) for sweep in shown],
        "arms": arms,
    }
    return Explorable(shown, [arm["name"] for arm in arms], maps, data, left_out)


def _swept(run: Finished, entries: Sequence[Entry]) -> list[Sweep]:
    # The table of pictures is not checked when it is read.
    try:
        table: Any = read_table(run.folder / "pictures.csv")
        if len(table) > MOST_ROWS:
            return []
        return [sweep_of(entry, table) for entry in entries if entry.rows is not None]
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, AttributeError):
        return []


def _paired(run: Finished) -> list[Pair]:
    """The pairs of the arms that change anything, the first arm first."""
    try:
        table: Any = read_table(run.folder / "evaluation.csv")
        pairs = [] if len(table) > MOST_ROWS else pairs_of(table)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError):
        return []
    arms = arms_of(pairs)
    changing = [pair for pair in pairs if pair.arm in arms]
    return sorted(changing, key=lambda pair: arms.index(pair.arm))


def _mapped(run: Finished) -> list[Map]:
    try:
        return maps_of(read_table(run.folder / "shares.csv"))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, AttributeError):
        return []
