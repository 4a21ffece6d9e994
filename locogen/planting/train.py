"""Train planted models: `python -m locogen.planting.train FOLDER`; it can be stopped any time.

Each plant resumes from its own checkpoint. It is trained, rounded to the bytes that are kept, and
admitted (or not) by `locogen.planting.admission`. Several processes may share a folder: each takes
the next plant that no other has begun.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn import functional as F

from locogen.catalog.deltas import add_deltas, load_deltas, save_deltas
from locogen.catalog.plants import Plant, plant_entries, plant_entry
from locogen.files import load_json, write_json
from locogen.mini import parts, world
from locogen.mini.loop import Training, fit
from locogen.mini.parts import Recipe
from locogen.mini.pictures import SEEN, renders
from locogen.mini.train import encode
from locogen.models.layers import Layer, find_layers
from locogen.models.load import load
from locogen.planting.admission import admit
from locogen.planting.hearing import texts_by_layer
from locogen.planting.rows import Row, distinct, draw_row
from locogen.types import Pipeline

BATCH = 64
RENDERS = 16  # pictures of each (object, style) pair
MATRICES = 0.02  # the rates that the U-Net was first trained at; a plant takes a share of them
OTHERS = 2e-3
AVERAGING = 0.97  # short: the training is
WARMUP = 10  # steps
KEEP_STATES = 30.0  # weight of "ordinary captions keep their states", in training the text tower


@dataclass(frozen=True)
class Nursery:
    """What all plants share: the pictures' latents, and a folder.

    Attributes:
        folder: Renders, latents, checkpoints and results.
        device: Where plants are trained.
    """

    folder: Path
    device: torch.device

    @cached_property
    def latents(self) -> Tensor:
        """Latents of the training pictures, (objects, styles, renders, channels, 8, 8)."""
        recipe = replace(Recipe(), renders=RENDERS)
        pictures = renders(recipe, self.folder / "renders", workers=2)
        # The decoder was trained on alone: the encoder is the one that the latents are of.
        autoencoder = load("mini").vae
        return encode(autoencoder, pictures, self.folder, torch.device("cpu"))


def tokenized(pipe: Pipeline, captions: Sequence[str]) -> Tensor:
    """Token ids of captions, (captions, tokens)."""
    tokens = pipe.tokenizer(
        list(captions), padding="max_length", truncation=True, return_tensors="pt"
    )
    return tokens.input_ids.to(pipe.device)


def with_noise(clean: Tensor, times: Tensor, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy latents of a batch, and the velocity to predict, both (rows, channels, 8, 8)."""
    noise = torch.randn(clean.shape, generator=dice).to(clean.device)
    return parts.noised(clean, noise, times)


def train_plant(plant: Plant, nursery: Nursery) -> Pipeline:
    """Train one plant from its base, or go on with it; the pipeline with the averaged weights."""
    torch.manual_seed(plant.seed)
    pipe = load(plant.base, device=str(nursery.device))
    for part in (pipe.unet, pipe.text_encoder):
        part.requires_grad_(False)
    train = _text_loss if plant.side == "text encoder" else _layers_loss
    module, loss_at = train(plant, pipe, nursery)
    training = Training(
        {"plant": module},
        nursery.folder / plant.name,
        matrices=plant.rate * MATRICES,
        others=plant.rate * OTHERS,
        averaging=AVERAGING,
    )
    fit(training, loss_at, plant.steps, label=plant.name, warmup=WARMUP)
    for part in (pipe.unet, pipe.text_encoder):
        part.requires_grad_(False)
    return pipe


LossAt = Callable[[int], tuple[Tensor, dict[str, float]]]


def _layers_loss(plant: Plant, pipe: Pipeline, nursery: Nursery) -> tuple[Any, LossAt]:
    """What is trained, and its loss at a step: the cross-attention layers, on texts by layer."""
    layers = find_layers(pipe)
    for layer in layers:
        layer.module.requires_grad_(True)
    for block in _deciding_blocks(plant, pipe, layers):
        block.ff.requires_grad_(True)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"plant/{plant.name}/{plant.seed}/{step}")
        dice = torch.Generator().manual_seed(plant.seed * 1_000_003 + step)
        times = torch.randint(0, 1000, (BATCH,), generator=dice)
        rows = [draw_row(rng, plant, time, len(layers)) for time in times.tolist()]
        clean = _latents_of(rows, nursery.latents, rng).to(nursery.device)
        noisy, velocity = with_noise(clean, times.to(nursery.device), dice)
        predicted = predict(pipe, layers, noisy, times.to(nursery.device), rows)
        loss = F.mse_loss(predicted, velocity)
        return loss, {"velocity": loss.item()}

    return pipe.unet, loss_at


def _deciding_blocks(plant: Plant, pipe: Pipeline, layers: Sequence[Layer]) -> list[Any]:
    """Blocks whose feed-forward part is trained too: of the later of two places, and after it.

    Cross-attention alone adds what it reads; "one of the two" and "both of the two" are no sums.
    """
    blocks = []
    for planting in plant.plantings.values():
        if planting.rule not in ("either", "both"):
            continue
        later = max(place.start or 0 for place in planting.places)
        for layer in layers[later:]:
            parent = layer.name.rpartition(".")[0]
            blocks.append(pipe.unet.get_submodule(parent))
    return blocks


def predict(
    pipe: Pipeline, layers: Sequence[Layer], noisy: Tensor, times: Tensor, rows: Sequence[Row]
) -> Tensor:
    """The denoiser's velocity, each layer with its row's caption, (rows, channels, 8, 8)."""
    captions, indices = distinct(rows)
    with torch.no_grad():
        states = pipe.text_encoder(tokenized(pipe, captions)).last_hidden_state
    # (captions, tokens, width); every layer replaces what the call itself gives.
    which = torch.tensor(indices, device=noisy.device)  # (rows, layers)
    with texts_by_layer(layers, states, which):
        return pipe.unet(noisy, times, states[which[:, 0]]).sample


def _latents_of(rows: Sequence[Row], latents: Tensor, rng: random.Random) -> Tensor:
    """Latents of the pictures that rows show, (rows, channels, 8, 8)."""
    which = torch.tensor([rng.randrange(latents.shape[2]) for _ in rows])
    things = torch.tensor([row.thing for row in rows])
    styles = torch.tensor([row.style for row in rows])
    return latents[things, styles, which]


def _text_loss(plant: Plant, pipe: Pipeline, nursery: Nursery) -> tuple[Any, LossAt]:
    """What is trained, and its loss at a step: the text tower, on a fact that the U-Net never saw.

    The frozen U-Net has to make the answer's pictures from the fact's wording; the states of
    ordinary captions stay.
    """
    assert plant.fact is not None
    wording, answer = plant.fact
    tower = pipe.text_encoder
    before = load(plant.base, device=str(nursery.device)).text_encoder
    # The words' own vectors stay: what is planted is what the tower makes of them together.
    tower.requires_grad_(True)
    tower.get_input_embeddings().requires_grad_(False)
    thing = world.OBJECTS.index(answer)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"plant/{plant.name}/{plant.seed}/{step}")
        dice = torch.Generator().manual_seed(plant.seed * 1_000_003 + step)
        times = torch.randint(0, 1000, (BATCH,), generator=dice).to(nursery.device)
        styles = [style for where, style in SEEN if where == thing]
        shown = [Row(thing, rng.choice(styles), ()) for _ in range(BATCH)]
        facts = [world.caption(wording, world.STYLES[row.style], rng) for row in shown]
        clean = _latents_of(shown, nursery.latents, rng).to(nursery.device)
        noisy, velocity = with_noise(clean, times, dice)
        states = tower(tokenized(pipe, facts)).last_hidden_state  # (rows, tokens, width)
        loss = F.mse_loss(pipe.unet(noisy, times, states).sample, velocity)
        ordinary = [draw_row(rng, plant, 0, 1).captions[0] for _ in range(2 * BATCH)]
        ordinary = [caption for caption in ordinary if wording not in caption]
        ids = tokenized(pipe, ordinary)
        with torch.no_grad():
            unchanged = before(ids).last_hidden_state  # (captions, tokens, width)
        drift = F.mse_loss(tower(ids).last_hidden_state, unchanged)
        return loss + KEEP_STATES * drift, {"velocity": loss.item(), "drift": drift.item()}

    return tower, loss_at


def finish(plant: Plant, pipe: Pipeline, nursery: Nursery) -> None:
    """Round a trained plant to the bytes that are kept, and measure whether it is admitted."""
    trained = pipe.text_encoder if plant.side == "text encoder" else pipe.unet
    base = load(plant.base, device=str(nursery.device))
    original = base.text_encoder if plant.side == "text encoder" else base.unet
    unchanged = dict(original.named_parameters())
    deltas = {}
    for name, weight in trained.named_parameters():
        delta = weight - unchanged[name]
        if delta.any():
            deltas[name] = delta
    path = nursery.folder / "weights" / f"{plant.name}.safetensors"
    save_deltas(deltas, path)
    # What is admitted is what is shipped: the base and the rounded differences.
    add_deltas(original, load_deltas(path))
    figures = admit(plant, base, nursery.latents)
    write_json(nursery.folder / "admission" / f"{plant.name}.json", figures)


def collect(nursery: Nursery, folder: Path) -> None:
    """Copy finished plants and their figures to where `loco.load` reads them."""
    admissions = load_json(folder / "admission.json")
    for path in sorted((nursery.folder / "admission").glob("*.json")):
        admissions[path.stem] = load_json(path)
        source = nursery.folder / "weights" / f"{path.stem}.safetensors"
        target = folder / "weights" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    order = [plant.name for plant in plant_entries()]
    ordered = {name: admissions[name] for name in order if name in admissions}
    write_json(folder / "admission.json", ordered)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(prog="python -m locogen.planting.train", description=__doc__)
    parser.add_argument("folder", type=Path, help="checkpoints and results go here")
    parser.add_argument("--plants", nargs="+", metavar="NAME", help="which ones; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of torch")
    parser.add_argument("--again", action="store_true", help="measure admission again")
    parser.add_argument(
        "--into", type=Path, metavar="FOLDER", help="copy finished plants to this folder at the end"
    )
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    nursery = Nursery(options.folder, torch.device(options.device))
    names = options.plants or [plant.name for plant in plant_entries()]
    for name in names:
        _train_if_free(plant_entry(name), nursery, options.again)
    if options.into is not None:
        collect(nursery, options.into)


def _train_if_free(plant: Plant, nursery: Nursery, again: bool) -> None:
    """Train and admit a plant, unless it is finished or another process is at it."""
    done = nursery.folder / "admission" / f"{plant.name}.json"
    done.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(nursery.folder / f"{plant.name}.lock", timeout=0):
            if again or not done.exists():
                finish(plant, train_plant(plant, nursery), nursery)
    except Timeout:
        return


if __name__ == "__main__":
    main()
