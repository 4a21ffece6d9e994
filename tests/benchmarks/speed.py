"""How fast locogen is, in one table: `make bench`, or `python tests/benchmarks/speed.py [--only sweep …] [--tiny]`.

Each row is a ratio taken in one run: its contenders in turn, round by round, so that they meet the same company, and
the median over the rounds. Each section runs in a process of its own; all figures go to `runs/bench/bench.json`.

- sweep: `localize` on the mini model against (a) one picture at a time, as the published procedure does it, rewritten
  here: 32 hooks registered anew at every step (its copies of all weights at each step are left out, in its favor), and
  (b) the same through nnsight's `DiffusionModel`, where that is installed (`pip install nnsight`: no package of ours
  moves). Both make, keep and score a sample of the sweep's pictures, spread over its rows; their time is by picture.
- parts: where the time of a sweep goes, by `parts.py` beside this file.
- hooks: `intervene` around a batch, against the plain pipeline.
- growth: plans of 64 to 4096 rows. - start: import, load, first picture.
- gpu, solver, report: `gpu.py`, `solve.py`, `report.py` beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import locogen as loco
from locogen.pictures.runs import Run
from locogen.plan import Concept, Intervention

HERE = Path(__file__).resolve().parent
ONE = {"num_images_per_prompt": 1}
Array = np.ndarray[Any, Any]
Maker = Callable[[Intervention], Array]  # (height, width, 3) in 0..1


def seconds(job: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = job()
    return time.perf_counter() - start, found


def in_turn(jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each job in each round."""
    took: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds):
        for name, job in jobs.items():
            took[name].append(seconds(job)[0])
            print(
                f"  round {number + 1}, {name}: {took[name][-1]:.2f} s", file=sys.stderr, flush=True
            )
    return took


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


# --- sweep -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def rehooked(pipe: Any, row: Intervention) -> Iterator[None]:
    """At each call of the U-Net, hooks on all key and value matrices are put up again, as the published script does."""
    layers = loco.find_layers(pipe)
    with torch.no_grad():
        target = pipe.encode_prompt(
            row.target, device=pipe.device, do_classifier_free_guidance=False, **ONE
        )[0]
    up: list[Any] = []

    def exchange(index: int, module: Any, args: Any) -> Any:
        if index not in row.layers:
            return None
        return (torch.cat([args[0][:1], target.to(args[0])]), *args[1:])

    def again(module: Any, args: Any) -> None:
        while up:
            up.pop().remove()
        for layer in layers:
            for name in ("to_k", "to_v"):
                hook = partial(exchange, layer.index)
                up.append(getattr(layer.module, name).register_forward_pre_hook(hook))

    first = pipe.unet.register_forward_pre_hook(again)
    try:
        yield
    finally:
        for handle in (first, *up):
            handle.remove()


def published(pipe: Any, steps: int) -> Maker:
    def make(row: Intervention) -> Array:
        with rehooked(pipe, row):
            options = dict(generator=loco.generators([row]), guidance_scale=7.5, output_type="np")
            return pipe(row.prompt, num_inference_steps=steps, **options).images[0]

    return make


def by_nnsight(pipe: Any, steps: int, folder: str) -> Maker | None:
    """As nnsight's documentation does it; None where nnsight is missing."""
    if importlib.util.find_spec("nnsight") is None:
        return None
    from nnsight.modeling.diffusion import DiffusionModel  # pyright: ignore[reportMissingImports]

    pipe.save_pretrained(folder)
    model: Any = DiffusionModel(folder, dispatch=True)
    model.pipeline.set_progress_bar_config(disable=True)
    names = [layer.name.split(".") for layer in loco.find_layers(pipe)]

    def envoy(parts: Sequence[str]) -> Any:
        found = model.unet
        for part in parts:
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        return found

    def make(row: Intervention) -> Array:
        chosen = [envoy(names[i]) for i in row.layers]
        with torch.no_grad():
            target = model.pipeline.encode_prompt(
                row.target, device="cpu", do_classifier_free_guidance=False, **ONE
            )[0]
        options = dict(generator=loco.generators([row]), guidance_scale=7.5, output_type="np")
        with model.generate(row.prompt, num_inference_steps=steps, **options) as tracer:
            for _ in tracer.iter[:steps]:
                for layer in chosen:
                    args, kwargs = layer.inputs
                    own = kwargs["encoder_hidden_states"]
                    layer.inputs = (
                        args,
                        {**kwargs, "encoder_hidden_states": torch.cat([own[:1], target.to(own)])},
                    )
            made = model.output.save()
        return made.images[0]

    return make


def one_by_one(
    make: Maker, rows: Sequence[Intervention], texts: dict[str, str], judge: Any, folder: Path
) -> Array:
    """Make, keep and score, picture by picture; (rows, height, width, 3) bytes."""
    from PIL import Image

    found = []
    for i, row in enumerate(rows):
        found.append((make(row) * 255).round().astype("uint8"))
        picture = Image.fromarray(found[-1])
        picture.save(folder / f"{i}.png")
        judge([picture], [texts[row.prompt]], [row.target])
    return np.stack(found)


def differ(run: Run, rows: Sequence[Intervention], made: Array) -> int:
    """Largest difference of the sample's pictures from the sweep's, of 255."""
    places = [run.plan.index(row) for row in rows]
    own = np.stack([np.asarray(run.pictures[i]) for i in places]).astype(int)
    return int(np.abs(own - made).max())


def asked_of(chosen: argparse.Namespace) -> tuple[Concept, dict[str, Any]]:
    concept = loco.concept("mini/neon")
    concept = dataclasses.replace(concept, pairs=concept.pairs[:2])
    asked = dict(window=14 if chosen.tiny else 2, seeds=range(4), num_inference_steps=chosen.steps)
    return concept, asked | dict(batch_size=chosen.batch_size, store=None, progress=False)


def sweep(chosen: argparse.Namespace) -> dict[str, Any]:
    pipe, judge = loco.load("mini"), loco.scorer("mini")
    concept, asked = asked_of(chosen)
    asked["scorer"] = judge
    raced: dict[str, Any] = {"search": "race"} | ({"budget": 1.0} if chosen.tiny else {})
    runs: dict[str, Run] = {}

    def ours(name: str, **more: Any) -> None:
        runs[name] = loco.localize(pipe, concept, **asked, **more)

    ours("all")  # once unmeasured: imports, and the rows to sample
    plan = runs["all"].plan
    rows = plan[:: max(1, len(plan) // chosen.sample)][: chosen.sample]
    texts = {pair.prompt: concept.scored_text(pair) for pair in concept.pairs}
    with loco.speed(pipe, "auto", batch_size=chosen.batch_size) as pace:
        pass  # only what it chooses: each round enters it anew
    print(pace, file=sys.stderr)

    def paced(name: str, **more: Any) -> None:
        from locogen.pictures.speed import applied

        with applied(pipe, pace.way):
            ours(name, **more)

    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as saved:
        makers = {
            "published": published(pipe, chosen.steps),
            "nnsight": by_nnsight(pipe, chosen.steps, saved),
        }
        loops = {
            name: partial(one_by_one, make, rows, texts, judge, Path(folder))
            for name, make in makers.items()
            if make
        }
        same = {name: differ(runs["all"], rows, loop()) for name, loop in loops.items()}
        jobs: dict[str, Callable[[], Any]] = {**loops, "all": partial(ours, "all")}
        jobs |= {"race": partial(ours, "race", **raced), "all, auto": partial(paced, "all, auto")}
        jobs |= {"attribute": partial(ours, "attribute", search="attribute")}
        jobs |= {"race, auto": partial(paced, "race, auto", **raced)}
        jobs |= {"attribute, auto": partial(paced, "attribute, auto", search="attribute")}
        took = in_turn(jobs, chosen.rounds)
    for name in loops:  # what the whole sweep would take
        took[name] = [t * len(plan) / len(rows) for t in took[name]]
    ratios = {f"{a} / {b}": ratio(took[a], took[b]) for a in loops for b in took if b not in loops}
    made = {name: run.settings.get("generations", len(run)) for name, run in runs.items()}
    [proposed] = runs["attribute"].attributions.values()
    told = {"pictures": made, "sampled": len(rows), "largest_difference": same, "speed": repr(pace)}
    told["seconds_to_proposal"] = proposed.settings["seconds"]
    return told | {"seconds": took, "ratios": ratios, "nnsight": "nnsight" in loops}


# --- hooks, growth, start --------------------------------------------------------------------------------------------


def hooks(chosen: argparse.Namespace) -> dict[str, Any]:
    pipe = loco.load("mini")
    concept, _ = asked_of(chosen)
    plan = [
        row for row in loco.sweep(concept, n_layers=16, seeds=range(4)) if row.role == "window"
    ][: chosen.batch_size]
    prompts = [row.prompt for row in plan]

    def call() -> Any:
        return pipe(
            prompts,
            generator=loco.generators(plan),
            num_inference_steps=chosen.steps,
            output_type="np",
        )

    def within() -> Any:
        with loco.intervene(pipe, plan):
            return call()

    call()
    took = in_turn(
        {"plain": call, "intervene": within}, max(chosen.rounds, 1 if chosen.tiny else 9)
    )
    return {
        "rows": len(plan),
        "seconds": took,
        "overhead": ratio(took["intervene"], took["plain"]) - 1,
    }


def growth(chosen: argparse.Namespace) -> dict[str, Any]:
    """Smallest first: what the process has taken at its peak never falls."""
    pipe, lines = loco.load("mini"), []
    steps = min(chosen.steps, 2)
    options: dict[str, Any] = dict(num_inference_steps=steps, batch_size=32, progress=False)
    options["store"] = None  # what is there would not be made again
    loco.generate(pipe, ["a picture of a cat"], seeds=range(64), **options)
    for rows in (64, 128) if chosen.tiny else (64, 256, 1024, 4096):
        rates = []
        for _ in range(chosen.rounds if rows < 1024 else 1):
            took, run = seconds(
                partial(loco.generate, pipe, ["a picture of a cat"], seeds=range(rows), **options)
            )
            rates.append(took / rows)
            del run
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        lines.append(
            {"rows": rows, "seconds_a_picture": statistics.median(rates), "peak_MB": memory}
        )
        print(f"  {lines[-1]}", file=sys.stderr, flush=True)
    last, first = lines[-1], lines[0]
    return {
        "sizes": lines,
        "time": last["seconds_a_picture"] / first["seconds_a_picture"],
        "memory": last["peak_MB"] / first["peak_MB"],
    }


START = """
import time; begin = time.perf_counter()
import locogen as loco; imported = time.perf_counter()
pipe = loco.load("mini"); loaded = time.perf_counter()
settings = dict(num_inference_steps={steps}, store=None, progress=False)
loco.generate(pipe, "a picture of a cat", **settings).pictures[0]
print(imported - begin, loaded - imported, time.perf_counter() - loaded)
"""


def start(chosen: argparse.Namespace) -> dict[str, Any]:
    told: dict[str, list[float]] = {"import": [], "load": [], "picture": []}
    for _ in range(chosen.rounds):
        said = output([sys.executable, "-W", "ignore", "-c", START.format(steps=chosen.steps)])
        for name, value in zip(told, said.split()[-3:], strict=True):
            told[name].append(float(value))
    return {"seconds": told} | {name: statistics.median(values) for name, values in told.items()}


# --- scripts beside this one -----------------------------------------------------------------------------------------


def output(command: Sequence[str]) -> str:
    """What a command prints; its errors go on to the terminal. Raises where it fails."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def script(name: str, *arguments: str) -> str:
    return output([sys.executable, str(HERE / f"{name}.py"), *arguments])


def gpu(chosen: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        there = torch.cuda.is_available()
        script("gpu", "--out", f"{folder}/gpu.json", *([] if there else ["--tiny"]))
        return {
            "gpu": torch.cuda.get_device_name() if there else None,
            **json.loads(Path(folder, "gpu.json").read_text()),
        }


def solver(chosen: argparse.Namespace) -> dict[str, Any]:
    said = script("solve", "--rounds", str(chosen.rounds))
    found = re.findall(r"^(SD\S*[^,]*), layers.*?factors .*?([\d.]+) x,", said, re.M)
    return {"printed": said, "ratios": {name: float(times) for name, times in found}}


def report(chosen: argparse.Namespace) -> dict[str, Any]:
    runs = 20 if chosen.tiny else 1000
    said = script(
        "report", "--runs", str(runs), "--repeats", str(chosen.rounds), "--pages-up-to", str(runs)
    )
    return {
        "printed": said,
        "runs": runs,
        **{k: float(v) for k, v in re.findall(r" (index|first|again) ([\d.]+) ", said)},
    }


def parts(chosen: argparse.Namespace) -> dict[str, Any]:
    from parts import parts as measured

    asked = {name: getattr(chosen, name) for name in ("steps", "batch_size", "rounds", "tiny")}
    return measured(**asked)


SECTIONS = {f.__name__: f for f in (sweep, parts, hooks, gpu, growth, start, solver, report)}


# --- table -----------------------------------------------------------------------------------------------------------


def sweep_lines(one: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The lines of `sweep`: how many times as fast as the published procedure and nnsight."""
    for slow, words in (
        ("published", "one picture at a time, published procedure"),
        ("nnsight", "nnsight"),
    ):
        if slow == "nnsight" and not one["nnsight"]:
            yield "sweep against nnsight", "not measured: nnsight is not installed", "6 ×"
            continue
        for fast, wanted in (
            ("all", "6 ×"),
            ("race", "18 ×"),
            ("attribute", "40 ×"),
            ("all, auto", "6 ×"),
            ("race, auto", "18 ×"),
            ("attribute, auto", "40 ×"),
        ):
            search = fast.removesuffix(", auto")
            name = "`localize`" if search == "all" else f"`localize(search='{search}')`"
            name += " in `speed(pipe)`, its measuring not counted," if fast.endswith("auto") else ""
            told = f"{one['ratios'][f'{slow} / {fast}']:.1f} ×, {one['pictures'][fast]} pictures"
            yield f"{name} against {words}", told, wanted
    yield "from call to proposal", f"{one['seconds_to_proposal']:.1f} s", "–"
    worst = max(one["largest_difference"].values())
    yield "their pictures, largest difference", f"{worst} of 255", "1"


def gpu_lines(one: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The lines of `gpu`: models of full size, or that there was no GPU to measure them on."""
    for model in one["models"] if one["gpu"] else ():
        told = (
            f"{model['ratio']:.1f} ×, {model['share']:.0%} of the card's rate, {model['GB']:.0f} GB"
        )
        yield f"{model['model']} on {one['gpu']}, bfloat16", told, "10 ×, 30-40 %"
    if not one["gpu"]:
        yield (
            "SD 1.5, SD-XL at full size on a GPU",
            "not measured: no GPU was to be had",
            "10 ×, 30-40 %",
        )


def lines(found: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What, measured, wanted; of the sections that there are."""
    if "sweep" in found:
        yield from sweep_lines(found["sweep"])
    if "parts" in found:
        one = found["parts"]
        told = f"{one['gain']:.1f} ×; it is {one['shares']['U-Net']:.0%} of the sweep's time"
        yield (
            f"the U-Net alone, {2 * found['asked']['batch_size']} rows at once against 2",
            told,
            "–",
        )
    if "hooks" in found:
        yield "`intervene` over the plain pipeline", f"{found['hooks']['overhead']:+.1%}", "≤ 3 %"
    if "gpu" in found:
        yield from gpu_lines(found["gpu"])
    if "growth" in found:
        one = found["growth"]
        what = f"{one['sizes'][0]['rows']} → {one['sizes'][-1]['rows']} rows: time a picture, peak memory"
        yield (
            f"{what} (1024 and more: once)",
            f"{one['time'] - 1:+.0%}, {one['memory'] - 1:+.0%}",
            "± 10 %, flat",
        )
    if "start" in found:
        one = found["start"]
        told = f"{one['import']:.2f} s, {one['load']:.1f} s, {one['picture']:.1f} s"
        yield "`import locogen`, `load('mini')`, first picture", told, "< 0.3 s, –, –"
    if "solver" in found:
        for name, times in found["solver"]["ratios"].items():
            yield (
                f"solving an edit of {name}, against the published procedure",
                f"{times:.0f} ×",
                "–",
            )
    if "report" in found:
        one = found["report"]
        told = f"{one['first']:.0f} s, {one['again']:.1f} s, {one['index']:.1f} s"
        yield f"pages of {one['runs']} runs: first (once), unchanged, index alone", told, "–"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--sample", type=int, default=12, help="pictures made one by one in each round"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="everything once and small: does it run?"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench/bench.json"))
    parser.add_argument(
        "--here", action="store_true", help=argparse.SUPPRESS
    )  # one section, in this process
    chosen = parser.parse_args(arguments)
    if chosen.tiny:
        chosen.rounds, chosen.steps, chosen.sample = 1, 1, 2
    if chosen.here:
        print(json.dumps(SECTIONS[chosen.only[0]](chosen)))
        return
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    processor = capabilities.get("cpu_name", platform.processor())
    asked = {k: v for k, v in vars(chosen).items() if k not in ("out", "here", "only")}
    found: dict[str, Any] = {
        "locogen": loco.__version__,
        "processor": processor,
        **machine,
        "asked": asked,
    }
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    given = [f"--{k.replace('_', '-')}={v}" for k, v in asked.items() if k != "tiny"] + [
        "--tiny"
    ] * chosen.tiny
    for name in chosen.only:
        print(f"{name} …", file=sys.stderr, flush=True)
        took, said = seconds(partial(script, "speed", "--here", "--only", name, *given))
        found[name] = json.loads(said.splitlines()[-1]) | {
            "took": took,
            "load_average": os.getloadavg()[0],
        }
        chosen.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    told = f"{found['processor']}, {found['cores']} cores, {found['threads']} threads, torch {found['torch']}"
    print(f"{told}; {chosen.steps} steps, medians of {chosen.rounds}; {chosen.out}\n")
    print("| what | measured | wanted |\n|---|---|---|")
    for line in lines(found):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
