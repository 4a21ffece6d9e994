"""HTML from templates: every value is escaped, except `markupsafe.Markup`.

The templates of a package stand in its folder `templates/`. Those in `locogen/templates/` are what
objects show of themselves in a notebook.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@cache
def environment(package: str) -> Environment:
    """What renders the templates of a package: values are escaped, a missing one is an error.

    Args:
        package: Its dotted name, such as "locogen.pages".

    Returns:
        The environment, the same one for each call.
    """
    rendering = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        undefined=StrictUndefined,
        # Lines that hold only a statement of the template leave no blank line in the HTML.
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    rendering.filters["breakable"] = breakable
    return rendering


_LONG_WORD = 16  # characters: shorter ones fit on a line of any screen
# Where a long word of a program has a joint: behind "_", "/" and ".", and before a capital.
_JOINT = re.compile(r"(?<=[_/])(?=\w)|(?<=\.)(?=[a-z])|(?<=[a-z])(?=[A-Z])")


def breakable(text: str) -> Markup:
    """Words for a page whose long names may take two lines, each broken where its parts meet.

    Args:
        text: Any text; it is escaped.

    Returns:
        The same words. What is copied from the page has nothing in it that `text` has not.

    Example:
        >>> print(breakable("dynamic_thresholding_ratio: 1 < 2"))
        dynamic_<wbr>thresholding_<wbr>ratio: 1 &lt; 2
    """
    pieces = []
    for word in re.split(r"(\s+)", text):
        parts = _JOINT.split(word) if len(word) >= _LONG_WORD else [word]
        pieces.append(Markup("<wbr>").join(parts))
    return Markup("").join(pieces)


@cache
def macros(package: str, template: str) -> Any:
    """The macros of a template, as functions: values in, HTML out.

    Args:
        package: The package that has it.
        template: A file of the package's folder `templates/`.

    Returns:
        The template as a module.
    """
    return environment(package).get_template(template).module


def shown(kind: str, **values: Any) -> str:
    """What an object shows of itself in a notebook.

    Args:
        kind: The macro of `locogen/templates/objects.html` that shows it.
        **values: The macro's arguments.

    Returns:
        The HTML.

    Example:
        >>> print(shown("facts", facts={"prompt": "<b>", "seed": 0}))
        <p>prompt &lt;b&gt; · seed 0</p>
    """
    return str(getattr(macros("locogen", "objects.html"), kind)(**values))


_MISSING = "–"
_DIGITS = 2  # of numbers that stand alone in a sentence, at least
_ROUNDING = 1e-6  # of the largest of several numbers
_LEFT = "text-align: left"
_LONG = 40  # characters of a cell, from which on it may take several lines
# The head of a table whose index has names: its headings, and below them these names.
_TWO_HEADINGS = re.compile(r"<thead>\s*<tr[^>]*>(.*?)</tr>\s*<tr>(.*?)</tr>\s*</thead>", re.DOTALL)
_P_VALUE = re.compile(r"p(_.*)?|.*p_value")  # the names of columns that have p-values
_NUMBER = re.compile(r"(< )?[-−+]?[\d.]*( ?%)?( \[.*\])?|–")


def table_html(table: Any) -> Markup:
    """A pandas table as notebooks show it: pandas escapes what is in it."""
    return Markup(readable(table)._repr_html_())


def number(value: float, digits: int = 2) -> str:
    """A number for people: a true minus sign, no minus before zero, and a dash for NaN."""
    if math.isnan(value):
        return _MISSING
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("-") and not float(text) else text.replace("-", "−")


def percent(share: float) -> str:
    """Write a share in whole percent.

    Args:
        share: A share of one; it may be negative, or above one.

    Returns:
        The number and its sign, written as `number` does; a dash for NaN.

    Example:
        >>> percent(0.456)
        '46 %'
    """
    text = number(100 * share, 0)
    return text if text == _MISSING else f"{text} %"


def precision(*values: float, ends: Sequence[float] = ()) -> int:
    """How many digits after the point numbers get that stand together.

    Args:
        *values: The numbers; NaN where one is missing.
        ends: Ends of an interval, which say whether it holds zero.

    Returns:
        Two at least; so many that the largest number has two digits that count, and that no end
        looks like zero which is none.

    Example:
        >>> precision(0.34, 0.012), precision(0.021), precision(0.2, ends=(0.004, 0.4))
        (2, 3, 3)
    """
    sizes = [abs(value) for value in (*values, *ends) if math.isfinite(value) and value]
    largest = max(sizes, default=1.0)
    # What is that much smaller is no end, but the rounding of sums.
    seen = [abs(end) for end in ends if abs(end) > _ROUNDING * largest]
    least = min(seen, default=largest)
    return max(_DIGITS, 1 + _place_of(largest), _place_of(least))


def _place_of(size: float) -> int:
    """The place after the point of its first digit that counts: 1 of 0.4, 3 of 0.004."""
    return -math.floor(math.log10(size))


def counted(count: float, noun: str) -> str:
    """A count with its noun.

    Example:
        >>> counted(1, "prompt"), counted(6, "prompt")
        ('1 prompt', '6 prompts')
    """
    return f"{number(count, 0)} {noun}" + ("" if count == 1 else "s")


def interval_text(value: float, low: float, high: float) -> str:
    """Write an estimate with its interval.

    Args:
        value: The estimate.
        low: Lower end of its interval.
        high: Upper end.

    Returns:
        The three numbers, with a true minus sign and as many digits as `precision` says: an end
        that is not zero does not look like it. The estimate alone where it has no interval (NaN).

    Example:
        >>> interval_text(0.2, 0.104, 0.3)
        '0.20 [0.10, 0.30]'
        >>> interval_text(0.012, -0.001, 0.0249)
        '0.012 [−0.001, 0.025]'
    """
    # One prompt under one seed has no interval.
    if math.isnan(low) or math.isnan(high):
        return number(value, precision(value))
    digits = precision(value, ends=(low, high))
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def readable(table: Any, digits: int = 3) -> Any:
    """A table as people read it, for display alone: every cell becomes text.

    Args:
        table: A pandas table, with or without an index of names.
        digits: Of numbers that are not whole.

    Returns:
        A table of the same shape: "–" where a value or a name is missing, no minus before zero, and
        as many digits in each number; a p-value that these digits cannot tell from zero is "<" the
        least that they can. A notebook shows its words whole, and aligned on the left.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"low": [-0.0001, float("nan")], "n": [3, None]}, dtype="Float64")
        >>> print(readable(table.astype({"n": "Int64"}), 2))
            low  n
        0  0.00  3
        1     –  –
    """
    import pandas as pd

    texts = table.astype(object)
    for place in range(texts.shape[1]):  # two columns may have one name
        write = _p_value if _has_p_values(texts.columns[place]) else _cell
        column = [write(value, digits) for value in texts.iloc[:, place]]
        # As an object each: pandas would read a column of lists as a table.
        texts.isetitem(place, pd.Series(column, index=texts.index, dtype=object))
    for axis in (0, 1):
        texts = texts.set_axis(_named(texts.axes[axis]), axis=axis)
    return _readable_class()(texts)


def _has_p_values(name: Any) -> bool:
    last = name[-1] if isinstance(name, tuple) and name else name
    return _P_VALUE.fullmatch(str(last)) is not None


def _named(labels: Any) -> Any:
    """The labels of an axis, as people read them; the same axis where they are that already."""
    originals = list(labels)  # once: each walk over some indices makes its labels anew
    texts = [_label(label) for label in originals]
    if all(text is label for text, label in zip(texts, originals, strict=True)):
        return labels
    import pandas as pd

    if labels.nlevels > 1:
        return pd.MultiIndex.from_tuples(texts, names=labels.names)
    return pd.Index(texts, dtype=object, name=labels.name)


def _label(label: Any) -> Any:
    """One name of a row or column. Numbers keep their digits: they tell the rows apart."""
    import pandas as pd

    if isinstance(label, tuple):
        parts = tuple(map(_label, label))
        return label if all(a is b for a, b in zip(parts, label, strict=True)) else parts
    if pd.api.types.is_scalar(label) and pd.isna(label):
        return _MISSING
    if pd.api.types.is_number(label) and str(label).startswith("-"):
        return str(label).replace("-", "−" if label else "")
    return label


@cache
def _readable_class() -> Any:
    """The class of readable tables; made when it is needed, for pandas takes long to import."""
    import pandas as pd

    class Readable(pd.DataFrame):
        """A table whose HTML has its words whole and on the left, and one row of headings."""

        def _repr_html_(self) -> str:
            with pd.option_context("display.max_colwidth", None):
                html = super()._repr_html_() or ""
            if self.columns.nlevels == 1 and self.columns.name is None:
                html = _TWO_HEADINGS.sub(_one_heading, html)
            columns = [self.iloc[:, place] for place in range(self.shape[1])]
            return _aligned(html, [_cell_style(column) for column in columns])

    return Readable


def _cell_style(column: Any) -> str:
    """Words are read from the left, numbers by their ends; long words take several lines."""
    words = [cell for cell in column if isinstance(cell, str) and _NUMBER.fullmatch(cell) is None]
    if not words:
        return ""
    is_long = max(map(len, words)) > _LONG
    return _LEFT + ("; white-space: normal; min-width: 16em" if is_long else "")


def _one_heading(head: re.Match[str]) -> str:
    """The names of the index stand in a row of their own: they fill the gaps of the first one."""
    first, second = (re.findall("<th>(.*?)</th>", row, re.DOTALL) for row in head.groups())
    cells = "".join(
        f"<th>{above or below}</th>" for above, below in zip(first, second, strict=True)
    )
    return f'<thead><tr style="text-align: right">{cells}</tr></thead>'


def _aligned(html: str, styles: Sequence[str]) -> str:
    """The HTML of a table with the style of each column in its cells, its heading included."""
    rows = []
    for row in html.split("</tr>"):
        tag = "<td>" if "<td>" in row else "<th>"
        cells = row.split(tag)
        # The cells of the columns are the last ones of a row. Where columns were left out, and in
        # a heading of several columns, no cell is known by its place.
        if len(cells) > len(styles):
            first = len(cells) - len(styles)
            for place, style in enumerate(styles, first):
                start = tag.replace(">", f' style="{style}">') if style else tag
                cells[place] = start + cells[place]
            rows.append(tag.join(cells[:first]) + "".join(cells[first:]))
        else:
            rows.append(row)
    return "</tr>".join(rows)


def _cell(value: Any, digits: int) -> Any:
    """One cell as text; what is neither a number nor missing stays."""
    import pandas as pd

    if isinstance(value, (list, tuple)):
        cells = [_cell(element, digits) for element in value]
        return cells if isinstance(value, list) else tuple(cells)
    # Lists and tables are cells too, and of these pandas would answer for each element.
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return _MISSING
    if pd.api.types.is_float(value):
        return number(value, digits)
    if pd.api.types.is_integer(value) and value < 0:
        return str(value).replace("-", "−")
    return value


def _p_value(value: Any, digits: int) -> Any:
    """One p-value as text: none is zero."""
    import pandas as pd

    least = 10**-digits
    if pd.api.types.is_float(value) and 0 <= value < least:
        return f"< {number(least, digits)}"
    return _cell(value, digits)
