"""Every editor on the same rows: `python tests/benchmarks/editors.py` edits styles of the mini model in ten ways.

An editor's settings are chosen on some objects and reported on others, under other seeds; how many were tried is said.
Measured: how often the style still shows by its own words (efficacy), what is lost of the other styles (neighbors) and of
the objects of its own prompts (rest), seconds, KB, and with --attacks whether it comes back. Every finished row lies in
the folder; several processes may share it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judge as judging
from attacks import carrier_of, style_concept
from edits import choice, divided, merge, neighbors, percent, probes_of, rates, thinned
from filelock import FileLock, Timeout
from machine import add_machine, kept, set_threads

import locogen as loco
from locogen.editing.edit import Edit
from locogen.editing.probes import Probe
from locogen.mini import world

# What is tried of each closed-form editor, and of the one that subtracts at run time.
FITS: dict[str, dict[str, Any]] = {
    "last_subject, 0.01": {"tokens": "last_subject", "ridge": 0.01},
    "end, 1": {"tokens": "end", "ridge": 1.0},
    "all, 10": {"tokens": "all", "ridge": 10.0},
}
STRENGTHS = (1.0, 2.0)


def tries(editor: str) -> dict[str, tuple[dict[str, Any], float]]:
    """The settings that are tried of an editor: options and strength by a name."""
    if editor == "steering":
        return {f"× {strength:g}": ({}, strength) for strength in STRENGTHS}
    if editor == "neurons":
        return {"50 of each matrix": ({}, 1.0)}
    return {name: (options, 1.0) for name, options in FITS.items()}


def rest_probes(own: Sequence[Probe]) -> list[Probe]:
    """Whether the object of an edited style's prompt is still shown."""
    return [
        Probe("rest", probe.prompt, str(probe.unit), world.OBJECTS, unit=probe.unit)
        for probe in own
        if probe.measure == "efficacy"
    ]


def size_of(edited: Any) -> float | None:
    """KB of the file that holds it; None where there is none."""
    if not hasattr(edited, "save"):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edit.safetensors"
        edited.save(path)
        return path.stat().st_size / 1024


def study(
    pipe: Any, judge: Any, style: str, editor: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One editor on one style: chosen on some prompts, reported on others."""
    concept = loco.concept(f"mini/{style.replace(' ', '-')}")
    layers = carrier_of(pipe, style, options)
    common: dict[str, Any] = dict(scorer=judge, store=options.folder / "store", progress=False)
    common |= dict(num_inference_steps=options.steps, batch_size=options.batch_size)
    given: dict[str, Any] = dict(layers=layers, preserve=neighbors(concept))
    given |= dict(ordinary=[world.prompt(thing) for thing in world.OBJECTS])
    given |= dict(num_inference_steps=options.steps)

    own, others = divided(probes_of(concept, True))
    tried: dict[str, Any] = {}
    fitted: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, (fit, strength) in tries(editor).items():
        start = time.perf_counter()
        try:
            edited = loco.edit_with(editor, pipe, concept, **given, **fit)
        except loco.LocogenError as error:  # such as a null space that leaves nothing
            refused[name] = str(error)
            continue
        fitted[name] = (edited, strength, time.perf_counter() - start)
        for probes in (own, thinned(others, 2)):
            table = loco.evaluate(
                pipe, {name: edited}, probes, seeds=[0], strength=strength, **common
            )
            lines = rates(table)
            merge(tried, lines) if name in tried else tried.update(lines)
    if not tried:
        return {"refused": refused}

    best = choice(tried)
    edited, strength, seconds = fitted[best]
    own, others = divided(probes_of(concept, False))
    report: dict[str, Any] = {}
    for probes, seeds in (
        (own, range(30, 32)),
        (rest_probes(own), range(30, 32)),
        (thinned(others, 2), range(30, 32)),
    ):
        table = loco.evaluate(
            pipe, {editor: edited}, probes, seeds=seeds, strength=strength, **common
        )
        lines = rates(table)
        merge(report, lines) if report else report.update(lines)
    return {
        "settings": best,
        "tried": len(tries(editor)),
        "refused": refused,
        "seconds": seconds,
        "KB": size_of(edited),
        "arms": report[editor],
        "attacks": attacks_on(pipe, judge, style, edited, options),
    }


def attacks_on(
    pipe: Any, judge: Any, style: str, edited: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """How often the style comes back, by the attacks that were asked for; of edits alone."""
    if not isinstance(edited, Edit):
        return {}
    concept, probes = style_concept(style)
    results: dict[str, Any] = {}
    for kind in options.attacks:
        found = loco.attack(
            pipe,
            concept,
            edited,
            kind=kind,
            held_out=probes,
            scorer=judge,
            models=["edited", "never had"],
            folder=options.folder / "attacks",
            num_inference_steps=options.steps,
            batch_size=options.batch_size,
            progress=False,
        )
        lines = found.summary().groupby("model").last()
        results[kind] = {
            model: {k: float(line[k]) for k in ("after", "low", "high", "n", "units")}
            for model, line in lines.iterrows()
        }
    return results


def said(style: str, editor: str, row: dict[str, Any], kinds: Sequence[str]) -> str:
    """One row of the printed table."""
    if "arms" not in row:
        return f"| {style} | {editor} | none of the settings could be fitted |"
    arms = row["arms"]
    near = arms["specificity"]
    change = f"{100 * near['change']:+.1f} [{100 * near['low']:+.1f}, {100 * near['high']:+.1f}]"
    parts = [style, editor, f"{row['settings']} (of {row['tried']})", percent(arms["efficacy"])]
    parts += [f"{change} points", percent(arms["rest"])]
    for kind in kinds:
        lines = row["attacks"].get(kind)
        parts.append("–")
        if lines:
            back = lines["edited"]
            parts[-1] = f"{back['after']:.0%} [{back['low']:.0%}, {back['high']:.0%}]"
    parts.append(f"{row['seconds']:.1f}")
    parts.append("–" if row["KB"] is None else f"{row['KB']:.0f}")
    return f"| {' | '.join(parts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--folder", type=Path, default=Path("runs/editors"))
    parser.add_argument("--judge", type=Path, default=Path("runs/judge"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="*", default=list(world.STYLES[1:]), help="styles")
    parser.add_argument("--editors", nargs="*", default=list(loco.editors()))
    parser.add_argument("--attacks", nargs="*", default=[], help="such as closed inversion")
    add_machine(parser)
    options = parser.parse_args()
    set_threads(options)
    pipe = loco.load(options.model, device=options.device)
    judge = judging.JudgeScorer(judging.train(options.judge))
    columns = ["style", "editor", "settings", "own words", "neighbors", "rest of the prompt"]
    columns += [*options.attacks, "seconds", "KB"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for style in options.only:
        for editor in options.editors:
            name = "-".join([style, editor, *options.attacks]).replace(" ", "_")
            (options.folder / "rows").mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(options.folder / "rows" / f"{name}.lock", timeout=0):
                    row = kept(
                        options.folder / "rows",
                        name,
                        lambda style=style, editor=editor: study(
                            pipe, judge, style, editor, options
                        ),
                    )
            except Timeout:
                continue
            print(said(style, editor, row, options.attacks), flush=True)


if __name__ == "__main__":
    main()
