"""Attacks, as theorems on a tiny model: what must hold whatever the weights are."""

import dataclasses
import subprocess
import sys
import threading
from functools import partial
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny

from locogen.attacks import kinds, search
from locogen.attacks.attack import attack
from locogen.attacks.goal import NeverHad, exchanged
from locogen.attacks.inpainting import filling
from locogen.attacks.loss import DenoisingLoss, Draws
from locogen.attacks.result import Attack
from locogen.attacks.training import optimize, write_state
from locogen.catalog import concept, mini_folder
from locogen.editing.closed_form import returning_map
from locogen.editing.control_edits import placebo_edit
from locogen.editing.edit import fit_edit
from locogen.editing.evaluation import evaluate, summary
from locogen.editing.neurons import find_neurons
from locogen.editing.probes import Probe
from locogen.editing.rivals.editors import ClampedNeurons
from locogen.editing.rivals.orthogonal_values import fit_orthogonal_values
from locogen.editing.rivals.steering import fit_steering
from locogen.errors import LocogenError
from locogen.models.hooks import before, hooked
from locogen.models.load import load
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import generate
from locogen.plan import Concept, PromptPair
from locogen.views import plots
from locogen.views.sentences import describe_edit

CAT = Concept(
    "cat",
    "style",
    (PromptPair("a dog in cat", "a dog"), PromptPair("a do in cat", "a do")),
    neighbors=("ca",),
)
HELD_OUT = (
    Probe("efficacy", "dog of cat", "red", ("blue",)),
    Probe("efficacy", "do, cat", "red", ("blue",)),
)
FEW = {"num_inference_steps": 2, "guidance_scale": 2.0, "progress": False}
# What each kind takes so that a test is quick.
QUICK = {
    "inversion": {"at": (2,), "batch": 2},
    "states": {"at": (2,), "batch": 2},
    "closed": {},
    "discrete": {"steps": 2, "batch": 2, "vocabulary": ("dog", "cat", "a", "b")},
    "relearn": {"steps": 2, "batch": 2, "pictures": (1,), "rate": 0.01},
    "completion": {"at": (1,)},
    "noise": {},
    "inpaint": {"at": (50,)},
}


class Colors:
    """A scorer of colors by name."""

    settings: ClassVar = {"scorer": "colors"}

    def __call__(self, pictures, *texts):
        means = np.stack([np.asarray(picture, float).mean((0, 1)) for picture in pictures]) / 255
        channel = {"red": 0, "blue": 2}
        rows = []
        for line in texts:
            rows.append(
                np.array([mean[channel[text]] for mean, text in zip(means, line, strict=True)])
            )
        return rows


class AnyColor(Colors):
    """A scorer that does not see colors: everything is red."""

    def __call__(self, pictures, *texts):
        return [np.array([float(text == "red") for text in line]) for line in texts]


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def edit(pipe):
    return fit_edit(pipe, CAT, layers=[0, 1, 2], ridge=0.1)


def attacked(pipe, edit, kind="inversion", **options):
    given = {
        "held_out": HELD_OUT[:1],
        "training": CAT.pairs,
        "scorer": Colors(),
        **FEW,
        "models": ["edited"],
    }
    return attack(pipe, CAT, edit, kind=kind, **(given | options))


def left_behind(pipe):
    """All that an attack could leave on a model."""
    modules = [
        (f"{part}.{name}", module)
        for part, component in pipe.components.items()
        if hasattr(component, "named_modules")
        for name, module in component.named_modules()
    ]
    hooks = [name for name, module in modules if module._forward_hooks or module._forward_pre_hooks]
    parameters = [
        (name, key, value.requires_grad, value.grad is None)
        for name, module in modules
        for key, value in module.named_parameters(recurse=False)
    ]
    return (
        fingerprint(pipe),
        hooks,
        parameters,
        id(pipe.tokenizer),
        len(pipe.tokenizer),
        pipe.text_encoder.get_input_embeddings().weight.shape,
        "encode_prompt" in vars(pipe),
    )


# --- nothing is left behind ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUICK)
def test_no_attack_leaves_anything_on_the_model(pipe, edit, kind) -> None:
    before = left_behind(pipe)
    attacked(pipe, edit, kind, **QUICK[kind])
    assert left_behind(pipe) == before


class Stopped:
    """A scorer that interrupts the second time it is asked: within the attack."""

    settings: ClassVar = {"scorer": "stopped"}

    def __init__(self):
        self.asked = 0

    def __call__(self, pictures, *texts):
        self.asked += 1
        if self.asked > 1:
            raise KeyboardInterrupt
        return Colors()(pictures, *texts)


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("inversion", "relearn") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in QUICK
    ],
)
def test_an_attack_that_is_stopped_leaves_nothing_either(pipe, edit, kind) -> None:
    before = left_behind(pipe)
    with pytest.raises(KeyboardInterrupt):
        attacked(pipe, edit, kind, scorer=Stopped(), **QUICK[kind])
    assert left_behind(pipe) == before


def test_training_that_is_stopped_leaves_nothing(pipe, edit, monkeypatch) -> None:
    seen = []

    def stop(self, noised, states, denoiser=None):
        seen.append(left_behind(pipe))
        raise KeyboardInterrupt

    before = left_behind(pipe)
    monkeypatch.setattr(DenoisingLoss, "per_row", stop)
    with pytest.raises(KeyboardInterrupt):
        attacked(pipe, edit, "inversion", **QUICK["inversion"])
    assert left_behind(pipe) == before
    assert seen[0] != before  # the twin: within the training the model was edited


# --- no step, no change --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, options",
    [
        ("inversion", {"start": "own", "steps": 0}),
        ("states", {"steps": 0}),
        ("relearn", {"steps": 0, "pictures": (1,)}),
        ("completion", {"at": [0]}),
    ],
)
def test_an_attack_of_no_steps_changes_nothing_to_the_bit(pipe, edit, kind, options) -> None:
    table = attacked(pipe, edit, kind, **options).table
    assert (table["before"] == table["after"]).all()


@pytest.mark.parametrize(
    "kind, options",
    [
        ("inversion", {"start": "own", "at": [3], "batch": 2, "rate": 0.5}),
        ("states", {"at": [3], "batch": 2, "rate": 0.1}),
        ("relearn", {"steps": 3, "pictures": (1,), "rate": 0.01, "batch": 2}),
        ("completion", {"at": [1]}),
    ],
)
def test_an_attack_of_some_steps_changes_something(pipe, edit, kind, options) -> None:
    table = attacked(pipe, edit, kind, **options).table
    assert (table["before"] != table["after"]).all()


def test_without_an_edit_there_is_nothing_to_solve_for(pipe, edit) -> None:
    table = attacked(pipe, edit, "closed", models=["unedited", "edited"]).table
    same = table["before"] == table["after"]
    assert same[table["model"] == "unedited"].all()
    assert not same[table["model"] == "edited"].any()  # the twin


def test_the_solve_gives_edited_matrices_what_the_old_ones_said() -> None:
    torch.manual_seed(0)
    old = [torch.randn(8, 4, dtype=torch.float64) for _ in range(3)]
    new = [weight + 0.1 * torch.randn(8, 4, dtype=torch.float64) for weight in old]
    state = torch.randn(4, dtype=torch.float64)

    def gap(change):
        return sum(
            float((b @ (state + change) - a @ state).square().sum())
            for a, b in zip(old, new, strict=True)
        )

    best = returning_map(old, new, ridge=1e-12) @ state
    for _ in range(5):
        assert gap(best) < gap(best + 0.01 * torch.randn(4, dtype=torch.float64))


@pytest.mark.parametrize("share, is_given", [(0.0, True), (1.0, False)])
def test_what_surrounds_the_hole_is_given_at_every_step(pipe, share, is_given) -> None:
    """With a hole of everything, nothing is: the twin."""
    torch.manual_seed(0)
    clean = torch.randn(3, 4, 8, 8)
    noise = Draws(0, 0).normal(clean.shape)
    signal = pipe.scheduler.alphas_cumprod
    calls = []

    def note(module, args, kwargs):
        calls.append((kwargs["sample"].clone(), int(kwargs["timestep"])))

    with filling(pipe, clean, share, 0), hooked([before(pipe.unet, note, "the denoiser")]):
        generate(pipe, ["a dog", "a do", "a"], seeds=[0], **(FEW | {"batch_size": 2}))
    calls = calls[-4:]  # two batches of two steps; before them a dry run
    for places, (sample, time) in zip(([0, 1], [0, 1], [2, 2], [2, 2]), calls, strict=True):
        expected = signal[time].sqrt() * clean[places] + (1 - signal[time]).sqrt() * noise[places]
        # The second half is what guidance leads away from.
        assert torch.allclose(sample, expected.repeat(2, 1, 1, 1), atol=1e-5) == is_given


# --- what is found is found anywhere -------------------------------------------------------------

FRESH = """
import sys
sys.path.insert(0, {tests!r})
from support import tiny
from locogen.editing.edit import Edit
from locogen.pictures.runs import generate
pipe = tiny.pipeline()
pipe.load_textual_inversion({folder!r}, weight_name="found.safetensors", local_files_only=True)
with Edit.load({edit!r}).applied(pipe):
    run = generate(pipe, {prompts!r}, seeds=[0, 1], num_inference_steps=2, guidance_scale=2.0, progress=False)
for i, picture in enumerate(run.pictures):
    picture.save({folder!r} + f"/{{i}}.png")
"""


@pytest.mark.slow
@pytest.mark.parametrize("vectors", [1, 2])
def test_the_found_token_makes_the_tables_pictures_in_a_fresh_process(
    pipe, edit, vectors, tmp_path, root
) -> None:
    from PIL import Image

    found = attacked(pipe, edit, at=[2], batch=2, vectors=vectors, rate=0.5)
    found.save(tmp_path / "found.safetensors")
    edit.save(tmp_path / "edit.safetensors")
    prompts = list(dict.fromkeys(found.table["prompt"]))
    code = FRESH.format(
        tests=str(root / "tests"),
        folder=str(tmp_path),
        edit=str(tmp_path / "edit.safetensors"),
        prompts=prompts,
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    pictures = [Image.open(tmp_path / f"{i}.png") for i in range(2)]
    [red] = Colors()(pictures, ["red"] * 2)
    assert red.tolist() == found.table["after"].tolist()
    assert red.tolist() != found.table["before"].tolist()  # the twin


def test_an_attack_comes_back_from_its_file(pipe, edit, tmp_path) -> None:
    found = attacked(pipe, edit, **QUICK["inversion"])
    found.save(tmp_path / "found.safetensors")
    loaded = Attack.load(tmp_path / "found.safetensors")
    assert loaded.table.equals(found.table)
    assert torch.equal(loaded.tensors["edited"]["<cat>"], found.tensors["edited"]["<cat>"])
    assert loaded.sentence() == found.sentence()
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    with pytest.raises(LocogenError, match="no attack"):
        Attack.load(tmp_path / "other.safetensors")


# --- searches ------------------------------------------------------------------------------------


def objective_of(pipe, tokens):
    pictures = list(generate(pipe, ["a dog in cat"], seeds=[0, 1], **FEW).pictures)
    loss = DenoisingLoss.of(pipe, pictures)
    shared = {"tokens": tokens, "batch": 2, "seed": 0}
    objective = search.Objective(pipe, "<cat>", loss, ["a dog in <cat>"] * 2, **shared)
    given = (pipe, "<cat>", loss, ["a dog in <cat>"] * 2, search.vocabulary_of(pipe, None)[:12])
    return objective, given, shared | {"progress": False}


@pytest.mark.parametrize("tokens", [1, 2])
def test_no_gradient_beats_the_exhaustive_search(pipe, tokens) -> None:
    objective, given, shared = objective_of(pipe, tokens)
    best = objective.of(torch.tensor([search.exhaustive_search(*given, **shared)]))
    by_gradient = objective.of(torch.tensor([search.gradient_search(*given, steps=4, **shared)]))
    at_random = objective.of(torch.tensor([given[-1][:tokens]]))
    # The same candidate in a batch of another size differs by rounding.
    assert best.item() <= by_gradient.item() * (1 + 1e-6)
    assert best.item() < at_random.item()


@pytest.mark.parametrize("how", ["exhaustive", "gradient"])
def test_a_stopped_search_goes_on_to_the_same_tokens(pipe, tmp_path, monkeypatch, how) -> None:
    _, given, shared = objective_of(pipe, 2)
    given = (*given[:-1], given[-1][:6])  # of 36 candidates
    find = search.exhaustive_search
    if how == "gradient":
        find = partial(search.gradient_search, steps=4)
    monkeypatch.setattr(search, "ROWS_AT_ONCE", 8)
    tried: list[int] = []
    of = search.Objective.of

    def counting(objective, candidates):
        tried.append(len(candidates))
        if len(tried) == 4:
            raise KeyboardInterrupt
        return of(objective, candidates)

    whole = find(*given, **shared)
    monkeypatch.setattr(search.Objective, "of", counting)
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        find(*given, **shared, path=path)
    done = search.Search.resumed(path).done
    assert done == {"exhaustive": 24, "gradient": 2}[how]
    assert find(*given, **shared, path=path) == whole
    count = len(tried)
    assert find(*given, **shared, path=path) == whole
    assert len(tried) == count  # a finished one tries no more
    assert find(*given, **shared) == whole
    assert len(tried) > count  # the twin
    path.write_bytes(b"damaged")
    with pytest.raises(LocogenError, match=r"state\.safetensors .*delete it"):
        find(*given, **shared, path=path)


def test_the_objective_of_tokens_is_that_of_their_words(pipe) -> None:
    from locogen.interventions.words import states_of

    objective, _, _ = objective_of(pipe, 1)
    dog = pipe.tokenizer("dog", add_special_tokens=False).input_ids
    tokens = pipe.tokenizer(
        ["a dog in dog"] * 2, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = objective.loss.per_row(objective.noised, states_of(pipe, tokens)).mean()
    torch.testing.assert_close(objective.of(torch.tensor([dog]))[0], expected)


def test_words_of_several_tokens_are_no_vocabulary(pipe) -> None:
    with pytest.raises(LocogenError, match="one token"):
        search.vocabulary_of(pipe, ["dog", "xyz"])


# --- trainings go on -----------------------------------------------------------------------------


def test_a_stopped_training_goes_on_to_the_same_bits(tmp_path) -> None:
    start = {"x": torch.ones(3)}

    def loss_at(step, values):
        return (values["x"] - step).square().sum()

    def stopping(step, values):
        if step == 30:
            raise KeyboardInterrupt
        return loss_at(step, values)

    shared = {"stops": [0, 10, 40], "rate": 0.1, "label": "", "progress": False}
    whole = optimize(start, loss_at, path=None, **shared)
    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        optimize(start, stopping, path=path, **shared)
    steps = []

    def counting(step, values):
        steps.append(step)
        return loss_at(step, values)

    resumed = optimize(start, counting, path=path, **shared)
    assert steps[0] == 25
    for stop in (0, 10, 40):
        assert torch.equal(resumed[stop]["x"], whole[stop]["x"])
    assert torch.equal(whole[0]["x"], start["x"])


def test_two_processes_may_write_one_state(tmp_path) -> None:
    path = tmp_path / "state.safetensors"
    written = []

    def saving(tensors, part):
        written.append(part)
        if len(written) == 1:  # while the first one writes, the other does all of it
            other = threading.Thread(target=write_state, args=(path, {"x": torch.ones(1)}))
            other.start()
            other.join()
        save_file(tensors, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", saving)
        write_state(path, {"x": torch.zeros(1)})
    assert load_file(path)["x"].tolist() == [0]  # the last one that ended
    assert len(set(written)) == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_state_that_cannot_be_written_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocogenError, match=r"cannot be written .* another folder="):
        write_state(tmp_path / "file" / "state.safetensors", {"x": torch.zeros(1)})


def test_a_finished_attack_trains_no_more(pipe, edit, tmp_path, monkeypatch) -> None:
    first = attacked(pipe, edit, folder=tmp_path, **QUICK["inversion"])

    def trained(*args, **kwargs):
        raise AssertionError("it was trained again")

    monkeypatch.setattr(DenoisingLoss, "per_row", trained)
    again = attacked(pipe, edit, folder=tmp_path, **QUICK["inversion"])
    assert again.table.equals(first.table)
    with pytest.raises(AssertionError, match="again"):  # another seed is another attack
        attacked(pipe, edit, folder=tmp_path, seed=1, **QUICK["inversion"])


@pytest.mark.parametrize("damage", ["cut", "other names", "other shape", "no values of a step"])
def test_a_damaged_state_is_named(tmp_path, damage) -> None:
    path = tmp_path / "state.safetensors"
    shared = {"stops": [2, 4], "rate": 0.1, "label": "", "progress": False, "path": path}

    def loss_at(step, values):
        return values["x"].square().sum()

    start = {"x": torch.ones(3)}
    whole = optimize(start, loss_at, **shared)
    again = optimize(start, loss_at, **shared)
    assert torch.equal(again[4]["x"], whole[4]["x"])  # the twin
    tensors = load_file(path)
    if damage == "other names":
        tensors = {name.replace("x", "y"): value for name, value in tensors.items()}
    elif damage == "other shape":
        tensors["value/x"] = torch.ones(4)
    elif damage == "no values of a step":
        tensors.pop("after 2/x")
    save_file(tensors, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(LocogenError, match=r"state\.safetensors .*delete it"):
        optimize(start, loss_at, **shared)


# --- the loss is the model's own -----------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_wants_what_the_scheduler_takes_for_the_clean_picture(prediction) -> None:
    from diffusers import DDIMScheduler

    pipe = tiny.pipeline()
    pipe.scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    pipe.scheduler.set_timesteps(10)
    torch.manual_seed(0)
    loss = DenoisingLoss(pipe, torch.randn(2, 4, 8, 8))
    noised = loss.fixed(0, 2)
    for row in range(2):
        step = pipe.scheduler.step(noised.target[row], int(noised.times[row]), noised.latents[row])
        torch.testing.assert_close(step.pred_original_sample, loss.clean[row], rtol=1e-3, atol=1e-3)


def test_other_families_are_refused() -> None:
    sdxl = tiny.FAMILIES["sd-xl"]()
    with pytest.raises(LocogenError, match="Stable Diffusion 1 and 2"):
        attack(sdxl, CAT, None)


# --- whatever an editor gives ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def at_inference(pipe):
    """What acts while pictures are made, by name."""
    steering = fit_steering(pipe, CAT, num_inference_steps=2)
    values = fit_orthogonal_values(pipe, CAT, slope=0.0)
    neurons = ClampedNeurons(find_neurons(pipe, CAT, layers=[1, 2]).top(3))
    return {"steering": steering, "AdaVD": values, "neurons": neurons}


@pytest.mark.parametrize(
    "editor, kind",
    [
        ("steering", "inversion"),
        ("AdaVD", "states"),
        pytest.param("steering", "states", marks=pytest.mark.slow),
        pytest.param("AdaVD", "inversion", marks=pytest.mark.slow),
        pytest.param("neurons", "inversion", marks=pytest.mark.slow),
        pytest.param("neurons", "states", marks=pytest.mark.slow),
    ],
)
def test_what_acts_at_inference_is_attacked_and_leaves_nothing(
    pipe, at_inference, editor, kind
) -> None:
    before = left_behind(pipe)
    models = ["edited", "unedited"]
    found = attacked(pipe, at_inference[editor], kind, models=models, **QUICK[kind])
    assert left_behind(pipe) == before
    table = found.table.set_index("model")
    # It acts in the attacked model's pictures, and not in the unedited one's.
    shown = {model: table.loc[[model], "before"].tolist() for model in models}
    assert all(one != other for one, other in zip(shown["edited"], shown["unedited"], strict=True))


@pytest.mark.parametrize("editor", tiny.fast("AdaVD", of=["steering", "AdaVD", "neurons"]))
def test_the_placebo_of_what_acts_at_inference_is_another(pipe, at_inference, editor) -> None:
    edit = at_inference[editor]
    placebo = edit.placebo(pipe, 1)
    assert type(placebo) is type(edit)
    assert placebo.layers == edit.layers
    tables = [
        attacked(pipe, edit, "noise", models=["placebo"], placebo=one).table
        for one in (placebo, edit)
    ]
    assert (tables[0]["before"] != tables[1]["before"]).all()
    with pytest.raises(LocogenError, match="changes no weight"):
        placebo.to_lora("x.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["discrete", "noise", "inpaint"])
def test_the_other_kinds_attack_what_acts_at_inference_too(pipe, at_inference, kind) -> None:
    assert len(attacked(pipe, at_inference["AdaVD"], kind, **QUICK[kind]).table)


@pytest.mark.parametrize("editor", ["steering", "AdaVD", "neurons"])
def test_training_sees_what_acts_at_inference(pipe, at_inference, editor) -> None:
    """The loss within it is another than the plain one; a direct call without `bare_calls` is refused."""
    from locogen.interventions.words import states_of

    loss = DenoisingLoss(pipe, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    noised = loss.fixed(0, 2)
    tokens = pipe.tokenizer(
        ["a dog in cat"] * 2, padding="max_length", truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        text = states_of(pipe, tokens)
        plain = loss.per_row(noised, text)
        with at_inference[editor].applied(pipe):
            within = loss.per_row(noised, text)
            with pytest.raises(LocogenError, match="without its pipeline"):
                pipe.unet(noised.latents, noised.times, encoder_hidden_states=text)
        assert torch.equal(loss.per_row(noised, text), plain)
    assert not torch.equal(within, plain)


@pytest.mark.parametrize("kind", ["closed", "relearn", "completion"])
def test_what_has_no_weights_says_so(pipe, at_inference, edit, kind) -> None:
    with pytest.raises(LocogenError, match="changes no weight"):
        attacked(pipe, at_inference["AdaVD"], kind, **QUICK[kind])
    assert len(attacked(pipe, edit, kind, **QUICK[kind]).table)  # the twin


def test_an_edit_is_attacked_at_its_strength(pipe, edit) -> None:
    def shown(**options):
        return attacked(pipe, edit, "noise", **options).table["before"].tolist()

    plain = shown(models=["unedited"])
    assert shown(strength=0.0) == plain
    assert shown() != plain != shown(strength=0.5) != shown()  # the twin
    with pytest.raises(LocogenError, match="strength is nan"):
        shown(strength=float("nan"))


def test_an_edit_of_another_concept_is_remarked(pipe, edit) -> None:
    other = dataclasses.replace(edit, name="dog")
    with pytest.warns(UserWarning, match="the edit is of 'dog', and 'cat' is attacked"):
        attacked(pipe, other, "noise")
    attacked(pipe, dataclasses.replace(edit, name="dog + cat"), "noise")  # the twin: no warning


def test_mistakes_in_what_is_attacked_are_named(pipe, edit, at_inference) -> None:
    with pytest.raises(LocogenError, match="never_had is 3"):
        attacked(pipe, edit, "noise", never_had=3)
    with pytest.raises(LocogenError, match="placebo is 'x'"):
        attacked(pipe, edit, "noise", placebo="x")
    with pytest.raises(LocogenError, match="fit_edit"):
        attacked(pipe, "an edit", "noise")
    with (
        at_inference["AdaVD"].applied(pipe),
        pytest.raises(LocogenError, match="within another context"),
    ):
        attacked(pipe, edit, "noise")

    class Bare:
        """Something with `applied` alone."""

        def applied(self, pipe, strength=1.0):
            return at_inference["AdaVD"].applied(pipe, strength)

    with pytest.raises(LocogenError, match="no placebo is known"):
        attacked(pipe, Bare(), "noise", models=["placebo"])
    tried = attacked(pipe, Bare(), "noise", models=None)
    assert tried.table["model"].unique().tolist() == ["edited", "unedited"]


# --- controls ------------------------------------------------------------------------------------


def test_the_placebo_is_as_large_and_about_other_words(pipe, edit) -> None:
    placebo = placebo_edit(pipe, edit, avoid=["ca"])
    assert placebo.layers == edit.layers
    for name, change in edit.changes.items():
        assert float(placebo.changes[name].change.norm()) == pytest.approx(
            float(change.change.norm())
        )
        assert not torch.allclose(placebo.changes[name].change, change.change)
    assert "dog" in placebo.name  # the only other word of three letters
    with pytest.raises(LocogenError, match="avoid"):
        placebo_edit(pipe, edit, avoid=["dog"])


@pytest.mark.slow
def test_a_placebo_moves_neither_own_words_nor_the_best_of_the_seeds() -> None:
    """On the mini model; its twin is the edit itself."""
    mini = load("mini")
    neon = concept("mini/neon")
    others = [style for style in neon.neighbors if style != "neon"]
    frames = ("a picture in the style of {}", "a picture in {} style", "a picture, {}")
    kept = [frame.format(other) for other in others for frame in frames]
    options = {"tokens": "all", "ridge": 10.0, "preserve": kept, "preserve_weight": 0.03}
    edit = fit_edit(mini, neon, layers=[12, 13], **options)
    few = {"num_inference_steps": 8, "seeds": [0, 1], "progress": False}
    lines = attack(mini, neon, edit, kind="noise", **few).summary()
    last = lines.groupby("model").last()
    for model, low, high in (("placebo", 0.75, 1), ("unedited", 0.75, 1), ("edited", 0, 0.25)):
        assert low <= last.loc[model, "before"] <= high
        assert low <= last.loc[model, "best"] <= high


def test_colors_are_exchanged_and_put_back() -> None:
    from PIL import Image

    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    assert np.array_equal(np.asarray(exchanged(exchanged(picture))), np.asarray(picture))
    assert not np.array_equal(np.asarray(exchanged(picture)), np.asarray(picture))


def test_the_concept_itself_is_not_taken_for_the_one_that_never_was(pipe, edit) -> None:
    """Red pictures show red and not its exchange; blue ones are red exchanged."""
    from PIL import Image

    goal = kinds.Goal(pipe, CAT, CAT.pairs, HELD_OUT, (0,), AnyColor(), None, {}, NeverHad())
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    vars(goal)["learned"] = ([exchanged(red)], CAT.pairs[:1])
    plain = dataclasses.replace(goal, never_had=None)
    assert plain.judge([red, exchanged(red)]).shown.tolist() == [1, 1]  # for a scorer of shapes
    assert goal.judge([red, exchanged(red)]).shown.tolist() == [0, 1]


def test_the_best_of_the_seeds_never_falls(pipe, edit) -> None:
    tried = attacked(pipe, edit, "noise", seeds=range(4))
    assert tried.summary()["seeds"].tolist() == [1, 2, 3, 4]
    table = tried.table
    assert table["strength"].tolist() == [1, 2, 3, 4]
    for _, part in table.groupby("prompt"):
        assert (part["after"].diff().dropna() >= 0).all()
        assert part["before"].nunique() == 1


def test_the_table_and_the_summary_name_what_they_hold(pipe, edit) -> None:
    never_had = {"never_had": NeverHad(), "placebo": edit, "models": None}
    found = attacked(pipe, edit, "noise", **never_had)
    assert found.table.columns.tolist() == [
        *("kind", "model", "strength", "prompt", "unit", "seed"),
        *("shown_before", "shown_after", "before", "after"),
    ]
    lines = found.summary()
    assert lines["model"].unique().tolist() == ["edited", "unedited", "placebo", "never had"]
    assert ((lines["low"] <= lines["after"]) & (lines["after"] <= lines["high"])).all()
    assert "never had" in found.sentence()
    assert "<table" in found._repr_html_()


@pytest.mark.parametrize("name", ["mini", "mini-b"])
def test_an_embedded_model_has_a_concept_that_it_never_had(pipe, edit, monkeypatch, name) -> None:
    with pytest.raises(LocogenError, match="never had"):
        attacked(pipe, edit, "noise", models=["never had"])
    # Where a model comes from is all that says what it was trained on.
    monkeypatch.setattr("locogen.attacks.attack.source_of", lambda pipe: str(mini_folder(name)))
    lines = attacked(pipe, edit, "noise", models=["never had"]).summary()
    assert set(lines["model"]) == {"never had"}


def test_an_attack_joins_an_evaluation(pipe, edit) -> None:
    table = evaluate(pipe, {"carrier": edit}, HELD_OUT, seeds=[0], scorer=Colors(), **FEW)
    tried = attacked(pipe, edit, "noise")
    lines = summary(pd.concat([table, tried.evaluation("carrier")]))
    assert set(lines["measure"]) == {"efficacy", "noise"}
    shares = lines[lines["quantity"] == "right"].set_index("measure")["after"]
    assert shares["noise"] == tried.summary()["after"].iloc[-1]
    assert "under the best of the seeds" in describe_edit(lines, "carrier")
    assert plots.plot_evaluation(lines).get_legend().get_texts()[-1].get_text() == "attack: noise ↓"
    with pytest.raises(LocogenError, match="no model"):
        tried.evaluation("carrier", "placebo")


def test_mistakes_are_named(pipe, edit) -> None:
    with pytest.raises(LocogenError, match="kind is"):
        attacked(pipe, edit, "guessing")
    with pytest.raises(LocogenError, match="models is"):
        attacked(pipe, edit, models=["mine"])
    with pytest.raises(LocogenError, match="never had"):
        attacked(pipe, edit, models=["never had"])
    with pytest.raises(LocogenError, match="does not name"):
        attacked(pipe, edit, held_out=[Probe("efficacy", "a do", "red", ("blue",))])
    with pytest.raises(LocogenError, match="among"):
        attacked(pipe, edit, held_out=[Probe("efficacy", "a cat", "red")])
    with pytest.raises(LocogenError, match="name="):
        NeverHad(name="x")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"start": "foo"}, "start is 'foo'"),
        ({"kind": "relearn", "trained": "foo"}, "trained is 'foo'"),
        ({"kind": "relearn", "pictures": [-1]}, "pictures is"),
        ({"kind": "completion", "at": [99], "num_inference_steps": 2}, "from 0 up to 1"),
        ({"kind": "inpaint", "at": [500]}, "from 13 up to 100"),
        ({"kind": "closed", "ridge": -1.0}, "ridge is -1.0"),
        ({"kind": "discrete", "vocabulary": "dog"}, "a list of words"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"batch": 0}, "batch is 0"),
        ({"vectors": 0}, "vectors is 0"),
    ],
)
def test_what_no_attack_could_do_is_refused_before_it_begins(wrong, words):
    pipe = tiny.pipeline()
    cat = Concept("cat", "style", (PromptPair("a cat in b", "a b"), PromptPair("cat", "b")))
    edit = fit_edit(pipe, cat, layers=[0])
    with pytest.raises(LocogenError, match=words):
        attack(pipe, cat, edit, **{"kind": "inversion", "progress": False} | wrong)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    table = pd.DataFrame({"model": ["edited"]})
    found = Attack(concept="cat", kind="noise", table=table, tensors={}, words={}, settings={})
    for path in (tmp_path / "nowhere" / "a.safetensors", tmp_path):
        with pytest.raises(LocogenError, match="cannot be written"):
            found.save(path)
    found.save(tmp_path / "a.safetensors")  # the twin
    assert (tmp_path / "a.safetensors").exists()
