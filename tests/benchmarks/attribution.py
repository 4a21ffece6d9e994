"""Is the search by attribution as good as the whole sweep, and what does it cost? And how are steps weighed?

`python tests/benchmarks/attribution.py targets` measures, for each model and concept, every window on seeds that choose
and on fresh ones that judge, and runs `localize(search="attribute")` with the same settings. It prints for which share of
concepts the window of the proposal, and that of the search, has at least 90 % of the effect of the one that the whole
sweep chooses, beside "always the most frequent window"; and what all of it costs in rows of the denoiser, by counting, for
16 layers and for 67. One JSON file a concept: what is there is not measured again, and several processes may share a
folder (`--out`). `--summary` prints what a folder has.

`python tests/benchmarks/attribution.py weightings` takes one prompt and one seed a concept, and prints for each weighting
of steps the window that it proposes. For mini, what the proposed window has of the best one's effect in the exhaustive
search (`race_effects.json`: 3 prompts, 6 seeds); for mini-b and the planted models, whether it overlaps the right place
(`reports/results.md`, `locogen/planting/plants.toml`). The last column is the chain's proposal, with `--chain`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

import locogen as loco
from locogen.files import load_json, write_json
from locogen.localization.attribution.proposal import propose
from locogen.localization.attribution.search import scouts, search
from locogen.localization.effects import Scores, score_used
from locogen.localization.scored_pictures import ScoredPictures
from locogen.models.defaults import settings_for
from locogen.pictures.score import scorer_for
from locogen.plan import Concept, PromptPair, sweep

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


# --- targets -------------------------------------------------------------------------------------

ENOUGH = 0.9  # of the effect of the window that the whole sweep chooses
FRESH_FROM = 1000  # the seeds that judge, far from those that choose and propose
CARRIED = 0.5  # of the ceiling's effect: a concept of which a window has less has no carrier
NOTICED = 0.1  # a ceiling below this is no effect
STEPS_LOOKED_AT = 3
POINTS = 3


def measured_effects(
    pictures: ScoredPictures, concept: Concept, seeds: Sequence[int], layers: int
) -> dict[str, Any]:
    """Effects of all windows, (windows, prompts, seeds), and of the ceiling, on some seeds."""
    rows = sweep(concept, n_layers=layers, window=WIDTH, seeds=seeds)
    rows = [row for row in rows if row.role in ("baseline", "window", "ceiling")]
    table = pictures.of({0: rows}).table
    scores = Scores(table, score_used(table))
    ceiling = scores.effect_of("ceiling")
    return {
        "windows": scores.effect_of("window"),
        "ceiling": float(ceiling.mean()),
        "score": scores.column,
    }


def measured(pipe: Any, concept: Concept, asked: argparse.Namespace, store: Path) -> dict[str, Any]:
    """What the whole sweep, the proposal and the search say of one concept."""
    options: dict[str, Any] = {"num_inference_steps": asked.steps or None, "guidance_scale": None}
    options["batch_size"] = asked.batch_size
    settings = settings_for(pipe, **options)
    scorer = scorer_for(pipe, None)
    pictures = ScoredPictures(pipe, [concept], scorer, settings, store, progress=False)
    layers = len(loco.find_layers(pipe))
    seeds = range(asked.seeds)
    fresh = range(FRESH_FROM, FRESH_FROM + asked.fresh)
    whole = measured_effects(pictures, concept, seeds, layers)
    judged = measured_effects(pictures, concept, fresh, layers)
    cell: dict[str, Any] = {"kind": concept.kind, "layers": layers, "score": whole["score"]}
    cell |= {"effects": whole["windows"].round(5).tolist(), "ceiling": judged["ceiling"]}
    cell["fresh_effects"] = judged["windows"].mean((1, 2)).round(5).tolist()
    begin = time.perf_counter()
    run = loco.localize(pipe, concept, window=WIDTH, seeds=seeds, search="attribute", scorer=scorer, store=store,
                        progress=False, **options)  # fmt: skip
    cell["search_seconds"] = time.perf_counter() - begin
    cell |= searched(run)
    if asked.chain:
        scout = scouts(concept, seeds)
        begin = time.perf_counter()
        total = propose(pipe, scout.concept, window=WIDTH, seeds=scout.seeds, how="chain", progress=False,
                        **options | {"batch_size": 8})  # fmt: skip
        cell["chain_seconds"] = time.perf_counter() - begin
        cell |= {
            "chain": list(total.ranked),
            "chain_rows": total.attribution.settings["denoiser_rows"],
        }
    return cell


def searched(run: loco.Run) -> dict[str, Any]:
    """What a search by attribution says and costs, as plain values."""
    effects = loco.effect(run.table)
    verdict = loco.carrier(effects)
    layers: Any = effects[effects["axis"] == "layer"]
    complete = layers[layers["verdict"].isin(["chosen", "rival", "challenger"])]
    answer = complete.loc[complete["estimate"].idxmax()]
    [proposed] = run.attributions.values()
    by_layer = proposed.layers.mean((1, 2))
    sums = np.convolve(by_layer, np.ones(WIDTH), "valid")
    costs = ("proposal_rows", "choosing_pictures", "denoiser_rows", "generations")
    facts = {name: run.settings[name] for name in costs}
    facts |= {
        "proposal_seconds": proposed.settings["seconds"],
        "scouts": int(np.prod(proposed.residual.shape)),
    }
    facts |= {
        "ranked": np.argsort(-sums, kind="stable").tolist(),
        "answer": int(answer["position"]),
    }
    facts |= {"chosen": int(layers.loc[layers["verdict"] == "chosen", "position"].iloc[0])}
    facts |= {
        "hits": int(answer["hits"]),
        "verdict": verdict.kind,
        "places": [place.label for place in verdict.places],
    }
    return facts | {"residual": proposed.residual.round(4).tolist(), "pictures": len(run)}


def work(asked: argparse.Namespace) -> None:
    """Measure what the folder lacks, concept by concept."""
    for name in asked.models:
        pipe = None
        waiting = list(concepts_of(name, asked))
        for patience in (0, -1):
            busy = []
            for identity in waiting:
                lock = FileLock(place_of(asked, name, identity, "locks").with_suffix(".lock"))
                try:
                    lock.acquire(timeout=patience)
                except Timeout:
                    busy.append(identity)
                    continue
                try:
                    path = place_of(asked, name, identity, "cells")
                    if load_json(path):
                        continue
                    pipe = pipe or loco.load(name, device=asked.device, dtype=asked.dtype)
                    concept = loco.concept(identity).first(asked.prompts)
                    cell = measured(pipe, concept, asked, asked.out / "pictures")
                    cell |= {
                        "model": name,
                        "concept": identity,
                        "device": asked.device,
                        **sizes(asked),
                    }
                    write_json(path, cell)
                    print(
                        f"{name} {identity}: {cell['ranked'][:3]} {cell['answer']} {cell['verdict']}",
                        flush=True,
                    )
                finally:
                    lock.release()
            waiting = busy


def sizes(asked: argparse.Namespace) -> dict[str, int]:
    """What makes cells comparable."""
    return {name: getattr(asked, name) for name in ("prompts", "seeds", "fresh", "steps")}


def place_of(asked: argparse.Namespace, model: str, identity: str, folder: str) -> Path:
    """The file of one concept, of these sizes alone."""
    size = "-".join(str(value) for value in sizes(asked).values())
    name = f"{model}--{identity}--{size}".replace("/", "_")
    path = asked.out / folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def concepts_of(model: str, asked: argparse.Namespace) -> Iterator[str]:
    """The concepts that a model is asked about, by their ids."""
    if asked.concepts:
        yield from asked.concepts
        return
    known = loco.concepts("mini" if model.startswith("planted") else model)
    yield from list(known["id"])[:: asked.every]


def cells_of(asked: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """What the folder has of a model."""
    paths = [place_of(asked, model, identity, "cells") for identity in concepts_of(model, asked)]
    return [cell for cell in (load_json(path) for path in paths) if cell]


def ratios(cells: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """By method, what its window has of the effect of the whole sweep's, on fresh seeds."""
    whole = [int(np.mean(cell["effects"], (1, 2)).argmax()) for cell in cells]
    most_frequent = collections.Counter(whole).most_common(1)[0][0]
    answers = {
        "proposal": [cell["ranked"][0] for cell in cells],
        "best of three proposed": [
            max(cell["ranked"][:3], key=lambda start, cell=cell: cell["fresh_effects"][start])
            for cell in cells
        ],
        "search": [cell["answer"] for cell in cells],
        f"always {most_frequent}": [most_frequent] * len(cells),
    }
    if all("chain" in cell for cell in cells):
        answers["proposal (chain)"] = [cell["chain"][0] for cell in cells]
    shares: dict[str, list[float]] = {}
    for name, starts in answers.items():
        shares[name] = [
            cell["fresh_effects"][start] / cell["fresh_effects"][best]
            for cell, start, best in zip(cells, starts, whole, strict=True)
        ]
    return shares


def has_carrier(cell: dict[str, Any]) -> bool:
    return cell["ceiling"] > NOTICED and max(cell["fresh_effects"]) >= CARRIED * cell["ceiling"]


def counted(layers: int, prompts: int, seeds: int, steps: int, *, challenged: bool) -> float:
    """All rows of a search, of those of the whole sweep: counted, without a model."""
    of_search, of_sweep = rows_counted(
        layers, prompts, seeds, steps, width=WIDTH, challenged=challenged
    )
    return of_search / of_sweep


def rows_counted(
    layers: int, prompts: int, seeds: int, steps: int, *, width: int, challenged: bool
) -> tuple[int, int]:
    """Rows of the denoiser that a search takes and that the whole sweep takes, with guidance."""
    pairs = tuple(PromptPair(f"prompt {i}", f"target {i}") for i in range(prompts))
    concept = Concept("counted", "fact", pairs)
    windows = layers - width + 1
    runner = search(
        concept, order=range(windows), n_layers=layers, window=width, seeds=range(seeds)
    )
    rows = next(runner)
    pictures = len(rows)
    judging = runner.send(np.array([float(row.start == 0) for row in rows]))
    # Windows score 1 where they are the chosen one; a sampled one that hits is made everywhere.
    scores = np.array(
        [float(row.role == "window" and (row.start == 0 or challenged)) for row in judging]
    )
    try:
        runner.send(scores)
    except StopIteration as stop:
        pictures += len(stop.value.rows)
    halves = 2
    scout = scouts(concept, range(seeds))
    proposals = len(scout.concept.pairs) * len(scout.seeds)
    looked_at = min(STEPS_LOOKED_AT, steps)
    # The prompt's own path; at each step both ends, and at each point a gradient of three passes.
    of_proposal = proposals * (halves * steps + looked_at * (2 + 3 * POINTS))
    every = len(sweep(concept, n_layers=layers, window=width, seeds=range(seeds)))
    return of_proposal + pictures * halves * steps, every * halves * steps


def print_targets(asked: argparse.Namespace) -> None:
    print(
        "\n| model | concepts with a carrier | method | least | mean | at least 90 % |\n|---|---|---|---|---|---|"
    )
    for model in asked.models:
        cells = [cell for cell in cells_of(asked, model) if has_carrier(cell)]
        if not cells:
            continue
        for name, values in ratios(cells).items():
            good = [value >= ENOUGH for value in values]
            share = loco_share(sum(good), len(good))
            print(
                f"| {model} | {len(cells)} | {name} | {min(values):.0%} | {np.mean(values):.1%} | {share} |"
            )
    print(
        "\n| model | concepts | challenged | rows of the search | of the sweep's | proposal, s | call to answer, s |"
    )
    print("|---|---|---|---|---|---|---|")
    for model in asked.models:
        cells = cells_of(asked, model)
        if not cells:
            continue
        means = {
            n: np.mean([c[n] for c in cells])
            for n in ("denoiser_rows", "proposal_seconds", "search_seconds")
        }
        whole = np.mean([rows_of_sweep(cell) for cell in cells])
        challenged = np.mean([cell["hits"] > 0 for cell in cells])
        print(f"| {model} | {len(cells)} | {challenged:.0%} | {means['denoiser_rows']:.0f} | "
              f"{means['denoiser_rows'] / whole:.1%} | {means['proposal_seconds']:.1f} | "
              f"{means['search_seconds']:.1f} |")  # fmt: skip
    print(
        "\n| layers | prompts x seeds | steps | of the sweep's rows | with a challenger |\n|---|---|---|---|---|"
    )
    for layers, steps in ((16, 12), (67, 50)):
        for prompts, seeds in ((6, 4), (3, 4), (6, 12)):
            usual, more = (
                counted(layers, prompts, seeds, steps, challenged=c) for c in (False, True)
            )
            print(f"| {layers} | {prompts} x {seeds} | {steps} | {usual:.1%} | {more:.1%} |")


def rows_of_sweep(cell: dict[str, Any]) -> float:
    """Rows of the whole sweep of a cell with its controls, by the rows that a picture takes."""
    windows, prompts, seeds = np.shape(cell["effects"])
    made = cell["pictures"] + cell["choosing_pictures"]
    of_picture = (cell["denoiser_rows"] - cell["proposal_rows"]) / made
    return (2 * windows + 3) * prompts * seeds * of_picture


def loco_share(hits: int, count: int) -> str:
    from locogen.views.sentences import share_text

    return share_text(hits, count)


# --- weightings ----------------------------------------------------------------------------------


def print_weightings(chosen: argparse.Namespace) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="what", required=True)
    targets = kinds.add_parser("targets")
    targets.add_argument("--model", dest="models", nargs="*", default=["mini", "mini-b"])
    targets.add_argument(
        "--concepts", nargs="*", default=None, help="ids; without: all of the model's"
    )
    targets.add_argument("--every", type=int, default=1, help="every so many of them")
    targets.add_argument("--prompts", type=int, default=2, help="of each concept; 0: all")
    targets.add_argument(
        "--seeds", type=int, default=2, help="that choose in the sweep, and judge in the search"
    )
    targets.add_argument("--fresh", type=int, default=2, help="seeds that judge both")
    targets.add_argument("--steps", type=int, default=6, help="denoising steps; 0: the model's own")
    targets.add_argument("--chain", action="store_true")
    targets.add_argument("--device", default="cpu")
    targets.add_argument("--dtype", default="float32")
    targets.add_argument("--threads", type=int, default=0, help="of torch; 0: as it chooses")
    targets.add_argument("--batch-size", type=int, default=32)
    targets.add_argument("--out", type=Path, default=Path("runs/attribution"))
    targets.add_argument("--summary", action="store_true", help="measure nothing")
    weightings = kinds.add_parser("weightings")
    weightings.add_argument("--models", nargs="*", default=None)
    weightings.add_argument("--every", type=int, default=1, help="every so many of mini's concepts")
    weightings.add_argument("--steps", type=int, nargs="*", default=None)
    weightings.add_argument("--most-points", type=int, default=24)
    weightings.add_argument("--chain", action="store_true")
    asked = parser.parse_args()
    if asked.what == "weightings":
        print_weightings(asked)
        return
    if asked.threads:
        import torch

        torch.set_num_threads(asked.threads)
    if not asked.summary:
        work(asked)
    print_targets(asked)


if __name__ == "__main__":
    main()
