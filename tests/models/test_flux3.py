"""FLUX.3, which diffusers has in modular blocks only: its layers, in calls that others make."""

from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch

from locogen.editing.edit import fit_edit
from locogen.errors import LocogenError, UnsupportedModel
from locogen.interventions.clamping import Selection, clamp
from locogen.interventions.prompts import generators, intervene, record
from locogen.localization.attribution.attribute import attribute
from locogen.models.families import encode, family_of
from locogen.models.layers import find_layers, possible_layers
from locogen.models.load import load
from locogen.models.text import PromptEncoding
from locogen.pictures.runs import generate
from locogen.plan import Concept, Intervention, PromptPair, with_target_runs

if not hasattr(diffusers, "Flux3Transformer2DModel"):
    pytest.skip("this version of diffusers has no FLUX.3", allow_module_level=True)

from support import flux3

PROMPT, TARGET, OTHER = "a cat in b", "a dog", "b c d"
EVERY = (0, 1, 2)


def plan(layers):
    """A row of the prompt, and the target's own run beside it."""
    rows = with_target_runs([Intervention(PROMPT, TARGET, EVERY, seed=0)])
    return (replace(rows[0], layers=layers), *rows[1:])


@pytest.fixture(scope="module")
def denoiser():
    return flux3.denoiser()


# --- in a loop of one's own ----------------------------------------------------------------------


def texts(*seeds, tokens=5):
    """Text as an encoder might give it, a row a seed."""
    drawn = [torch.randn(tokens, 32, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return PromptEncoding(torch.stack(drawn))


@torch.no_grad()
def called(denoiser, states, *, reference=False):
    """Two steps of a loop; every row begins with the same picture, and has the same reference."""
    count, tokens = states.shape[:2]
    noise = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    latents = noise[0].expand(count, -1, -1)
    places = torch.zeros(4, 4)
    places[:, 1] = torch.arange(4)
    positions = torch.zeros(tokens, 4)
    positions[:, 3] = torch.arange(tokens)
    more = {}
    if reference:
        more["image_cond_hidden_states"] = noise[1].expand(count, -1, -1)
        more["image_cond_ids"] = places - torch.tensor([0, 0, 0, 1])
    for time, to in ((1.0, 0.5), (0.5, 0.0)):
        if denoiser.config.flow_map:
            more["target_timestep"] = torch.full((count,), to)
        velocity = denoiser(
            hidden_states=latents,
            encoder_hidden_states=states,
            timestep=torch.full((count,), time),
            img_ids=places,
            txt_ids=positions,
            **more,
        ).sample
        latents = latents + (to - time) * velocity
    return latents


@pytest.mark.parametrize("distilled", [False, True])
def test_its_layers_are_the_joint_blocks_in_order(distilled):
    model = flux3.denoiser(flow_map=distilled)
    layers = find_layers(model)
    assert [one.name for one in layers] == [f"single_transformer_blocks.{i}.attn" for i in EVERY]
    assert all(layer.joined for layer in layers)
    # The twin: its other blocks have the same matrices, and read text or picture alone.
    others = {name.split(".")[0] for name in possible_layers(model).values()}
    assert others == {"mode_blocks", "txt_mode_blocks", "single_transformer_blocks"}


@pytest.mark.slow
def test_it_has_28_layers_by_the_defaults_of_its_class():
    with torch.device("meta"):
        model = diffusers.Flux3Transformer2DModel()
    assert len(find_layers(model)) == model.config.num_single_layers == 28
    assert len(model.txt_mode_blocks) == 5  # a part of the encoding


def test_an_empty_plan_is_the_plain_call(denoiser):
    both = texts(1, 2)
    plain = called(denoiser, both.states)
    made = {}
    for layers in ((), (1,)):
        with intervene(denoiser, plan(layers), targets=both, rows=range(2)):
            made[layers] = called(denoiser, both.states)
    assert torch.equal(made[()], plain)
    assert not torch.equal(made[1,], plain)  # the twin


@pytest.mark.slow
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("distilled", [False, True])
def test_all_layers_are_the_targets_own_run(distilled, reference):
    """With pictures as references too, which stand behind the picture."""
    model = flux3.denoiser(flow_map=distilled)
    both = texts(1, 2)
    own = called(model, both.states[[1, 1]], reference=reference)[0]
    away = {}
    for layers in ((), (1, 2), (0, 1), EVERY):
        with intervene(model, plan(layers), targets=both, rows=range(2)):
            made = called(model, both.states, reference=reference)
        away[layers] = (made[0] - own).abs().max()
        assert (made[1] - own).abs().max() < 1e-5  # the target's own run is left alone
    assert away[EVERY] < 1e-5
    assert min(away[()], away[1, 2], away[0, 1]) > 1e-4  # the twins: one layer short


@pytest.mark.slow
def test_the_picture_keeps_its_own_keys_and_values(denoiser):
    both = texts(1, 2)
    seen = []
    for layers in ((), (1,)):
        with intervene(denoiser, plan(layers), targets=both, rows=range(2)):
            matrix = find_layers(denoiser)[1].module.to_v
            noted = matrix.register_forward_hook(lambda _module, _args, out: seen.append(out))
            called(denoiser, both.states)
            noted.remove()
    plain, made = seen[0], seen[2]  # in the first step: (rows, tokens of text and picture, width)
    assert torch.equal(made[0, :5], plain[1, :5]) and torch.equal(made[0, 5:], plain[0, 5:])
    assert not torch.equal(plain[0, :5], plain[1, :5])  # the twins
    assert not torch.equal(plain[0, 5:], plain[1, 5:])


@pytest.mark.slow
def test_only_the_rows_that_are_named_change(denoiser):
    states = texts(3, 1, 2, 3).states
    plain = called(denoiser, states)
    for rows in (range(1, 3), texts(1, 2), lambda call: range(1, 3)):
        with intervene(denoiser, plan(EVERY), targets=texts(1, 2), rows=rows):
            made = called(denoiser, states)
        changed = [not torch.equal(*pair) for pair in zip(made, plain, strict=True)]
        assert changed == [False, True, False, False]
    with intervene(denoiser, plan(EVERY), targets=texts(1, 2), rows=range(2)):  # the twin
        made = called(denoiser, states)
    changed = [not torch.equal(*pair) for pair in zip(made, plain, strict=True)]
    assert changed == [True, False, False, False]
    with (
        pytest.raises(LocogenError, match="no call of the denoiser held the prompts"),
        intervene(denoiser, plan(EVERY), targets=texts(1, 2), rows=texts(1, 4)),
    ):
        called(denoiser, states)


@pytest.mark.slow
def test_record_has_the_text_that_each_layer_reads(denoiser):
    both = texts(1, 2)
    plain = called(denoiser, both.states)
    with record(denoiser, rows=range(2)) as heard:
        assert torch.equal(called(denoiser, both.states), plain)
    assert sorted(heard) == list(EVERY)
    assert all(len(calls) == 2 for calls in heard.values())
    assert all(states.shape == (2, 5, 32) for calls in heard.values() for states in calls)
    # To the first layer text comes from blocks of its own, which hear neither picture nor time.
    assert torch.equal(heard[0][0], heard[0][1])
    assert not torch.equal(heard[1][0], heard[1][1])  # the twin: then both are heard
    with record(denoiser, rows=range(1)) as alone:
        called(denoiser, texts(2).states)
    assert (alone[0][0][0] - heard[0][0][1]).abs().max() < 1e-5
    assert (alone[0][0][0] - heard[0][0][0]).abs().max() > 1e-2  # the twin: of another prompt


@pytest.mark.slow
def test_clamped_neurons_are_of_text_in_named_rows(denoiser):
    states = texts(1, 2).states
    plain = called(denoiser, states)
    some = Selection({(1, "v"): tuple(range(32))})
    layer = find_layers(denoiser)[1].module
    seen = []
    with clamp(denoiser, some, to="zero", rows=range(1)):
        noted = layer.to_v.register_forward_hook(lambda _module, _args, out: seen.append(out))
        made = called(denoiser, states)
        noted.remove()
    assert not torch.equal(made[0], plain[0])
    assert torch.equal(made[1], plain[1])
    values = seen[0]  # (rows, tokens of text and picture, width)
    assert not values[0, :5].any()
    assert values[0, 5:].any(-1).all() and values[1].any(-1).all()  # the twins: picture, other row
    with clamp(denoiser, some, to=1.0, rows=range(1)):  # the twin: times one is nothing
        assert torch.equal(called(denoiser, states), plain)


@pytest.mark.slow
def test_fused_projections_are_refused():
    model = flux3.denoiser()
    both = texts(1, 2)
    model.fuse_qkv_projections()
    with (
        pytest.raises(LocogenError, match="unfuse_qkv_projections"),
        intervene(model, plan(EVERY), targets=both, rows=range(2)),
    ):
        pass
    model.unfuse_qkv_projections()
    with intervene(model, plan(EVERY), targets=both, rows=range(2)):  # the twin
        called(model, both.states)


# --- through the modular pipeline ----------------------------------------------------------------


@pytest.fixture(scope="module")
def reader():
    return flux3.reader()


def drawn(pipe, reader, states, **more):
    """Pictures of encoded prompts, guided unless the model is distilled."""
    if not pipe.transformer.config.flow_map:
        more["negative_prompt_embeds"] = flux3.read(reader, [""] * len(states))
    size = {"num_inference_steps": 2, "height": 16, "width": 16}
    return pipe(
        prompt_embeds=states,
        generator=generators(plan(())),
        output_type="np",
        output="images",
        **(size | more),
    )


@pytest.mark.slow
@pytest.mark.parametrize("distilled", [False, True])
def test_all_layers_of_its_modular_pipeline_are_the_targets_run(reader, distilled):
    """Of guidance's two calls the one for the negative prompt is left alone."""
    pipe = flux3.pipeline(distilled=distilled)
    assert family_of(pipe).name == "FLUX.3"
    prompts, targets = (
        PromptEncoding(flux3.read(reader, two)) for two in ((PROMPT, TARGET), (TARGET, TARGET))
    )
    own = drawn(pipe, reader, targets.states)[0]
    away = {}
    for layers in ((), (1, 2), EVERY):
        with intervene(pipe, plan(layers), targets=targets, rows=prompts):
            away[layers] = np.abs(drawn(pipe, reader, prompts.states)[0] - own).max()
    assert away[EVERY] < 1e-5
    assert min(away[()], away[1, 2]) > 1e-4  # the twins


@pytest.mark.slow
def test_steps_of_its_modular_pipeline_are_its_schedulers(reader):
    pipe = flux3.pipeline()
    prompts = PromptEncoding(flux3.read(reader, (PROMPT, TARGET)))
    made = {}
    for span in (None, (0, 1), (0, 0), (1, 1)):
        rows = with_target_runs([Intervention(PROMPT, TARGET, EVERY, seed=0, timesteps=span)])
        with intervene(pipe, rows, targets=prompts, rows=prompts):
            made[span] = drawn(pipe, reader, prompts.states)
    assert np.array_equal(made[None], made[0, 1])
    assert not np.array_equal(made[0, 0], made[1, 1])  # the twin


@pytest.mark.slow
def test_its_steps_are_known_in_bfloat16_which_rounds_their_times(reader):
    """There the time that the denoiser is called with may be nearer to that of another step."""
    pipe = flux3.pipeline()
    pipe.vae.to(torch.bfloat16)
    pipe.transformer.to(torch.bfloat16)
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("norm_q", "norm_k")):
            module.float()  # as `from_pretrained` leaves them
    find_layers(pipe)  # whose dry run is no step
    texts = PromptEncoding(flux3.read(reader, (PROMPT, TARGET)).bfloat16())
    made, times = [], []

    def note(module, args, kwargs, output):
        made.append(output[0][0])
        times.append(1000 * float(kwargs["timestep"][0]))

    pipe.transformer.register_forward_hook(note, with_kwargs=True)
    for layers in ((), EVERY):
        rows = [Intervention(PROMPT, TARGET, layers, 0, timesteps=(2, 2)), plan(EVERY)[1]]
        with intervene(pipe, rows, targets=texts, rows=texts):
            drawn(pipe, reader, texts.states, num_inference_steps=50)
    differ = [not torch.equal(*pair) for pair in zip(made[:100], made[100:], strict=True)]
    assert differ.index(True) // 2 == 2  # guidance makes two calls a step
    steps = pipe.scheduler.timesteps.tolist()
    nearest = min(range(50), key=lambda step: abs(steps[step] - times[2 * 2]))
    assert nearest == 3  # the twin: by the number alone it is another step


@pytest.mark.slow
def test_its_encoder_says_the_same_within_a_call_and_before_it(reader):
    whole = flux3.pipeline(reader=reader)
    text = {"prompt": PROMPT, "text_encoder_out_layers": flux3.LAYERS_OF_TEXT}
    noise = {"generator": torch.Generator().manual_seed(0), "output": "images"}
    size = {"num_inference_steps": 1, "height": 16, "width": 16}
    for prompt in (PROMPT, OTHER):
        rows = PromptEncoding(flux3.read(reader, [prompt]))
        if prompt == OTHER:  # the twin
            with pytest.raises(LocogenError, match="no call"), record(whole, rows=rows):
                whole(**text, **noise, **size)
            continue
        with record(whole, rows=rows) as heard:
            whole(**text, **noise, **size)
        assert [len(calls) for calls in heard.values()] == [2, 2, 2]  # guidance's second one too


@pytest.mark.slow
def test_prompts_of_one_window_can_be_stacked_and_others_not(reader):
    """Its encoder pads to multiples of 80 tokens, which the denoiser reads."""
    lengths = [flux3.read(reader, [text]).shape[1] for text in (PROMPT, TARGET, "b " * 60)]
    assert lengths == [80, 80, 160]


# --- what it does not do -------------------------------------------------------------------------


@pytest.mark.parametrize("bare", [False, True])
def test_verbs_that_make_pictures_of_prompts_refuse_it_by_name(bare):
    concept = Concept("cat", "object", [PromptPair(PROMPT, TARGET)])
    model = flux3.denoiser() if bare else flux3.pipeline()
    verbs = (
        lambda: encode(model, [PROMPT]),
        lambda: generate(model, [PROMPT], store=None, progress=False),
        lambda: fit_edit(model, concept, layers=EVERY),
        lambda: attribute(model, concept),
    )
    for verb in verbs:
        with pytest.raises(UnsupportedModel, match=r"FLUX\.3.*Flux3TextEncoderStep.*rows="):
            verb()


def test_a_call_that_nobody_explains_asks_for_rows():
    pipe = flux3.pipeline()
    both = texts(1, 2)
    with (
        pytest.raises(LocogenError, match="say by rows="),
        intervene(pipe, plan(EVERY), targets=both),
    ):
        called(pipe.transformer, both.states)


def test_an_entry_of_it_is_refused(tmp_path):
    text = '[models.a]\nid = "x/y"\nfamily = "Flux3ModularPipeline"'
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(UnsupportedModel, match="a is a Flux3ModularPipeline: supported are"):
        load("a", file=tmp_path / "own.toml")
