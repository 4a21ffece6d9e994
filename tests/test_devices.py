"""Nothing of locogen lets two devices meet, or has one wait: on a pretended device, for each family.

What stands on "cuda:0" here only pretends (`support.device`): the faults are CUDA's, the machine has none.
"""

import functools
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support import tiny
from support.device import is_there, pretended
from support.verbs import (
    CONCEPT,
    EVOLVING,
    PAIRS,
    SCORED,
    VERBS,
    edit_of,
    edited,
    interventions,
    listened,
    neurons_of,
    pictures,
    refused,
    rows,
    run,
    traced,
)

from locogen.editing.edit import fit_edit
from locogen.editing.evaluation import evaluate
from locogen.editing.probes import Probe
from locogen.interventions import prompts, states
from locogen.interventions.clamping import clamp
from locogen.interventions.prompts import intervene, record
from locogen.interventions.states import find_states, restoring
from locogen.localization.attention import measuring_contributions
from locogen.localization.causal_tracing import causal_trace
from locogen.localization.localize import localize
from locogen.models.families import encode, family_of
from locogen.models.layers import find_layers
from locogen.pictures.fingerprint import fingerprint

# One of each way in which layers get text; the slow tests have all.
FAMILIES = tiny.fast("sd", "flux")
# Pretending costs by the operation: few layers are enough.
MAKERS = tiny.FAMILIES | {"sd": tiny.small}
pytestmark = [
    # diffusers', of SD-XL's decoder in half precision; the CPU's, of norms within autocast
    pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]


@functools.cache
def on_device(name, device="cuda:0", dtype=torch.float32):
    with pretended(device):
        return MAKERS[name]().to(device, dtype)


# Joint attention has its own ways of interventions and edits; all else it shares with the first family.
PAIRED = [
    pytest.param(name, verb, marks=pytest.mark.slow)
    if name == "flux" and verb not in ("intervene", "edit", "attribute")
    else (name, verb)
    for name in ("sd", "flux")
    for verb in VERBS
]
OTHERS = [
    pytest.param(name, verb, marks=pytest.mark.slow)
    for name in tiny.FAMILIES
    if name not in ("sd", "flux")
    for verb in VERBS
]


def skip_chatglm(name):
    """Diffusers' own text encoder of Kolors, before any of our hooks."""
    if name == "kolors":
        pytest.skip("the pretended device does not follow ChatGLM's mask: only a card shows it")


@pytest.mark.parametrize(("name", "verb"), [*PAIRED, *OTHERS])
def test_no_two_devices_meet(name, verb, tmp_path, monkeypatch):
    if refused(name, verb):
        pytest.skip("refused for this family")
    skip_chatglm(name)
    monkeypatch.setattr("locogen.pictures.speed.REPEATS", 1)
    pipe = on_device(name)
    with pretended():
        run(verb, pipe, tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_nor_in_half_precision(name):
    skip_chatglm(name)
    pipe = on_device(name, dtype=torch.bfloat16)
    with pretended():
        plan = rows(pipe)
        with (
            nullcontext() if refused(name, "edit") else edit_of(pipe).applied(pipe),
            clamp(pipe, neurons_of(pipe).top(8)),
            intervene(pipe, plan),
        ):
            assert len(pictures(pipe, plan)) == len(plan)


@pytest.mark.parametrize("name", tiny.fast("sd", of=("sd", "if", "sd-3")))
def test_nor_where_there_is_no_float64(name, tmp_path):
    """On Apple's GPUs."""
    pipe = on_device(name, device="mps")
    with pretended("mps"):
        edited(pipe, tmp_path)
        with clamp(pipe, neurons_of(pipe).top(8)):
            pictures(pipe, rows(pipe, ()))
        if name not in EVOLVING:
            listened(pipe)


# --- the twins: a fault that is planted is found -------------------------------------------------


def elsewhere(device, places):
    """An index that is left on the CPU."""
    return torch.tensor(list(places))


@pytest.mark.parametrize("name", ["sd", "sd-3"])
def test_an_index_left_behind_is_found(name, monkeypatch):
    pipe = on_device(name)
    monkeypatch.setattr(prompts, "index_on", elsewhere)
    with pretended(), pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        interventions(pipe)


def test_a_state_left_behind_is_found(monkeypatch):
    pipe = on_device("sd")
    monkeypatch.setattr(states, "index_on", elsewhere)
    with pretended(), pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
        traced(pipe)


def test_a_users_hook_that_mixes_is_found():
    pipe = on_device("sd")
    shift = torch.ones(tiny.WIDTH)
    layer = find_layers(pipe)[3].module
    handle = layer.to_k.register_forward_pre_hook(lambda module, args: (args[0] + shift,))
    with pretended():
        with pytest.raises(RuntimeError, match="when calling add"):
            pictures(pipe, rows(pipe, ()))
        shift = shift.to("cuda")
        pictures(pipe, rows(pipe, ()))
    handle.remove()


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_values_are_the_cpus(name):
    """To the bit: the device pretends to be elsewhere, and computes nothing otherwise."""
    plain = MAKERS[name]()
    plan = rows(plain)
    with intervene(plain, plan):
        expected = pictures(plain, plan)
    with pretended():
        pipe = on_device(name)
        with intervene(pipe, plan):
            found = pictures(pipe, plan)
        assert is_there(found) and not is_there(expected)
        assert torch.equal(found.cpu(), expected)


# --- moving ----------------------------------------------------------------------------------------


def test_edits_and_texts_of_another_device_are_brought_along():
    """Fitted, encoded and measured on the CPU, used on the device, and back."""
    pipe = tiny.small()
    plan = rows(pipe)
    targets = encode(pipe, [row.target for row in plan])
    edit, selection = edit_of(pipe), neurons_of(pipe).top(8)
    before = fingerprint(pipe)
    edit.apply_(pipe)
    with pretended():
        pipe.to("cuda")
        with intervene(pipe, plan, targets=targets), clamp(pipe, selection):
            pictures(pipe, plan)
        edit.undo_(pipe)
        assert fingerprint(pipe) == before
        with intervene(pipe, plan), clamp(pipe, selection), record(pipe):
            pictures(pipe, plan)
            pipe.to("cpu")  # within a context
            pictures(pipe, plan)


@pytest.mark.parametrize("name", tiny.fast("if", of=("if", "sd")))
def test_weights_that_are_brought_layer_by_layer(name, tmp_path):
    """With sequential offload parameters stand nowhere: the scorer goes where the pipeline computes."""
    pipe = MAKERS[name]()
    with pretended():
        pipe.enable_sequential_cpu_offload(device="cuda")
        assert pipe.device.type == "meta"
        options = SCORED | {"scorer": "mini", "num_inference_steps": 2}
        localize(pipe, CONCEPT, window=len(find_layers(pipe)), **options)
        edit = fit_edit(pipe, CONCEPT, layers=(0, 1), phrasings=PAIRS)
        evaluate(
            pipe, {"edit": edit}, [Probe("efficacy", "a cat in b", "a", ("a", "b"))], **options
        )
        causal_trace(pipe, CONCEPT, parts=("text MLP",), **SCORED)
        listened(pipe)


# --- waits -----------------------------------------------------------------------------------------


def contexts_of(pipe):
    """Every context that has hooks in the denoiser, as functions that open it, with the plan that it goes with."""
    layers = tuple(range(len(find_layers(pipe))))
    selection = neurons_of(pipe).top(8)
    plain, all_layers, early = (
        rows(pipe, ()),
        rows(pipe, layers),
        rows(pipe, layers, timesteps=(0, 0)),
    )
    opened = {
        "intervene": (lambda: intervene(pipe, all_layers), all_layers),
        "in time": (lambda: intervene(pipe, early), early),
        "record": (lambda: record(pipe), plain),
        "clamp": (lambda: clamp(pipe, selection), plain),
        "clamp in time": (lambda: clamp(pipe, selection, to="zero", steps=(0,)), plain),
    }
    if not family_of(pipe).joint_attention:
        every = tuple(range(len(find_states(pipe))))
        opened["restoring"] = (lambda: restoring(pipe, [(0, ()), (0, every)]), plain)
        opened["listening"] = (lambda: measuring_contributions(pipe, [(1,), (1, 2)]), plain)
    return opened


def waits_a_step(device, pipe, opened, plan):
    """Waits of each further denoising step: what is done once a call does not count."""
    counts = []
    with opened():
        for steps in (2, 2, 3):  # the first of all fills what is kept
            start = len(device.waits)
            pictures(pipe, plan, steps)
            counts.append(len(device.waits) - start)
    return counts[2] - counts[1]


@pytest.mark.parametrize("name", tiny.fast("sd"))
def test_hooks_do_not_wait_for_the_device(name):
    """At most once a step, to read which it is: not once a layer and row. A GPU that is waited for stands idle."""
    skip_chatglm(name)
    pipe = on_device(name)
    with pretended() as device:
        contexts = contexts_of(pipe)
        plain = {}
        for label, (opened, plan) in contexts.items():
            size = len(plan)
            if size not in plain:
                plain[size] = waits_a_step(device, pipe, nullcontext, plan)
            allowed = 1 if "in time" in label else 0
            assert waits_a_step(device, pipe, opened, plan) <= plain[size] + allowed, label


def test_a_hook_that_waits_is_counted():
    """The twin: what each layer would cost."""
    pipe = on_device("sd")
    layers = find_layers(pipe)
    handles = [
        layer.module.register_forward_hook(lambda *call: bool(call[2].isnan().any()))
        for layer in layers
    ]
    with pretended() as device:
        listened_to = waits_a_step(device, pipe, nullcontext, rows(pipe, ()))
        for handle in handles:
            handle.remove()
        assert listened_to == waits_a_step(device, pipe, nullcontext, rows(pipe, ())) + len(layers)


# --- the pretended device itself -------------------------------------------------------------------


def test_what_a_device_refuses_is_refused():
    here = torch.arange(6.0).reshape(2, 3)
    with pretended():
        there = here.to("cuda")
        index = torch.tensor([0, 1])
        refused = [
            lambda: there + here,
            lambda: torch.cat([there, here]),
            lambda: torch.stack([there[0, 0], here[0, 0]]),
            lambda: torch.nn.functional.linear(there, here),
            lambda: here * there[0, 0],
            lambda: there.index_copy(0, index, there),
            lambda: there.index_copy(0, index.to("cuda"), here),
            lambda: here[index.to("cuda")],
            lambda: there.__setitem__(index, here),
            lambda: torch.randn(2, generator=torch.Generator(), device="cuda"),
            lambda: there.normal_(generator=torch.Generator()),
        ]
        for call in refused:
            with pytest.raises(RuntimeError, match=r"two devices|type for generator"):
                call()
        for call in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match=r"Tensor\.cpu\(\)"):
                call()
    with pretended("mps"), pytest.raises(TypeError, match="float64"):
        here.to("mps").double()


def test_what_a_device_takes_is_taken():
    here = torch.arange(6.0).reshape(2, 3)
    with pretended():
        there = here.to("cuda", torch.float16)
        assert (
            there.device == torch.device("cuda:0")
            and there.is_cuda
            and there.dtype == torch.float16
        )
        assert here.device.type == "cpu" and there.cpu().device.type == "cpu"
        there = there.float()
        taken = [
            there * here[0, 0],
            there[torch.tensor([1, 0])],
            there.new_zeros(2),
            torch.zeros_like(here, device="cuda"),
            torch.nn.Parameter(there),
            there[0].detach().data,
            there.clone().copy_(here),
            here.to(there),
            torch.as_tensor(here, device="cuda"),
            torch.nn.Linear(3, 2).to("cuda")(there),
        ]
        assert all(tensor.device.type == "cuda" and is_there(tensor) for tensor in taken)
        there[:1] = here[:1]  # to a slice it is copied
        back = [
            there.cpu(),
            there.to("cpu"),
            there.to(here),
            torch.zeros_like(there, device="cpu"),
            here[:1],
        ]
        assert not any(is_there(tensor) for tensor in back)
        assert np.array_equal(there.cpu().numpy(), here.numpy())


def test_waits_are_counted():
    here = torch.arange(6.0).reshape(2, 3)
    with pretended() as device:

        def count(call):
            start = len(device.waits)
            call()
            return len(device.waits) - start

        there = here.to("cuda")
        index = torch.tensor([0, 1], device="cuda")
        once = [
            there[0, 0].item,
            there.tolist,
            there.cpu,
            lambda: bool(there.sum() > 1),
            lambda: float(there[0, 0]),
            lambda: there[[0, 1]],
            lambda: there[there[:, 0] > 1],
            lambda: here[index[0]],
            lambda: torch.tensor([1.0], device="cuda"),
            lambda: here.to("cuda"),
        ]
        assert [count(call) for call in once] == [1] * len(once)
        never = [
            lambda: there + there,
            lambda: there[index],
            lambda: there[0, 1:],
            lambda: here.to("cuda", non_blocking=True),
            lambda: there.to("cuda"),
            lambda: here.tolist(),
            lambda: torch.zeros(3, device="cuda"),
        ]
        assert [count(call) for call in never] == [0] * len(never)
        there.tolist()
        assert (
            device.waits[-1].function == "tolist" and "test_devices.py" in device.waits[-1].caller
        )
