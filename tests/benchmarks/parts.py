"""Where a sweep's time goes, and how much faster larger batches can make it: `python tests/benchmarks/parts.py`.

Shares of the sweep's seconds by part of the pipeline and scorer; what the denoiser does alone, at two rows a call (one
picture with guidance) and at a whole batch; and the operations that its time at a whole batch is spent in.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

import locogen as loco

TOP = 6


@contextmanager
def clocked(modules: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Seconds within the calls of each module, on a CPU."""
    took, begun, handles = dict.fromkeys(modules, 0.0), {}, []

    def start(name: str) -> Any:
        return lambda *_: begun.__setitem__(name, time.perf_counter())

    def stop(name: str) -> Any:
        return lambda *_: took.__setitem__(name, took[name] + time.perf_counter() - begun[name])

    for name, module in modules.items():
        handles += [
            module.register_forward_pre_hook(start(name)),
            module.register_forward_hook(stop(name)),
        ]
    try:
        yield took
    finally:
        for handle in handles:
            handle.remove()


def shares(pipe: Any, judge: Any, pairs: int, steps: int, batch_size: int) -> dict[str, float]:
    """Shares of the seconds that `localize` takes."""
    concept = loco.concept("mini/neon")
    concept = dataclasses.replace(concept, pairs=concept.pairs[:pairs])
    options: dict[str, Any] = dict(
        seeds=range(4), num_inference_steps=steps, batch_size=batch_size, progress=False
    )
    options["store"] = None  # what is there would not be made again
    loco.localize(pipe, concept, window=14, scorer=judge, **(options | dict(seeds=[0])))  # imports
    parts = {"U-Net": pipe.unet, "decoder": pipe.vae.decoder, "text encoder": pipe.text_encoder}
    parts |= {"scorer, pictures": judge.model.vision_model, "scorer, texts": judge.model.text_model}
    with clocked(parts) as took:
        start = time.perf_counter()
        loco.localize(pipe, concept, window=2, scorer=judge, **options)
        total = time.perf_counter() - start
    took["all else: hooks, scheduler, noise, files"] = total - sum(took.values())
    return {name: part / total for name, part in took.items()}


def alone(pipe: Any, rows: int, rounds: int) -> float:
    """Rows a second of the denoiser by itself: the median of some calls."""
    call, took = calling(pipe, rows), []
    call()
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return rows / statistics.median(took)


def calling(pipe: Any, rows: int) -> Any:
    config, draw = pipe.unet.config, torch.Generator().manual_seed(0)
    size = (rows, config.in_channels, config.sample_size, config.sample_size)
    latent, text = (
        torch.randn(size, generator=draw),
        torch.randn(rows, 77, config.cross_attention_dim, generator=draw),
    )

    def call() -> None:
        with torch.no_grad():
            pipe.unet(latent, 500, encoder_hidden_states=text)

    return call


def operations(pipe: Any, rows: int) -> dict[str, float]:
    """The denoiser's largest operations at so many rows, as shares of its time."""
    call = calling(pipe, rows)
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        call()
    lines = [
        (event.key.removeprefix("aten::"), event.self_cpu_time_total)
        for event in found.key_averages()
    ]
    total = sum(took for _, took in lines)
    largest = sorted(lines, key=lambda line: -line[1])[:TOP]
    return {name: took / total for name, took in largest}


def parts(*, steps: int, batch_size: int, rounds: int, tiny: bool = False) -> dict[str, Any]:
    pipe, judge = loco.load("mini"), loco.scorer("mini")
    rates = {rows: alone(pipe, rows, rounds) for rows in (2, 2 * batch_size)}
    return {
        "shares": shares(pipe, judge, 1 if tiny else 2, steps, batch_size),
        "rows_a_second": rates,
        "gain": rates[2 * batch_size] / rates[2],
        "operations": operations(pipe, 2 * batch_size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    print(json.dumps(parts(**vars(parser.parse_args())), indent=1))


if __name__ == "__main__":
    main()
