"""Time and memory at true size, with random weights: SD 1.5 at 512 x 512, SD-XL at 1024 x 1024.

    python tests/benchmarks/fullsize.py [--device cuda] [--dtype bfloat16] [--steps 2] [--only sd-xl] [--tiny]
    python tests/benchmarks/fullsize.py --attribute gradient chain [--device cuda] …
    python tests/benchmarks/fullsize.py --weights

Two pictures a model, the plain one and one whose first window hears the target, one at a time. Random weights make
noise, but they cost what trained ones cost. `--attribute` measures an attribution of one prompt and one seed instead, in
each way that is named. `--tiny` runs the same at the size of the tests. `--weights` makes nothing:
it counts every family's weights at 16 bits, and how they fit cards, with 2 GB left for the pictures.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
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

from locogen.localization.attribution.attribute import attribute
from locogen.models.layers import find_layers
from locogen.pictures.runs import generate
from locogen.plan import Concept, Intervention, PromptPair


def sd() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5 at 512 x 512."""
    return StableDiffusionPipeline(
        vae=full.kl(512),
        text_encoder=full.clip_l(),
        tokenizer=full.tokenizer(),
        unet=full.sd(),
        scheduler=_in_main_memory(DDIMScheduler, steps_offset=1, clip_sample=False),
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
        scheduler=_in_main_memory(EulerDiscreteScheduler),
        add_watermarker=False,
    )


CARDS = (8, 12, 24)  # GB
ROOM = 2  # GB for what is computed: one picture at a time, the autoencoder by slices and tiles

FULL = {"sd": sd, "sd-xl": sdxl}


def measured(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """Layers, pixels, seconds a picture (of a core; on a GPU, of the clock), peak memory (the GPU's, there)."""
    pipe = pipeline(name, chosen.device, getattr(torch, chosen.dtype), chosen.tiny)
    pipe.vae.enable_slicing()
    layers = len(find_layers(pipe))
    plan = [Intervention("cat in a", "dog", layers, 0) for layers in ((), (0, 1))]
    with tempfile.TemporaryDirectory() as store, timing(chosen.device) as cost:
        run = generate(
            pipe, plan, store=store, num_inference_steps=chosen.steps, batch_size=1, progress=False
        )
        size = run.pictures[0].size
    pixels = "{} × {}".format(*size)
    return {"what": pixels, "layers": layers, **cost, "seconds": cost["seconds"] / len(plan)}


def attributed(name: str, how: Any, chosen: argparse.Namespace) -> dict[str, Any]:
    """The same of an attribution: its seconds are of the whole."""
    pipe = pipeline(name, chosen.device, getattr(torch, chosen.dtype), chosen.tiny)
    concept = Concept("cat", "object", (PromptPair("cat in a", "dog in a"),))
    with timing(chosen.device) as cost:
        shares = attribute(
            pipe,
            concept,
            how=how,
            seeds=[0],
            num_inference_steps=chosen.steps,
            points=chosen.points,
            most_points=chosen.points,
            batch_size=1,
            progress=False,
        )
    rows = shares.settings["denoiser_rows"]
    words = f"attribution, {how}, {chosen.points} points, {rows} denoiser rows"
    return {"what": words, "layers": len(find_layers(pipe)), **cost}


@contextlib.contextmanager
def timing(device: str) -> Iterator[dict[str, float]]:
    """Seconds and peak memory in GB of what happens within."""
    on_gpu = device == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time  # other work does not count
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = clock()
    cost: dict[str, float] = {}
    yield cost
    if on_gpu:
        torch.cuda.synchronize()
    cost["seconds"] = clock() - start
    cost["GB"] = (torch.cuda.max_memory_allocated() if on_gpu else 1024 * _resident()) / 1e9


def pipeline(name: str, device: str, dtype: torch.dtype, small: bool) -> Any:
    """A pipeline whose weights never were anything larger, nor elsewhere: as when it is loaded so."""
    make = (tiny.FAMILIES if small else FULL)[name]
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        if small:
            return make().to(device)
        with torch.device(device):  # random numbers of this size take a processor minutes
            return make().to(device)
    finally:
        torch.set_default_dtype(usual)


def _in_main_memory(scheduler: Any, **settings: Any) -> Any:
    """A scheduler whose tables stand in main memory, where it computes."""
    with torch.device("cpu"):
        return scheduler(**settings)


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
    parser.add_argument("--attribute", nargs="*", default=[], choices=["gradient", "chain", "rows"])
    parser.add_argument("--points", type=int, default=3, help="of an attribution's integral")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--weights", action="store_true")
    chosen = parser.parse_args(arguments)
    if chosen.weights:
        return print_weights()
    print("| model | layers | what | seconds | peak memory, GB | device, type, steps |")
    print("|---|---|---|---|---|---|")
    for name in [chosen.only] if chosen.only else FULL:
        for how in chosen.attribute:
            report(name, attributed(name, how, chosen), chosen)
        if not chosen.attribute:
            report(name, measured(name, chosen), chosen)


def report(name: str, row: dict[str, Any], chosen: argparse.Namespace) -> None:
    """Print a line of the table."""
    where = f"{chosen.device}, {chosen.dtype}, {chosen.steps}"
    cost = f"{row['seconds']:.1f} | {row['GB']:.1f}"
    print(f"| {name} | {row['layers']} | {row['what']} | {cost} | {where} |", flush=True)


if __name__ == "__main__":
    main()
