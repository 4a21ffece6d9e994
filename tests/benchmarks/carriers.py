"""What the mini model carries where: every concept of the mini model, by the scoring CLIP and by the judge.

`python tests/benchmarks/carriers.py` prints the table of reports/results.md and writes it to
`runs/carriers/carriers.json`. Both scores look at the same pictures. The pictures are
kept, so that a second call only counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import judge as judging
import pandas as pd
from machine import add_machine, kept, set_threads

import locogen as loco


def row(effects: pd.DataFrame) -> dict[str, Any]:
    """The verdict on one concept, and the effect of its window or of the largest, with its share of the ceiling."""
    best = loco.carrier(effects)
    layer: Any = effects.query("axis == 'layer'").set_index("position")
    start = int(layer["choose"].idxmax()) if best.start is None else best.start
    line = layer.loc[start]
    told = {name: float(line[name]) for name in ("estimate", "low", "high", "share", "baseline")}
    layers = sorted({layer for place in best.places for layer in place})
    told |= {"score": line["score"], "kind": best.kind, "layers": layers}
    return {"found": bool(layers), "start": start, "verdict": str(best), "why": best.reason, **told}


def selected(table: pd.DataFrame, each: int) -> list[str]:
    """Every style, and the first so many objects and facts of each kind."""
    groups = table["kind"] + table["note"].str.split(":").str[0].fillna("")
    rows = [
        part if kind == "style" or not each else part.head(each)
        for kind, part in table.groupby(groups, sort=False)
    ]
    return [identity for part in rows for identity in part["id"]]


def said(line: dict[str, Any]) -> str:
    """One cell of the printed table."""
    value = f"{line['start']}: {line['estimate']:+.2f} [{line['low']:+.2f}, {line['high']:+.2f}]"
    named = ("one place", "each necessary", "each sufficient")
    answer = line["verdict"] if line["kind"] in named else line["kind"]
    return f"{answer} ({value}, {line['share']:.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--folder", type=Path, default=Path("runs/carriers"))
    parser.add_argument("--judge", type=Path, default=Path("runs/judge"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument(
        "--prompts", type=int, default=3, help="at most so many of each concept's prompts; 0: all"
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--each", type=int, default=4, help="objects, and facts of each kind; 0: all"
    )
    parser.add_argument("--only", nargs="*", default=None, help="concept ids in place of the above")
    add_machine(parser)
    chosen = parser.parse_args()
    set_threads(chosen)
    pipe = loco.load(chosen.model, device=chosen.device)
    judge = judging.JudgeScorer(judging.train(chosen.judge))
    notes = loco.concepts("mini").set_index("id")["note"]
    found: dict[str, Any] = {}
    print("| concept | kind | by the probability of CLIP | by the judge | same |")
    for identity in chosen.only or selected(loco.concepts("mini"), chosen.each):
        measure = partial(compared, pipe, judge, identity, chosen)
        line = kept(chosen.folder / "concepts", identity, measure)
        found[identity] = {"note": str(notes[identity]), **line}
        by_clip, by_judge = said(line["clip"]), said(line["judge"])
        print(
            f"| {identity} | {line['kind']} | {by_clip} | {by_judge} | {line['same']} |", flush=True
        )
        (chosen.folder / "carriers.json").write_text(json.dumps(found, indent=1))


def compared(pipe: Any, judge: Any, identity: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """One concept by both scores."""
    concept = loco.concept(identity)
    concept = dataclasses.replace(concept, pairs=concept.pairs[: chosen.prompts or None])
    options: dict[str, Any] = {"seeds": range(chosen.seeds), "num_inference_steps": chosen.steps}
    options |= {"store": chosen.folder / "store", "progress": False}
    options["batch_size"] = chosen.batch_size
    run = loco.localize(pipe, concept, scorer="mini", **options)
    again = run.table.assign(clip_score=judge(list(run.pictures), list(run.table["text"]))[0])
    by_clip, by_judge = row(loco.effect(run.table)), row(loco.effect(again, score="clip_score"))
    same = None
    if by_clip["found"] and by_judge["found"]:
        same = bool(set(by_clip["layers"]) & set(by_judge["layers"]))
    return {"kind": concept.kind, "clip": by_clip, "judge": by_judge, "same": same}


if __name__ == "__main__":
    main()
