"""What edits of the mini model do and do not do, by the judge's eye: `python tests/benchmarks/edits.py`.

For each concept: find its carrier (or, where there is no single window, take the two best places together); choose the
settings on some prompts; report on others under other seeds, with controls; write it to `runs/edits/edits.json`.
Pictures are kept, so that a second call only counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import judge as judging
import pandas as pd
from machine import add_machine, kept, set_threads
from tqdm import tqdm

import locogen as loco
from locogen.editing.evaluation import summary
from locogen.editing.probes import Probe
from locogen.mini import world
from locogen.phrasings import Phrasing, default_phrasings

CHOOSE = 3  # every third object chooses a style's settings, the others report
# Styles that an object's or a fact's phrasings are fitted in, that choose its settings, and that report on it.
FITTED, CHOOSING, REPORTING = (
    tuple(world.STYLES[i] for i in part) for part in ((1, 7), (2, 5), (0, 3, 4, 6))
)


def styles_of(thing: str) -> list[str]:
    """The styles in which the generator was shown the object."""
    return [style for style in world.STYLES if (thing, style) not in world.HELD_OUT]


def style_probes(name: str, things: Sequence[str]) -> list[Probe]:
    """The style in four wordings, and the others, on some objects; right where the judge sees the style that is named.

    Half of the wordings name the style as no default phrasing does. The unit is the object. Pictures of the other
    styles are also asked for this one, before the edit: that is what chance would leave.
    """
    among = tuple(f"style of {style}" for style in world.STYLES)
    probes = []
    for thing in things:
        if name in styles_of(thing):
            for text in wordings(thing, name)[::3]:
                probes.append(Probe("efficacy", text, f"style of {name}", among, unit=thing))
        for style in styles_of(thing):
            if style != name:
                text = world.prompt(thing, style)
                probes.append(Probe("specificity", text, f"style of {style}", among, unit=thing))
                probes.append(Probe("chance", text, f"style of {name}", among, unit=thing))
    return probes


def wordings(thing: str, style: str) -> list[str]:
    """Prompts of an object or a fact in a style, in words that no edit is fitted on; the canonical one first."""
    named = world.with_article(thing)
    if style == world.STYLES[0]:
        return [f"a small picture of {named}"]
    heads = [
        f"{head} {named}" for head in ("a picture of", "an image of", "a small picture of")
    ] + [named]
    return [
        tail.format(head, style)
        for tail in ("{} in the style of {}", "{} in {} style", "{}, {}")
        for head in heads
    ]


def thing_probes(words: str, answer: str, styles: Sequence[str]) -> list[Probe]:
    """An object, or a fact by its wording, in some styles; its neighbors are the other objects and the other facts.

    The unit is the style, of neighbors the neighbor. These are also asked for the object itself: chance, as above.
    """
    among, shown = world.OBJECTS, [s for s in styles if s in styles_of(answer)]
    probes = []
    for style in shown:
        for text in wordings(words, style):
            probes.append(Probe("efficacy", text, answer, among, unit=style))
        if words != answer:
            for text in wordings(answer, style):
                probes.append(Probe("generality", text, answer, among, unit=style))
    others = {other: other for other in world.OBJECTS if other != answer}
    others |= {fact: seen for fact, seen in world.FACTS.items() if seen != answer}
    for other, seen in others.items():
        for style in styles:
            if style in styles_of(seen):
                text = wordings(other, style)[0]
                probes.append(Probe("specificity", text, seen, among, unit=other))
                probes.append(Probe("chance", text, answer, among, unit=other))
    return probes


def probes_of(concept: loco.Concept, choosing: bool) -> list[Probe]:
    if concept.kind == "style":
        return style_probes(
            concept.name, [t for i, t in enumerate(world.OBJECTS) if (i % CHOOSE == 0) == choosing]
        )
    every = thing_probes(*words_of(concept), CHOOSING if choosing else REPORTING)
    if not choosing:
        return every
    own, others = divided(every)
    return own + thinned(others, 2)


def words_of(concept: loco.Concept) -> tuple[str, str]:
    """How prompts name the concept, and the object that it is."""
    return (
        (concept.name,) * 2
        if concept.kind != "fact"
        else (f"the {concept.name}", world.FACTS[f"the {concept.name}"])
    )


def settings_of(concept: loco.Concept) -> dict[str, tuple[dict[str, Any], tuple[float, ...]]]:
    """What is tried, with which strengths: the published settings, the prompt's end, the whole subject, all positions.

    What is preserved holds some of the edit back, so there more strength is tried too.
    """
    tried: dict[str, Any] = {"last_subject, 0.01": (dict(tokens="last_subject", ridge=0.01), (1,))}
    end, subject = dict(tokens="end", ridge=1.0), dict(tokens="subject", ridge=1.0)
    if concept.kind == "style":
        tried["end, 1"] = (end, (1, 1.3))
        kept = dict(
            preserve=neighbors(concept)[::3], preserve_weight=0.01
        )  # in the default wording only
        tried["end, 0.1, neighbors preserved"] = (end | dict(ridge=0.1) | kept, (1, 1.15, 1.3))
        styled = dict(
            phrasings=in_wordings(concept), preserve=neighbors(concept), preserve_weight=0.03
        )
        tried["end, 1, in wordings, neighbors preserved"] = (end | styled, (1,))
        # Every position says the style, so a large λ will do, which leaves more of the weights as they are.
        every = dict(tokens="all", preserve=neighbors(concept), preserve_weight=0.03)
        for ridge in (3.0, 10.0):
            tried[f"all, {ridge:g}, neighbors preserved"] = (
                every | dict(ridge=ridge),
                (1, 1.15, 1.3),
            )
        return tried
    alone = tuple(f"a picture in the style of {style}" for style in world.STYLES)
    styled = dict(
        phrasings=[*default_phrasings(concept), *in_styles(default_phrasings(concept)[1])]
    )
    kept = dict(preserve=alone + neighbors(concept))
    tried["end, 1, in styles"] = (end | styled, (1,))
    tried["end, 1, in styles, styles and neighbors preserved"] = (end | styled | kept, (1, 1.5, 2))
    tried["subject, 1, in styles, styles and neighbors preserved"] = (
        subject | styled | kept,
        (1, 1.5),
    )
    return tried


def in_wordings(concept: loco.Concept) -> list[Phrasing]:
    """The default phrasings of a style, and two that put it in other words."""
    tails = (f" in {concept.name} style", f", {concept.name}")
    return [
        *default_phrasings(concept),
        *(Phrasing(f"a picture{t}", "a picture", concept.name) for t in tails),
    ]


def in_styles(plain: Phrasing, styles: Sequence[str] = FITTED) -> list[Phrasing]:
    """A phrasing in each of some styles: those that are neither chosen nor reported on."""
    tails = [f" in the style of {style}" for style in styles]
    return [Phrasing(plain.source + tail, plain.target + tail, plain.subject) for tail in tails]


def neighbors(concept: loco.Concept) -> tuple[str, ...]:
    """Phrasings of the concept's kind that should stay: the other styles, or the other objects and facts."""
    if concept.kind == "style":
        others = [style for style in world.STYLES[1:] if style != concept.name]
        wordings = ("a picture in the style of {}", "a picture in {} style", "a picture, {}")
        return tuple(words.format(style) for style in others for words in wordings)
    own, answer = words_of(concept)
    named = [o for o in (*world.OBJECTS, *world.FACTS) if o not in (own, answer)]
    return tuple(f"a picture of {world.with_article(name)}" for name in named)


def places(
    pipe: Any, concept: loco.Concept, store: Path, options: argparse.Namespace
) -> dict[str, tuple[int, ...]]:
    """What is edited: the carrier, for objects and facts also with a layer more at each side; or the two best places.

    Two places that do not overlap are taken together where no single window stands out.
    """
    few = dataclasses.replace(concept, pairs=concept.pairs[: options.prompts])
    found: dict[str, Any] = dict(num_inference_steps=options.find_steps, store=store)
    found |= dict(batch_size=options.batch_size, progress=False)
    effects = loco.effect(loco.localize(pipe, few, seeds=range(4), scorer="mini", **found).table)  # pyright: ignore
    best = loco.carrier(effects)
    if best.start is not None:
        found_at, wide = tuple(best), range(max(0, min(best) - 1), min(15, max(best) + 1) + 1)
        wider = {f"layers {wide[0]}-{wide[-1]} (a layer more at each side)": tuple(wide)}
        return {f"{best}": found_at} | (wider if concept.kind != "style" else {})
    if best.kind in ("each necessary", "each sufficient"):
        return {f"{best}": tuple(sorted(layer for place in best.places for layer in place))}
    layer: Any = effects.query("axis == 'layer'").sort_values("choose", ascending=False)
    ranked = layer["position"].astype(int).tolist()
    second = next(start for start in ranked if abs(start - ranked[0]) >= 2)
    both = tuple(sorted({ranked[0], ranked[0] + 1, second, second + 1}))
    return {f"layers {', '.join(map(str, both))} (no single window)": both}


def by_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """The table of an evaluation or an attack with its seeds as units.

    For few prompts that are not drawn from many: intervals then speak of further seeds of the same prompts.
    """
    seeds = "seed " + table["seed"].astype(str)
    # With the seed in the prompt, so that pictures are still counted one by one.
    return table.assign(unit=seeds, prompt=table["prompt"] + ", " + seeds, seed=0)


def rates(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Shares of right pictures: {arm: {measure: before, after, interval and change}}."""
    lines = summary(table).query("quantity == 'right' or quantity == 'ssim'")
    told: dict[str, Any] = {}
    for row in lines.to_dict("records"):
        key = row["measure"] if row["quantity"] == "right" else f"{row['measure']} ssim"
        told.setdefault(row["arm"], {})[key] = {
            k: row[k]
            for k in ("before", "after", "after_high", "change", "low", "high", "n", "units")
        }
    return told


def points(line: dict[str, Any], digits: int = 1) -> str:
    """How many points of a share were lost or won, with the interval."""
    change, low, high = (signed(100 * line[name], digits) for name in ("change", "low", "high"))
    return f"{change} [{low}, {high}]"


def signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus; none before a zero."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def divided(probes: Sequence[Probe]) -> tuple[list[Probe], list[Probe]]:
    """Probes of the concept itself, which take more seeds, and of its neighbors."""
    own = [p for p in probes if p.measure in ("efficacy", "generality")]
    return own, [p for p in probes if p not in own]


def thinned(others: Sequence[Probe], every: int) -> list[Probe]:
    """One in so many prompts of neighbors, with all that is asked of its pictures."""
    kept = set(list(dict.fromkeys(probe.prompt for probe in others))[::every])
    return [probe for probe in others if probe.prompt in kept]


def merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for arm, lines in other.items():
        into[arm] |= lines


def choice(tried: dict[str, Any]) -> str:
    """The settings under which least of the concept is left, and least of its neighbors lost, a point for a point.

    What is left is taken at its upper bound: few prompts that agree say less than many.
    """

    def cost(lines: dict[str, Any]) -> tuple[float, float]:
        lost = max(0.0, -lines["specificity"]["change"])
        return round(lines["efficacy"]["after_high"] + lost, 2), -lines["specificity ssim"]["after"]

    return min(tried, key=lambda name: cost(tried[name]))


def settle(
    pipe: Any, concept: loco.Concept, common: dict[str, Any], options: argparse.Namespace
) -> tuple[Any, ...]:
    """The edit, its strength, place and settings that did best on the choosing prompts, and what all did there."""
    own, others = divided(probes_of(concept, True))
    seeds = range(2 if concept.kind == "style" else 1)  # of neighbors
    edits, tried = {}, {}
    for place, layers in places(pipe, concept, options.carriers / "store", options).items():
        for name, (chosen, strengths) in settings_of(concept).items():
            edit = loco.fit_edit(pipe, concept, layers=layers, **chosen)
            for strength in strengths:
                arm = f"{place}: {name}" + (f", × {strength:g}" if strength != 1 else "")
                edits[arm] = (edit, strength, place, name)
                lines = rates(
                    loco.evaluate(
                        pipe, {arm: edit}, own, seeds=range(2), strength=strength, **common
                    )
                )
                merge(
                    lines,
                    rates(
                        loco.evaluate(
                            pipe, {arm: edit}, others, seeds=seeds, strength=strength, **common
                        )
                    ),
                )
                tried |= lines
    return *edits[choice(tried)], tried


def study(pipe: Any, judge: Any, identity: str, options: argparse.Namespace) -> dict[str, Any]:
    concept = loco.concept(identity)
    common: dict[str, Any] = dict(scorer=judge, store=options.folder / "store", progress=False)
    common |= dict(num_inference_steps=options.steps, batch_size=options.batch_size)
    edit, strength, place, name, tried = settle(pipe, concept, common, options)
    common |= dict(strength=strength)
    own, others = divided(probes_of(concept, False))
    # Seeds that chose nothing; of styles, those below 30 were looked at while this way to choose was being made up.
    seeds = range(30, 34) if concept.kind == "style" else range(10, 14)
    reported = seeds[:2] if concept.kind == "style" else seeds  # of a style there are more prompts
    table = loco.evaluate(pipe, {place: edit}, own, seeds=reported, **common)
    found = rates(table)
    near = thinned(others, 2)
    merge(found, rates(loco.evaluate(pipe, {place: edit}, near, seeds=seeds, **common)))
    controls = loco.control_edits(pipe, edit, draws=1)
    windows = [window for window in controls if window.startswith("layer")]
    kept = {
        n: e
        for n, e in controls.items()
        if n not in windows or n in windows[:: max(1, len(windows) // 3)]
    }
    found |= rates(
        loco.evaluate(
            pipe, kept, own[:: len(own) // 30 or 1] + thinned(others, 6), seeds=seeds[:1], **common
        )
    )
    return dict(
        kind=concept.kind, layers=list(edit.layers), place=place, settings=name, strength=strength
    ) | {
        "chosen among": tried,
        "arms": found,
    }


def percent(line: dict[str, Any]) -> str:
    return (
        f"{line['before']:.0%} → {line['after']:.0%} (≤ {line['after_high']:.0%}), "
        f"n = {line['n']} of {line['units']}"
    )


def said(identity: str, line: dict[str, Any]) -> str:
    """One row of the printed table."""
    own = line["arms"][line["place"]]
    kept = own["specificity"]
    neighbors = (
        f"{kept['before']:.1%} → {kept['after']:.1%} ({points(kept)} points), "
        f"n = {kept['n']} of {kept['units']}"
    )
    answer = percent(own["generality"]) if "generality" in own else "–"
    parts = [
        identity,
        line["place"],
        f"{line['settings']}, × {line['strength']:g}",
        percent(own["efficacy"]),
        answer,
        f"{own['chance']['before']:.1%}",
        neighbors,
    ]
    return f"| {' | '.join(parts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--folder", type=Path, default=Path("runs/edits"))
    parser.add_argument(
        "--carriers",
        type=Path,
        default=Path("runs/carriers"),
        help="where carriers.py keeps pictures",
    )
    parser.add_argument("--judge", type=Path, default=Path("runs/judge"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--find-steps", type=int, default=8)
    parser.add_argument(
        "--prompts", type=int, default=2, help="prompts of each concept to find its carrier with"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=None,
        help="concept ids; else every style, two objects, four facts",
    )
    add_machine(parser)
    chosen = parser.parse_args()
    set_threads(chosen)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    pipe = loco.load(chosen.model, device=chosen.device)
    judge = judging.JudgeScorer(judging.train(chosen.judge))
    table = loco.concepts("mini")
    kinds = [("style", "", 99), ("object", "", 2), ("fact", "told", 2), ("fact", "untold", 2)]
    groups = [
        table[(table.kind == k) & table.note.fillna("").str.startswith(n)].id.head(c)
        for k, n, c in kinds
    ]
    found: dict[str, Any] = {}
    print(
        "| concept | edited | chosen settings | shown by its own words | its answer by name | chance | neighbors |"
    )
    for identity in tqdm(chosen.only or [i for group in groups for i in group], disable=None):
        measure = partial(study, pipe, judge, identity, chosen)
        found[identity] = kept(chosen.folder / "concepts", identity, measure)
        print(said(identity, found[identity]), flush=True)
        (chosen.folder / "edits.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
