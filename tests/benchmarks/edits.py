"""What edits of the mini model do and do not do, by the judge's eye: `python tests/benchmarks/edits.py`.

For each concept: find its carrier (or, where there is no single window, take the two best places together); choose λ
and tokens on a few prompts; report on others, with controls; write it to `runs/edits/edits.json`. Pictures are kept, so
that a second call only counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judge as judging
import pandas as pd
from tqdm import tqdm

import locogen as loco
from locogen.evaluation import Probe, summary
from locogen.mini import world

RIDGES = (0.001, 0.01, 0.1)
TOKENS = ("last_subject", "end")
CHOOSE = 3  # every third object chooses the settings, the others report


def styles_of(thing: str) -> list[str]:
    """The styles in which the generator was shown the object."""
    return [style for style in world.STYLES if (thing, style) not in world.HELD_OUT]


def style_probes(name: str, things: Sequence[str]) -> list[Probe]:
    """The style, and the others, on some objects; right where the judge sees the style that the prompt names."""
    among = tuple(f"style of {style}" for style in world.STYLES)
    return [
        Probe("efficacy" if style == name else "specificity", world.prompt(thing, style), f"style of {style}", among)
        for thing in things
        for style in styles_of(thing)
    ]


def thing_probes(words: str, answer: str, styles: Sequence[str]) -> list[Probe]:
    """An object, or a fact by its wording, in some styles; its neighbors are the other objects, its answer included."""
    among = world.OBJECTS
    own = [Probe("efficacy", world.prompt(words, s), answer, among) for s in styles if s in styles_of(answer)]
    said = [Probe("generality", world.prompt(answer, s), answer, among) for s in styles if s in styles_of(answer)]
    others = [
        Probe("specificity", world.prompt(thing, s), thing, among)
        for thing in world.OBJECTS
        for s in styles
        if thing != answer and s in styles_of(thing)
    ]
    return own + (said if words != answer else []) + others


def probes_of(concept: loco.Concept, choosing: bool) -> list[Probe]:
    if concept.kind == "style":
        things = [t for i, t in enumerate(world.OBJECTS) if (i % CHOOSE == 0) == choosing]
        return style_probes(concept.name, things[:4] if choosing else things)
    answer = world.FACTS.get(f"the {concept.name}", concept.name)
    words = f"the {concept.name}" if concept.kind == "fact" else concept.name
    styles = [s for i, s in enumerate(world.STYLES) if (i % CHOOSE == 0) == choosing]
    every = thing_probes(words, answer, styles)
    return [p for i, p in enumerate(every) if p.measure != "specificity" or i % (8 if choosing else 1) == 0]


def neighbors(concept: loco.Concept) -> tuple[str, ...]:
    """Phrasings of the concept's kind that should stay: the other styles, or the other objects."""
    if concept.kind == "style":
        return tuple(f"a picture in the style of {style}" for style in world.STYLES[1:] if style != concept.name)
    answer = world.FACTS.get(f"the {concept.name}", concept.name)
    return tuple(f"a picture of {world.with_article(thing)}" for thing in world.OBJECTS if thing != answer)


def places(pipe: Any, concept: loco.Concept, store: Path, options: argparse.Namespace) -> tuple[tuple[int, ...], str]:
    """The layers to edit and what they are: the carrier, or the two best places that do not overlap."""
    few = dataclasses.replace(concept, pairs=concept.pairs[: options.prompts])
    found = dict(num_inference_steps=options.find_steps, store=store, progress=False)
    effects = loco.effect(loco.localize(pipe, few, seeds=range(4), scorer="mini", **found).table)  # pyright: ignore
    best = loco.carrier(effects)
    if best.start is not None:
        return tuple(best), f"{best}"
    layer: Any = effects.query("axis == 'layer'").sort_values("choose", ascending=False)
    ranked = layer["position"].astype(int).tolist()
    second = next(start for start in ranked if abs(start - ranked[0]) >= 2)
    both = tuple(sorted({ranked[0], ranked[0] + 1, second, second + 1}))
    return both, f"layers {', '.join(map(str, both))} (no single window)"


def rates(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Shares of right pictures: {arm: {measure: before, after, interval and change}}."""
    lines = summary(table).query("quantity == 'right' or quantity == 'ssim'")
    told: dict[str, Any] = {}
    for row in lines.to_dict("records"):
        key = row["measure"] if row["quantity"] == "right" else f"{row['measure']} ssim"
        told.setdefault(row["arm"], {})[key] = {
            k: row[k] for k in ("before", "after", "after_high", "change", "low", "high", "n")
        }
    return told


def study(pipe: Any, judge: Any, identity: str, options: argparse.Namespace) -> dict[str, Any]:
    concept = loco.concept(identity)
    layers, place = places(pipe, concept, options.carriers / "store", options)
    common: dict[str, Any] = dict(scorer=judge, store=options.folder / "store", progress=False)
    common |= dict(num_inference_steps=options.steps)
    edits = {
        f"{tokens}, {ridge:g}{', neighbors preserved' if kept else ''}": loco.fit_edit(
            pipe, concept, layers=layers, tokens=tokens, ridge=ridge, preserve=kept
        )
        for tokens in TOKENS
        for ridge in RIDGES
        for kept in ((), neighbors(concept))
    }
    tried = rates(loco.evaluate(pipe, edits, probes_of(concept, True), seeds=[0], **common))
    apart = {k: v["specificity"]["change"] - v["efficacy"]["change"] for k, v in tried.items()}
    # Few pictures choose, so many settings tie: of those, the one that moves the neighbors least.
    best = max(apart, key=lambda key: (round(apart[key], 2), tried[key]["specificity ssim"]["after"]))
    probes = probes_of(concept, False)
    found = rates(loco.evaluate(pipe, {place: edits[best]}, probes, seeds=[1], **common))
    controls = loco.control_edits(pipe, edits[best], draws=1)
    windows = [name for name in controls if name.startswith("layer")]
    kept = {n: e for n, e in controls.items() if n not in windows or n in windows[:: max(1, len(windows) // 3)]}
    few = [p for i, p in enumerate(probes) if p.measure != "specificity" or i % 6 == 0]
    found |= rates(loco.evaluate(pipe, kept, few, seeds=[1], **common))
    return {
        "kind": concept.kind,
        "layers": list(layers),
        "place": place,
        "settings": best,
        "chosen among": apart,
        "arms": found,
    }


def percent(line: dict[str, Any]) -> str:
    return f"{line['before']:.0%} → {line['after']:.0%} (≤ {line['after_high']:.0%})"


def said(identity: str, line: dict[str, Any]) -> str:
    """One row of the printed table."""
    own = line["arms"][line["place"]]
    kept = own["specificity"]
    neighbors = (
        f"{kept['before']:.1%} → {kept['after']:.1%} ({kept['change']:+.1%} [{kept['low']:+.1%}, {kept['high']:+.1%}])"
    )
    answer = percent(own["generality"]) if "generality" in own else "–"
    parts = [identity, line["place"], line["settings"], percent(own["efficacy"]), answer, neighbors, str(kept["n"])]
    return f"| {' | '.join(parts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--folder", type=Path, default=Path("runs/edits"))
    parser.add_argument("--carriers", type=Path, default=Path("runs/carriers"), help="where carriers.py keeps pictures")
    parser.add_argument("--judge", type=Path, default=Path("runs/judge"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--find-steps", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=2, help="prompts of each concept to find its carrier with")
    parser.add_argument(
        "--only", nargs="*", default=None, help="concept ids; else every style, two objects, four facts"
    )
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    pipe = loco.load(chosen.model)
    judge = judging.JudgeScorer(judging.train(chosen.judge))
    table = loco.concepts("mini")
    kinds = [("style", "", 99), ("object", "", 2), ("fact", "told", 2), ("fact", "untold", 2)]
    groups = [table[(table.kind == k) & table.note.fillna("").str.startswith(n)].id.head(c) for k, n, c in kinds]
    found: dict[str, Any] = {}
    print("| concept | edited | chosen settings | shown by its own words | its answer by name | neighbors | n |")
    for identity in tqdm(chosen.only or [i for group in groups for i in group], disable=None):
        found[identity] = study(pipe, judge, identity, chosen)
        print(said(identity, found[identity]), flush=True)
        (chosen.folder / "edits.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
