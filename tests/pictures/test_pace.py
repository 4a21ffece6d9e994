"""Faster ways: exact is exact, the others stay within their bounds, interventions are heard, and nothing is left."""

import contextlib
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from support import tiny

from locogen.errors import LocogenError
from locogen.interventions.prompts import active_contexts, foreign_hooks
from locogen.models.load import load
from locogen.pictures import speed as pace
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import Run, generate
from locogen.pictures.speed import Way, half_of, speed
from locogen.plan import Intervention

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FAST = {"num_inference_steps": 2, "guidance_scale": 3.0, "batch_size": 4, "progress": False}
ROWS = [Intervention("cat in a", "dog", layers, 0) for layers in ((), (2, 3), tuple(range(16)))]
WAYS = (Way(threads=2, channels_last=True), Way(half="bfloat16"))
# torch's own, when it first compiles
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script_method:DeprecationWarning")


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture
def rates(monkeypatch):
    """What each way is said to reach, by its name: the others reach 1."""
    told: dict[str, float] = {}
    monkeypatch.setattr(pace, "measure_rate", lambda pipe, way, batch_size: told.get(str(way), 1.0))
    monkeypatch.setattr(pace, "half_of", lambda device: "bfloat16")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10**6)
    return told


def pixels(run: Run):
    return np.stack([np.asarray(picture) for picture in run.pictures]).astype(int)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")  # torch's
@pytest.mark.parametrize("name", tiny.fast("z-image", of=tiny.FAMILIES))
def test_half_precision_serves_every_denoiser(name):
    """Whatever its output is made of: Z-Image's is a list."""
    pipe = tiny.FAMILIES[name]()
    plain = pixels(generate(pipe, ["a cat in b"], store=None, **FAST))
    with pace.applied(pipe, Way(half="bfloat16")):
        half = pixels(generate(pipe, ["a cat in b"], store=None, **FAST))
    assert not np.array_equal(plain, half)


def state(pipe):
    return [
        (p.data_ptr() if p.dim() < 4 else 0, p.dtype, p.stride()) for p in pipe.unet.parameters()
    ]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_way_changes_pictures_and_leaves_nothing(pipe, way):
    plain, weights = generate(pipe, ROWS, **FAST), fingerprint(pipe)
    before = state(pipe), torch.get_num_threads()
    with pace.applied(pipe, way):
        other = generate(pipe, ROWS, **FAST)
        assert fingerprint(pipe) == weights and not foreign_hooks(pipe)
        assert not set(plain.pictures.keys) & set(other.pictures.keys), (
            "a picture made so is not taken for a plain one"
        )
        assert other.settings["contexts"] == [f"speed {way}"]
    assert (state(pipe), torch.get_num_threads()) == before and fingerprint(pipe) == weights
    assert not active_contexts(pipe) and "forward" not in vars(pipe.unet)
    assert (pixels(generate(pipe, ROWS, **FAST)) == pixels(plain)).all()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_interventions_are_heard_as_ever(pipe, way):
    """In any way, all layers replaced is the target's own run, to the bit, and some layers are something else.

    In one batch: of another size, another order of sums may move a pixel.
    """
    with pace.applied(pipe, way):
        own, window, ceiling, target = pixels(
            generate(pipe, [*ROWS, Intervention("dog", "dog", (), 0)], **FAST)
        )
    assert (
        (ceiling == target).all()
        and (own != target).any()
        and (window != target).any()
        and (window != own).any()
    )


def test_nothing_is_left_after_an_error(pipe):
    before = state(pipe)
    with pytest.raises(RuntimeError, match="stop"), pace.applied(pipe, Way(2, True, "bfloat16")):
        assert state(pipe) != before
        raise RuntimeError("stop")
    assert state(pipe) == before and "forward" not in vars(pipe.unet) and not active_contexts(pipe)


def test_weights_changed_within_stay_changed(pipe):
    """What is put back is the layout, not the values."""
    weight = pipe.unet.conv_in.weight
    with pace.applied(pipe, Way(channels_last=True)), torch.no_grad():
        weight += 1
    changed = weight.clone()
    with torch.no_grad():
        weight -= 1
    assert weight.is_contiguous() and (changed > weight).all()


@pytest.fixture(scope="module")
def mini_calls():
    """The mini model, and what its denoiser was called with in four steps of a picture."""
    pipe, calls = load("mini"), []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _, a, k: calls.append((a, k)), with_kwargs=True
    )
    seeds = [torch.Generator().manual_seed(i) for i in range(2)]
    pipe(
        ["a picture of a cat", "a house in the style of neon"],
        num_inference_steps=4,
        generator=seeds,
    )
    hook.remove()
    return pipe, calls


def apart(unet: UNet2DConditionModel, calls, way: Way, pipe) -> list[float]:
    """Root mean square of what the way changes of each call's output, as a share of the output's."""
    with torch.no_grad():
        plain = [unet(*a, **k)[0] for a, k in calls]
        with pace.applied(pipe, way):
            other = [unet(*a, **k)[0] for a, k in calls]
    assert all(one.dtype == torch.float32 for one in other)
    return [float((a - b).norm() / a.norm()) for a, b in zip(plain, other, strict=True)]


@pytest.mark.parametrize(
    ("way", "low", "high"),
    [(Way(), 0, 0), (Way(channels_last=True), 0, 1e-5), (Way(half="bfloat16"), 1e-3, 0.03)],
    ids=["exact", "close", "half"],
)
def test_one_call_stays_within_the_bound(mini_calls, way, low, high):
    pipe, calls = mini_calls
    found = apart(pipe.unet, calls, way, pipe)
    assert min(found) >= low and max(found) <= high


def test_pictures_stay_within_the_bound(mini_calls):
    pipe, _ = mini_calls
    options = dict(seeds=range(2), num_inference_steps=4, progress=False, batch_size=2)

    def made(way: Way):
        with pace.applied(pipe, way):
            return pixels(generate(pipe, "a house in the style of neon", **options))

    plain = made(Way())
    assert np.abs(made(Way(channels_last=True)) - plain).max() <= 1
    assert 0 < np.abs(made(Way(half="bfloat16")) - plain).mean((1, 2, 3)).max() <= 1


@pytest.mark.parametrize(
    ("mode", "said", "way"),
    [
        ("exact", {"channels-last": 9, "bfloat16": 9}, Way()),
        ("close", {"channels-last": 1.2, "bfloat16": 9}, Way(channels_last=True)),
        ("auto", {"channels-last": 1.05, "bfloat16": 1.5}, Way(half="bfloat16")),
        ("auto", {"channels-last": 1.2, "channels-last + bfloat16": 1.25}, Way(channels_last=True)),
    ],
)
def test_what_gains_is_taken(pipe, rates, mode, said, way):
    rates.update(said)
    with speed(pipe, mode, batch_size=2) as found:
        assert found.way == way and bool(active_contexts(pipe)) == (way != Way())
        told = repr(found)
    assert str(way) in told and found.bound in told and f"{mode!r} on cpu" in told


def test_the_choice_is_measured(pipe, monkeypatch):
    """On the real clock: every way that is tried has a rate."""
    monkeypatch.setattr(pace, "half_of", lambda device: "bfloat16")
    monkeypatch.setattr(pace, "REPEATS", 1)
    with speed(pipe, "auto", batch_size=1) as found:
        assert {"plain"} < set(found.measured) and all(rate > 0 for rate in found.measured.values())
    monkeypatch.setattr(pace, "REPEATS", 3)
    ticks = itertools.count()
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(ticks) * 0.5)
    assert pace.measure_rate(pipe, Way(), 3) == 6.0
    ticks = itertools.count(step=12)
    assert pace.measure_rate(pipe, Way(), 3) == 0.5 and next(ticks) == 24, (
        "once is enough of what takes long"
    )


@pytest.mark.parametrize(
    ("by_size", "chosen"),
    [
        ({2: 50, 8: 100, 32: 200, 128: 300}, 128),
        ({2: 50, 8: 100, 32: 200, 128: 210}, 32),
        ({2: 50, 8: 200, 32: 210, 128: 100}, 8),
        ({2: 50, 8: 100, 32: 200}, 32),
        ({2: 0.3}, 2),  # a batch takes seven seconds: no larger one is tried
    ],
)
def test_the_batch_size_is_measured(pipe, monkeypatch, by_size, chosen):
    """The smallest that is fast enough; where memory runs out, what came before."""

    def rate(pipe, way, batch_size):
        if batch_size not in by_size:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return by_size[batch_size]

    monkeypatch.setattr(pace, "measure_rate", rate)
    for mode in ("exact", "auto"):  # to compare ways takes a batch that fits, too
        with speed(pipe, mode) as found:
            assert (
                found.batch_size == chosen
                and found.sizes == by_size
                and f"{chosen} at once" in repr(found)
            )
    by_size.clear()
    with pytest.raises(torch.OutOfMemoryError), speed(pipe, "exact"):
        pass


def test_half_precision_is_the_processors_own(monkeypatch):
    for able, found in (
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": False, "avx2": True}, None),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able, raising=False)
        assert half_of(torch.device("cpu")) == found
    assert half_of(torch.device("mps")) is None
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch 2.6 has none
    assert half_of(torch.device("cpu")) is None


def test_bad_input_is_named(pipe, rates):
    rates["bfloat16"] = 2.0
    with (
        pytest.raises(LocogenError, match="use one of exact, close, auto, compile"),
        speed(pipe, "fast"),
    ):  # pyright: ignore[reportArgumentType]
        pass
    with pytest.raises(LocogenError, match="give at least 1"), speed(pipe, batch_size=0):
        pass
    with speed(pipe), pytest.raises(LocogenError, match="leave the first context"), speed(pipe):
        pass


@compiles
@pytest.mark.slow  # minutes of compilation
def test_compiled_regions_leave_the_hooks_be(pipe, rates):
    rates["compiled"] = 1.3
    plain = pixels(generate(pipe, ROWS, **FAST))
    with speed(pipe, "compile") as found:
        assert found.way == Way(compiled=True) and any(
            m._compiled_call_impl for m in pipe.unet.modules()
        )
        assert np.abs(pixels(generate(pipe, ROWS, **FAST)) - plain).max() <= 1
        (target,) = pixels(generate(pipe, [Intervention("dog", "dog", (), 0)], **FAST))
        assert (pixels(generate(pipe, ROWS[2:], **FAST))[0] == target).all()
    assert not any(m._compiled_call_impl for m in pipe.unet.modules())
    assert (pixels(generate(pipe, ROWS, **FAST)) == plain).all()


@pytest.mark.parametrize("raised", [True, False], ids=["raised", "as dynamo has it"])
def test_every_kind_of_region_is_compiled(monkeypatch, raised):
    """Also more kinds than dynamo compiles of one function; the twin leaves its limit as it is."""
    from diffusers.models.attention import FeedForward

    torch._dynamo.reset()
    config = torch._dynamo.config
    limit_name, _ = pace._limit_names(config)
    limit = getattr(config, limit_name)
    kinds = limit + 2
    denoiser = torch.nn.ModuleList(FeedForward(width) for width in range(2, 2 + kinds))
    compiled = []

    def counting(graph, inputs):
        compiled.append(graph)
        return graph.forward

    plain_compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: plain_compile(self, backend=counting)
    )
    if not raised:
        monkeypatch.setattr(pace, "_compilations_for", lambda regions: contextlib.nullcontext())
    with torch.no_grad(), pace._compiled(denoiser):
        for _ in range(2):
            for width, region in enumerate(denoiser, 2):
                region(torch.ones(1, width))
    assert (len(compiled) >= kinds) == raised
    assert getattr(config, limit_name) == limit
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_benchmark_runs_at_tiny_size(tmp_path):
    """Each section in its own process, as `make bench` does it; its figures say nothing."""
    command = [sys.executable, str(BENCHMARKS / "speed.py"), "--tiny", "--batch-size", "16"]
    command += [
        "--out",
        str(tmp_path / "bench.json"),
        "--only",
        "sweep",
        "parts",
        "hooks",
        "gpu",
        "growth",
        "start",
        "solver",
        "report",
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert set(found["sweep"]["ratios"]) >= {
        "published / all",
        "published / race",
        "published / race, auto",
    }
    assert max(found["sweep"]["largest_difference"].values()) <= 1, (
        "the loops make the sweep's pictures"
    )
    assert [row["model"] for row in found["gpu"]["models"]] == ["SD 1.5, 512²", "SD-XL, 1024²"]
    assert sum(found["parts"]["shares"].values()) == pytest.approx(1) and found["parts"]["gain"] > 0
    assert all(row["flops_a_picture"] > 0 for row in found["gpu"]["models"])
    table = [line for line in said.splitlines() if line.startswith("| ")]
    assert set(found["solver"]["ratios"]) == {"SD 1.5", "SD-XL"}
    assert len(table) >= 10 and any("`intervene` over the plain pipeline" in line for line in table)
    assert torch.cuda.is_available() or "no GPU was to be had" in said
