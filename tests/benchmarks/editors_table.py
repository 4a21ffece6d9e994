"""What editors.py has measured, as tables and a picture: each concept, and over all concepts with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import edits
import pandas as pd

import locogen as loco

# Of `loco.attack`, by the name of the column.
ATTACKS: dict[str, dict[str, Any]] = {
    "closed": {"kind": "closed"},
    "inversion": {"kind": "inversion", "steps": 30, "batch": 8, "at": [30]},
    # Plain pictures cannot teach the concept: there the control is the same training.
    "relearn, plain": {
        "kind": "relearn",
        "steps": 25,
        "batch": 8,
        "pictures": [0],
        "models": ["edited"],
    },
    "relearn, 3 pictures": {"kind": "relearn", "steps": 25, "batch": 8, "pictures": [3]},
}
# Columns by what was measured: shares that are left, or points that were lost.
LEFT = {"own words": "efficacy", "other words": "generality"}
LOST = {"neighbors": "specificity", "rest of the prompt": "rest"}
HEAD = ("concept", "editor", "settings (of so many)", *LEFT, *LOST, *ATTACKS, "seconds", "KB")

Rows = Mapping[tuple[str, str], dict[str, Any]]  # by concept and editor


def heading(head: Sequence[str]) -> str:
    return f"{line_of(head)}\n|{'---|' * len(head)}"


def line_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def row_line(identity: str, editor: str, row: dict[str, Any]) -> str:
    """One row: shares and points with 95 % intervals; in brackets what of a concept that the model never had."""
    if "measures" not in row:
        return line_of([identity, editor, f"none of {row['tried']} could be fitted"])
    measures = row["measures"]
    cells = [identity, editor, f"{row['settings']} (of {row['tried']})"]
    cells += [share_left(measures[name]) for name in LEFT.values()]
    cells += [edits.points(measures[name], 0) for name in LOST.values()]
    cells += [came_back(row["attacks"].get(name, {})) for name in ATTACKS]
    cells += [f"{row['seconds']:.1f}", "–" if row["KB"] is None else f"{row['KB']:.0f}"]
    return line_of(cells)


def share_left(line: dict[str, Any]) -> str:
    return share(line["after"], line["after_low"], line["after_high"])


def share(value: float, low: float, high: float) -> str:
    return f"{100 * value:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def came_back(result: dict[str, Any]) -> str:
    """What an attack brought back, beside what it brought of a concept that the model never had."""
    if "lines" not in result:
        return "–"
    lines = {line["model"]: line for line in result["lines"]}
    back, taught = lines["edited"], lines.get("never had")
    control = "" if taught is None else f" ({100 * taught['after']:.0f})"
    return share(back["after"], back["low"], back["high"]) + control


# --- over all concepts ---------------------------------------------------------------------------


def over_concepts(rows: Rows) -> list[str]:
    """The table over all concepts that every editor's row is there of: their means, the unit is the concept."""
    editors = list(dict.fromkeys(editor for _, editor in rows))
    everything = dict.fromkeys(identity for identity, _ in rows)
    concepts = [
        identity
        for identity in everything
        if all("measures" in rows.get((identity, editor), {}) for editor in editors)
    ]
    if len(concepts) < 2:
        return []
    missing = [identity for identity in everything if identity not in concepts]
    without = f"; left out, for lack of a row: {', '.join(missing)}" if missing else ""
    lines = [f"Over {len(concepts)} concepts, which are the units: {', '.join(concepts)}{without}"]
    lines += ["", heading(["editor", *LEFT, *LOST, *ATTACKS])]
    for editor in editors:
        means = means_of({identity: rows[identity, editor] for identity in concepts})
        cells = [editor, *[of_so_many(means.get(name), concepts) for name in LEFT.values()]]
        cells += [edits.points(means[name], 0) for name in LOST.values()]
        for attack in ATTACKS:
            taught = means.get(f"{attack}, never had")
            control = "" if taught is None else f" ({100 * taught['after']:.0f})"
            cells.append(of_so_many(means.get(attack), concepts) + control)
        lines.append(line_of(cells))
    return lines


def means_of(rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """One editor's shares before and after over concepts, with intervals, by what was measured."""
    lines = []
    for identity, row in rows.items():
        unit = {"arm": "editor", "unit": identity, "prompt": identity, "seed": 0, "sign": -1}
        for measure, (before, after) in shares_of(row).items():
            values = dict(before=before, after=after, right_before=before, right_after=after)
            lines.append(unit | values | {"measure": measure})
    means = loco.summary(pd.DataFrame(lines)).query("quantity == 'right'")
    return {line["measure"]: line for line in means.to_dict("records")}


def shares_of(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Shares before and after of everything that was measured of a row, attacks by model."""
    shares = {name: (line["before"], line["after"]) for name, line in row["measures"].items()}
    for attack, result in row["attacks"].items():
        for line in result.get("lines", ()):
            model = "" if line["model"] == "edited" else f", {line['model']}"
            shares[attack + model] = (line["before"], line["after"])
    return shares


def of_so_many(line: dict[str, Any] | None, concepts: Sequence[str]) -> str:
    """A share that is left; of so many concepts, where an attack was refused on some."""
    if line is None:
        return "–"
    fewer = f", n = {line['units']:.0f}" if line["units"] < len(concepts) else ""
    return share_left(line) + fewer


def time_taken(rows: Rows) -> str:
    """What the rows took; rows of which it was not kept are counted."""
    parts = []
    for row in rows.values():
        parts += [row, *row.get("attacks", {}).values()]
    seconds = [part["took"] for part in parts if part.get("took") is not None]
    unknown = len(parts) - len(seconds)
    also = f"; of {unknown} more parts it was not kept" if unknown else ""
    return f"{len(rows)} rows: {sum(seconds) / 60:.1f} min of a core for {len(seconds)} parts{also}"


# --- for other programs, and to look at ----------------------------------------------------------


def write_csv(rows: Rows, path: Path) -> None:
    """All rows: a line for each concept, editor and measure or attack, shares of 1."""
    lines = []
    for (identity, editor), row in rows.items():
        head = {"concept": identity, "editor": editor, "settings": row.get("settings")}
        for measure, line in row.get("measures", {}).items():
            names = ("before", "after", "after_low", "after_high", "change", "low", "high", "units")
            lines.append(head | {"measure": measure} | {name: line[name] for name in names})
        for attack, result in row.get("attacks", {}).items():
            for line in result.get("lines", ()):
                values = {name: line[name] for name in ("before", "after", "units")}
                ends = {"after_low": line["low"], "after_high": line["high"]}
                lines.append(head | {"measure": f"{attack}, {line['model']}"} | values | ends)
    pd.DataFrame(lines).round(4).to_csv(path, index=False)


PANELS = {
    "still shown by its own words": ("efficacy", False),
    "points of neighbors lost": ("specificity", True),
    "shown after one trained vector": ("inversion", False),
    "shown after training on three pictures of it": ("relearn, 3 pictures", False),
}


def draw(rows: Rows, path: Path, title: str) -> None:
    """Editors by concepts, in percent: what is left, what neighbors lost, and what comes back."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    figure, axes = plt.subplots(2, 2, figsize=(15, 11), layout="constrained")
    for axis, (name, (measure, is_loss)) in zip(axes.flat, PANELS.items(), strict=True):
        table = percents(rows, measure, is_loss=is_loss)
        sns.heatmap(
            table,
            ax=axis,
            vmin=0,
            vmax=100,
            cmap="rocket_r",
            annot=True,
            fmt=".0f",
            cbar=False,
            linewidths=0.5,
        )
        axis.set(title=name, xlabel="", ylabel="")
        axis.set_facecolor("#dddddd")  # where there is nothing to attack
        axis.tick_params(axis="x", labelrotation=40)
        for label in axis.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    figure.suptitle(title)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def percents(rows: Rows, measure: str, *, is_loss: bool) -> pd.DataFrame:
    """Editors by concepts: percent shown after, or points lost."""
    cells: dict[str, dict[str, float]] = {}
    kinds = ("style", "object", "fact")
    by_kind = sorted(rows, key=lambda cell: kinds.index(loco.concept(cell[0]).kind))
    for identity, editor in by_kind:
        row = rows[identity, editor]
        line = cells.setdefault(identity.removeprefix("mini/national-animal-of-"), {})
        shares = shares_of(row) if "measures" in row else {}
        before, after = shares.get(measure, (float("nan"), float("nan")))
        line[editor] = 100 * (max(0.0, before - after) if is_loss else after)
    table = pd.DataFrame(cells)
    return table.rename(columns=lambda name: name.removeprefix("mini/").replace("-", " "))
