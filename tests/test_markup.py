"""What objects show of themselves in a notebook: each value escaped, and nothing else changed."""

import re

import pandas as pd
import pytest
from hypothesis import given, strategies as st
from jinja2 import UndefinedError
from markupsafe import Markup, escape

from locogen import markup
from locogen.markup import breakable, interval_text, number

EVIL = "<script>alert('x')</script>"
NAN = float("nan")
QUOTE = '" onerror="x'

OBJECTS = {
    "run": dict(
        count=1,
        settings={EVIL: EVIL},
        pictures=[{"alt": QUOTE, "source": EVIL}],
        table=EVIL,
        place=EVIL,
    ),
    "concept": dict(
        name=EVIL,
        sort=EVIL,
        text=EVIL,
        neighbors=(EVIL,),
        pairs=[{"prompt": EVIL, "target": EVIL, "text": EVIL}],
    ),
    "pair": dict(prompt=EVIL, target=EVIL, facts={EVIL: EVIL}),
    "window": dict(title=EVIL, text=EVIL, reason=QUOTE),
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


def test_long_names_break_where_their_parts_meet() -> None:
    """And only there; what is shown has the same letters, and is escaped."""
    text = 'DPMSolverMultistepScheduler, use_exponential_sigmas & "hub/some-long-name<b>"'
    shown = str(breakable(text))
    assert "DPMSolver<wbr>Multistep<wbr>Scheduler" in shown
    assert "use_<wbr>exponential_<wbr>sigmas" in shown and "hub/<wbr>some-long-name" in shown
    assert breakable("backends.cuda.matmul 0.1234567890123456") == (
        "backends.<wbr>cuda.<wbr>matmul 0.1234567890123456"
    )
    assert "<b>" not in shown and Markup(shown.replace("<wbr>", "")) == escape(text)
    assert breakable("max_prompts of McDonald") == "max_prompts of McDonald", (
        "short words are whole"
    )


def test_a_missing_value_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        markup.shown("edit", name="a")
    assert markup.shown("edit", name="a", facts={}), "the twin"


def test_a_table_escapes_its_cells() -> None:
    html = markup.table_html(pd.DataFrame({EVIL: [EVIL]}))
    assert "script" not in tags(html) and "&lt;script" in html


# Tables


def test_a_table_for_people_has_no_computer_words() -> None:
    table = pd.DataFrame(
        {
            "start": pd.array([8, None], dtype="Int64"),
            "low": [-0.0004, float("nan")],
            "cell": [None, [1, 2]],
            "passes": pd.array([True, None], dtype="boolean"),
            "text": ["<b>", pd.NA],
        }
    )
    html = markup.table_html(table)
    assert not re.search(r"NA&gt;|NaN|None|-0\.0", html)
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert markup.readable(table).to_numpy().tolist() == [
        [8, "0.000", "–", True, "<b>"],
        ["–", "–", [1, 2], "–", "–"],
    ]
    plain = table._repr_html_()
    assert "NaN" in plain and "&lt;NA&gt;" in plain and "-0.0004" in plain, "the twin"


def test_names_of_rows_and_columns_have_no_computer_words() -> None:
    table = pd.DataFrame([[1.0, 2.0]] * 3, index=[NAN, -0.0, -2.5], columns=[-1, None])
    for axis in (table.index, pd.MultiIndex.from_product([["x"], table.index])):
        html = markup.table_html(table.set_axis(axis))
        assert not re.search(r"NaN|None|-\d", html)
        assert "<th>–</th>" in html and "<th>0.0</th>" in html and "<th>−2.5</th>" in html
    assert {"NaN", "-0.0", "-2.5"} <= set(re.findall("<th>(.*?)</th>", table._repr_html_())), "twin"
    pairs = pd.MultiIndex.from_product([["x"], [0.25, 1000]], names=["a", "b"])
    for axis in (pd.RangeIndex(998, 1000, name="n"), pairs):
        kept = markup.readable(table[:2].set_axis(axis)).index
        pd.testing.assert_index_equal(kept, axis, exact=True)


def test_a_list_in_a_cell_has_no_computer_words() -> None:
    table = pd.DataFrame({"low": [[NAN, -0.25, 3]], "pair": [(None, -2)], "n": [-2]})
    assert markup.readable(table, 2).to_numpy().tolist() == [[["–", "−0.25", 3], ("–", "−2"), "−2"]]
    assert "[–, −0.25, 3]" in markup.readable(table, 2)._repr_html_()


@pytest.mark.parametrize("name", ["p", "p_any", "mean_p_value"])
def test_no_p_value_is_zero(name: str) -> None:
    table = pd.DataFrame({name: [1e-9, 0.0, 0.04, NAN], "share": [1e-9, 0.0, 0.04, NAN]})
    shown = markup.readable(table)
    assert shown[name].tolist() == ["< 0.001", "< 0.001", "0.040", "–"]
    assert shown["share"].tolist() == ["0.000", "0.000", "0.040", "–"], "the twin"
    assert "text-align: left" not in shown._repr_html_()  # they are numbers


def test_two_columns_of_one_name_and_none_at_all() -> None:
    twice = pd.DataFrame([[0.5, float("nan")]], columns=["x", "x"])
    assert markup.readable(twice, 1).to_numpy().tolist() == [["0.5", "–"]]
    assert markup.readable(pd.DataFrame()).shape == (0, 0)


@pytest.mark.parametrize(
    ("value", "text"), [(-0.0, "0.00"), (-1.239, "−1.24"), (2, "2.00"), (NAN, "–")]
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert markup.number(value) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.456, "46 %"), (-0.12, "−12 %"), (-0.004, "0 %"), (1.5, "150 %"), (NAN, "–")],
)
def test_shares_for_people(share: float, text: str) -> None:
    assert markup.percent(share) == text


def test_words_are_whole_and_on_the_left_and_numbers_on_the_right() -> None:
    long = "a sentence that goes on for more characters than pandas shows of a cell by itself"
    table = pd.DataFrame({"n": [1, 2], "said": [long, None], "low": [0.5, -0.25]})
    style = "text-align: left; white-space: normal; min-width: 16em"
    left = f'<{{0}} style="{style}">{{1}}</{{0}}>'
    html = markup.readable(table)._repr_html_()
    assert left.format("th", "said") in html and left.format("td", long) in html
    assert left.format("td", "–") in html, "its column has words"
    assert html.count("text-align: left") == 3
    assert "<th>low</th>" in html and "<td>−0.250</td>" in html
    assert long not in table._repr_html_(), "the twin"


def test_rows_with_names_of_their_own_keep_their_places() -> None:
    table = pd.DataFrame({"side": ["text", "denoiser"], "n": [1, 2]}, index=["a", "b"])
    for index in (table.index.rename("concept"), pd.MultiIndex.from_product([["x"], ["a", "b"]])):
        html = markup.readable(table.set_axis(index))._repr_html_()
        assert html.count('<td style="text-align: left">') == 2
        assert '<th style="text-align: left">side</th>' in html and "<th>n</th>" in html
    wide = pd.concat({"of": table}, axis=1)
    assert markup.readable(wide)._repr_html_().count('style="text-align: left"') == 3
    empty = markup.readable(table.iloc[:0])._repr_html_()
    assert "side" in empty and "text-align: left" not in empty


def test_the_names_of_an_index_stand_among_the_headings() -> None:
    table = pd.DataFrame({"n": [1, 2]}, index=pd.Index(["a", "<b>"], name="<role>"))
    html = markup.readable(table)._repr_html_()
    assert html.count("<tr") == 3 and "<th>&lt;role&gt;</th><th>n</th>" in html
    assert table._repr_html_().count("<tr") == 4, "the twin: pandas gives them a row"
    named = table.rename_axis(columns="measure")
    assert markup.readable(named)._repr_html_().count("<tr") == 4, "no gap to fill"


def test_an_interval_shows_what_it_says_about_zero() -> None:
    """Two fixed digits made [−0.001, 0.0249] and [0.001, 0.0249] the same "[0.00, 0.02]"."""
    assert interval_text(0.012, -0.001, 0.0249) == "0.012 [−0.001, 0.025]"
    assert interval_text(0.012, 0.001, 0.0249) == "0.012 [0.001, 0.025]"
    assert f"[{number(-0.001)}, {number(0.0249)}]" == f"[{number(0.001)}, {number(0.0249)}]"
    assert interval_text(0.34, 0.28, 0.4) == "0.34 [0.28, 0.40]", "the twin: none too many"
    assert interval_text(0.2, 1e-12, 0.4) == "0.20 [0.00, 0.40]", "the rounding of a sum"
    assert interval_text(0.004, NAN, NAN) == "0.0040"


@given(st.tuples(*[st.floats(-2, 2)] * 3))
def test_no_end_looks_like_zero_that_is_none(numbers: tuple[float, float, float]) -> None:
    low, estimate, high = sorted(numbers)
    shown = interval_text(estimate, low, high).partition("[")[2].rstrip("]").split(", ")
    largest = max(map(abs, numbers))
    for end, text in zip((low, high), shown, strict=True):
        sign = (end > 0) - (end < 0) if abs(end) > 1e-6 * largest else 0
        value = float(text.replace("−", "-"))
        assert (value > 0) - (value < 0) == sign
