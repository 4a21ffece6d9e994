"""Whatever a notebook shows, made harmless and fitted into a page.

A concept may be called `<script>alert(1)</script>`, and a notebook may print what it likes: only tags and
attributes on a list get through, rewritten and closed one by one, so nothing runs and nothing is fetched.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping
from html import escape
from html.parser import HTMLParser

from locogen.pages.html import link, png_width

SIBLINGS = {
    "index.html",
    "code.html",
    "notebook.ipynb",
    "pictures.csv",
    "effects.csv",
    "../index.html",
}
NO_ALT = "A figure without a description."
_NO_ALT = {"", NO_ALT, "No description has been provided for this image"}  # the last is nbconvert's

_VOID = {"br", "hr", "img", "wbr", "col"}
_PLAIN = """
    a abbr b blockquote caption code colgroup dd del details div dl dt em figcaption figure h1 h2 h3
    h4 h5 h6 i ins kbd li mark ol p pre q s samp small span strong sub summary sup table tbody td
    tfoot th thead tr tt u ul var
"""
_HIDDEN = (
    "script style iframe object template svg math title head textarea select noscript audio video"
)
_TAGS = _VOID | set(_PLAIN.split())
_GONE = set(_HIDDEN.split())
_EVERYWHERE = {"id", "class", "title", "lang", "dir", "style"}
_ATTRIBUTES = {
    "a": {"href"},
    "img": {"src", "alt", "width", "height"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan", "scope"},
    "ol": {"start"},
    "details": {"open"},
}
_STYLES = re.compile(  # layout only: colors are the page's, for light and dark
    r"(text-align|vertical-align|display|flex|flex-wrap|gap|grid-template-columns|width|max-width|min-width"
    r"|image-rendering|white-space|font-weight|margin(-\w+)?|padding(-\w+)?)\s*:\s*[\w\s.%,()-]+"
)
_PICTURE = re.compile(r"data:image/(png|jpeg|gif|webp|svg\+xml);base64,[A-Za-z0-9+/=\s]*")


def clean(fragment: str) -> str:
    """HTML from a notebook with only harmless tags and attributes left, and every tag closed.

    Links lead to the page itself or the files beside it; others become text with their address. Pictures are
    inside the page or gone.
    """
    return _parsed(fragment, Cleaner())


def arrange(fragment: str, *, figures_at: str = "") -> tuple[str, list[str]]:
    """Cleaned notebook HTML made ready for a page, and the figures that have no description.

    Headings go down a level, since the page has its own; figures go on numbered cards and tables scroll. With
    `figures_at`, the address of a page that shows them, figures are links with their descriptions instead.
    """
    arranger = Arranger(figures_at)
    return _parsed(fragment, arranger), arranger.silent


def _parsed(fragment: str, parser: Cleaner) -> str:
    try:
        parser.feed(fragment)
        parser.close()
    except AssertionError:  # html.parser gives up on some broken declarations
        return f"<pre>{escape(fragment)}</pre>"
    return "".join(parser.parts)


class Cleaner(HTMLParser):
    """Writes what it reads again, allowed tags and attributes only; `parts` is the result."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.open: list[tuple[str, str]] = []  # (tag, what closes it)
        self.gone: list[str] = []  # open tags whose content is dropped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Write an allowed tag; drop another, some with all they hold."""
        if tag in _GONE:
            self.gone.append(tag)
        elif tag in _TAGS and not self.gone:
            self.start(tag, dict(self._allowed(tag, attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """As a start and an end."""
        if tag not in _GONE:
            self.handle_starttag(tag, attrs)
            if tag not in _VOID:
                self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        """Close what is open up to this tag; ignore an end without a start."""
        if self.gone:
            if tag in self.gone:
                del self.gone[self.gone.index(tag) :]
        elif tag in (opened for opened, _ in self.open):
            while self.open:
                opened, closing = self.open.pop()
                self.parts.append(closing)
                if opened == tag:
                    break

    def handle_data(self, data: str) -> None:
        """Text stays text."""
        if not self.gone:
            self.parts.append(escape(data, quote=False))

    def close(self) -> None:
        """Close what is still open."""
        super().close()
        self.parts += [closing for _, closing in reversed(self.open)]
        self.open.clear()

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """Write an allowed tag and remember how to close it."""
        closing = f"</{tag}>"
        if (
            tag == "a"
            and not attributes.get("href", "#").startswith("#")
            and attributes["href"] not in SIBLINGS
        ):
            address = re.sub(r"^(https?:|mailto:)?(//)?", "", attributes.pop("href")).rstrip("/")
            closing = (
                f' <span class="soft">({escape(address)})</span></a>'
                if ":" not in address
                else closing
            )
        if tag == "img" and not _PICTURE.fullmatch(attributes.get("src", "")):
            self.parts.append(
                f"[{escape(attributes.get('alt') or 'a picture that is not in this page')}]"
            )
            return
        self.write(tag, attributes, closing)

    def write(self, tag: str, attributes: dict[str, str], closing: str) -> None:
        """Put a tag on the page, and what closes it on the stack."""
        text = "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
        self.parts.append(f"<{tag}{text}>")
        if tag not in _VOID:
            self.open.append((tag, closing))

    @staticmethod
    def _allowed(tag: str, attrs: list[tuple[str, str | None]]) -> Iterable[tuple[str, str]]:
        for name, given in attrs:
            value = given or ""
            if name == "style":
                value = "; ".join(
                    part.strip() for part in value.split(";") if _STYLES.fullmatch(part.strip())
                )
            if name == "id":  # nbconvert's cells have "cell-id=5"
                value = value.replace("=", "-")
            if name == "id" and not re.fullmatch(r"[\w-]+", value):
                continue
            if name in _EVERYWHERE | _ATTRIBUTES.get(tag, set()) and (
                value or name in ("alt", "open")
            ):
                yield name, value


class Arranger(Cleaner):
    """A `Cleaner` that also fits the notebook into its page: see `arrange`."""

    def __init__(self, figures_at: str) -> None:
        super().__init__()
        self.figures_at = figures_at
        self.silent: list[str] = []
        self.figures = 0

    def write(self, tag: str, attributes: dict[str, str], closing: str) -> None:
        """Fit headings, figures and tables into the page."""
        if re.fullmatch(r"h[1-5]", tag):
            tag = f"h{int(tag[1]) + 1}"
            self.parts.append(f"<{tag}{_id(attributes)}>")
            self.open.append((f"h{int(tag[1]) - 1}", f"</{tag}>"))
        elif tag == "img":
            self._figure(attributes)
        elif tag == "table":
            self.parts.append('<div class="scroll" tabindex="0" role="region" aria-label="Table">')
            super().write(tag, attributes, "</table></div>")
        else:
            super().write(tag, attributes, closing)

    def _figure(self, attributes: dict[str, str]) -> None:
        self.figures += 1
        name = f"figure-{self.figures}"
        if attributes.get("alt", "").strip() in _NO_ALT:
            self.silent.append(name)
            attributes["alt"] = NO_ALT
        if self.figures_at:
            shown = link(f"{self.figures_at}#{name}", f"Figure {self.figures}")
            self.parts.append(f'<p class="soft">{shown}: {escape(attributes["alt"])}</p>')
            return
        alone = any(
            "output_png" in part or "output_jpeg" in part or "output_svg" in part
            for part in self.parts[-2:]
        )
        self.parts.append(
            f'<span class="card" tabindex="0" id="{name}">' if alone else f'<span id="{name}">'
        )
        head = base64.b64decode(attributes["src"].partition(",")[2][:40] or "")
        asked = re.match(
            r"\s*(\d{1,9})(?!\d|\s*%)", attributes.get("width", "")
        )  # pixels: "50%" says no width, nor "auto"
        if (asked and int(asked[1]) > 700) or png_width(head) > 700:
            attributes["class"] = "wide"
        super().write("img", attributes, "")
        self.parts.append("</span>")


def _id(attributes: Mapping[str, str]) -> str:
    return f' id="{escape(attributes["id"])}"' if "id" in attributes else ""
