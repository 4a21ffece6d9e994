"""HTML for the pages: the shell around them, tables, figures, footers.

A page is one file that asks nothing of the outside: no script, its own style, pictures inside it; a content
security policy says so once more to the browser. What people typed (titles, names, errors) is escaped here;
what notebooks show goes through `locogen.cleaning`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

POLICY = "default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


class Html(str):
    """Text that is HTML already and needs no escaping."""

    __slots__ = ()


def html(value: Any) -> str:
    """A value as HTML: escaped, unless it is `Html`."""
    return value if isinstance(value, Html) else escape(str(value))


def link(address: str, text: str) -> Html:
    """A link to a file beside the page."""
    return Html(f'<a href="{escape(address)}">{escape(text)}</a>')


def page(title: str, body: str, *, navigation: Iterable[Html] = ()) -> str:
    """A whole page around `body`."""
    nav = "".join(navigation)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="locogen">\n<title>{escape(title)}</title>\n'
        f'<link rel="icon" href="data:,">\n<style>\n{_style()}</style>\n</head>\n<body>\n'
        '<a class="skip" href="#main">Skip to the content</a>\n'
        + (f'<nav aria-label="Pages and data">{nav}</nav>\n' if nav else "")
        + f'<main id="main">\n{body}\n</main>\n</body>\n</html>\n'
    )


@cache
def _style() -> str:
    return files("locogen").joinpath("templates", "page.css").read_text(encoding="utf-8")


def table(headings: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str) -> Html:
    """A table, on narrow screens a list of cards; a cell may be (class, value), the first heads its row."""
    head = "".join(f'<th scope="col">{html(heading)}</th>' for heading in headings)
    body = "\n".join("<tr>" + _cells(headings, row) + "</tr>" for row in rows)
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}">\n'
        '<table class="cards">\n'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
        "</table>\n</div>"
    )


def _cells(headings: Sequence[str], row: Sequence[Any]) -> str:
    cells = []
    for place, (heading, cell) in enumerate(zip(headings, row, strict=True)):
        kind, value = cell if isinstance(cell, tuple) else ("", cell)
        tag, scope = ("th", ' scope="row"') if place == 0 else ("td", "")
        kind = f' class="{kind}"' if kind else ""
        cells.append(f'<{tag}{scope}{kind} data-label="{escape(heading)}">{html(value)}</{tag}>')
    return "".join(cells)


def facts(groups: Mapping[str, Mapping[str, Any]]) -> Html:
    """Groups of names and values, for a footer."""
    parts = []
    for title, values in groups.items():
        lines = "".join(f"<dt>{html(name)}</dt><dd>{html(_plain(value))}</dd>" for name, value in values.items())
        if lines:
            parts.append(f"<section><h3>{escape(title)}</h3><dl>{lines}</dl></section>")
    return Html(f'<div class="facts">{"".join(parts)}</div>')


def _plain(value: Any) -> Any:
    if value is None or value == "":
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    return ", ".join(str(_plain(inner)) for inner in value) if isinstance(value, list | tuple) else value


def figure(png: bytes, alt: str, *, inches: float | None = None) -> Html:
    """A picture inside the page, on a white card; `inches`: how wide it was meant to be."""
    width = round(inches * 96) if inches else png_width(png)
    data = base64.b64encode(png).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}" width="{width}"{_wide(width)}>'
    return Html(f'<span class="card" tabindex="0">{image}</span>')


def _wide(width: int) -> str:
    return ' class="wide"' if width > 700 else ""


def png_width(png: bytes) -> int:
    """Pixels across, from the head of a PNG; 0 for anything else."""
    return int.from_bytes(png[16:20], "big") if png[:4] == b"\x89PNG" else 0


def shrink(data: str) -> str:
    """A base64 PNG in fewer bytes, without loss: no idle alpha, a palette where colors are few."""
    from PIL import Image

    raw = base64.b64decode(data)
    image = Image.open(io.BytesIO(raw))
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert("RGB")
    if image.mode == "RGB" and image.getcolors(256) is not None:
        image = image.quantize(256)
    image.save(small := io.BytesIO(), "PNG")
    best = min(raw, small.getvalue(), key=len)
    return base64.b64encode(best).decode()
