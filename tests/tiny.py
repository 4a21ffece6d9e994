"""A seeded stand-in for Stable Diffusion 1: the real classes at the smallest size, random weights, no download."""

import functools
import tempfile
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 16


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is letters: 40 tokens a prompt at most."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    vocab += ["".join(pair) for pair in merges]
    with tempfile.TemporaryDirectory() as folder:
        made = CLIPTokenizer(
            vocab={word: i for i, word in enumerate(vocab)},
            merges=merges,
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            model_max_length=40,
        )
        made.save_pretrained(folder)
        return CLIPTokenizer.from_pretrained(folder)


def unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8, 16, 16),
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
    )
    made = UNet2DConditionModel(**(shape | changes))
    loud(made)
    return made


@torch.no_grad()
def loud(module: torch.nn.Module) -> None:
    """Random weights hardly hear text: turn the text's matrices up, so that a change of prompt shows."""
    for name, value in module.named_parameters():
        if any(part in name for part in ("attn2.to_k", "attn2.to_v", "attn2.to_out.0.weight")):
            value.mul_(4)


def pipeline(**unet_changes: Any) -> StableDiffusionPipeline:
    words = tokenizer()
    torch.manual_seed(1)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text.eval(),
        tokenizer=words,
        unet=unet(**unet_changes),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class FakeScorer:
    """A scorer without a model: how red the picture is, whatever the text; the second text scores its blue."""

    settings: ClassVar = {"scorer": "fake", "preprocessing": "none", "scale": 1.0}

    def __call__(self, pictures: Any, *texts: Any) -> list[np.ndarray]:
        means = np.stack([np.asarray(p, float).mean((0, 1)) / 255 for p in pictures])
        return [means[:, channel] for channel, _ in zip((0, 2), texts, strict=False)]
