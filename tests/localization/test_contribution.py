"""Attention contribution: against the plain formula, and nothing else touched."""

import numpy as np
import pytest
import torch
from support import tiny

from locogen.errors import LocogenError
from locogen.interventions.prompts import active_contexts
from locogen.localization import attention
from locogen.localization.attention import (
    attention_contribution,
    contribution_effect,
    contribution_window,
    contributions,
    measuring_contributions,
)
from locogen.models.families import denoiser_of, subject_occurrences, subject_positions
from locogen.models.layers import find_layers
from locogen.plan import Concept, PromptPair

CONCEPT = Concept(
    "cat", "style", (PromptPair("a big cat b", "a big b"), PromptPair("cat in dog", "in dog"))
)
OPTIONS = dict(seeds=range(2), num_inference_steps=2, batch_size=3, progress=False)


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(autouse=True)
def as_found(pipe):
    yield
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.unet.modules()) == 0
    assert active_contexts(pipe) == ()


def naive(attention, hidden, text, at):
    """Mean over queries and tokens of |W_o concat_h(A_h[:, t] V_h[t])|, over that of all tokens together.

    By diffusers' own attention probabilities.
    """
    queries, keys, values = (
        attention.head_to_batch_dim(matrix(states))
        for matrix, states in (
            (attention.to_q, hidden),
            (attention.to_k, text),
            (attention.to_v, text),
        )
    )
    probabilities = attention.get_attention_scores(queries, keys)  # (heads, queries, tokens)
    all_tokens = attention.batch_to_head_dim(probabilities @ values) @ attention.to_out[0].weight.T
    norms = []
    for token in at:
        written = (
            probabilities[:, :, token, None] * values[:, None, token]
        )  # (heads, queries, width a head)
        norms.append(
            (attention.batch_to_head_dim(written) @ attention.to_out[0].weight.T)
            .norm(dim=-1)
            .mean()
        )
    return float(torch.stack(norms).mean() / all_tokens.norm(dim=-1).mean())


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_it_is_the_formula(pipe, guidance):
    at = [subject_positions(pipe, prompt, "cat") for prompt in ("a big cat b", "cat in dog")]
    at[1] = (
        *at[1],
        at[1][0] + 1,
    )  # rows may listen to several tokens, and to other numbers of them
    inputs: dict[int, list] = {}
    handles = [
        layer.module.register_forward_pre_hook(
            lambda _m, args, kwargs, i=layer.index: inputs.setdefault(i, []).append(
                (args[0], kwargs["encoder_hidden_states"])
            ),
            with_kwargs=True,
        )
        for layer in find_layers(pipe)
    ]
    with measuring_contributions(pipe, at) as said, torch.no_grad():
        pipe(
            ["a big cat b", "cat in dog"],
            num_inference_steps=2,
            guidance_scale=guidance,
            output_type="latent",
        )
    for handle in handles:
        handle.remove()
    for layer in find_layers(pipe):
        assert len(said[layer.index]) == 2
        calls = [
            call for call in inputs[layer.index] if len(call[0]) in (2, 4)
        ]  # not the second runs, of more rows
        for (hidden, text), found in zip(calls, said[layer.index], strict=True):
            for row in range(2):
                with torch.no_grad():
                    expected = naive(
                        layer.module, hidden[row - 2 :][:1], text[row - 2 :][:1], at[row]
                    )
                assert found[row] == pytest.approx(expected, rel=1e-4)
                assert found[row] != pytest.approx(expected * 1.01, rel=1e-4)


def test_layers_that_keep_the_pictures_shape_are_measured_over_their_channels():
    """DeepFloyd's put out (rows, channels, height, width), and read text and picture in one attention."""
    pipe = tiny.deepfloyd()
    at = subject_positions(pipe, "a big cat b", "cat")
    layer = find_layers(pipe)[0]
    inputs = []

    def note(module, args, kwargs):
        if len(args[0]) == 1:  # not the second run, of more rows
            inputs.append((args[0], kwargs["encoder_hidden_states"]))

    handle = layer.module.register_forward_pre_hook(note, with_kwargs=True)
    with measuring_contributions(pipe, [at]) as said, torch.no_grad():
        pipe("a big cat b", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    handle.remove()
    (picture, text), attention = inputs[0], layer.module
    with torch.no_grad():
        text = attention.norm_encoder_hidden_states(text) if attention.norm_cross else text
        picture = attention.group_norm(picture.flatten(2)).transpose(1, 2)
        keys = torch.cat([attention.add_k_proj(text), attention.to_k(picture)], 1)
        queries, keys, values = map(
            attention.head_to_batch_dim, (attention.to_q(picture), keys, attention.add_v_proj(text))
        )
        probabilities = attention.get_attention_scores(queries, keys)  # (heads, queries, tokens)
        written = probabilities[:, :, at[0], None] * values[:, None, at[0]]
        texts = text.shape[1]
        every = probabilities[:, :, :texts] @ values[:, :texts]  # what is written of the text
        expected, whole = (
            (attention.batch_to_head_dim(part) @ attention.to_out[0].weight.T).norm(dim=-1).mean()
            for part in (written, every)
        )
        expected = expected / whole
    assert len(at) == 1 and said[layer.index][0].shape == (1,)
    assert float(said[layer.index][0]) == pytest.approx(float(expected), rel=1e-4)


def test_the_call_stays_as_it_is(pipe):
    def make():
        seeds = [torch.Generator().manual_seed(0)]
        return pipe(
            ["a big cat b"], generator=seeds, num_inference_steps=2, output_type="np"
        ).images

    plain = make()
    with measuring_contributions(pipe, [(2, 3)]):
        assert np.array_equal(make(), plain)
    with pytest.raises(RuntimeError, match="mine"), measuring_contributions(pipe, [(2,)]):
        raise RuntimeError("mine")
    with (
        pytest.raises(LocogenError, match="puts out 2 rows for 3 prompts"),
        measuring_contributions(pipe, [(1,)] * 3),
    ):
        make()


def test_rows_and_batches_do_not_matter(pipe):
    table = attention_contribution(pipe, CONCEPT, **OPTIONS)  # pyright: ignore[reportArgumentType]
    assert list(table.columns) == ["concept", "kind", "prompt", "seed", "layer", "contribution"]
    assert len(table) == 2 * 2 * 16 and not table.duplicated(["prompt", "seed", "layer"]).any()
    alone = attention_contribution(pipe, CONCEPT, **{**OPTIONS, "batch_size": 1})  # pyright: ignore[reportArgumentType]
    assert np.allclose(table["contribution"], alone["contribution"], rtol=1e-4)


def test_a_batch_that_is_too_large_is_halved(pipe, monkeypatch):
    wanted = attention_contribution(pipe, CONCEPT, **OPTIONS)  # pyright: ignore[reportArgumentType]
    forward = pipe.unet.forward

    def small(sample, *args, **kwargs):
        if len(sample) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *args, **kwargs)

    tiny.stand_in(monkeypatch, pipe.unet, small)
    with pytest.warns(
        UserWarning, match="a batch of 4 does not fit the memory: going on with 2"
    ) as told:
        found = attention_contribution(pipe, CONCEPT, **(OPTIONS | {"batch_size": 4}))  # pyright: ignore[reportArgumentType]
    assert len(told) == 1 and list(found.seed) == list(wanted.seed)
    assert np.allclose(found["contribution"], wanted["contribution"], rtol=1e-4)


def test_a_loud_or_wide_layer_does_not_win_by_its_loudness(pipe):
    """Values of one layer turned up tenfold: all that it writes grows, and the concept's share of it stays."""
    once = OPTIONS | {"num_inference_steps": 1}  # later steps see another picture
    before = contributions(attention_contribution(pipe, CONCEPT, **once))  # pyright: ignore[reportArgumentType]
    loud = tiny.pipeline()
    with torch.no_grad():
        find_layers(loud)[9].module.to_v.weight.mul_(10)
    after = contributions(attention_contribution(loud, CONCEPT, **once))  # pyright: ignore[reportArgumentType]
    assert before.shape == after.shape == (16, 2, 2)
    assert after[:10] == pytest.approx(before[:10], rel=1e-3)  # layer 9 acts on those behind it
    assert (before > 0).all()


def test_a_layer_that_reads_the_concept_most_is_named(pipe):
    """Where the values of all tokens but the concept's are zero, all that is written is the concept's."""
    at = {pair.prompt: subject_positions(pipe, pair.prompt, "cat") for pair in CONCEPT.pairs}
    one = Concept("cat", "style", CONCEPT.pairs[:1])
    (positions,) = (at[pair.prompt] for pair in one.pairs)

    def read_the_concept_alone(module, args, output):
        alone = torch.zeros_like(output)
        alone[:, list(positions)] = output[:, list(positions)]
        return alone

    before = contributions(attention_contribution(pipe, one, **OPTIONS))  # pyright: ignore[reportArgumentType]
    handle = find_layers(pipe)[9].module.to_v.register_forward_hook(read_the_concept_alone)
    table = attention_contribution(pipe, one, **OPTIONS)  # pyright: ignore[reportArgumentType]
    handle.remove()
    after = contributions(table)
    assert after[9] == pytest.approx(1.0)
    assert before.max() < 0.5
    found = contribution_window(table, window=2)
    assert 9 in list(found) and found.reason == "a ranking always names one"
    for width in range(1, 17):  # the wide ones leave no window that does not overlap the best
        assert 9 in list(contribution_window(table, window=width))
    effects = contribution_effect(table)
    assert list(effects.columns[:8]) == [
        "method",
        "concept",
        "axis",
        "position",
        "estimate",
        "low",
        "high",
        "n",
    ]
    assert effects["estimate"].to_numpy() == pytest.approx(after.mean((1, 2)))
    cell: float = table.query("layer == 9 and seed == 1 and prompt == 'a big cat b'")[
        "contribution"
    ].item()
    assert after[9, 0, 1] == cell


def test_fused_projections_are_refused():
    pipe = tiny.pipeline()
    pipe.fuse_qkv_projections()
    with pytest.raises(LocogenError, match=r"to_v of layer 0 .*unfuse_qkv_projections"):
        attention_contribution(pipe, CONCEPT, **OPTIONS)  # pyright: ignore[reportArgumentType]


def test_a_prompt_without_the_subject_is_refused(pipe):
    with pytest.raises(LocogenError, match="does not contain the subject 'zebra'"):
        attention_contribution(pipe, CONCEPT, subject="zebra", **OPTIONS)  # pyright: ignore[reportArgumentType]


def test_every_occurrence_is_listened_to(pipe, monkeypatch):
    """Not the last one alone, and no comma."""
    asked = []

    def measured(pipe, rows, chosen):
        asked.extend(at for _, at, _ in rows)
        return np.zeros((len(rows), 1))

    monkeypatch.setattr(attention, "measure_batch", measured)
    pair = PromptPair("cat, in b, cat", "b")
    attention_contribution(pipe, Concept("cat", "style", (pair,)), **OPTIONS)  # pyright: ignore[reportArgumentType]
    places = tuple(at for words in subject_occurrences(pipe, pair.prompt, "cat") for at in words)
    assert len(places) == 2 and set(asked) == {places}


# --- half precision ------------------------------------------------------------------------------


def quiet_text(pipe) -> None:
    """Make what is read of the text small beside all else that the layers put out: their bias and their input."""
    with torch.no_grad():
        for layer in find_layers(pipe):
            value = getattr(layer.module, "add_v_proj", None) or layer.module.to_v
            for parameter in value.parameters():
                parameter.mul_(2.0**-12)
            layer.module.to_out[0].bias.add_(1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [tiny.pipeline, tiny.sdxl, tiny.deepfloyd, tiny.pixart])
def test_small_contributions_are_not_rounded_away_in_half_precision(make, dtype, one_noise):
    """Where they are below the last digit of what the layer puts out: the difference of two rounded outputs is 0."""
    wide, narrow = make(), make()
    for pipe in (wide, narrow):
        quiet_text(pipe)
    denoiser = denoiser_of(wide)
    denoiser.to(dtype).to(torch.float32)  # the same weights, rounded once
    denoiser_of(narrow).to(dtype)
    narrow.to(dtype)
    one = Concept("cat", "object", (PromptPair("a cat b", "a b"),))
    options = dict(seeds=[0], num_inference_steps=2, progress=False)
    exact = attention_contribution(wide, one, **options)["contribution"].to_numpy()  # pyright: ignore[reportArgumentType]
    half = attention_contribution(narrow, one, **options)["contribution"].to_numpy()  # pyright: ignore[reportArgumentType]
    assert exact.min() > 0
    assert half == pytest.approx(exact, rel=0.1)
    assert all(
        value.dtype == dtype for value in denoiser_of(narrow).parameters()
    )  # the layers keep their weights


def test_weights_of_8_bits_are_refused():
    pipe = tiny.pipeline()
    pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    with pytest.raises(LocogenError, match="8 bits"):
        attention_contribution(pipe, CONCEPT, **OPTIONS)  # pyright: ignore[reportArgumentType]
