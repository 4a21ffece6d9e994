"""Is the race as good as the whole search, and for how many pictures? On every concept of the mini model.

`python tests/benchmarks/race.py` makes the whole search's pictures (kept: a second call only counts), races on them,
and compares the two choices on seeds that chose neither (the last two of six). It writes what it measured to `tests/benchmarks/
race_effects.json`; `--simulate` goes on from that file alone, to more pairs and to 66 windows, by resampling.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from machine import add_machine, set_threads

import locogen as loco
from locogen.localization.racing import BUDGET, Rows, race, run_races
from locogen.plan import Concept, Intervention, PromptPair, sign_of, sweep

HERE = Path(__file__).resolve().parent
MEASURED = HERE / "race_effects.json"
LAYERS, WIDTH = 16, 2
JUDGING = 2  # of the measured seeds: they judge, and choose nothing
Array = np.ndarray[Any, Any]


def asked_of(
    concept: Concept, seeds: int, layers: int = LAYERS, width: int = WIDTH
) -> dict[str, Any]:
    return dict(concept=concept, n_layers=layers, window=width, seeds=range(seeds))


def raced(effects: Array, asked: dict[str, Any], **more: Any) -> tuple[int, int, pd.DataFrame]:
    """Race on known `effects` (windows, prompts, seeds): winner, rows it took, and what it says of its rows."""
    places = {pair.prompt: i for i, pair in enumerate(asked["concept"].pairs)}
    sign = asked["concept"].sign

    def score(row: Intervention) -> float:
        return 0.0 if row.start is None else sign * effects[row.start, places[row.prompt], row.seed]

    def measure(wanted: dict[int, Rows]) -> dict[int, Array]:
        return {i: np.array([score(row) for row in rows]) for i, rows in wanted.items()}

    runners = [race(**asked, **more)]
    ((rows, said),) = run_races(runners, measure)
    told = pd.DataFrame(said).assign(start=[row.start for row in rows])
    return int(told.loc[told["verdict"] == "chosen", "start"].iloc[0]), len(rows), told


def compared(effects: Array, asked: dict[str, Any], judged: Array, **more: Any) -> dict[str, Any]:
    """The race beside the whole search on the same `effects`; both judged by other means, (windows,)."""
    whole = int(effects.mean((1, 2)).argmax())
    winner, rows, told = raced(effects, asked, **more)
    every = len(sweep(**asked, controls=more.get("controls", True)))
    best = told[told["start"] == int(judged.argmax())]["verdict"].iloc[0]
    return {
        "whole": whole,
        "race": winner,
        "ratio": float(judged[winner] / judged[whole]),
        "ratio_to_best": float(judged[winner] / judged.max()),
        "pictures": rows / every,
        "dropped": int((told.drop_duplicates("start")["verdict"] == "dropped").sum()),
        "best_dropped": best == "dropped",
        "sure": float(told["sure"].max()),
    }


def measure(chosen: argparse.Namespace) -> dict[str, Any]:
    """Effects of every window on every pair, and whether the concept has a carrier; inserts are left out."""
    pipe, found = loco.load("mini", device=chosen.device), {}
    judge = loco.scorer("mini")
    for identity in loco.concepts("mini")["id"]:
        concept = loco.concept(identity)
        concept = dataclasses.replace(concept, pairs=concept.pairs[: chosen.prompts or None])
        plan = [row for row in sweep(**asked_of(concept, chosen.seeds)) if row.role != "insert"]
        options: dict[str, Any] = {"store": chosen.store, "progress": False}
        options["batch_size"] = chosen.batch_size
        run = loco.generate(pipe, plan, num_inference_steps=chosen.steps, **options)
        texts = {pair.prompt: concept.scored_text(pair) for pair in concept.pairs}
        (score,) = judge(list(run.pictures), [texts[row.prompt] for row in plan])
        table = run.table.assign(
            concept=concept.name, kind=concept.kind, clip_score=score, content_score=score
        )
        effects = loco.effect(table)
        base = table[table["role"] == "baseline"]["clip_score"].to_numpy()
        cube = (
            table[table["role"] == "window"]["clip_score"].to_numpy().reshape(len(base), -1).T
            - base
        )
        cube = sign_of(concept.kind) * cube
        carrier = loco.carrier(effects)
        found[identity] = {
            "kind": concept.kind,
            "carrier": carrier.start,
            "effects": cube.round(4).tolist(),
        }
        print(f"{identity}: {carrier}", flush=True)
    return {
        "prompts": chosen.prompts,
        "seeds": chosen.seeds,
        "steps": chosen.steps,
        "concepts": found,
    }


def stand_in(prompts: int) -> Concept:
    """A concept for simulations: its windows raise the score."""
    return Concept(
        "simulated", "fact", tuple(PromptPair(f"prompt {i}", f"target {i}") for i in range(prompts))
    )


def resampled(
    effects: Array, windows: int, prompts: int, seeds: int, dice: np.random.Generator
) -> tuple[Array, Array]:
    """Effects (windows, prompts, seeds) like the measured (windows, pairs), and their true means: a simulation.

    Whole pairs are drawn, with a little of a normal draw of the same covariance, so that no two pairs are equal. More
    windows are copies, with noise drawn apart, of windows with less than half the largest effect.
    """
    truth, noise = effects.mean(1), effects - effects.mean(1, keepdims=True)
    weak = np.flatnonzero(truth < truth.max() / 2)
    extra = dice.choice(weak, windows - len(truth)) if windows > len(truth) else np.array([], int)

    def draw(rows: Array, blur: float = 0.3) -> Array:
        n = noise.shape[1]
        picked = rows[:, dice.integers(n, size=prompts * seeds)]
        blurred = rows @ dice.standard_normal((n, prompts * seeds)) / np.sqrt(n)
        return (picked + blur * blurred) / np.sqrt(1 + blur**2) * np.sqrt(n / (n - 1))

    apart = [draw(noise[[w]]) for w in extra]
    order = np.arange(len(truth) + len(extra)) - (
        len(extra) // 2
    )  # copies on both sides of the measured ones
    means = np.r_[truth, truth[extra]]
    made = np.concatenate([draw(noise), *apart]) + means[:, None]
    order = np.argsort(np.roll(np.arange(len(order)), len(extra) // 2))
    return made[order].reshape(-1, prompts, seeds), means[order]


def line(name: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    pictures = [row["pictures"] for row in rows]
    told = {
        "case": name,
        "races": len(rows),
        "good": statistics.mean(row["ratio"] >= 0.9 for row in rows),
        "good_to_best": statistics.mean(row["ratio_to_best"] >= 0.9 for row in rows),
        "pictures": statistics.mean(pictures),
        "most": max(pictures),
        "best_dropped": statistics.mean(row["best_dropped"] for row in rows),
        "sure": statistics.median(row["sure"] for row in rows),
    }
    print(
        f"| {name} | {told['races']} | {told['good']:.1%} | {told['good_to_best']:.1%} | {told['pictures']:.1%} | "
        f"{told['most']:.1%} | {told['best_dropped']:.1%} | {told['sure']:.0%} |",
        flush=True,
    )
    return told


def simulate(found: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    carried = [
        np.array(one["effects"]) for one in found["concepts"].values() if one["carrier"] is not None
    ]
    cases = [(15, 6, 4, BUDGET), (15, 6, 12, BUDGET), (66, 6, 4, 0.15), (66, 6, 12, 0.15)]
    lines = []
    for windows, prompts, seeds, budget in cases:
        dice = np.random.default_rng(0)
        asked = asked_of(stand_in(prompts), seeds, windows + WIDTH - 1)
        for controls in (True, False):
            rows = []
            for effects in carried * repeats:
                made, truth = resampled(effects, windows, prompts, seeds, dice)
                try:
                    rows.append(compared(made, asked, truth, budget=budget, controls=controls))
                except loco.LocogenError as error:
                    print(
                        f"{windows} windows, {prompts} prompts x {seeds} seeds, controls {controls}: {error}"
                    )
                    break
            name = f"simulated: {windows} windows, {prompts} x {seeds}, {'with' if controls else 'without'} controls"
            lines += [line(name, rows)] if rows else []
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("runs/carriers/store"))
    parser.add_argument(
        "--prompts", type=int, default=3, help="at most so many of each concept's prompts; 0: all"
    )
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--simulate", action="store_true", help="make no pictures: take race_effects.json as it is"
    )
    parser.add_argument("--repeats", type=int, default=20, help="simulated races for each concept")
    parser.add_argument("--out", type=Path, default=Path("runs/race/race.json"))
    add_machine(parser)
    chosen = parser.parse_args()
    set_threads(chosen)
    if not chosen.simulate:
        MEASURED.write_text(json.dumps(measure(chosen)) + "\n")
    found = json.loads(MEASURED.read_text())
    print(
        "| case | races | as good as all | as good as the best | pictures | most | best dropped | sure |"
    )
    lines = []
    for controls in (True, False):
        rows = []
        for one in found["concepts"].values():
            effects = np.array(one["effects"]).reshape(LAYERS - WIDTH + 1, -1, found["seeds"])
            raced_on = effects[:, :, :-JUDGING]
            judged = effects[:, :, -JUDGING:].mean((1, 2))
            asked = asked_of(stand_in(effects.shape[1]), raced_on.shape[2])
            if one["carrier"] is not None:
                budget = BUDGET if controls else 0.4
                rows.append(compared(raced_on, asked, judged, controls=controls, budget=budget))
        lines.append(line(f"measured, {'with' if controls else 'without'} controls", rows))
    lines += simulate(found, chosen.repeats)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
