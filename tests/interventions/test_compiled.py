"""A compiled denoiser passes hooks by: within every context it runs without its compiled code, in any order."""

import numpy as np
import pytest
import torch
from support import tiny

from locogen.errors import LocogenError
from locogen.interventions.clamping import Selection, clamp
from locogen.interventions.corruption import Noise, corrupted_states
from locogen.interventions.prompts import generators, intervene, record
from locogen.interventions.states import restoring
from locogen.localization.attention import measuring_contributions
from locogen.models.compilation import is_compiled, uncompiled_module
from locogen.models.families import denoiser_of, family_of
from locogen.models.layers import find_layers
from locogen.plan import Intervention, with_target_runs

POOLED = {"sd-xl", "if", "sd-3", "flux"}
PROMPTS = ["cat in a", "dog in c"]
TARGETS = ["dog on b", "cat"]


def plan(pipe, name="sd"):
    layers = tuple(range(len(find_layers(pipe))))
    pooled = {"pooled": "target"} if name in POOLED else {}
    texts = zip(PROMPTS, TARGETS, strict=True)
    rows = [Intervention(p, t, layers, seed, **pooled) for seed, (p, t) in enumerate(texts)]
    return with_target_runs(rows) if family_of(pipe).joint_attention else rows


def pictures(pipe, rows, prompts=None):
    options = {}
    if type(pipe).__name__ == "SanaPipeline":
        options = {"use_resolution_binning": False, "height": 32, "width": 32}
    if "PixArt" in type(pipe).__name__:
        options = {"use_resolution_binning": False, "clean_caption": False}
    return pipe(
        prompt=prompts or [row.prompt for row in rows],
        generator=generators(rows),
        num_inference_steps=2,
        output_type="np",
        **options,
    ).images


def compile_without_hooks(module):
    """What `module.compile()` comes to once it was called: code that was traced when there were no hooks."""
    module._compiled_call_impl = module.forward


def is_passing_hooks_by(module):
    return module._compiled_call_impl is not None


def parts(pipe, part):
    denoiser = denoiser_of(pipe)
    return [denoiser] if part == "all" else [denoiser.get_submodule(find_layers(pipe)[-1].name)]


@pytest.mark.parametrize("name", tiny.fast("sd", "flux"))
def test_all_layers_are_the_targets_own_run_and_none_the_plain_one(name):
    pipe = tiny.FAMILIES[name]()
    rows = plan(pipe, name)
    own = pictures(pipe, rows, [row.target for row in rows])
    plain = pictures(pipe, rows)
    denoiser = denoiser_of(pipe)
    compile_without_hooks(denoiser)
    with intervene(pipe, rows):
        assert np.abs(pictures(pipe, rows) - own).max() < 1e-5
    assert is_passing_hooks_by(denoiser)  # as it was found
    nothing = [Intervention(row.prompt, row.target, (), row.seed) for row in rows]
    with intervene(pipe, nothing):
        assert np.array_equal(pictures(pipe, rows), plain)
    assert np.abs(own - plain).max() > 1e-4  # the twin


CONTEXTS = {
    "intervene": lambda pipe: intervene(pipe, plan(pipe)),
    "clamp": lambda pipe: clamp(pipe, Selection({(3, "v"): (0, 1, 2, 3)}), to="zero"),
    "restoring": lambda pipe: restoring(pipe, [(0, ()), (0, (0, 5, 9))]),
    "record": record,
    "attention contribution": lambda pipe: measuring_contributions(pipe, [(1,), (1,)]),
}


@pytest.mark.parametrize("part", tiny.fast("all", of=("all", "one layer")))
@pytest.mark.parametrize("context", list(CONTEXTS))
def test_every_context_acts_on_compiled_code(context, part):
    pipe, compiled = tiny.small(), tiny.small()
    with CONTEXTS[context](pipe) as expected:
        images = pictures(pipe, plan(pipe))
    for module in parts(compiled, part):
        compile_without_hooks(module)
    with CONTEXTS[context](compiled) as actual:
        assert np.array_equal(pictures(compiled, plan(compiled)), images)
    assert str(actual) == str(expected)  # what is read is the same, too
    with CONTEXTS[context](compiled):
        for module in parts(compiled, part):
            compile_without_hooks(module)  # within the context, and again
        assert np.array_equal(pictures(compiled, plan(compiled)), images)
    assert all(is_passing_hooks_by(module) for module in parts(compiled, part))


def test_a_compiled_text_encoder_is_corrupted():
    pipe = tiny.small()
    noise, restored = Noise("noise", (1,)), [((0, 1), (2, 1))]
    expected = corrupted_states(pipe, "cat in a", noise, restored)
    compile_without_hooks(pipe.text_encoder)
    assert torch.equal(corrupted_states(pipe, "cat in a", noise, restored).states, expected.states)


def test_what_holds_no_hook_keeps_its_compiled_code():
    pipe = tiny.pipeline()
    resnet = pipe.unet.mid_block.resnets[0]
    compile_without_hooks(resnet)
    with intervene(pipe, plan(pipe)):
        assert is_passing_hooks_by(resnet)
    with restoring(pipe, [(0, ()), (0, tuple(range(60)))]):
        assert not is_passing_hooks_by(resnet)
        assert is_compiled(pipe.unet)  # as its owner has it
    assert is_compiled(pipe.unet)
    assert not is_compiled(tiny.unet())


def test_code_that_calls_no_hook_for_another_reason_is_noticed(monkeypatch):
    pipe = tiny.small()
    attention = find_layers(pipe)[3].module
    block = pipe.unet.get_submodule(find_layers(pipe)[3].name.rpartition(".")[0])
    block.attn2 = attention
    monkeypatch.setattr(attention, "_call_impl", attention.forward)
    monkeypatch.setattr(
        type(attention), "__call__", lambda module, *a, **k: module.forward(*a, **k)
    )
    with (
        pytest.raises(LocogenError, match=r"layer 0 .*was not called"),
        intervene(pipe, plan(pipe)),
    ):
        pictures(pipe, plan(pipe))


# --- the compiler itself -------------------------------------------------------------------------


def compile_denoiser(pipe, how):
    """With dynamo's own eager backend: its tracing and its guards, and no compiler behind."""
    if how == "module.compile()":
        pipe.unet.compile(backend="eager")
    elif how == "torch.compile(module)":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    elif how == "forward":
        pipe.unet.forward = torch.compile(pipe.unet.forward, backend="eager")
    elif how == "compile_repeated_blocks()":
        pipe.unet.compile_repeated_blocks(backend="eager")
    else:
        pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")


WAYS = [
    "module.compile()",
    "torch.compile(module)",
    "forward",
    "compile_repeated_blocks()",
    "one block",
]


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS)
def test_it_is_right_in_every_order(how):
    pipe, other = tiny.small(), tiny.small()
    rows = plan(pipe)
    own, plain = pictures(pipe, rows, TARGETS), pictures(pipe, rows)
    compile_denoiser(pipe, how)
    assert np.array_equal(pictures(pipe, rows), plain)  # traced here, where there are no hooks
    with intervene(pipe, rows):
        assert np.array_equal(pictures(pipe, rows), own)
    assert np.array_equal(pictures(pipe, rows), plain)
    with intervene(other, rows):
        compile_denoiser(other, how)
        assert np.array_equal(pictures(other, rows), own)
    assert np.array_equal(pictures(other, rows), plain)
    assert is_compiled(pipe.unet)
    assert len(find_layers(pipe)) == len(rows[0].layers)


@pytest.mark.slow
def test_speed_on_a_compiled_pipeline(monkeypatch):
    """No internal error of dynamo, whatever is compiled twice."""
    from locogen.pictures import speed as pace

    pipe = tiny.small()
    rows = plan(pipe)
    plain = pictures(pipe, rows)
    monkeypatch.setattr(pace, "GAIN", 0.0)  # every way is kept, but half precision
    monkeypatch.setattr(pace, "half_of", lambda device: None)
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: compile_module(module, backend="eager")
    )
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pace.speed(pipe, "compile", batch_size=2) as chosen:
        assert chosen.way.compiled
        with intervene(pipe, [Intervention(row.prompt, row.target, (), row.seed) for row in rows]):
            assert np.abs(pictures(pipe, rows) - plain).max() < 1e-4
    assert uncompiled_module(pipe.unet) is not pipe.unet
    assert np.array_equal(pictures(pipe, rows), plain)
