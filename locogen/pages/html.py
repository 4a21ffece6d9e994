"""HTML for the pages: the shell around them, tables, figures, footers.

A page is one file that asks nothing of the outside: its own style, pictures inside it, and no script but the index's
own. A content security policy says so once more to the browser, and names style and script by their hashes. What
people typed (titles, names, errors) is escaped here; what notebooks show goes through `locogen.pages.cleaning`.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

POLICY = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
LARGEST_PICTURE = (
    50_000_000  # pixels; a file of a few kilobytes may claim more than the memory holds
)


class Html(str):
    """Text that is HTML already and needs no escaping."""

    __slots__ = ()


def html(value: Any) -> str:
    """A value as HTML: escaped, unless it is `Html`."""
    return value if isinstance(value, Html) else escape(str(value))


def link(address: str, text: Any) -> Html:
    """A link to a file beside the page; `text` may be a picture."""
    return Html(f'<a href="{escape(address)}">{html(text)}</a>')


def page(
    title: str,
    body: str,
    *,
    navigation: Iterable[Html] = (),
    script: str = "",
    inline: bool = False,
    source: str = "",
) -> str:
    """A whole page around `body`.

    `script`: of locogen's templates, the only one that may run; `inline`: allow style attributes, as notebooks have
    them; `source`: a hash of what the page was made of.
    """
    nav, style = "".join(navigation), f"\n{template('page.css')}"
    run = template(script) if script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy(style, run, inline=inline)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="locogen">\n'
        + (f'<meta name="source" content="{escape(source)}">\n' if source else "")
        + f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{style}</style>\n</head>\n<body>\n'
        '<a class="skip" href="#main">Skip to the content</a>\n'
        + (f'<nav aria-label="Pages and data">{nav}</nav>\n' if nav else "")
        + f'<main id="main">\n{body}\n</main>\n'
        + (f"<script>{run}</script>\n" if run else "")
        + "</body>\n</html>\n"
    )


def policy(style: str, script: str = "", *, inline: bool = False) -> str:
    """The content security policy of a page with this style and script, and nothing else."""
    told = f"{POLICY}; style-src {_hashed(style)}"
    told += "; style-src-attr 'unsafe-inline'" if inline else ""
    return told + (f"; script-src {_hashed(script)}" if script else "")


def _hashed(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def template(name: str) -> str:
    """A file of `locogen/pages/templates`."""
    return files("locogen.pages").joinpath("templates", name).read_text(encoding="utf-8")


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
        lines = "".join(
            f"<dt>{html(name)}</dt><dd>{_fact(value)}</dd>" for name, value in values.items()
        )
        if lines:
            parts.append(f"<section><h3>{escape(title)}</h3><dl>{lines}</dl></section>")
    return Html(f'<div class="facts">{"".join(parts)}</div>')


def _fact(value: Any) -> str:
    """A value in words; of a long group of values the first, and the others in an element that opens."""
    text = html(_plain(value))
    if not isinstance(value, Mapping) or len(text) < 100:
        return text
    name, first = next(iter(value.items()))
    summary = f"{name}: {_plain(first)}"[:60] + f" and {len(value) - 1} more"
    return f"<details><summary>{escape(summary)}</summary>{text}</details>"


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, str | list | tuple | Mapping) and not value):
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    return (
        ", ".join(str(_plain(inner)) for inner in value)
        if isinstance(value, list | tuple)
        else value
    )


def image(data: bytes, alt: str, kind: str = "png", **attributes: Any) -> Html:
    """A picture inside the page; further attributes as they are, `_class` for the class."""
    given = "".join(
        f' {name.lstrip("_")}="{escape(str(value))}"' for name, value in attributes.items()
    )
    encoded = base64.b64encode(data).decode()
    return Html(f'<img src="data:image/{kind};base64,{encoded}" alt="{escape(alt)}"{given}>')


def png_width(png: bytes) -> int:
    """Pixels across, from the head of a PNG; 0 for anything else."""
    return int.from_bytes(png[16:20], "big") if png[:4] == b"\x89PNG" else 0


def png_pixels(png: bytes) -> int:
    """Pixels in all, from the head of a PNG; 0 for anything else."""
    return png_width(png) * int.from_bytes(png[20:24], "big")


def check_size(png: bytes) -> None:
    """Raise `ValueError` for a PNG, of which the head will do, that would take too much memory to open."""
    if png_pixels(png) > LARGEST_PICTURE:
        height = int.from_bytes(png[20:24], "big")
        raise ValueError(
            f"a picture of {png_width(png)} × {height} pixels is too large to be opened"
        )


def shrink(data: str) -> str:
    """A base64 PNG in fewer bytes, without loss: no idle alpha, a palette where colors are few.

    Args:
        data: The PNG, in base64.

    Returns:
        It, or a smaller one that looks the same.

    Raises:
        ValueError: It is no base64, or too large a picture; for what is no PNG, Pillow's error.
    """
    from PIL import Image

    raw = base64.b64decode(data)
    check_size(raw)
    image = Image.open(io.BytesIO(raw), formats=["PNG"])
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (255, 255):
        image = image.convert("RGB")
    if image.mode == "RGB" and image.getcolors(256) is not None:
        image = image.quantize(256)
    image.save(small := io.BytesIO(), "PNG")
    best = min(raw, small.getvalue(), key=len)
    return base64.b64encode(best).decode()
