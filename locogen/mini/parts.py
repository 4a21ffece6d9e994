"""The parts of the mini model and the one config of its recipe."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (diffusers annotates tuples of any length as tuples of one)
from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locogen.mini import world
from locogen.types import Module


@dataclass(frozen=True)
class ClipShape:
    """Shape of a CLIP: width and depth of both towers, and the vision tower's patch in pixels."""

    width: int
    layers: int
    patch: int
    heads: int = 4


@dataclass(frozen=True)
class Recipe:
    """All that decides the shipped weights. Steps are optimizer steps, batches are pictures."""

    seed: int = 2405
    renders: int = 64  # pictures of each (object, style) pair
    length: int = 20  # tokens a prompt, start and end included
    text: ClipShape = ClipShape(width=128, layers=3, patch=16)
    text_steps: int = 500
    text_batch: int = 256
    vae_channels: tuple[int, ...] = (16, 16, 64, 128)
    latent_channels: int = 16
    vae_steps: int = 2200
    vae_batch: int = 32
    decoder_steps: int = 1500
    unet_channels: tuple[int, ...] = (64, 96, 128, 128)
    unet_heads: tuple[int, ...] = (1, 2, 2, 2)
    unet_seed: int = 2405  # another one makes a sibling that shares all the other parts
    unet_steps: int = 1800
    unet_batch: int = 128
    empty_captions: float = 0.1
    fact_captions: float = 0.35
    style_captions: float = 0.1
    scorer: ClipShape = ClipShape(width=144, layers=3, patch=8)
    scorer_steps: int = 1300
    scorer_batch: int = 96
    scorer_seed: int = 1905

    def quick(self) -> Recipe:
        """The same stages in seconds, to test the trainer: the result is noise."""
        few = dict.fromkeys(
            ("text_steps", "vae_steps", "decoder_steps", "unet_steps", "scorer_steps"), 3
        )
        return replace(
            self, renders=1, text_batch=8, vae_batch=4, unet_batch=4, scorer_batch=8, **few
        )


def corpus(recipe: Recipe, count: int = 20_000) -> list[str]:
    """Captions for the tokenizer: every word of the world, so that each becomes one token.

    The words of untold facts are among them.
    """
    rng = random.Random(recipe.seed)
    things = [*world.OBJECTS, *world.FACTS]
    return [world.caption(rng.choice(things), rng.choice(world.STYLES), rng) for _ in range(count)]


def train_tokenizer(recipe: Recipe, folder: Path) -> None:
    """A byte-pair tokenizer in CLIP's format: nearly every word of the world is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    specials = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(
        models.BPE(unk_token=specials[1], end_of_word_suffix="</w>", continuing_subword_prefix="")
    )
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789,.'-")
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=specials,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([*corpus(recipe), *(f"{c}" for c in letters)], trainer)
    table = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in table["merges"]]
    CLIPTokenizer(
        vocab=table["vocab"],
        merges=merges,
        bos_token=specials[0],
        eos_token=specials[1],
        unk_token=specials[1],
        pad_token=specials[1],
        model_max_length=recipe.length,
    ).save_pretrained(folder)


def clip(shape: ClipShape, tokenizer: Any, seed: int) -> Any:
    """A `transformers.CLIPModel` of that shape, seeded."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    tower = dict(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        projection_dim=shape.width,
    )
    text = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = dict(image_size=world.SIZE, patch_size=shape.patch)
    model = CLIPModel(
        CLIPConfig(
            text_config=tower | text, vision_config=tower | vision, projection_dim=shape.width
        )
    )
    # Words that this CLIP never reads keep their first embedding: it must be as loud as the others.
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.2)
    return model


def vae(recipe: Recipe) -> Any:
    """An `AutoencoderKL` that maps 64 x 64 pictures to 8 x 8 latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(recipe.seed)
    blocks = len(recipe.vae_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=recipe.vae_channels,
        layers_per_block=1,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def unet(recipe: Recipe) -> Any:
    """A `UNet2DConditionModel` with the 16 cross-attention layers of Stable Diffusion 1."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(recipe.unet_seed)
    return UNet2DConditionModel(
        sample_size=world.SIZE // 8,
        in_channels=recipe.latent_channels,
        out_channels=recipe.latent_channels,
        block_out_channels=recipe.unet_channels,
        attention_head_dim=recipe.unet_heads,  # diffusers' historical name for the number of heads
        cross_attention_dim=recipe.text.width,
        norm_num_groups=16,
    )


def scheduler() -> Any:
    """DPM-Solver++ over a cosine schedule, predicting velocity."""
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def noised(clean: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Noisy latents at training timesteps, and the velocity to predict, both (rows, c, 8, 8)."""
    # The share of the variance that is picture, by time.
    signal = scheduler().alphas_cumprod.to(clean.device)
    keep = signal[times].sqrt()[:, None, None, None]  # (rows, 1, 1, 1)
    lost = (1 - signal[times]).sqrt()[:, None, None, None]
    # The velocity (Salimans & Ho 2022): what the scheduler's v-prediction expects.
    return keep * clean + lost * noise, keep * noise - lost * clean


def pipeline(text_encoder: Any, tokenizer: Any, autoencoder: Any, denoiser: Module) -> Any:
    """The parts as a plain `StableDiffusionPipeline`."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
