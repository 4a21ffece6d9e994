"""Every editor on the same rows: `python tests/benchmarks/editors.py` edits concepts of the mini models in eleven ways.

For each concept and editor: its settings are chosen on some prompts and reported on others, under another seed; how many
were tried is said. Measured, by a judge that no model has seen: how often the concept still shows by the words that
edits are fitted to (efficacy) and by others (generality), what is lost of its neighbors and of the rest of its own
prompts (the object of a style, the style of an object), and how often it comes back: by a solve (closed), by a trained
token vector (inversion), after training on plain pictures and on three of the concept (relearn); each beside a concept
that the model never had, which only the attack can have taught. With a placebo edit as one more row.

A row of a style makes about 250 pictures of 8 steps and trains five times, 25 or 30 steps of 8 pictures; one of an object or
a fact makes three times as many. That is a minute or two of a core, and two to four hours of one for the 13 concepts x 12
rows of a model (`--report` adds up what they took). `--editors hour` makes the rows of four editors: of both models, and
with `attacks.py --kinds hour`, they are what two cores make within an hour.

16 units are reported, so that none of them says at most 21 %. Of a style they are objects, in one wording and under one
seed; of an object or a fact seeds, in the same styles, because eight styles bound nothing by styles. The attacks are short,
so that what they bring back is the least that can be: attacks.py trains longer. What was measured by words and each attack
lie in the folder as soon as they are done; several processes (`--threads 1`) may share it: each takes the next row that no
other has begun. `--report` only prints what is there, `--picture` draws it, `--csv` writes it as a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import editors_table
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
HOUR = ("LocoEdit", "UCE", "steering", PLACEBO)
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


def tries(editor: str, concept: loco.Concept) -> dict[str, tuple[dict[str, Any], float]]:
    """The settings that are tried of an editor: options and strength by a name."""
    if editor == "steering":
        return {f"x {strength:g}": ({}, strength) for strength in (1.0, 2.0)}
    # The placebo is of LocoEdit's size, in the settings that LocoEdit is chosen in.
    settings = loco.editor_settings("LocoEdit" if editor == PLACEBO else editor)
    if concept.kind != "style" and "end, 1" in settings:
        settings["end, 1, in a style too"] = settings["end, 1"] | {"phrasings": styled(concept)}
    return {name: (options, 1.0) for name, options in settings.items()}


def styled(concept: loco.Concept) -> list[Phrasing]:
    """The default phrasings, and one in styles: the end of a prompt that names a style is another state."""
    plain = default_phrasings(concept)
    return [*plain, *edits.in_styles(plain[1], FITTED)]


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


@dataclasses.dataclass(frozen=True)
class Row:
    """One editor on one concept: chosen on some prompts, reported on others, then attacked; each part is kept."""

    pipe: Any
    judge: Any
    identity: str
    editor: str
    options: argparse.Namespace
    fits: dict[str, Any] = dataclasses.field(default_factory=dict)

    @cached_property
    def concept(self) -> loco.Concept:
        return loco.concept(self.identity)

    @cached_property
    def settings(self) -> dict[str, tuple[dict[str, Any], float]]:
        return tries(self.editor, self.concept)

    @property
    def common(self) -> dict[str, Any]:
        """What all pictures are made with, and who looks at them."""
        options = self.options
        pictures: dict[str, Any] = dict(num_inference_steps=options.steps, progress=False)
        return pictures | dict(scorer=self.judge, batch_size=options.batch_size)

    def measure(self) -> dict[str, Any]:
        """All that is asked for, from files where it was measured before."""
        folder, name = self.options.folder / "rows", file_name(self.identity, self.editor)
        row = kept(folder, name, timed(self.by_words))
        if "measures" not in row:
            return row
        row["attacks"] = {}
        for attack in self.options.attacks:
            back = timed(partial(self.attacked, attack, row["settings"]))
            row["attacks"][attack] = kept(folder / "attacks", file_name(name, attack), back)
        return row

    def by_words(self) -> dict[str, Any]:
        """The settings that do best on the choosing prompts, and what is left by the reported ones."""
        probes = [
            probe
            for probe in probes_of(self.concept, choosing=True)
            if probe.measure in ("efficacy", "specificity")
        ]
        common = self.common | {"store": self.options.folder / "pictures"}
        summaries: list[pd.DataFrame] = []
        seconds: dict[str, float] = {}
        refused: dict[str, str] = {}
        for name, (_, strength) in self.settings.items():
            start = time.perf_counter()
            try:
                edit = self.fitted(name)
            except loco.LocogenError as error:  # such as a null space that leaves nothing
                refused[name] = str(error)
                continue
            seconds[name] = time.perf_counter() - start
            arms = {name: edit}
            table = loco.evaluate(
                self.pipe, arms, probes, seeds=SEEDS[True], strength=strength, **common
            )
            summaries.append(loco.summary(table))
        row: dict[str, Any] = {"tried": len(self.settings), "refused": refused}
        if not summaries:
            return row
        best = loco.best_arm(pd.concat(summaries))
        edit, strength = self.reported(best)
        table = measured(self.pipe, self.concept, {best: edit}, strength=strength, **common)
        row |= {"settings": best, "chosen among": list(seconds), "seconds": seconds[best]}
        return row | {"KB": loco.kilobytes(edit), "measures": shares(table)}

    def fitted(self, settings: str) -> Any:
        """The concept removed by the editor, in the settings of this name; fitted once."""
        if settings not in self.fits:
            fit, _ = self.settings[settings]
            self.fits[settings] = edited_by(self.editor, self.pipe, self.concept, fit, self.options)
        return self.fits[settings]

    def reported(self, settings: str) -> tuple[Any, float]:
        """What is reported, and its strength: the same edit, or the placebo of its size."""
        edit, strength = self.fitted(settings), self.settings[settings][1]
        if self.editor == PLACEBO:
            known = [*world.OBJECTS, *world.STYLES, *world.FACTS]
            edit = loco.placebo_edit(self.pipe, edit, avoid=known)
            edit = dataclasses.replace(edit, name=self.concept.name)  # a control of this concept
        return edit, strength

    def attacked(self, attack: str, settings: str) -> dict[str, Any]:
        """How often the concept comes back, by model; why not, where there is nothing to attack."""
        edit, strength = self.reported(settings)
        concept, probes = attacked(self.concept)
        is_style = concept.kind == "style"
        asked: dict[str, Any] = (
            {"models": ["edited", "never had"]} | editors_table.ATTACKS[attack] | self.common
        )
        try:
            result = loco.attack(
                self.pipe,
                concept,
                edit,
                training=concept.pairs,
                held_out=probes,
                seeds=SEEDS[False] if is_style else THING_SEEDS,
                never_had=loco.NeverHad(),
                strength=strength,
                folder=self.options.folder,  # with the pictures of what was reported
                **asked,
            )
        except loco.LocogenError as error:
            if isinstance(edit, loco.Edit):
                raise
            return {"refused": str(error)}  # such as neurons, which have no weights to learn again
        if not is_style:
            result = dataclasses.replace(result, table=edits.by_seeds(result.table))
        names = ["model", "strength", "before", "after", "low", "high", "n", "units"]
        lines: Any = result.summary()[names]
        return {"lines": lines.to_dict("records")}


def timed(measure: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The same, with the seconds of the processor that it took."""

    def measure_timed() -> dict[str, Any]:
        start = time.process_time()
        row = measure()
        return row | {"took": round(time.process_time() - start, 1)}

    return measure_timed


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
    parser.add_argument(
        "--editors", nargs="*", default=[*loco.editors(), PLACEBO], help="or 'hour'"
    )
    parser.add_argument(
        "--attacks",
        nargs="*",
        default=list(editors_table.ATTACKS),
        choices=list(editors_table.ATTACKS),
    )
    parser.add_argument("--report", action="store_true", help="only print what is in the folder")
    parser.add_argument("--csv", type=Path, help="with --report: all its numbers as a table")
    parser.add_argument("--picture", type=Path, help="with --report: editors by concepts, a PNG")
    add_machine(parser)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    options.folder = options.folder / options.model
    rows = options.folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    if options.editors == ["hour"]:
        options.editors = list(HOUR)
    cells = [(identity, editor) for identity in options.only for editor in options.editors]
    print(editors_table.heading(editors_table.HEAD), flush=True)
    if options.report:
        report(cells, options)
        return
    set_threads(options)
    pipe = loco.load(options.model, device=options.device)
    judge = judging.JudgeScorer(judging.train(options.judge))
    for identity, editor in cells:
        row = Row(pipe, judge, identity, editor, options)
        try:
            with FileLock(rows / f"{file_name(identity, editor)}.lock", timeout=0):
                print(editors_table.row_line(identity, editor, row.measure()), flush=True)
        except Timeout:
            continue


def report(cells: Sequence[tuple[str, str]], options: argparse.Namespace) -> None:
    """Print, draw and write the rows that are there."""
    rows = {}
    for identity, editor in cells:
        row = row_in(options.folder / "rows", file_name(identity, editor))
        if row is not None:
            rows[identity, editor] = row
            print(editors_table.row_line(identity, editor, row))
    print("", *editors_table.over_concepts(rows), "", editors_table.time_taken(rows), sep="\n")
    if options.csv:
        editors_table.write_csv(rows, options.csv)
    if options.picture:
        title = f"Editors on {options.model}, in percent; settings chosen on other prompts"
        editors_table.draw(rows, options.picture, title)


def row_in(folder: Path, name: str) -> dict[str, Any] | None:
    """What was measured of a row by words, with the attacks that are there."""
    by_words = folder / f"{name}.json"
    if not by_words.exists():
        return None
    row = json.loads(by_words.read_text(encoding="utf-8"))
    files = {
        attack: folder / "attacks" / f"{file_name(name, attack)}.json"
        for attack in editors_table.ATTACKS
    }
    known = {attack: path for attack, path in files.items() if path.exists()}
    attacks = {
        attack: json.loads(path.read_text(encoding="utf-8")) for attack, path in known.items()
    }
    return row | {"attacks": attacks}


def file_name(*parts: str) -> str:
    return "-".join(parts).replace("/", "-").replace(" ", "_")


if __name__ == "__main__":
    main()
