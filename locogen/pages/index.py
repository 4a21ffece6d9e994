"""The pages over many runs: the index, models × concepts, and a page for each model and each concept.

All of them show entries (`locogen.pages.results`) on one scale a page, say in words what is colored, and link the
tables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from locogen.pages.html import Html, html, image, link, page, table
from locogen.pages.results import KINDS, STATES, Entry, Finished
from locogen.pages.thumbnails import Scale, heat_strip, small_curve, small_picture
from locogen.views.tables import interval, missing, number, precision, sentence

TITLE = "Which layers carry what the model knows"
EXPLANATION = """For each concept, a few neighboring layers of the model (a window) hear a prompt without it,
while all other layers hear the prompt that holds it. What this changes in the CLIP-score, against pictures
for which every layer hears the prompt, is the window's effect. It is signed so that positive means that the
window carries the concept; intervals are 95 %. The ceiling is the effect when every layer hears the prompt
without it."""
CURVES = """Upwards the change of the CLIP-score, to the right the layers, on the same scale in every figure here.
Circles: what replacing a window takes away. Squares: what a window brings alone. Lines across: the ceiling and
the placebo, where the prompt says the same in other words. Whiskers and bands are 95 % intervals."""
TABLES = ("pictures", "effects", "evaluation", "summary", "grid", "neurons", "changes")
TABLES += ("localizers", "agreement", "sides", "trace")
IN_INDEX, IN_ROW = 64, 96  # pixels of a picture
LONGEST = 300  # characters of an error that an overview shows
SORTS = {
    "given": "as in the study", "name": "concept", "carrier": "carrier, first layers first",
    "effect": "effect, largest first", "share": "share of the ceiling, largest first",
}  # fmt: skip
Addresses = Mapping[str, str]


def index_page(
    runs: Sequence[Finished],
    found: Sequence[Entry],
    models: Addresses,
    concepts: Addresses,
    *,
    title: str = "",
) -> str:
    """The page over all runs: concepts down, models across, in each cell a heat strip, carrier and interval."""
    parts = [
        f"<h1>{html(title or TITLE)}</h1>",
        f'<p class="finding">{html(_counted(runs, found))}</p>',
    ]
    parts.append(f"<p>{html(EXPLANATION)}</p>")
    if found:
        scale = _scale(found)
        parts += [
            _legend(scale, found),
            _controls(found, models),
            _matrix(found, models, concepts, scale),
        ]
    shown = {entry.run.folder for entry in found}
    if more := [run for run in runs if run.folder not in shown]:
        told = [
            (_run_link(run, run.title), run.model, ("verdict", _outcome(run)), _data(run))
            for run in more
        ]
        parts.append("<h2>What else was done</h2>")
        parts.append(
            table(
                ("notebook", "model", "finding", "data"), told, caption="Edits and other notebooks"
            )
        )
    nav = [link("study.html", "How all this was made")]
    return page(
        title or TITLE, "\n".join(parts), navigation=nav, script="index.js" if found else ""
    )


def comparison_page(
    title: str, found: Sequence[Entry], *, by: str, others: Addresses, source: str = ""
) -> str:
    """Runs side by side on one scale; `by`: "concept" or "model", what tells them apart, and links to `others`."""
    scale = _scale(found)
    good = [entry for entry in found if entry.rows is not None]
    parts = [
        f"<h1>{html(title)}</h1>",
        f'<p class="finding">{html(_counted([e.run for e in found], found))}</p>',
    ]
    parts += [_legend(scale, found), _comparison(found, by, others, scale)]
    if good:
        bounds = Scale.of((entry.effects for entry in good), ("estimate", "low", "high"))
        cards = "\n".join(_card(entry, by, bounds) for entry in good)
        parts += [
            "<h2>Side by side, with intervals</h2>",
            f'<p>{CURVES}</p>\n<div class="side">\n{cards}\n</div>',
        ]
        parts.append(_numbers(good, by))
    nav = [link("index.html", "All runs"), link("study.html", "How all this was made")]
    return page(title, "\n".join(parts), navigation=nav, source=source)


def data_links(run: Finished, *, at: str = "") -> dict[str, Html]:
    """Name → link to each table that a run left."""
    return {
        name: link(f"{at}{name}.csv", name)
        for name in TABLES
        if (run.folder / f"{name}.csv").exists()
    }


def failure(run: Finished, *, at: str = "") -> Html:
    """A failed run's error in short, with a link to the cell it stopped in."""
    text = run.error if len(run.error) <= LONGEST else run.error[:LONGEST] + " …"
    where = ""
    if run.cell is not None:
        code = (run.folder / "notebook.ipynb").exists()
        name = f"cell {run.cell}"
        where = f" ({link(f'{at}code.html#cell-id-{run.cell}', name) if code else name})"
    return Html(f'<strong class="bad">failed</strong>: {html(text)}{where}')


# --- the index -----------------------------------------------------------------------------------


def _counted(runs: Sequence[Finished], found: Sequence[Entry]) -> str:
    """How many of what, in a sentence."""
    states = Counter(entry.state for entry in found)
    told = [
        f"{states[state]} {words}"
        for state, (words, _) in STATES.items()
        if states[state] and state != "failed"
    ]
    failed = len({run.folder for run in runs if run.error})
    count = len({run.folder for run in runs})
    failed = f"{failed} failed or unfinished" if failed else "none failed"
    some = f"{count} run{'s' * (count != 1)}, {failed}."
    return f"{some} Of what was looked for: {', '.join(told)}." if told else some


def _scale(found: Iterable[Entry]) -> Scale:
    return Scale.of(entry.rows for entry in found if entry.rows is not None)


def _legend(scale: Scale, found: Sequence[Entry]) -> Html:
    """What the colors mean, and whether they may be compared."""
    steps = [scale.low + (scale.high - scale.low) * step / 47 for step in range(48)]
    digits = precision(scale.low, scale.high)
    low, high = number(scale.low, digits), number(scale.high, digits)
    alt = f"Colors from {low} over white at 0 to {high}: blue below zero, red above."
    picture = image(heat_strip(steps, scale), alt, _class="strip")
    text = f"""Each strip shows the effect of the windows, from the first layer on the left to the last on the right,
        on one scale: change of the CLIP-score from {low} to {high}. Red: the window carries the concept. The carrier
        is outlined, and named below."""
    scorers = {
        str((entry.run.facts.get("settings") or {}).get("scorer") or "")
        for entry in found
        if entry.row
    }
    if len(scorers - {""}) > 1:
        told = ", ".join(sorted(scorers - {""}))
        text += f" The runs were scored by different scorers ({told}): compare places and shares, not sizes."
    bar = f'<span class="bar"><span>{low}</span>{picture}<span>{high}</span></span>'
    return Html(f'<div class="legend">{bar}<p class="soft">{html(text)}</p></div>')


def _controls(found: Sequence[Entry], models: Addresses) -> Html:
    """The form that `index.js` brings to life; hidden without it."""
    states = {
        state: words
        for state, (words, _) in STATES.items()
        if any(entry.state == state for entry in found)
    }
    there = {entry.kind for entry in found}
    kinds = {kind: kind for kind in KINDS if kind in there}
    fields = [
        '<label>Find <input name="words" type="search" autocomplete="off" spellcheck="false"></label>'
    ]
    if len(models) > 1:
        fields.append(_select("model", "Model", {"": "all", **{name: name for name in models}}))
    fields.append(_select("kind", "Kind", {"": "all", **kinds}))
    fields.append(_select("state", "Outcome", {"": "all", **states}))
    fields.append(_select("sort", "Sort by", SORTS))
    fields.append(
        '<button type="reset">Show all</button> <output id="count" aria-live="polite"></output>'
    )
    return Html(
        f'<form id="controls" role="search" aria-label="Runs" hidden>{" ".join(fields)}</form>'
    )


def _select(name: str, label: str, options: Mapping[str, str]) -> str:
    inner = "".join(
        f'<option value="{escape(value)}">{html(words)}</option>'
        for value, words in options.items()
    )
    return f'<label>{label} <select name="{name}">{inner}</select></label>'


def _matrix(found: Sequence[Entry], models: Addresses, concepts: Addresses, scale: Scale) -> Html:
    cells: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        cells.setdefault((entry.concept, entry.run.model), []).append(entry)
    heads = "".join(
        f'<th scope="col" data-model="{escape(model)}">{link(models[model], model)}</th>'
        for model in models
    )
    lines = []
    for concept, address in concepts.items():
        row = [
            f'<td data-model="{escape(model)}" data-label="{escape(model)}">'
            + ("".join(_cell(entry, scale) for entry in cells.get((concept, model), [])) or "–")
            + "</td>"
            for model in models
        ]
        kind = next(
            (entry.kind for key, each in cells.items() if key[0] == concept for entry in each), ""
        )
        name = f'{link(address, concept)}<span class="soft kind">{html(kind)}</span>'
        lines.append(
            f'<tr data-concept="{escape(concept)}"><th scope="row">{name}</th>{"".join(row)}</tr>'
        )
    caption = "Concepts and models: what carries them, with the effect [95 %] and its share of the ceiling"
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="Runs by concept and model">\n'
        f'<table class="cards matrix" id="matrix">\n<caption>{caption}</caption>\n'
        f'<thead><tr><th scope="col">concept</th>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody>\n</table>\n</div>"
    )


def _cell(entry: Entry, scale: Scale) -> str:
    """One run in the matrix."""
    run, row = entry.run, entry.row
    data = {"state": entry.state, "kind": entry.kind}
    title = f"{_run_link(run, entry.name)}: " if entry.name else ""
    if not row:
        inner = f"<p>{title}{failure(run, at=f'{run.address}/')} {_run_link(run, 'its page')}</p>"
    else:
        if row["start"] is not None:
            data |= {"start": row["start"], "estimate": row["estimate"], "share": row["share"]}
        strip = link(f"{run.address}/index.html", _strip(entry, scale))
        place = (
            f'<strong class="place">{_run_link(run, _place(row))}</strong> '
            if row["start"] is not None
            else ""
        )
        beside = f" {html(_published(run))}" if _published(run) else ""
        inner = f"{strip}<p>{title}{place}{html(_effect(row))} {_verdict(entry)}{beside}</p>"
        inner += f'<p class="soft">{_pictures(entry, IN_INDEX)} {_data(run)}</p>'
    attributes = "".join(
        f' data-{name}="{escape(str(v))}"' for name, v in data.items() if not missing(v) and v != ""
    )
    return f'<div class="run"{attributes}>{inner}</div>'


def _published(run: Finished) -> str:
    """Where the authors of LocoGen found a concept of that kind in that model, if they say so."""
    start = run.facts.get("published")
    return f"published: from layer {start}" if isinstance(start, int) else ""


# --- a model, a concept --------------------------------------------------------------------------


def _comparison(found: Sequence[Entry], by: str, others: Addresses, scale: Scale) -> Html:
    """A row a run: strip, carrier, effect and share; failed ones with their error."""
    rows = []
    for entry in found:
        name = _name(entry, by)
        first = Html(
            f"{link(others[name], name)} <span class='soft kind'>{html(entry.kind)}</span>"
        )
        verdict: Any = (
            _verdict(entry, reason=True)
            if entry.row
            else failure(entry.run, at=f"{entry.run.address}/")
        )
        told: list[Any] = ["–", "–", "–", "–"]
        if entry.row:
            place = ", ".join(filter(None, (_place(entry.row), _published(entry.run))))
            told = [("strips", _strip(entry, scale)), ("number", place), *_amounts(entry.row)]
        page_link = _run_link(entry.run, entry.name or "run")
        rows.append([first, *told, ("verdict", verdict), Html(f"{page_link} {_data(entry.run)}")])
    heads = (
        by,
        "effect of each window",
        "carrier",
        "effect [95 %]",
        "of the ceiling",
        "verdict",
        "run and data",
    )
    return table(
        heads,
        rows,
        caption="All on one scale; each run opens its page, the tables behind it are CSV",
    )


def _card(entry: Entry, by: str, bounds: Scale) -> str:
    """One run's curve and pictures, with its finding for a caption."""
    words = sentence(entry.row)
    curve = image(
        small_curve(entry.effects, entry.concept, bounds),
        f"Effect of each window. {words}",
        width=380,
    )
    heading = link(f"{entry.run.address}/index.html", _whole_name(entry, by))
    return (
        f'<figure><figcaption><h3>{heading}</h3></figcaption><span class="card">{curve}</span>'
        f"<p>{html(words)}</p>{_pictures(entry, IN_ROW)}</figure>"
    )


def _numbers(found: Sequence[Entry], by: str) -> str:
    """All effects with their intervals as a table: windows down, runs across, in an element that opens."""
    places = sorted({int(place) for entry in found for place in entry.rows["position"]})
    columns = [
        {int(row["position"]): row for row in entry.rows.to_dict("records")} for entry in found
    ]
    lines = [
        [
            Html(f"{at}"),
            *(("number", _amount(column[at]) if at in column else "–") for column in columns),
        ]
        for at in places
    ]
    names = [_whole_name(entry, by) for entry in found]
    inner = table(("window start", *names), lines, caption="Effect of each window [95 %]").replace(
        ' class="cards"', ""
    )
    return f"<details><summary>The numbers behind the figures</summary>{inner}</details>"


# --- pieces of both ------------------------------------------------------------------------------


def _name(entry: Entry, by: str) -> str:
    return entry.concept if by == "concept" else entry.run.model


def _whole_name(entry: Entry, by: str) -> str:
    return _name(entry, by) + (f" · {entry.name}" if entry.name else "")


def _strip(entry: Entry, scale: Scale) -> Html:
    row, places = entry.row, list(entry.rows["position"])
    marked = places.index(row["start"]) if row["start"] in places else None
    picture = heat_strip(entry.rows["estimate"], scale, marked=marked)
    return image(picture, f"{entry.run.model}, {sentence(row, short=True)}", _class="strip")


def _place(row: Mapping[str, Any]) -> str:
    if row["start"] is None:
        return "–"
    start, width = row["start"], row["width"]
    return f"layer {start}" if width == 1 else f"layers {start}–{start + width - 1}"


def _amount(row: Mapping[str, Any]) -> str:
    digits = precision(row["estimate"])
    return number(row["estimate"], digits) + interval(row, digits)


def _amounts(row: Mapping[str, Any]) -> list[Any]:
    """Effect with its interval and share of the ceiling, as cells; dashes where no window was found."""
    if row["start"] is None:
        return ["–", "–"]
    share = "–" if missing(row["share"]) else f"{number(100 * row['share'], 0)} %"
    return [("number", _amount(row)), ("number", share)]


def _effect(row: Mapping[str, Any]) -> str:
    if row["start"] is None:
        return ""
    return _amount(row) + ("" if missing(row["share"]) else f", {number(100 * row['share'], 0)} %")


def _verdict(entry: Entry, *, reason: bool = False) -> Html:
    words, kind = STATES[entry.state]
    given = str(entry.row.get("reason") or "") if reason or entry.state == "none" else ""
    told = f'<strong class="{kind}">{words}</strong>' if kind else f"<strong>{words}</strong>"
    return Html(told + (f": {html(given)}" if given else ""))


def _pictures(entry: Entry, size: int) -> str:
    """The entry's pictures made small, each a link to the whole one."""
    shown = []
    for label, file in entry.pictures.items():
        if size == IN_INDEX and label == "ceiling":
            continue
        if (small := small_picture(file, size)) is None:
            continue
        told = (
            label
            if label in ("baseline", "ceiling")
            else f"layers {label.replace('-', '–')} replaced"
        )
        picture = image(
            small, f"{entry.concept} in {entry.run.model}: {told}", "webp", width=size * 3 // 4
        )
        words = "" if size == IN_INDEX else html(told)
        shown.append(
            f'<a href="{entry.run.address}/pictures/{quote(file.name)}">{picture}{words}</a>'
        )
    return f'<span class="pictures">{" ".join(shown)}</span>' if shown else ""


def _run_link(run: Finished, text: str) -> Html:
    return link(f"{run.address}/index.html", text)


def _outcome(run: Finished) -> Html:
    return (
        failure(run, at=f"{run.address}/")
        if run.error
        else Html(html(run.facts.get("finding") or "–"))
    )


def _data(run: Finished) -> Html:
    return Html(" ".join(data_links(run, at=f"{run.address}/").values()) or "–")
