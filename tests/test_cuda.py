"""Everything once on a real card: `pytest tests/test_cuda.py`, where CUDA is available.

The pretended device of `test_devices.py` finds what stands on the wrong device. This finds what only a card does:
kernels, half precision, memory that runs out, offload, compiled code. All families run here, tiny, with random weights.
"""

import functools
import gc
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support import tiny
from support.verbs import (
    CONCEPT,
    FAST,
    SCORED,
    VERBS,
    edit_of,
    neurons_of,
    pictures,
    refused,
    rows,
    run,
)

import locogen as loco
from locogen.interventions.clamping import clamp
from locogen.interventions.prompts import intervene
from locogen.models.families import family_of
from locogen.models.layers import find_layers
from locogen.pictures.fingerprint import fingerprint
from locogen.plan import Intervention, with_target_runs

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:float32 on .* takes twice the memory"),
]
# Of latents of tiny pipelines, whose values are about 1: two orders of sums in float32.
NEAR = 2e-3


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    """Float32 as it is said, not TF32, and the same kernels for the same shapes."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@functools.cache
def on_card(name, dtype=torch.float32):
    return tiny.FAMILIES[name]().to("cuda", dtype)


def as_array(pipe, plan, **more):
    made = pictures(pipe, plan, **more)  # of IF an array, whatever is asked for
    return made if isinstance(made, np.ndarray) else made.float().cpu().numpy()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_each_verb_runs_on_a_card(name, verb, tmp_path, monkeypatch):
    if refused(name, verb):
        pytest.skip("refused for this family")
    monkeypatch.setattr("locogen.pictures.speed.REPEATS", 1)
    run(verb, on_card(name), tmp_path)


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_an_empty_plan_is_the_plain_call_to_the_bit(name):
    pipe = on_card(name)
    plan = rows(pipe, ())
    # Kolors' encoder has a function in TorchScript, which a card compiles after its first calls.
    as_array(pipe, plan)
    as_array(pipe, plan)
    plain = as_array(pipe, plan)
    assert np.array_equal(as_array(pipe, plan), plain), "the card makes another picture each time"
    with intervene(pipe, plan):
        assert np.array_equal(as_array(pipe, plan), plain)
    with intervene(pipe, changed := rows(pipe)):  # the twin: a plan that changes something
        assert not np.array_equal(as_array(pipe, changed)[:2], plain[:2])


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_all_layers_are_the_targets_own_run(name):
    pipe = on_card(name)
    count = len(find_layers(pipe))
    pooled = {"pooled": "target"} if family_of(pipe).pooled else {}

    def distance(layers):
        plan = [Intervention("a cat in b", "a dog in b", layers, 0, **pooled)]
        if family_of(pipe).joint_attention:
            plan = with_target_runs(plan)
        with intervene(pipe, plan):
            replaced = as_array(pipe, plan)[0]  # (channels, height, width)
        target = [Intervention("a dog in b", "a dog in b", (), 0)] * len(plan)
        return float(np.abs(replaced - as_array(pipe, target)[0]).max())

    assert distance(tuple(range(count))) <= NEAR
    assert distance(()) > NEAR  # the twin


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_cards_picture_is_the_cpus_within_rounding(name):
    plain, pipe = tiny.FAMILIES[name](), on_card(name)
    plan = rows(plain)
    with intervene(plain, plan):
        expected = as_array(plain, plan)
    with intervene(pipe, plan):
        assert np.abs(as_array(pipe, plan) - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_half_precision_gives_pictures(name, dtype):
    pipe = on_card(name, dtype)
    plan = rows(pipe)
    edited = nullcontext() if refused(name, "edit") else edit_of(pipe).applied(pipe)
    with edited, clamp(pipe, neurons_of(pipe).top(8)), intervene(pipe, plan):
        assert np.isfinite(as_array(pipe, plan)).all()


@pytest.mark.parametrize("how", ["model", "sequential"])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_offloaded_weights(name, how):
    pipe = tiny.FAMILIES[name]()
    if how == "model":
        pipe.enable_model_cpu_offload(device="cuda")
    else:
        pipe.enable_sequential_cpu_offload(device="cuda")
    whole = on_card(name)
    plan = rows(whole)
    with intervene(whole, plan):
        expected = as_array(whole, plan)
    with intervene(pipe, plan):
        assert np.abs(as_array(pipe, plan) - expected).max() <= NEAR
    if refused(name, "localize"):
        return
    loco.localize(pipe, CONCEPT, window=len(find_layers(pipe)) - 1, **SCORED)
    with edit_of(pipe).applied(pipe):
        loco.generate(pipe, ["a cat in b"], **FAST)


def test_memory_that_runs_out_halves_the_batch():
    pipe = loco.load("mini").to("cuda")
    plan = [Intervention("a picture of a cat", "a picture", (), seed) for seed in range(512)]
    options = {"num_inference_steps": 1, "progress": False}
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    # Enough for a few pictures, not for hundreds.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (300 << 20)) / total)
    try:
        with pytest.warns(UserWarning, match="memory"):
            run = loco.generate(pipe, plan, batch_size=512, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(run) == 512


def test_weights_that_are_edited_come_back_to_the_bit():
    pipe = loco.load("mini").to("cuda")
    before = fingerprint(pipe)
    edit = loco.fit_edit(pipe, loco.concept("mini/neon"), layers=(12, 13))
    with edit.applied(pipe):
        assert fingerprint(pipe) != before
    assert fingerprint(pipe) == before


@pytest.mark.parametrize("mode", ["exact", "close", "auto", "compile"])
def test_faster_pictures_are_near_the_plain_ones(mode):
    pipe = loco.load("mini").to("cuda")
    plan = [Intervention("a picture of a cat", "a picture of a dog", (11, 12), s) for s in range(4)]
    options = {"num_inference_steps": 4, "batch_size": 4, "progress": False}
    plain = loco.generate(pipe, plan, **options)
    with loco.speed(pipe, mode, batch_size=4) as pace:
        fast = loco.generate(pipe, plan, **options)
    a, b = (np.stack([np.asarray(p, int) for p in run.pictures]) for run in (plain, fast))
    apart = np.abs(a - b).max()
    limit = {"exact": 0, "close": 1}.get(mode, 255)
    assert apart <= limit, f"{pace}: {apart} of 255"


def test_the_verdict_is_the_cpus():
    """On the shipped model, whose answer is known: neon enters at 12 or 13."""
    pipe = loco.load("mini").to("cuda")
    concept = loco.concept("mini/neon").first(2)
    run = loco.localize(pipe, concept, seeds=range(4), scorer="mini", progress=False)
    found = loco.carrier(loco.effect(run.table))
    assert found.kind == "one place" and {12, 13} & set(found), str(found)
