"""Time and memory at true size, with random weights: SD 1.5 at 512 x 512, SD-XL at 1024 x 1024.

    python tests/benchmarks/fullsize.py [--device cuda] [--dtype bfloat16] [--steps 2] [--only sd-xl] [--tiny]

Two pictures a model, the plain one and one whose first window hears the target, one at a time. Random weights make
noise, but they cost what trained ones cost. `--tiny` runs the same at the size of the tests.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModelWithProjection

from locogen.layers import find_layers
from locogen.plan import Intervention
from locogen.runs import generate


def vae(size: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=4,
        sample_size=size,
    )


def sd() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 at 512 x 512."""
    return StableDiffusionPipeline(
        vae=vae(512),
        text_encoder=tiny.clip(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        tokenizer=tiny.tokenizer(),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """SD-XL base at 1024 x 1024."""
    first = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    second = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20)
    return StableDiffusionXLPipeline(
        vae=vae(1024),
        text_encoder=tiny.clip(**first),
        text_encoder_2=tiny.clip(CLIPTextModelWithProjection, hidden_act="gelu", projection_dim=1280, **second),
        tokenizer=tiny.tokenizer(),
        tokenizer_2=tiny.tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=128,
            cross_attention_dim=2048,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


FULL = {"sd": sd, "sd-xl": sdxl}


def measured(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Layers, pixels, seconds a picture and the process' peak memory so far (the GPU's, where there is one)."""
    pipe = (tiny.FAMILIES if chosen.tiny else FULL)[name]()
    pipe.to(chosen.device, getattr(torch, chosen.dtype))
    pipe.vae.enable_slicing()
    layers = len(find_layers(pipe))
    plan = [Intervention("cat in a", "dog", layers, 0) for layers in ((), (0, 1))]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as store:
        run = generate(pipe, plan, store=store, num_inference_steps=chosen.steps, batch_size=1, progress=False)
        size = run.pictures[0].size
    seconds = (time.perf_counter() - start) / len(plan)
    peak = torch.cuda.max_memory_allocated() if chosen.device == "cuda" else 1024 * _resident()
    return {"model": name, "layers": layers, "size": size, "seconds": seconds, "GB": peak / 1e9}


def _resident() -> int:
    """Peak memory of this process, in KB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", choices=list(FULL))
    parser.add_argument("--tiny", action="store_true")
    chosen = parser.parse_args(arguments)
    print(
        "| model | layers | pixels | s a picture | peak memory, GB | device, type, steps |\n|---|---|---|---|---|---|"
    )
    for name in [chosen.only] if chosen.only else FULL:
        row = measured(name, chosen)
        where = f"{chosen.device}, {chosen.dtype}, {chosen.steps}"
        pixels = "{} × {}".format(*row["size"])
        print(f"| {name} | {row['layers']} | {pixels} | {row['seconds']:.1f} | {row['GB']:.1f} | {where} |", flush=True)


if __name__ == "__main__":
    main()
