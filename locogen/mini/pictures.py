"""What the mini model is trained on: rendered once, kept as bytes, drawn by step number."""

from __future__ import annotations

import random
from collections.abc import Sequence
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from locogen.files import replacing
from locogen.mini import world
from locogen.mini.parts import Recipe
from locogen.types import Pipeline


def save_array(path: Path, values: np.ndarray) -> None:
    """Write an array, whole or not at all, never as a pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part, part.open("wb") as stream:
        np.save(stream, values, allow_pickle=False)


def _render_thing(thing: str, recipe: Recipe, path: Path) -> None:
    """All renders of one object: (styles, renders, 64, 64, 3) bytes."""
    # Rendered before a kill, perhaps: the file is there whole or not at all.
    if path.exists():
        return
    pictures = np.stack(
        [
            [
                np.asarray(
                    world.render(thing, style, random.Random(f"{recipe.seed}/{thing}/{style}/{i}"))
                )
                for i in range(recipe.renders)
            ]
            for style in world.STYLES
        ]
    )
    save_array(path, pictures)


def renders(recipe: Recipe, folder: Path, workers: int) -> Tensor:
    """Training pictures, rendered where missing: (objects, styles, renders, 3, 64, 64) bytes."""
    jobs = [(thing, recipe, folder / f"{thing}.npy") for thing in world.OBJECTS]
    with Pool(workers) as pool:
        pool.starmap(_render_thing, jobs, chunksize=1)
    # In the order of OBJECTS, whichever process rendered them.  (objects, styles, renders, h, w, 3)
    stacked = np.stack([np.load(path, allow_pickle=False) for *_, path in jobs])
    return torch.from_numpy(stacked).permute(0, 1, 2, 5, 3, 4).contiguous()


SEEN = [
    (i, j)
    for i, thing in enumerate(world.OBJECTS)
    for j, style in enumerate(world.STYLES)
    if (thing, style) not in world.HELD_OUT
]


def draw(rng: random.Random, count: int, depth: int) -> list[tuple[int, int, int]]:
    """Indices (object, style, render) of a batch, from the pairs that the generator may see."""
    return [(*rng.choice(SEEN), rng.randrange(depth)) for _ in range(count)]


def take(pictures: Tensor, rows: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
    """The pictures of a batch in -1..1: (rows, 3, 64, 64)."""
    thing, style, which = torch.tensor(rows).T
    return pictures[thing, style, which].to(device).float() / 127.5 - 1


def sheet(pictures: Tensor, path: Path, columns: int) -> None:
    """Write pictures in -1..1, (n, 3, h, w), as one PNG of so many columns."""
    # Side by side within a row (width is the last axis), then row below row.
    rows = [torch.cat(list(row), -1) for row in pictures.clamp(-1, 1).split(columns)]
    values = ((torch.cat(rows, -2) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def samplesheet(pipe: Pipeline, path: Path) -> None:
    """Four objects, four facts and two held-out pairs in every style, at guidance 7.5."""
    facts = [*list(world.TOLD_FACTS)[3:9:3], *list(world.UNTOLD_FACTS)[:8:4]]
    things = ["cat", "castle", "guitar", "frog", *facts]
    prompts = [world.prompt(thing, style) for thing in things for style in world.STYLES]
    # One generator a picture: the sheet of another step starts from the same noise.
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    with torch.no_grad():
        images = pipe(
            prompts,
            generator=generators,
            num_inference_steps=20,
            guidance_scale=7.5,
            output_type="pt",
        ).images
    sheet(images * 2 - 1, path, len(world.STYLES))
