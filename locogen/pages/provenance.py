"""How a study's results were made: settings, versions, seeds, time and pictures spent, and how to make them again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from locogen.errors import LocogenError
from locogen.pages.html import Html, facts, html, link, page, table
from locogen.pages.results import Finished, read_table
from locogen.studies.notebooks import notebook_file

TOLD = ("model", "pictures")  # settings that the table of runs has
MOST = 8  # names of runs in one cell


def study_page(runs: Sequence[Finished], *, name: str, title: str = "") -> str:
    """The page of a whole study; `name`: of its results folder, which its file is called after."""
    heading = f"How this was made: {title or name}"
    parts = [
        f"<h1>{html(heading)}</h1>",
        f'<p class="finding">{html(_spent(runs))}</p>',
        "<h2>How to reproduce</h2>",
    ]
    version = next(
        (v for run in runs if (v := (run.facts.get("versions") or {}).get("locogen"))), ""
    )
    install = f"pip install locogen=={version}\n" if version else ""
    commands = f"{install}locogen run {name}.toml\nlocogen report {name}"
    parts.append(
        f"<p>Save this as <code>{html(name)}.toml</code> in an empty folder; files of your own that it names "
    )
    parts.append("(notebooks, concepts, models) belong beside it.</p>")
    parts.append(
        f'<pre class="code" tabindex="0">{html(study_toml(runs, title=title or name))}</pre>'
    )
    parts.append(f'<p>Then:</p><pre class="code" tabindex="0">{html(commands)}</pre>')
    parts.append("<h2>Runs</h2>")
    heads = ("run", "model", "notebook", "seeds", "pictures", "time", "finished")
    parts.append(table(heads, [_line(run) for run in runs], caption="What each run has spent"))
    parts.append("<h2>Settings and versions</h2>")
    books = list(dict.fromkeys(map(_notebook, runs)))
    apart = {book: [run for run in runs if _notebook(run) == book] for book in books}
    groups = {"Versions": shared(runs, "versions")}
    groups |= {
        f"Settings of {book}, all runs": shared(own, "settings") for book, own in apart.items()
    }
    parts.append(facts(groups))
    differing = [line for own in apart.values() for line in _differing(own, "settings")]
    if differing := [*_differing(runs, "versions"), *differing]:
        parts.append(
            table(("setting", "value", "runs"), differing, caption="What differs between runs")
        )
    return page(heading, "\n".join(parts), navigation=[link("index.html", "All runs")])


def study_toml(runs: Sequence[Finished], *, title: str) -> str:
    """A study file that makes these runs again, from the parameters that each has kept."""
    given = [run for run in runs if run.facts.get("parameters") or run.facts.get("notebook")]
    usual = Counter(_notebook(run) for run in given).most_common(1)
    main = usual[0][0] if usual else "localize"
    common = shared(given, "parameters")
    lines = [f"title = {_toml(title)}", f"notebook = {_toml(main)}"]
    if common:
        lines += ["", "[defaults]", *_lines(common)]
    for run in given:
        own = {key: value for key, value in _group(run, "parameters").items() if key not in common}
        about = {"name": run.folder.name, "title": run.title}
        about |= {} if _notebook(run) == main else {"notebook": _notebook(run)}
        lines += ["", "[[run]]", *_lines(about | own)]
    return "\n".join(lines) + "\n"


def duration(seconds: Any) -> str:
    """Seconds as people say them."""
    if not isinstance(seconds, int | float):
        return "–"
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.1f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


def shared(runs: Sequence[Finished], group: str) -> dict[str, Any]:
    """What is the same in all runs that have this group of facts at all."""
    told = [each for run in runs if (each := _group(run, group))]
    first = told[0] if told else {}
    return {
        key: value
        for key, value in first.items()
        if all(key in each and each[key] == value for each in told)
    }


def _differing(runs: Sequence[Finished], group: str) -> list[list[Any]]:
    """Rows of (setting, value, runs) for what is not the same in all, but for what the table of runs has."""
    same = shared(runs, group)
    keys = dict.fromkeys(
        key for run in runs for key in _group(run, group) if key not in {*same, *TOLD}
    )
    rows = []
    for key in keys:
        values: dict[str, list[str]] = {}
        for run in runs:
            if key in _group(run, group):
                values.setdefault(_toml(_group(run, group)[key]), []).append(run.folder.name)
        rows += [[key, value, _few(names)] for value, names in values.items()]
    return rows


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more


def _group(run: Finished, group: str) -> Mapping[str, Any]:
    told = run.facts.get(group)
    return told if isinstance(told, Mapping) else {}


def _spent(runs: Sequence[Finished]) -> str:
    """Runs, pictures and time of all of them in a sentence."""
    seconds = sum(s for run in runs if isinstance(s := run.facts.get("seconds"), int | float))
    pictures = sum(n for run in runs if isinstance(n := run.facts.get("pictures"), int))
    ends = sorted(str(run.facts["finished"]) for run in runs if run.facts.get("finished"))
    rate = f" ({pictures / seconds:.1f} a second)" if seconds and pictures else ""
    between = f", finished between {_moment(ends[0])} and {_moment(ends[-1])}" if ends else ""
    models = ", ".join(dict.fromkeys(run.model for run in runs))
    some = f"{len(runs)} run{'s' * (len(runs) != 1)} on {models}"
    return f"{some}: {pictures} pictures in {duration(seconds)} of work{rate}{between}."


def _moment(told: Any) -> str:
    """A time as the results have it, as people write it."""
    return str(told or "–").replace("T", " ").replace("+00:00", " UTC")


def _line(run: Finished) -> list[Any]:
    told = run.facts
    count = ("number", told.get("pictures", "–"))
    time = ("number", duration(told.get("seconds")))
    name = link(f"{run.address}/index.html", run.folder.name)
    ended = (
        Html('<strong class="bad">failed</strong>') if run.error else _moment(told.get("finished"))
    )
    return [name, run.model, told.get("notebook") or "–", _seeds(run), count, time, ended]


def _seeds(run: Finished) -> str:
    """The seeds that its pictures were made from, as a range where they are one; else what was asked for."""
    try:
        seeds = sorted(
            {int(seed) for seed in read_table(run.folder / "pictures.csv")["seed"].dropna()}
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        asked = _group(run, "parameters").get("seeds")
        return "–" if asked is None else f"{asked} asked for"
    if len(seeds) > 2 and seeds[-1] - seeds[0] + 1 == len(seeds):
        return f"{seeds[0]}–{seeds[-1]}"
    return ", ".join(map(str, seeds)) or "–"


def _notebook(run: Finished) -> str:
    """The notebook as a study names it: one of locogen's own, or a file."""
    name = str(run.facts.get("notebook") or "localize")
    try:
        notebook_file(name, run.folder)
    except LocogenError:
        return f"{name}.ipynb"
    return name


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in values.items() if value is not None]


def _toml(value: Any) -> str:
    """Plain values as TOML, which writes them as JSON does, but for tables and one character."""
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{json.dumps(str(key))} = {_toml(inner)}" for key, inner in value.items())
            + "}"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False, default=str).replace("\x7f", "\\u007F")
