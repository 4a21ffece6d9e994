"""Neurons on a tiny Stable Diffusion: planted ones are found, scores equal those made by hand."""

import math

import numpy as np
import pytest
import torch
from support import tiny
from torch.overrides import TorchFunctionMode

from locogen.editing.edit import fit_edit
from locogen.editing.neurons import Neurons, find_neurons
from locogen.errors import LocogenError
from locogen.interventions.clamping import clamp
from locogen.models.families import encode, end_position, family_of, subject_positions
from locogen.models.layers import find_layers
from locogen.pictures import score
from locogen.plan import Concept, PromptPair

CONTENTS = ("dog", "a dog", "the dog", "one dog", "my dog", "no dog", "dog dog", "do dog")
STYLE = Concept("cat", "style", tuple(PromptPair(f"{c} in cat", c) for c in CONTENTS))
LAYERS = (2, 3)


@pytest.fixture(scope="module")
def pipe():
    return tiny.small()


class WithoutFloat64(TorchFunctionMode):
    """As if the model were on a device without float64: only what came from `.cpu()` or was float64 is cast to it."""

    def __init__(self):
        super().__init__()
        self.moved = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func == torch.Tensor.cpu or (func == torch.Tensor.to and args[0].dtype == torch.float64):
            self.moved[id(made)] = made
        elif (
            func in (torch.Tensor.double, torch.Tensor.to)
            and made.dtype == torch.float64 != args[0].dtype
        ):
            assert id(args[0]) in self.moved
        return made


def test_float64_is_for_the_cpu(pipe):
    """Apple's devices have none."""
    with WithoutFloat64():
        find_neurons(pipe, STYLE, layers=LAYERS)
        with fit_edit(pipe, STYLE, layers=LAYERS, ordinary=["a dog"]).applied(pipe):
            pass
        score._unit(torch.ones(1, 2))


def states(pipe, text):
    return encode(pipe, [text]).states[0].double()


def states_read(pipe, pair: PromptPair, tokens: str):
    """States of a pair at the positions that are read, one row each, by hand; `ab` are the subject's two tokens."""
    one, two, end = (
        states(pipe, pair.prompt),
        states(pipe, pair.target),
        end_position(pipe, pair.target),
    )
    at = subject_positions(pipe, pair.prompt, pair.prompt.rpartition(" ")[2])
    rows = {"last_subject": one[at[-1]], "subject": one[list(at)].mean(0), "all": one[1:].mean(0)}
    rows["end"] = one[end_position(pipe, pair.prompt)]
    other = {"all": two[1:].mean(0), "end": two[end]}
    return rows[tokens], other.get(tokens, two[end - 1])


@pytest.mark.parametrize("tokens", ["last_subject", "subject", "end", "all"])
def test_scores_equal_those_made_by_hand(pipe, tokens):
    pairs = tuple(PromptPair(f"{c} in ab", c) for c in CONTENTS)
    found = find_neurons(pipe, Concept("ab", "style", pairs), layers=LAYERS, tokens=tokens)
    have, lack = zip(*(states_read(pipe, pair, tokens) for pair in pairs), strict=True)
    for index in LAYERS:
        module = find_layers(pipe)[index].module
        for name, linear in (("k", module.to_k), ("v", module.to_v)):
            rows = linear.weight.detach().double()
            x, y = (np.array([[float(w @ s) for w in rows] for s in side]) for side in (have, lack))
            n = len(pairs)
            z = (x.mean(0) - y.mean(0)) / np.sqrt(
                x.var(0) * n / (n - 1) / n + y.var(0) * n / (n - 1) / n
            )
            rows = found.table[(found.table.layer == index) & (found.table.matrix == name)]
            assert np.allclose(rows.z, z, rtol=1e-3)
            assert np.allclose(rows.mean_with, x.mean(0), atol=1e-5)
            assert np.allclose(rows.mean_without, y.mean(0), atol=1e-5)
            assert list(rows.channel) == list(range(len(z)))
            means = (
                torch.stack([states(pipe, pair.target) for pair in pairs]).mean(0)
                @ linear.weight.detach().double().T
            )
            assert torch.allclose(found.without[index, name].double(), means, atol=1e-4)
    assert not np.allclose(
        found.table.z, find_neurons(pipe, STYLE, layers=LAYERS).table.z, rtol=1e-3
    )


def test_planted_neurons_are_found_and_no_others():
    """Channels deaf to the mean difference of the prompts, but for three that read nothing else."""
    pipe = tiny.small()
    have, lack = (
        torch.stack(side)
        for side in zip(*(states_read(pipe, p, "last_subject") for p in STYLE.pairs), strict=True)
    )
    direction = torch.nn.functional.normalize((have - lack).mean(0), dim=0)
    planted = {(2, "k"): (4,), (3, "v"): (1, 6)}
    honest = find_neurons(pipe, STYLE, layers=LAYERS)  # the twin: before, others stand out
    with torch.no_grad():
        for index in LAYERS:
            for name, linear in family_of(pipe).matrices(find_layers(pipe)[index].module).items():
                linear.weight -= (linear.weight.double() @ direction)[
                    :, None
                ].float() * direction.float()
                linear.weight[list(planted.get((index, name), ()))] = direction.float()
    found = find_neurons(pipe, STYLE, layers=LAYERS)
    rows = found.table[found.table.p_value < 1e-3]
    assert {(r.layer, r.matrix, r.channel) for r in rows.itertuples()} == {
        (*place, channel) for place, channels in planted.items() for channel in channels
    }
    assert (rows.z > 5).all() and (found.table.drop(rows.index).z.abs() < 0.1).all()
    assert found.top(2).channels[3, "v"] == (1, 6)
    assert found.top(1).channels[2, "k"] == (4,)
    assert honest.top(2).channels[3, "v"] != (1, 6)
    assert (honest.table.p_value < 1e-3).sum() > 3


def test_selections_of_each_matrix(pipe):
    found = find_neurons(pipe, STYLE, layers=LAYERS)
    assert set(found.top(0).channels.values()) == {()}
    strongest = (
        found.table[(found.table.layer == 2) & (found.table.matrix == "v")]
        .set_index("channel")
        .z.abs()
    )
    assert set(found.top(3).channels[2, "v"]) == set(strongest.nlargest(3).index)
    assert {len(c) for c in found.top(3).channels.values()} == {3} and len(found.top(3)) == 12
    assert set(found.top(3, matrices="v").channels) == {(2, "v"), (3, "v")}
    assert found.random(3, 1).channels == found.random(3, 1).channels != found.random(3, 2).channels
    assert found.random(8).overlap(found.top(8)).expected == pytest.approx(
        4 * 8 * 8 / len(strongest)
    )
    for k in (-1, len(strongest) + 1, 2.5, True):
        with pytest.raises(LocogenError, match="number of neurons per matrix"):
            found.top(k)
    with pytest.raises(LocogenError, match="use 'k', 'v'"):
        found.top(1, matrices="q")
    with clamp(pipe, found.top(2)):
        pipe("a cat", num_inference_steps=1)


def test_objects_are_compared_with_what_stands_in_their_place(pipe):
    """The word itself, not the prompt's last one."""
    pairs = tuple(PromptPair(f"{c} cat in a", f"{c} dog in a") for c in ("one", "my"))
    found = find_neurons(pipe, Concept("cat", "object", pairs), layers=[2], tokens="last_subject")
    at = [subject_positions(pipe, p.target, "dog")[-1] for p in pairs]
    here = torch.stack([states(pipe, p.target)[i] for p, i in zip(pairs, at, strict=True)]).mean(0)
    rows = found.table[found.table.matrix == "v"]
    expected = find_layers(pipe)[2].module.to_v.weight.double() @ here
    assert np.allclose(rows.mean_without, expected.detach(), atol=1e-5)


def test_it_shows_itself_and_says_how_many_stand_out(pipe):
    found = find_neurons(pipe, STYLE, layers=LAYERS)
    html = found._repr_html_()
    assert f"of {len(found)} at p" in html and "Benjamini" in html
    assert isinstance(found, Neurons) and found.settings["pairs"] == len(CONTENTS)
    assert ((found.table.p_value >= 0) & (found.table.p_value <= 1)).all()


def test_half_precision_and_adapters_are_heard(tmp_path):
    from locogen.editing.edit import fit_edit

    pipe = tiny.small()
    plain = find_neurons(pipe, STYLE, layers=LAYERS).table
    edit = fit_edit(pipe, STYLE, layers=[2])
    edit.to_lora(tmp_path / "lora.safetensors")
    with edit.applied(pipe):
        dense = find_neurons(pipe, STYLE, layers=LAYERS).table
    pipe.unet.load_lora_adapter(str(tmp_path / "lora.safetensors"), prefix="unet")
    lora = find_neurons(pipe, STYLE, layers=LAYERS).table
    assert np.allclose(lora.mean_with, dense.mean_with, atol=1e-4)
    assert not np.allclose(lora.mean_with, plain.mean_with, atol=1e-2)
    half = find_neurons(tiny.small().to(torch.bfloat16), STYLE, layers=LAYERS).table
    assert np.allclose(half.mean_with, plain.mean_with, atol=0.2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(layers=[]), "layers is empty"),
        (dict(layers=[16]), r"no layers \[16\]"),
        (dict(tokens="first"), "tokens is 'first'"),
        (dict(phrasings=[]), "phrasings is empty"),
        (dict(phrasings=[("a cat", "a do")]), "has 1 pair of prompts"),
        (
            dict(phrasings=[("a cat", "a do"), ("a dog", "a do")]),
            "does not contain the subject 'cat'",
        ),
        (dict(subject="ab"), "does not contain the subject 'ab'"),
    ],
)
def test_bad_input(pipe, options, says):
    with pytest.raises(LocogenError, match=says):
        find_neurons(pipe, STYLE, **{"layers": LAYERS, **options})


def test_refuses_a_clamped_model_and_one_that_is_not_finite():
    pipe = tiny.small()
    found = find_neurons(pipe, STYLE, layers=LAYERS)
    with clamp(pipe, found.top(1)), pytest.raises(LocogenError, match="outside of these contexts"):
        find_neurons(pipe, STYLE, layers=LAYERS)
    with torch.no_grad():
        find_layers(pipe)[2].module.to_v.weight[0, 0] = math.nan
    with pytest.raises(LocogenError, match="to_v of layer 2 has non-finite outputs"):
        find_neurons(pipe, STYLE, layers=LAYERS)


def test_states_are_not_rounded_to_the_type_in_which_weights_are_stored():
    """Layerwise casting keeps weights in float8 and computes in float32: as if the weights alone were rounded."""
    stored, rounded = tiny.small(), tiny.small()
    stored.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    with torch.no_grad():
        for layer in find_layers(rounded):
            for matrix in family_of(rounded).matrices(layer.module).values():
                matrix.weight.copy_(matrix.weight.to(torch.float8_e4m3fn))
    one, two = (find_neurons(pipe, STYLE, layers=LAYERS).table["z"] for pipe in (stored, rounded))
    assert np.allclose(one, two, rtol=1e-5)


@pytest.mark.parametrize("tokens", ["last_subject", "subject", "end", "all"])
def test_neurons_are_found_against_nothing(pipe, tokens):
    """Of an empty prompt the end is read, in the place of the words that it does not have."""
    pairs = (PromptPair("a cat, b", ""), PromptPair("cat", ""))
    neurons = find_neurons(pipe, Concept("cat", "style", pairs), layers=[1], tokens=tokens)
    assert np.isfinite(neurons.table["z"]).all()
    end = states(pipe, "")[end_position(pipe, "")]
    layer = find_layers(pipe)[1]
    if tokens != "all":
        rows = neurons.table[neurons.table["matrix"] == "k"]
        assert np.allclose(
            rows["mean_without"], (end @ layer.module.to_k.weight.T.double()).detach(), atol=1e-5
        )
