"""All layers replaced is the target's own run, and an empty plan the plain run, whatever the call is given.

The arguments are those that the pipelines document, and that can change the picture. What names them all is
checked against the signatures, so that a new argument of diffusers is not forgotten.
"""

import copy
import inspect

import numpy as np
import pytest
import torch
from support import tiny

from locogen.errors import LocogenError
from locogen.interventions.clamping import Selection, clamp
from locogen.interventions.prompts import generators, intervene, record
from locogen.models.families import encode_guided, family_of
from locogen.models.layers import find_layers
from locogen.plan import Intervention, with_target_runs

PATCHED = {
    *("sd-3", "flux", "qwen-image", "flux-2", "flux-2-klein", "chroma", "z-image", "lumina-2"),
    *("hidream", "krea-2"),
}
POOLED = {"sd-xl", "if", "sd-3", "flux", "kolors", "hidream"}
SIZE = {"height": 24, "width": 16}
SDXL_SIZES = {
    "original_size": (8, 8),
    "crops_coords_top_left": (4, 2),
    "target_size": (8, 16),
    "negative_original_size": (4, 4),
    "negative_crops_coords_top_left": (2, 2),
    "negative_target_size": (16, 16),
}


def latents(pipe, rows):
    """Noise of the user's own, as many as rows."""
    denoiser = getattr(pipe, family_of(pipe).denoiser)
    side = denoiser.config.sample_size
    shape = (1, denoiser.config.in_channels, side, side)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return {"latents": noise.expand(len(rows), *shape[1:]).clone()}


def negative_embeds(pipe, rows):
    """The negative text encoded by the user, the prompts as text."""
    text, _ = encode_guided(pipe, ["b c"])
    return text.expanded(len(rows)).arguments("negative_")


def latents_of(*shape):
    """Noise of a shape, the same for each row."""

    def noise(pipe, rows):
        one = torch.randn((1, *shape), generator=torch.Generator().manual_seed(3))
        return {"latents": one.expand(len(rows), *shape).clone()}

    return noise


packed_latents = latents_of(16, 16)


def of_each(**texts):
    """The same texts for every row of the call."""
    return lambda pipe, rows: {name: [text] * len(rows) for name, text in texts.items()}


def together(*given):
    """Several arguments in one call: each that is ignored would show."""

    def arguments(pipe, rows):
        merged = {}
        for one in given:
            merged |= one(pipe, rows) if callable(one) else one
        return merged

    return arguments


NEGATIVE = of_each(negative_prompt="b c")
PICTURES = {"num_images_per_prompt": 2}
UNGUIDED = {"guidance_scale": 1.0}
SCALE = {"cross_attention_kwargs": {"scale": 0.5}}
SIGMAS = {"sigmas": [1.0, 0.4]}
SD = {
    "what is drawn": together(
        SIZE, NEGATIVE, PICTURES, SCALE, {"eta": 0.7, "guidance_rescale": 0.7}
    ),
    "latents": together(latents, negative_embeds),
    "no guidance": together(UNGUIDED, PICTURES),
}
SDXL = {
    "what is drawn": together(
        SIZE, SDXL_SIZES, PICTURES, SCALE, {"guidance_rescale": 0.7, "denoising_end": 0.6}
    ),
    "clip_skip": together(
        latents, of_each(negative_prompt="b c", negative_prompt_2="d d"), {"clip_skip": 1}
    ),
    "prompt_2": together(of_each(prompt_2="a cat on d"), {"clip_skip": 0, "sigmas": [9.0, 2.0]}),
    "no guidance": together(UNGUIDED, of_each(prompt_2="a cat on d"), {"timesteps": [700, 200]}),
    "negative embeds": together(negative_embeds, PICTURES),
}
LCM = {
    "what is drawn": together(
        SIZE, PICTURES, SCALE, {"original_inference_steps": 40, "guidance_scale": 2.0}
    ),
    "latents": together(latents, {"timesteps": [699, 199]}),
}
IF = {
    "what is drawn": together(SIZE, NEGATIVE, PICTURES, {"clean_caption": True, "eta": 0.7}),
    "no guidance": together(UNGUIDED, SCALE, {"timesteps": [70, 20]}),
    "negative embeds": negative_embeds,
}
SD3 = {
    "what is drawn": together(
        SIZE, PICTURES, SIGMAS, {"joint_attention_kwargs": {"scale": 0.5}, "mu": 0.7}
    ),
    "texts": together(
        of_each(prompt_2="a cat on d", prompt_3="d c", negative_prompt="b c"),
        of_each(negative_prompt_2="d", negative_prompt_3="a b"),
        {"clip_skip": 1, "max_sequence_length": 32},
    ),
    "skipped layers": together(
        latents,
        {
            "skip_guidance_layers": [1],
            "skip_layer_guidance_start": -1,
            "skip_layer_guidance_stop": 1.0,
        },
        {"skip_layer_guidance_scale": 2.0},
    ),
    "no guidance": together(UNGUIDED, {"clip_skip": 1}),
}
FLUX = {
    "what is drawn": together(SIZE, PICTURES, SIGMAS, {"joint_attention_kwargs": {"scale": 0.5}}),
    "texts": together(packed_latents, of_each(prompt_2="a cat on d"), {"max_sequence_length": 32}),
    "true guidance": together(
        of_each(negative_prompt="b c", negative_prompt_2="d d"), {"true_cfg_scale": 3.0}
    ),
}
PIXART = {
    "what is drawn": together(
        SIZE, PICTURES, {"negative_prompt": "b c", "eta": 0.7, "timesteps": [700, 200]}
    ),
    "texts": together(latents, {"clean_caption": True, "max_sequence_length": 20}),
    "no guidance": together(UNGUIDED, PICTURES),
}
SANA = {
    "what is drawn": together(
        {"height": 32, "width": 64}, PICTURES, SIGMAS, {"negative_prompt": "b c"}
    ),
    "texts": {
        "clean_caption": True,
        "max_sequence_length": 20,
        "complex_human_instruction": ["a b", "c"],
    },
    "no instruction": {"complex_human_instruction": None, "attention_kwargs": {"scale": 0.5}},
    "no guidance": together(UNGUIDED, PICTURES),
}
ATTENTION = {"attention_kwargs": {"scale": 0.5}}
SHORT = {"max_sequence_length": 40}
KOLORS = {
    "what is drawn": together(SIZE, SDXL_SIZES, NEGATIVE, PICTURES, SCALE, {"denoising_end": 0.6}),
    "texts": together(latents, negative_embeds, SHORT, {"sigmas": [9.0, 2.0]}),
    "no guidance": together(UNGUIDED, {"timesteps": [700, 200]}),
}
WAN = {
    "what is drawn": together(
        {"height": 32, "width": 16}, NEGATIVE, ATTENTION, {"num_videos_per_prompt": 2}
    ),
    "texts": together(UNGUIDED, latents_of(4, 1, 8, 8), SHORT),
}
WAN22 = WAN | {"two scales": together(NEGATIVE, {"guidance_scale_2": 2.0})}
QWEN = {
    "what is drawn": together(SIZE, SIGMAS, ATTENTION),
    "true guidance": together(packed_latents, NEGATIVE, SHORT, {"true_cfg_scale": 3.0}),
}
FLUX2 = {
    "what is drawn": together(SIZE, PICTURES, SIGMAS, ATTENTION),
    "texts": together(latents_of(16, 4, 4), SHORT, {"text_encoder_out_layers": (5, 15, 25)}),
    "no guidance": UNGUIDED,
}
CHROMA = {
    "what is drawn": together(SIZE, PICTURES, SIGMAS, {"joint_attention_kwargs": {"scale": 0.5}}),
    "texts": together(packed_latents, NEGATIVE, SHORT),
    "no guidance": UNGUIDED,
}
Z_IMAGE = {
    "what is drawn": together(
        SIZE, NEGATIVE, PICTURES, SIGMAS, {"joint_attention_kwargs": {"scale": 0.5}}
    ),
    "guidance": together(
        latents_of(4, 8, 8), SHORT, {"cfg_normalization": True, "cfg_truncation": 0.5}
    ),
    "no guidance": together(UNGUIDED, PICTURES),
}
LUMINA = {
    "what is drawn": together(
        {"height": 96, "width": 64}, NEGATIVE, SIGMAS, ATTENTION, {"cfg_normalization": False}
    ),
    "texts": together(latents_of(4, 8, 8), SHORT, {"system_prompt": "b c", "cfg_trunc_ratio": 0.5}),
    "no guidance": UNGUIDED,
}
KREA2 = {
    "what is drawn": together(SIZE, NEGATIVE, PICTURES, SIGMAS, ATTENTION),
    "texts": together(latents_of(16, 16), SHORT, {"negative_prompt": "b c"}),
    "no guidance": together(PICTURES, {"guidance_scale": 0.0}),
}
HIDREAM = {
    "what is drawn": together(SIZE, NEGATIVE, PICTURES, SIGMAS, ATTENTION),  # and is not square
    "texts": together(
        of_each(prompt_2="a cat on d", prompt_3="d c", negative_prompt="b c"),
        of_each(negative_prompt_2="d", negative_prompt_3="a b", negative_prompt_4="d d"),
        together(latents_of(4, 8, 8), SHORT),
    ),
    "no guidance": together(UNGUIDED, of_each(prompt_4="d c")),
}
ARGUMENTS = {"sd": SD, "lcm": LCM, "sd-xl": SDXL, "if": IF, "sd-3": SD3, "flux": FLUX, "sana": SANA}
ARGUMENTS |= {"pixart-alpha": PIXART, "pixart-sigma": PIXART}
ARGUMENTS |= {"kolors": KOLORS, "wan": WAN, "wan-2.2": WAN22, "qwen-image": QWEN}
ARGUMENTS |= {"flux-2": FLUX2, "flux-2-klein": FLUX2, "chroma": CHROMA, "z-image": Z_IMAGE}
ARGUMENTS |= {"lumina-2": LUMINA, "hidream": HIDREAM, "krea-2": KREA2}
FAST = ("sd", "sd-xl", "flux")  # the others run in the slow tests
CASES = [
    pytest.param(name, argument, marks=() if name in FAST else pytest.mark.slow)
    for name, arguments in ARGUMENTS.items()
    for argument in arguments
]

NOT_TRIED = {
    # the prompt itself, and what is no part of the picture
    *("prompt", "num_inference_steps", "generator", "output_type", "return_dict"),
    *(
        "callback",
        "callback_steps",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "kwargs",
    ),
    # locogen.generate calls with these, and tests/interventions/test_ownership.py; Z-Image's, which
    # does not encode then, have tests of their own below
    *("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"),
    *("negative_prompt_embeds", "negative_pooled_prompt_embeds", "negative_prompt_attention_mask"),
    *("prompt_embeds_mask", "negative_prompt_embeds_mask"),
    *("prompt_embeds_t5", "negative_prompt_embeds_t5"),
    *("prompt_embeds_llama3", "negative_prompt_embeds_llama3"),
    # IP-Adapters are refused by find_layers
    *("ip_adapter_image", "ip_adapter_image_embeds"),
    *("negative_ip_adapter_image", "negative_ip_adapter_image_embeds"),
    # the size classes of real checkpoints; where the picture is only resized at the end
    "use_resolution_binning",
}
NOT_TAKEN = {  # by the family's scheduler, or by transformers' text encoder
    "sd": {"timesteps", "sigmas", "clip_skip"},
    "sd-xl": {"eta"},
    "lcm": {"clip_skip", "negative_prompt"},
    "pixart-alpha": {"sigmas"},
    "pixart-sigma": {"sigmas"},
    "sana": {"timesteps", "eta", "latents"},
    "kolors": {"eta"},
    "wan": {"guidance_scale_2"},  # of two denoisers
    # Pictures to begin with; and a prompt that the encoder makes another of.
    "flux-2": {"image", "caption_upsample_temperature"},
    "flux-2-klein": {"image"},
    # Refused where it would be wrong: see test_masks_of_several_pictures_a_prompt.
    "qwen-image": {"num_images_per_prompt"},
    "lumina-2": {"num_images_per_prompt"},
}


@pytest.fixture(scope="module")
def pipes():
    built = {}

    def of(name):
        if name not in built:
            built[name] = tiny.FAMILIES[name]()
        return built[name]

    return of


def plan(pipe, name, layers):
    texts = [("cat in a", "dog on b, a long one"), ("dog in c d", "cat")]
    if name == "lumina-2":  # whose targets are as long as their prompts
        texts = [("cat in a", "dog on b"), ("dog in c d", "cat by a b")]
    pooled = {"pooled": "target"} if layers and name in POOLED else {}
    rows = [Intervention(p, t, layers, seed, **pooled) for seed, (p, t) in enumerate(texts)]
    return with_target_runs(rows) if family_of(pipe).joint_attention else tuple(rows)


def pictures(pipe, rows, prompts, given):
    family = family_of(pipe)
    each = given.get(family.copies_argument, 1)
    accepted = inspect.signature(type(pipe).__call__).parameters
    usual = {"clean_caption": False, "use_resolution_binning": False}
    usual = {name: value for name, value in usual.items() if name in accepted}
    sized = {k: v for k, v in family.options(pipe).items() if k != "negative_prompt"}
    sized |= {"height": 32, "width": 32} if "complex_human_instruction" in accepted else {}
    steps = {} if {"timesteps", "sigmas"} & set(given) else {"num_inference_steps": 2}
    noise = generators([row for row in rows for _ in range(each)])
    options = (
        {family.guidance_argument: 5.0, "output_type": "np", "generator": noise}
        | steps
        | sized
        | usual
        | given
    )
    return family.pictures(pipe(**with_own_lists({"prompt": prompts} | options)), "np")


def resolved(given, pipe, rows):
    return given(pipe, rows) if callable(given) else given


def with_own_lists(given):
    """Z-Image's pipeline writes its template into the lists that it is given."""
    return {
        name: list(value) if isinstance(value, list) else value for name, value in given.items()
    }


def near(one, other, name):
    return np.abs(one - other).max() < 1e-5 if name in PATCHED else np.array_equal(one, other)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_all_layers_are_the_targets_own_run_and_none_the_plain_one(pipes, name, argument):
    pipe = pipes(name)
    rows = plan(pipe, name, tuple(range(len(find_layers(pipe)))))
    given = resolved(ARGUMENTS[name][argument], pipe, rows)
    prompts = [row.prompt for row in rows]
    own = pictures(pipe, rows, [row.target for row in rows], given)
    plain = pictures(pipe, rows, prompts, given)
    with intervene(pipe, rows):
        assert near(pictures(pipe, rows, prompts, given), own, name)
    nothing = [Intervention(row.prompt, row.target, (), row.seed) for row in rows]
    with intervene(pipe, nothing):
        assert np.array_equal(pictures(pipe, rows, prompts, given), plain)
    assert np.abs(own - plain).max() > 1e-4  # the twin: prompt and target make different pictures


@pytest.mark.parametrize("name", tiny.fast(*tiny.FAST, of=ARGUMENTS))
def test_every_documented_argument_is_tried(pipes, name):
    pipe = pipes(name)
    tried = (
        {"guidance_scale", *family_of(pipe).options(pipe)} | NOT_TRIED | NOT_TAKEN.get(name, set())
    )
    for given in ARGUMENTS[name].values():
        tried |= set(resolved(given, pipe, plan(pipe, name, (0,))))
    documented = set(inspect.signature(type(pipe).__call__).parameters) - {"self"}
    assert documented - tried == set()
    assert len(documented - NOT_TRIED) > 5  # the twin: there are some to try


@pytest.mark.parametrize("name", tiny.fast("qwen-image", of=["qwen-image", "lumina-2"]))
def test_masks_of_several_pictures_a_prompt_are_refused_where_they_are_wrong(pipes, name):
    """Diffusers 0.42 repeats masks in another order than texts; texts of one length it cannot confuse."""
    pipe = pipes(name)
    several = PICTURES | {family_of(pipe).guidance_argument: 1.0}
    alike = with_target_runs([Intervention("cat in a", "dog in a", (0,), 0)])
    with intervene(pipe, alike):
        pictures(pipe, alike, [row.prompt for row in alike], several)  # the twin
    rows = plan(pipe, name, (0,))
    with intervene(pipe, rows), pytest.raises(LocogenError, match="num_images_per_prompt=1"):
        pictures(pipe, rows, [row.prompt for row in rows], several)


def encoded_call(pipe, rows, of=lambda row: row.prompt, **given):
    """Pictures of prompts that were encoded before, and are given alone."""
    with torch.no_grad():
        prompts, negatives = pipe.encode_prompt([of(row) for row in rows])
    given = {"prompt_embeds": prompts, "negative_prompt_embeds": negatives} | given
    return pictures(pipe, rows, None, given)


@pytest.mark.parametrize("name", ["z-image"])
@pytest.mark.parametrize("given", [{}, {"guidance_scale": 0.0}, PICTURES], ids=str)
def test_encoded_prompts_are_followed_where_a_pipeline_does_not_encode(pipes, name, given):
    pipe = pipes(name)
    rows = plan(pipe, name, tuple(range(len(find_layers(pipe)))))
    own = encoded_call(pipe, rows, lambda row: row.target, **given)
    plain = encoded_call(pipe, rows, **given)
    with intervene(pipe, rows):
        assert near(encoded_call(pipe, rows, **given), own, name)
        # Within one context calls may bring prompts too, and encoded ones again.
        assert near(pictures(pipe, rows, [row.prompt for row in rows], given), own, name)
        assert near(encoded_call(pipe, rows, **given), own, name)
    nothing = [Intervention(row.prompt, row.target, (), row.seed) for row in rows]
    with intervene(pipe, nothing):
        assert np.array_equal(encoded_call(pipe, rows, **given), plain)
    assert np.abs(own - plain).max() > 1e-4  # the twin


CONTEXTS = {
    "intervene": intervene,
    "record": lambda pipe, rows: record(pipe),
    "clamp": lambda pipe, rows: clamp(pipe, Selection({(0, "v"): (0, 1, 2)}), to="zero"),
}


@pytest.mark.parametrize("context", CONTEXTS)
def test_lists_of_prompts_and_negative_ones_can_be_used_again(pipes, context):
    pipe = pipes("z-image")
    rows = plan(pipe, "z-image", tuple(range(len(find_layers(pipe)))))
    settings = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}

    def call(lists):
        return pipe(**lists, **settings, generator=generators(rows)).images

    def lists():
        return {"prompt": [row.prompt for row in rows], "negative_prompt": ["b c"] * len(rows)}

    used_again = lists()
    with CONTEXTS[context](pipe, rows):
        first = call(used_again)
        assert used_again == lists()
        assert np.array_equal(call(used_again), first)
    plain = lists()
    call(plain)
    # The twin: by itself, diffusers writes its template into both.
    assert all(plain[name] != lists()[name] for name in plain)


@pytest.mark.parametrize("name", ["z-image"])
def test_encoded_prompts_of_another_text_are_refused(pipes, name):
    pipe = pipes(name)
    rows = plan(pipe, name, (0,))
    with intervene(pipe, rows):
        with pytest.raises(LocogenError, match="are not what the pipeline makes of the plan's"):
            encoded_call(pipe, rows, lambda row: row.prompt[::-1])
        with torch.no_grad():
            prompts, _ = pipe.encode_prompt([row.prompt for row in rows])
        with pytest.raises(LocogenError, match="hold the same tensors"):
            encoded_call(pipe, rows, prompt_embeds=prompts, negative_prompt_embeds=prompts)
        encoded_call(pipe, rows)  # and goes on


@pytest.mark.parametrize("name", ["z-image"])
def test_encoded_prompts_are_recorded_and_clamped(pipes, name):
    pipe = pipes(name)
    rows = plan(pipe, name, ())
    with record(pipe) as by_prompts:
        pictures(pipe, rows, [row.prompt for row in rows], {})
    with record(pipe) as by_encoding:
        plain = encoded_call(pipe, rows)
    assert all(
        torch.equal(one, other)
        for layer, texts in by_prompts.items()
        for one, other in zip(texts, by_encoding[layer], strict=True)
    )
    with clamp(pipe, Selection({(0, "v"): (0, 1, 2)}), to="zero"):
        assert not np.array_equal(encoded_call(pipe, rows), plain)
    opened = []

    def open_within(pipe, step, time, tensors):
        if not opened:
            opened.append(record(pipe))
            opened[0].__enter__()
        return tensors

    try:
        with pytest.raises(LocogenError, match="began before this context was opened"):
            encoded_call(pipe, rows, callback_on_step_end=open_within)
    finally:
        opened[0].__exit__(None, None, None)


@pytest.mark.parametrize("name", ["sd-xl"])
def test_a_second_prompt_that_repeats_the_first_is_exchanged_with_it(pipes, name):
    pipe = pipes(name)
    rows = plan(pipe, name, tuple(range(len(find_layers(pipe)))))
    prompts = [row.prompt for row in rows]
    own = pictures(pipe, rows, [row.target for row in rows], {})
    with intervene(pipe, rows):
        assert np.array_equal(pictures(pipe, rows, prompts, {"prompt_2": prompts}), own)
        mixed = pictures(pipe, rows, prompts, {"prompt_2": prompts[::-1]})
    assert not np.array_equal(mixed, own)  # the twin: another text stays what it is


@pytest.mark.parametrize("name", tiny.fast("sd-3", "flux", of=["sd-3", "flux", "hidream"]))
def test_a_row_and_its_targets_run_have_the_same_other_prompt(pipes, name):
    pipe = pipes(name)
    rows = plan(pipe, name, (0,))
    prompts = [row.prompt for row in rows]
    with intervene(pipe, rows):
        pictures(pipe, rows, prompts, {"prompt_2": prompts})
        with pytest.raises(
            LocogenError,
            match="prompt_2 of 'cat in a' is 'a', and that of its target's own run is 'b'",
        ):
            pictures(pipe, rows, prompts, {"prompt_2": ["a", "a", "b", "b"]})


# --- text encoders that change -------------------------------------------------------------------


def everywhere(prompts, targets):
    return [
        Intervention(p, t, tuple(range(16)), i)
        for i, (p, t) in enumerate(zip(prompts, targets, strict=True))
    ]


def add_adapter(model, targets):
    from peft import LoraConfig

    torch.manual_seed(5)
    model.add_adapter(
        LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    )


PROMPTS = ["cat in a", "dog in c d"]
TARGETS = ["dog on b", "cat"]


def test_a_scaled_lora_of_the_text_encoder_is_in_the_targets_too():
    pipe = tiny.pipeline()
    add_adapter(pipe.text_encoder, ["q_proj", "v_proj", "fc1", "fc2"])
    rows = everywhere(PROMPTS, TARGETS)
    scaled = {"cross_attention_kwargs": {"scale": 0.2}}
    own = pictures(pipe, rows, TARGETS, scaled)
    with intervene(pipe, rows):
        assert np.array_equal(pictures(pipe, rows, PROMPTS, scaled), own)
        full = pictures(pipe, rows, PROMPTS, {})
    assert not np.array_equal(full, own)  # the twin: the scale matters


def test_an_adapter_that_is_loaded_within_the_context_is_in_the_targets_too():
    pipe = tiny.pipeline()
    rows = everywhere(PROMPTS, TARGETS)
    before = pictures(pipe, rows, TARGETS, {})
    with intervene(pipe, rows):
        add_adapter(pipe.text_encoder, ["q_proj", "v_proj", "fc1", "fc2"])
        add_adapter(pipe.unet, ["to_k", "to_v"])
        after = pictures(pipe, rows, PROMPTS, {})
    assert np.array_equal(after, pictures(pipe, rows, TARGETS, {}))
    assert not np.array_equal(after, before)


def test_an_adapter_on_hooked_matrices_within_the_context_is_refused(pipes):
    """SD 3's keys are read behind the matrix that the adapter wraps: it would be left out."""
    pipe = tiny.sd3()
    rows = plan(pipe, "sd-3", (0,))
    with (
        pytest.raises(LocogenError, match=r"to_k of layer 0 .*was replaced"),
        intervene(pipe, rows),
    ):
        add_adapter(pipe.transformer, ["add_k_proj", "add_v_proj"])
        pictures(pipe, rows, [row.prompt for row in rows], {})


def test_words_that_are_loaded_within_the_context_are_in_the_targets_too():
    pipe = copy.deepcopy(tiny.pipeline())  # its tokenizer as well: others share it
    targets = ["<new> on b", "<new>"]
    rows = everywhere(PROMPTS, targets)
    with intervene(pipe, rows):
        vectors = torch.randn(2, tiny.WIDTH, generator=torch.Generator().manual_seed(1))
        pipe.load_textual_inversion(vectors, token="<new>")
        made = pictures(pipe, rows, PROMPTS, {})
    assert np.array_equal(made, pictures(pipe, rows, targets, {}))
    assert not np.array_equal(
        made, pictures(pipe, rows, ["on b", ""], {})
    )  # the twin: the word is heard
