"""Theorems of causal tracing: what restoring everything or nothing gives, row by row, and the model left as found."""

import json
import re
import threading
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny

from locogen.errors import LocogenError
from locogen.interventions.corruption import Noise, corrupted_states, corrupting
from locogen.interventions.prompts import active_contexts, foreign_hooks
from locogen.interventions.states import (
    DENOISER_PARTS,
    TEXT_PARTS,
    find_states,
    find_text_states,
    restoring,
)
from locogen.localization import causal_tracing as trace, trace_effects as recovery
from locogen.localization.causal_tracing import Restoration, causal_trace
from locogen.models.families import (
    encode,
    end_position,
    subject_occurrences,
    subject_positions,
    token_spans,
)
from locogen.models.layers import find_layers
from locogen.phrasings import shown_text, subject_in
from locogen.pictures import runs
from locogen.pictures.store import PictureStore
from locogen.plan import Concept, PromptPair, Settings

CONCEPT = Concept(
    "cat", "style", (PromptPair("a big cat b", "a big b"), PromptPair("cat in dog", "in dog"))
)
NEAR, FAR = (
    1e-5,
    1e-4,
)  # float32 sums in another order; a change that shows: as in the tests of the hooks
SETTINGS = Settings(2, 5.0, 8)
POOLED = ("sd-xl", "if", "kolors")  # families that hear text by a pooled vector too


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(autouse=True)
def as_found(pipe):
    before = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items()}
    yield
    for part in (pipe.unet, pipe.text_encoder):
        assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in part.modules()) == 0
    assert active_contexts(pipe) == ()
    assert all(
        torch.equal(value, before[name]) for name, value in pipe.text_encoder.state_dict().items()
    )


def noise(pipe, prompt="a big cat b", scale=3.0, seed="0"):
    return Noise(seed, subject_positions(pipe, prompt, "cat"), scale)


def made(pipe, rows, *, settings=SETTINGS):
    """Pictures of the rows, one batch."""
    return trace.make_batch(pipe, rows, trace.TracedTexts(pipe, rows), settings)


def rows_of(pipe, *restored, scale=3.0):
    """The clean row, and a corrupted one for each tuple of restored states."""
    told = noise(pipe, scale=scale)
    return [Restoration(told_prompt, 3) for told_prompt in ["a big cat b"]] + [
        Restoration("a big cat b", 3, told, states) for states in restored
    ]


def places(pipe, *parts):
    return tuple(i for i, state in enumerate(find_states(pipe)) if state.part in parts)


# --- states --------------------------------------------------------------------------------------


def test_states_are_in_execution_order(pipe):
    states = find_states(pipe)
    assert {state.part for state in states} == set(DENOISER_PARTS)
    assert [s.name for s in states if s.part == "cross-attention"] == [
        layer.name for layer in find_layers(pipe)
    ]
    called, handles = [], []
    for state in states:
        handles.append(
            state.module.register_forward_hook(lambda *_, name=state.name: called.append(name))
        )
    made(pipe, [Restoration("dog", 0)], settings=Settings(1, 1.0, 1))
    for handle in handles:
        handle.remove()
    assert called == [state.name for state in states]
    assert [(s.part, s.index) for s in find_text_states(pipe)] == [
        (p, i) for i in range(2) for p in TEXT_PARTS
    ]


# --- the denoiser --------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_everything_restored_is_the_clean_picture_and_nothing_the_corrupted_one(pipe, guidance):
    every, text_enters = tuple(range(len(find_states(pipe)))), places(pipe, "cross-attention")
    settings = Settings(3, guidance, 8)
    clean, corrupted, all_back, enough, less = made(
        pipe, rows_of(pipe, (), every, text_enters, text_enters[:-1]), settings=settings
    )
    assert np.abs(corrupted - clean).max() > FAR  # the twin: the noise does show
    assert np.abs(all_back - clean).max() < NEAR
    assert np.abs(enough - clean).max() < NEAR  # text comes in nowhere else
    assert np.abs(less - clean).max() > FAR  # the twin: one layer short
    plain = made(pipe, [Restoration("a big cat b", 3, noise(pipe))], settings=settings)[0]
    assert np.abs(corrupted - plain).max() < NEAR


TRACED = ("sd-xl", "if", "pixart-alpha", "sana", "kolors")
CHATS = ("qwen-image", "flux-2", "flux-2-klein", "z-image", "krea-2", "kolors")


@pytest.mark.parametrize("name", tiny.fast(*TRACED[:-1], of=TRACED))
def test_other_families_are_traced_alike(name):
    """Text that enters by a pooled vector too comes back with the other states, but not with cross-attention alone."""
    pipe = tiny.FAMILIES[name]()
    every, text_enters = tuple(range(len(find_states(pipe)))), places(pipe, "cross-attention")
    told = Noise("0", subject_positions(pipe, "a big cat b", "cat"))
    rows = [Restoration("a big cat b", 3)]
    rows += [Restoration("a big cat b", 3, told, states) for states in ((), every, text_enters)]
    clean, corrupted, all_back, enough = made(pipe, rows, settings=Settings(2, 5.0, 4))
    assert np.abs(corrupted - clean).max() > FAR
    assert np.abs(all_back - clean).max() < NEAR
    assert (np.abs(enough - clean).max() > FAR) == (name in POOLED)


@pytest.mark.parametrize("name", ["sd-3", "flux"])
def test_families_without_cross_attention_are_refused(name):
    with pytest.raises(LocogenError, match="text and picture share their attention"):
        causal_trace(tiny.FAMILIES[name](), CONCEPT)


def test_the_clean_row_is_the_plain_pipelines(pipe):
    run = runs.generate(
        pipe, ["a big cat b"], seeds=[3], num_inference_steps=2, guidance_scale=5.0, batch_size=8
    )
    clean = made(pipe, rows_of(pipe, (), places(pipe, "resnet")[:3]))[0]
    assert np.abs(np.asarray(run.pictures[0], float) / 255 - clean).max() <= 1.01 / 255


def test_no_noise_is_the_clean_picture(pipe):
    some = places(pipe, "feed-forward")[2:4]
    clean, *rest = made(pipe, rows_of(pipe, (), some, scale=0.0))
    assert all(np.abs(picture - clean).max() < NEAR for picture in rest)
    clean, *rest = made(pipe, rows_of(pipe, (), some, scale=3.0))  # the twin
    assert all(np.abs(picture - clean).max() > FAR for picture in rest)


def test_rows_are_independent(pipe):
    """Each row of a batch with different states is its own run beside the clean one alone."""
    chosen = [(4,), (17,), places(pipe, "self-attention"), ()]
    together = made(pipe, rows_of(pipe, *chosen))[1:]
    alone = [made(pipe, rows_of(pipe, states))[1] for states in chosen]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(one - other).max() < NEAR
    for i, one in enumerate(together):  # the twin: no two of them are alike
        assert all(np.abs(one - other).max() > 1e-6 for other in together[i + 1 :])


def test_only_the_conditional_rows_are_restored(pipe):
    seen: list[torch.Tensor] = []
    state = find_states(pipe)[places(pipe, "cross-attention")[4]]

    def look(restored):
        seen.clear()
        with restoring(pipe, [(0, ()), (0, restored)]):
            handle = state.module.register_forward_hook(
                lambda _m, _a, out: seen.append(out.clone())
            )
            pipe(
                prompt_embeds=torch.cat([encode(pipe, [p]).states for p in ("a cat", "dog in c")]),
                negative_prompt_embeds=encode(pipe, ["", ""]).states,
                generator=[torch.Generator().manual_seed(s) for s in (0, 1)],
                num_inference_steps=1,
                output_type="latent",
            )
            handle.remove()
        return seen[0]

    before, after = look(()), look((places(pipe, "cross-attention")[4],))
    assert torch.equal(before[:3], after[:3])  # both negative rows, and the row that is copied from
    assert torch.equal(after[3], after[2]) and not torch.equal(before[3], before[2])


# --- the text encoder ----------------------------------------------------------------------------


def test_noise_is_on_the_subjects_tokens_and_scaled_to_the_spread(pipe):
    embedding = pipe.text_encoder.get_input_embeddings()
    heard: list[torch.Tensor] = []
    told = noise(pipe)
    with corrupting(pipe, told, [()]):
        handle = embedding.register_forward_hook(lambda _m, _a, out: heard.append(out.clone()))
        encode(pipe, ["a big cat b"] * 2)
        handle.remove()
    added = heard[0][1] - heard[0][0]
    others = [i for i in range(len(added)) if i not in told.at]
    assert (added[others] == 0).all() and (added[list(told.at)] != 0).all()
    large = Noise("1", tuple(range(40))).values(embedding.weight)
    assert large.std() == pytest.approx(3 * float(embedding.weight.detach().std()), rel=0.1)
    assert torch.equal(large, Noise("1", tuple(range(40))).values(embedding.weight))
    assert not torch.equal(large, Noise("2", tuple(range(40))).values(embedding.weight))


def test_noise_is_where_the_layers_hear_the_subject():
    """Sana's encoder reads an instruction first, which its layers do not hear: positions are those of the states."""
    pipe = tiny.FAMILIES["sana"]()
    told, heard = noise(pipe), []
    with corrupting(pipe, told, [(), ((2, told.at[0]),)]):
        embedding = pipe.text_encoder.get_input_embeddings()
        handle = embedding.register_forward_hook(
            lambda _m, args, out: heard.append((args[0][0], out.clone()))
        )
        clean, corrupted, _ = encode(pipe, ["a big cat b"] * 3).states
        handle.remove()
    ids, out = heard[0]
    moved = (out[1] != out[0]).any(-1)
    assert len(out[0]) > len(clean) and pipe.tokenizer.decode(ids[moved]).strip() == "cat"
    first = told.at[0]
    assert (corrupted - clean)[first].abs().max() > FAR  # Gemma reads from left to right
    assert (corrupted - clean)[:first].abs().max() < NEAR


@pytest.mark.parametrize("name", tiny.fast("qwen-image", of=CHATS))
def test_noise_lands_on_the_subject_within_a_chat(name):
    """Behind a template, and padding on either side: its states change, and only those behind it."""
    pipe = tiny.FAMILIES[name]()
    words, read = noise(pipe), []
    embedding = pipe.text_encoder.get_input_embeddings()
    with corrupting(pipe, words, [()]):
        handle = embedding.register_forward_hook(
            lambda _m, args, out: read.append((args[0][0], out.clone()))
        )
        clean, corrupted = encode(pipe, ["a big cat b"] * 2).states.flatten(2)
        handle.remove()
    ids, out = read[0]
    assert pipe.tokenizer.decode(ids[(out[1] != out[0]).any(-1)]).strip() == "cat"
    change = (corrupted - clean).abs().amax(1)  # (tokens,)
    (place,) = words.at
    assert change[place] > FAR and change[place + 1 :].max() > FAR
    begin = token_spans(pipe, "a big cat b")[0].start
    assert change[begin:place].max() < NEAR and place - begin > 1
    # But ChatGLM's padding, which stands before the prompt, reads all of it.
    assert (change[:begin].sum() > NEAR) == (name == "kolors")
    # The twin: noise on the word before begins there.
    (earlier,) = subject_positions(pipe, "a big cat b", "a")
    moved = corrupted_states(pipe, "a big cat b", Noise("0", (earlier,))).states[0].flatten(1)
    assert (moved - clean)[earlier:place].abs().max() > FAR


@pytest.mark.parametrize("name", tiny.fast("qwen-image", of=CHATS))
def test_a_chats_states_are_restored_where_the_subject_stands(name):
    """From the subject on: then the noise is at the subject alone. Behind it: there it keeps what noise made of it."""
    pipe = tiny.FAMILIES[name]()
    words, prompt = noise(pipe), "a big cat b"
    clean = encode(pipe, [prompt]).states[0].flatten(1)
    states = range(len(find_text_states(pipe)))
    assert len(states) % 2 == 0 and len(states) > 0
    (place,) = words.at
    behind = [place + 1, place + 2]
    every = tuple((state, at) for state in states for at in [place, *behind])
    beside = tuple((state, at) for state in states for at in behind)
    corrupted, restored, less = corrupted_states(
        pipe, prompt, words, [every, beside]
    ).states.flatten(2)
    change, rest = ((one - clean)[place + 1].abs().max() for one in (corrupted, restored))
    assert rest < NEAR < FAR < change
    assert (restored - clean)[place].abs().max() > FAR  # the residual stream carries the noise
    assert (less - clean)[
        behind[0]
    ].abs().max() < NEAR  # what a token's own parts put out is its own
    assert not torch.equal(less[place], restored[place])


def test_all_text_states_restored_leave_the_noise_of_the_embeddings_only(pipe):
    """The residual stream still carries the noise at the subject itself; every other token is clean again."""
    told, clean = noise(pipe), encode(pipe, ["a big cat b"]).states[0]
    every = tuple(
        (place, token)
        for place in range(len(find_text_states(pipe)))
        for token in range(len(clean))
    )
    corrupted, restored, less = corrupted_states(
        pipe, "a big cat b", told, [every, every[: len(clean)]]
    ).states
    others = [i for i in range(len(clean)) if i not in told.at]
    assert (restored - clean)[others].abs().max() < NEAR
    assert (corrupted - clean)[others].abs().max() > FAR  # the twins
    assert (less - clean)[others].abs().max() > FAR
    assert (restored - clean)[list(told.at)].abs().max() > FAR
    before = told.at[0]
    assert (corrupted - clean)[:before].abs().max() < NEAR  # CLIP reads from left to right


def test_a_text_state_is_restored_at_its_own_token(pipe):
    state, at = find_text_states(pipe)[2], end_position(pipe, "a big cat b")
    said: list[torch.Tensor] = []
    with corrupting(pipe, noise(pipe), [(), ((2, at),)]):
        handle = state.module.register_forward_hook(lambda _m, _a, out: said.append(out[0].clone()))
        encode(pipe, ["a big cat b"] * 3)
        handle.remove()
    clean, corrupted, restored = said[0]
    assert torch.equal(restored[at], clean[at]) and not torch.equal(corrupted[at], clean[at])
    rest = [i for i in range(len(clean)) if i != at]
    assert torch.equal(restored[rest], corrupted[rest])


# --- left as found, refused ----------------------------------------------------------------------


def test_an_exception_leaves_nothing(pipe):
    with pytest.raises(RuntimeError, match="the user's own"), restoring(pipe, [(0, (1,))]):
        assert active_contexts(pipe) and foreign_hooks(pipe) == ()
        raise RuntimeError("the user's own")
    with pytest.raises(RuntimeError, match="mine"), corrupting(pipe, noise(pipe), [()]):
        assert active_contexts(pipe) and foreign_hooks(pipe) == ()
        raise RuntimeError("mine")
    with (
        pytest.raises(LocogenError, match="3 prompts are encoded"),
        corrupting(pipe, noise(pipe), [()]),
    ):
        encode(pipe, ["a", "b", "c"])
    with (
        pytest.raises(LocogenError, match="6 rows, and 2 were planned"),
        restoring(pipe, [(0, ()), (0, (0,))]),
    ):
        pipe(["a", "b", "c"], num_inference_steps=1, output_type="latent")


def test_contexts_change_the_stores_keys(pipe, tmp_path):
    def make():
        return runs.generate(
            pipe, ["a cat"], store=tmp_path, num_inference_steps=1, batch_size=1, progress=False
        )

    plain = make().pictures.keys
    with restoring(pipe, [(0, (1,))]):
        assert make().pictures.keys != plain
    assert make().pictures.keys == plain


def test_what_is_not_there_is_refused(pipe):
    for ask, words in (
        (
            lambda: causal_trace(pipe, CONCEPT, parts=["resnets"]),
            "no part 'resnets': did you mean 'resnet'",
        ),
        (lambda: causal_trace(pipe, CONCEPT, parts=[]), "there are no parts"),
        (lambda: causal_trace(pipe, CONCEPT, noises=0), "at least one noise"),
        (
            lambda: causal_trace(pipe, CONCEPT, subject="zebra"),
            "does not contain the subject 'zebra'",
        ),
        (lambda: restoring(pipe, [(1, ())]).__enter__(), "no row 1, .*: use rows from 0 to 0"),
        (
            lambda: restoring(pipe, [(0, (999,))]).__enter__(),
            r"not all of the states \(999,\): .*states from 0 to 69",
        ),
        (
            lambda: corrupting(pipe, noise(pipe), [((99, 0),)]).__enter__(),
            "the encoder has states 0 to 3",
        ),
    ):
        with pytest.raises(LocogenError, match=words):
            ask()


# --- the whole -----------------------------------------------------------------------------------

QUICK = dict(
    num_inference_steps=1,
    guidance_scale=5.0,
    batch_size=8,
    scorer=tiny.FakeScorer(),
    progress=False,
)


@pytest.fixture(scope="module")
def run(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    parts = ("cross-attention", "text MLP")
    return causal_trace(pipe, CONCEPT, parts=parts, seeds=range(2), noises=2, store=folder, **QUICK)  # pyright: ignore[reportArgumentType]


def test_the_table_has_every_row_once(run):
    table = run.table
    assert dict(table["role"].value_counts()) == {
        "baseline": 4,
        "corrupted": 4 * 2,
        "restored": 4 * 2 * (16 + 2 * 3),
    }
    assert not table.duplicated(["role", "prompt", "seed", "noise", "axis", "start"]).any()
    assert len(run.plan) == len(run.pictures) == len(table)
    distinct = table["image"].nunique()
    assert (
        run.settings["generations"] > distinct
    )  # clean rows ride along in every batch that restores
    assert table.groupby(["prompt", "seed"])["noise"].nunique().eq(2).all()
    assert table[table["role"] == "corrupted"]["noise"].nunique() == 4, (
        "each seed has noises of its own"
    )


def test_the_store_is_shared_with_generate_and_resumed(pipe, run):
    folder = run.pictures.store.folder
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.png")}
    parts = ("cross-attention", "text MLP")
    again = causal_trace(
        pipe, CONCEPT, parts=parts, seeds=range(2), noises=2, store=folder, **QUICK
    )  # pyright: ignore[reportArgumentType]
    prompts = [pair.prompt for pair in CONCEPT.pairs]
    clean = runs.generate(
        pipe,
        prompts,
        seeds=range(2),
        store=folder,
        num_inference_steps=1,
        guidance_scale=5.0,
        batch_size=8,
    )
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.png")} == files
    assert again.pictures.keys == run.pictures.keys
    assert set(clean.table["image"]) == set(run.table[run.table["role"] == "baseline"]["image"])
    assert list(again.table["clip_score"]) == list(run.table["clip_score"])


def test_a_batch_that_is_too_large_is_halved(pipe, run, monkeypatch):
    """Saying so once; pictures are those that the half makes anyway, and what cannot be halved is an error."""
    parts = ("cross-attention", "text MLP")
    forward = pipe.unet.forward

    def small(sample, *args, **kwargs):
        if len(sample) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *args, **kwargs)

    def traced(size):
        one = Concept("cat", "style", CONCEPT.pairs[:1])
        return causal_trace(pipe, one, parts=parts, seeds=[0], **(QUICK | {"batch_size": size}))  # pyright: ignore[reportArgumentType]

    wanted, limit = traced(4), 8
    tiny.stand_in(monkeypatch, pipe.unet, small)
    with pytest.warns(
        UserWarning, match="a batch of 8 does not fit the memory: going on with 4"
    ) as told:
        found = traced(8)
    assert len(told) == 1 and len(found) == len(wanted) == 1 + 1 + 16 + 2 * 3
    for mine, theirs in zip(found.pictures, wanted.pictures, strict=True):
        assert np.array_equal(np.asarray(mine), np.asarray(theirs))
    limit = 3
    with (
        pytest.warns(UserWarning),
        pytest.raises(LocogenError, match=r"a batch of 2 does not fit.*offload="),
    ):
        traced(4)


def test_a_resumed_trace_goes_on_with_the_batch_size_it_had(pipe, tmp_path, monkeypatch):
    """As a run of `generate` does: another size adds up in another order."""
    parts = ("cross-attention",)
    one = Concept("cat", "style", CONCEPT.pairs[:1])

    def traced():
        return causal_trace(pipe, one, parts=parts, seeds=[0], store=tmp_path, **QUICK)  # pyright: ignore[reportArgumentType]

    whole = traced()
    (record,) = tmp_path.glob("run-*.json")
    assert json.loads(record.read_text())["batch"] == 8
    record.write_text(record.read_text().replace('"batch": 8', '"batch": 4'))
    for name in whole.table["image"][-3:]:
        (tmp_path / name).unlink()

    rows: list[int] = []
    forward = pipe.unet.forward

    def counting(sample, *args, **kwargs):
        rows.append(len(sample))
        return forward(sample, *args, **kwargs)

    tiny.stand_in(monkeypatch, pipe.unet, counting)
    again = traced()
    assert rows == [8], "four rows, doubled by guidance: three to make, and the clean one"
    assert again.pictures.keys == whole.pictures.keys
    assert json.loads(record.read_text())["batch"] == 4


def test_a_trace_writes_in_the_background_and_loses_no_picture(pipe, tmp_path, monkeypatch):
    """Before an error leaves `causal_trace`, too."""
    put = PictureStore.put
    forward = pipe.unet.forward
    threads: list[threading.Thread] = []
    calls: list[int] = []

    def noted(self, key, pixels):
        threads.append(threading.current_thread())
        put(self, key, pixels)

    def broken(sample, *args, **kwargs):
        calls.append(len(sample))
        if len(calls) == 3:
            raise RuntimeError("the third batch")
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(PictureStore, "put", noted)
    tiny.stand_in(monkeypatch, pipe.unet, broken)
    one = Concept("cat", "style", CONCEPT.pairs[:1])
    with pytest.raises(RuntimeError, match="the third batch"):
        causal_trace(pipe, one, parts=["cross-attention"], seeds=[0], store=tmp_path, **QUICK)  # pyright: ignore[reportArgumentType]
    # The clean picture rides along in both batches, and is written once.
    assert len(list(tmp_path.glob("*.png"))) == len(threads) == 8 + 7
    assert threading.main_thread() not in threads


def test_a_trace_knows_its_pipeline(pipe, run):
    assert run.made_by() is pipe


def test_effects_are_restored_minus_corrupted(run):
    table: Any = run.table
    effects: Any = recovery.trace_effect(table)
    back = table[(table["axis"] == "cross-attention") & (table["start"] == 5)]["clip_score"].mean()
    noisy = table[table["role"] == "corrupted"]["clip_score"].mean()
    clean = table[table["role"] == "baseline"]["clip_score"].mean()
    lines = effects.set_index(["axis", "position"])["estimate"]
    assert lines["cross-attention", 5] == pytest.approx(back - noisy)
    ceiling = effects[effects["axis"] == "ceiling"].iloc[0]
    assert ceiling["estimate"] == pytest.approx(clean - noisy) and ceiling["n"] == 4
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
    assert set(effects["axis"]) == {
        "cross-attention",
        *(f"text MLP, {t}" for t in trace.TOKENS),
        "ceiling",
    }
    with pytest.raises(LocogenError, match="missing or not scored"):
        recovery.trace_effect(table[table["start"].ne(5) | (table["seed"] == 0)])
    with pytest.raises(LocogenError, match="one concept's causal_trace"):
        recovery.trace_effect(table[table["role"] != "corrupted"])


def traced(gains, *, lost=1.0, text=0.0, seeds=6):
    """A table as causal_trace leaves it: cross-attention layer `i` brings back `gains[i]`, one text state `text`."""
    import pandas as pd

    rng, rows = np.random.default_rng(0), []
    for prompt in ("p", "q"):
        for seed in range(seeds):
            base, common = (
                2 + rng.normal(0, 0.1),
                {"concept": "c", "kind": "style", "prompt": prompt, "seed": seed},
            )
            rows.append({**common, "role": "baseline", "clip_score": base + lost})
            rows.append({**common, "role": "corrupted", "noise": f"{seed}", "clip_score": base})
            for axis, values in (("cross-attention", gains), ("text MLP, last", (0.0, text))):
                for start, gain in enumerate(values):
                    score = base + gain + rng.normal(0, 0.02)
                    told = {
                        "role": "restored",
                        "noise": f"{seed}",
                        "axis": axis,
                        "start": start,
                        "clip_score": score,
                    }
                    rows.append({**common, **told})
    return pd.DataFrame(rows).astype({"start": "Int64"})


def test_the_planted_state_is_found():
    table = traced([0, 0, 0.8, 0.1], text=0.1)
    best = recovery.best_state(table)
    assert (best.axis, best.position, best.reason) == ("cross-attention", 2, "")
    assert best.low < 0.8 < best.high and best.share == pytest.approx(0.8, abs=0.05)
    assert recovery.layer_found(recovery.trace_effect(table)).start == 2
    both = recovery.sides(table)
    assert both is not None and both.side == "denoiser" and both.high < 0
    other = traced([0, 0, 0.1, 0.1], text=0.8)
    both = recovery.sides(other)
    assert (
        both is not None and both.side == "text encoder" and both.text == "text MLP, last, layer 1"
    )
    assert "brings back" in recovery.layer_found(recovery.trace_effect(other)).reason


def test_a_layer_is_the_best_only_where_it_is_ahead():
    """Each with its interval; of two that are alike one merely has the larger mean."""
    interval = r"brings back 0\.[0-9]+ \[0\.[0-9]+, 0\.[0-9]+\], [0-9]+ % of what the noise took"
    alike = recovery.layer_found(recovery.trace_effect(traced([0, 0, 0.2, 0.2], text=0.8)))
    assert re.fullmatch(f"the one with the largest mean, layer [23], {interval}", alike.reason)
    ahead = recovery.layer_found(recovery.trace_effect(traced([0, 0, 0.3, 0], text=0.8)))
    assert re.fullmatch(f"the best, layer 2, {interval}", ahead.reason), "the twin"
    none = recovery.layer_found(recovery.trace_effect(traced([0.0, 0.0, 0.0]))).reason
    assert re.search(
        r"than chance would; the largest mean, −?0\.0\d* \[.*\], is that of layer", none
    )


@pytest.mark.parametrize(
    "table, words",
    [
        (traced([0.0, 0.0, 0.0]), "no state brings back more than chance"),
        (traced([0.0, 0.2, 0.0]), "of what the noise took"),
        (traced([0.0, 0.0, 0.0], lost=0.0), "it is not clear that the noise changes the score"),
    ],
)
def test_what_is_no_place_is_said_to_be_none(table, words):
    assert words in recovery.best_state(table).reason
    assert recovery.layer_found(recovery.trace_effect(table)).start is None


@pytest.mark.parametrize(
    "lost, words",
    [
        (-1.0, "the noise takes nothing: it moves the score the other way, by 1.0"),
        (0.0, "it is not clear that the noise changes the score (0.0"),
    ],
)
def test_noise_that_moves_the_score_the_other_way_is_not_called_unclear(lost, words):
    table = traced([0.0, 0.0, 0.0], lost=lost)
    table.loc[table["role"] == "baseline", "clip_score"] += [0.01, -0.01] * 6
    effects = recovery.trace_effect(table)
    assert recovery.best_state(table).reason.startswith(words)
    assert recovery.layer_found(effects).reason == recovery.best_state(table).reason
    # Without an interval nothing is clear, and that is what is said.
    alone = recovery.best_state(table[(table["prompt"] == "p") & (table["seed"] == 0)]).reason
    assert "not clear" in alone and alone.endswith(", without an interval)")


def test_no_side_is_named_where_no_state_is_the_place():
    """One side's best is ahead of the other's in both tables: only a state that is the place makes it the answer."""
    weak, strong = (recovery.sides(traced([0.0, gain, 0.0])) for gain in (0.2, 0.8))
    assert (
        weak is not None
        and weak.high < 0
        and "of what the noise took" in weak.reason
        and weak.side is None
    )
    assert (
        strong is not None and strong.high < 0 and not strong.reason and strong.side == "denoiser"
    )
    few = recovery.sides(traced([0.0, 0.8, 0.0], seeds=3))
    assert (
        few is not None and few.high < 0 and "under four seeds" in few.reason and few.side is None
    )


# --- the subject's tokens ------------------------------------------------------------------------


def test_every_occurrence_of_the_subject_is_corrupted_and_restored(pipe):
    """And nothing else: a comma ends the name, another word does not hold it."""
    rows = list(trace.planned_rows(pipe, "cat, b concat, cat", "cat", 0, TEXT_PARTS, [(3.0, 0)]))
    first, second = subject_occurrences(pipe, "cat, b concat, cat", "cat")
    assert {row.noise.at for row in rows if row.noise is not None} == {first + second}
    assert first == (1,) and second == (end_position(pipe, "cat, b concat, cat") - 1,)
    at = {str(row.axis): {token for _, token in row.text} for row in rows if row.axis is not None}
    assert at["text MLP, last subject"] == {first[-1], second[-1]}
    assert at["text MLP, last"] == {second[-1] + 1}


def test_noise_on_one_of_two_occurrences_leaves_the_other_clean(pipe):
    """Why it must be on both: CLIP reads from left to right, so the first one's state has not heard of the second."""
    prompt = "cat in dog cat"
    first, second = (words[-1] for words in subject_occurrences(pipe, prompt, "cat"))
    clean = encode(pipe, [prompt]).states[0]
    one, both = (
        corrupted_states(pipe, prompt, Noise("0", at)).states[0]
        for at in ((second,), (first, second))
    )
    assert (clean[first] - one[first]).norm() < NEAR
    assert (clean[first] - both[first]).norm() > FAR


def test_facts_are_scored_by_their_answer():
    pair = PromptPair("a picture of the animal of france in neon", "a picture of a robot in neon")
    fact = Concept("animal of france", "fact", (pair,), answer="a rooster")
    assert subject_in(fact, pair) == "animal of france"
    assert shown_text(fact, pair) == "a picture of a rooster in neon"
    assert shown_text(Concept("animal of france", "fact", (pair,)), pair) == pair.prompt
    assert subject_in(Concept("unsaid", "fact", (pair,)), pair) == "the animal of france"
    style = Concept("cat", "style", CONCEPT.pairs, text="a cat")
    assert shown_text(style, style.pairs[0]) == "a cat"
