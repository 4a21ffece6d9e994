"""Which weighting of denoising steps proposes LocoGen's window? On mini, mini-b and planted models.

`python tests/benchmarks/attribution.py` takes one prompt and one seed a concept, and prints for each weighting the window
that it proposes. For mini, what the proposed window has of the best one's effect in the exhaustive search
(`race_effects.json`: 3 prompts, 6 seeds); for mini-b and the planted models, whether it overlaps the right place
(`reports/results.md`, `locogen/planting/plants.toml`). The last column is the chain's proposal, with `--chain`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

import locogen as loco

HERE = Path(__file__).resolve().parent
WIDTH = 2
Array = np.ndarray[Any, Any]

# Where concepts are in mini-b, by LocoGen or else by the judge: reports/results.md.
MINI_B = {
    "mini/neon": 0,
    "mini/blueprint": 0,
    "mini/van-gogh": 13,
    "mini/pixel-art": 14,
    "mini/cat": 12,
    "mini/robot": 11,
    "mini/national-animal-of-india": 12,
}
# Styles are where they were planted; objects where mini-b has them.
PLANTED = {
    "planted/style-at-0-1": {"mini/neon": 0, "mini/van-gogh": 0, "mini/owl": 12},
    "planted/style-at-12-13": {"mini/blueprint": 12},
}


def weightings(found: loco.Attribution) -> dict[str, Array]:
    """Weights of steps by name, (steps,), for the one picture of an attribution."""
    norms = found.weights[0, 0]
    square = norms**2
    first = np.eye(len(norms))[0]
    return {
        "equal": np.full(len(norms), 1 / len(norms)),
        "norm": norms,
        "norm squared": square / square.sum(),
        "first step": first,
    }


def proposals(found: loco.Attribution) -> dict[str, int]:
    """The first layer of the window that each weighting proposes."""
    by_step = found.shares[0, 0].sum(2) / found.weights[0, 0][:, None]  # (steps, layers)
    starts = {}
    for name, weights in weightings(found).items():
        layers = weights @ by_step  # (layers,)
        sums = np.convolve(layers, np.ones(WIDTH), "valid")
        starts[name] = int(sums.argmax())
    return starts


def judged(start: int, truth: Any) -> float:
    """How good a proposed window is: its share of the best effect, or whether it is in place."""
    if isinstance(truth, int):
        return float(abs(start - truth) < WIDTH)
    effects = np.asarray(truth).mean(1)  # (windows,)
    return float(effects[start] / effects.max())


def cases(only: list[str] | None) -> dict[str, dict[str, Any]]:
    """By model and concept, what is true."""
    measured = json.loads((HERE / "race_effects.json").read_text())["concepts"]
    mini = {name: entry["effects"] for name, entry in measured.items()}
    models = {"mini": mini, "mini-b": MINI_B, **PLANTED}
    return {name: truths for name, truths in models.items() if only is None or name in only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=None)
    parser.add_argument("--every", type=int, default=1, help="every so many of mini's concepts")
    parser.add_argument("--steps", type=int, nargs="*", default=None)
    parser.add_argument("--most-points", type=int, default=24)
    parser.add_argument("--chain", action="store_true")
    chosen = parser.parse_args()
    options: dict[str, Any] = {"seeds": [0], "num_inference_steps": 12, "progress": False}
    scores: dict[str, dict[str, list[float]]] = {}
    print("| model | concept | steps' norms | residual | points | rows | proposals |")
    for model, truths in cases(chosen.models).items():
        pipe = loco.load(model)
        for identity in list(truths)[:: chosen.every if model == "mini" else 1]:
            concept = loco.concept(identity)
            concept = dataclasses.replace(concept, pairs=concept.pairs[:1])
            more = {"steps": chosen.steps, "most_points": chosen.most_points}
            found = loco.attribute(pipe, concept, **more, **options)
            starts = proposals(found)
            if chosen.chain:
                total = loco.attribute(pipe, concept, how="chain", most_points=6, **options)
                starts["chain"] = loco.attribution_window(total, window=WIDTH).start
            for name, start in starts.items():
                score = judged(start, truths[identity])
                scores.setdefault(model, {}).setdefault(name, []).append(score)
            norms = found.weights[0, 0].round(2).tolist()
            cost = f"{found.residual.item():+.3f} | {found.points.item()} | "
            cost += str(found.settings["denoiser_rows"])
            print(f"| {model} | {identity} | {norms} | {cost} | {starts} |", flush=True)
    print("\n| model | weighting | least | mean | concepts |")
    for model, by_name in scores.items():
        for name, values in by_name.items():
            print(
                f"| {model} | {name} | {min(values):.0%} | {np.mean(values):.1%} | {len(values)} |"
            )


if __name__ == "__main__":
    main()
