"""Time and memory at true size, with random weights: SD 1.5 at 512 x 512, SD-XL at 1024 x 1024.

    python tests/benchmarks/fullsize.py [--device cuda] [--dtype bfloat16] [--steps 2] [--only sd-xl] [--tiny]
    python tests/benchmarks/fullsize.py --weights

Two pictures a model, the plain one and one whose first window hears the target, one at a time. Random weights make
noise, but they cost what trained ones cost. `--tiny` runs the same at the size of the tests. `--weights` makes nothing:
it counts every family's weights at 16 bits, and how they fit cards, with 2 GB left for the pictures.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from support import full, tiny

from locogen.models.layers import find_layers
from locogen.pictures.runs import generate
from locogen.plan import Intervention


def sd() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 at 512 x 512."""
    return StableDiffusionPipeline(
        vae=full.kl(512),
        text_encoder=full.clip_l(),
        tokenizer=full.tokenizer(),
        unet=full.sd(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """SD-XL base at 1024 x 1024."""
    return StableDiffusionXLPipeline(
        vae=full.kl(1024),
        text_encoder=full.clip_l(),
        text_encoder_2=full.clip_g(),
        tokenizer=full.tokenizer(),
        tokenizer_2=full.tokenizer(),
        unet=full.sdxl(),
        scheduler=EulerDiscreteScheduler(),
        add_watermarker=False,
    )


CARDS = (8, 12, 24)  # GB
ROOM = 2  # GB for what is computed: one picture at a time, the autoencoder by slices and tiles

FULL = {"sd": sd, "sd-xl": sdxl}


def measured(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Layers, pixels, seconds a picture (of a core; on a GPU, of the clock), peak memory so far (the GPU's, there)."""
    pipe = _built((tiny.FAMILIES if chosen.tiny else FULL)[name], getattr(torch, chosen.dtype)).to(
        chosen.device
    )
    pipe.vae.enable_slicing()
    layers = len(find_layers(pipe))
    plan = [Intervention("cat in a", "dog", layers, 0) for layers in ((), (0, 1))]
    clock = (
        time.perf_counter if chosen.device == "cuda" else time.process_time
    )  # other work does not count
    start = clock()
    with tempfile.TemporaryDirectory() as store:
        run = generate(
            pipe, plan, store=store, num_inference_steps=chosen.steps, batch_size=1, progress=False
        )
        size = run.pictures[0].size
    seconds = (clock() - start) / len(plan)
    peak = torch.cuda.max_memory_allocated() if chosen.device == "cuda" else 1024 * _resident()
    return {"model": name, "layers": layers, "size": size, "seconds": seconds, "GB": peak / 1e9}


def _built(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    """A pipeline whose weights never were anything larger: as when it is loaded in that type."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return make()
    finally:
        torch.set_default_dtype(usual)


def _resident() -> int:
    """Peak memory of this process, in KB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def way(whole: float, largest: float, card: float) -> str:
    """The fastest way of loading that leaves room on a card: all of it, part by part, or layer by layer."""
    if whole + ROOM <= card:
        return "as it is"
    return 'offload="model"' if largest + ROOM <= card else 'offload="sequential"'


def print_weights() -> None:
    """All families' weights in GB, and the way to load them on each card."""
    print(
        f"| model | type | weights, GB | at once, GB |{''.join(f' {card} GB |' for card in CARDS)}"
    )
    print("|---|---|---|---|" + "---|" * len(CARDS))
    for name in full.PARTS:
        print_row(name, "bfloat16", [0] * len(full.PARTS[name]))
        if sum(full.in_float32(name)):
            print_row(name, "float16", full.in_float32(name))


def print_row(name: str, dtype: str, in_float32: list[int]) -> None:
    """One model in one type, some weights of which stay in float32."""
    parts = [
        (2 * count + 2 * wide) / 1e9
        for count, wide in zip(full.weights(name), in_float32, strict=True)
    ]
    at_once = max(parts)
    if (
        name == "sd-3"
    ):  # T5 is still there when the CLIPs encode the negative (tests/models/test_offload.py)
        at_once = parts[3] + parts[2]
    ways = "".join(f" {way(sum(parts), at_once, card)} |" for card in CARDS)
    print(f"| {name} | {dtype} | {sum(parts):.1f} | {at_once:.1f} |{ways}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", choices=list(FULL))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--weights", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.weights:
        return print_weights()
    print("| model | layers | pixels | s a picture | peak memory, GB | device, type, steps |")
    print("|---|---|---|---|---|---|")
    for name in [chosen.only] if chosen.only else FULL:
        row = measured(name, chosen)
        where = f"{chosen.device}, {chosen.dtype}, {chosen.steps}"
        pixels = "{} × {}".format(*row["size"])
        print(
            f"| {name} | {row['layers']} | {pixels} | {row['seconds']:.1f} | {row['GB']:.1f} | {where} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
