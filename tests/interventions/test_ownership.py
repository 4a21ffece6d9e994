"""A context belongs to its pipeline, thread and modules: nobody else's call is changed, and no hook fails silently."""

import copy
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from support import tiny

from locogen.errors import LocogenError
from locogen.interventions.clamping import Selection, clamp
from locogen.interventions.corruption import Noise, corrupted_states, corrupting
from locogen.interventions.prompts import (
    active_contexts,
    foreign_hooks,
    generators,
    intervene,
    record,
)
from locogen.interventions.states import find_states, find_text_states, restoring
from locogen.localization.attention import measuring_contributions
from locogen.models.families import encode
from locogen.models.layers import find_layers
from locogen.pictures.runs import generate
from locogen.plan import Intervention

PROMPTS = ["cat in a", "dog in c"]
TARGETS = ["dog on b", "cat"]
LAYER = 3


@pytest.fixture
def pipe():
    return tiny.small()


def twin(pipe):
    """Another pipeline of the same parts, with a scheduler of its own."""
    parts = {**pipe.components, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config)}
    return tiny.quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def plan(layers=tuple(range(4))):
    return [
        Intervention(p, t, layers, i) for i, (p, t) in enumerate(zip(PROMPTS, TARGETS, strict=True))
    ]


def pictures(pipe, prompts=PROMPTS, steps=2, **options):
    noise = generators([Intervention(p, p, (), i) for i, p in enumerate(prompts)])
    return pipe(
        prompts, generator=noise, num_inference_steps=steps, output_type="np", **options
    ).images


CONTEXTS = {
    "intervene": lambda pipe: intervene(pipe, plan()),
    "clamp": lambda pipe: clamp(pipe, Selection({(LAYER, "v"): (0, 1, 2, 3)}), to="zero"),
    "restoring": lambda pipe: restoring(pipe, [(0, ()), (0, tuple(range(len(find_states(pipe)))))]),
    "record": record,
    "attention contribution": lambda pipe: measuring_contributions(pipe, [(1,), (1,)]),
}


@pytest.fixture(params=list(CONTEXTS))
def context(request):
    return CONTEXTS[request.param]


# --- somebody else's call ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["intervene", "clamp", "restoring"])
def test_another_pipeline_of_the_same_denoiser_is_left_alone(pipe, name):
    other = twin(pipe)
    plain = pictures(other)
    with CONTEXTS[name](pipe):
        assert np.array_equal(pictures(other), plain)
        assert not np.array_equal(
            pictures(pipe), plain
        )  # the twin: the pipeline's own call is changed
        assert np.array_equal(pictures(other), plain)
        assert active_contexts(pipe)
        assert active_contexts(other) == ()


def test_nothing_is_recorded_of_another_pipelines_call(pipe):
    with record(pipe) as heard:
        pictures(twin(pipe))
        assert heard[0] == []
        pictures(pipe)
    assert len(heard[0]) == 2


def test_another_pipeline_may_be_called_between_two_steps(pipe):
    other = twin(pipe)
    own, plain = pictures(pipe, TARGETS), pictures(other)
    between = []

    def call_the_other(pipe, step, timestep, tensors):
        between.append(pictures(other))
        return tensors

    with intervene(pipe, plan()):
        assert np.array_equal(pictures(pipe, callback_on_step_end=call_the_other), own)
    assert len(between) == 2
    assert all(np.array_equal(images, plain) for images in between)


def in_threads(*tasks):
    """Run tasks at the same time; what each returned or raised."""
    results = [None] * len(tasks)

    def run(place):
        try:
            results[place] = tasks[place]()
        except LocogenError as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_threads_may_share_a_denoiser(pipe):
    """As diffusers recommends: a pipeline and a scheduler for each thread, the weights shared."""
    other = twin(pipe)
    # tokenizers 0.22 refuses two threads at once: "Already borrowed".
    other.tokenizer = copy.deepcopy(pipe.tokenizer)
    own, plain = pictures(pipe, TARGETS, 6), pictures(other, PROMPTS, 6)
    start = threading.Barrier(2)

    def changed():
        with intervene(pipe, plan()):
            start.wait()
            return pictures(pipe, PROMPTS, 6)

    def unchanged():
        start.wait()
        return pictures(other, PROMPTS, 6)

    within, beside = in_threads(changed, unchanged)
    assert np.array_equal(within, own)
    assert np.array_equal(beside, plain)


def test_the_store_keeps_another_pipelines_plain_picture_as_plain(pipe, tmp_path):
    other = twin(pipe)
    options = dict(store=tmp_path, num_inference_steps=2, progress=False, batch_size=1)
    with intervene(pipe, plan()[:1]):
        stored = np.asarray(generate(other, PROMPTS[:1], **options).pictures[0])
    assert np.array_equal(stored, np.asarray(generate(other, PROMPTS[:1], **options).pictures[0]))
    assert len(list(tmp_path.rglob("*.png"))) == 1
    fresh = generate(other, PROMPTS[:1], **{**options, "store": None})
    assert np.array_equal(stored, np.asarray(fresh.pictures[0]))


def test_a_pipeline_that_is_called_in_another_thread_is_refused(pipe):
    with intervene(pipe, plan()):
        (error,) = in_threads(lambda: pictures(pipe))
    assert isinstance(error, LocogenError)
    assert "another thread" in str(error)


def test_shared_text_encoders_are_corrupted_for_one_pipeline(pipe):
    other = twin(pipe)
    noise = Noise("noise", (1,))
    plain = encode(pipe, PROMPTS).states
    with corrupting(pipe, noise, [()]):
        assert torch.equal(encode(other, PROMPTS).states, plain)
        assert not torch.equal(encode(pipe, [PROMPTS[0]] * 2).states[1], plain[0])  # the twin


# --- contexts left in any order, and copies ------------------------------------------------------


def test_contexts_may_be_left_in_any_order(pipe):
    plain = pictures(pipe)
    first, second = ExitStack(), ExitStack()
    first.enter_context(intervene(pipe, plan((1,))))
    second.enter_context(clamp(pipe, Selection({(LAYER, "v"): (0,)}), to="zero"))
    first.close()
    second.close()
    assert "encode_prompt" not in vars(pipe)
    assert np.array_equal(pictures(pipe), plain)


def test_a_users_own_encoder_stays_where_it_was(pipe):
    plain = pipe.encode_prompt

    def users_own(*args, **kwargs):
        return plain(*args, **kwargs)

    pipe.encode_prompt = users_own
    with intervene(pipe, plan()):
        pictures(pipe)
    assert vars(pipe)["encode_prompt"] is users_own


def test_a_copy_of_a_hooked_pipeline_is_not_changed_silently(pipe, context):
    plain = pictures(pipe)
    with context(pipe):
        copied = copy.deepcopy(pipe)
    assert any("unet" in name for name in foreign_hooks(copied))
    assert foreign_hooks(pipe) == ()
    with pytest.raises(LocogenError, match="copied together with its model"):
        pictures(copied)
    assert np.array_equal(pictures(pipe), plain)
    assert np.array_equal(pictures(copy.deepcopy(pipe)), plain)  # the twin: copied outside


def test_a_copy_encodes_by_itself(pipe):
    with intervene(pipe, plan()):
        deep, shallow = copy.deepcopy(pipe), copy.copy(pipe)
    assert deep.encode_prompt.__self__ is deep
    shallow.register_modules(text_encoder=tiny.clip(seed=9), unet=tiny.small().unet)
    expected = tiny.small()
    expected.register_modules(text_encoder=shallow.text_encoder)
    assert np.array_equal(pictures(shallow), pictures(expected))


# --- hooks that do not fire ----------------------------------------------------------------------


def test_a_layer_that_is_left_out_is_named(pipe, context, monkeypatch):
    """Whatever the reason, such as code that calls the layer's parts and not the layer."""
    attention = find_layers(pipe)[LAYER].module
    find_states(pipe)  # as it was found when all were called
    block = pipe.unet.get_submodule(find_layers(pipe)[LAYER].name.rpartition(".")[0])
    monkeypatch.setattr(block, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    with pytest.raises(LocogenError, match="was not called, so nothing"), context(pipe):
        pictures(pipe)
    assert attention._forward_hooks == {}


def test_a_block_that_is_exchanged_within_a_context_is_named(pipe, context):
    with pytest.raises(LocogenError, match="was replaced while"), context(pipe):
        exchange_block(pipe)
        pictures(pipe)


def test_a_denoiser_that_is_exchanged_within_a_context_is_refused(pipe, context):
    with pytest.raises(LocogenError, match="without the hooks of this context"), context(pipe):
        pipe.unet = tiny.small().unet
        pictures(pipe)


def fail_before_the_denoiser(pipe):
    """As a user does who gives too few generators, and goes on in the same context."""
    with pytest.raises(ValueError, match="list of generators of length 1"):
        pipe(PROMPTS, generator=generators(plan()[:1]), num_inference_steps=2)


def test_a_call_that_failed_between_encoder_and_denoiser_is_no_call_past_the_hooks(pipe, context):
    with context(pipe):
        fail_before_the_denoiser(pipe)


def test_after_a_failed_call_the_next_one_is_changed_as_ever(pipe):
    own = pictures(pipe, TARGETS)
    with intervene(pipe, plan()):
        fail_before_the_denoiser(pipe)
        assert np.array_equal(pictures(pipe), own)
        fail_before_the_denoiser(pipe)


def test_a_failed_call_hides_no_denoiser_that_was_exchanged(pipe):
    """The twin: a call that ended well, and ran past the hooks, is named all the same."""
    with pytest.raises(LocogenError, match="without the hooks of this context"), record(pipe):
        unet = pipe.unet
        pipe.unet = tiny.small().unet
        pictures(pipe)
        pipe.unet = unet
        fail_before_the_denoiser(pipe)


def test_a_text_encoder_that_leaves_out_a_state_is_named(pipe, monkeypatch):
    state = find_text_states(pipe)[1]
    parent = pipe.text_encoder.get_submodule(state.name.partition(".")[2].rpartition(".")[0])
    monkeypatch.setattr(parent, "forward", lambda hidden_states, *args, **kwargs: hidden_states)
    with pytest.raises(LocogenError, match=r"text .* was not called when prompts were encoded"):
        corrupted_states(pipe, "cat in a", Noise("noise", (1,)), [((1, 1),)])


def exchange_block(pipe):
    """Put other weights in the place of an up block's transformer."""
    torch.manual_seed(7)
    block = pipe.unet.up_blocks[1].attentions[1]
    other = copy.deepcopy(block)
    for weight in other.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    pipe.unet.up_blocks[1].attentions[1] = other


def test_a_layer_that_is_added_within_a_context_is_named(pipe, context):
    blocks = pipe.unet.up_blocks[1].attentions[1].transformer_blocks
    added = tiny.small().unet.up_blocks[1].attentions[1].transformer_blocks[0]
    with context(pipe):
        blocks.append(added)
        with pytest.raises(
            LocogenError, match=r"transformer_blocks\.1\.attn2 was added.* open the"
        ):
            pictures(pipe)
        del blocks[-1]
        pictures(pipe)  # the twin: the model as it was at the opening
    blocks.append(added)
    with context(pipe):  # and one that was there at the opening
        pictures(pipe)


def test_layers_and_states_of_an_exchanged_block_are_found_anew(pipe):
    layers, states = find_layers(pipe), find_states(pipe)
    assert find_layers(pipe) is layers
    assert find_states(pipe) is states  # remembered, as long as nothing changes
    exchange_block(pipe)
    own = pictures(pipe, TARGETS)
    with intervene(pipe, plan()):
        assert np.array_equal(pictures(pipe), own)
    modules = dict(pipe.unet.named_modules())
    assert all(modules[layer.name] is layer.module for layer in find_layers(pipe))
    assert all(modules[state.name] is state.module for state in find_states(pipe))


def test_text_states_of_an_exchanged_encoder_layer_are_found_anew(pipe):
    state = find_text_states(pipe)[0]
    parent = pipe.text_encoder.get_submodule(state.name.partition(".")[2].rpartition(".")[0])
    parent.self_attn = copy.deepcopy(parent.self_attn)
    assert find_text_states(pipe)[0].module is parent.self_attn


def test_what_is_recorded_is_a_copy(pipe):
    def overwrite(module, args, kwargs):
        kwargs["encoder_hidden_states"].zero_()

    with record(pipe) as heard:
        handle = find_layers(pipe)[0].module.register_forward_pre_hook(overwrite, with_kwargs=True)
        try:
            pictures(pipe)
        finally:
            handle.remove()
    assert heard[0][0].abs().max() > 0


# --- prompts that are not the plan's -------------------------------------------------------------


def test_prompts_in_another_order_than_the_plans_are_refused(pipe):
    with (
        pytest.raises(LocogenError, match=r"prompt 0 of the call is 'dog in c'"),
        intervene(pipe, plan()),
    ):
        pictures(pipe, PROMPTS[::-1])


def test_one_prompt_may_be_several_rows_of_the_plan(pipe):
    rows = [
        Intervention(PROMPTS[0], target, tuple(range(4)), i) for i, target in enumerate(TARGETS)
    ]
    own = pictures(pipe, TARGETS)
    with intervene(pipe, rows):
        images = pipe(
            PROMPTS[0],
            num_images_per_prompt=2,
            generator=generators(rows),
            num_inference_steps=2,
            output_type="np",
        ).images
    assert np.array_equal(images, own)


def from_embeds(pipe, states, **options):
    noise = generators(plan())
    return pipe(
        prompt_embeds=states, generator=noise, num_inference_steps=2, output_type="np", **options
    ).images


def test_embeds_that_the_pipeline_would_not_make_need_targets(pipe):
    """How they were made is not known, so that targets cannot be made in the same way."""
    own_way = pipe.encode_prompt(PROMPTS, "cpu", 1, False)[0]
    own = pictures(pipe, TARGETS)
    with intervene(pipe, plan()):
        assert np.array_equal(from_embeds(pipe, own_way), own)
        for embeds in (1.1 * own_way, own_way.flip(0)):
            with pytest.raises(LocogenError, match="targets="):
                from_embeds(pipe, embeds)


def test_embeds_must_agree_with_the_targets_where_they_are_of_one_text(pipe):
    rows = [Intervention("cat", "dog", (1,), 0), Intervention("dog", "cat", (1,), 1)]
    prompts, targets = encode(pipe, ["cat", "dog"]), encode(pipe, ["dog", "cat"])
    with intervene(pipe, rows, targets=targets):
        from_embeds(pipe, prompts.states)
        with pytest.raises(LocogenError, match="are not those of targets="):
            from_embeds(pipe, targets.states)


def test_embeds_of_other_prompts_are_refused_with_targets_too(pipe):
    targets = encode(pipe, TARGETS)
    others = encode(pipe, ["dog in c", "a b"])
    with intervene(pipe, plan(), targets=targets):
        from_embeds(pipe, encode(pipe, PROMPTS).states)
        with pytest.raises(LocogenError, match="are not what the pipeline makes of the plan's"):
            from_embeds(pipe, others.states)
        pipe.text_encoder = None  # the twin: nothing can be compared
        from_embeds(pipe, others.states, guidance_scale=1.0)


@pytest.mark.filterwarnings("ignore:hooks or methods that are not locogen's")
def test_what_generate_has_encoded_is_not_encoded_again_to_compare(pipe, monkeypatch):
    encoded = []
    forward = pipe.text_encoder.forward

    def counted(input_ids, **options):
        encoded.append(len(input_ids))
        return forward(input_ids, **options)

    monkeypatch.setattr(pipe.text_encoder, "forward", counted)
    generate(pipe, plan(), num_inference_steps=1, guidance_scale=1.0, progress=False)
    assert encoded == [1] * 2 * len({*PROMPTS, *TARGETS})  # each with the negative prompt
    with intervene(pipe, plan(), targets=encode(pipe, TARGETS)):
        embeds = encode(pipe, PROMPTS).states
        encoded.clear()
        from_embeds(pipe, embeds, guidance_scale=1.0)
    assert encoded == [len(PROMPTS)]  # the twin: a user's own call


# --- prompts that a callback exchanges -----------------------------------------------------------


def exchanging(change):
    """The arguments of a call whose callback changes the encoded prompts behind the first step."""

    def callback(pipe, step, timestep, tensors):
        return {"prompt_embeds": change(pipe, tensors["prompt_embeds"])} if step == 0 else {}

    names = ["prompt_embeds"]
    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}


def without_guidance(pipe, embeds):
    pipe._guidance_scale = 0.0
    return embeds[2:]


def test_prompts_that_a_callback_exchanges_are_refused(pipe):
    states = encode(pipe, TARGETS).states

    def others(pipe, embeds):
        return torch.cat([embeds[:2], states])

    with (
        intervene(pipe, plan((1, 2))),
        pytest.raises(LocogenError, match=r"replaced at step 1.*callback_on_step_end"),
    ):
        pictures(pipe, steps=3, **exchanging(others))
    with record(pipe) as texts:  # the twin: what is only recorded may change
        pictures(pipe, steps=3, **exchanging(others))
    assert not torch.equal(texts[0][0], texts[0][1])


@pytest.mark.parametrize("change", [without_guidance, lambda pipe, embeds: embeds.clone()])
def test_a_callback_may_hand_over_the_same_prompts_in_another_tensor(pipe, change):
    """As one that turns guidance off after some steps does."""
    own = pictures(pipe, TARGETS, steps=3, **exchanging(change))
    with intervene(pipe, plan()):
        assert np.array_equal(pictures(pipe, steps=3, **exchanging(change)), own)


def test_without_a_text_encoder_targets_are_asked_for(pipe):
    prompts, targets = encode(pipe, PROMPTS), encode(pipe, TARGETS)
    own = from_embeds(pipe, targets.states, guidance_scale=1.0)
    pipe.text_encoder = None
    with pytest.raises(LocogenError, match=r"no text encoder.*targets="), intervene(pipe, plan()):
        pass
    with intervene(pipe, plan(), targets=targets):
        assert np.array_equal(from_embeds(pipe, prompts.states, guidance_scale=1.0), own)
