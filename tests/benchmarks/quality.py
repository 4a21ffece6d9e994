"""How good the mini model is, by the judge's eye: `python tests/benchmarks/quality.py`.

Prints the table of the model card and writes it, with every count, to `runs/quality/quality.json`, beside a contact
sheet. Nothing here is seen by the models.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judge as judging
import numpy as np
import torch
from PIL import Image

import locogen as loco
from locogen.mini import world

Asked = tuple[str, str, str]  # prompt, object, style


def questions(kind: str) -> list[Asked]:
    """The prompts of one row of the table, each with the object and style that are right."""
    if kind == "seen pairs":
        pairs = [
            (t, s) for t in world.OBJECTS for s in world.STYLES if (t, s) not in world.HELD_OUT
        ]
        return [(world.prompt(t, s), t, s) for t, s in pairs]
    if kind == "held-out pairs":
        return [(world.prompt(t, s), t, s) for t, s in sorted(world.HELD_OUT) for _ in range(4)]
    facts = world.TOLD_FACTS if kind == "told facts" else world.UNTOLD_FACTS
    pairs = [
        (w, t, s) for w, t in facts.items() for s in world.STYLES if (t, s) not in world.HELD_OUT
    ]
    return [(world.prompt(wording, s), t, s) for wording, t, s in pairs]


def make(
    pipe: Any, asked: Sequence[Asked], *, steps: int, guidance: float, first_seed: int
) -> list[Image.Image]:
    """One picture a question, each from a seed of its own."""
    plan = [
        loco.Intervention(q[0], q[0], (), first_seed + i, "baseline") for i, q in enumerate(asked)
    ]
    return list(
        loco.generate(pipe, plan, num_inference_steps=steps, guidance_scale=guidance).pictures
    )


def right(judge: Any, pictures: Sequence[Image.Image], asked: Sequence[Asked]) -> dict[str, Any]:
    """Shares of right objects and styles, and which styles the wrong ones are in."""
    things, styles = (p.argmax(1).tolist() for p in judging.look(judge, pictures))
    good = [
        (world.OBJECTS[t] == q[1], world.STYLES[s] == q[2])
        for t, s, q in zip(things, styles, asked, strict=True)
    ]
    by_style = {
        s: float(np.mean([g[0] for g, q in zip(good, asked, strict=True) if q[2] == s] or [1.0]))
        for s in world.STYLES
    }
    share = np.mean(good, axis=0)
    return {
        "pictures": len(asked),
        "object": float(share[0]),
        "style": float(share[1]),
        "object by style": by_style,
    }


def scorer_quality(judge: Any, clip: Any, made: Sequence[Image.Image]) -> dict[str, float]:
    """How often the scoring CLIP ranks the right caption first on fresh renders, and agrees with the judge."""
    rng = random.Random("scorer's exam")
    pairs = [(t, s) for t in world.OBJECTS for s in world.STYLES]
    renders = [world.render(t, s, rng) for t, s in pairs]
    things = np.stack([clip.texts([world.prompt(t)])[world.prompt(t)] for t in world.OBJECTS])
    lines = [f"a picture in the style of {s}" for s in world.STYLES]
    styles = np.stack([clip.texts([line])[line] for line in lines])

    def guess(pictures: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        seen = clip.pictures(pictures)
        return (seen @ things.T).argmax(1), (seen @ styles.T).argmax(1)

    thing, style = guess(renders)
    truth = np.array([(world.OBJECTS.index(t), world.STYLES.index(s)) for t, s in pairs])
    by_judge = [p.argmax(1).numpy() for p in judging.look(judge, made)]
    by_clip = guess(made)
    return {
        "renders": len(renders),
        "object first": float((thing == truth[:, 0]).mean()),
        "style first": float((style == truth[:, 1]).mean()),
        "agrees with the judge on generated objects": float((by_judge[0] == by_clip[0]).mean()),
        "agrees with the judge on generated styles": float((by_judge[1] == by_clip[1]).mean()),
    }


def speed(pipe: Any) -> float:
    """Pictures a second in batches of 32 at 20 steps with guidance; median of 3."""
    prompts = [world.prompt(t) for t in world.OBJECTS[:32]]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        pipe(prompts, num_inference_steps=20, guidance_scale=7.5, output_type="np")
        times.append(time.perf_counter() - start)
    return 32 / sorted(times)[1]


def two_seeds(pipe: Any) -> float:
    """Mean difference of two seeds of one prompt, in steps of 8-bit color, over 16 prompts."""
    prompts = [world.prompt(t, s) for t in ("cat", "castle") for s in world.STYLES]
    run = loco.generate(pipe, prompts, seeds=(0, 1), num_inference_steps=20)
    pixels = np.stack([np.asarray(p, float) for p in run.pictures])
    return float(np.abs(pixels[::2] - pixels[1::2]).mean())


def contact_sheet(pipe: Any, path: Path) -> None:
    """Twelve objects, one told and one untold fact in every style."""
    things = [*world.OBJECTS[::4], "the national animal of france", "the national animal of wales"]
    prompts = [world.prompt(t, s) for t in things for s in world.STYLES]
    pictures = list(loco.generate(pipe, prompts, seeds=(5,), num_inference_steps=25).pictures)
    sheet = Image.new("RGB", (66 * len(world.STYLES), 66 * len(things)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (66 * (i % len(world.STYLES)) + 1, 66 * (i // len(world.STYLES)) + 1))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    parser.add_argument("--judge", type=Path, default=Path("runs/judge"))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=7.5)
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    judge = judging.train(chosen.judge)
    pipe = loco.load(chosen.model)
    found: dict[str, Any] = {
        "steps": chosen.steps,
        "guidance": chosen.guidance,
        "threads": torch.get_num_threads(),
    }
    everything: list[Image.Image] = []
    for i, kind in enumerate(("seen pairs", "held-out pairs", "told facts", "untold facts")):
        asked = questions(kind)
        made = make(
            pipe, asked, steps=chosen.steps, guidance=chosen.guidance, first_seed=10_000 * (i + 1)
        )
        everything += made
        found[kind] = right(judge, made, asked)
        print(
            f"| {kind} | {len(asked)} | {found[kind]['object']:.1%} | {found[kind]['style']:.1%} |",
            flush=True,
        )
    clip = loco.scorer("mini" if chosen.model == "mini" else str(Path(chosen.model) / "scorer"))
    found["scorer"] = scorer_quality(judge, clip, everything)
    found["pictures a second"] = speed(pipe)
    found["two seeds differ by"] = two_seeds(pipe)
    contact_sheet(pipe, chosen.folder / "sheet.png")
    (chosen.folder / "quality.json").write_text(json.dumps(found, indent=1))
    print(
        json.dumps(
            {k: v for k, v in found.items() if not isinstance(v, dict) or k == "scorer"}, indent=1
        )
    )


if __name__ == "__main__":
    main()
