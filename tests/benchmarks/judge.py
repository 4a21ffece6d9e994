"""An independent judge of the mini model: a small CNN trained on renders alone, of which no model sees anything.

`python tests/benchmarks/judge.py` trains it (minutes on two cores) and prints how often it is right on fresh renders.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from locogen.mini import contrast, world
from locogen.mini.loop import rate_at

THINGS, STYLES = len(world.OBJECTS), len(world.STYLES)
SEED = 77  # of the judge's own renders: not the trainer's


def network() -> nn.Sequential:
    """64 x 64 pictures to 48 object and 8 style logits."""
    torch.manual_seed(SEED)
    widths = (3, 24, 48, 96, 128)
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b in pairwise(widths)
    ]
    return nn.Sequential(
        *blocks, nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, THINGS + STYLES)
    )


def fresh_renders(each: int, seed: int) -> tuple[Tensor, Tensor]:
    """`each` renders of every pair: bytes (n, 3, 64, 64), and labels (n, 2) of object and style."""
    pairs = [(i, j) for i in range(THINGS) for j in range(STYLES) for _ in range(each)]
    made = [
        np.asarray(
            world.render(world.OBJECTS[i], world.STYLES[j], random.Random(f"judge/{seed}/{n}"))
        )
        for n, (i, j) in enumerate(tqdm(pairs, desc="rendering"))
    ]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2), torch.tensor(pairs)


def train(folder: Path, *, each: int = 12, steps: int = 1500, batch: int = 64) -> nn.Module:
    """The trained judge, read from the folder when it is there."""
    path = folder / "judge.safetensors"
    model = network()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    pictures, labels = fresh_renders(each, SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for step in tqdm(range(steps), desc="judge"):
        rng = random.Random(f"judge/{step}")
        rows = torch.tensor(rng.sample(range(len(pictures)), batch))
        images = contrast.jitter(pictures[rows].float() / 127.5 - 1, rng)
        loss = sum(
            F.cross_entropy(part, labels[rows, i]) for i, part in enumerate(split(model(images)))
        )
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate_at(step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), path)
    return model.eval()


def split(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Object and style logits."""
    return logits[:, :THINGS], logits[:, THINGS:]


@torch.no_grad()
def look(model: nn.Module, pictures: Sequence[Image]) -> tuple[Tensor, Tensor]:
    """Probabilities of objects (n, 48) and styles (n, 8) for pictures."""
    values = torch.from_numpy(np.stack([np.asarray(p.convert("RGB")) for p in pictures])).permute(
        0, 3, 1, 2
    )
    things, styles = split(
        torch.cat([model(part.float() / 127.5 - 1) for part in values.split(128)])
    )
    return things.softmax(-1), styles.softmax(-1)


class JudgeScorer:
    """The judge in a scorer's clothes: the probability of the object and the style that a text names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.settings: dict[str, Any] = {"scorer": "judge", "preprocessing": "none", "scale": 1.0}

    def __call__(self, pictures: Sequence[Image], *texts: Sequence[str]) -> list[np.ndarray]:
        """For each list of texts, the probability of what text `i` names in picture `i`."""
        things, styles = look(self.model, pictures)
        return [
            np.array([self._one(things[i], styles[i], text) for i, text in enumerate(line)])
            for line in texts
        ]

    def _one(self, things: Tensor, styles: Tensor, text: str) -> float:
        words = text.split()
        score = 1.0
        for names, chances in ((world.OBJECTS, things), (world.STYLES, styles)):
            said = [i for i, name in enumerate(names) if f" {name} " in f" {' '.join(words)} "]
            score *= float(chances[said].sum()) if said else 1.0
        return score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/judge"))
    chosen = parser.parse_args()
    model = train(chosen.folder)
    pictures, labels = fresh_renders(2, SEED + 1)
    with torch.no_grad():
        found = [part.argmax(1) for part in split(model(pictures.float() / 127.5 - 1))]
    for name, guess, truth in zip(("object", "style"), found, labels.T, strict=True):
        print(
            f"judge on {len(truth)} fresh renders: {name} right {(guess == truth).float().mean():.1%}"
        )


if __name__ == "__main__":
    main()
