"""Edits on a tiny Stable Diffusion: fit, apply, undo, save, share; and what they refuse."""

import dataclasses
import inspect
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import tiny

from locogen.editing import weights as editing_weights
from locogen.editing.closed_form import returning_map
from locogen.editing.edit import Edit, fit_edit, undo_all
from locogen.editing.fit import Fit, Options, augmented_states
from locogen.errors import LocogenError
from locogen.interventions.layer_inputs import LayerInputs
from locogen.models.families import encode, end_position, subject_occurrences, subject_positions
from locogen.models.layers import find_layers
from locogen.phrasings import Phrasing, default_phrasings, exchanged
from locogen.pictures import runs
from locogen.plan import Concept, PromptPair

STYLE = Concept("cat", "style", (PromptPair("a dog in cat", "a dog"),))
PAIRS = [("a cat", "a do"), ("the cat", "the do")]


@pytest.fixture(scope="module")
def shared():
    return tiny.pipeline()


@pytest.fixture
def pipe(shared):
    before = {n: p.clone() for n, p in shared.unet.named_parameters()}
    yield shared
    left = [n for n, p in shared.unet.named_parameters() if not torch.equal(p, before[n])]
    assert not left, f"the test left {left[:2]} changed"


def fit(pipe, layers=(2, 3), pairs=PAIRS, **options) -> Edit:
    return fit_edit(pipe, STYLE, layers=layers, phrasings=pairs, **options)


def weights(pipe, edit: Edit) -> dict[str, torch.Tensor]:
    return {n: pipe.unet.get_parameter(n).detach().clone() for n in edit.changes}


def originals(pipe):
    return editing_weights._STATES.get(pipe.unet, editing_weights._State()).originals


def same(one, two) -> bool:
    return all(torch.equal(one[n], two[n]) for n in one)


def state(pipe, prompt: str, place: int) -> torch.Tensor:
    return encode(pipe, [prompt]).states[0][place].double()


# --- what is fitted ------------------------------------------------------------------------------


def test_a_small_ridge_sends_the_subject_where_its_target_goes(pipe) -> None:
    edit = fit(pipe, ridge=1e-9)
    for source, target in PAIRS:
        x = state(pipe, source, subject_positions(pipe, source, "cat")[-1])
        y = state(pipe, target, end_position(pipe, target) - 1)
        for name, old in weights(pipe, edit).items():
            new = old.double() + edit.changes[name].change
            assert torch.allclose(x @ new.T, y @ old.double().T, atol=1e-5)
            assert not torch.allclose(x @ old.double().T, y @ old.double().T, atol=1e-2)


def test_keys_and_values_have_ridges_of_their_own(pipe) -> None:
    plain, apart = fit(pipe), fit(pipe, ridge_v=100.0)
    moved = {
        n: not torch.allclose(plain.changes[n].change, apart.changes[n].change)
        for n in plain.changes
    }
    assert {n.rpartition(".to_")[2]: m for n, m in moved.items()} == {
        "k.weight": False,
        "v.weight": True,
    }


@pytest.mark.parametrize(
    ("tokens", "rows"), [("last_subject", 2), ("subject", 4), ("end", 2), ("all", 78)]
)
def test_tokens_that_are_edited(pipe, tokens: str, rows: int) -> None:
    """`ab` is two tokens of the tiny vocabulary, a prompt 40; the start mark is never edited."""
    edit = fit(pipe, pairs=[("a ab", "a do"), ("the ab", "the do")], subject="ab", tokens=tokens)
    assert all(c.rank == min(rows, *c.change.shape) for c in edit.changes.values())


def test_null_space_leaves_the_preserved_prompt_alone(pipe) -> None:
    x = state(pipe, "a dog", end_position(pipe, "a dog") - 1)
    loose, soft = fit(pipe), fit(pipe, preserve=["a dog"], preserve_weight=100.0)
    exact = fit(pipe, preserve=["a dog"], null_space=True)
    moved = [
        max(float((x @ c.change.T).norm()) for c in e.changes.values())
        for e in (loose, soft, exact)
    ]
    assert moved[0] > 10 * moved[1] > 0
    assert moved[2] < 1e-10


def test_what_every_prompt_holds_can_be_kept_exactly(pipe) -> None:
    start = state(pipe, "", 0)
    padding = torch.stack([state(pipe, "", place) for place in range(1, 40)]).mean(0)
    loose = fit(pipe, preserve=["a dog"], null_space=True)
    anchored = fit(pipe, preserve=["a dog"], null_space=True, anchored=True)
    for x in (start, padding, state(pipe, "a dog", end_position(pipe, "a dog") - 1)):
        assert max(float((x @ c.change.T).norm()) for c in anchored.changes.values()) < 1e-10
    assert max(float((start @ c.change.T).norm()) for c in loose.changes.values()) > 1e-6
    # The start mark is the same in every prompt.
    assert torch.allclose(start, state(pipe, "a dog", 0))


def test_an_empty_prompt_that_is_nothing_but_its_start_is_kept_by_that() -> None:
    """Kolors pads in front, and does not read it."""
    kolors = tiny.kolors()
    inputs = LayerInputs(kolors, find_layers(kolors)[1:2])
    start = inputs.states("", inputs.layers[0])[-1]  # (width,)
    moved = []
    for anchored in (True, False):
        edit = fit(
            kolors, (1,), [("a cat", "a dog")], preserve=["x"], null_space=True, anchored=anchored
        )
        moved.append(max(float((one.change @ start).norm()) for one in edit.changes.values()))
    assert moved[0] < 1e-9 < moved[1]  # without anchors, the twin


def test_the_filter_keeps_what_the_edit_would_disturb(pipe) -> None:
    prompts = ["a dog", "a do", "b c d", "x, y"]
    states = [state(pipe, text, end_position(pipe, text) - 1) for text in prompts]
    free = fit(pipe)
    filtered = fit(pipe, preserve=prompts, null_space=True, filtered=True)
    every = fit(pipe, preserve=prompts, null_space=True)

    def moves(edit):
        sizes = [max(float((x @ c.change.T).norm()) for c in edit.changes.values()) for x in states]
        return torch.tensor(sizes)

    assert (moves(every) < 1e-10).all()
    is_kept = moves(filtered) < 1e-10
    assert 0 < is_kept.sum() < len(prompts)
    assert moves(free)[is_kept].min() > moves(free)[~is_kept].max()


def test_augmented_states_are_kept_too(pipe) -> None:
    """What the matrix answers least is kept with every preserved state, in any amount; before, not."""
    x = state(pipe, "a dog", end_position(pipe, "a dog") - 1)
    options = {"preserve": ["a dog", "a do"], "null_space": True, "matrices": "v"}
    plain = fit(pipe, **options)
    augmented = fit(pipe, augmented=3, **options)
    for name, change in augmented.changes.items():
        weight = pipe.unet.get_parameter(name).detach().double()
        _, sizes, directions = torch.linalg.svd(weight, full_matrices=False)
        for noise in (-2.0, 0.0, 3.0):
            moved = (x + noise * directions[-1]) @ change.change.T
            assert float(moved.norm()) < 1e-10
            # The matrix hardly tells it from the state itself.
            assert float((noise * weight @ directions[-1]).norm()) <= abs(noise) * sizes[-1] * 1.01
        assert float((plain.changes[name].change @ directions[-1]).norm()) > 1e-6
    assert augmented.refit(pipe).recipe["options"]["augmented"] == 3


def test_augmented_states_are_filtered_as_the_others_are(pipe) -> None:
    """So that fewer of them are kept than there are, and none that the edit would not disturb."""
    rows = torch.cat(
        [state(pipe, text, end_position(pipe, text) - 1)[None] for text in ("a dog", "b")]
    )
    weight = next(p for n, p in pipe.unet.named_parameters() if "attn2.to_v" in n)
    more = augmented_states(rows, weight, 4)
    assert more.shape == (8, rows.shape[1])
    assert torch.linalg.matrix_rank(more) == 3  # the two, and one direction more
    options = Options(preserve=["a dog", "b"], null_space=True, filtered=True, augmented=4)
    layer = find_layers(pipe)[0]
    phrasings = [Phrasing("a cat", "a dog", "cat")]
    fitting = Fit(LayerInputs(pipe, [layer]), phrasings, options, "cpu")
    kept = fitting._disturbed(layer, more, 0.01)
    assert 0 < len(kept) < len(more)


def test_values_can_be_edited_alone(pipe) -> None:
    edit = fit(pipe, matrices="v")
    assert edit.changes and all(".to_v." in name for name in edit.changes)
    both = fit(pipe)
    for name, change in edit.changes.items():
        assert torch.equal(change.change, both.changes[name].change)
    assert edit.refit(pipe).changes.keys() == edit.changes.keys()


# --- what would bring it back --------------------------------------------------------------------


def answering(pipe, edit, prompts):
    """States of which the edited model says what it said of the prompts' subjects: RECE's rows."""
    read = [
        module.weight.detach()
        for layer in find_layers(pipe)
        for module in (layer.module.to_k, layer.module.to_v)
    ]
    old = [weight.clone() for weight in read]
    with edit.applied(pipe):
        mapped = returning_map(old, [weight.clone() for weight in read], ridge=0.1)
    states = [state(pipe, p, subject_positions(pipe, p, "cat")[-1]) for p in prompts]
    return torch.stack(states) @ (torch.eye(len(mapped)) + mapped.T)


def test_no_rounds_are_the_plain_edit_to_the_bit(pipe) -> None:
    plain, none, one = fit(pipe), fit(pipe, rounds=0), fit(pipe, rounds=1)
    for name, change in plain.changes.items():
        for part in ("up", "down"):
            assert torch.equal(getattr(change, part), getattr(none.changes[name], part))
        assert not torch.allclose(change.change, one.changes[name].change)  # the twin
    again = one.refit(pipe)
    assert all(torch.equal(again.changes[n].change, one.changes[n].change) for n in again.changes)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_what_the_closed_form_attack_found_goes_to_the_target_after_a_round(pipe, ridge) -> None:
    """The attack's rows are nearer to their targets; before the round, they were not."""
    edits = [fit(pipe, ridge=ridge, rounds=rounds) for rounds in (0, 1, 2)]
    target = torch.stack([state(pipe, t, end_position(pipe, t) - 1) for _, t in PAIRS])
    for before, after in itertools.pairwise(edits):
        rows = answering(pipe, before, [source for source, _ in PAIRS])
        missed = []
        for edit in (before, after):
            gaps = [
                rows @ (old.double() + edit.changes[name].change).T - target @ old.double().T
                for name, old in weights(pipe, edit).items()
            ]
            missed.append(float(sum(gap.square().sum() for gap in gaps)))
        assert missed[1] < 0.99 * missed[0]


def test_rounds_keep_what_a_null_space_keeps(pipe) -> None:
    kept = {"preserve": ["a dog"], "rounds": 2}
    p = state(pipe, "a dog", end_position(pipe, "a dog") - 1)
    exact, loose = fit(pipe, null_space=True, **kept), fit(pipe, **kept)
    for name in exact.changes:
        assert (exact.changes[name].change @ p).norm() < 1e-9
        assert (loose.changes[name].change @ p).norm() > 1e-6  # the twin


def test_a_preserved_row_moves_no_further_than_its_weight_allows(pipe) -> None:
    """w Σ‖Δp‖² is at most what the edit would miss without a change; w = 1e-6 allows any."""
    p = state(pipe, "a dog", end_position(pipe, "a dog") - 1)
    sources = [source for source, _ in PAIRS]
    target = torch.stack([state(pipe, t, end_position(pipe, t) - 1) for _, t in PAIRS])
    source = torch.stack([state(pipe, s, subject_positions(pipe, s, "cat")[-1]) for s in sources])
    moved = {}
    for weight in (1e-6, 1e4):
        kept = {"preserve": ["a dog"], "preserve_weight": weight}
        plain, one = fit(pipe, **kept), fit(pipe, rounds=1, **kept)
        rows = torch.cat([source, answering(pipe, plain, sources)])
        moved[weight] = 0.0
        for name, old in weights(pipe, one).items():
            missed = ((target.repeat(2, 1) - rows) @ old.double().T).square().sum()
            change = (one.changes[name].change @ p).square().sum()
            assert weight * change <= missed * (1 + 1e-6)
            moved[weight] += float(change)
    assert moved[1e4] < 1e-3 * moved[1e-6]


def test_an_edit_of_outputs_takes_them_from_every_text(pipe) -> None:
    """What the matrices can say at all has two directions fewer: one for each phrasing."""
    strong = {"ridge": 1e-9, "matrices": "v"}
    edit = fit(pipe, side="output", preserve_weight=1e-9, **strong)
    assert all(name.endswith("to_v.weight") for name in edit.changes)
    other = fit(pipe, **strong)
    for name, old in weights(pipe, edit).items():
        before, after, twin = (
            torch.linalg.svdvals(old.double() + change)
            for change in (0, edit.changes[name].change, other.changes[name].change)
        )
        assert (after[-2:] < 1e-6 * before[0]).all()
        assert (after[:-2] > 1e-3 * before[0]).all()
        assert (twin > 1e-3 * before[0]).all()


def test_ordinary_captions_are_dear(pipe) -> None:
    captions = ["a dog", "a do", "do a dog", "dog do"]
    x = torch.stack([state(pipe, c, end_position(pipe, c)) for c in captions])
    loose, dear = fit(pipe, ridge=1.0), fit(pipe, ridge=1.0, ordinary=captions)
    reach = [
        sum(float((x @ c.change.T).norm() / c.change.norm()) for c in e.changes.values())
        for e in (loose, dear)
    ]
    assert reach[1] < reach[0]


def test_several_concepts_are_solved_jointly(pipe) -> None:
    both = fit_edit(
        pipe,
        [STYLE, Concept("dog", "style", (PromptPair("a do in dog", "a do"),))],
        layers=[1],
        ridge=1e-9,
    )
    for subject in ("cat", "dog"):
        x = state(pipe, subject, subject_positions(pipe, subject, subject)[-1])
        y = state(pipe, "a picture", end_position(pipe, "a picture") - 1)
        for name, old in weights(pipe, both).items():
            assert torch.allclose(
                x @ (old.double() + both.changes[name].change).T, y @ old.double().T, atol=1e-4
            )


def test_every_occurrence_of_the_subject_is_edited_and_no_comma(pipe) -> None:
    """Each as the word in its own place, where the target has as many."""
    source, target = "cat, a cat, b", "dog, a dog, b"
    edit = fit(pipe, pairs=[(source, target)], ridge=1e-9)
    old, new = (
        [words[-1] for words in subject_occurrences(pipe, *side)]
        for side in ((source, "cat"), (target, "dog"))
    )
    assert len(old) == 2 and all(c.rank == 2 for c in edit.changes.values())
    for place, other in zip(old, new, strict=True):
        x, y = state(pipe, source, place), state(pipe, target, other)
        for name, weight in weights(pipe, edit).items():
            changed = weight.double() + edit.changes[name].change
            assert torch.allclose(x @ changed.T, y @ weight.double().T, atol=1e-5)
    reader = LayerInputs(pipe, find_layers(pipe)[:1])
    assert reader.exchange(source, "a dog.", "cat", "last_subject", "dog") == (
        old,
        [2, 2],
    )  # the only one


def test_punctuation_is_not_what_is_edited(pipe) -> None:
    reader = LayerInputs(pipe, find_layers(pipe)[:1])
    assert reader.exchange("a cat, b", "a dog.", "cat,", "last_subject", "dog.") == ([2], [2])
    assert reader.exchange("a cat", "a dog.", "cat", "last_subject") == ([2], [2])
    assert reader.places("a dog.", "last_subject") == (2,)


def test_an_edit_towards_nothing_is_heard_as_the_empty_prompts_end(pipe, tmp_path) -> None:
    edit = fit(pipe, pairs=[("a cat", ""), ("cat", "")], ridge=1e-9)
    x, y = state(pipe, "a cat", 2), state(pipe, "", end_position(pipe, ""))
    for name, old in weights(pipe, edit).items():
        new = old.double() + edit.changes[name].change
        assert torch.allclose(x @ new.T, y @ old.double().T, atol=1e-5)
        assert not torch.allclose(x @ old.double().T, y @ old.double().T, atol=1e-2)
    empty = Concept("cat", "object", (PromptPair("a cat in b", ""),))
    whole = fit_edit(pipe, empty, layers=[1])
    assert {p["target"] for p in whole.recipe["phrasings"]} == {""}
    whole.save(tmp_path / "edit.safetensors")
    assert same_change(Edit.load(tmp_path / "edit.safetensors").refit(pipe), whole)
    asked = fit_edit(
        pipe, Concept("cat", "object", (PromptPair("a cat in b", "in b"),)), layers=[1], becomes=""
    )
    assert same_change(asked, whole)
    for tokens in ("subject", "end", "all"):
        assert fit(pipe, pairs=[("a cat", "")], tokens=tokens).changes


def same_change(one: Edit, two: Edit) -> bool:
    return all(
        torch.equal(change.change, two.changes[n].change) for n, change in one.changes.items()
    )


@pytest.mark.parametrize("long", ["source", "preserve", "ordinary"])
def test_cut_texts_of_an_edit_are_warned_of(pipe, long: str) -> None:
    words = "a cat " + "b " * 40
    options = {"source": {"pairs": [(words, "a do")]}, "preserve": {"preserve": [words]}}
    options["ordinary"] = {"ordinary": [words]}
    with pytest.warns(UserWarning, match="longer than 40 tokens") as caught:
        fit(pipe, **options[long])
    assert len(caught) == 1 and caught[0].filename == __file__


def test_an_edit_of_words_that_are_heard_alike_is_refused(pipe) -> None:
    with pytest.raises(LocogenError, match="become the same tokens"):
        fit(pipe, pairs=[("a cat", "a Cat")])
    with pytest.warns(UserWarning, match="does not know '犬'"):
        fit(pipe, pairs=[("a cat 犬", "a do")])


def test_default_phrasings_by_kind() -> None:
    style = default_phrasings(
        Concept("van gogh", "style", (PromptPair("a house in the style of van gogh", "a house"),))
    )
    assert Phrasing("a picture in the style of van gogh", "a picture", "van gogh") in style
    gone = default_phrasings(
        Concept("owl", "object", (PromptPair("a picture of an owl in neon", "a picture in neon"),))
    )
    assert Phrasing("a picture of an owl", "a picture", "owl") in gone
    pair = PromptPair("a picture of the animal of france in neon", "a picture of a robot in neon")
    fact = default_phrasings(Concept("france", "fact", (pair,)))
    assert Phrasing("an image of the animal of france", "an image of a robot", "france") in fact
    other = default_phrasings(
        Concept("owl", "object", (PromptPair("a picture of an owl", "a picture"),)), becomes="a cat"
    )
    assert Phrasing("an owl", "a cat", "owl") in other
    with pytest.raises(LocogenError, match="do not show which words"):
        exchanged(PromptPair("a dog", "a dog in neon"))


# --- on and off ----------------------------------------------------------------------------------


def test_applied_changes_pictures_and_leaves_every_bit_as_found(pipe, tmp_path) -> None:
    edit = fit(pipe, ridge=1e-3)
    prompts = ["a cat", "a dog"]

    def make():
        return [
            np.asarray(p)
            for p in runs.generate(pipe, prompts, store=tmp_path, num_inference_steps=2).pictures
        ]

    before, own = make(), weights(pipe, edit)
    with edit.applied(pipe):
        during = make()
        assert not same(weights(pipe, edit), own)
    assert same(weights(pipe, edit), own)
    assert not np.array_equal(before[0], during[0])
    assert all(np.array_equal(a, b) for a, b in zip(before, make(), strict=True))
    with pytest.raises(RuntimeError, match="the user's own"), edit.applied(pipe):
        raise RuntimeError("the user's own")
    assert same(weights(pipe, edit), own)


def test_adding_and_subtracting_the_change_is_not_an_undo(pipe) -> None:
    """Why the originals are kept: the subtraction rounds."""
    edit = fit(pipe)
    own = weights(pipe, edit)
    there = {
        n: (w + edit.changes[n].change.float()) - edit.changes[n].change.float()
        for n, w in own.items()
    }
    assert not same(there, own)


def test_strength_scales_the_change(pipe) -> None:
    edit = fit(pipe)
    own = weights(pipe, edit)
    with edit.applied(pipe, strength=0.5):
        half = weights(pipe, edit)
    for name, change in edit.changes.items():
        assert torch.allclose((half[name] - own[name]).double(), 0.5 * change.change, atol=1e-5)
    with edit.applied(pipe, strength=0.0):
        assert same(weights(pipe, edit), own)


def test_joint_edits_come_off_in_any_order(pipe) -> None:
    one, two = fit(pipe), fit(pipe, pairs=[("a cat", "a dog")])
    own = weights(pipe, one)
    one.apply_(pipe)
    alone = weights(pipe, one)
    two.apply_(pipe)
    both = weights(pipe, one)
    for name, w in own.items():
        assert torch.allclose(
            both[name], (w + one.changes[name].change + two.changes[name].change).float(), atol=1e-5
        )
    one.undo_(pipe)
    two.undo_(pipe)
    assert same(weights(pipe, one), own)
    two.apply_(pipe)
    one.apply_(pipe)
    two.undo_(pipe)
    assert same(weights(pipe, one), alone)
    one.undo_(pipe)


def test_sequential_edits_come_off_last_first(pipe) -> None:
    one = fit(pipe)
    own = weights(pipe, one)
    one.apply_(pipe)
    two = fit(pipe, pairs=[("a cat", "a dog")])
    two.apply_(pipe)
    with pytest.raises(LocogenError, match="undo the later edit"):
        one.undo_(pipe)
    two.undo_(pipe)
    one.undo_(pipe)
    assert same(weights(pipe, one), own)
    with pytest.raises(LocogenError, match="made for other weights"):
        two.apply_(pipe)


def test_edits_of_other_layers_are_joint(pipe) -> None:
    one = fit(pipe, layers=[0])
    one.apply_(pipe)
    two = fit(pipe, layers=[5])
    two.apply_(pipe)
    one.undo_(pipe)
    two.undo_(pipe)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_never_half_edited(pipe, monkeypatch, error) -> None:
    """An interrupt between two matrices rolls back the first."""
    edit = fit(pipe)
    own, copied = weights(pipe, edit), []
    real = torch.Tensor.copy_

    def copy(self, other, *rest):
        copied.append(self)
        if len(copied) == 3:
            assert not same(weights(pipe, edit), own)  # half edited here
            raise error
        return real(self, other, *rest)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    with pytest.raises(error):
        edit.apply_(pipe)
    monkeypatch.undo()
    assert same(weights(pipe, edit), own)
    with edit.applied(pipe):
        pass


def interrupting(monkeypatch, at: set[int]) -> None:
    """Raise KeyboardInterrupt at these calls of `copy_`, counted from 1."""
    real, calls = torch.Tensor.copy_, iter(range(1, 1000))

    def copy(self, other, *rest):
        if next(calls) in at:
            raise KeyboardInterrupt
        return real(self, other, *rest)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)


@pytest.mark.parametrize("at", [{1}, {3}, {3, 4}, {2, 4, 6}])
def test_ctrl_c_pressed_again_and_again_leaves_nothing_half(pipe, monkeypatch, at) -> None:
    edit = fit(pipe)
    own = weights(pipe, edit)
    interrupting(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt):
        edit.apply_(pipe)
    monkeypatch.undo()
    assert same(weights(pipe, edit), own)
    assert not editing_weights.is_applied(
        pipe.unet, editing_weights.WeightChange("", edit.changes, edit.digest)
    )


@pytest.mark.parametrize("at", [{1}, {3}, {3, 4}])
def test_an_interrupted_undo_goes_on_to_its_end(pipe, monkeypatch, at) -> None:
    edit = fit(pipe)
    own = weights(pipe, edit)

    def within() -> None:
        with edit.applied(pipe):
            assert not same(weights(pipe, edit), own)
            interrupting(monkeypatch, at)

    with pytest.raises(KeyboardInterrupt):
        within()
    monkeypatch.undo()
    assert same(weights(pipe, edit), own)
    assert not originals(pipe)


def traced(nth: int, run) -> bool:
    """Call `run` with Ctrl-C at the nth line that `_commit` and what it writes with execute; whether it came so far."""
    lines = iter(range(nth + 1))

    def trace(frame, event, _):
        if frame.f_code not in (editing_weights._commit.__code__, editing_weights._write.__code__):
            return None
        if event == "line" and next(lines, None) == nth:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(
            True
        )  # an interrupt between the last line of `with no_grad` and its end leaves it off
    return False


@pytest.mark.parametrize("undoing", [False, True])
def test_wherever_an_interrupt_falls_the_originals_are_known(pipe, undoing) -> None:
    edit = fit(pipe, layers=[2])
    own = weights(pipe, edit)
    for nth in itertools.count():
        if undoing:
            edit.apply_(pipe)
        came = traced(nth, lambda: (edit.undo_ if undoing else edit.apply_)(pipe))
        assert same(weights(pipe, edit), own) != editing_weights.is_applied(pipe.unet, edit._change)
        editing_weights.remove_all(pipe.unet)
        assert same(weights(pipe, edit), own)
        if not came:
            break
    assert nth > 15


def test_an_interrupt_before_the_first_write_keeps_no_stale_originals(pipe, monkeypatch) -> None:
    edit = fit(pipe)
    monkeypatch.setattr(
        editing_weights, "_sum", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        edit.apply_(pipe)
    assert not originals(pipe)


def test_a_twin_from_a_file_undoes_it_and_so_does_undo_all(pipe, tmp_path) -> None:
    edit = fit(pipe)
    own = weights(pipe, edit)
    edit.save(tmp_path / "cat.safetensors")
    twin = Edit.load(tmp_path / "cat.safetensors")
    edit.apply_(pipe)
    with pytest.raises(LocogenError, match="applied already"):
        twin.apply_(pipe)
    with pytest.raises(LocogenError, match="applied already"), twin.applied(pipe):
        pass
    assert not same(weights(pipe, edit), own)  # the refused context took nothing off
    twin.undo_(pipe)
    assert same(weights(pipe, edit), own)
    edit.apply_(pipe)
    fit(pipe, pairs=[("a cat", "a dog")]).apply_(pipe)
    undo_all(pipe)
    assert same(weights(pipe, edit), own)
    with pytest.warns(UserWarning, match="A copy of an edited model"):
        undo_all(pipe)


def test_weights_that_cannot_hold_the_edit_stay_as_they_are() -> None:
    pipe = tiny.pipeline().to(torch.float16)
    edit = fit(pipe)
    own = weights(pipe, edit)
    for strength, says in ((float("nan"), "finite number"), (1e9, "overflow")):
        with pytest.raises(LocogenError, match=says):
            edit.apply_(pipe, strength=strength)
    assert same(weights(pipe, edit), own)


def test_lora_loaded_within_the_context_does_not_keep_the_edit_on(tmp_path) -> None:
    pipe = tiny.pipeline()
    edit = fit(pipe)
    own = weights(pipe, edit)
    edit.to_lora(tmp_path / "lora.safetensors")
    with pytest.warns(UserWarning, match=r"'cat' was applied twice"), edit.applied(pipe):
        pipe.unet.load_lora_adapter(str(tmp_path / "lora.safetensors"), prefix="unet")
    pipe.unload_lora_weights()
    assert same(weights(pipe, edit), own)


def test_refuses_fused_projections() -> None:
    pipe = tiny.pipeline()
    edit = fit(pipe)
    pipe.fuse_qkv_projections(vae=False)
    for attempt in (lambda: fit(pipe), lambda: edit.apply_(pipe)):
        with pytest.raises(LocogenError, match="unfuse_qkv_projections"):
            attempt()
    pipe.unfuse_qkv_projections(vae=False)
    with edit.applied(pipe):
        pass


def test_twice_or_never(pipe) -> None:
    edit = fit(pipe)
    with pytest.raises(LocogenError, match="A copy of an edited model"):
        edit.undo_(pipe)
    with edit.applied(pipe), pytest.raises(LocogenError, match="applied already"):
        edit.apply_(pipe)


# --- other models --------------------------------------------------------------------------------


def test_refuses_a_model_it_was_not_made_for() -> None:
    pipe, sibling = tiny.pipeline(), tiny.pipeline()
    edit = fit(pipe)
    with torch.no_grad():
        sibling.unet.get_parameter(next(iter(edit.changes)))[0, 0] += 1e-3
    with pytest.raises(LocogenError, match=r"made for other weights.*refit"):
        edit.apply_(sibling)
    with edit.refit(sibling).applied(sibling):
        pass
    with pytest.raises(LocogenError, match=r"float16 here, float32 where it was made, do not"):
        edit.apply_(tiny.pipeline().to(torch.float16))
    wide = tiny.pipeline(block_out_channels=(16, 16, 16, 16))
    with pytest.raises(LocogenError, match=r"has shape \(16, 16\), .* made for \(8, 16\)"):
        fit(pipe, layers=[0]).apply_(wide)
    short = tiny.pipeline(
        block_out_channels=(8, 8),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    with pytest.raises(LocogenError, match=r"has no .*fit it again"):
        edit.apply_(short)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float64_and_rounded_once(dtype) -> None:
    pipe = tiny.pipeline().to(dtype)
    edit = fit(pipe)
    own = weights(pipe, edit)
    assert 0 < edit.recipe["rounding"] < 0.1
    assert fit(tiny.pipeline()).recipe["rounding"] < 1e-5
    with edit.applied(pipe):
        for name, now in weights(pipe, edit).items():
            assert now.dtype == dtype
            assert torch.equal(now, (own[name].double() + edit.changes[name].change).to(dtype))
    assert same(weights(pipe, edit), own)


def test_refuses_what_it_cannot_edit() -> None:
    pipe = tiny.pipeline()
    edit = fit(pipe)
    name = next(iter(edit.changes))
    layer = pipe.unet.get_submodule(name.removesuffix(".weight"))
    layer.weight = torch.nn.Parameter((layer.weight * 100).to(torch.int8), requires_grad=False)
    with pytest.raises(LocogenError, match="quantized"):
        fit(pipe)
    pipe = tiny.pipeline()
    with torch.no_grad():
        pipe.unet.get_parameter(name)[0, 0] = torch.nan
    with pytest.raises(LocogenError, match="non-finite"):
        fit(pipe)


def test_refuses_layers_that_carry_lora(tmp_path) -> None:
    pipe = tiny.pipeline()
    edit, other = fit(pipe), fit(pipe, pairs=[("a cat", "a dog in do")])
    edit.to_lora(tmp_path / "lora.safetensors")
    pipe.unet.load_lora_adapter(str(tmp_path / "lora.safetensors"), prefix="unet")
    for attempt in (lambda: fit(pipe), lambda: other.apply_(pipe)):
        with pytest.raises(LocogenError, match="has a LoRA"):
            attempt()
    with pytest.raises(LocogenError, match=r"LoRA of the edit of 'cat' is loaded.*twice"):
        edit.apply_(pipe)
    pipe.unload_lora_weights()
    with edit.applied(pipe):
        pass


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(ridge=0), "ridge is 0"),
        (dict(layers=[]), "layers is empty"),
        (dict(layers="12-13"), "layers is '12-13'"),
        (dict(preserve="a dog"), "preserve is one text"),
        (dict(preserve=["a dog"], preserve_weight=float("nan")), "preserve_weight is nan"),
        (dict(layers=[16]), r"no layers \[16\]"),
        (dict(tokens="first"), "tokens is 'first'"),
        (dict(pairs=[]), "phrasings is empty"),
        (dict(pairs=[("a cat", "a  cat")]), "both 'a cat'"),
        (dict(pairs=[("a cat", " ")]), "target is ' '"),
        (dict(pairs=[("a dog", "a do")]), "does not contain the subject 'cat'"),
        (dict(null_space=True), "null_space keeps"),
        (dict(preserve=["a dog"], null_space=True, ordinary=["a"]), "use only one of them"),
        (dict(preserve=["a dog"], anchored=True), "null_space=True"),
        (dict(preserve=["a dog"], augmented=3), "null_space=True"),
        (dict(preserve=["a dog"], null_space=True, augmented=-1), "augmented is -1"),
        (dict(matrices="q"), "matrices is 'q'"),
        (dict(rounds=-1), "rounds is -1"),
        (dict(side="left"), "side is .left."),
        (dict(side="output", ordinary=["a"]), "leave them out"),
    ],
)
def test_bad_input(pipe, options: dict, says: str) -> None:
    with pytest.raises(LocogenError, match=says):
        fit(pipe, **options)


def test_every_option_of_a_fit_is_spelled_out() -> None:
    """With the default of `Options`; only the family knows which tokens to edit."""
    parameters = inspect.signature(fit_edit).parameters
    assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    for option in dataclasses.fields(Options):
        expected = None if option.name == "tokens" else option.default
        assert parameters[option.name].default == expected


# --- files ---------------------------------------------------------------------------------------


def test_the_target_is_what_stands_in_the_subjects_place(pipe) -> None:
    """In the middle of a prompt too: not the prompt's last word."""
    edit = fit(pipe, pairs=[("a cat in do", "a dog in do")], ridge=1e-9)
    x, y, last = (
        state(pipe, prompt, subject_positions(pipe, prompt, word)[-1])
        for prompt, word in (("a cat in do", "cat"), ("a dog in do", "dog"), ("a dog in do", "do"))
    )
    for name, change in edit.changes.items():
        w = pipe.unet.get_parameter(name).double()
        assert torch.allclose(x @ (w + change.change).T, y @ w.T, atol=1e-5)
        assert not torch.allclose(x @ (w + change.change).T, last @ w.T, atol=1e-3)


def test_saved_and_loaded_is_the_same_edit(pipe, tmp_path) -> None:
    edit = fit(pipe)
    edit.save(tmp_path / "cat.safetensors")
    again = Edit.load(tmp_path / "cat.safetensors")
    assert (again.name, again.layers, again.digest) == (edit.name, edit.layers, edit.digest)
    assert again.recipe == json.loads(json.dumps(edit.recipe))
    with edit.applied(pipe):
        one = weights(pipe, edit)
    with again.applied(pipe):
        assert same(weights(pipe, edit), one)
    assert same(
        {n: c.change for n, c in again.refit(pipe).changes.items()},
        {n: c.change for n, c in edit.changes.items()},
    )
    assert str(tmp_path) not in (tmp_path / "cat.safetensors").read_bytes().decode("latin-1")


@pytest.mark.parametrize(
    "options",
    [
        dict(pairs=[("a cat", "a do")]),
        dict(ordinary=["a dog"]),
        dict(preserve=["a do"], null_space=True),
        dict(ridge_v=1),
        dict(rounds=1),
        dict(side="output"),
    ],
)
def test_every_kind_of_edit_is_saved_whole(pipe, tmp_path, options) -> None:
    edit = fit(pipe, **options)
    edit.save(tmp_path / "cat.safetensors")
    again = Edit.load(tmp_path / "cat.safetensors")
    assert same(
        {n: c.change for n, c in again.changes.items()},
        {n: c.change for n, c in edit.changes.items()},
    )


def test_bad_files(pipe, tmp_path, monkeypatch) -> None:
    edit, path = fit(pipe), tmp_path / "cat.safetensors"
    with pytest.raises(LocogenError, match="there is no edit"):
        Edit.load(path)
    edit.save(path)
    whole = path.read_bytes()
    for cut in (0, 20, len(whole) - 8):
        path.write_bytes(whole[:cut])
        with pytest.raises(LocogenError, match="cut short"):
            Edit.load(path)
    edit.to_lora(path)
    with pytest.raises(LocogenError, match="not an edit that locogen saved"):
        Edit.load(path)
    monkeypatch.setattr("locogen.editing.edit.EDIT_FORMAT", 2)
    edit.save(path)
    monkeypatch.undo()
    with pytest.raises(LocogenError, match="format 2, and this locogen reads format 1"):
        Edit.load(path)
    with pytest.raises(LocogenError, match="cannot be written"):
        edit.save(tmp_path / "no" / "such.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["cat.safetensors"]


LOAD = """
import sys
import numpy as np, torch
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None)
def make():
    return pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
made = [make()]
for lora in sys.argv[3:]:
    pipe.load_lora_weights(lora)
    made.append(make())
    pipe.unload_lora_weights()
assert "locogen" not in sys.modules
np.save(sys.argv[2], np.stack(made))
"""


@pytest.mark.slow
def test_lora_in_a_fresh_process_without_locogen_is_the_dense_edit(pipe, tmp_path) -> None:
    """As test_lora.py shows it in this process."""
    edit = fit(pipe, ridge=1e-3, layers=(0, 5), tokens="all")
    assert len({change.balanced().rank for change in edit.changes.values()}) > 1  # of several ranks
    files = {style: str(tmp_path / f"{style}.safetensors") for style in ("diffusers", "kohya")}
    for style, path in files.items():
        edit.to_lora(path, style=style)  # pyright: ignore[reportArgumentType]
    out = tmp_path / "made.npy"
    pipe.save_pretrained(tmp_path / "model")
    subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model"), str(out), *files.values()],
        check=True,
        capture_output=True,
    )
    plain, *loras = np.load(out, allow_pickle=False)
    with edit.applied(pipe):
        noise = torch.Generator().manual_seed(0)
        dense = pipe("a cat", num_inference_steps=2, generator=noise, output_type="np").images
    assert all(np.abs(lora - dense).max() < 1e-4 for lora in loras)
    assert np.abs(plain - dense).max() > 1e-3


def test_exported_pipeline_carries_the_edit(pipe, tmp_path) -> None:
    from diffusers import StableDiffusionPipeline

    edit = fit(pipe)
    own = weights(pipe, edit)
    edit.export(pipe, tmp_path)
    assert same(weights(pipe, edit), own)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    with edit.applied(pipe):
        assert same(weights(again, edit), weights(pipe, edit))
    assert not same(weights(again, edit), own)


def test_shows_itself(pipe) -> None:
    page = fit(pipe)._repr_html_()
    assert "2, 3" in page
    assert "rank" in page
    for recipe in ({}, fit(pipe).recipe):
        assert "<b>x</b>" not in Edit("<b>x</b>", (2,), fit(pipe).changes, "", recipe)._repr_html_()


def test_originals_are_forgotten_when_no_edit_is_applied(pipe) -> None:
    edit = fit(pipe)
    with edit.applied(pipe):
        assert originals(pipe)
    assert not originals(pipe)
