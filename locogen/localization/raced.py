"""A race as a run and as tables: its rows made look by look, and what its pictures say of every window."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.localization.racing import ALPHA, Array, Rows, run_races
from locogen.plan import sign_of

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.runs import Run


def raced_run(races: Sequence[Any], measured: Callable[[Sequence[int], Sequence[Rows], Any], Run], store: Any) -> Run:
    """The rows that races ask for, made and scored look by look; then all of them as one run, from the store.

    `measured(numbers, plans, store)`: the scored run of one plan for each race of these numbers. Its table gets what
    the race says of each row (`racing.race`).
    """
    import pandas as pd

    shelf = tempfile.mkdtemp(prefix="locogen-") if store is None else store
    try:

        def measure(asked: dict[int, Rows]) -> dict[int, Array]:
            scores = measured(list(asked), list(asked.values()), shelf).table["clip_score"].to_numpy()
            ends = np.cumsum([len(rows) for rows in asked.values()])[:-1]
            return dict(zip(asked, np.split(scores, ends), strict=True))

        found = run_races(races, measure)
        run = measured(range(len(races)), [rows for rows, _ in found], shelf)
    except BaseException:
        if store is None:
            shutil.rmtree(shelf, ignore_errors=True)
        raise
    if store is None:
        weakref.finalize(run.pictures, shutil.rmtree, shelf, ignore_errors=True)
    said = pd.DataFrame([line for _, lines in found for line in lines]).astype({"looked": "Int64", "sure": float})
    return run.with_table(run.table.assign(**{name: said[name] for name in said}))


def raced_effects(rows: Any, whole: Callable[[Any], pd.DataFrame]) -> pd.DataFrame:
    """The effects table of one concept's race; `whole` is that of a table in which nothing is missing.

    The winner and its rival have all pictures and are judged as ever, `p_any` times the number of windows: they were
    picked among all of these, by some of the same pictures (Bonferroni: it holds however they were picked). Of the
    other windows there is the `estimate` on the `n` pairs they had, without an interval: which they were depends on
    how they did. Every window says how it left the race (`verdict`), after how many pairs (`looked`), and `sure`: the
    share of any other window's effect that the winner's reaches at least, with 95 % confidence (`racing.Race.sure`).
    """
    import pandas as pd

    pairs = int((rows["role"] == "baseline").sum())
    swept = rows[rows["role"] == "window"]
    sizes = swept.groupby("start").size()
    finalists = sizes.index[sizes == pairs]
    kept = rows[(rows["role"] != "window") | rows["start"].isin(finalists)]
    kept = kept[(kept["role"] != "insert") | kept["start"].isin(finalists)]
    table = whole(kept)
    layer = table["axis"] == "layer"
    table.loc[layer, "p_any"] = (table.loc[layer, "p_any"] * len(sizes)).clip(upper=1)
    others = _given_up(rows, swept[~swept["start"].isin(finalists)], table[layer].iloc[0])
    table = pd.concat([table[layer], others, table[~layer]], ignore_index=True) if len(others) else table
    said: Any = swept.drop_duplicates("start").set_index("start")[["verdict", "looked", "sure"]]
    table = table.join(said, on="position")
    table.loc[table["axis"] != "layer", ["verdict", "looked", "sure"]] = None
    if len(others):
        # Windows in their order, then all other rows. Sorted by NumPy: pandas 2 gives missing values no place.
        starts = table["position"].where(table["axis"] == "layer").to_numpy(float, na_value=np.nan)  # (rows,)
        table = table.iloc[np.argsort(starts, kind="stable")]
    return table.reset_index(drop=True)


def _given_up(rows: Any, swept: Any, like: Any) -> pd.DataFrame:
    """Lines of the windows that were not looked at to the end: their paired estimate on the pairs they had."""
    import pandas as pd

    base = rows[rows["role"] == "baseline"].set_index(["prompt", "seed"])["clip_score"]
    known = like[["method", "concept", "axis", "kind", "width", "baseline"]].to_dict()
    lines = []
    for start, part in swept.groupby("start"):
        score = part.set_index(["prompt", "seed"])["clip_score"]
        found = float((sign_of(like["kind"]) * (score - base.loc[score.index])).mean())
        lines.append({**known, "position": start, "estimate": found, "choose": found, "n": len(part)})
    return pd.DataFrame(lines).astype({"position": "Int64"}) if lines else pd.DataFrame()


def race_note(layer: pd.DataFrame) -> str:
    """What the race did not look at and how sure it is, in words, from the layer axis of its effects."""
    seen_on: Any = layer["n"]
    pairs = int(seen_on.max())
    less = seen_on[seen_on < pairs].astype(int)
    told = []
    if len(less):
        seen = f"{less.min()}" if less.min() == less.max() else f"{less.min()} to {less.max()}"
        told.append(f"{len(less)} of {len(layer)} windows seen on {seen} of {pairs} pairs only")
    for verdict, words in (("dropped", "{} cannot be the best"), ("cut", "{} left out for the budget's sake")):
        count = layer["verdict"].tolist().count(verdict)
        told += [words.format(count)] if count else []
    sure, level = float(layer["sure"].iloc[0]), f"{1 - ALPHA:.0%}"
    told.append(
        f"at least {int(100 * sure)}% of any other window's effect (confidence {level})"
        if sure > 0
        else "too few pairs to say how near the best it is"
    )
    return "race: " + ", ".join(told)
