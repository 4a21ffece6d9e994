"""Localizers on planted models: the README's table, for `make benchmark`.

`python tests/benchmarks/planted.py` asks every localizer about the models for reports, with 2 prompts × 4 seeds and
windows of two layers, and prints how each did, with what was counted. Answers and pictures are kept in the folder's
store (`runs/planted`, which the notebook of `reports/planted.toml` reads too): a second call only prints, several at
once share the work. `--settings` also takes windows of 1 and 3 layers, guidance 1 and 3, 1 × 4 and 6 × 6 pictures,
`--all` means all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from machine import add_machine, set_threads

import locogen as loco

COLUMNS = (
    "right_kind",
    "hit",
    "false_single",
    "inconclusive",
    "auroc",
    "cpr",
    "cmd",
    "coverage_near",
)
BASE: dict[str, Any] = {"windows": [2], "guidance_scales": [None], "sizes": [(2, 4)]}
# One thing changed at a time: all together would be 27 times as much.
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "guidances": {"guidance_scales": [1.0, 3.0]},
    "widths": {"windows": [1, 3]},
    "few": {"sizes": [(1, 4)]},
    "many": {"sizes": [(6, 6)]},
}


def markdown(table: Any) -> str:
    """A table of texts as Markdown; the first columns are its index."""
    flat = table.reset_index()
    lines = [flat.columns.tolist(), ["---"] * len(flat.columns), *flat.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def counted(bench: loco.Benchmark) -> str:
    """What the table rests on, in words."""
    table: Any = bench.table
    scored = table[table["scored"]]
    out = table[~table["scored"]].drop_duplicates(["plant", "attribute"])
    left = ", ".join(f"{row.plant} ({row.note})" for row in out.itertuples())
    words = f"{len(table)} answers; scored: {scored['plant'].nunique()} models, "
    words += f"{len(scored.drop_duplicates(['plant', 'concept']))} concepts of them"
    return f"{words}. Left out of the scores: {left or 'none'}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plants", default="report", help="report, tune, or names with commas")
    parser.add_argument("--localizers", default="", help="names with commas; empty: all")
    parser.add_argument("--store", type=Path, default=Path("runs/planted"))
    parser.add_argument("--concepts", type=int, default=0, help="of each model at most; 0: all")
    add_machine(parser)
    parser.add_argument("--settings", nargs="+", default=["base"], choices=CHANGES)
    parser.add_argument("--all", action="store_true", help="all of these settings")
    chosen = parser.parse_args()
    set_threads(chosen)
    plants = chosen.plants if chosen.plants in ("report", "tune") else chosen.plants.split(",")
    machine: dict[str, Any] = {"device": chosen.device, "batch_size": chosen.batch_size}
    localizers = chosen.localizers.split(",") if chosen.localizers else None
    for name in CHANGES if chosen.all else chosen.settings:
        setting = BASE | CHANGES[name]
        bench = loco.benchmark(
            *(localizers, plants),
            concepts=chosen.concepts or None,
            **machine,
            store=chosen.store,
            **setting,
        )
        print(f"\n{json.dumps(setting)}: {counted(bench)}\n")
        print(markdown(loco.score_table(bench.scores(), COLUMNS)), flush=True)
        print(f"\n{markdown(bench.costs().round(1).set_index('localizer'))}", flush=True)


if __name__ == "__main__":
    main()
