"""How a study's results were made: settings, versions, seeds, time; and how to make them again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locogen.errors import LocogenError
from locogen.files import toml_lines, toml_text
from locogen.pages.html import page
from locogen.pages.results import Finished, count_runs, read_table
from locogen.studies.estimates import duration
from locogen.studies.notebooks import notebook_file

IN_RUNS_TABLE = {"model", "pictures"}  # settings that the table of runs shows for each run
MOST_NAMES = 8  # of runs in one cell
LONG = 100  # characters of a value; a longer one opens on a click
SUMMARY = 60  # characters of it that are always shown


@dataclass(frozen=True)
class Fact:
    """A name and its value in words, as the templates show it."""

    name: str
    text: str
    summary: str = ""
    """What is shown of a long value until it is opened; empty: the whole text."""


def study_page(runs: Sequence[Finished], *, name: str, title: str = "") -> str:
    """The page about how a whole study was made.

    Args:
        runs: All its runs.
        name: The name of its results folder; the study's file has the same.
        title: The study's title; empty: its name.

    Returns:
        The page's HTML.
    """
    title = title or name
    return page(
        "study.html",
        title=f"How this was made: {title}",
        name=name,
        totals=_totals_sentence(runs),
        toml=study_toml(runs, title=title),
        locogen_version=_locogen_version(runs),
        lines=[_run_line(run) for run in runs],
        groups=_shared_facts(runs),
        differences=_differences(runs),
    )


def _locogen_version(runs: Iterable[Finished]) -> str:
    """The version of the first run that recorded it; empty if none did."""
    for run in runs:
        version = run.group("versions").get("locogen")
        if version:
            return str(version)
    return ""


def _by_notebook(runs: Sequence[Finished]) -> dict[str, list[Finished]]:
    """Runs by notebook: only those of the same notebook have the same settings."""
    groups: dict[str, list[Finished]] = {}
    for run in runs:
        groups.setdefault(_notebook(run), []).append(run)
    return groups


def _shared_facts(runs: Sequence[Finished]) -> list[tuple[str, list[Fact]]]:
    """Versions, and the settings of each notebook, as far as all runs share them."""
    groups = {"Versions": shared(runs, "versions")}
    for notebook, group in _by_notebook(runs).items():
        groups[f"Settings of {notebook}, all runs"] = shared(group, "settings")
    return fact_groups(groups)


def _differences(runs: Sequence[Finished]) -> list[list[str]]:
    """Rows of (setting, value, runs) for versions and settings that are not the same in all."""
    rows = _differing(runs, "versions")
    for group in _by_notebook(runs).values():
        rows += _differing(group, "settings")
    return rows


def study_toml(runs: Sequence[Finished], *, title: str) -> str:
    """A study file that makes these runs again, from the parameters that each has recorded."""
    # A run that failed early may have recorded nothing.
    repeatable = [run for run in runs if run.facts.get("parameters") or run.facts.get("notebook")]
    notebooks = [_notebook(run) for run in repeatable] or ["localize"]
    usual_notebook = Counter(notebooks).most_common(1)[0][0]
    lines = [f"title = {toml_text(title)}", f"notebook = {toml_text(usual_notebook)}"]

    defaults = shared(repeatable, "parameters")
    if defaults:
        lines += ["", "[defaults]", *toml_lines(defaults)]
    for run, notebook in zip(repeatable, notebooks, strict=False):
        values: dict[str, Any] = {"name": run.folder.name, "title": run.title}
        if notebook != usual_notebook:
            values["notebook"] = notebook
        values |= _without(run.group("parameters"), defaults)
        lines += ["", "[[run]]", *toml_lines(values)]
    return "\n".join(lines) + "\n"


def _without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


# --- what is shared, and what is not -------------------------------------------------------------


def shared(runs: Sequence[Finished], group: str) -> dict[str, Any]:
    """What is the same in all runs that have this group of facts at all."""
    groups = [run.group(group) for run in runs if run.group(group)]
    if not groups:
        return {}
    first, *others = groups
    same = dict(first)
    for other in others:
        for key, value in first.items():
            # None is a value too: a key that a run lacks is not shared.
            if key not in other or other[key] != value:
                same.pop(key, None)
    return same


def _differing(runs: Sequence[Finished], group: str) -> list[list[str]]:
    """Rows of (setting, value, runs) for what is not the same in all of these runs."""
    hidden = {*shared(runs, group), *IN_RUNS_TABLE}
    # (setting, value as text) → names of the runs that have it.
    names: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        for key, value in _without(run.group(group), hidden).items():
            names.setdefault((key, toml_text(value)), []).append(run.folder.name)
    # Settings in the order in which they first occur, the values of each together.
    settings = list(dict.fromkeys(key for key, _ in names))
    cells = sorted(names, key=lambda cell: settings.index(cell[0]))
    return [[key, value, _first_names(names[key, value])] for key, value in cells]


def _first_names(names: Sequence[str]) -> str:
    text = ", ".join(names[:MOST_NAMES])
    if len(names) > MOST_NAMES:
        text += f" and {len(names) - MOST_NAMES} more"
    return text


# --- facts in words ------------------------------------------------------------------------------


def fact_groups(groups: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Fact]]]:
    """Groups of names and values in words; empty groups are left out."""
    shown = []
    for title, values in groups.items():
        facts = [_fact(name, value) for name, value in values.items()]
        if facts:
            shown.append((title, facts))
    return shown


def _fact(name: str, value: Any) -> Fact:
    text = _plain(value)
    if not isinstance(value, Mapping) or len(text) < LONG:
        return Fact(name, text)
    key, first = next(iter(value.items()))
    summary = f"{key}: {_plain(first)}"[:SUMMARY] + f" and {len(value) - 1} more"
    return Fact(name, text, summary)


def _plain(value: Any) -> str:
    """A value in words: a dash for nothing, and lists and tables by their parts."""
    if value in (None, "", [], (), {}):
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(inner) for inner in value)
    return str(value)


def time_spent(facts: Mapping[str, Any]) -> str:
    """How long a run took; a dash if it does not say."""
    return duration(facts["seconds"]) if "seconds" in facts else "–"


def _totals_sentence(runs: Sequence[Finished]) -> str:
    """Runs, pictures and time of all of them."""
    # Of the types that `read_record` has checked.
    seconds = sum(run.facts.get("seconds", 0) for run in runs)
    pictures = sum(run.finding.pictures for run in runs)
    models = ", ".join(dict.fromkeys(run.model for run in runs))
    work = f"{pictures} pictures in {duration(seconds)} of work"
    if seconds and pictures:
        work += f" ({pictures / seconds:.1f} a second)"
    # ISO times sort as text.
    ends = sorted(run.facts["finished"] for run in runs if run.facts.get("finished"))
    if ends:
        work += f", finished between {moment(ends[0])} and {moment(ends[-1])}"
    return f"{count_runs(runs)} on {models}: {work}."


def moment(iso_time: Any) -> str:
    """A time as people write it."""
    return str(iso_time or "–").replace("T", " ").replace("+00:00", " UTC")


def _run_line(run: Finished) -> dict[str, Any]:
    """A run in the table of runs."""
    return {
        "run": run,
        "notebook": run.facts.get("notebook") or "–",
        "seeds": _seeds(run),
        "pictures": run.facts.get("pictures", "–"),
        "time": time_spent(run.facts),
        "finished": moment(run.facts.get("finished")),
    }


def _seeds(run: Finished) -> str:
    """The seeds that its pictures were made from; without pictures, those in its parameters."""
    try:
        column = read_table(run.folder / "pictures.csv")["seed"].dropna()
        seeds = sorted({int(seed) for seed in column})
    # No such table, or one that somebody has changed: what was asked for is still known.
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        requested = run.group("parameters").get("seeds")
        return "–" if requested is None else f"{requested} requested"

    if not seeds:
        return "–"
    first = seeds[0]
    last = seeds[-1]
    has_no_gap = last - first + 1 == len(seeds)
    if has_no_gap and len(seeds) > 2:
        return f"{first}–{last}"
    return ", ".join(str(seed) for seed in seeds)


def _notebook(run: Finished) -> str:
    """The notebook as a study file names it: one of locogen's by name, any other by its file."""
    name = str(run.facts.get("notebook") or "localize")
    try:
        notebook_file(name, run.folder)
    except LocogenError:
        return f"{name}.ipynb"
    return name
