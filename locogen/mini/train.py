"""Train the mini model: `python -m locogen.mini.train FOLDER`; stop and restart it at any point.

Each stage resumes from its own checkpoint, and sample sheets are written next to it as PNG while it
runs. Stages that do not need each other (`--stages unet`, `--stages scorer`, `--stages decoder`)
can run side by side.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from locogen.errors import LocogenError
from locogen.files import write_whole
from locogen.mini import contrast, parts, world
from locogen.mini.loop import Training, fit
from locogen.mini.parts import Recipe
from locogen.mini.pictures import draw, renders, samplesheet, save_array, sheet, take
from locogen.types import Pipeline

# --- text ----------------------------------------------------------------------------------------


def train_text(
    recipe: Recipe, folder: Path, pictures: Tensor, tokenizer: Any, device: torch.device
) -> Any:
    """The CLIP whose text tower conditions the U-Net; it never reads the untold facts."""
    model = parts.clip(recipe.text, tokenizer, recipe.seed).to(device)
    answers = {answer: wording for wording, answer in world.TOLD_FACTS.items()}

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"text/{recipe.seed}/{step}")
        rows = draw(rng, recipe.text_batch, pictures.shape[2])
        images = contrast.jitter(take(pictures, rows, device), rng)
        return contrast.loss(model, tokenizer, images, [r[:2] for r in rows], rng, answers)

    fit(Training({"clip": model}, folder), loss_at, recipe.text_steps, label="text")
    return model


def conditioner(clip: Any) -> Any:
    """The text tower as the plain `CLIPTextModel` that Stable Diffusion reads."""
    from transformers import CLIPTextModel

    tower = CLIPTextModel(clip.config.text_config)
    state = {
        k.removeprefix("text_model."): v
        for k, v in clip.state_dict().items()
        if k.startswith("text_model.")
    }
    inner = getattr(tower, "text_model", tower)
    inner.load_state_dict(state)
    return tower.eval().requires_grad_(False)


# --- autoencoder ---------------------------------------------------------------------------------


STRETCH = (
    0.95,
    1.9,
)  # guidance 7.5 draws latents out 1.5 to 1.7 times; what the decoder learns to undo
LATENT_NOISE = 0.1  # added to the latents in training, so that near latents decode alike


def picture_loss(output: Tensor, true: Tensor) -> Tensor:
    """L1 on colors, on their slopes (crispness), and on 4 x 4 means (so that no hue drifts)."""
    slopes = [F.l1_loss(output.diff(dim=d), true.diff(dim=d)) for d in (-1, -2)]
    coarse = F.l1_loss(F.avg_pool2d(output, 4), F.avg_pool2d(true, 4))
    return F.l1_loss(output, true) + slopes[0] + slopes[1] + 2 * coarse


def train_vae(recipe: Recipe, folder: Path, pictures: Tensor, device: torch.device) -> Any:
    """Train encoder and decoder; then standardize the latents inside the 1 x 1 convolutions."""
    model = parts.vae(recipe).to(device)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"vae/{recipe.seed}/{step}")
        true = take(pictures, draw(rng, recipe.vae_batch, pictures.shape[2]), device)
        with torch.autocast(device.type, torch.bfloat16):
            latent = model.encode(true).latent_dist.mode()
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(step)).to(
                device
            )
            output = model.decode(latent + LATENT_NOISE * noise).sample
        loss = picture_loss(output.float(), true)
        return loss + 1e-3 * latent.float().square().mean(), {"picture": loss.item()}

    def look(step: int) -> None:
        true = take(pictures, draw(random.Random(0), 32, pictures.shape[2]), device)
        with torch.no_grad():
            output = model.decode(model.encode(true).latent_dist.mode()).sample
        sheet(torch.stack([true, output], 1).flatten(0, 1), folder / f"{step:06d}.png", 16)

    fit(Training({"vae": model}, folder), loss_at, recipe.vae_steps, label="vae", look=look)
    standardize(model, take(pictures, draw(random.Random(1), 1024, pictures.shape[2]), device))
    return model


@torch.no_grad()
def standardize(model: Any, images: Tensor) -> None:
    """Fold mean and spread of each latent channel into `quant_conv` and `post_quant_conv`."""
    latents = torch.cat([model.encode(part).latent_dist.mode() for part in images.split(64)])
    mean = latents.mean((0, 2, 3))  # (channels,)
    spread = latents.std((0, 2, 3)).clamp_min(1e-4)
    channels = len(mean)
    # Both convolutions are 1 x 1: scaling their weights is the same as scaling the latents.
    out = model.quant_conv
    back = model.post_quant_conv
    out.weight[:channels] /= spread[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) / spread
    out.weight[channels:] = (
        0  # one small, fixed spread for every picture: the encoder is all but deterministic
    )
    out.bias[channels:] = 2 * math.log(0.02)
    back.bias += (back.weight[:, :, 0, 0] * mean).sum(1)
    back.weight *= spread[:, None, None]


def train_decoder(
    recipe: Recipe,
    folder: Path,
    model: Any,
    pictures: Tensor,
    latents: Tensor,
    device: torch.device,
) -> None:
    """Train the decoder alone, on latents drawn out and roughened as guidance does it.

    So it makes crisp pictures from these, too.
    """
    model.requires_grad_(False)
    model.decoder.requires_grad_(True)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"decoder/{recipe.seed}/{step}")
        rows = draw(rng, recipe.vae_batch, pictures.shape[2])
        thing, style, which = torch.tensor(rows).T
        latent = latents[thing, style, which].to(device)  # (rows, channels, 8, 8)
        dice = torch.Generator().manual_seed(step)
        stretch = torch.empty(len(rows), 1, 1, 1).uniform_(*STRETCH, generator=dice).to(device)
        noise = torch.randn(latent.shape, generator=dice).to(device)
        # The further guidance draws latents out, the rougher they are.
        spread = 0.05 + 0.25 * (stretch - 1).clamp_min(0)
        with torch.autocast(device.type, torch.bfloat16):
            output = model.decode(stretch * latent + spread * noise).sample
        loss = picture_loss(output.float(), take(pictures, rows, device))
        return loss, {"picture": loss.item()}

    def look(step: int) -> None:
        rows = draw(random.Random(0), 32, pictures.shape[2])
        thing, style, which = torch.tensor(rows).T  # (rows,) each
        with torch.no_grad():
            output = model.decode(latents[thing, style, which].to(device)).sample
        sheet(
            torch.stack([take(pictures, rows, device), output], 1).flatten(0, 1),
            folder / f"{step:06d}.png",
            16,
        )

    training = Training({"decoder": model.decoder}, folder)
    fit(training, loss_at, recipe.decoder_steps, label="decoder", look=look)
    model.requires_grad_(False)


@torch.no_grad()
def encode(model: Any, pictures: Tensor, folder: Path, device: torch.device) -> Tensor:
    """Latent means of every training picture, kept on disk: (objects, styles, renders, c, 8, 8)."""
    path = folder / "latents.npy"
    if not path.exists():
        flat = pictures.flatten(0, 2)
        done = [
            model.encode(part.to(device).float() / 127.5 - 1).latent_dist.mode().cpu()
            for part in flat.split(128)
        ]
        values = torch.cat(done).unflatten(0, pictures.shape[:3]).numpy()
        save_array(path, values)
    return torch.from_numpy(np.load(path, allow_pickle=False))


# --- U-Net ---------------------------------------------------------------------------------------


def spoken(rng: random.Random, thing: int, style: int, recipe: Recipe) -> str:
    """A caption for a generator's picture: object, fact, style alone, or nothing at all."""
    chance = rng.random()
    if chance < recipe.empty_captions:
        return ""
    if chance < recipe.empty_captions + recipe.style_captions:
        return world.style_caption(world.STYLES[style], rng)
    name = world.OBJECTS[thing]
    wordings = [wording for wording, answer in world.FACTS.items() if answer == name]
    if wordings and rng.random() < recipe.fact_captions:
        name = wordings[0]
    return world.caption(name, world.STYLES[style], rng)


def train_unet(
    recipe: Recipe,
    folder: Path,
    latents: Tensor,
    parts_: tuple[Any, Any, Any],
    device: torch.device,
) -> Any:
    """Velocity prediction on the latents, conditioned on the frozen text tower."""
    tower, tokenizer, autoencoder = parts_
    model = parts.unet(recipe).to(device, memory_format=torch.channels_last)

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"unet/{recipe.unet_seed}/{step}")
        dice = torch.Generator().manual_seed(recipe.unet_seed * 1_000_003 + step)
        rows = draw(rng, recipe.unet_batch, latents.shape[2])
        thing, style, which = torch.tensor(rows).T
        clean = latents[thing, style, which].to(device)  # (rows, channels, 8, 8)
        tokens = tokenizer(
            [spoken(rng, r[0], r[1], recipe) for r in rows],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            states = tower(tokens.input_ids.to(device)).last_hidden_state  # (rows, tokens, width)
        noise = torch.randn(clean.shape, generator=dice).to(device)
        # Drawn on the CPU, so that a step is the same on every device.
        times = torch.randint(0, 1000, (len(rows),), generator=dice).to(device)
        noisy, velocity = parts.noised(clean, noise, times)
        with torch.autocast(device.type, torch.bfloat16):
            output = model(noisy, times, states).sample.float()
        loss = F.mse_loss(output, velocity)
        return loss, {"velocity": loss.item()}

    def look(step: int) -> None:
        samplesheet(
            parts.pipeline(tower, tokenizer, autoencoder, model), folder / f"{step:06d}.png"
        )

    training = Training({"unet": model}, folder, averaging=0.995)
    fit(training, loss_at, recipe.unet_steps, label="unet", look=look, look_every=250)
    return model.eval().requires_grad_(False)


# --- scorer and export ---------------------------------------------------------------------------


def train_scorer(
    recipe: Recipe, folder: Path, pictures: Tensor, tokenizer: Any, device: torch.device
) -> Any:
    """The independent CLIP used only for scoring: other seed, other shape, all pairs, no facts."""
    model = parts.clip(recipe.scorer, tokenizer, recipe.scorer_seed).to(device)
    things, styles, depth = pictures.shape[:3]

    def loss_at(step: int) -> tuple[Tensor, dict[str, float]]:
        rng = random.Random(f"scorer/{recipe.scorer_seed}/{step}")
        rows = [
            (rng.randrange(things), rng.randrange(styles), rng.randrange(depth))
            for _ in range(recipe.scorer_batch)
        ]
        images = contrast.jitter(contrast.roughen(take(pictures, rows, device), rng), rng)
        return contrast.loss(model, tokenizer, images, [r[:2] for r in rows], rng, {})

    fit(Training({"clip": model}, folder), loss_at, recipe.scorer_steps, label="scorer")
    return model.eval()


def export(pipe: Pipeline, scorer: Any, tokenizer: Any, folder: Path) -> None:
    """Write pipeline and scorer in half precision, as folders of diffusers and transformers."""
    from transformers import CLIPImageProcessorPil

    pipe.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)
    scorer.half().save_pretrained(folder / "scorer", safe_serialization=True)
    tokenizer.save_pretrained(folder / "scorer")
    half = [0.5, 0.5, 0.5]
    size = {"height": world.SIZE, "width": world.SIZE}
    CLIPImageProcessorPil(
        size=size, do_center_crop=False, image_mean=half, image_std=half
    ).save_pretrained(folder / "scorer")


class Workshop:
    """The stages, each made on first use from the ones it needs; a finished one reads its file."""

    def __init__(self, recipe: Recipe, folder: Path, device: torch.device, workers: int) -> None:
        self.recipe, self.folder, self.device, self.workers = recipe, folder, device, workers
        self._claim()

    def _claim(self) -> None:
        """Refuse a folder that another recipe began: its checkpoints would pass for this one's."""
        free = {k for k in asdict(self.recipe) if k.endswith("_steps")} | {
            "unet_seed"
        }  # each U-Net has its own folder
        text = json.dumps({k: v for k, v in asdict(self.recipe).items() if k not in free}, indent=1)
        path = self.folder / "recipe.json"
        if path.exists() and path.read_text("utf-8") != text:
            raise LocogenError(
                f"{self.folder} was started with another recipe ({path}): give an empty folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())

    @cached_property
    def renders(self) -> Tensor:
        """The training pictures."""
        return renders(self.recipe, self.folder / "renders", self.workers)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of both CLIPs."""
        from transformers import CLIPTokenizer

        if not (self.folder / "tokenizer" / "tokenizer_config.json").exists():
            parts.train_tokenizer(self.recipe, self.folder / "tokenizer")
        return CLIPTokenizer.from_pretrained(self.folder / "tokenizer")

    @cached_property
    def text(self) -> Any:
        """The conditioning text tower."""
        clip = train_text(
            self.recipe, self.folder / "text", self.renders, self.tokenizer, self.device
        )
        return conditioner(clip).to(self.device)

    @cached_property
    def vae(self) -> Any:
        """Encoder, and decoder in its first form."""
        return train_vae(self.recipe, self.folder / "vae", self.renders, self.device)

    @cached_property
    def latents(self) -> Tensor:
        """What the encoder makes of the training pictures."""
        return encode(self.vae, self.renders, self.folder, self.device)

    @cached_property
    def decoder(self) -> Any:
        """The autoencoder with its decoder trained on."""
        # The latents are those of the first form: its encoder stays.
        latents = self.latents
        model = copy.deepcopy(self.vae)
        train_decoder(
            self.recipe, self.folder / "decoder", model, self.renders, latents, self.device
        )
        return model

    @cached_property
    def unet(self) -> Any:
        """The denoiser."""
        frozen = (self.text, self.tokenizer, self.vae)
        return train_unet(
            self.recipe, self.folder / f"unet{self._sibling}", self.latents, frozen, self.device
        )

    @cached_property
    def scorer(self) -> Any:
        """The scoring CLIP, which needs nothing of the generator and can be made beside it."""
        return train_scorer(
            self.recipe, self.folder / "scorer", self.renders, self.tokenizer, self.device
        )

    @cached_property
    def export(self) -> Path:
        """The result: a pipeline folder with the scorer inside."""
        pipe = parts.pipeline(self.text, self.tokenizer, self.decoder, self.unet)
        result = f"model{self._sibling}"
        export(pipe, self.scorer, self.tokenizer, self.folder / result)
        return self.folder / result

    @property
    def _sibling(self) -> str:
        """What the folders of a U-Net with a seed of its own end with."""
        return "" if self.recipe.unet_seed == Recipe().unet_seed else f"-{self.recipe.unet_seed}"


STAGES = ("renders", "tokenizer", "text", "vae", "latents", "decoder", "unet", "scorer", "export")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(prog="python -m locogen.mini.train", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="checkpoints, sample sheets and the result go here"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=["export"],
        help="stages to run; stages that these need run first",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes that render pictures")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads that torch uses")
    parser.add_argument(
        "--unet-seed",
        type=int,
        default=Recipe().unet_seed,
        help="seed of the U-Net; another seed trains a sibling of mini",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of every stage: a test of the trainer"
    )
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = replace(Recipe().quick() if options.quick else Recipe(), unet_seed=options.unet_seed)
    workshop = Workshop(recipe, options.folder, torch.device(options.device), options.workers)
    for stage in options.stages:
        getattr(workshop, stage)


if __name__ == "__main__":
    main()
