"""Attribution: shares sum to what all layers do, are derivatives of exact rows, and leave nothing behind."""

import copy
import functools

import numpy as np
import pytest
import torch
from support import tiny

from locogen.errors import LocogenError, UnsupportedModel
from locogen.interventions.denoiser_calls import announced, on_denoiser
from locogen.interventions.prompts import active_contexts, intervene
from locogen.localization.attribution.attribute import attribute
from locogen.localization.attribution.blending import blending
from locogen.localization.attribution.chain import ChainLine, Scored
from locogen.localization.attribution.direct import DirectLine, inputs_along
from locogen.localization.attribution.paths import Paths, Picture
from locogen.localization.attribution.proposal import propose
from locogen.localization.attribution.quadrature import Shares, gradients_along, integrate
from locogen.localization.attribution.result import (
    Attribution,
    attribution_effect,
    attribution_window,
    step_weights,
)
from locogen.models.families import denoiser_of, encode, family_of
from locogen.models.hooks import after
from locogen.models.layers import find_layers
from locogen.pictures.batches import Texts, call_pipeline
from locogen.pictures.score import scorer as load_scorer
from locogen.pictures.speed import Way, applied
from locogen.plan import Concept, Intervention, PromptPair, Settings, with_target_runs

PROMPT, TARGET = "a big cat b", "a big b"
CONCEPT = Concept("cat", "style", (PromptPair(PROMPT, TARGET),))
TWO = Concept("cat", "style", (PromptPair(PROMPT, TARGET), PromptPair("cat in dog", "in dog")))
OPTIONS = {"num_inference_steps": 2, "progress": False}
SETTINGS = Settings(2, 5.0, 8)

EVEN = Concept("cat", "style", (PromptPair("a big cat b", "a big dog b"),))
# Z-Image's and HiDream's text is behind the picture; Lumina 2 takes only targets as long as their prompts; of Wan
# 2.2's denoisers one runs at a step. The last two have tests of their own.
OF_THEIR_OWN = ("z-image", "hidream", "lumina-2", "wan-2.2")
KNOWN = [name for name in tiny.FAMILIES if name not in OF_THEIR_OWN]
every_family = pytest.mark.parametrize("family", tiny.fast("sd", "sd-3", of=KNOWN))


@functools.cache
def model(family):
    """A pipeline that tests share; of Stable Diffusion with 4 layers, and "sd, all layers" with 16."""
    makers = tiny.FAMILIES | {"sd": tiny.small, "sd, all layers": tiny.pipeline}
    return makers[family]()


def paths_of(blend, seeds=(0,), prompt=PROMPT, target=TARGET):
    pictures = [Picture(prompt, target, seed) for seed in seeds]
    texts = Texts(blend.pipe, [Intervention(prompt, target)])
    return Paths(blend, pictures, texts, SETTINGS)


def direct_line(paths, step=1, heads=False):
    inputs = inputs_along(paths, [step])[step]
    return DirectLine(paths, inputs, heads=heads, pooled=paths.blend.has_pooled)


def unit(line):
    """The direction that shares are taken along: (rows, numbers)."""
    change = line.output([0], [1.0]) - line.output([0], [0.0])
    return change / change.square().sum(1, keepdim=True)


def state_of(denoiser):
    """All that attribution could leave on a denoiser."""
    modules = list(denoiser.modules())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)
    weights = [(w.requires_grad, w.grad is None, w._version) for w in denoiser.parameters()]
    return hooks, weights, "forward" in vars(denoiser), [m.training for m in modules]


# --- shares sum to what all layers do ------------------------------------------------------------


@every_family
@pytest.mark.parametrize("how", ["gradient", "chain"])
def test_integrated_shares_sum_to_what_all_layers_do(family, how):
    # DeepFloyd's scheduler clips pixels, which no number of points makes smooth.
    bound = 0.2 if family == "if" and how == "chain" else 0.01
    # Some stand-ins change within a small part of the line, and need more points than are taken by
    # default; until then the result says that it is not complete.
    points = {"most_points": 81} if family.startswith(("pixart", "sana")) else {}
    found = attribute(model(family), CONCEPT, how=how, seeds=[0], bound=bound, **points, **OPTIONS)
    total = found.shares.sum() + (0 if found.pooled is None else found.pooled.sum())
    assert abs(total - 1) <= bound
    assert found.is_complete
    assert np.isclose(1 - total, found.residual.item(), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("how, heads", [("gradient", False), ("gradient", True), ("chain", False)])
def test_shares_sum_where_the_picture_follows_each_text(how, heads):
    """Lumina 2: fewer heads of keys than of queries; behind the text no token has a share."""
    pipe = model("lumina-2")
    options = OPTIONS | ({"heads": True} if heads else {})
    found = attribute(pipe, EVEN, how=how, seeds=[0], bound=0.01, **options)
    assert abs(found.shares.sum() - 1) <= 0.01
    tokens = int(encode(pipe, [EVEN.pairs[0].prompt]).mask.sum())
    by_token = np.abs(found.shares).sum(axis=(0, 1, 2, 3))
    assert by_token[tokens:].sum() == 0 < by_token[:tokens].min()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gradient", "rows", "chain"])
def test_layers_have_shares_in_the_turns_of_their_denoiser_alone(how):
    """Wan 2.2: the first of two steps is the first denoiser's, the second the other's."""
    found = attribute(model("wan-2.2"), CONCEPT, how=how, seeds=[0], bound=0.01, **OPTIONS)
    assert found.is_complete or how == "rows"
    first, second = np.abs(found.shares).sum(axis=(0, 1, 4))  # (layers,) at each step
    rounding = 1e-4  # of rows that are run in batches of other sizes
    assert first[3:].max() < rounding < first[:3].min()
    assert second[:3].max() < rounding < second[3:].min()


def test_the_gradient_at_the_prompt_alone_does_not_sum_to_it():
    with blending(model("sd")) as blend:
        line = direct_line(paths_of(blend))
        at_prompt = line.shares([0], [0.0], unit(line)).layers.sum()
    assert abs(at_prompt - 1) > 0.05


def test_points_are_added_until_the_sum_is_near_enough():
    few = attribute(model("sd"), CONCEPT, seeds=[0], points=1, bound=10.0, **OPTIONS)
    # A tenth of what one point leaves, whatever weights this version of torch draws.
    bound = abs(few.residual.item()) / 10
    more = attribute(model("sd"), CONCEPT, seeds=[0], points=1, bound=bound, **OPTIONS)
    assert few.points.item() == 1
    assert more.points.item() > 1
    assert abs(more.residual.item()) <= bound < abs(few.residual.item())


def test_a_sum_that_cannot_be_had_is_said_to_be():
    few = {"points": 1, "most_points": 1, "bound": 1e-6}
    found = attribute(model("sd"), CONCEPT, seeds=[0], **few, **OPTIONS)
    assert not found.is_complete
    assert "further from 1" in found.remark
    assert "further from 1" in attribution_window(found).reason


def test_a_row_of_its_own_for_each_layer_says_what_layers_do_only_together():
    found = attribute(model("sd"), CONCEPT, how="rows", seeds=[0], bound=1e-9, **OPTIONS)
    assert found.words == ()
    assert np.isclose(found.shares.sum() + found.residual.item(), 1)
    assert not found.is_complete
    assert "together" in found.remark


def test_shares_of_the_score_sum_to_what_it_changes_by():
    """Through decoder and scorer; and what is explained is what the scorer says of the pictures."""
    pipe, judge = model("sd"), load_scorer("mini")
    options = {"how": "chain", "seeds": [2], "scorer": judge, **OPTIONS}
    found = attribute(pipe, CONCEPT, explain="score", bound=0.01, most_points=81, **options)
    assert found.is_complete and found.settings["explain"] == "score"
    assert np.isclose(found.shares.sum() + found.residual.item(), 1)
    latents = attribute(pipe, CONCEPT, explain="latents", **options)
    assert not np.allclose(found.shares, latents.shares, atol=0.02)

    with blending(pipe) as blend:
        scored = Scored(judge, {PROMPT: PROMPT})
        line = ChainLine(paths_of(blend, seeds=(2,)), (0, 1), False, False, False, scored)
        explained = [line.output([0], [alpha]).item() for alpha in (0.0, 1.0)]
    texts = Texts(pipe, [Intervention(PROMPT, TARGET)])
    pictures = []
    for prompt in (PROMPT, TARGET):
        rows = [Intervention(prompt, prompt, (), 2)]
        pictures += call_pipeline(
            pipe, rows, texts.arguments([prompt]), SETTINGS, output_type="pil"
        )
    [cosines] = judge(pictures, [PROMPT] * 2)
    assert np.allclose(explained, cosines, atol=0.005)
    assert abs(cosines[0] - cosines[1]) > 0.05  # or they would agree for nothing


def test_shares_of_the_score_survive_sixteen_bits(one_noise):
    """The score has 32 bits, and what its gradients go through 16: they are scaled on the way."""
    options = {"how": "chain", "explain": "score", "seeds": [0], "most_points": 3, **OPTIONS}
    options["scorer"] = load_scorer("mini")
    wide = attribute(model("sd"), CONCEPT, **options).layers[:, 0, 0]
    pipe = copy.copy(model("sd"))
    pipe.unet, pipe.vae = (copy.deepcopy(part).to(torch.float16) for part in (pipe.unet, pipe.vae))
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder).to(torch.float16)
    half = attribute(pipe, CONCEPT, **options).layers[:, 0, 0]
    assert np.corrcoef(wide, half)[0, 1] > 0.99
    assert not np.array_equal(wide, half)


def test_a_scorer_without_gradients_is_refused():
    options = {"how": "chain", "explain": "score", **OPTIONS}
    with pytest.raises(LocogenError, match="lets no gradients through"):
        attribute(model("sd"), CONCEPT, scorer=tiny.FakeScorer(), **options)
    with pytest.raises(LocogenError, match="no picture to score"):
        attribute(model("sd"), CONCEPT, **options | {"how": "gradient"})
    with pytest.raises(LocogenError, match="latents"):
        attribute(model("sd"), CONCEPT, **options | {"explain": "pixels"})


class Steep:
    """A line that tips over at a place of its own in each row; two layers share it 3 to 1."""

    def __init__(self, *places):
        self.places = places
        self.gradients = 0

    def output(self, rows, alphas):
        at = [self.places[row] for row in rows]
        values = 1 / (1 + np.exp(-50 * (np.array(alphas) - at)))
        return torch.tensor(np.stack([values, np.ones(len(rows))], 1))

    def shares(self, rows, alphas, direction):
        self.gradients += len(rows)
        up, down = (self.output(rows, np.array(alphas) + move) for move in (1e-5, -1e-5))
        slope = ((up - down) * direction).sum(1).numpy() / 2e-5
        layers = (
            slope[:, None, None, None, None] * np.array([0.75, 0.25])[None, None, :, None, None]
        )
        return Shares(layers, np.zeros((len(rows), 1)))


def test_the_part_where_a_picture_tips_over_is_halved():
    line = Steep(0.07, 0.5, 0.61)
    found = integrate(line, [0, 1, 2], points=3, bound=0.01, most_points=45)
    assert np.abs(found.residual).max() <= 0.01
    assert np.allclose(found.layers[:, 0, :, 0, 0], [0.75, 0.25], atol=0.01)
    assert np.allclose(found.residual[:, 0], 1 - found.layers.sum((1, 2, 3, 4)))
    assert found.points.sum() == line.gradients
    # As many points on the whole line do worse.
    most = int(found.points.max())
    even = integrate(Steep(0.07, 0.5, 0.61), [0, 1, 2], points=most, bound=0, most_points=most)
    few = integrate(Steep(0.07, 0.5, 0.61), [0, 1, 2], points=3, bound=0.01, most_points=3)
    assert np.abs(even.residual).max() > np.abs(found.residual).max() or most > 30
    assert np.abs(few.residual).max() > 0.1


class FourLayers:
    """Shares of four layers, one prompt and seed: what `leading` reads."""

    positions = range(4)
    layers = np.array([0.1, 0.6, -0.2, 0.3]).reshape(4, 1, 1)


@pytest.mark.parametrize(
    "share, named", [(0.5, (1,)), (0.6, (1,)), (0.61, (1, 3)), (0.9, (1, 3)), (1, (0, 1, 3))]
)
def test_the_leading_layers_are_the_fewest_that_make_up_a_share(share, named):
    assert Attribution.leading(FourLayers(), share) == named
    with pytest.raises(LocogenError, match="share is 0"):
        Attribution.leading(FourLayers(), 0)


# --- what a row hears is what `intervene` lets it hear -------------------------------------------


def first_output(pipe, plan):
    """What the denoiser puts out for the first row at the first step, within `intervene`."""
    outputs = []

    def hooks_for(call):
        def note(module, args, kwargs, output):
            if not outputs:
                sample = args[0] if args else kwargs["hidden_states"]
                outputs.append(output[0][call.rows.start, : sample.shape[1]].flatten().clone())

        return [after(denoiser_of(pipe), note, "the denoiser")]

    arguments = Texts(pipe, plan).arguments([row.prompt for row in plan])
    with intervene(pipe, plan), on_denoiser(pipe, hooks_for):
        call_pipeline(pipe, plan, arguments, SETTINGS, output_type="latent")
    return outputs[0].double()


@every_family
def test_a_row_is_what_intervene_makes_of_it(family):
    pipe = model(family)
    last = len(find_layers(pipe)) - 1
    with blending(pipe) as blend:
        line = direct_line(paths_of(blend), step=0)
        prompt, hears_last = line.output([0], [0.0])[0], line.variants(0, [last])[0]
    plan = [Intervention(PROMPT, TARGET, (last,), 0)]
    if blend.is_joint:
        plan = with_target_runs(plan)
    expected = first_output(pipe, plan)
    assert torch.allclose(hears_last, expected, atol=1e-5)
    assert not torch.allclose(prompt, expected, atol=1e-5)


@every_family
def test_the_gradient_is_the_finite_difference_of_the_exact_row(family):
    # A smaller step is lost in the rounding of float32; DeepFloyd's stand-in bends within this one.
    small = 1e-2 if family == "if" else 5e-2
    with blending(model(family)) as blend:
        line = direct_line(paths_of(blend))
        direction = unit(line)
        shares = line.shares([0], [0.3], direction)
        places = list(range(len(blend.layers)))

        def along(alpha):
            # All layers at 0.3, and one of them nearer to its target.
            outputs = [one_moved(line, place, 0.3, alpha) for place in places]
            return torch.cat(outputs) @ direction[0]

        wide, narrow = ((along(step) - along(-step)) / (2 * step) for step in (small, small / 2))
        # Richardson: without the part of the error that goes with the step's square.
        difference = (4 * narrow - wide) / 3
    expected = shares.layers[0, 0].sum((1, 2))
    assert np.allclose(difference, expected, atol=2e-3 * max(1, abs(expected).max()))
    assert abs(expected).max() > 1e-2  # or the rows would agree for nothing


def one_moved(line, place, alpha, more):
    """The output with every layer at alpha, and one moved further, (1, numbers)."""
    alphas = line._alphas([alpha], heads=False)
    alphas[place] = alphas[place] + more
    moment = line.paths.moment(range(1), [0], alphas)
    with torch.no_grad(), line.paths.blend.hearing(moment):
        return line._run(line._inputs_of([0]), [0]).flatten(1).double()


# --- layers that cannot hear ---------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("how", ["gradient", "rows", "chain"])
def test_a_layer_that_cannot_hear_has_no_share(family, how):
    pipe = copy.copy(model(family))
    # As many tokens: a mask that says how many there are is read where nothing else is.
    target = TARGET if family_of(pipe).layer_mask is None else "a big dog b"
    concept = Concept("cat", "style", (PromptPair(PROMPT, target),))
    denoiser = copy.deepcopy(denoiser_of(pipe))
    setattr(pipe, family_of(pipe).denoiser, denoiser)
    options = {"how": how, "seeds": [0], "most_points": 3, **OPTIONS}
    hears = attribute(pipe, concept, **options).layers[1]
    deafen(pipe, 1)
    deaf = attribute(pipe, concept, **options).layers[1]
    # Rows of one batch and of another differ by rounding, and an output has some hundred numbers.
    rounding = 100 * np.finfo(np.float32).eps
    assert np.abs(hears).max() > 5 * rounding
    assert np.abs(deaf).max() < rounding


@torch.no_grad()
def deafen(pipe, index):
    """Zero the value matrix of a layer; its keys too, where they compete with the picture's own."""
    family = family_of(pipe)
    matrices = family.matrices(find_layers(pipe)[index].module)
    joined = family.joint_attention or family.name == "DeepFloyd IF"
    for name in ("k", "v") if joined else ("v",):
        for weight in matrices[name].parameters():
            weight.zero_()


# --- rows do not mix, and the negative half is left alone ----------------------------------------


@every_family
def test_seeds_and_prompts_in_one_batch_are_those_of_batches_of_one(family):
    options = {"seeds": range(2), "most_points": 3, **OPTIONS}
    together = attribute(model(family), TWO, batch_size=8, **options)
    apart = attribute(model(family), TWO, batch_size=1, **options)
    assert together.shares.shape[:2] == (2, 2)
    assert np.allclose(together.shares, apart.shares, atol=1e-4)
    assert not np.allclose(together.shares[:, 0], together.shares[:, 1], atol=1e-4)


def test_the_negative_half_hears_nothing():
    pipe = model("sd")
    layer = find_layers(pipe)[3].module
    outputs = []

    def note(module, args, output):
        outputs.append(output.detach().clone())

    with blending(pipe) as blend:
        line = ChainLine(paths_of(blend), (0, 1), heads=False, pooled=False, checkpointing=False)
        handle = layer.register_forward_hook(note)
        for alpha in (0.0, 1.0):
            line.output([0], [alpha])
        handle.remove()
    plain, heard = outputs[0], outputs[2]  # of the first step, (negative and conditional row, ...)
    assert torch.equal(heard[0], plain[0])
    assert not torch.equal(heard[1], plain[1])


def test_the_direct_form_runs_conditional_rows_alone():
    pipe = model("sd")
    sizes = []
    with blending(pipe) as blend:
        line = direct_line(paths_of(blend))
        handle = pipe.unet.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
        line.shares([0], [0.5], unit(line))
        handle.remove()
    assert set(sizes) == {1}


# --- through the chain ---------------------------------------------------------------------------


@every_family
def test_the_whole_chain_at_the_target_is_what_intervene_makes(family):
    pipe = model(family)
    every = tuple(range(len(find_layers(pipe))))
    with blending(pipe) as blend:
        line = ChainLine(paths_of(blend), (0, 1), False, blend.has_pooled, checkpointing=False)
        heard = line.output([0], [1.0])[0]
        prompt = line.output([0], [0.0])[0]
    pooled = "target" if family_of(pipe).pooled else "keep"
    plan = [Intervention(PROMPT, TARGET, every, 0, pooled=pooled)]
    if family_of(pipe).joint_attention:
        plan = with_target_runs(plan)
    arguments = Texts(pipe, plan).arguments([row.prompt for row in plan])
    kind = "latent" if getattr(pipe, "vae", None) else "pt"
    with intervene(pipe, plan):
        expected = call_pipeline(pipe, plan, arguments, SETTINGS, output_type=kind)[0]
    assert torch.allclose(heard, expected.flatten().double(), atol=1e-4)
    assert not torch.allclose(prompt, expected.flatten().double(), atol=1e-4)


@every_family
def test_running_steps_again_for_their_gradients_changes_nothing(family):
    options = {"how": "chain", "seeds": [0], "most_points": 3, **OPTIONS}
    kept = attribute(model(family), CONCEPT, checkpointing=False, **options)
    again = attribute(model(family), CONCEPT, checkpointing=True, **options)
    assert np.allclose(kept.shares, again.shares, atol=1e-6)
    assert again.settings["denoiser_rows"] > kept.settings["denoiser_rows"]


def test_the_blocks_own_checkpointing_changes_nothing():
    pipe = model("sd")
    options = {"seeds": [0], "most_points": 3, **OPTIONS}
    for how in ("gradient", "chain"):
        kept = attribute(pipe, CONCEPT, how=how, **options)
        pipe.unet.enable_gradient_checkpointing()
        again = attribute(pipe, CONCEPT, how=how, checkpointing=True, **options)
        pipe.unet.disable_gradient_checkpointing()
        assert np.allclose(kept.shares, again.shares, atol=1e-6)


def test_a_chain_moves_the_text_at_its_steps_alone():
    options = {"how": "chain", "seeds": [0], **OPTIONS}
    late = attribute(model("sd"), CONCEPT, steps=[1], **options)
    whole = attribute(model("sd"), CONCEPT, **options)
    assert late.steps == (1,)
    assert whole.steps == (0, 1)
    assert late.is_complete
    assert not np.allclose(late.shares[:, :, 0], whole.shares[:, :, 1])


# --- nothing is left -----------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("how", ["gradient", "rows", "chain"])
def test_nothing_is_left_on_the_model(family, how):
    pipe = model(family)
    denoiser = denoiser_of(pipe)
    first = next(denoiser.parameters()).requires_grad_(False)
    before_it = state_of(denoiser)
    attribute(pipe, CONCEPT, how=how, seeds=[0], most_points=3, **OPTIONS)
    assert state_of(denoiser) == before_it
    assert active_contexts(pipe) == ()
    assert "encode_prompt" not in vars(pipe)
    assert not torch.is_inference_mode_enabled()
    first.requires_grad_(True)
    assert state_of(denoiser) != before_it  # so that it sees what could be left


def test_nothing_is_left_after_an_error():
    pipe = model("sd")
    before_it = state_of(pipe.unet)

    def fail(module, args):
        raise RuntimeError("a test's own")

    handle = pipe.unet.up_blocks[1].register_forward_pre_hook(fail)
    for how in ("gradient", "chain"):
        with pytest.raises(RuntimeError, match="a test's own"):
            attribute(pipe, CONCEPT, how=how, seeds=[0], **OPTIONS)
    handle.remove()
    assert state_of(pipe.unet) == before_it


def test_it_works_where_gradients_are_off():
    plain = attribute(model("sd"), CONCEPT, seeds=[0], most_points=3, **OPTIONS)
    with torch.no_grad():
        off = attribute(model("sd"), CONCEPT, seeds=[0], most_points=3, **OPTIONS)
    with torch.inference_mode():
        never = attribute(model("sd"), CONCEPT, seeds=[0], most_points=3, **OPTIONS)
    assert np.array_equal(plain.shares, off.shares)
    assert np.array_equal(plain.shares, never.shares)


# --- sixteen bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["gradient", "chain"])
def test_bfloat16_says_what_float32_says(how, one_noise):
    pipe = tiny.small()
    options = {"how": how, "seeds": [0], "bound": 0.1, **OPTIONS}
    wide = attribute(pipe, CONCEPT, **options)
    narrow = attribute(pipe.to(torch.bfloat16), CONCEPT, **options)
    assert np.allclose(narrow.layers, wide.layers, atol=0.1)
    assert wide.layers.max() > 0.2
    assert narrow.shares.dtype == np.float64


def test_gradients_of_float16_neither_overflow_nor_vanish():
    # A product whose derivative by the leaf is 30000 times what comes in.
    leaf = torch.ones(2, 1, 1, requires_grad=True)
    output = (leaf.half() * 30000).flatten(1)
    for size in (1e-6, 1e6):
        direction = torch.full((2, 1), size, dtype=torch.float64)
        (gradient,) = gradients_along(output, [leaf], direction)
        assert torch.allclose(gradient.double(), direction[:, :, None] * 30000, rtol=1e-2)
        (naive,) = torch.autograd.grad(output, leaf, direction.half(), retain_graph=True)
        assert not torch.allclose(naive.double(), direction[:, :, None] * 30000, rtol=1e-2)


# --- tokens, heads, steps ------------------------------------------------------------------------


def test_shares_of_heads_and_tokens_both_sum_to_those_of_layers():
    found = attribute(model("sd"), CONCEPT, seeds=[0], heads=True, **OPTIONS)
    assert found.heads.shape[:4] == (1, 1, 2, 4)
    assert np.allclose(found.heads.sum(4), found.shares.sum(4))
    assert attribute(model("sd"), CONCEPT, seeds=[0], **OPTIONS).heads is None


def test_tokens_before_the_texts_part_have_no_share():
    # CLIP reads from left to right: "a big" is the same in both.
    found = attribute(model("sd"), CONCEPT, seeds=[0], **OPTIONS)
    words = found.words[0]
    by_token = np.abs(found.shares).sum((0, 1, 2, 3))
    assert words[:7] == ("(start)", "a", "b", "i", "g", "cat", "b")
    assert by_token[:5].max() < 1e-9
    assert by_token[5] > 1e-3


def test_the_table_has_every_share_once():
    found = attribute(model("sd-3"), CONCEPT, seeds=[3], **OPTIONS)
    table = found.table
    assert list(table) == [
        *("concept", "kind", "prompt", "seed", "step", "layer", "token", "word", "share")
    ]
    assert np.isclose(table["share"].sum(), 1 - found.residual.item())
    pooled = table[table["layer"].isna()]
    assert np.allclose(pooled["share"], found.pooled.reshape(-1))
    assert set(table["seed"]) == {3}
    cell = table.query("step == 1 and layer == 2 and token == 5")["share"].item()
    assert cell == found.shares[0, 0, 1, 2, 5]


def test_the_table_of_rows_has_no_tokens():
    found = attribute(model("sd"), CONCEPT, how="rows", seeds=[0], steps=[0], **OPTIONS)
    assert found.words == ()
    assert found.table["token"].isna().all() and found.table["word"].isna().all()
    assert np.isclose(found.table["share"].sum(), 1 - found.residual.item())


def test_pooled_text_can_be_kept():
    moved = attribute(model("sd-xl"), CONCEPT, seeds=[0], **OPTIONS)
    kept = attribute(model("sd-xl"), CONCEPT, seeds=[0], pooled="keep", **OPTIONS)
    assert "pooled" in set(attribution_effect(moved)["axis"])
    assert "pooled" not in set(attribution_effect(kept)["axis"])
    assert kept.is_complete


def test_steps_count_by_how_far_the_target_moves_them():
    weights = step_weights(np.array([[3.0, 1.0], [0.0, 2.0]]))
    assert np.allclose(weights, [[0.75, 0.25], [0.0, 1.0]])


def test_a_scheduler_of_second_order_is_followed():
    from diffusers import HeunDiscreteScheduler

    pipe = copy.copy(model("sd"))
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    for how in ("gradient", "chain"):
        found = attribute(pipe, CONCEPT, how=how, seeds=[0], **OPTIONS)
        assert found.is_complete
        assert found.steps == (0, 1)


# --- effects and the proposal --------------------------------------------------------------------


def test_effects_are_like_every_localizers():
    found = attribute(model("sd"), TWO, seeds=range(2), **OPTIONS)
    effects = attribution_effect(found, window=2)
    layers = effects[effects["axis"] == "layer"]
    assert list(effects)[:8] == [
        *("method", "concept", "axis", "position", "estimate", "low", "high", "n")
    ]
    assert len(layers) == 3
    assert set(layers["n"]) == {4}
    assert (layers["low"] <= layers["estimate"]).all()
    assert np.isclose(layers["estimate"].iloc[0], found.layers[:2].sum(0).mean())
    start = int(layers.loc[layers["estimate"].idxmax(), "position"])
    assert attribution_window(found, window=2).start == start


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"how": "magic"}, "how"),
        ({"how": "rows", "heads": True}, "heads"),
        ({"points": 0}, "points"),
        ({"points": 9, "most_points": 3}, "points"),
        ({"steps": [2]}, "0 to 1"),
        ({"steps": []}, "0 to 1"),
        ({"pooled": "target"}, "pooled"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(LocogenError, match=message):
        attribute(model("sd"), CONCEPT, seeds=[0], **options, **OPTIONS)


def test_a_target_that_changes_nothing_is_refused():
    pipe = tiny.small()
    for layer in find_layers(pipe):
        deafen(pipe, layer.index)
    with pytest.raises(LocogenError, match="changes nothing"):
        attribute(pipe, CONCEPT, seeds=[0], **OPTIONS)


@pytest.mark.parametrize("name", tiny.fast("z-image", of=["z-image", "hidream"]))
def test_text_behind_the_picture_is_refused(name):
    with pytest.raises(LocogenError, match="behind the picture"):
        attribute(tiny.FAMILIES[name](), CONCEPT, seeds=[0], **OPTIONS)


@pytest.mark.parametrize("way", [Way(channels_last=True), Way(half="bfloat16")], ids=str)
def test_within_speed_it_says_what_it_says_without(way):
    pipe = tiny.small()
    options = {"how": "gradient", "seeds": [0], "bound": 0.1, **OPTIONS}
    plain = attribute(pipe, CONCEPT, **options)
    with applied(pipe, way):
        quick = attribute(pipe, CONCEPT, **options)
    assert np.allclose(quick.layers, plain.layers, atol=0.1 if way.half else 1e-4)
    assert plain.layers.max() > 0.2
    # In half precision something was computed otherwise.
    assert np.allclose(quick.layers, plain.layers, atol=1e-7) == (way.half is None)


def test_within_compiled_parts_it_is_refused():
    pipe = model("sd")
    refused = pytest.raises(LocogenError, match="use speed")
    with announced(pipe, "speed compiled"), refused:
        attribute(pipe, CONCEPT, seeds=[0], **OPTIONS)


def test_an_open_context_is_refused():
    pipe = model("sd")
    refused = pytest.raises(LocogenError, match="leave the context")
    with intervene(pipe, [Intervention(PROMPT, TARGET, (1,))]), refused:
        attribute(pipe, CONCEPT, seeds=[0], **OPTIONS)


def test_an_unknown_family_is_refused():
    with pytest.raises(UnsupportedModel):
        attribute(torch.nn.Linear(1, 1), CONCEPT, seeds=[0], **OPTIONS)


# --- as a localizer ------------------------------------------------------------------------------


def test_a_proposal_says_what_every_localizer_says():
    options = {"window": 2, "seeds": range(2), **OPTIONS}
    proposal = propose(model("sd, all layers"), CONCEPT, **options)
    assert proposal.layers.shape == (15, 1, 2)
    assert proposal.carrier.start == proposal.ranked[0]
    assert sorted(proposal.ranked) == list(range(15))
    means = proposal.layers.mean((1, 2))
    assert (np.diff(means[list(proposal.ranked)]) <= 0).all()
    *best, rival = proposal.candidates(3)
    assert tuple(best) == proposal.ranked[:3]
    assert min(abs(rival - start) for start in best) >= 2
    # Two pictures of two guided steps are 8 rows, their maps 2 steps of 2 + 3 * 3 rows each.
    assert proposal.attribution.settings["denoiser_rows"] == 8 + 2 * 2 * (2 + 3 * 3)
    assert proposal.generations == 13
