"""Which edit holds for someone who tries? `python tests/benchmarks/harder.py` tries edits of the mini model.

For each concept some edits (VARIANTS) are tried on choosing prompts: is it gone by its own words, do its neighbors stay,
and how often does one trained token vector bring it back? Only edits that pass the first two, and the carrier's plain one,
are attacked, for 25 steps and those that pass again for 100, which choose.

Attacks learn from the choosing prompts, and edits of many phrasings are fitted to them: on these such edits look better than
they are. So the best one and the carrier's are reported on prompts that nothing has seen: other objects (of an object: other
styles), other seeds, and another training, beside what the attack teaches a model that never had the concept, and beside a
placebo of the same size. Each edit and each attack lies in the folder when it is done, so that a second call only counts.

The unit of every interval is the object: of a style 28 are reported on, so that none of them says at most 12 %. A world of
eight styles bounds nothing by styles: of an object or a fact the unit is the seed, 28 as well, and its intervals speak of
further seeds in the same styles.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import judge as judging
import pandas as pd
from attacks import OTHERS, STYLES_LEARNED, carrier_of, concept_of, identity_of
from edits import (
    by_seeds,
    in_styles,
    in_wordings,
    neighbors,
    points,
    rates,
    styles_of,
    wordings,
    words_of,
)
from machine import add_machine, kept, set_threads

import locogen as loco
from locogen.editing.edit import Edit
from locogen.editing.probes import Probe
from locogen.mini import world
from locogen.phrasings import Phrasing, default_phrasings

GONE, LOST = 1 / 8, 0.02  # bars on choosing prompts: shown by own words, lost of the neighbors
SHARE = 0.9  # of what the target does: the layers that attribution names for it
CHOSEN_STEPS, REPORTED_STEPS = (25,), (25, 200)  # of the attack: looked at after so many
LONGER_STEPS = (100,)  # of the attack by which the best edit is chosen
HARDENING_STEPS = 25
CHOSEN_SEEDS, REPORTED_SEEDS = (0,), (30, 31)
# Of what an object's or a fact's own words show: there the seed is the unit.
THING_SEEDS = {"chosen": tuple(range(6)), "reported": tuple(range(30, 58))}
# Other styles in which an object is looked at as a neighbor.
NEIGHBORS = {"chosen": 2, "reported": 4}


@dataclass(frozen=True)
class Variant:
    """One edit that is tried.

    Attributes:
        place: "carrier", "attribution" (the layers that it names), or "all" layers.
        options: Of `fit_edit`.
        phrased: "default"; "many": in other wordings, with objects (or styles).
        rounds: Rounds of `harden`: trained vectors that are edited as well.
    """

    place: str = "carrier"
    options: dict[str, Any] = field(default_factory=dict)
    phrased: str = "default"
    rounds: int = 0


INPUT = {"tokens": "all", "ridge": 10.0, "preserve_weight": 0.03}
OUTPUT = {"tokens": "all", "ridge": 0.001, "preserve_weight": 0.3, "side": "output"}
PLAIN = "carrier"  # the edit that attacks.py attacks
VALUES = {"matrices": "v"}
LESS, MORE = {"preserve_weight": 0.003}, {"preserve_weight": 3.0}
VARIANTS: dict[str, Variant] = {
    PLAIN: Variant(options=INPUT),
    "3 rounds in closed form": Variant(options=INPUT | {"rounds": 3}),
    "2 trained rounds": Variant(options=INPUT, rounds=2),
    "outputs of values": Variant(options=OUTPUT | VALUES),
    "all layers": Variant("all", INPUT),
    "all layers, 3 rounds in closed form": Variant("all", INPUT | {"rounds": 3}),
    "all layers, outputs of values": Variant("all", OUTPUT | VALUES),
    "all layers, outputs of values, less preserved": Variant("all", OUTPUT | VALUES | LESS),
    "all layers, outputs of keys and values": Variant("all", OUTPUT),
    "many phrasings": Variant(options=INPUT, phrased="many"),
    "many phrasings, 2 trained rounds": Variant(options=INPUT, phrased="many", rounds=2),
    "values": Variant(options=INPUT | VALUES),
    "keys": Variant(options=INPUT | {"matrices": "k"}),
    "attribution's layers": Variant("attribution", INPUT),
    "attribution's layers, outputs of values": Variant("attribution", OUTPUT | VALUES),
    "all layers, 2 trained rounds": Variant("all", INPUT, rounds=2),
    "all layers, outputs of values, many phrasings": Variant(
        "all", OUTPUT | VALUES, phrased="many"
    ),
    "all layers, outputs of values, 2 trained rounds": Variant("all", OUTPUT | VALUES, rounds=2),
    "many phrasings, 2 trained rounds, more preserved": Variant(
        options=INPUT | {"preserve_weight": 0.3}, phrased="many", rounds=2
    ),
    "outputs of values, many phrasings": Variant(options=OUTPUT | VALUES, phrased="many"),
    "all layers, outputs of values, many phrasings, more preserved": Variant(
        "all", OUTPUT | VALUES | MORE, phrased="many"
    ),
    "all layers, outputs of values, 2 trained rounds, more preserved": Variant(
        "all", OUTPUT | VALUES | MORE, rounds=2
    ),
}


# --- what is looked at ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Subject:
    """A concept with what is learned from, chosen by and reported on, all of it apart.

    Attributes:
        name: Its name.
        concept: With the pairs that attacks learn from.
        own: Probes of its own words, of choosing and of reporting.
        near: Probes of its neighbors, likewise.
    """

    name: str
    concept: loco.Concept
    own: dict[str, list[Probe]]
    near: dict[str, list[Probe]]

    @property
    def is_style(self) -> bool:
        return self.concept.kind == "style"


def subject_of(name: str) -> Subject:
    return style_subject(name) if name in world.STYLES else thing_subject(name)


def style_subject(style: str) -> Subject:
    """Of every three objects one is learned from by attacks and chooses, and two are reported on."""
    shown = [thing for thing in world.OBJECTS if style in styles_of(thing)]
    parts = {
        "chosen": shown[::3],
        "reported": [thing for place, thing in enumerate(shown) if place % 3],
    }
    pairs = [
        loco.PromptPair(world.prompt(thing, style), world.prompt(thing))
        for thing in parts["chosen"]
    ]
    others = tuple(other for other in world.STYLES[1:] if other != style)
    concept = loco.Concept(style, "style", tuple(pairs), neighbors=others)
    own, near = {}, {}
    among = tuple(f"style of {other}" for other in world.STYLES)
    for part in ("chosen", "reported"):
        own[part] = [
            Probe("efficacy", world.prompt(thing, style), f"style of {style}", among, unit=thing)
            for thing in parts[part]
        ]
        near[part] = []
        for number, thing in enumerate(parts[part]):
            rest = [other for other in styles_of(thing) if other != style]
            # Each object in other styles than the one before.
            turned = rest[number % len(rest) :] + rest[: number % len(rest)]
            near[part] += [
                Probe(
                    "specificity",
                    world.prompt(thing, other),
                    f"style of {other}",
                    among,
                    unit=thing,
                )
                for other in turned[: NEIGHBORS[part]]
            ]
    return Subject(style, concept, own, near)


def thing_subject(name: str) -> Subject:
    """An object or a fact: some styles are learned from by attacks and choose, the others are reported on."""
    concept, _ = concept_of(name)
    words, answer = words_of(concept)
    learned = [world.STYLES[place] for place in STYLES_LEARNED]
    shown = {
        "chosen": [style for style in styles_of(answer) if style in learned],
        "reported": [style for style in styles_of(answer) if style not in learned],
    }
    own, near = {}, {}
    others = [thing for thing in world.OBJECTS if thing != answer]
    for turn, (part, styles) in enumerate(shown.items()):
        # Each style in another wording than the one before.
        texts = [wordings(words, style)[4 * (n % 3)] for n, style in enumerate(styles)]
        own[part] = [
            Probe("efficacy", text, answer, world.OBJECTS, unit=style)
            for text, style in zip(texts, styles, strict=True)
        ]
        near[part] = []
        for number, thing in enumerate(others[turn::2]):
            text = world.prompt(thing, styles[number % len(styles)])
            near[part].append(Probe("specificity", text, thing, world.OBJECTS, unit=thing))
    return Subject(name, concept, own, near)


# --- what is tried -------------------------------------------------------------------------------


def layers_of(pipe: Any, name: str, place: str, options: argparse.Namespace) -> tuple[int, ...]:
    if place == "all":
        return tuple(layer.index for layer in loco.find_layers(pipe))
    if place == "carrier":
        return carrier_of(pipe, name, options)

    def attributed() -> list[int]:
        few = loco.concept(identity_of(name)).first(2)
        shares = loco.attribute(
            pipe, few, seeds=range(2), num_inference_steps=options.steps, progress=False
        )
        return list(shares.leading(SHARE))

    return tuple(kept(options.folder / "places", name.replace(" ", "-"), attributed))


def phrasings_of(subject: Subject, phrased: str) -> list[Phrasing]:
    known = loco.concept(identity_of(subject.name))
    plain = list(default_phrasings(known))
    if phrased == "default":
        return plain
    if known.kind != "style":
        return plain + in_styles(plain[1])
    # The objects that attacks learn from and that choose: none of them is reported on.
    named = [Phrasing(pair.prompt, pair.target, known.name) for pair in subject.concept.pairs]
    return in_wordings(known) + named


def fitted(pipe: Any, subject: Subject, variant: Variant, options: argparse.Namespace) -> Edit:
    known = loco.concept(identity_of(subject.name))
    edit = loco.fit_edit(
        pipe,
        known,
        layers=layers_of(pipe, subject.name, variant.place, options),
        phrasings=phrasings_of(subject, variant.phrased),
        preserve=neighbors(known),
        **variant.options,
    )
    return loco.harden(
        pipe,
        subject.concept,
        edit,
        rounds=variant.rounds,
        training=subject.concept.pairs,
        steps=HARDENING_STEPS,
        seed=1_000,  # of its own: the attack that judges it draws others
        folder=options.folder / "hardened",
        num_inference_steps=options.steps,
        batch_size=options.batch_size,
        progress=False,
    )


# --- what comes of it ----------------------------------------------------------------------------


def words_and_neighbors(
    pipe: Any,
    judge: Any,
    subject: Subject,
    edit: Edit,
    part: str,
    seeds: Sequence[int],
    options: Any,
) -> dict[str, Any]:
    """What is left by its own words, and of its neighbors."""
    tables = []
    for probes, their_seeds in (
        (subject.own[part], seeds_of(subject, part, seeds)),
        (subject.near[part], seeds),
    ):
        table = loco.evaluate(
            pipe,
            {"edit": edit},
            probes,
            seeds=their_seeds,
            scorer=judge,
            store=options.folder / "store",
            num_inference_steps=options.steps,
            batch_size=options.batch_size,
            progress=False,
        )
        tables.append(table)
    if not subject.is_style:
        tables[0] = by_seeds(tables[0])
    return rates(pd.concat(tables, ignore_index=True))["edit"]


def seeds_of(subject: Subject, part: str, seeds: Sequence[int]) -> Sequence[int]:
    """The seeds of its own words' pictures."""
    return seeds if subject.is_style else THING_SEEDS[part]


def attacked(
    pipe: Any, judge: Any, subject: Subject, edit: Edit, part: str, options: Any, **given: Any
) -> list[dict[str, Any]]:
    """What an attack brings back, a line a model and strength."""
    found = loco.attack(
        pipe,
        subject.concept,
        edit,
        training=subject.concept.pairs,
        held_out=subject.own[part],
        scorer=judge,
        folder=options.folder / "attacks",
        num_inference_steps=options.steps,
        batch_size=options.batch_size,
        progress=False,
        **given,
    )
    if not subject.is_style:
        found = replace(found, table=by_seeds(found.table))
    scores: Any = found.table.groupby(["model", "strength"], sort=False)["after"].mean()
    lines = found.summary().to_dict("records")
    return [line | {"score": scores[line["model"], line["strength"]]} for line in lines]


def tried(
    pipe: Any, judge: Any, subject: Subject, name: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One edit on the choosing prompts; attacked if it does what an edit should, or is the plain one."""
    edit = fitted(pipe, subject, VARIANTS[name], options)
    lines = words_and_neighbors(pipe, judge, subject, edit, "chosen", CHOSEN_SEEDS, options)
    result = {"layers": list(edit.layers), "lines": lines}
    if passes(lines) or name == PLAIN:
        seeds = seeds_of(subject, "chosen", CHOSEN_SEEDS)
        short = dict(kind="inversion", at=CHOSEN_STEPS, seeds=seeds, models=["edited"])
        result["attack"] = attacked(pipe, judge, subject, edit, "chosen", options, **short)
    return result


def attacked_longer(
    pipe: Any, judge: Any, subject: Subject, name: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A longer attack on an edit that passes: some hold for 25 steps and not for more."""
    edit = fitted(pipe, subject, VARIANTS[name], options)
    seeds = seeds_of(subject, "chosen", CHOSEN_SEEDS)
    longer = dict(kind="inversion", at=LONGER_STEPS, seeds=seeds, models=["edited"])
    return attacked(pipe, judge, subject, edit, "chosen", options, **longer)


def passes(lines: dict[str, Any]) -> bool:
    return lines["efficacy"]["after"] <= GONE and lines["specificity"]["change"] >= -LOST


def best_of(results: dict[str, Any]) -> str:
    """The edit from which least comes back: fewest pictures, then the lowest mean probability."""
    good = {
        name: result.get("longer", result["attack"])[-1]
        for name, result in results.items()
        if passes(result["lines"])
    }
    if not good:
        return PLAIN
    return min(good, key=lambda n: (good[n]["after"], good[n]["score"]))


def reported(
    pipe: Any, judge: Any, subject: Subject, name: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One edit on the reported prompts, with the controls."""
    edit = cache(partial(fitted, pipe, subject, VARIANTS[name], options))  # where one is needed
    folder = options.folder / "reported"

    def words() -> dict[str, Any]:
        return words_and_neighbors(
            pipe, judge, subject, edit(), "reported", REPORTED_SEEDS, options
        )

    def attack_by(kind: str, model: str) -> list[dict[str, Any]]:
        many = seeds_of(subject, "reported", REPORTED_SEEDS)
        given: dict[str, Any] = dict(kind=kind, seeds=many, seed=1, models=[model])
        if kind == "inversion":
            given["at"] = REPORTED_STEPS
        return attacked(pipe, judge, subject, edit(), "reported", options, **given)

    title = f"{subject.name}-{name}".replace(" ", "_")
    result: dict[str, Any] = {"lines": kept(folder, f"{title}-words", words), "attacks": {}}
    for kind in options.attacks:
        result["attacks"][kind] = []
        for model in options.models:
            file = f"{title}-{kind}-{model}".replace(" ", "_")
            result["attacks"][kind] += kept(folder, file, partial(attack_by, kind, model))
    return result


# --- tables --------------------------------------------------------------------------------------


def tried_line(subject: str, name: str, result: dict[str, Any]) -> str:
    own, near = result["lines"]["efficacy"], result["lines"]["specificity"]
    back = [came_back(result[kind][-1]) if kind in result else "–" for kind in ("attack", "longer")]
    layers = ", ".join(map(str, result["layers"])) if len(result["layers"]) < 16 else "all"
    parts = [subject, name, layers, f"{own['after']:.0%} (≤ {own['after_high']:.0%})"]
    return f"| {' | '.join([*parts, points(near), *back])} |"


def came_back(line: dict[str, Any]) -> str:
    return f"{line['after']:.0%} [{line['low']:.0%}, {line['high']:.0%}]"


def reported_lines(subject: str, name: str, result: dict[str, Any]) -> list[str]:
    own, near = result["lines"]["efficacy"], result["lines"]["specificity"]
    head = [subject, name, f"{own['after']:.0%} (≤ {own['after_high']:.0%})", points(near)]
    if not result["attacks"]:
        return [f"| {' | '.join([*head, *4 * ['–']])} |"]
    lines = []
    for kind, rows in result["attacks"].items():
        for strength in dict.fromkeys(row["strength"] for row in rows):
            by_model = {row["model"]: row for row in rows if row["strength"] == strength}
            cells = [
                came_back(by_model[model]) if model in by_model else "–"
                for model in ("edited", "never had", "placebo")
            ]
            lines.append(f"| {' | '.join([*head, f'{kind}, {strength}', *cells])} |")
    return lines


OVERALL = (
    "| edit | own words | neighbors, points | passes | after 25 steps of inversion, where it passes |"
    "\n|---|---|---|---|---|"
)


def overall_lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """Each edit over all concepts, on choosing prompts: means, and how many it does what an edit should for."""
    lines = []
    for name in next(iter(results.values())):
        tries = [by_name[name] for by_name in results.values()]
        shown = statistics.mean(one["lines"]["efficacy"]["after"] for one in tries)
        change = statistics.mean(one["lines"]["specificity"]["change"] for one in tries)
        back = [one["attack"][-1]["after"] for one in tries if passes(one["lines"])]
        cells = [name, f"{shown:.0%}", f"{100 * change:+.1f}", f"{len(back)} of {len(tries)}"]
        cells.append(f"{statistics.mean(back):.0%}" if back else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


TRIED = (
    "| concept | edit | layers | own words | neighbors, points | after 25 steps of inversion | 100 |"
    "\n|---|---|---|---|---|---|---|"
)
REPORTED = (
    "| concept | edit | own words | neighbors, points | attack | edited | never had | placebo |"
    "\n|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--folder", type=Path, default=Path("runs/harder"))
    parser.add_argument("--judge", type=Path, default=Path("runs/judge"))
    parser.add_argument("--steps", type=int, default=8)
    first = ["neon", "stained glass", "robot"]  # just outside the bar of edits.py
    rest = [name for name in (*world.STYLES[1:], *OTHERS) if name not in first]
    parser.add_argument("--only", nargs="*", default=[*first, *rest], help="names of concepts")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--attacks", nargs="*", default=["inversion"], help="kinds, for the report")
    parser.add_argument(
        "--report", nargs="*", help="edits to report, in place of the best and the carrier's"
    )
    parser.add_argument(
        "--models", nargs="*", default=["edited", "never had", "placebo"], help="of the report"
    )
    parser.add_argument("--short", action="store_true", help="attack for 25 steps alone")
    parser.add_argument("--choose-only", action="store_true", help="leave out the report")
    add_machine(parser)
    options = parser.parse_args()
    set_threads(options)
    options.folder = options.folder / options.model
    pipe = loco.load(options.model, device=options.device)
    judge = judging.JudgeScorer(judging.train(options.judge))
    results = {}
    for name in options.only:
        subject = subject_of(name)
        best = PLAIN
        if options.variants:
            results[name] = all_tried(pipe, judge, subject, options)
            best = best_of(results[name])
            print(f"\nBest of them: {best}", flush=True)
        if not options.choose_only:
            print(f"\nOn reported prompts\n\n{REPORTED}", flush=True)
            for variant in options.report or dict.fromkeys([best, PLAIN]):
                result = reported(pipe, judge, subject, variant, options)
                print(*reported_lines(name, variant, result), sep="\n", flush=True)
    if len(results) > 1:
        print(f"\nOver {len(results)} concepts, on choosing prompts\n\n{OVERALL}")
        print(*overall_lines(results), sep="\n")


def all_tried(
    pipe: Any, judge: Any, subject: Subject, options: argparse.Namespace
) -> dict[str, Any]:
    """Every edit on the choosing prompts, printed as it is done."""
    print(f"\n{len(options.variants)} edits of {subject.name}, on choosing prompts\n\n{TRIED}")
    results: dict[str, Any] = {}
    for variant in options.variants:
        file = f"{subject.name}-{variant}".replace(" ", "_")
        try_out = partial(tried, pipe, judge, subject, variant, options)
        result = kept(options.folder / "tried", file, try_out)
        if passes(result["lines"]) and not options.short:
            attack_longer = partial(attacked_longer, pipe, judge, subject, variant, options)
            result["longer"] = kept(options.folder / "longer", file, attack_longer)
        results[variant] = result
        print(tried_line(subject.name, variant, result), flush=True)
    return results


if __name__ == "__main__":
    main()
