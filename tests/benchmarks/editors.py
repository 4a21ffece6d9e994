"""Every editor on the same rows: `python tests/benchmarks/editors.py` edits concepts of the mini models in eleven ways.

For each concept and editor: its settings are chosen on some prompts and reported on others, under another seed; how many
were tried is said. Measured, by a judge that no model has seen: how often the concept still shows by the words that
edits are fitted to (efficacy) and by others (generality), what is lost of its neighbors and of the rest of its own
prompts (the object of a style, the style of an object), and how often it comes back: by a solve (closed), by a trained
token vector (inversion), after training on plain pictures and on three of the concept (relearn); each beside a concept
that the model never had, which only the attack can have taught. With a placebo edit as one more row.

A row of a style makes about 250 pictures of 8 steps and trains five times, 25 or 30 steps of 8 pictures; one of an object or
a fact makes three times as many. That is a minute or two of a core, and two to four hours of one for the 13 concepts x 12
rows of a model. To stay there, 16 units are reported: bounds count units (none of 16 says at most 21 %). Of a style they are objects, in one wording and
under one seed; of an object or a fact seeds, in the same styles, because eight styles bound nothing by styles. The
attacks are short, so that what they bring back is the least that can be: attacks.py trains longer. Each row lies
in the folder as soon as it is done; several processes (`--threads 1`) may share it: each takes the next row that no other
has begun. `--report` only prints what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import edits
import judge as judging
import pandas as pd
from filelock import FileLock, Timeout
from machine import add_machine, kept, set_threads

import locogen as loco
from locogen.editing.probes import Probe
from locogen.mini import world
from locogen.phrasings import Phrasing, default_phrasings

PLACEBO = "placebo"
# What is tried of each closed-form editor: which states, and how much the weights are held.
FITS: dict[str, dict[str, Any]] = {
    "last_subject, 0.01": {"tokens": "last_subject", "ridge": 0.01},
    "end, 1": {"tokens": "end", "ridge": 1.0},
    "all, 10": {"tokens": "all", "ridge": 10.0},
}
PRESERVING = {"UCE", "LocoEdit, preserved"}
THRESHOLDS: dict[str, dict[str, Any]] = {
    "0.93, as published": {},
    "0.8": {"threshold": 0.8},
    "0.6": {"threshold": 0.6},
    "orthogonal complement": {"slope": 0.0},
}
# In an order in which a part of it says something: styles, objects and facts of both sorts first.
CONCEPTS = (
    *("mini/neon", "mini/cat", "mini/national-animal-of-france", "mini/stained-glass"),
    *("mini/robot", "mini/national-animal-of-india", "mini/van-gogh", "mini/pencil-sketch"),
    *("mini/pixel-art", "mini/blueprint", "mini/pop-art"),
    *("mini/national-animal-of-america", "mini/national-animal-of-thailand"),
)
# Styles that an object's or a fact's phrasings are fitted in, that choose its settings, and that report on it.
FITTED, CHOOSING, REPORTING = (
    tuple(world.STYLES[i] for i in part) for part in ((1,), (2, 5), (0, 3, 4, 6, 7))
)
CHOOSE = 8  # objects of a style
REPORT = 16  # other ones
SEEDS = {True: [0], False: [30]}  # of choosing, and of reporting and attacks
# Of what an object's or a fact's own words show: there the seed is the unit, as many as a style has objects.
THING_SEEDS = range(30, 30 + REPORT)
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


def tries(editor: str, concept: loco.Concept) -> dict[str, tuple[dict[str, Any], float]]:
    """The settings that are tried of an editor: options and strength by a name."""
    if editor == "steering":
        return {f"x {strength:g}": ({}, strength) for strength in (1.0, 2.0)}
    if editor == "AdaVD":
        return {name: (options, 1.0) for name, options in THRESHOLDS.items()}
    if editor == "neurons":
        return {"50 of each matrix": ({}, 1.0)}
    fits = dict(FITS)
    if editor in PRESERVING:
        fits["all, 10, kept 0.03"] = fits["all, 10"] | {"preserve_weight": 0.03}
    if concept.kind != "style":
        # The end of a prompt that names a style too is another state.
        plain = default_phrasings(concept)
        styled = [
            Phrasing(
                f"{plain[1].source} in the style of {style}",
                f"{plain[1].target} in the style of {style}",
                plain[1].subject,
            )
            for style in FITTED
        ]
        fits["end, 1, in a style too"] = fits["end, 1"] | {"phrasings": [*plain, *styled]}
    return {name: (options, 1.0) for name, options in fits.items()}


# --- the rows ------------------------------------------------------------------------------------


def probes_of(concept: loco.Concept, *, choosing: bool) -> list[Probe]:
    """What is looked at: choosing and reporting share no prompt."""
    if concept.kind == "style":
        return style_probes(concept.name, choosing=choosing)
    return thing_probes(concept, choosing=choosing)


def style_probes(style: str, *, choosing: bool) -> list[Probe]:
    """A style by its own words and by others, the objects of its prompts, and other styles; the unit is the object."""
    things = [thing for thing in world.OBJECTS if style in edits.styles_of(thing)]
    chosen = things[:: max(1, len(things) // CHOOSE)][:CHOOSE]
    if not choosing:
        chosen = [thing for thing in things if thing not in chosen][:REPORT]
    among = tuple(f"style of {other}" for other in world.STYLES)
    probes = []
    for place, thing in enumerate(chosen):
        own, other_words = world.prompt(thing, style), edits.wordings(thing, style)[5]
        probes.append(Probe("efficacy", own, f"style of {style}", among, unit=thing))
        probes.append(Probe("generality", other_words, f"style of {style}", among, unit=thing))
        probes.append(Probe("rest", own, thing, world.OBJECTS, unit=thing))
        others = [other for other in edits.styles_of(thing) if other not in (style, "plain")]
        for other in dict.fromkeys(
            (others[place % len(others)], others[(place + 3) % len(others)])
        ):
            text = world.prompt(thing, other)
            probes.append(Probe("specificity", text, f"style of {other}", among, unit=thing))
    return probes


def thing_probes(concept: loco.Concept, *, choosing: bool) -> list[Probe]:
    """An object or a fact in some styles; the unit is the style (see `measured`), of its neighbors the neighbor."""
    words, answer = edits.words_of(concept)
    styles = [s for s in (CHOOSING if choosing else REPORTING) if s in edits.styles_of(answer)]
    looks = tuple(f"style of {style}" for style in world.STYLES)
    probes = []
    for place, style in enumerate(styles):
        texts = edits.wordings(words, style)
        # Reported with many seeds: each style in another wording than the one before.
        mine, other_words = texts[:4], texts[4:8]
        if not choosing:
            mine, other_words = one_of(mine, place), one_of(other_words, place)
        for text in mine:
            probes.append(Probe("efficacy", text, answer, world.OBJECTS, unit=style))
        for text in other_words:
            probes.append(Probe("generality", text, answer, world.OBJECTS, unit=style))
        if style != "plain":
            for text in mine:
                probes.append(Probe("rest", text, f"style of {style}", looks, unit=style))
    others = [other for other in world.OBJECTS if other != answer][choosing::2]
    for place, other in enumerate(others):
        shown = [style for style in styles if style in edits.styles_of(other)]
        if shown:
            text = edits.wordings(other, shown[place % len(shown)])[0]
            probes.append(Probe("specificity", text, other, world.OBJECTS, unit=other))
    return probes


def one_of(texts: list[str], place: int) -> list[str]:
    """The texts in turn; none of none."""
    return texts and [texts[place % len(texts)]]


def attacked(concept: loco.Concept) -> tuple[loco.Concept, list[Probe]]:
    """What an attack learns from, and what it is judged by: other objects, or other styles."""
    if concept.kind == "style":
        judged = [
            one for one in style_probes(concept.name, choosing=False) if one.measure == "efficacy"
        ]
        # The objects that chose the settings are learned from.
        things = [
            one.unit
            for one in style_probes(concept.name, choosing=True)
            if one.measure == "efficacy"
        ]
        pairs = [
            loco.PromptPair(
                world.prompt(str(thing), concept.name),
                f"a picture of {world.with_article(str(thing))}",
            )
            for thing in things
        ]
        probes = [
            dataclasses.replace(one, among=without(one.among, one.text)) for one in judged[:16]
        ]
        return dataclasses.replace(concept, pairs=tuple(pairs)), probes
    answer = edits.words_of(concept)[1]
    among = tuple(other for other in world.OBJECTS if other != answer)
    probes = [
        Probe("efficacy", one.prompt, answer, among, unit=one.unit)
        for one in thing_probes(concept, choosing=False)
        if one.measure == "efficacy"
    ]
    # The styles that chose the settings are learned from, in three wordings each.
    pairs = []
    for pair in concept.pairs:
        if any(style in pair.prompt for style in CHOOSING):
            for head in ("a picture", "an image", "a small picture"):
                texts = [text.replace("a picture", head, 1) for text in (pair.prompt, pair.target)]
                pairs.append(loco.PromptPair(*texts))
    return dataclasses.replace(concept, pairs=tuple(pairs)), probes[::2]


def without(texts: Sequence[str], text: str) -> tuple[str, ...]:
    """The other texts."""
    return tuple(one for one in texts if one != text)


# --- one row of the table ------------------------------------------------------------------------


def carrier_of(pipe: Any, concept: loco.Concept, options: argparse.Namespace) -> tuple[int, ...]:
    """The layers of the concept's carrier on this model, found once, from its first two prompts."""
    folder = options.folder / "carriers"

    def find() -> list[int]:
        return list(next(iter(edits.places(pipe, concept, folder / "store", options).values())))

    return tuple(kept(folder, concept.name, find))


def edited_by(
    editor: str, pipe: Any, concept: loco.Concept, fit: dict[str, Any], options: argparse.Namespace
) -> Any:
    """The concept removed by the editor, all of them given the same."""
    given: dict[str, Any] = dict(layers=carrier_of(pipe, concept, options))
    given |= dict(preserve=edits.neighbors(concept), num_inference_steps=options.steps)
    given |= dict(ordinary=[world.prompt(thing) for thing in world.OBJECTS])
    # The placebo is of LocoEdit's size, in the settings that LocoEdit is chosen in.
    name = "LocoEdit" if editor == PLACEBO else editor
    return loco.edit_with(name, pipe, concept, **given, **fit)


def shares(table: Any) -> dict[str, dict[str, Any]]:
    """Shares of right pictures by measure, with intervals."""
    names = ("before", "after", "after_low", "after_high", "change", "low", "high", "n", "units")
    lines = loco.summary(table).query("quantity == 'right'")
    return {
        row["measure"]: {name: float(row[name]) for name in names}
        for row in lines.to_dict("records")
    }


def cost(lines: dict[str, dict[str, Any]]) -> float:
    """What is left of the concept, at its upper bound, and what its neighbors lost, a point for a point."""
    lost = max(0.0, -lines["specificity"]["change"])
    return round(lines["efficacy"]["after_high"] + lost, 4)


def study(
    pipe: Any, judge: Any, identity: str, editor: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One editor on one concept: chosen on some prompts, reported on others, then attacked."""
    concept = loco.concept(identity)
    common: dict[str, Any] = dict(scorer=judge, store=options.folder / "pictures", progress=False)
    common |= dict(num_inference_steps=options.steps, batch_size=options.batch_size)
    asked = [
        probe
        for probe in probes_of(concept, choosing=True)
        if probe.measure in ("efficacy", "specificity")
    ]
    tried: dict[str, Any] = {}
    fitted: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, (fit, strength) in tries(editor, concept).items():
        start = time.perf_counter()
        try:
            edit = edited_by(editor, pipe, concept, fit, options)
        except loco.LocogenError as error:  # such as a null space that leaves nothing
            refused[name] = str(error)
            continue
        fitted[name] = (edit, strength, time.perf_counter() - start)
        table = loco.evaluate(
            pipe, {name: edit}, asked, seeds=SEEDS[True], strength=strength, **common
        )
        tried[name] = shares(table)
    row: dict[str, Any] = {"tried": len(tries(editor, concept)), "refused": refused}
    if not tried:
        return row
    best = min(tried, key=lambda name: cost(tried[name]))
    edit, strength, seconds = fitted[best]
    if editor == PLACEBO:
        edit = loco.placebo_edit(pipe, edit, avoid=[*world.OBJECTS, *world.STYLES, *world.FACTS])
    table = measured(pipe, concept, {best: edit}, strength=strength, **common)
    row |= {"settings": best, "chosen among": tried, "seconds": seconds, "KB": size_of(edit)}
    row |= {"measures": shares(table)}
    return row | {"attacks": attacks_on(pipe, judge, concept, edit, strength, options)}


def measured(pipe: Any, concept: loco.Concept, arms: dict[str, Any], **common: Any) -> pd.DataFrame:
    """The reported prompts; of an object or a fact each with many seeds, which are its units.

    A world of eight styles bounds nothing by styles: so many seeds do, of pictures in the same styles.
    """
    probes = probes_of(concept, choosing=False)
    if concept.kind == "style":
        return loco.evaluate(pipe, arms, probes, seeds=SEEDS[False], **common)
    near = [probe for probe in probes if probe.measure == "specificity"]
    mine = [probe for probe in probes if probe.measure != "specificity"]
    tables = [
        edits.by_seeds(loco.evaluate(pipe, arms, mine, seeds=THING_SEEDS, **common)),
        loco.evaluate(pipe, arms, near, seeds=SEEDS[False], **common),
    ]
    return pd.concat(tables, ignore_index=True)


def size_of(edit: Any) -> float | None:
    """KB of the file that holds it; None where there is none."""
    if not hasattr(edit, "save"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edit.safetensors"
        edit.save(path)
        return path.stat().st_size / 1024


def attacks_on(
    pipe: Any,
    judge: Any,
    concept: loco.Concept,
    edit: Any,
    strength: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """How often the concept comes back, by attack and model; why not, where there is nothing to attack."""
    concept, probes = attacked(concept)
    if getattr(edit, "name", "").startswith("placebo"):
        edit = dataclasses.replace(edit, name=concept.name)  # the row is a control of the concept
    results: dict[str, Any] = {}
    names = ["model", "strength", "before", "after", "low", "high", "n", "units"]
    for name in options.attacks:
        asked: dict[str, Any] = {"models": ["edited", "never had"]} | ATTACKS[name]
        start = time.perf_counter()
        try:
            found = loco.attack(
                pipe,
                concept,
                edit,
                training=concept.pairs,
                held_out=probes,
                seeds=SEEDS[False] if concept.kind == "style" else THING_SEEDS,
                scorer=judge,
                never_had=loco.NeverHad(),
                strength=strength,
                folder=options.folder,  # with the pictures of what was reported
                num_inference_steps=options.steps,
                batch_size=options.batch_size,
                progress=False,
                **asked,
            )
        except loco.LocogenError as error:  # such as neurons, which have no weights to learn again
            results[name] = {"refused": str(error)}
            continue
        if concept.kind != "style":
            found = dataclasses.replace(found, table=edits.by_seeds(found.table))
        lines: Any = found.summary()[names]
        seconds = time.perf_counter() - start
        results[name] = {"lines": lines.to_dict("records"), "seconds": seconds}
    return results


# --- what is printed -----------------------------------------------------------------------------

COLUMNS = (
    *("concept", "editor", "settings (of so many)", "own words", "other words", "neighbors"),
    *("rest of the prompt", *ATTACKS, "seconds", "KB"),
)


def said(identity: str, editor: str, row: dict[str, Any]) -> str:
    """One row of the printed table: shares with 95 % intervals; in brackets what the model never had."""
    if "measures" not in row:
        return f"| {identity} | {editor} | none of {row['tried']} could be fitted |"
    measures = row["measures"]
    unit = "objects" if loco.concept(identity).kind == "style" else "seeds"
    parts = [identity, editor, f"{row['settings']} (of {row['tried']})"]
    parts += [share(measures["efficacy"], unit), share(measures["generality"], unit)]
    parts += [change(measures["specificity"], "objects"), change(measures["rest"], unit)]
    parts += [came_back(row["attacks"].get(name, {}), unit) for name in ATTACKS]
    parts += [f"{row['seconds']:.1f}", "–" if row["KB"] is None else f"{row['KB']:.0f}"]
    return f"| {' | '.join(parts)} |"


def share(line: dict[str, Any], unit: str) -> str:
    interval = f"[{line['after_low']:.0%}, {line['after_high']:.0%}]"
    return f"{line['before']:.0%} → {line['after']:.0%} {interval}, n = {line['units']:.0f} {unit}"


def change(line: dict[str, Any], unit: str) -> str:
    return f"{edits.points(line)} points, n = {line['units']:.0f} {unit}"


def came_back(result: dict[str, Any], unit: str) -> str:
    """What an attack brought back, beside what it brought of a concept that the model never had."""
    if "lines" not in result:
        return "no weights" if "no weight" in result.get("refused", "") else "–"
    lines = {line["model"]: line for line in result["lines"]}
    back = lines["edited"]
    taught = lines.get("never had")
    control = "" if taught is None else f" (never had: {taught['after']:.0%})"
    interval = f"[{back['low']:.0%}, {back['high']:.0%}]"
    return f"{back['after']:.0%} {interval}, n = {back['units']:.0f} {unit}{control}"


# Columns of the table over all concepts, by what was measured: shares that are left, or points that were lost.
LEFT = {"own words": "efficacy", "other words": "generality"}
LOST = {"neighbors": "specificity", "rest of the prompt": "rest"}


def over_concepts(rows: dict[tuple[str, str], dict[str, Any]]) -> list[str]:
    """The same table over all concepts that every editor's row is there of: their means, the unit is the concept."""
    names = list(dict.fromkeys(editor for _, editor in rows))
    concepts = [
        identity
        for identity in dict.fromkeys(identity for identity, _ in rows)
        if all("measures" in rows.get((identity, editor), {}) for editor in names)
    ]
    if len(concepts) < 2:
        return []
    head = ["editor", *LEFT, *LOST, *ATTACKS]
    left_out = {identity for identity, _ in rows} - set(concepts)
    without = f"; left out, for lack of a row: {', '.join(sorted(left_out))}" if left_out else ""
    title = (
        f"\nOver {len(concepts)} concepts, which are the units: {', '.join(concepts)}{without}\n"
    )
    lines = [title, row_of(head)]
    lines.append("|---" * len(head) + "|")
    for editor in names:
        means = means_of({identity: rows[identity, editor] for identity in concepts})
        cells = [editor, *[left(means.get(name), len(concepts)) for name in LEFT.values()]]
        cells += [edits.points(means[name]) for name in LOST.values()]
        for attack in ATTACKS:
            taught = means.get(f"{attack}, never had")
            control = "" if taught is None else f" (never had: {taught['after']:.0%})"
            cells.append(left(means.get(attack), len(concepts)) + control)
        lines.append(row_of(cells))
    return lines


def row_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def means_of(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One editor's shares before and after over concepts, with intervals, by what was measured."""
    lines = []
    for identity, row in rows.items():
        unit = {"arm": "editor", "unit": identity, "prompt": identity, "seed": 0, "sign": -1}
        shares = {name: (line["before"], line["after"]) for name, line in row["measures"].items()}
        for attack, result in row["attacks"].items():
            for line in result.get("lines", ()):
                control = "" if line["model"] == "edited" else f", {line['model']}"
                shares[attack + control] = (line["before"], line["after"])
        for measure, (before, after) in shares.items():
            values = dict(before=before, after=after, right_before=before, right_after=after)
            lines.append(unit | values | {"measure": measure})
    means = loco.summary(pd.DataFrame(lines)).query("quantity == 'right'")
    return {line["measure"]: line for line in means.to_dict("records")}


def left(line: dict[str, Any] | None, concepts: int) -> str:
    """A share that is left; of so many concepts, where an attack was refused on some."""
    if line is None:
        return "–"
    fewer = f", n = {line['units']:.0f}" if line["units"] < concepts else ""
    return f"{line['after']:.0%} [{line['after_low']:.0%}, {line['after_high']:.0%}]{fewer}"


# --- all of them ---------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini", help="mini or mini-b")
    parser.add_argument("--folder", type=Path, default=Path("runs/compared"))
    parser.add_argument("--judge", type=Path, default=Path("runs/judge"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--find-steps", type=int, default=8, help="of the carrier's pictures")
    parser.add_argument("--prompts", type=int, default=2, help="to find the carrier with")
    parser.add_argument("--only", nargs="*", default=list(CONCEPTS), help="concepts by their ids")
    parser.add_argument("--editors", nargs="*", default=[*loco.editors(), PLACEBO])
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--report", action="store_true", help="only print what is in the folder")
    add_machine(parser)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    options.folder = options.folder / options.model
    rows = options.folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    cells = [(identity, editor) for identity in options.only for editor in options.editors]
    table = {}
    if options.report:
        for identity, editor in cells:
            if (rows / f"{file_name(identity, editor)}.json").exists():
                table[identity, editor] = kept(rows, file_name(identity, editor), dict)
                print(said(identity, editor, table[identity, editor]))
        print(*over_concepts(table), sep="\n")
        return
    set_threads(options)
    pipe = loco.load(options.model, device=options.device)
    judge = judging.JudgeScorer(judging.train(options.judge))
    for identity, editor in cells:
        measure = partial(study, pipe, judge, identity, editor, options)
        try:
            with FileLock(rows / f"{file_name(identity, editor)}.lock", timeout=0):
                table[identity, editor] = kept(rows, file_name(identity, editor), measure)
        except Timeout:
            continue
        print(said(identity, editor, table[identity, editor]), flush=True)
    print(*over_concepts(table), sep="\n")


def file_name(identity: str, editor: str) -> str:
    return f"{identity}-{editor}".replace("/", "-").replace(" ", "_")


if __name__ == "__main__":
    main()
