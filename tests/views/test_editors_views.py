"""Editors side by side: panels and words say what the table says, and no more than its intervals."""

import math
import re
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, strategies as st

from locogen.attacks.result import Attack
from locogen.errors import LocogenError
from locogen.views.editors import describe_editors, editor_table, plot_editors
from locogen.views.sentences import answer_edit

COMPARES = re.compile(r"\b(least|most|less|more|better|worse)\b")


def line(
    arm: str, measure: str, after: float, low: float, high: float, **more: Any
) -> dict[str, Any]:
    bounds = {"after": after, "after_low": low, "after_high": high}
    return (
        {"quantity": "right", "arm": arm, "measure": measure, "units": 8, "before": 1.0}
        | bounds
        | more
    )


SUMMARY = pd.DataFrame(
    [
        line("UCE", "efficacy", 0.0, 0.0, 0.37),
        line("SPEED", "efficacy", 0.9, 0.47, 1.0),
        line("AdaVD", "efficacy", 0.25, 0.03, 0.65),
        line("UCE", "specificity", 0.5, 0.2, 0.6),
        line("SPEED", "specificity", 1.0, 0.7, 1.0),
        line("AdaVD", "specificity", 0.75, 0.4, 0.9),
        line("UCE", "closed", 0.5, 0.1, 0.9),
        line("SPEED", "closed", 0.9, 0.47, 1.0),
        line("UCE", "closed, never had", 0.0, 0.0, 0.37),
    ]
)


def test_there_is_a_panel_a_measure_and_a_line_an_editor() -> None:
    figure = plot_editors(SUMMARY)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:3] == ["by its own words ←", "its neighbors →", "after a solve ←"]
    assert titles[3] == "after a solve, never had"
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["UCE", "SPEED", "AdaVD"]
    drawn: Any = figure.axes[0].containers[0]
    ticks = [ax.xaxis.get_tick_params()["labelbottom"] for ax in figure.axes]
    assert ticks == [True] * 4
    bars = drawn.lines[0].get_xdata()
    assert list(bars) == [0.0, 0.9, 0.25]


def test_several_concepts_are_told_apart() -> None:
    both = pd.concat([SUMMARY.assign(concept=name) for name in ("neon", "cat")])
    figure = plot_editors(both)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["neon", "cat"]
    assert not plot_editors(SUMMARY).legends  # the twin
    assert list(editor_table(both)["concept"]) == ["neon"] * 3 + ["cat"] * 3


def test_the_table_has_intervals_and_dashes_where_nothing_was_measured() -> None:
    table = editor_table(SUMMARY, {"UCE": {"KB": 12}}).set_index("editor")
    assert table.loc["UCE", "by its own words"] == "0 % [0, 37] of 8 prompts"
    assert table.loc["AdaVD", "after a solve"] == "–" == table.loc["SPEED", "KB"]
    assert table.loc["UCE", "KB"] == 12


def test_only_what_the_intervals_tell_apart_is_called_worse() -> None:
    text = describe_editors(SUMMARY)
    first, second, third = text.split(". ")
    # AdaVD may be as good, so that UCE is not said to do best.
    assert first.endswith(
        "with UCE: 0 % [0, 37] of 8 prompts; no clear difference from AdaVD; more with SPEED"
    )
    assert second.endswith(
        "with SPEED: 100 % [70, 100] of 8 prompts; no clear difference from AdaVD; less with UCE"
    )
    assert "no clear difference from SPEED" in third and not COMPARES.search(third)
    assert "SPEED" not in describe_editors(SUMMARY, control="SPEED")
    apart = describe_editors(SUMMARY, control="AdaVD")  # the twin
    assert (
        "Shown by its own words least with UCE (0 % [0, 37] of 8 prompts); more with SPEED."
        in apart
    )
    assert (
        "Right for its neighbors most with SPEED (100 % [70, 100] of 8 prompts); less with UCE"
        in apart
    )
    renamed = SUMMARY.replace({"arm": {"UCE": "LocoEdit, preserved"}})
    assert "with 'LocoEdit, preserved': 0 %" in describe_editors(renamed)
    with pytest.raises(LocogenError, match="no shares"):
        describe_editors(SUMMARY.assign(quantity="ssim"))


def test_an_editor_alone_and_editors_alike_are_not_compared() -> None:
    alone = describe_editors(SUMMARY[SUMMARY["arm"] == "UCE"])
    assert "Shown by its own words with UCE: 0 % [0, 37] of 8 prompts." in alone
    twin = SUMMARY[SUMMARY["arm"] == "UCE"].assign(arm="ESD")
    alike = describe_editors(pd.concat([SUMMARY[SUMMARY["arm"] == "UCE"], twin]))
    assert "with UCE and ESD: 0 % [0, 37] of 8 prompts; no clear difference." in alike
    assert not COMPARES.search(alone + alike)
    # Two prompts and eight: the same share, and not the same bounds.
    fewer = SUMMARY.assign(arm="ESD", after=0.0, after_low=0.0, after_high=0.84, units=2)
    uneven = describe_editors(pd.concat([SUMMARY[SUMMARY["arm"] == "UCE"], fewer[:1]]))
    assert "with UCE: 0 % [0, 37] of 8 prompts; no clear difference from ESD." in uneven


FACT = pd.DataFrame(
    [
        line("LocoEdit", "efficacy", 0.9, 0.6, 1.0, sign=1, before=0.0),
        line("AdaVD", "efficacy", 0.0, 0.0, 0.37, sign=1, before=0.0),
        line("LocoEdit", "specificity", 1.0, 0.7, 1.0, sign=1),
        line("AdaVD", "specificity", 1.0, 0.7, 1.0, sign=1),
        line("LocoEdit", "closed", 0.2, 0.0, 0.5, sign=-1, before=0.0),
        line("AdaVD", "closed", 0.9, 0.6, 1.0, sign=-1, before=0.9),
    ]
)


def test_of_a_fact_the_best_shows_the_new_answer_most() -> None:
    text = describe_editors(FACT)
    assert text.startswith(
        "The new answer is shown by its own words most with LocoEdit (90 % [60, 100] of 8 prompts);"
        " less with AdaVD. Right for"
    )
    assert "The old answer is shown after a solve least with LocoEdit" in text
    # The twin: of what is removed, the other one is best.
    removed = describe_editors(
        FACT.assign(sign=FACT["sign"].mask(FACT["before"] < 1, -1), before=1)
    )
    assert removed.startswith("Shown by its own words least with AdaVD")
    titles = [ax.get_title() for ax in plot_editors(FACT).axes]
    own, after = "by its own words, new answer →", "after a solve, old answer ←"
    assert titles == [own, "its neighbors →", after]
    assert list(editor_table(FACT))[1:] == [own[:-2], "its neighbors", after[:-2]]

    both = pd.concat([FACT.assign(concept="france"), SUMMARY.assign(concept="neon", sign=-1)])
    first = plot_editors(both).axes[0].get_title()
    assert first == "by its own words ←\n(facts: new answer →)"
    assert "by its own words (facts: new answer)" in editor_table(both)
    with pytest.raises(LocogenError, match="one concept at a time"):
        describe_editors(both)


def test_what_was_never_shown_is_not_gone() -> None:
    never = SUMMARY.assign(before=SUMMARY["before"].mask(SUMMARY["measure"] == "efficacy", 0.0))
    text = describe_editors(never)
    assert text.startswith("Nothing can be said by its own words: the model without an edit shows ")
    assert "in none of the pictures of 8 prompts either. Right for its neighbors" in text
    assert "after a solve" not in text
    table = editor_table(never).set_index("editor")
    assert table.loc["UCE", "by its own words"] == "0 % [0, 37] of 8 prompts; 0 % before"
    assert table.loc["UCE", "after a solve"] == "50 % [10, 90] of 8 prompts"
    assert "Nothing" not in describe_editors(never.assign(before=0.1))  # the twin
    strangers = SUMMARY.assign(before=SUMMARY["before"].mask(SUMMARY["measure"] != "efficacy", 0.0))
    text = describe_editors(strangers)
    assert "Nothing can be said of its neighbors: the model without an edit shows them in" in text
    assert "Shown by its own words" in text and "Right for" not in text and "after a solve" in text
    given = describe_editors(FACT.assign(before=1.0))
    assert "gives the new answer in all pictures of 8 prompts. Right" in given
    assert "Nothing" not in describe_editors(FACT)


def test_costs_are_of_an_editor_or_of_an_editor_on_one_concept() -> None:
    both = pd.concat([SUMMARY.assign(concept=name) for name in ("neon", "cat")])
    costs: Any = {"UCE": {"KB": 12, "seconds": 1}, ("cat", "UCE"): {"seconds": 2}}
    table = editor_table(both, costs).set_index(["concept", "editor"])
    assert table.loc[("neon", "UCE"), ["KB", "seconds"]].tolist() == [12, 1]
    assert table.loc[("cat", "UCE"), ["KB", "seconds"]].tolist() == [12, 2]


def test_many_others_are_counted_and_those_that_differ_are_named() -> None:
    def many(bounds: Any) -> str:
        named = [line(f"E{place}", "efficacy", *each) for place, each in enumerate(bounds)]
        return describe_editors(pd.DataFrame(named))

    best, unclear, worse = (0.0, 0.0, 0.3), (0.2, 0.1, 0.6), (0.9, 0.6, 1.0)
    assert "no clear difference from the other nine." in many([best, *[unclear] * 9])
    assert "from E1, E2 and E3." in many([best, *[unclear] * 3])  # the twin
    assert "from nine others; more with E10." in many([best, *[unclear] * 9, worse])
    assert many([best, *[worse] * 4]).endswith("; more with the other four.")
    assert many([best] * 13).startswith("Shown by its own words with all 13: 0 %")


def newcombe(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float]:
    """The interval of second minus first (Stat. Med. 17, 1998, method 10)."""
    gap = second["after"] - first["after"]
    below = math.hypot(second["after"] - second["after_low"], first["after_high"] - first["after"])
    above = math.hypot(second["after_high"] - second["after"], first["after"] - first["after_low"])
    return gap - below, gap + above


@given(st.lists(st.tuples(*[st.integers(0, 20)] * 3), min_size=1, max_size=4), st.booleans())
def test_a_word_that_compares_needs_an_interval_that_leaves_out_zero(
    sizes: list[tuple[int, int, int]], is_bad: bool
) -> None:
    lines = []
    for place, size in enumerate(sizes):
        low, after, high = (part / 20 for part in sorted(size))
        lines.append(line(f"E{place}", "efficacy" if is_bad else "specificity", after, low, high))
    text = describe_editors(pd.DataFrame(lines))
    if "with all four" in text:
        assert len({tuple(each.values())[4:] for each in lines}) == 1 and not COMPARES.search(text)
        return
    by_name = {each["arm"]: each for each in lines}
    best = by_name[re.findall(r"E\d", text)[0]]
    clauses = {part.split(" ")[0]: part for part in text.split("; ")[1:]}
    worse = re.findall(r"E\d", clauses.get("more" if is_bad else "less", ""))
    for name in worse:
        low, high = newcombe(best, by_name[name])
        assert low > 0 if is_bad else high < 0
    # All others: none may be as good as the one that is called best.
    alike = re.findall(r"E\d", text.split("; ")[0])
    assert bool(re.search(r"\b(least|most)\b", text)) == (
        len(worse) > 0 and len(worse) + len(alike) == len(lines)
    )


class Tried(Attack):
    """An attack of which only the summary is looked at."""

    def summary(self, level: float = 0.95) -> pd.DataFrame:
        return self.table.assign(units=14, strength=1)


def tried(*rows: tuple[str, float, float, float]) -> Tried:
    table = pd.DataFrame(list(rows), columns=["model", "after", "low", "high"])
    return Tried("neon", "inversion", table)


OWN = pd.DataFrame([line("layer 3", "efficacy", 0.0, 0.0, 0.37, sign=-1)])


def test_a_lawyer_reads_what_was_looked_at_and_how_sure_it_is() -> None:
    text = answer_edit(OWN, "layer 3", "neon")
    assert text.startswith(
        "Is neon gone? By its own words it is shown in none of the pictures of 8 prompts"
    )
    assert "at most 37 % of such prompts, with 95 % confidence" in text
    assert "of 8 prompts × 4 seeds:" in answer_edit(OWN.assign(seeds=4), "layer 3", "neon")
    assert text.endswith("; nobody tried to bring it back.") and text.count(". ") == 0
    some = pd.DataFrame([line("layer 3", "efficacy", 0.25, 0.03, 0.65, sign=-1)])
    assert "25 % of the pictures of 8 prompts (between 3 % and 65 %, 95 %)" in answer_edit(
        some, "layer 3", "neon"
    )
    fact = OWN.assign(sign=1)
    assert answer_edit(fact, "layer 3", "france").startswith("Does france get its new answer?")
    with pytest.raises(LocogenError, match="own prompts"):
        answer_edit(OWN, "layer 4", "neon")


def test_hidden_is_said_only_where_the_attack_brings_more_than_it_teaches() -> None:
    back = ("edited", 0.86, 0.52, 1.0)
    text = answer_edit(OWN, "layer 3", "neon", [tried(back, ("never had", 0.0, 0.0, 0.23))])
    assert "under an attack (inversion) it is shown in 86 % (52 % to 100 %, n = 14)" in text
    assert text.endswith("hidden, not gone.") and "nobody tried" not in text
    assert text.count(". ") == 0, "one line"
    unclear = answer_edit(OWN, "layer 3", "neon", [tried(back, ("never had", 0.3, 0.1, 0.6))])
    assert "hidden, not gone" not in unclear  # the twin: the intervals overlap
    assert "does not show that it was only hidden" in unclear
    weak = tried(("edited", 0.0, 0.0, 0.23), ("never had", 0.0, 0.0, 0.23))
    strong = tried(back, ("never had", 0.0, 0.0, 0.23))
    both = answer_edit(OWN, "layer 3", "neon", [weak, strong])
    assert "the strongest of 2 attacks (inversion) it is shown in 86 %" in both
    came = OWN.assign(sign=1, before=0.0, after=1.0, after_low=0.63, after_high=1.0)
    fact = answer_edit(came, "layer 3", "france", [tried(back)])
    assert "the old answer is shown in 86 %" in fact
    assert "was not measured" in answer_edit(OWN, "layer 3", "neon", [tried(back)])


def test_what_own_words_still_show_is_not_hidden() -> None:
    attacked = [tried(("edited", 1.0, 0.8, 1.0), ("never had", 0.0, 0.0, 0.23))]
    left = pd.DataFrame([line("layer 3", "efficacy", 0.94, 0.7, 1.0, sign=-1)])
    text = answer_edit(left, "layer 3", "neon", attacked)
    assert text.endswith("; that it was removed is not certain, so attacks say nothing.")
    assert "hidden" not in text
    # Removed in part: the attack has to bring clearly more than is left.
    for high, is_hidden in ((0.85, False), (0.7, True)):
        some = pd.DataFrame([line("layer 3", "efficacy", 0.5, 0.3, high, sign=-1)])
        text = answer_edit(some, "layer 3", "neon", attacked)
        assert text.endswith("hidden, not gone.") == is_hidden
    # The interval of the change decides, where there is one.
    paired = left.assign(change=-0.06, low=-0.09, high=-0.02)
    assert "is not certain" not in answer_edit(paired, "layer 3", "neon", attacked)
    stays = OWN.assign(sign=1, before=0.0, after_low=0.0, after_high=0.37)
    assert "that it came is not certain." in answer_edit(stays, "layer 3", "france")
