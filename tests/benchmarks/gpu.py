"""Full-size models on a GPU: against the published procedure, and against what the card can do.

    python tests/benchmarks/gpu.py [--batch-size 32] [--steps 8] [--out runs/bench/gpu.json] [--tiny]

SD 1.5 at 512 x 512 and SD-XL at 1024 x 1024 with random weights (they cost what trained ones cost). Ours: bfloat16,
in batches, within `speed(pipe, --mode)`; the published procedure: float32, one picture at a time, hooks registered anew
at each step. The share of the limit is the denoiser's floating-point operations a second (`FlopCounterMode`) over those
of a large bfloat16 matrix product, measured here; the profile names where the rest goes. `--tiny` runs the same at the
size of the tests, on the CPU where there is no GPU: its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import fullsize
import speed as bench
import torch
from support import tiny
from torch.utils.flop_counter import FlopCounterMode

import locogen as loco
from locogen.plan import Intervention

START = time.perf_counter()


def done(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(job: Callable[[], Any], device: str) -> float:
    done(device)
    start = time.perf_counter()
    job()
    done(device)
    return time.perf_counter() - start


def matrix_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of a large matrix product, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device) for _ in range(10))


def say(stage: str) -> None:
    """What comes next, and how long the script has run: a call that is stopped then says where."""
    print(f"{time.perf_counter() - START:5.0f} s  {stage}", file=sys.stderr, flush=True)


def plan_of(rows: int) -> list[Intervention]:
    return [Intervention("cat in a", "dog", (i % 10, i % 10 + 1), i) for i in range(rows)]


def flops_of(pipe: Any, rows: int, steps: int) -> float:
    """Of the denoiser in one call of the pipeline."""
    counted: list[int] = []
    forward = pipe.unet.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False) as counter:
            found = forward(*args, **kwargs)
        counted.append(counter.get_total_flops())
        return found

    pipe.unet.forward = count
    try:
        call(pipe, rows, steps)
    finally:
        del pipe.unet.forward
    return float(sum(counted))


def call(pipe: Any, rows: int, steps: int) -> Any:
    plan = plan_of(rows)
    options = dict(num_inference_steps=steps, batch_size=rows, store=None, progress=False)
    return loco.generate(pipe, plan, **options)


def profile(job: Callable[[], Any], device: str) -> str:
    """The operations that take longest, and their share."""
    from torch.profiler import ProfilerActivity

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with torch.profiler.profile(activities=kinds) as found:
        job()
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=60)


def model_row(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    say(f"building {name}")
    pipe = tiny.quiet(fullsize.pipeline(name, chosen.device, torch.float32, chosen.tiny))
    make = bench.published(pipe, chosen.steps)
    rows = plan_of(chosen.sample)
    say("pictures as published")
    make(rows[0])
    slow = statistics.median(timed(lambda row=row: make(row), chosen.device) for row in rows)
    pipe.to(chosen.device, torch.bfloat16)
    size = chosen.batch_size
    pipe.vae.enable_slicing()  # or decoding so many at once would take more than denoising them
    say("a batch of one step, and its operations")
    call(pipe, size, 1)
    flops = flops_of(pipe, size, 1) * chosen.steps  # the first call of a step is like any other
    with loco.speed(pipe, chosen.mode, batch_size=size) as pace:
        if chosen.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        say("the first batch within speed()")
        call(pipe, size, chosen.steps)
        say("batches that are timed")
        fast = (
            statistics.median(
                timed(lambda: call(pipe, size, chosen.steps), chosen.device)
                for _ in range(chosen.rounds)
            )
            / size
        )
        peak = torch.cuda.max_memory_allocated() if chosen.device == "cuda" else 0
        slowest = ""
        if chosen.profile:
            say("a profile")
            slowest = profile(lambda: call(pipe, size, 1), chosen.device)
    rate = matrix_rate(chosen.device, torch.bfloat16, 256 if chosen.tiny else 8192)
    return {
        "model": {"sd": "SD 1.5, 512²", "sd-xl": "SD-XL, 1024²"}[name],
        "published_seconds": slow,
        "seconds": fast,
        "ratio": slow / fast,
        "flops_a_picture": flops / size,
        "matrix_rate": rate,
        "share": flops / size / fast / rate,
        "GB": peak / 1e9,
        "speed": repr(pace),
        "profile": slowest,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=["sd", "sd-xl"])
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sample", type=int, default=5, help="pictures made one by one")
    parser.add_argument("--rounds", type=int, default=5, help="batches that are timed")
    parser.add_argument(
        "--profile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="of a batch of one step, decoded; of SD-XL it takes longer than all else",
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/gpu.json"))
    chosen = parser.parse_args(arguments)
    if chosen.device == "cpu" and not chosen.tiny:
        parser.error("there is no GPU here: give --tiny to see that the script runs")
    if chosen.tiny:
        chosen.batch_size, chosen.steps, chosen.sample = 2, 1, 1
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in [chosen.only] if chosen.only else ["sd", "sd-xl"]:
        row = model_row(name, chosen)
        rows.append(row)
        # As soon as it is there: the next model may not fit.
        chosen.out.write_text(json.dumps({"models": rows}, indent=1), encoding="utf-8")
        share = f"{row['share']:.1%} of the limit, {row['GB']:.1f} GB"
        print(f"{row['model']}: {row['ratio']:.1f} x, {share}")
        print(f"{row['speed']}\n{row['profile']}", flush=True)


if __name__ == "__main__":
    main()
