"""Do edits hold for someone who tries? `python tests/benchmarks/attacks.py` attacks edits of the mini model.

For each concept, one edit of fixed settings is attacked in every way, beside three controls: no edit, a placebo edit of
the same size, and on the edited model a concept that the model never had. An independent judge looks at objects (of an
object or a fact: styles) that no attack learned from. A row is one attack on one model: each takes less than ten minutes
of a core. Every finished row lies in the folder, so that a second call only counts; several processes may share a
folder: each takes the next row that no other has begun. `--kinds core` are the four that say most for the time; `--kinds
hour` the two that take seconds: of all concepts of both models (`--model mini-b`) they and `editors.py --editors hour` are
what two cores make within an hour.

Of a style there are 12 objects to learn from and 14 to be judged by, which are its units. Of an object or a fact there are 3
styles to learn from in 4 wordings each and 4 to be judged by: eight styles bound nothing by styles, so that its units are 14
seeds (of noise, where seeds are what is tried, the styles). Relearning is judged after 100 steps alone, and of three tokens
only 60 steps of gradients are followed: every combination would be too many.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path
from typing import Any

import judge as judging
import pandas as pd
from edits import by_seeds, neighbors, styles_of, wordings, words_of
from filelock import FileLock, Timeout
from machine import add_machine, kept, set_threads

import locogen as loco
from locogen.attacks.goal import Goal, exchanged, exchanged_colors
from locogen.editing.edit import Edit
from locogen.editing.probes import Probe
from locogen.mini import world

OBJECTS = (
    26  # of a style: 12 to learn from and 14 to be judged by, as in the trial that this repeats
)
LEARNED = 12
STYLES_LEARNED, STYLES_JUDGED = ((1, 5, 7), (0, 2, 3, 4))  # of an object or a fact
# Where each concept is edited, from an earlier search, so that rows of different days are of one edit; others are looked for.
# Today's windows share a layer with these: of neon and blueprint 13-14, of van gogh 12-13 (reports/results.md).
CARRIERS = {
    "mini": {
        "pencil sketch": (13, 14),
        "neon": (12, 13),
        "pixel art": (12, 13, 14, 15),
        "blueprint": (12, 13),
        "pop art": (13, 14),
        "stained glass": (12, 13),
        "van gogh": (13, 14),
        "cat": (12, 13),
        "robot": (11, 12),
        "national animal of france": (12, 13),
        "national animal of india": (12, 13),
        "national animal of america": (12, 13, 14, 15),
        "national animal of thailand": (11, 12),
    },
    "mini-b": {"neon": (0, 1), "pixel art": (14, 15), "stained glass": (13, 14)},
}
OTHERS = (
    *("cat", "robot", "national animal of france", "national animal of india"),
    *("national animal of america", "national animal of thailand"),
)
# What is tried, by a name for the table: options of `attack`.
ATTEMPTS: dict[str, dict[str, Any]] = {
    "inversion, 1 vector": dict(kind="inversion", vectors=1, at=[0, 25, 50, 100, 200]),
    "inversion, 2 vectors": dict(kind="inversion", vectors=2),
    "inversion, 4 vectors": dict(kind="inversion", vectors=4),
    "states": dict(kind="states", at=[0, 25, 100]),
    "closed": dict(kind="closed"),
    "discrete, 1 token of all": dict(kind="discrete", vectors=1, exhaustive=True),
    "discrete, 3 tokens by gradient": dict(kind="discrete", vectors=3, steps=60),
    "relearn, keys and values": dict(kind="relearn", pictures=[0, 1, 3, 10]),
    "relearn, cross attention": dict(
        kind="relearn", pictures=[0, 1, 3, 10], trained="cross attention"
    ),
    "completion": dict(kind="completion"),
    "noise": dict(kind="noise", seeds=range(24)),
    "inpaint": dict(kind="inpaint"),
}
CORE = ("inversion, 1 vector", "closed", "noise", "relearn, keys and values")
SHORT = "inversion, 1 vector, 25 steps"
HOUR = (SHORT, "closed")
# In no list of all: "inversion, 1 vector" goes through the same steps.
SHORTER: dict[str, dict[str, Any]] = {SHORT: dict(kind="inversion", vectors=1, at=[0, 25])}
STYLE_SEEDS = range(2)
THING_SEEDS = range(14)  # the units of an object or a fact, as many as a style has objects


def style_concept(style: str) -> tuple[loco.Concept, list[Probe]]:
    """The style with pairs to learn from, and probes of other objects for the judge."""
    seen = [thing for thing in world.OBJECTS if (thing, style) not in world.HELD_OUT]
    things = seen[:: max(1, len(seen) // OBJECTS)][:OBJECTS]
    # Taken in turn, so that both parts hold things of every sort.
    learned = things[::2][:LEARNED]
    judged = [thing for thing in things if thing not in learned]
    pairs = [
        loco.PromptPair(world.prompt(thing, style), f"a picture of {world.with_article(thing)}")
        for thing in learned
    ]
    others = tuple(other for other in world.STYLES[1:] if other != style)
    concept = loco.Concept(style, "style", tuple(pairs), neighbors=others)
    among = tuple(f"style of {other}" for other in world.STYLES if other != style)
    probes = [
        Probe("efficacy", world.prompt(thing, style), f"style of {style}", among, unit=thing)
        for thing in judged
    ]
    return concept, probes


def identity_of(name: str) -> str:
    """The catalog's id of a concept."""
    return f"mini/{name.replace(' ', '-')}"


def thing_concept(name: str) -> tuple[loco.Concept, list[Probe]]:
    """An object or a fact with pairs in some styles to learn from, and probes in others for the judge."""
    known = loco.concept(identity_of(name))
    words, answer = words_of(known)
    shown = styles_of(answer)
    learned, judged = (
        [world.STYLES[place] for place in places if world.STYLES[place] in shown]
        for places in (STYLES_LEARNED, STYLES_JUDGED)
    )
    pairs = []
    for style in learned:
        texts = wordings(words, style)
        target = f"a picture in the style of {style}"
        if known.kind == "fact":
            target = world.prompt("robot", style)  # as the catalog's facts
        pairs += [loco.PromptPair(text, target) for text in texts[:: max(1, len(texts) // 4)]]
    concept = loco.Concept(
        name, known.kind, tuple(pairs), answer=known.answer, neighbors=known.neighbors
    )
    probes = []
    for place, style in enumerate(judged):
        texts = wordings(words, style)
        # Each style in another wording than the one before.
        text = texts[4 * place % len(texts)]
        probes.append(Probe("efficacy", text, answer, world.OBJECTS, unit=style))
    return concept, probes


def concept_of(name: str) -> tuple[loco.Concept, list[Probe]]:
    """What is attacked, and how it is judged."""
    return style_concept(name) if name in world.STYLES else thing_concept(name)


def edit_of(pipe: Any, style: str, layers: tuple[int, ...], how: str) -> Edit:
    """The edit under attack: every position, a large λ, and as a rule the neighbors preserved."""
    concept = loco.concept(identity_of(style))
    options: dict[str, Any] = {"tokens": "all", "ridge": 10.0}
    if how == "preserved":
        options |= {"preserve": neighbors(concept), "preserve_weight": 0.03}
    return loco.fit_edit(pipe, concept, layers=layers, **options)


def places(pipe: Any, style: str, options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """Where the style is edited: at its carrier, and at all layers."""
    every = tuple(layer.index for layer in loco.find_layers(pipe))
    carrier = carrier_of(pipe, style, options)
    named = {f"layers {', '.join(map(str, carrier))}, {options.edit}": carrier}
    everywhere = {f"all layers, {options.edit}": every} if options.all_layers else {}
    return {name: layers for name, layers in named.items() if layers} | everywhere


def carrier_of(pipe: Any, style: str, options: argparse.Namespace) -> tuple[int, ...]:
    """The layers of the concept's carrier, from two prompts; () where there is none."""
    known = CARRIERS.get(options.model, {})
    if style in known:
        return known[style]

    def find() -> list[int]:
        few = loco.concept(identity_of(style)).first(2)
        run = loco.localize(
            pipe,
            few,
            seeds=range(4),
            num_inference_steps=options.steps,
            batch_size=options.batch_size,
            store=options.folder / "carriers" / "store",
            progress=False,
        )
        best = loco.carrier(loco.effect(run.table))
        return list(best) or sorted({layer for place in best.places for layer in place})

    name = f"{style.replace(' ', '-')}-{options.steps}-steps"
    return tuple(kept(options.folder / "carriers", name, find))


def recognized(judge: Any, concept: loco.Concept) -> dict[str, float]:
    """How often renders of a style are taken for it, and how often their colors for exchanged ones."""
    among = [f"style of {style}" for style in world.STYLES]
    mine = among.index(f"style of {concept.name}")
    pictures = [
        world.render(thing, concept.name, random.Random(f"attacks/{thing}"))
        for thing in world.OBJECTS
    ]
    scores = judge(pictures, *[[text] * len(pictures) for text in among])
    turned = [exchanged(picture) for picture in pictures]
    references, others = turned[::2], turned[1::2]
    return {
        "taken for it": float((pd.DataFrame(scores).idxmax() == mine).mean()),
        "exchanged, with exchanged colors": float(exchanged_colors(others, references).mean()),
        "as they are, with exchanged colors": float(
            exchanged_colors(pictures[1::2], references).mean()
        ),
    }


def ceiling(pipe: Any, judge: Any, name: str, options: argparse.Namespace) -> float:
    """How often perfect pictures of the control would count: the model's own, red and blue exchanged.

    An attack on the control cannot bring more. Its colors are told by one mean of the learned pictures, which fits a
    style better than an object in many styles.
    """
    concept, probes = concept_of(name)
    goal = Goal(
        pipe,
        concept,
        training=concept.pairs if concept.kind != "style" else concept.pairs[::2],
        probes=tuple(probes),
        seeds=tuple(seeds_of(concept)),
        scorer=judge,
        store=options.folder / "states" / "pictures",
        settings=dict(
            num_inference_steps=options.steps, batch_size=options.batch_size, progress=False
        ),
        never_had=loco.NeverHad(),
    )
    perfect = [exchanged(picture) for picture in goal.pictures(goal.prompts)]
    return float(goal.judge(perfect).shown.mean())


def seeds_of(concept: loco.Concept) -> range:
    return STYLE_SEEDS if concept.kind == "style" else THING_SEEDS


def row(
    pipe: Any,
    judge: Any,
    style: str,
    place: str,
    name: str,
    model: str,
    options: argparse.Namespace,
) -> pd.DataFrame:
    """One attack on one model, as a summary with intervals."""
    concept, probes = concept_of(style)
    layers = places(pipe, style, options)[place]
    given: dict[str, Any] = {"seeds": seeds_of(concept)} | (ATTEMPTS | SHORTER)[name]
    found = loco.attack(
        pipe,
        concept,
        edit_of(pipe, style, layers, options.edit),
        held_out=probes,
        scorer=judge,
        never_had=loco.NeverHad(),
        seed=options.seed,
        folder=options.folder / "states",
        num_inference_steps=options.steps,
        batch_size=options.batch_size,
        models=[model],
        training=concept.pairs if concept.kind != "style" else None,
        progress=options.progress,
        **given,
    )
    path = options.folder / "files" / f"{slug(style, place, name, options.seed, model)}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path, model=model)
    if concept.kind != "style" and given["kind"] != "noise":
        found = dataclasses.replace(found, table=by_seeds(found.table))
    return found.summary().assign(style=style, place=place, attack=name, seed=options.seed)


def slug(*parts: object) -> str:
    return "-".join(str(part).replace(" ", "_").replace(",", "") for part in parts)


def rows(pipe: Any, judge: Any, options: argparse.Namespace) -> list[pd.DataFrame]:
    """All rows that no other process is at."""
    tables = []
    for style in options.only:
        for place in places(pipe, style, options):
            for name in options.kinds:
                parts = []
                for model in options.models:
                    parts.append(finished(pipe, judge, style, place, name, model, options))
                known = [part for part in parts if part is not None]
                if known:
                    tables.append(pd.concat(known, ignore_index=True))
                    print(*[said(line) for line in lines_of(tables[-1])], sep="\n", flush=True)
    return tables


def finished(
    pipe: Any,
    judge: Any,
    style: str,
    place: str,
    name: str,
    model: str,
    options: argparse.Namespace,
) -> pd.DataFrame | None:
    """A row from its file, or made now; None where another process is at it."""
    path = options.folder / "rows" / f"{slug(style, place, name, options.seed, model)}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            if not path.exists():
                start = time.process_time()
                table = row(pipe, judge, style, place, name, model, options)
                table = table.assign(seconds=round(time.process_time() - start, 1))
                table.to_csv(path, index=False)
            return pd.read_csv(path)
    except Timeout:
        return None


def lines_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A line a strength of the edited model, with the controls of the same strength."""
    lines = []
    # Of the noise only powers of two are printed: best of 1, 2, 4, …
    strengths = [
        s for s in table.strength.unique() if "noise" not in str(table.attack[0]) or s in (1, 4, 24)
    ]
    for strength in strengths:
        part = table[table.strength == strength].set_index("model")
        first = part.iloc[0]
        line = {"style": first["style"], "place": first["place"], "attack": first["attack"]}
        own = part.loc["edited"] if "edited" in part.index else first
        line |= {"strength": strength, "own": own["before"], "units": int(first["units"])}
        line |= {model: part.loc[model] for model in part.index}
        lines.append(line)
    return lines


def said(line: dict[str, Any]) -> str:
    """One row of the printed table: shares of pictures, and the best of the seeds by units."""
    parts = [line["style"], line["place"], line["attack"], line["strength"], f"{line['own']:.0%}"]
    for model in ("edited", "placebo", "unedited", "never had"):
        parts.append(percent(line[model]) if model in line else "–")
    return f"| {' | '.join(map(str, parts))} |"


def percent(one: Any) -> str:
    return (
        f"{one['before']:.0%} → {one['after']:.0%} [{one['low']:.0%}, {one['high']:.0%}], best of {one['seeds']}: "
        f"{round(one['best'] * one['units'])} of {one['units']}"
    )


HEADING = (
    "| concept | edited at | attack | strength | own words | edited, attacked | placebo | unedited | never had |"
    "\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--folder", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--judge", type=Path, default=Path("runs/judge"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the attacks' own draws")
    everything = [*world.STYLES[1:], *OTHERS]
    parser.add_argument("--only", nargs="*", default=everything, help="names of concepts")
    parser.add_argument(
        "--kinds",
        nargs="*",
        default=list(ATTEMPTS),
        help="rows of ATTEMPTS, or 'core', or 'hour'",
    )
    parser.add_argument(
        "--models",
        nargs="*",
        default=["edited", "unedited", "placebo", "never had"],
        help="what is attacked",
    )
    parser.add_argument(
        "--all-layers", action="store_true", help="attack the edit at all layers as well"
    )
    parser.add_argument(
        "--edit",
        choices=["preserved", "bare"],
        default="preserved",
        help="with or without neighbors preserved",
    )
    parser.add_argument("--progress", action="store_true")
    add_machine(parser)
    options = parser.parse_args()
    set_threads(options)
    options.folder = options.folder / options.model
    options.kinds = {"core": CORE, "hour": HOUR}.get(" ".join(options.kinds), options.kinds)
    pipe = loco.load(options.model, device=options.device)
    judge = judging.JudgeScorer(judging.train(options.judge))
    for style in [name for name in options.only if name in world.STYLES]:
        share = recognized(judge, style_concept(style)[0])
        print(f"renders of {style}: {json.dumps(share)}")
    for name in options.only:
        most = ceiling(pipe, judge, name, options)
        print(f"never had, {name}: perfect pictures count in {most:.0%}", flush=True)
    print(HEADING)
    tables = rows(pipe, judge, options)
    if tables:
        pd.concat(tables).to_csv(options.folder / "attacks.csv", index=False)


if __name__ == "__main__":
    main()
