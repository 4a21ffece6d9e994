"""Theorems for every family: an empty plan is the plain pipeline, a full one the target's run, rows keep apart."""

import copy
import inspect
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from support import full, tiny

from locogen.errors import LocogenError, UnsupportedModel
from locogen.interventions.denoiser_calls import Call
from locogen.interventions.layer_inputs import LayerInputs
from locogen.interventions.prompts import _Patched, foreign_hooks, generators, intervene, record
from locogen.models.denoisers import check_call
from locogen.models.families import (
    FAMILIES,
    denoiser_of,
    encode,
    family_of,
    subject_positions,
    token_spans,
)
from locogen.models.layers import find_layers, gets_text
from locogen.pictures import description
from locogen.pictures.fingerprint import fingerprint
from locogen.plan import Intervention, with_target_runs

POOLED = {"sd-xl", "if", "sd-3", "flux", "kolors", "hidream"}
PATCHED = {
    *("sd-3", "flux", "qwen-image", "flux-2", "flux-2-klein", "chroma", "z-image", "lumina-2"),
    *("hidream", "krea-2"),
}
APART = {
    "qwen-image",
    "wan",
    "flux-2-klein",
    "chroma",
    "krea-2",
    "lumina-2",
    "wan-2.2",
}  # guided by a call of its own for the negative prompt
CAUSAL = {
    *("sd", "sd-xl", "sana", "qwen-image", "kolors", "flux-2", "flux-2-klein", "z-image"),
    *("lumina-2", "krea-2"),
}
GUIDANCES = [5.0, 1.0]
TEXTS = [
    ("cat in a", "dog on b, a long one"),
    ("dog in c d", "cat"),
]  # of unequal length: masks matter
EVEN = [("cat in a", "dog on b"), ("dog in c d", "cat by a b")]  # a target as long as its prompt


@pytest.fixture(scope="module")
def pipes():
    made = {}

    def of(name):
        if name not in made:
            made[name] = tiny.FAMILIES[name]()
        return made[name]

    return of


@pytest.fixture(params=tiny.fast(*tiny.FAST))
def name(request):
    return request.param


@pytest.fixture
def pipe(pipes, name):
    return pipes(name)


def options(pipe):
    return {k: v for k, v in family_of(pipe).options(pipe).items() if k != "negative_prompt"}


def scale(pipe, guidance):
    """The number by which a pipeline is told a scale of guidance; 1 is none."""
    # Krea 2 adds what guides it to the prompt's own run, and 0 is none.
    return guidance - 1 if type(pipe).__name__ == "Krea2Pipeline" else guidance


def pictures(pipe, rows, *, prompts=None, guidance=5.0, each=1, steps=2, **more):
    noise = generators([row for row in rows for _ in range(each)])
    plain = (
        {"clean_caption": False}
        if "clean_caption" in inspect.signature(type(pipe).__call__).parameters
        else {}
    )
    family = family_of(pipe)
    if family.guidance_argument == "true_cfg_scale" and guidance > 1:
        plain["negative_prompt"] = [" "] * len(rows)
    output = pipe(
        prompt=prompts or [row.prompt for row in rows],
        generator=noise,
        num_inference_steps=steps,
        output_type="np",
        **{family.guidance_argument: scale(pipe, guidance), family.copies_argument: each},
        **options(pipe),
        **plain,
        **more,
    )
    return family.pictures(output, "np")


def texts_of(pipe):
    return EVEN if type(pipe).__name__ == "Lumina2Pipeline" else TEXTS


def plan(pipe, layers, count=2, **more):
    texts = texts_of(pipe)[:count]
    rows = [Intervention(p, t, layers, seed, **more) for seed, (p, t) in enumerate(texts)]
    return with_target_runs(rows) if family_of(pipe).joint_attention else tuple(rows)


def every(pipe):
    return tuple(range(len(find_layers(pipe))))


def all_of_it(name):
    return {"pooled": "target"} if name in POOLED else {}


def near(a, b, name):
    """Equal to the bit where the same numbers are computed in the same places; patched rows stand elsewhere."""
    return np.abs(a - b).max() < 1e-5 if name in PATCHED else np.array_equal(a, b)


def test_each_is_built_in_under_two_seconds(name):
    start = time.monotonic()
    tiny.FAMILIES[name]()
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_an_empty_plan_is_the_plain_pipeline_to_the_bit(pipe, guidance):
    rows = plan(pipe, ())
    plain = pictures(pipe, rows, guidance=guidance)
    with intervene(pipe, rows):
        assert np.array_equal(pictures(pipe, rows, guidance=guidance), plain)
    changed = plan(pipe, every(pipe)[1:])
    with intervene(pipe, changed):  # the twin: a real intervention does change the pictures
        assert np.abs(pictures(pipe, changed, guidance=guidance)[:2] - plain[:2]).max() > 1e-4


@pytest.mark.parametrize("guidance", GUIDANCES)
def test_all_layers_and_the_pooled_path_are_the_targets_own_run(pipe, name, guidance):
    rows = plan(pipe, every(pipe), **all_of_it(name))
    own = pictures(pipe, rows, prompts=[row.target for row in rows], guidance=guidance)
    with intervene(pipe, rows):
        assert near(pictures(pipe, rows, guidance=guidance), own, name)
    short = plan(pipe, every(pipe)[:-1], **all_of_it(name))
    with intervene(pipe, short):  # one layer short is another picture
        assert np.abs(pictures(pipe, short, guidance=guidance)[:2] - own[:2]).max() > 1e-5


def test_without_the_pooled_path_it_is_not(pipes):
    """Why not: the pooled vector goes into every block beside the layers, and still tells the prompt."""
    for name in sorted(POOLED - set(tiny.RECENT)):
        pipe = pipes(name)
        kept = plan(pipe, every(pipe))
        own = pictures(pipe, kept, prompts=[row.target for row in kept])
        with intervene(pipe, kept):
            assert np.abs(pictures(pipe, kept)[:2] - own[:2]).max() > 1e-5, name
        alone, plain = plan(pipe, (), pooled="target"), pictures(pipe, plan(pipe, ()))
        with intervene(pipe, alone):  # and the pooled path alone already makes a difference
            assert np.abs(pictures(pipe, alone)[:2] - plain[:2]).max() > 1e-5, name


def test_no_pooled_path_is_said(pipes):
    for name in sorted(set(tiny.FAST) - POOLED):
        pipe = pipes(name)
        with (
            pytest.raises(LocogenError, match="leave out pooled"),
            intervene(pipe, plan(pipe, (0,), pooled="target")),
        ):
            pass


def test_windows_in_one_batch_equal_separate_runs(pipe):
    """As nearly as plain pictures made in a batch equal those made alone: sums in another order, nothing else."""
    starts = every(pipe)[-5:]
    count, rows = len(starts), [Intervention(*texts_of(pipe)[0], (start,), 7) for start in starts]
    ride = with_target_runs(rows) if family_of(pipe).joint_attention else rows
    sums = np.abs(pictures(pipe, ride)[0] - pictures(pipe, rows[:1])[0]).max()
    with intervene(pipe, ride):
        together = pictures(pipe, ride)[:count]
    apart = []
    for row in rows:
        one = with_target_runs([row]) if family_of(pipe).joint_attention else [row]
        with intervene(pipe, one):
            apart.append(pictures(pipe, one)[0])
    bound = 1e-5 + 4 * sums
    assert bound < 1e-3
    assert np.abs(together - np.stack(apart)).max() < bound
    assert (
        min(np.abs(apart[i] - apart[i + 1]).max() for i in range(count - 1)) > 10 * bound
    )  # the twin: windows differ


def test_only_the_windows_conditional_rows_change(pipe, name):
    """Two layers hear the target, in the conditional half; the mask comes along. Patched ones: keys and values."""
    chosen = (0, len(every(pipe)) - 1)
    rows = plan(pipe, chosen)
    plain = [Intervention(row.prompt, row.target, (), row.seed) for row in rows]
    before, after = read(pipe, rows, plain), read(pipe, rows, rows)
    negative = 0 if name in {"flux", "lcm", "flux-2"} | APART else len(rows)
    if name == "z-image":  # whose negative rows are the last ones
        before, after = (
            {index: torch.cat([was[negative:], was[:negative]]) for index, was in each.items()}
            for each in (before, after)
        )
    if name in ("z-image", "hidream"):  # whose text is the last one
        before, after = (
            {index: was.flip(1) for index, was in each.items()} for each in (before, after)
        )
    own = [i for i in range(len(rows)) if rows[i].layers]
    for index, was in before.items():
        now = after[index]
        assert torch.equal(was[:negative], now[:negative])
        if index not in chosen and name not in PATCHED:
            assert torch.equal(was, now)
        elif index in chosen:
            assert not torch.equal(was[negative:][own], now[negative:][own])
    if (
        name in PATCHED
    ):  # in the window, rows read what the targets' own runs read; those runs are as they would be
        riding = [i for i in range(len(rows)) if not rows[i].layers]
        for index in chosen:
            text = encode(pipe, [row.prompt for row in rows])
            tokens = text.places
            if name == "lumina-2":  # the picture follows where the shortest text ends
                tokens = int(text.mask.sum(1).min())
            assert torch.equal(
                after[index][negative:][own, :tokens], after[index][negative:][riding, :tokens]
            )
        assert torch.allclose(
            before[chosen[1]][negative:][riding], after[chosen[1]][negative:][riding], atol=1e-5
        )


def read(pipe, rows, active):
    """What the key matrix of each layer puts out in the first step."""
    found, handles = {}, []
    with intervene(pipe, active):
        for layer in find_layers(pipe):
            matrix = family_of(pipe).matrices(layer.module)["k"]
            columns = family_of(pipe).columns(layer.module)["k"]

            def note(module, args, output, index=layer.index, columns=columns):
                found.setdefault(
                    index, output[..., columns]
                )  # and nothing returned: that would be the layer's new output

            handles.append(matrix.register_forward_hook(note))
        try:
            pictures(pipe, rows, steps=2)
        finally:
            for handle in handles:
                handle.remove()
    return found


@pytest.mark.parametrize("name", ["pixart-alpha", "pixart-sigma", "sana"])
def test_masks_are_exchanged_with_the_text(pipes, name, monkeypatch):
    """Bitwise equality with the target's own run needs it: without the mask it fails."""
    from locogen.interventions import prompts as hooks

    pipe = pipes(name)
    rows = plan(pipe, every(pipe))
    assert not torch.equal(*(encode(pipe, [text]).mask for text in TEXTS[0]))
    own = pictures(pipe, rows, prompts=[row.target for row in rows])
    monkeypatch.setattr(
        hooks._Replaced,
        "_mask_bias",
        lambda self, states: self.call.cache.setdefault("no", bias_of(self.call)),
    )
    with intervene(pipe, rows):
        assert np.abs(pictures(pipe, rows) - own).max() > 1e-5


def bias_of(call):
    mask = call.arguments["encoder_attention_mask"]
    return (1 - mask.float()).unsqueeze(1) * -10000.0


def test_the_mask_of_joint_attention_is_exchanged_with_the_text(pipes, monkeypatch):
    """Without it a target is read as far as the prompt reaches."""
    from locogen.interventions import prompts as hooks

    pipe = pipes("qwen-image")
    rows = plan(pipe, every(pipe))
    own = pictures(pipe, rows, prompts=[row.target for row in rows])
    monkeypatch.setattr(hooks._Patched, "_mask_patch", lambda *_: lambda *call: None)
    with intervene(pipe, rows):
        assert np.abs(pictures(pipe, rows)[:2] - own[:2]).max() > 1e-4


@pytest.mark.parametrize("name", ["sd", "sd-xl", "if", "sd-3", "pixart-alpha", "flux"])
def test_several_pictures_a_prompt_are_not_taken_for_guidance(pipes, name):
    """Two pictures a prompt without guidance are as many rows as one with it."""
    pipe = pipes(name)
    rows = plan(pipe, every(pipe), **all_of_it(name))
    for guidance in GUIDANCES:
        own = pictures(pipe, rows, prompts=[row.target for row in rows], each=2, guidance=guidance)
        with intervene(pipe, rows):
            assert near(pictures(pipe, rows, each=2, guidance=guidance), own, name)


def test_execution_order(pipe, name):
    guidance = 1.0 if name in APART else 5.0  # with guidance these call their denoiser twice
    names = [layer.name for layer in find_layers(pipe)]
    called, modules = [], dict(denoiser_of(pipe).named_modules())
    handles = [
        modules[name].register_forward_hook(lambda *_, name=name: called.append(name))
        for name in sorted(names)
    ]
    try:
        pictures(pipe, plan(pipe, ()), steps=2, guidance=guidance)
    finally:
        for handle in handles:
            handle.remove()
    # Of Wan 2.2's denoisers each takes one of the two steps.
    assert called == (names if name == "wan-2.2" else names * 2)


def test_what_is_recorded_is_the_text(pipe):
    rows = plan(pipe, ())
    with record(pipe) as heard:
        pictures(pipe, rows, steps=2)
    # Not by `encode`, which pads Qwen-Image's prompts.
    text = family_of(pipe).encode(pipe, [row.prompt for row in rows], False)[0]
    tokens = text.states.shape[1] if text.mask is None else int(text.mask.sum(1).max())
    padded = {tokens, text.places}
    assert {states[0].shape[1] for states in heard.values()} <= padded


def test_no_hook_of_the_pipelines_own_is_taken_for_a_strangers(pipe):
    pictures(pipe, plan(pipe, ()))
    assert foreign_hooks(pipe) == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_picture_leaves_the_models_key_as_it_was(name, monkeypatch):
    """Or the store would not know its pictures again: some modules keep what they computed last."""
    pipe = tiny.FAMILIES[name]()
    encode(pipe, ["cat"])  # which sets the state of a tokenizer
    before = fingerprint(pipe)
    pictures(pipe, plan(pipe, ()))
    assert fingerprint(pipe) == before
    if name in ("wan", "z-image"):  # the twin
        seen = description.WITHOUT_EFFECT - description.SET_BY_MODULES
        monkeypatch.setattr(description, "WITHOUT_EFFECT", seen)
        assert fingerprint(tiny.FAMILIES[name]()) != fingerprint(pipe)


def test_fluxs_negative_call_is_untouched(pipes):
    """With true guidance FLUX calls its denoiser a second time, for the negative prompt."""
    pipe = pipes("flux")
    rows = plan(pipe, every(pipe), pooled="target")
    negative = {"negative_prompt": ["b c d"] * len(rows), "true_cfg_scale": 3.0}
    own = pictures(pipe, rows, prompts=[row.target for row in rows], **negative)
    with intervene(pipe, rows):
        assert np.abs(pictures(pipe, rows, **negative) - own).max() < 1e-5
    without = pictures(pipe, rows, prompts=[row.target for row in rows])
    assert np.abs(own - without).max() > 1e-4  # the twin: the negative call does something
    with intervene(pipe, rows):  # texts that the user encoded, in whichever order
        away = pipe.encode_prompt(negative["negative_prompt"])
        near_by = pipe.encode_prompt([row.prompt for row in rows])
        made = pipe(
            prompt_embeds=near_by[0],
            pooled_prompt_embeds=near_by[1],
            negative_prompt_embeds=away[0],
            negative_pooled_prompt_embeds=away[1],
            true_cfg_scale=3.0,
            generator=generators(rows),
            num_inference_steps=2,
            guidance_scale=5.0,
            output_type="np",
        ).images
    assert np.abs(made - own).max() < 1e-5


@pytest.mark.parametrize("name", tiny.fast(*tiny.FAST, of=sorted(PATCHED)))
def test_embeds_of_other_prompts_are_refused_where_runs_are_patched(pipe, name):
    rows = plan(pipe, every(pipe))
    prompts = [row.prompt for row in rows]

    def made(texts, length):
        """From text that was encoded to another length than the call's own."""
        two_prompts = {"prompt_2": None, "prompt_3": None} if name == "sd-3" else {}
        returned = pipe.encode_prompt(texts, **two_prompts, max_sequence_length=length)
        encoding = family_of(pipe).encoding_of(returned)
        noise = generators(rows)
        return pipe(
            **encoding.arguments(),
            **{family_of(pipe).guidance_argument: scale(pipe, 1.0)},
            **options(pipe),
            generator=noise,
            num_inference_steps=1,
        )

    with intervene(pipe, rows):
        made(prompts, 24)  # the twin: those of the plan
        with pytest.raises(LocogenError, match="are not what the pipeline makes of the plan's"):
            made(["b c d", *prompts[1:]], 24)


def test_patching_needs_the_targets_own_runs(pipes):
    for name in sorted(PATCHED - set(tiny.RECENT)):
        pipe = pipes(name)
        alone = [row for row in plan(pipe, (0,)) if row.layers]
        with pytest.raises(LocogenError, match="with_target_runs"), intervene(pipe, alone):
            pass


def test_sd3s_call_with_skipped_layers_is_all_conditional(pipes):
    pipe = pipes("sd-3")
    rows = plan(pipe, every(pipe), pooled="target")
    skip = {
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": -1,
        "skip_layer_guidance_stop": 1.0,
    }
    own = pictures(pipe, rows, prompts=[row.target for row in rows], **skip)
    with intervene(pipe, rows):
        assert np.abs(pictures(pipe, rows, **skip) - own).max() < 1e-5
    assert np.abs(own - pictures(pipe, rows, prompts=[row.target for row in rows])).max() > 1e-4


def test_sd_3_without_its_t5():
    """As people load it to save memory: `text_encoder_3=None`, its tokens zeros."""
    pipe = tiny.sd3()
    whole = encode(pipe, ["cat"]).states
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    assert not torch.equal(encode(pipe, ["cat"]).states[:, 40:], whole[:, 40:])
    rows = plan(pipe, every(pipe), pooled="target")
    own = pictures(pipe, rows, prompts=[row.target for row in rows])
    with intervene(pipe, rows):
        assert near(pictures(pipe, rows), own, "sd-3")
    assert len(subject_positions(pipe, "a cat in b", "cat")) == 1


@pytest.mark.parametrize("kind", ["sd", "sd-xl"])
def test_a_guidance_distilled_checkpoint_never_doubles(kind):
    """LCM checkpoints are told the scale of guidance as a number, above 1 too."""
    pipe = tiny.FAMILIES[kind](time_cond_proj_dim=8)
    rows = plan(pipe, every(pipe), **all_of_it(kind))
    own = pictures(pipe, rows, prompts=[row.target for row in rows])
    with intervene(pipe, rows), record(pipe) as heard:
        assert np.array_equal(pictures(pipe, rows), own)
    assert len(heard[0][0]) == len(rows)


def test_sd_2_has_other_heads_projections_and_predictions():
    """What SD 2 has otherwise than SD 1: heads by block, linear projections, and a scheduler that predicts v."""
    from diffusers import DDIMScheduler

    heads = dict(attention_head_dim=(2, 2, 4, 4), use_linear_projection=True)
    pipe = tiny.pipeline(**heads)
    before = pictures(pipe, plan(pipe, ()))
    pipe.scheduler = DDIMScheduler(
        steps_offset=1, clip_sample=False, prediction_type="v_prediction"
    )
    rows = plan(pipe, every(pipe))
    own = pictures(pipe, rows, prompts=[row.target for row in rows])
    with intervene(pipe, rows):
        assert np.array_equal(pictures(pipe, rows), own)
    with intervene(pipe, plan(pipe, every(pipe)[1:])):
        assert not np.array_equal(pictures(pipe, rows), own)
    assert not np.array_equal(
        before, pictures(pipe, plan(pipe, ()))
    )  # the scheduler makes a difference


@pytest.mark.parametrize("name", ["sd", "sd-xl", "sd-3"])
def test_turbo_is_run_without_guidance(pipes, name):
    """Distilled checkpoints are told a guidance of 0, and no row is a negative one."""
    pipe = pipes(name)
    rows = plan(pipe, every(pipe), **all_of_it(name))
    own = pictures(pipe, rows, prompts=[row.target for row in rows], guidance=0.0, steps=1)
    with intervene(pipe, rows), record(pipe) as heard:
        assert near(pictures(pipe, rows, guidance=0.0, steps=1), own, name)
    assert len(heard[0][0]) == len(rows)


def test_schnell_has_no_guidance_at_all():
    pipe = tiny.flux(guidance_embeds=False)
    rows = plan(pipe, every(pipe), pooled="target")
    own = pictures(pipe, rows, prompts=[row.target for row in rows])
    with intervene(pipe, rows):
        assert np.abs(pictures(pipe, rows) - own).max() < 1e-5


def test_steps_come_from_the_timestep(pipe, name):
    """All layers and the pooled path, at some steps: equal to no step where none is left, and to all where all are."""
    steps, full = 3, all_of_it(name)
    none, whole = plan(pipe, ()), plan(pipe, every(pipe), **full)
    plain = pictures(pipe, none, steps=steps)
    with intervene(pipe, whole):
        target = pictures(pipe, whole, steps=steps)
    made = {}
    for span in [(0, 0), (1, 2), (2, 2), (0, 2)]:
        rows = plan(pipe, every(pipe), timesteps=span, **full)
        with intervene(pipe, rows):
            made[span] = pictures(pipe, rows, steps=steps)
    assert np.array_equal(made[0, 2], target)
    assert np.abs(made[2, 2][:2] - plain[:2]).max() < np.abs(target[:2] - plain[:2]).max()
    for a, b in [((0, 0), (1, 2)), ((1, 2), (2, 2)), ((0, 0), (0, 2))]:
        assert np.abs(made[a][:2] - made[b][:2]).max() > 1e-6
    with pytest.raises(LocogenError, match="there is no step 5"):
        rows = plan(pipe, (0,), timesteps=(0, 5))
        with intervene(pipe, rows):
            pictures(pipe, rows, steps=steps)


def test_a_scheduler_that_calls_twice_at_one_timestep_is_counted_once():
    """PNDM's first step is two calls; (0, 0) must hold in both, and 4 calls must not make a fourth step."""
    from diffusers import PNDMScheduler

    pipe = tiny.pipeline()
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    heard = {}
    for span in [(0, 0), (2, 2)]:
        rows = plan(pipe, (4,), timesteps=span)
        with intervene(pipe, rows), record(pipe) as found:
            pictures(pipe, rows, steps=3)
        plain = encode(pipe, [row.prompt for row in rows]).states
        heard[span] = [not torch.equal(states[2:], plain) for states in found[4]]
    assert len(heard[0, 0]) == 4  # three steps, four calls
    twice = pipe.scheduler.timesteps.tolist()
    assert heard[0, 0] == [t == twice[0] for t in twice]
    assert heard[2, 2] == [t == twice[-1] for t in twice]


def test_words_are_found_where_they_are_heard(pipe, name):
    """The states before a word do not hear it in a causal encoder; in T5 the word's own state is its first."""
    one, other = "a cat in b", "a dog in b"
    (place,) = subject_positions(pipe, one, "cat")
    assert subject_positions(pipe, other, "dog") == (place,)
    a, b = encode(pipe, [one]).states[0], encode(pipe, [other]).states[0]
    change = (a - b).flatten(1).norm(dim=1)
    assert change[place] > 0.5 * change.max()
    if name in CAUSAL:  # what stands before the word has not read it
        start = token_spans(pipe, one)[0].start
        assert change[start:place].max() < 1e-5 < change[place + 1 :].max()
        # But ChatGLM's padding, which stands before the prompt, reads all of it.
        assert (change[:start].sum() > 1e-5) == (name == "kolors")
    with pytest.raises(LocogenError, match="does not contain"):
        subject_positions(pipe, one, "dog")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kolors", "hidream"])
def test_a_recent_pooled_vector_is_a_path_of_its_own(pipes, name):
    """The last state of ChatGLM enters besides the layers, as SD-XL's pooled text does; two CLIPs' in HiDream."""
    pipe = pipes(name)
    alone, plain = plan(pipe, (), pooled="target"), pictures(pipe, plan(pipe, ()))
    with intervene(pipe, alone):
        assert np.abs(pictures(pipe, alone)[:2] - plain[:2]).max() > 1e-5


def test_z_images_target_must_fill_as_many_blocks():
    """Its picture stands behind the text: with another block it would stand elsewhere."""
    pipe = tiny.z_image()
    short, long = "cat", "a" * 40
    rows = with_target_runs([Intervention(short, long, every(pipe), 0)])
    own = pictures(pipe, rows, prompts=[long, long])
    words = "as 32 tokens and 'a+' as 64, padding included, .*shorter one.*PromptPair"
    with pytest.raises(LocogenError, match=words), intervene(pipe, rows):
        pass
    # The twin, and the reason: all layers would not be the target's own run.
    unchecked = replace(family_of(pipe), length_class=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "ZImagePipeline", unchecked)
        with intervene(pipe, rows):
            assert np.abs(pictures(pipe, rows)[0] - own[0]).max() > 1e-3


def test_z_image_writes_its_template_into_a_list_of_its_own(pipes):
    """Its pipeline exchanges the prompts that it is given; the plan's are compared before."""
    pipe = tiny.z_image()
    rows = plan(pipe, (0,))
    with intervene(pipe, rows):
        pictures(pipe, rows)
        with pytest.raises(LocogenError, match="prompt 0 of the call is 'b'"):
            pictures(pipe, rows, prompts=["b"] * len(rows))
    prompts = [row.prompt for row in rows]
    for _ in range(2):  # the template of the template, by the second call
        pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        words = r"wrote into the list .* pipe\(list\(prompts\)"
        with intervene(pipe, rows), pytest.raises(LocogenError, match=words):
            pictures(pipe, rows, prompts=prompts)
    # The twin: a longer prompt that holds the plan's is another prompt.
    longer = [f"{row.prompt} and more" for row in rows]
    with intervene(pipe, rows), pytest.raises(LocogenError, match="and the plan has"):
        pictures(pipe, rows, prompts=longer)


def test_wan_that_reads_a_picture_or_lacks_a_denoiser_is_refused():
    """A picture's tokens stand before the text's."""
    pipe = tiny.wan()
    find_layers(pipe)  # the twin
    pipe.register_to_config(boundary_ratio=0.875)
    with pytest.raises(UnsupportedModel, match="no transformer_2: load it with all"):
        find_layers(pipe)
    with pytest.raises(UnsupportedModel, match="also reads a picture"):
        find_layers(tiny.wan(image_dim=8, added_kv_proj_dim=24))


@pytest.mark.slow
def test_a_second_denoiser_that_never_has_its_turn_has_no_layers():
    """Without a boundary Wan's pipeline calls the first one alone."""
    pipe = tiny.wan22()
    assert len(find_layers(pipe)) == 6
    pipe.register_to_config(boundary_ratio=None)
    assert [layer.name for layer in find_layers(pipe)] == [f"blocks.{i}.attn2" for i in range(3)]


@pytest.mark.slow
def test_wan_2_2_at_full_size_has_the_layers_of_both_denoisers():
    """On the meta device, in the order of their turns."""
    pipe = tiny.wan22()
    with torch.device("meta"):
        parts = {name: WanTransformer3DModel() for name in ("transformer", "transformer_2")}
    pipe.register_modules(**parts)
    names = [layer.name for layer in find_layers(pipe)]
    assert names == [f"{part}.blocks.{index}.attn2" for part in parts for index in range(40)]


@pytest.mark.slow
def test_layers_of_wan_2_2_act_in_the_turn_of_their_denoiser(pipes):
    """At other steps the same layers change nothing, and nobody misses them."""
    pipe = pipes("wan-2.2")
    early, late = (0, 1, 2), (3, 4, 5)
    plain = pictures(pipe, plan(pipe, ()))
    for layers, span, changes in [
        (early, (0, 0), True),
        (early, (1, 1), False),
        (late, (1, 1), True),
        (late, (0, 0), False),
    ]:
        rows = plan(pipe, layers, timesteps=span)
        with intervene(pipe, rows):
            assert np.array_equal(pictures(pipe, rows), plain) != changes, (layers, span)


@pytest.mark.slow
def test_a_denoiser_of_two_that_is_replaced_within_a_context_is_refused():
    pipe = tiny.wan22()
    rows = plan(pipe, every(pipe))
    with intervene(pipe, rows):
        pictures(pipe, rows)
        pipe.register_modules(transformer_2=tiny.wan().transformer)
        with pytest.raises(LocogenError, match="was replaced while a locogen context was open"):
            pictures(pipe, rows)


@pytest.mark.slow
def test_what_calls_a_denoiser_by_itself_refuses_two(pipes):
    """It cannot know whose turn it is."""
    pipe = pipes("wan-2.2")
    with pytest.raises(LocogenError, match="denoisers that take turns, transformer and transf"):
        denoiser_of(pipe)(hidden_states=None)
    gone = denoiser_of(pipe)
    assert denoiser_of(pipe) is gone  # the same object: what is known of it is kept by it


def test_a_cache_of_keys_and_values_is_refused():
    """FLUX.2's calls with a cache pass what a layer reads by."""
    with pytest.raises(LocogenError, match="cache of keys and values"):
        check_call({"kv_cache_mode": "cached"})
    check_call({"kv_cache_mode": None})


def test_self_attention_that_gets_its_own_input_as_text_is_no_layer():
    """As Lumina 2 calls it: what it reads is the picture."""
    states = torch.zeros(1, 4, 8)
    assert not gets_text(states, states)
    assert gets_text(states.clone(), states)


@pytest.mark.slow
def test_lumina_2s_target_must_be_as_long_as_its_prompt():
    """Its picture stands behind the text: with another token it would stand elsewhere."""
    pipe = tiny.lumina2()
    short, long = "cat", "cat in a"
    rows = with_target_runs([Intervention(short, long, every(pipe), 0)])
    own = pictures(pipe, rows, prompts=[long, long])
    words = "reads 'cat' as 17 tokens and 'cat in a' as 22 and puts .*Add words to the shorter one"
    with pytest.raises(LocogenError, match=words), intervene(pipe, rows):
        pass
    # A call of one's own is compared too, where texts meet.
    unchecked = replace(family_of(pipe), length_class=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "Lumina2Pipeline", unchecked)
        with pytest.raises(LocogenError, match="of other lengths"), intervene(pipe, rows):
            pictures(pipe, rows)
        # The twin, and the reason: all layers would not be the target's own run.
        patch.setattr(_Patched, "_check_alike", lambda *_: None)
        with intervene(pipe, rows):
            assert np.abs(pictures(pipe, rows)[0] - own[0]).max() > 1e-3


@pytest.mark.slow
def test_each_row_of_lumina_2_has_a_text_of_its_own_length(pipes, monkeypatch):
    """Where the longest one ends, the others' pictures have begun: these must stay the rows' own."""
    pipe = pipes("lumina-2")
    rows = plan(pipe, (1,))
    alone = []
    for row in rows[:2]:
        one = with_target_runs([row])
        with intervene(pipe, one):
            alone.append(pictures(pipe, one)[0])
    with intervene(pipe, rows):
        assert np.abs(pictures(pipe, rows)[:2] - np.stack(alone)).max() < 1e-5
    monkeypatch.setattr(Call, "is_text", lambda *_: None)  # the twin
    with intervene(pipe, rows):
        change = np.abs(pictures(pipe, rows)[:2] - np.stack(alone)).max(axis=(1, 2, 3))
    assert change[0] > 1e-4 and change[1] < 1e-5  # the longest is as it should be


@pytest.mark.slow
def test_lumina_2s_refiners_are_no_layers(pipes):
    """They too are called with "text", which is their own input: a picture's, or text not yet read."""
    pipe = pipes("lumina-2")
    denoiser, called = denoiser_of(pipe), []
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: called.append(
                (name, gets_text(kwargs["encoder_hidden_states"], kwargs["hidden_states"]))
            ),
            with_kwargs=True,
        )
        for name, module in denoiser.named_modules()
        if name.endswith(".attn")
    ]
    with torch.no_grad():
        denoiser(**family_of(pipe).dummy_inputs(denoiser))
    for handle in handles:
        handle.remove()
    layers = [f"layers.{index}.attn" for index in range(3)]
    assert called == [
        (name, False) for name in ["context_refiner.0.attn", "noise_refiner.0.attn", *layers]
    ]
    assert [layer.name for layer in find_layers(pipe)] == layers


@pytest.mark.slow
def test_each_block_of_hidream_hears_a_llama_layer_of_its_own(pipes):
    """A change of one of Llama's layers is heard by its block alone, in the last third of its text."""
    pipe = pipes("hidream")
    denoiser = denoiser_of(pipe)
    inputs = family_of(pipe).dummy_inputs(denoiser)
    changed = dict(inputs)
    changed["encoder_hidden_states_llama3"] = inputs["encoder_hidden_states_llama3"].clone()
    changed["encoder_hidden_states_llama3"][1] += 1.0  # the second of two double blocks hears it
    heard = []
    for call in (inputs, changed):
        reads, handles = [], []
        for layer in find_layers(pipe)[:2]:
            matrix = family_of(pipe).matrices(layer.module)["k"]
            handles.append(
                matrix.register_forward_pre_hook(lambda _, args, to=reads: to.append(args[0]))
            )
        with torch.no_grad():
            denoiser(**call)
        for handle in handles:
            handle.remove()
        heard.append(reads)
    assert torch.equal(heard[0][0], heard[1][0])
    assert torch.equal(heard[0][1][:, :4], heard[1][1][:, :4])
    assert not torch.allclose(heard[0][1][:, 4:], heard[1][1][:, 4:])


@pytest.mark.slow
def test_hidreams_words_are_found_in_both_encoders_and_in_either_padding(pipes):
    """A change of the word moves T5's states there, and Llama's there and behind, not before."""
    pipe = tiny.hidream()
    for side in ("right", "left"):
        pipe.tokenizer_4 = copy.deepcopy(tiny.llama_tokenizer())
        pipe.tokenizer_4.padding_side = side
        pipe.tokenizer_4.pad_token = pipe.tokenizer_4.eos_token
        one, other = (encode(pipe, [text]).by_layer[0, -1] for text in ("a cat in b", "a dog in b"))
        change = (one - other).norm(dim=1)  # (tokens,)
        (last,), (own,) = (
            subject_positions(pipe, "a cat in b", "cat", encoder=encoder) for encoder in (1, 2)
        )
        limits = [span.limit for span in token_spans(pipe, "a cat in b")]
        assert own - last == limits[1]
        # Padding that stands before the prompt may read all of it.
        start = token_spans(pipe, "a cat in b")[1].start - limits[0]
        place = last - limits[0]
        assert change[start:place].max() < 1e-5 < change[place], side
    reader = LayerInputs(pipe, find_layers(pipe)[:1])
    everything = reader.places("a cat in b", "all")
    assert everything[-1] + 1 == len(reader.states("a cat in b", reader.layers[0]))


@pytest.mark.slow
def test_a_hidream_without_its_t5_cannot_read(pipes):
    """As SD 3 can."""
    pipe = tiny.hidream()
    pipe.register_modules(text_encoder_3=None)
    with pytest.raises(LocogenError, match="has no text_encoder_3"):
        encode(pipe, ["cat"])


@pytest.mark.slow
def test_lumina_2s_guidance_may_end_early(pipes):
    """`cfg_trunc_ratio` leaves the last steps' negative calls out."""
    pipe = pipes("lumina-2")
    rows = plan(pipe, every(pipe))
    early = {"cfg_trunc_ratio": 0.5}
    own = pictures(pipe, rows, prompts=[row.target for row in rows], **early)
    with intervene(pipe, rows):
        assert np.abs(pictures(pipe, rows, **early) - own).max() < 1e-5
        assert np.abs(pictures(pipe, rows) - own).max() > 1e-4  # the twin


@pytest.mark.parametrize("kind", ["if", "pixart-alpha", "pixart-sigma", "sana"])
def test_capitals_are_heard_as_small_letters(kind):
    """As these pipelines themselves hear them: T5 spells capitals in tokens of their own, and as many others."""
    pipe = tiny.FAMILIES[kind]()
    assert torch.equal(
        encode(pipe, [" A B Cat in b"]).states, encode(pipe, ["a b cat in b"]).states
    )
    assert token_spans(pipe, " A B Cat in b") == token_spans(pipe, "a b cat in b")
    assert subject_positions(pipe, "A B Cat in b", " Cat ") == subject_positions(
        pipe, "a b cat in b", "cat"
    )


@pytest.mark.slow
def test_full_size_denoisers_on_the_meta_device():
    """As many layers as the papers count, where they put them; in transformers one for each block, in order."""
    for name, (denoiser, layers) in full.DENOISERS.items():
        with torch.device("meta"):
            assert len(find_layers(denoiser())) == layers, name
    with torch.device("meta"):
        made = {name: parts[0]() for name, parts in full.PARTS.items()}
    found = {name: [layer.name for layer in find_layers(model)] for name, model in made.items()}
    counts = {
        "sd": 16,
        "sd-2": 16,
        "sd-xl": 70,
        "if": 22,
        "sd-3": 24,
        "flux": 19 + 38,
        "pixart": 28,
        "sana": 20,
    }
    assert {name: len(names) for name, names in found.items()} == counts
    assert found["sd"][8].startswith("up_blocks.1.attentions.1")
    assert found["sd-xl"][45].startswith("up_blocks.0.attentions.1.transformer_blocks.1")
    assert all(name.startswith("mid_block") for name in found["sd-xl"][24:34])
    assert found["flux"][18:20] == [
        "transformer_blocks.18.attn",
        "single_transformer_blocks.0.attn",
    ]


def test_full_size_configurations_are_those_of_the_checkpoints():
    """By the sizes that their cards and papers give, in billions; SD 1 and SD-XL to the weight."""
    assert full.weights("sd")[0] == 859_520_964 and full.weights("sd-xl")[0] == 2_567_463_684
    told = {"sd-2": 0.87, "if": 4.3, "sd-3": 2.0, "flux": 11.9, "pixart": 0.61, "sana": 1.6}
    for name, billions in told.items():
        assert full.weights(name)[0] / 1e9 == pytest.approx(billions, rel=0.02), name
    for part, billions in {
        full.clip_l: 0.123,
        full.clip_g: 0.695,
        full.t5: 4.76,
        full.gemma: 2.61,
    }.items():
        with torch.device("meta"):
            assert sum(w.numel() for w in part().parameters()) / 1e9 == pytest.approx(
                billions, rel=0.01
            )


def test_the_full_size_benchmark_runs_at_tiny_size(root, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tests" / "benchmarks"))
    import fullsize

    fullsize.main(["--tiny"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[1:4] for row in rows[2:]] == [
        [" sd ", " 16 ", " 16 × 16 "],
        [" sd-xl ", " 8 ", " 16 × 16 "],
    ]


def test_the_benchmark_says_how_weights_fit_cards(root, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "tests" / "benchmarks"))
    import fullsize

    assert [fullsize.way(4, 3, card) for card in (6, 5, 4)] == [
        "as it is",
        'offload="model"',
        'offload="sequential"',
    ]
    fullsize.main(["--weights"])
    table = {row.split("|")[1].strip(): row for row in capsys.readouterr().out.splitlines()[2:]}
    assert list(table) == list(full.PARTS)
    assert "| 2.1 | 1.7 | as it is |" in table["sd"] and 'offload="sequential" |' in table["flux"]
