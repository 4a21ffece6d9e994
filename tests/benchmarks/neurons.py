"""What clamping single neurons does, by the judge's eye: `python tests/benchmarks/neurons.py`, after `edits.py`.

For each concept, at the layers and settings that `edits.py` chose: the strongest neurons of the key and value matrices
held at what they say without the concept, more and more of them, beside as many random ones and beside the edit of the
layers. Neurons are found on phrasings of the edit, pictures made of other prompts. Writes `runs/neurons/neurons.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import edits as editing
import judge as judging
import numpy as np
from machine import add_machine, kept, set_threads
from tqdm import tqdm

import locogen as loco
from locogen import stats
from locogen.editing.probes import Probe
from locogen.phrasings import Phrasing, default_phrasings

SHARES = (0.05, 0.15, 0.5, 1.0)  # of each matrix's neurons
CONCEPTS = (
    "neon",
    "pencil-sketch",
    "van-gogh",
    "cat",
    "national-animal-of-france",
    "national-animal-of-india",
)


def told(concept: loco.Concept) -> list[Phrasing]:
    """The default phrasings, in styles too where the concept is none."""
    plain = list(default_phrasings(concept))
    return plain if concept.kind == "style" else plain + editing.in_styles(plain[1])


def arms(
    pipe: Any, concept: loco.Concept, edit: loco.Edit, strength: float, draws: int
) -> Iterator[tuple[str, float, Any]]:
    """(name, share of the neurons, context) of everything that is compared."""
    found = loco.find_neurons(
        pipe, concept, layers=edit.layers, phrasings=told(concept), tokens="end"
    )
    width = int(found.table.groupby(["layer", "matrix"]).size().min())
    yield "nothing", 0.0, contextlib.nullcontext()
    for share in SHARES:
        k = round(share * width)
        yield "top", share, loco.clamp(pipe, found.top(k))
        for draw in range(draws if share < 1 else 0):
            yield "random", share, loco.clamp(pipe, found.random(k, draw))
    yield "edit", 1.0, edit.applied(pipe, strength)


def looked(
    pipe: Any, judge: Any, probes: Sequence[Probe], options: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Share of each unit's pictures that show what they say, by measure: (units, seeds)."""
    made = loco.generate(
        pipe,
        [probe.prompt for probe in probes],
        seeds=options.seeds,
        store=options.folder / "store",
        progress=False,
        num_inference_steps=options.steps,
        batch_size=options.batch_size,
    )
    pictures, among = list(made.pictures), probes[0].among
    scores = np.stack(
        judge(pictures, *[[text] * len(pictures) for text in among])
    )  # (texts, pictures)
    best = scores.argmax(0).reshape(len(probes), len(options.seeds))
    right = best == np.array([among.index(probe.text) for probe in probes])[:, None]
    found: dict[str, np.ndarray] = {}
    for name in dict.fromkeys(probe.measure for probe in probes):
        rows: dict[str, list[np.ndarray]] = {}
        for probe, of_probe in zip(probes, right, strict=True):
            if probe.measure == name:
                rows.setdefault(probe.unit or probe.prompt, []).append(of_probe)
        found[name] = np.stack([np.mean(each, axis=0) for each in rows.values()])
    return found


def study(
    pipe: Any, judge: Any, concept: loco.Concept, chosen: Any, options: argparse.Namespace
) -> list[Any]:
    options_of_edit, _ = editing.settings_of(concept)[chosen["settings"]]
    edit = loco.fit_edit(pipe, concept, layers=chosen["layers"], **options_of_edit)
    own, others = editing.divided(editing.probes_of(concept, False))
    others = [probe for probe in others if probe.measure == "specificity"]
    own = [probe for probe in own if probe.measure == "efficacy"]
    own = own[:: len(own) // 30 or 1]
    probes, lines = own + others[:: options.every], []
    for arm, share, context in arms(pipe, concept, edit, chosen["strength"], options.draws):
        with context:
            for measure, right in looked(pipe, judge, probes, options).items():
                mean = stats.crossed_bootstrap(right[None], yes_no=False)
                low, high = stats.clopper_pearson(right.mean() * len(right), len(right))
                low = max(0.0, np.fmin(low, mean.low[0]))
                high = min(1.0, np.fmax(high, mean.high[0]))
                line = dict(arm=arm, share=share, measure=measure, shown=float(right.mean()))
                lines.append(line | dict(low=float(low), high=float(high), units=len(right)))
    return lines


def cell(lines: Sequence[Any], arm: str, share: float) -> str:
    """Own pictures and neighbors that still show what they say, means of the draws."""
    found = [
        np.mean(
            [
                li["shown"]
                for li in lines
                if (li["arm"], li["share"], li["measure"]) == (arm, share, measure)
            ]
        )
        for measure in ("efficacy", "specificity")
    ]
    return " / ".join(f"{value:.0%}" for value in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--folder", type=Path, default=Path("runs/neurons"))
    parser.add_argument("--edits", type=Path, default=Path("runs/edits/edits.json"))
    parser.add_argument("--judge", type=Path, default=Path("runs/judge"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21])
    parser.add_argument("--draws", type=int, default=1, help="random choices of as many neurons")
    parser.add_argument("--every", type=int, default=6, help="look at one in so many neighbors")
    parser.add_argument("--only", nargs="*", default=CONCEPTS)
    add_machine(parser)
    options = parser.parse_args()
    set_threads(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    chosen = json.loads(options.edits.read_text("utf-8"))
    pipe, judge = (
        loco.load(options.model, device=options.device),
        judging.JudgeScorer(judging.train(options.judge)),
    )
    columns: list[tuple[str, float]] = (
        [("top", share) for share in SHARES]
        + [("random", share) for share in SHARES[1:3]]
        + [("edit", 1.0)]
    )
    print(
        "| concept | nothing |",
        " | ".join(f"{arm} {share:.0%}" for arm, share in columns[:-1]),
        "| edit |",
    )
    found: dict[str, Any] = {}
    for name in tqdm(options.only, disable=None):
        concept = loco.concept(f"mini/{name}")
        measure = partial(study, pipe, judge, concept, chosen[f"mini/{name}"], options)
        found[name] = lines = kept(options.folder / "concepts", name, measure)
        print(
            "|",
            " | ".join([concept.name, *(cell(lines, *c) for c in [("nothing", 0.0), *columns])]),
            "|",
            flush=True,
        )
        (options.folder / "neurons.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
