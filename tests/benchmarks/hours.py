"""Hours of the paper's study (reports/paper.toml) on two cards, by the shapes: no card and no checkpoint is needed.

    python tests/benchmarks/hours.py [--share 0.4]

Operations of the denoiser's row, of decoding a picture and of the scorer are counted on the meta device, at full size;
rows and pictures as the search makes them. *Assumed*: half precision, batches that fill the card, `--share` of the
card's dense half-precision rate (NVIDIA's data sheets: H100 SXM 989, RTX 4090 165 TFLOPS with sums in float32), and no
time for anything else. So these are not measurements: they compare searches, models and cards.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attribution
import torch
from support import full
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import locogen as loco
from locogen.catalog.models import model_entry
from locogen.models.layers import find_layers

STUDY = Path(__file__).resolve().parent.parent.parent / "reports" / "paper.toml"
RATES = {"H100": 989e12, "RTX 4090": 165e12}  # operations a second
TOKENS = 77
# Of each model of the study: its denoiser, the size of what it denoises, and the pixels that are decoded (0: none).
SHAPES: dict[str, tuple[Callable[[], Any], int, int]] = {
    "sd-1.5": (full.sd, 64, 512),
    "openjourney": (full.sd, 64, 512),
    "sd-2.1": (full.sd2, 96, 768),
    "sd-xl": (full.sdxl, 128, 1024),
    "if-1": (full.deepfloyd, 64, 0),
}


def operations(make: Callable[[], Any], call: Callable[[Any], Any]) -> float:
    """Floating-point operations of one call of a module that has no weights in memory."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        call(make())
    return float(counter.get_total_flops())


def of_row(model: str) -> float:
    """Operations of one row of the denoiser, in one step."""
    make, size, _ = SHAPES[model]
    return operations(make, lambda denoiser: denoised(denoiser, size))


def denoised(denoiser: Any, size: int) -> Any:
    """One row through a U-Net, with whatever further inputs its configuration asks for."""
    config = denoiser.config
    picture = torch.zeros(1, config.in_channels, size, size)  # (rows, channels, height, width)
    width = config.encoder_hid_dim or config.cross_attention_dim
    text = torch.zeros(1, TOKENS, width)  # (rows, tokens, width)
    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    takes_size = config.addition_embed_type == "text_time"
    further = {"added_cond_kwargs": added} if takes_size else {}
    return denoiser(picture, torch.zeros(1), text, **further)


def of_picture(model: str) -> float:
    """Operations of decoding a picture, and of scoring it by CLIP ViT-B/16."""
    pixels = SHAPES[model][2]
    scored = operations(lambda: CLIPVisionModelWithProjection(vision()), seen)
    if not pixels:
        return scored
    latents = torch.zeros(1, 4, pixels // 8, pixels // 8, device="meta")
    return scored + operations(lambda: full.kl(pixels), lambda vae: vae.decode(latents))


def vision() -> CLIPVisionConfig:
    """The picture side of CLIP ViT-B/16."""
    return CLIPVisionConfig(patch_size=16, attn_implementation="sdpa")


def seen(clip: Any) -> Any:
    """One picture, as the scorer sees it."""
    return clip(pixel_values=torch.zeros(1, 3, 224, 224))


def layers_of(model: str) -> int:
    """Layers in which text enters."""
    with torch.device("meta"):
        return len(find_layers(SHAPES[model][0]()))


def work(model: str, concept: loco.Concept, seeds: int) -> dict[str, tuple[int, int]]:
    """Rows and pictures of one run: of the search that the study takes, and of the whole sweep."""
    entry = model_entry(model)
    layers, steps = layers_of(model), entry.num_inference_steps
    rows = attribution.rows_counted(
        layers, len(concept.pairs), seeds, steps, width=entry.window, challenged=True
    )
    a_picture = 2 * steps
    return {"attribute": (rows[0], rows[0] // a_picture), "all": (rows[1], rows[1] // a_picture)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--share", type=float, default=0.4, help="of the card's rate")
    chosen = parser.parse_args(arguments)
    study = tomllib.loads(STUDY.read_text(encoding="utf-8"))
    concepts = [loco.concept(name) for name in study["concepts"]]
    total: dict[tuple[str, str], float] = {}
    print("| model | TFLOP a row | of a picture besides | search | rows | H100, h | RTX 4090, h |")
    print("|---|---|---|---|---|---|---|")
    for model in study["models"]:
        row, picture = of_row(model), of_picture(model)
        runs = [work(model, concept, study["defaults"]["seeds"]) for concept in concepts]
        for search in ("attribute", "all"):
            rows = sum(run[search][0] for run in runs)
            needed = rows * row + sum(run[search][1] for run in runs) * picture
            hours = {card: needed / rate / chosen.share / 3600 for card, rate in RATES.items()}
            for card, value in hours.items():
                total[search, card] = total.get((search, card), 0.0) + value
            parts = f"{row / 1e12:.2f} | {picture / 1e12:.2f} | {search} | {rows}"
            times = " | ".join(f"{value:.1f}" for value in hours.values())
            print(f"| {model} | {parts} | {times} |", flush=True)
    for search in ("attribute", "all"):
        times = " | ".join(f"{total[search, card]:.1f}" for card in RATES)
        print(f"| together | | | {search} | | {times} |")


if __name__ == "__main__":
    main()
