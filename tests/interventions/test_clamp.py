"""Theorems of the clamp: what is set is exact, what is not is untouched to the bit, and nothing is left behind."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from support import tiny

from locogen.editing.neurons import find_neurons
from locogen.errors import LocogenError
from locogen.interventions.clamping import Selection, clamp
from locogen.interventions.denoiser_calls import following
from locogen.interventions.prompts import active_contexts, foreign_hooks, generators, intervene
from locogen.models.families import family_of
from locogen.models.layers import find_layers
from locogen.pictures import runs
from locogen.pictures.runs import generate
from locogen.plan import Concept, Intervention, PromptPair

PROMPTS = ["cat in a", "dog in c"]
SOME = Selection({(2, "k"): (0, 5), (2, "v"): (1, 3), (9, "v"): (0, 7)})
STEPS = 3
PAIRS = [("a cat in b", "a dog in b"), ("cat", "dog")]
CAT = Concept("cat", "style", (PromptPair("a cat in b", "a b"),))


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(autouse=True)
def as_found(pipe):
    yield
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.unet.modules()) == 0
    assert active_contexts(pipe) == ()


def pictures(pipe, *, guidance=5.0, each=1, prompts=PROMPTS, steps=STEPS):
    rows = [Intervention(p, p, (), seed) for seed, p in enumerate(prompts) for _ in range(each)]
    return pipe(
        prompts,
        generator=generators(rows),
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=each,
        output_type="np",
    ).images


def matrix(pipe, place):
    return family_of(pipe).matrices(find_layers(pipe)[place[0]].module)[place[1]]


def every(pipe, places=None):
    """All channels of all matrices, with what they put out for "dog on b"."""
    with torch.no_grad():
        state = pipe.encode_prompt(["dog on b"], "cpu", 1, False)[0][0]
        places = places or [(i, m) for i in range(16) for m in ("k", "v")]
        without = {place: matrix(pipe, place)(state) for place in places}
    return Selection(
        {place: tuple(range(said.shape[1])) for place, said in without.items()}, without
    )


@contextmanager
def listening(pipe, places):
    """What matrices put out at each call, clamps opened before included: {place: [(rows, tokens, channels)]}."""
    said = {place: [] for place in places}
    handles = [
        matrix(pipe, place).register_forward_hook(
            lambda _m, _a, out, place=place: said[place].append(out.clone())
        )
        for place in places
    ]
    try:
        yield said
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_nothing_selected_or_scaled_by_one_is_the_plain_pipeline_to_the_bit(pipe, guidance):
    plain = pictures(pipe, guidance=guidance)
    for selection, to in (
        (Selection({}), "mean"),
        (Selection({(2, "v"): ()}), "zero"),
        (SOME, 1.0),
    ):
        with clamp(pipe, selection, to=to):
            assert np.array_equal(pictures(pipe, guidance=guidance), plain)
    for to in ("zero", 2):  # the twin
        with clamp(pipe, SOME, to=to):
            assert np.abs(pictures(pipe, guidance=guidance) - plain).max() > 1e-4


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_every_neuron_at_the_targets_own_values_is_the_targets_run(pipe, guidance):
    """Float32 sums in another order, as in the test of windows in one batch: 1e-5 is ample."""
    rows = [Intervention(p, "dog on b", tuple(range(16)), seed) for seed, p in enumerate(PROMPTS)]
    with intervene(pipe, rows):
        target = pictures(pipe, guidance=guidance)
    with clamp(pipe, every(pipe), to="mean"):
        assert np.abs(pictures(pipe, guidance=guidance) - target).max() < 1e-5
    short = every(pipe, [(i, m) for i in range(16) for m in ("k", "v")][:-1])
    with clamp(pipe, short, to="mean"):  # the twin: one matrix short is another picture
        assert np.abs(pictures(pipe, guidance=guidance) - target).max() > 1e-4


@pytest.mark.parametrize("scale", ["zero", 0.5, -2.0])
def test_scaling_channels_is_scaling_rows_of_the_weights(pipe, scale):
    """Without guidance, where every row is conditional."""
    plain = pictures(pipe, guidance=1.0)
    with clamp(pipe, SOME, to=scale):
        found = pictures(pipe, guidance=1.0)
    other = tiny.pipeline()
    with torch.no_grad():
        for place, channels in SOME.channels.items():
            matrix(other, place).weight[list(channels)] *= 0.0 if scale == "zero" else scale
    assert np.abs(found - pictures(other, guidance=1.0)).max() < 1e-5
    assert np.abs(found - plain).max() > 1e-4


@pytest.mark.parametrize(("each", "guidance"), [(1, 5.0), (3, 5.0), (1, 1.0), (3, 1.0)])
def test_only_the_chosen_channels_of_the_conditional_rows(pipe, each, guidance):
    """Six rows are three pictures with guidance, or three of two prompts without: the pipeline says which."""
    places = [*SOME.channels, (9, "k")]
    with listening(pipe, places) as before:
        pictures(pipe, guidance=guidance, each=each)
    with clamp(pipe, SOME, to="zero"), listening(pipe, places) as after:
        pictures(pipe, guidance=guidance, each=each)
    first = 2 * each if guidance > 1 else 0
    for place in places:
        for was, now in zip(before[place], after[place], strict=True):
            assert len(now) == first + 2 * each
            expected = was.clone()
            expected[first:, :, list(SOME.channels.get(place, ()))] = 0
            assert torch.equal(now, expected)
            assert place == (9, "k") or not torch.equal(was, expected)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
def test_at_chosen_steps_only(pipe, monkeypatch, scheduler):
    """PNDM calls the denoiser twice at its second timestep: both calls are step 1."""
    options = dict(steps_offset=1) | (
        dict(skip_prk_steps=True) if scheduler is PNDMScheduler else {}
    )
    monkeypatch.setattr(pipe, "scheduler", scheduler(**options))
    steps = [0, 1, 2] if scheduler is DDIMScheduler else [0, 1, 1, 2]
    for chosen in ((1,), (0, 2), ()):
        with clamp(pipe, SOME, to="zero", steps=chosen), listening(pipe, [(2, "v")]) as said:
            pictures(pipe)
        clamped = [bool((out[2:, :, [1, 3]] == 0).all()) for out in said[2, "v"]]
        assert clamped == [step in chosen for step in steps]


def test_steps_that_never_come_are_refused(pipe):
    with (
        pytest.raises(LocogenError, match="there is no step 3: the call has steps 0 to 2"),
        clamp(pipe, SOME, to="zero", steps=(1, 3)),
    ):
        pictures(pipe)
    with following(pipe, family_of(pipe)) as call:
        pictures(pipe)
        assert call.step() == 2
        call._timestep = 12345.0  # what no call of the pipeline gives
        call.cache.clear()  # what is remembered of a call goes with it
        with pytest.raises(LocogenError, match=r"timestep 12345\.0 is none"):
            call.step()


def test_an_exception_leaves_nothing(pipe):
    with pytest.raises(RuntimeError, match="the user's own"), clamp(pipe, SOME, to="zero"):
        assert active_contexts(pipe)
        assert foreign_hooks(pipe) == ()
        raise RuntimeError("the user's own")
    short = Selection({(0, "v"): (1,)}, {(0, "v"): torch.zeros(7, 8)})
    with pytest.raises(LocogenError, match="reads 40 tokens"), clamp(pipe, short):
        pictures(pipe)


def test_the_store_tells_clamped_pictures_from_plain_ones(pipe, tmp_path):
    def make():
        run = runs.generate(
            pipe, PROMPTS, store=tmp_path, num_inference_steps=2, batch_size=2, progress=False
        )
        return np.stack([np.asarray(p) for p in run.pictures])

    plain, means = make(), every(pipe)
    found = [plain]
    for options in (dict(to="zero"), dict(to=3), dict(to="zero", steps=[0]), dict(to="mean")):
        with clamp(pipe, Selection(SOME.channels, means.without), **options):
            found.append(make())
    with clamp(pipe, Selection({(2, "k"): (0,)}), to="zero"):
        found.append(make())
    assert len({a.tobytes() for a in found}) == len(found)
    with clamp(pipe, Selection({})):
        assert np.array_equal(make(), plain)
    assert len(list(tmp_path.rglob("*.png"))) == len(found) * len(PROMPTS)


def test_clamps_can_be_nested(pipe):
    halves = Selection({(2, "k"): (0, 5)}), Selection({(2, "v"): (1, 3), (9, "v"): (0, 7)})
    with clamp(pipe, SOME, to="zero"):
        together = pictures(pipe)
    with clamp(pipe, halves[0], to="zero"), clamp(pipe, halves[1], to="zero"):
        assert np.array_equal(pictures(pipe), together)


@pytest.mark.slow
def test_a_call_that_pads_less_is_clamped_as_one_that_pads_more(tmp_path):
    """`generate` pads Qwen-Image's prompts, its own call does not: means are of the padded ones."""
    pipe = tiny.qwen_image()
    neurons = find_neurons(pipe, CAT, layers=(0, 1), phrasings=PAIRS)
    options = {"num_inference_steps": 2, "progress": False}
    size = {
        name: value for name, value in family_of(pipe).options(pipe).items() if "prompt" not in name
    }

    def own_call():
        row = [Intervention("a cat in b", "a cat in b", (), 0)]
        made = pipe("a cat in b", generator=generators(row), num_inference_steps=2, **size)
        return np.asarray(made.images[0], int)

    plain = own_call()
    with clamp(pipe, neurons.top(8)):
        run = generate(pipe, ["a cat in b"], seeds=[0], guidance_scale=1.0, store=None, **options)
        clamped = own_call()
        expected = np.asarray(run.pictures[0], int)
    assert np.abs(clamped - expected).max() <= 1
    assert np.abs(plain - expected).max() > 1  # the twin: without the clamp it is another picture


def test_fused_or_exchanged_matrices_are_refused():
    pipe = tiny.pipeline()
    pipe.fuse_qkv_projections()
    with (
        pytest.raises(LocogenError, match=r"to_k of layer 2 .*unfuse_qkv_projections"),
        clamp(pipe, SOME, to="zero"),
    ):
        pictures(pipe)
    pipe.unfuse_qkv_projections()
    with clamp(pipe, SOME, to="zero"):
        pictures(pipe)
    attention = find_layers(pipe)[2].module
    with (
        pytest.raises(LocogenError, match=r"to_v of layer 2 .*was replaced"),
        clamp(pipe, SOME, to="zero"),
    ):
        attention.to_v = torch.nn.Linear(*reversed(attention.to_v.weight.shape), bias=False)
        pictures(pipe)


@pytest.mark.parametrize(
    ("channels", "options", "says"),
    [
        ({(16, "v"): (0,)}, {}, r"no layers \[16\]: the model has layers 0 to 15"),
        ({(2, "q"): (0,)}, {}, "no matrix 'q': use one of k, v"),
        ({(0, "v"): (8,)}, {}, "no channel 8 of 'v' in layer 0: use channels from 0 to 7"),
        ({(0, "v"): (1,)}, dict(to="mean"), "no means"),
        ({(0, "v"): (1,)}, dict(to="average"), "to is 'average'"),
        ({(0, "v"): (1,)}, dict(to=float("nan")), "to is nan"),
        ({(0, "v"): (1,)}, dict(to=True), "to is True"),
        ({(0, "v"): (1,)}, dict(steps=3), "steps is 3"),
        ({(0, "v"): (1,)}, dict(steps=[-1]), r"steps is \[-1\]: .* from 0"),
    ],
)
def test_bad_input(pipe, channels, options, says):
    with (
        pytest.raises(LocogenError, match=says),
        clamp(pipe, Selection(channels), **{"to": "zero", **options}),
    ):
        pass


def test_selections():
    for channels in ((1, 1), (-1, 2)):
        with pytest.raises(LocogenError, match="each once, counted from 0"):
            Selection({(0, "v"): channels})
    without = {(0, "k"): torch.zeros(3, 10), (0, "v"): torch.zeros(3, 10)}
    one = Selection({(0, "k"): (1, 2, 3, 4), (0, "v"): (5, 6)}, without)
    two = Selection({(0, "k"): (4, 3, 9, 8, 7)}, without)
    assert len(one) == 6 and "6 neurons" in one._repr_html_()
    assert one.overlap(two) == two.overlap(one) == (2, 4 * 5 / 10, 2 / 9, 2 / 9)
    assert one.overlap(one).jaccard == 1.0
    with pytest.raises(LocogenError, match="unknown channels"):
        Selection(one.channels).overlap(Selection(two.channels))
    with pytest.raises(LocogenError, match="nothing to compare"):
        Selection({}).overlap(Selection({}))
