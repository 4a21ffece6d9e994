"""What objects show of themselves in a notebook: each value escaped, and nothing else changed."""

import re

import pandas as pd
import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

from locogen import markup

EVIL = "<script>alert('x')</script>"
QUOTE = '" onerror="x'

OBJECTS = {
    "run": dict(
        count=1,
        settings={EVIL: EVIL},
        pictures=[{"alt": QUOTE, "source": EVIL}],
        table=EVIL,
    ),
    "edit": dict(name=EVIL, facts={EVIL: EVIL}),
    "neurons": dict(
        concept=EVIL, distinct=1, count=2, alpha=0.05, settings={EVIL: EVIL}, table=EVIL
    ),
    "selection": dict(count=1, places=[{"layer": EVIL, "matrix": EVIL, "count": 1}]),
}


def tags(html: str) -> set[str]:
    return set(re.findall(r"<(\w+)", html))


@pytest.mark.parametrize("kind", OBJECTS)
def test_every_value_is_escaped(kind: str) -> None:
    html = markup.shown(kind, **OBJECTS[kind])
    assert tags(html) <= {"p", "b", "div", "img", "table", "tr", "th", "td"}
    assert "&lt;script" in html and QUOTE not in html


def test_html_that_is_known_to_be_safe_stays() -> None:
    """The twin: a table that is marked as HTML is shown as it is."""
    values = OBJECTS["run"] | {"table": Markup(EVIL)}
    assert "script" in tags(markup.shown("run", **values))


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        markup.shown("edit", name="a")
    assert markup.shown("edit", name="a", facts={}), "the twin"


def test_a_table_escapes_its_cells() -> None:
    html = markup.table_html(pd.DataFrame({EVIL: [EVIL]}))
    assert "script" not in tags(html) and "&lt;script" in html
