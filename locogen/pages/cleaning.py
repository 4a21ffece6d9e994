"""Whatever a notebook shows, made harmless and fitted into a page.

A concept may be called `<script>alert(1)</script>`, and a notebook may print anything. Two steps:

1. `nh3` (the Ammonia sanitizer) parses the HTML as browsers do, and writes only the tags and
   attributes that are listed here. Nothing in the result runs or loads anything.
2. A `Rewriter` walks over that well-formed HTML and arranges it: links and pictures that would lead
   out of the results folder become text, and an `Arranger` puts figures on cards as well.
"""

from __future__ import annotations

import base64
import re
from html import escape
from html.parser import HTMLParser

import nh3
from markupsafe import Markup

from locogen.pages.png import size_of

# What a page may link to: itself, and files in the run's folder.
SIBLINGS = {
    "index.html",
    "code.html",
    "notebook.ipynb",
    "pictures.csv",
    "effects.csv",
    "../index.html",
}
NO_ALT = "A figure without a description."
_NO_ALT = {"", NO_ALT, "No description has been provided for this image"}  # the last: nbconvert's
_WIDE = 700  # pixels; on a narrow screen a wider figure scrolls on its card

# --- what is allowed -----------------------------------------------------------------------------

_VOID = {"br", "hr", "img", "wbr", "col"}  # tags without an end
_PAIRED = """
    a abbr b blockquote caption code colgroup dd del details div dl dt em figcaption figure h1 h2 h3
    h4 h5 h6 i ins kbd li mark ol p pre q s samp small span strong sub summary sup table tbody td
    tfoot th thead tr tt u ul var
"""
# The content of any other tag stays, but not of these: it is not meant to be read.
_DROPPED_WITH_CONTENT = """
    script style iframe object template svg math title head textarea select noscript audio video
"""
_ATTRIBUTES = {
    "*": {"id", "class", "title", "lang", "dir", "style"},
    "a": {"href"},
    "img": {"src", "alt", "width", "height"},
    "td": {"colspan", "rowspan"},
    "th": {"colspan", "rowspan", "scope"},
    "ol": {"start"},
    "details": {"open"},
}
_MAY_BE_EMPTY = ("alt", "open")
_VALUES = {
    "id": re.compile(r"[\w-]+"),
    "src": re.compile(r"data:image/(png|jpeg|gif|webp|svg\+xml);base64,[A-Za-z0-9+/=\s]*"),
    # The scheme "data" is allowed for pictures; a link could open a page of scripts with it.
    "href": re.compile(r"(?!\s*data:).*", re.IGNORECASE | re.DOTALL),
}
# Only layout: colors are the page's, for light and dark. No value may load or compute.
_STYLE = re.compile(
    r"(text-align|vertical-align|display|flex|flex-wrap|gap|grid-template-columns|width|max-width"
    r"|min-width|image-rendering|white-space|font-weight|margin(-\w+)?|padding(-\w+)?)"
    r"\s*:\s*(?!.*(url|expression))[\w\s.%,()-]+",
    re.IGNORECASE,
)


def _allowed_value(tag: str, name: str, value: str) -> str | None:
    """An attribute's value as far as it is allowed; None removes the attribute."""
    if name == "style":
        rules = [rule.strip() for rule in value.split(";")]
        value = "; ".join(rule for rule in rules if _STYLE.fullmatch(rule))
    if name == "id":
        value = value.replace("=", "-")  # nbconvert's cells have "cell-id=5"
    if name in _VALUES and not _VALUES[name].fullmatch(value):
        return None
    if not value and name not in _MAY_BE_EMPTY:
        return None
    return value


_SANITIZER = nh3.Cleaner(
    tags=_VOID | set(_PAIRED.split()),
    clean_content_tags=set(_DROPPED_WITH_CONTENT.split()),
    attributes=_ATTRIBUTES,
    attribute_filter=_allowed_value,
    url_schemes={"http", "https", "mailto", "data"},
    link_rel=None,
)


def clean(fragment: str) -> Markup:
    """Notebook HTML with only harmless tags and attributes left, and every tag closed.

    Args:
        fragment: HTML of any kind, broken or malicious.

    Returns:
        Links lead to the page itself or the files next to it; others become text with their
        address. Pictures are inside the page, or replaced by their alternative text.
    """
    return Rewriter().rewrite(fragment)


def arrange(fragment: str, *, figures_at: str = "") -> tuple[Markup, list[str]]:
    """Clean a notebook's HTML, and fit it into a page.

    Headings go down a level, since the page has its own. Figures go on numbered cards, and tables
    can be scrolled.

    Args:
        fragment: The notebook as HTML.
        figures_at: The address of a page that shows the figures: they are linked, with their
            descriptions. Empty: they are shown.

    Returns:
        The HTML, and the ids of figures without a description.
    """
    arranger = Arranger(figures_at)
    return arranger.rewrite(fragment), arranger.undescribed


class Rewriter(HTMLParser):
    """Writes sanitized HTML again, without what leads out of the results folder."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []  # all HTML so far
        self.closings: list[str] = []  # what closes each open tag

    def rewrite(self, fragment: str) -> Markup:
        """Sanitize a fragment, and write it again."""
        # Every tag of nh3's output is closed in the right order, so a stack of closings suffices.
        self.feed(_SANITIZER.clean(fragment))
        self.close()
        return Markup("".join(self.parts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Write a tag; links and pictures need a closer look."""
        attributes = {name: value or "" for name, value in attrs}
        if tag == "a":
            self.start_link(attributes)
        elif tag == "img":
            self.write_picture(attributes)
        else:
            self.start(tag, attributes)

    def handle_endtag(self, tag: str) -> None:
        """Close the tag that was opened last."""
        self.parts.append(self.closings.pop())

    def handle_data(self, data: str) -> None:
        """Text stays text."""
        self.parts.append(escape(data, quote=False))

    def start(self, tag: str, attributes: dict[str, str], closing: str = "") -> None:
        """Write a tag and remember what closes it; `closing`: if that is not only its end tag."""
        self.parts.append(f"<{tag}{_attributes(attributes)}>")
        # HTML ignores one line break after <pre>, so nh3 has removed it. Without another one, the
        # browser would remove the output's first blank line.
        if tag == "pre":
            self.parts.append("\n")
        if tag not in _VOID:
            self.closings.append(closing or f"</{tag}>")

    def start_link(self, attributes: dict[str, str]) -> None:
        """Write a link within the run's folder; any other becomes text, followed by its address."""
        address = attributes.get("href", "")
        closing = "</a>"
        if address and not address.startswith("#") and address not in SIBLINGS:
            del attributes["href"]
            shown = re.sub(r"^(https?:|mailto:)?(//)?", "", address).rstrip("/")
            if ":" not in shown:
                closing = Markup(' <span class="soft">({})</span></a>').format(shown)
        self.start("a", attributes, closing)

    def write_picture(self, attributes: dict[str, str]) -> None:
        """Write a picture that is inside the page; any other becomes its alternative text."""
        if "src" in attributes:
            self.show_picture(attributes)
        else:
            self.handle_data(f"[{attributes.get('alt') or 'a picture that is not in this page'}]")

    def show_picture(self, attributes: dict[str, str]) -> None:
        """Write a picture."""
        self.start("img", attributes)


class Arranger(Rewriter):
    """A `Rewriter` that also fits the notebook into its page: see `arrange`."""

    def __init__(self, figures_at: str) -> None:
        super().__init__()
        self.figures_at = figures_at
        self.undescribed: list[str] = []  # ids of figures
        self.figures = 0
        self.headings = 0

    def start(self, tag: str, attributes: dict[str, str], closing: str = "") -> None:
        """Write a tag: a heading one level down, a table within what scrolls it."""
        if re.fullmatch(r"h[1-5]", tag):
            lower = f"h{int(tag[1]) + 1}"
            # Of nbconvert's headings only the id is of use, for links; one with "?" was removed.
            self.headings += 1
            super().start(lower, {"id": attributes.get("id", f"section-{self.headings}")})
        elif tag == "table":
            # Focusable, so that it can be scrolled by keyboard.
            self.parts.append('<div class="scroll" tabindex="0" role="region" aria-label="Table">')
            super().start(tag, attributes, "</table></div>")
        else:
            super().start(tag, attributes, closing)

    def show_picture(self, attributes: dict[str, str]) -> None:
        """Write a figure with its number, or a link to it."""
        self.figures += 1
        name = f"figure-{self.figures}"
        if attributes.get("alt", "").strip() in _NO_ALT:
            self.undescribed.append(name)
            attributes["alt"] = NO_ALT

        if self.figures_at:
            link = Markup('<p class="soft"><a href="{}#{}">Figure {}</a>: {}</p>')
            self.parts.append(link.format(self.figures_at, name, self.figures, attributes["alt"]))
            return

        if _is_wide(attributes):
            attributes["class"] = "wide"
        # A plot is an output by itself; pictures within other HTML keep their place there.
        if self._is_alone():
            self.parts.append(f'<span class="card" tabindex="0" id="{name}">')
        else:
            self.parts.append(f'<span id="{name}">')
        super().show_picture(attributes)
        self.parts.append("</span>")

    def _is_alone(self) -> bool:
        """Whether what comes is a notebook's output by itself, judged by nbconvert's class."""
        before = "".join(self.parts[-2:])
        return re.search(r"output_(png|jpeg|svg)", before) is not None


def headings(fragment: str) -> list[tuple[str, str]]:
    """The ids and the words of the headings that `arrange` wrote, but for those of parts of parts.

    Args:
        fragment: The HTML of `arrange`.

    Returns:
        In the order of the page.
    """
    reader = _HeadingReader()
    reader.feed(fragment)
    reader.close()
    return [(name, " ".join(words.split())) for name, words in reader.found if words.strip()]


class _HeadingReader(HTMLParser):
    """Reads the headings of the second and the third level."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, str]] = []
        self._is_open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A heading begins."""
        name = dict(attrs).get("id")
        if tag in ("h2", "h3") and name:
            self.found.append((name, ""))
            self._is_open = True

    def handle_endtag(self, tag: str) -> None:
        """A heading ends."""
        if tag in ("h2", "h3"):
            self._is_open = False

    def handle_data(self, data: str) -> None:
        """The words of a heading."""
        if self._is_open:
            name, words = self.found[-1]
            self.found[-1] = (name, words + data)


def _is_wide(attributes: dict[str, str]) -> bool:
    """Whether a picture is shown too wide for a small screen."""
    # Pixels only: neither "50%" nor "auto" says how wide it will be.
    width = re.match(r"\s*(\d{1,9})(?!\d|\s*%)", attributes.get("width", ""))
    if width is not None and int(width[1]) > _WIDE:
        return True
    # 40 characters of base64 hold a PNG's first 24 bytes, in which its size stands.
    start = attributes["src"].partition(",")[2][:40]
    return size_of(base64.b64decode(start))[0] > _WIDE


def _attributes(attributes: dict[str, str]) -> str:
    return "".join(f' {name}="{escape(value)}"' for name, value in attributes.items())
