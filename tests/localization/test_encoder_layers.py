"""Theorems of attribution to the layers of the text encoder that a text is taken from."""

import copy
import functools

import numpy as np
import pytest
import torch
from support import tiny

from locogen.errors import LocogenError
from locogen.localization.attribution.attribute import attribute
from locogen.localization.attribution.blending import POOLED, blending
from locogen.localization.attribution.direct import DirectLine, inputs_along
from locogen.localization.attribution.encoder_layers import EncodedBlend
from locogen.localization.attribution.paths import Paths, Picture
from locogen.localization.attribution.result import attribution_effect, attribution_window
from locogen.models.families import denoiser_of, encode
from locogen.pictures.batches import Texts
from locogen.plan import Concept, Intervention, PromptPair, Settings
from locogen.views.attribution_plots import attribution_shares, plot_attribution

PROMPT, TARGET = "a big cat b", "a big b"  # of unequal length: masks matter
CONCEPT = Concept("cat", "style", (PromptPair(PROMPT, TARGET),))
TWO = Concept("cat", "style", (PromptPair(PROMPT, TARGET), PromptPair("cat in dog", "in dog")))
OPTIONS = {"axis": "encoder layer", "num_inference_steps": 2, "progress": False}
SETTINGS = Settings(2, 5.0, 8)
NUMBERS = {"flux-2": (10, 20, 30), "flux-2-klein": (9, 18, 27), "krea-2": (1, 2, 3)}

every_family = pytest.mark.parametrize("family", tiny.fast("flux-2-klein", of=NUMBERS))
slow_family = pytest.mark.parametrize("family", tiny.fast(of=NUMBERS))


@functools.cache
def model(family):
    # Without blocks across encoder layers, so that what one of them says can be taken out.
    options = {"num_layerwise_text_blocks": 0} if family == "krea-2" else {}
    return tiny.FAMILIES[family](**options)


def line_of(blend, step=1):
    texts = Texts(blend.pipe, [Intervention(PROMPT, TARGET)])
    paths = Paths(blend, [Picture(PROMPT, TARGET, 0)], texts, SETTINGS)
    inputs = inputs_along(paths, [step])[step]
    return DirectLine(paths, inputs, heads=False, pooled=blend.has_pooled)


@every_family
def test_shares_of_encoder_layers_sum_to_what_all_of_them_do(family):
    found = attribute(model(family), CONCEPT, seeds=[0], bound=0.01, **OPTIONS)
    total = found.shares.sum() + (0 if found.pooled is None else found.pooled.sum())
    assert abs(total - 1) <= 0.01 and found.is_complete
    assert found.numbers == NUMBERS[family] and found.shares.shape[3] == 3
    assert (found.pooled is not None) == (family == "krea-2")  # which alone has a mask


@pytest.mark.slow
@slow_family
def test_they_do_through_the_whole_chain_too(family):
    found = attribute(model(family), CONCEPT, how="chain", seeds=[0], bound=0.01, **OPTIONS)
    assert found.is_complete
    few = attribute(
        model(family), CONCEPT, how="chain", seeds=[0], points=1, most_points=1, **OPTIONS
    )
    assert not few.is_complete  # the twin: one point is not enough, and it says so


@slow_family
def test_at_the_target_it_is_the_targets_own_encoding(family):
    """What the denoiser makes of the target's text, from the prompt's latents; its mask included."""
    pipe = model(family)
    with blending(pipe, EncodedBlend) as blend:
        line = line_of(blend)
        prompt, target = line.output([0], [0.0])[0], line.output([0], [1.0])[0]
        inputs = line.inputs
        encoded = encode(pipe, [TARGET])
        own = {**inputs.kwargs, "encoder_hidden_states": encoded.states}
        if encoded.mask is not None:
            own["encoder_attention_mask"] = encoded.mask
        with torch.no_grad():
            plain = blend.denoiser(**inputs.kwargs)[0].flatten().double()
            expected = blend.denoiser(**own)[0].flatten().double()
        alphas = line._alphas([1.0], heads=False)
        alphas.pop(POOLED, None)
        moment = line.paths.moment(range(1), [0], alphas)
        with blend.hearing(moment), torch.no_grad():
            without_mask = line._run(line._inputs_of([0]), [0]).flatten().double()
    assert torch.allclose(prompt, plain, atol=1e-5)
    assert torch.allclose(target, expected, atol=1e-5)
    assert not torch.allclose(prompt, expected, atol=1e-3)
    assert torch.allclose(without_mask, expected, atol=1e-5) == (encoded.mask is None)


@slow_family
def test_the_gradient_is_the_finite_difference(family):
    with blending(model(family), EncodedBlend) as blend:
        line = line_of(blend)
        change = line.output([0], [1.0]) - line.output([0], [0.0])
        direction = change / change.square().sum(1, keepdim=True)
        shares = line.shares([0], [0.3], direction)

        def along(place, more):
            alphas = line._alphas([0.3], heads=False)
            alphas[place] = alphas[place] + more
            moment = line.paths.moment(range(1), [0], alphas)
            with torch.no_grad(), blend.hearing(moment):
                output = line._run(line._inputs_of([0]), [0]).flatten().double()
            return float(output @ direction[0])

        differences = [(along(place, 0.02) - along(place, -0.02)) / 0.04 for place in range(3)]
        if blend.has_pooled:
            mask = (along(POOLED, 0.02) - along(POOLED, -0.02)) / 0.04
            assert mask == pytest.approx(shares.pooled[0, 0], abs=5e-3)
    expected = shares.layers[0, 0].sum((1, 2))
    assert np.allclose(differences, expected, atol=5e-3 * max(1, abs(expected).max()))
    assert abs(expected).max() > 1e-2


@torch.no_grad()
def take_out(denoiser, place):
    """What the denoiser reads of one encoder layer becomes nothing."""
    if hasattr(denoiser, "text_fusion"):
        denoiser.text_fusion.projector.weight[:, place] = 0
    else:
        block = slice(place * tiny.WIDTH, (place + 1) * tiny.WIDTH)
        denoiser.context_embedder.weight[:, block] = 0


@slow_family
@pytest.mark.parametrize("how", ["gradient", "rows", "chain"])
def test_an_encoder_layer_that_nothing_reads_has_no_share(family, how):
    pipe = copy.copy(model(family))
    pipe.transformer = copy.deepcopy(denoiser_of(pipe))
    options = {"how": how, "seeds": [0], "most_points": 3, **OPTIONS}
    read = attribute(pipe, CONCEPT, **options).layers[:, 0, 0]
    take_out(pipe.transformer, 1)
    unread = attribute(pipe, CONCEPT, **options).layers[:, 0, 0]
    rounding = 100 * np.finfo(np.float32).eps
    assert abs(read[1]) > 50 * rounding  # before
    assert abs(unread[1]) < rounding
    assert abs(unread[[0, 2]]).min() > 50 * rounding  # the others still have theirs


@slow_family
def test_prompts_and_seeds_in_one_batch_are_those_of_batches_of_one(family):
    options = {"seeds": range(2), "most_points": 3, **OPTIONS}
    together = attribute(model(family), TWO, batch_size=8, **options)
    apart = attribute(model(family), TWO, batch_size=1, **options)
    assert together.shares.shape[:2] == (2, 2)
    assert np.allclose(together.shares, apart.shares, atol=1e-4)
    assert not np.allclose(together.shares[:, 0], together.shares[:, 1], atol=1e-4)


@slow_family
def test_half_precision_has_finite_shares(family):
    """Of which these small stand-ins, that change little, lose a part in rounding: the sum says so."""
    half = copy.copy(model(family))
    half.transformer = copy.deepcopy(denoiser_of(half)).bfloat16()
    for module in half.transformer.modules():
        if type(module).__name__ == "Krea2RMSNorm":  # as a checkpoint is loaded
            module.float()
    half.text_encoder = copy.deepcopy(half.text_encoder).bfloat16()
    found = attribute(half, CONCEPT, seeds=[0], most_points=3, **OPTIONS)
    assert np.isfinite(found.shares).all() and abs(found.shares).max() > 0


def test_the_table_and_the_effects_name_the_encoders_layers():
    pipe = model("flux-2-klein")
    before = [len(module._forward_pre_hooks) for module in pipe.transformer.modules()]
    found = attribute(pipe, CONCEPT, how="rows", seeds=[0], steps=[0], **OPTIONS)
    assert before == [len(module._forward_pre_hooks) for module in pipe.transformer.modules()]
    assert set(found.table["layer"]) == set(NUMBERS["flux-2-klein"])
    assert set(found.table["axis"]) == {"encoder layer"}
    effects = attribution_effect(found, window=2)
    lines = effects[effects["axis"] == "encoder layer"]
    assert list(lines["position"]) == [9, 18]
    assert np.isclose(lines["estimate"].iloc[0], found.layers[:2].sum())
    assert set(found.leading(1.0)) <= set(NUMBERS["flux-2-klein"])
    assert "encoder layer" in found._repr_html_()
    axes = plot_attribution(found.table)
    assert axes.get_xlabel() == "encoder layer"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["9", "18", "27"]
    with pytest.raises(LocogenError, match="draw them by plot_attribution"):
        attribution_shares(found.table)
    with pytest.raises(LocogenError, match="a window is of the denoiser's layers"):
        attribution_window(found)


@pytest.mark.parametrize("family", ["sd", "sd-3", "qwen-image"])
def test_encoders_that_one_layer_is_taken_of_are_refused(family):
    with pytest.raises(LocogenError, match="from one layer of each encoder"):
        attribute(tiny.FAMILIES[family](), CONCEPT, seeds=[0], **OPTIONS)


def test_what_cannot_be_is_refused():
    pipe = model("flux-2-klein")
    with pytest.raises(LocogenError, match="no heads"):
        attribute(pipe, CONCEPT, seeds=[0], heads=True, **OPTIONS)
    with pytest.raises(LocogenError, match="encoder layer"):
        attribute(pipe, CONCEPT, seeds=[0], axis="encoder")
