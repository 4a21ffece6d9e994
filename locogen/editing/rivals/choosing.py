"""Settings of an editor, tried on some prompts: another concept, model or editor suits others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from locogen.editing.rivals.editors import editors
from locogen.errors import LocogenError, unknown

if TYPE_CHECKING:
    import pandas as pd

# Which states are edited, and how much the weights are held (λ).
CLOSED_FORM: Mapping[str, Mapping[str, Any]] = {
    "last_subject, 0.01": {"tokens": "last_subject", "ridge": 0.01},
    "end, 1": {"tokens": "end", "ridge": 1.0},
    "all, 10": {"tokens": "all", "ridge": 10.0},
}
# Many states are held, one by one: with a small weight each, they leave room for the edit.
LIGHTLY = {"all, 10, kept 0.03": {"tokens": "all", "ridge": 10.0, "preserve_weight": 0.03}}
THRESHOLDS: Mapping[str, Mapping[str, Any]] = {
    "0.93, as published": {},
    "0.8": {"threshold": 0.8},
    "0.6": {"threshold": 0.6},
    "orthogonal complement": {"slope": 0.0},
}
OTHERS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "UCE": {**CLOSED_FORM, **LIGHTLY},
    "LocoEdit, preserved": {**CLOSED_FORM, **LIGHTLY},
    "AdaVD": THRESHOLDS,
    "steering": {"as published": {}},
    "neurons": {"50 of each matrix": {}},
}


def editor_settings(editor: str) -> dict[str, dict[str, Any]]:
    """List a few settings of an editor, to choose among on prompts that are not reported.

    Args:
        editor: One of `editors()`.

    Returns:
        Options of `edit_with` by a name. Of closed-form edits: the published states and λ, the
        prompt's end, and every position with a large λ.

    Raises:
        LocogenError: An unknown editor.

    Example:
        >>> editor_settings("LocoEdit")["end, 1"]
        {'tokens': 'end', 'ridge': 1.0}
    """
    if editor not in editors():
        raise unknown("editor", editor, editors())
    settings = OTHERS.get(editor, CLOSED_FORM)
    return {name: dict(options) for name, options in settings.items()}


def best_arm(summary: pd.DataFrame) -> str:
    """Choose the arm under which least of the concept is left and least of its neighbors is lost.

    One point against one point. What is left is taken at its upper bound: few prompts that agree
    say less than many. Of arms that do as well, the first. Report the chosen arm on other prompts:
    on these it looks better than it is.

    Args:
        summary: From `locogen.summary`, with the measure "efficacy", and "specificity" if there
            are neighbors.

    Returns:
        The arm's name.

    Raises:
        LocogenError: An arm has no share of right pictures for efficacy.

    Example:
        >>> import pandas as pd
        >>> row = {"quantity": "right", "arm": "weak", "measure": "efficacy", "sign": -1}
        >>> weak = row | {"after_low": 0.4, "after_high": 0.9, "change": -0.5}
        >>> strong = weak | {"arm": "strong", "after_low": 0.0, "after_high": 0.3, "change": -1.0}
        >>> kept = weak | {"measure": "specificity", "change": 0.0}
        >>> best_arm(pd.DataFrame([weak, kept, strong, kept | {"arm": "strong"}]))
        'strong'
    """
    rows: Any = summary[summary["quantity"] == "right"]
    costs: dict[str, float] = {}
    for arm, part in rows.groupby("arm", sort=False):
        lines = {line["measure"]: line for line in part.to_dict("records")}
        if "efficacy" in lines:
            costs[str(arm)] = _left(lines["efficacy"]) + _lost(lines.get("specificity"))
    silent = set(summary["arm"]) - set(costs)
    if silent or not costs:
        raise LocogenError(
            f"no shares of right pictures for efficacy are known of {sorted(silent)}: evaluate "
            "probes_for(concept, others), which say what else their pictures could show"
        )
    return min(costs, key=lambda arm: round(costs[arm], 4))


def _left(line: Mapping[Any, Any]) -> float:
    """The upper bound of what is left of the concept."""
    # Of a fact, pictures should come to show the new answer: what is left is what does not.
    return line["after_high"] if line["sign"] < 0 else 1 - line["after_low"]


def _lost(line: Mapping[Any, Any] | None) -> float:
    """What neighbors lost; nothing where none were looked at."""
    return 0.0 if line is None else max(0.0, -line["change"])
