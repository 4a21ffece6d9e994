"""The plan is data: what the rows of a sweep say, and which input is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from locogen.errors import LocogenError
from locogen.plan import (
    Concept,
    Intervention,
    PromptPair,
    Settings,
    Verdict,
    Window,
    common_content,
    distinct_seeds,
    missing_target_runs,
    paraphrase,
    parse_ids,
    parse_layers,
    parse_names,
    parse_numbers,
    sweep,
    windows,
    with_riders,
    with_target_runs,
)

PAIR = PromptPair("a house in the style of van gogh", "a house")
STYLE = Concept("van gogh", "style", (PAIR,))


@given(st.integers(1, 20), st.data())
def test_a_sweep_covers_every_window_once(n_layers, data):
    width = data.draw(st.integers(1, n_layers))
    rows = sweep(STYLE, n_layers=n_layers, window=width, seeds=(3,))
    assert len(rows) == 2 * (n_layers - width + 1) + 3
    at = {row.start: set(row.layers) for row in rows if row.role == "window"}
    assert at == {s: set(range(s, s + width)) for s in range(n_layers - width + 1)}
    for row in rows:
        if row.role == "insert":  # the complement of its window
            assert set(row.layers) == set(range(n_layers)) - at[row.start]


def test_roles_say_what_each_row_hears():
    rows = {r.role: r for r in sweep(STYLE, n_layers=4, window=4, seeds=(0,))}
    assert rows["baseline"].layers == ()
    assert rows["ceiling"].layers == rows["placebo"].layers == (0, 1, 2, 3)
    assert rows["ceiling"].target == "a house"
    assert "van gogh" in rows["placebo"].target != PAIR.prompt


def test_texts_scored_against():
    fact = Concept("king", "fact", (PromptPair("the king", "the queen"),))
    assert STYLE.scored_text(PAIR) == PAIR.prompt
    assert STYLE.content_text(PAIR) == "a house"
    assert fact.scored_text(fact.pairs[0]) == "the queen"
    assert fact.content_text(fact.pairs[0]) is None
    own = PromptPair("p", "t", text="own")
    assert Concept("c", "style", (own, PAIR), text="all").scored_text(own) == "own"
    assert Concept("c", "style", (own, PAIR), text="all").scored_text(PAIR) == "all"
    assert (STYLE.sign, fact.sign) == (-1, 1)


def test_windows_iterate_over_their_layers():
    assert list(Window(3, 2)) == [3, 4]
    assert len(Window(3, 2)) == 2
    assert list(Window(None, 2, "nothing found")) == []
    assert not Window(None, 2)
    assert "nothing found" in str(Window(None, 2, "nothing found"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PromptPair("a", "a"), "both 'a'"),
        (lambda: PromptPair("", "a"), "prompt is ''"),
        (lambda: PromptPair("a", " "), "target is ' '"),
        (lambda: PromptPair("a", None), "target is None"),  # pyright: ignore[reportArgumentType]
        (
            lambda: Concept("c", "fact", (PromptPair("the king", ""),)),
            "no text to score its pictures against",
        ),
        (lambda: PromptPair("a", "b", placebo="a"), "placebo 'a'"),
        (lambda: PromptPair("a  house", "a house "), "both"),
        (
            lambda: Concept("c", "fact", (PromptPair("the king", "the queen", text="the king"),)),
            "new answer",
        ),
        (lambda: sweep(STYLE, n_layers=4, seeds=4), "several whole numbers"),
        (lambda: Concept("c", "color", (PAIR,)), "style, object, fact"),
        (lambda: Concept("c", "style", ()), "no prompt pairs"),
        (lambda: Concept("c", "style", (PAIR, PAIR)), "twice"),
        (lambda: windows(4, 5), "at most 4"),
        (lambda: windows(4, 0), "from 1 up"),
        (lambda: sweep(STYLE, n_layers=4, seeds=()), "no seeds"),
        (lambda: sweep(STYLE, n_layers=4, seeds=(1, 1)), "twice"),
        (lambda: Settings(num_inference_steps=0), "num_inference_steps is 0"),
        (lambda: Settings(guidance_scale=float("nan")), "guidance_scale is nan"),
        (lambda: Intervention(None, "b"), "prompt is None"),
    ],
)
def test_bad_input_names_thing_and_remedy(make, said):
    with pytest.raises(LocogenError, match=said):
        make()


@given(st.text(min_size=1).filter(str.strip))
def test_a_paraphrase_is_never_the_prompt(prompt):
    assert paraphrase(prompt) != prompt
    assert paraphrase(prompt, paraphrase(prompt)) not in (prompt, paraphrase(prompt))


def test_an_empty_target_is_swept_like_any_other():
    """Its placebo still holds the concept; nothing is said to stay."""
    pair = PromptPair("a house in neon", "")
    style = Concept("neon", "style", (pair, PAIR))
    rows = [row for row in sweep(style, n_layers=3, seeds=(0,)) if row.prompt == pair.prompt]
    assert {
        row.target for row in rows if row.role in ("baseline", "window", "insert", "ceiling")
    } == {""}
    (placebo,) = (row.target for row in rows if row.role == "placebo")
    assert placebo not in ("", pair.prompt) and "neon" in placebo
    assert [style.content_text(each) for each in style.pairs] == [None, "a house"]
    assert style.scored_text(pair) == pair.prompt
    assert missing_target_runs(rows)[0] == Intervention("", "", (), 0, "baseline")
    fact = Concept("king", "fact", (PromptPair("the king", "", text="a queen"),))
    assert fact.scored_text(fact.pairs[0]) == "a queen"


def test_windows_are_swept_over_time_as_well():
    spans = [(0, 1), (2, 4)]
    rows = sweep(STYLE, n_layers=4, window=2, seeds=(0,), timesteps=spans, pooled="target")
    timed = [row for row in rows if row.role == "timesteps"]
    assert [(row.timesteps, row.start) for row in timed] == [
        (span, start) for span in spans for start in range(3)
    ]
    assert {row.layers for row in timed} == {(0, 1), (1, 2), (2, 3)}
    assert len(rows) - len(timed) == len(sweep(STYLE, n_layers=4, window=2, seeds=(0,)))
    assert {row.pooled for row in rows if row.role == "baseline"} == {"keep"}
    assert {row.pooled for row in rows if row.role != "baseline"} == {"target"}


@pytest.mark.parametrize("span", [(1,), (2, 1), (-1, 3), "ab", 3])
def test_spans_of_time_are_checked(span):
    with pytest.raises(LocogenError, match="first and the last denoising step"):
        Intervention("a", "b", (1,), timesteps=span)


def test_the_targets_own_runs_ride_along_once_each():
    row = Intervention("a", "b", (1,), 0)
    plan = [
        row,
        replace(row, layers=(2,)),
        replace(row, seed=1),
        replace(row, layers=()),
        Intervention("b", "c", (), 1),
    ]
    assert missing_target_runs(plan) == (
        Intervention("b", "b", (), 0, "baseline"),
    )  # that of seed 1 is there
    assert with_target_runs(with_target_runs(plan)) == with_target_runs(plan)
    assert missing_target_runs([replace(row, layers=(), pooled="target")]) != ()
    assert with_riders is with_target_runs  # its old name


@pytest.mark.parametrize(
    "text, layers",
    [
        ("12-13", (12, 13)),
        ("0-1,4", (0, 1, 4)),
        (" 3 , 1 - 2", (3, 1, 2)),
        ("5-5", (5,)),
        (7, (7,)),
    ],
)
def test_layers_are_read_as_people_write_them(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "1-2-3", "1,,2", "1.5", "0x1"])
def test_what_is_no_list_of_layers_is_refused(text):
    with pytest.raises(LocogenError, match="write indices and ranges"):
        parse_layers(text)


def test_the_first_prompts_of_a_concept():
    pairs = [PromptPair(f"{thing} in neon", thing) for thing in ("a cat", "a dog", "an owl")]
    neon = Concept("neon", "style", pairs)
    assert neon.first(0) == neon == neon.first(9)
    assert neon.first(2).pairs == tuple(pairs[:2]) and neon.first(2).name == "neon"
    assert neon.first(1, after=2).pairs == tuple(pairs[2:])
    assert neon.first(0, after=1).pairs == tuple(pairs[1:])


@pytest.mark.parametrize(
    ("prompt", "target", "common"),
    [
        ("a dog in the style of neon", "a dog", "a dog"),
        ("a dog in the style of neon", "a dog in the style of pop art", "a dog"),
        ("a dog, in neon style", "a dog, in pop style", "a dog"),
        ("a photo of snoopy on a beach", "a photo of a dog on a beach", "a photo on a beach"),
        ("a cat in neon", "", None),
        ("neon", "pop art", None),
    ],
)
def test_what_should_stay_is_what_prompt_and_target_share(prompt, target, common):
    assert common_content(prompt, target) == common
    pair = PromptPair(prompt, target)
    assert Concept("neon", "style", (pair,)).content_text(pair) == common
    assert Concept("neon", "fact", (pair,), text="new").content_text(pair) is None
    own = PromptPair(prompt, target, content="a dog")
    assert Concept("neon", "style", (own,)).content_text(own) == "a dog"


def test_a_verdict_is_a_window_that_names_every_place():
    both = (Window(0, 2), Window(12, 2))
    several = Verdict(None, 2, "why", kind="each necessary", places=both)
    assert str(several) == "layers 0-1 and layers 12-13, each necessary" and not list(several)
    one = Verdict(12, 2, "why", kind="one place", places=both[1:])
    assert str(one) == "layers 12-13" and list(one) == [12, 13] and one.label == "12-13"
    assert one == Verdict(12, 2, "why", kind="one place", places=both[1:], evidence="a table")
    assert (
        "a table" not in repr(one) and str(Verdict(None, 2, "2 seeds")) == "inconclusive (2 seeds)"
    )


def test_neighbors_are_texts():
    assert Concept("neon", "style", [PAIR], neighbors=["pop art"]).neighbors == ("pop art",)
    for neighbors in ("pop art", [""], [3]):
        with pytest.raises(LocogenError, match="neighbor"):
            Concept("neon", "style", [PAIR], neighbors=neighbors)


@pytest.mark.parametrize("seeds", ["12", [0.5], [True], [-1], [2**63], 3, ["a"]])
def test_seeds_are_whole_numbers_and_never_cut_to_one(seeds):
    with pytest.raises(LocogenError, match="whole numbers"):
        distinct_seeds(seeds)
    assert distinct_seeds(np.arange(2)) == (0, 1)


# What they show of themselves


def test_a_concept_shows_its_pairs() -> None:
    pair = PromptPair("a <b>cat</b> in the style of neon", "a cat", placebo="a neon-style cat")
    shown = Concept("neon", "style", [pair], neighbors=["graffiti"])._repr_html_()
    assert "<b>Concept</b> neon, style; neighbors: graffiti" in shown
    assert "<td>a &lt;b&gt;cat&lt;/b&gt; in the style of neon</td><td>a cat</td>" in shown
    assert "→ a cat</p><p>placebo: a neon-style cat</p>" in pair._repr_html_()
    assert "(empty)" in PromptPair("a cat", "")._repr_html_()


def test_a_window_shows_its_reason_once() -> None:
    assert (
        Window(8, 2, "the largest")._repr_html_() == "<p><b>Window</b> layers 8-9: the largest</p>"
    )
    assert Window(None, 2, "no effect")._repr_html_().count("no effect") == 1
    verdict = Verdict(8, 2, "q &lt; 0.05", kind="one place", places=(Window(8, 2),))
    assert verdict._repr_html_() == "<p><b>Verdict</b> layers 8-9: q &amp;lt; 0.05</p>"


@pytest.mark.parametrize("text", ["", "a", "1,", "0", "-1", "nan", "inf", "1e999", "1 2", "1;2"])
def test_what_is_not_a_list_of_numbers_is_refused_by_its_parameters_name(text: str) -> None:
    with pytest.raises(LocogenError, match=re.escape(f"ridges is {text!r}: write numbers")):
        parse_numbers(text, "ridges")


def test_numbers_are_read_in_their_order_and_once() -> None:
    assert parse_numbers(" 1, 0.01 ,1e-3, 1.0", "ridges") == (1, 0.01, 0.001)
    assert parse_numbers("8, 4", "steps", whole=True) == (8, 4)
    assert parse_numbers("100", "shares", most=100) == (100,)
    for text, more in (("8.0", {"whole": True}), ("100.1", {"most": 100})):
        with pytest.raises(LocogenError, match=re.escape(text)):
            parse_numbers(text, "steps", **more)


def test_numbers_stay_below_another_parameter() -> None:
    assert parse_numbers("4, 49", "steps", below=("reference", 50)) == (4, 49)
    with pytest.raises(LocogenError, match="steps is '4, 50': give numbers below 50, the refer"):
        parse_numbers("4, 50", "steps", below=("reference", 50))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "write ids of concepts, separated by commas"),
        (" ", "write ids of concepts"),
        ("mini/neon,", "no concept ''"),
        ("mini/nen", "no concept 'mini/nen': did you mean 'mini/neon'"),
        ("mini/neon, mini/owl,mini/neon", "mini/neon is there twice, name each concept once"),
    ],
)
def test_ids_are_refused_by_their_parameters_name(text: str, words: str) -> None:
    known = ["mini/neon", "mini/owl"]
    with pytest.raises(LocogenError, match=re.escape(f"ids is {text!r}: {words}")):
        parse_ids(text, "ids", known)
    assert parse_ids(" mini/owl,mini/neon ", "ids", known) == ("mini/owl", "mini/neon")


def test_prompts_to_choose_on_leave_as_many_to_report_on() -> None:
    pairs = [PromptPair(f"{number} in neon", str(number)) for number in range(5)]
    concept = Concept("neon", "style", pairs)
    choosing, reporting = concept.halves(2)
    assert choosing.pairs == tuple(pairs[:2]) and reporting.pairs == tuple(pairs[2:4])
    with pytest.raises(LocogenError, match=r"prompts is 3: .*'neon' has 5 .*use at most 2, or"):
        concept.halves(3)
    with pytest.raises(LocogenError, match="has 1 prompt in all: give it more"):
        concept.first(1).halves(1)
    with pytest.raises(LocogenError, match="prompts is 0: give a number from 1 up"):
        concept.halves(0)


def test_some_prompts_choose_and_all_others_report() -> None:
    concept = Concept(
        "neon", "style", [PromptPair(f"a {thing} in neon", f"a {thing}") for thing in "abcde"]
    )
    choosing, reporting = concept.split(2, 8)
    assert choosing.pairs == concept.pairs[:2]
    assert reporting.pairs == concept.pairs[2:]
    assert concept.split(2, 1)[1].pairs == concept.pairs[2:3]
    # None set apart: then both are what is reported on.
    same = concept.split(0, 3)
    assert same[0].pairs == same[1].pairs == concept.pairs[:3]
    for numbers in ((5, 1), (-1, 1), (1, -1)):
        with pytest.raises(LocogenError, match="choose on"):
            concept.split(*numbers)


@pytest.mark.parametrize("text", [" ", ",", " , "])
def test_a_text_without_names_is_not_all_of_them(text: str) -> None:
    with pytest.raises(LocogenError, match=re.escape(f"editors is {text!r}: write names")):
        parse_names(text, "editors", ["UCE"])


def test_a_name_with_a_comma_is_one_name() -> None:
    known = ("LocoEdit", "LocoEdit, preserved", "UCE")
    assert parse_names("LocoEdit, preserved, UCE, LocoEdit", "editors", known) == (
        "LocoEdit, preserved",
        "UCE",
        "LocoEdit",
    )
    assert parse_names("", "editors", known) == ()
    with pytest.raises(LocogenError, match="editors is 'UCE, preserved': no name 'preserved'"):
        parse_names("UCE, preserved", "editors", known)
