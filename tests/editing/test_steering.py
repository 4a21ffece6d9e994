"""Steering: what a layer puts out loses the concept's direction, and nothing else."""

import dataclasses
from typing import ClassVar

import pytest
import torch
from support import tiny

from locogen.editing.edit import fit_edit
from locogen.editing.evaluation import evaluate
from locogen.editing.neurons import find_neurons
from locogen.editing.probes import Probe
from locogen.editing.rivals.orthogonal_values import fit_orthogonal_values
from locogen.editing.rivals.steering import Steering, fit_steering
from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call
from locogen.models.hooks import after, hooked
from locogen.models.layers import find_layers
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import generate
from locogen.plan import Concept, PromptPair

CAT = Concept(
    "cat", "style", (PromptPair("a dog in cat", "a dog"), PromptPair("a do in cat", "a do"))
)
FEW = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def steering(pipe):
    return fit_steering(pipe, CAT, **FEW)


def outputs(pipe, layer, steering=None, strength=1.0):
    """What a layer puts out at each step, rows of guidance and of the prompt."""
    seen = []

    def note(module, args, kwargs, output):
        seen.append(output.detach().clone())

    def run():
        # Behind the steering's own hook.
        with hooked([after(layer.module, note, layer.label)]):
            generate(pipe, ["a dog in cat"], progress=False, **FEW)

    if steering is None:
        run()
    else:
        with steering.applied(pipe, strength):
            run()
    return seen[-2:]


@pytest.mark.parametrize("sign", [1, -1])
def test_nothing_positive_is_left_along_the_direction(pipe, steering, sign) -> None:
    """Along the opposite direction too: in a random model, the bias decides which is positive."""
    directions = {layer: sign * values for layer, values in steering.directions.items()}
    turned = dataclasses.replace(steering, directions=directions)
    layer = find_layers(pipe)[0]
    plain = outputs(pipe, layer)
    steered = outputs(pipe, layer, turned)
    along = torch.stack([rows[1] @ one for rows, one in zip(steered, directions[0], strict=True)])
    before = torch.stack([rows[1] @ one for rows, one in zip(plain, directions[0], strict=True)])
    assert along.max() < 1e-5
    assert (before.max() > 1) == (sign == -1)  # the twin
    # In the first call nothing upstream was steered: what is negative, and guidance's rows, stay.
    assert torch.equal(steered[0][0], plain[0][0])
    negative = before[0] < 0
    assert torch.equal(steered[0][1][negative], plain[0][1][negative])


def test_a_strength_of_zero_changes_no_picture(pipe, steering) -> None:
    def pictures(context=None):
        return [
            picture.tobytes()
            for picture in generate(pipe, ["a dog in cat"], progress=False, **FEW).pictures
        ]

    plain = pictures()
    with steering.applied(pipe, 0.0):
        assert pictures() == plain
    with steering.applied(pipe):
        assert pictures() != plain
    assert pictures() == plain


def test_directions_have_length_one_and_no_weight_changes(pipe) -> None:
    before = fingerprint(pipe)
    steering = fit_steering(pipe, CAT, layers=[1], seeds=[0], batch_size=1, **FEW)
    assert fingerprint(pipe) == before
    assert steering.layers == (1,)
    torch.testing.assert_close(steering.directions[1].norm(dim=1), torch.ones(2))
    whole = fit_steering(pipe, CAT, layers=[1], seeds=[0], **FEW)
    torch.testing.assert_close(steering.directions[1], whole.directions[1], rtol=1e-3, atol=1e-3)


def test_it_is_an_arm_and_comes_back_from_its_file(pipe, steering, tmp_path) -> None:
    class Zeros:
        settings: ClassVar = {"scorer": "zeros"}

        def __call__(self, pictures, *texts):
            import numpy as np

            return [np.array([float(sum(p.tobytes())) for p in pictures]) for _ in texts]

    steering.save(tmp_path / "steering.safetensors")
    loaded = Steering.load(tmp_path / "steering.safetensors")
    arms = {"steered": steering, "loaded": [loaded], "none": ()}
    probe = Probe("efficacy", "a dog in cat", "red")
    table = evaluate(pipe, arms, [probe], seeds=[0], scorer=Zeros(), progress=False, **FEW)
    after = table.set_index("arm")["after"]
    assert after["steered"] == after["loaded"] != after["none"]
    assert "cat" in steering._repr_html_()
    (tmp_path / "other").write_bytes(b"")
    with pytest.raises(LocogenError, match="no steering"):
        Steering.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("family", "remedy"),
    [
        ("sd-3", "edit the model with fit_edit"),
        ("z-image", "clamp its neurons, with find_neurons and clamp$"),
        ("krea-2", r"clamp its neurons.* or edit the map .*layers=\(\), entry=True"),
    ],
)
def test_models_whose_layers_put_out_text_too_are_refused_with_what_can_be_done(
    family, remedy
) -> None:
    pipe = tiny.FAMILIES[family]()
    with pytest.raises(LocogenError, match=f"text and picture together.*{remedy}"):
        fit_steering(pipe, CAT)
    with pytest.raises(LocogenError, match=f"changes with step and picture.*{remedy}"):
        fit_orthogonal_values(pipe, CAT)
    # What is advised is not refused.
    layers, entry = ((), True) if family == "krea-2" else ([0], False)
    if family != "z-image":
        assert fit_edit(pipe, CAT, layers=layers, entry=entry, tokens="end").changes
    if family != "sd-3":
        assert len(find_neurons(pipe, CAT, layers=[0]).top(1))


@pytest.mark.parametrize(("steps", "count"), [(50, 50), (49, 49), (20, 50), (50, 20), (7, 3)])
def test_a_step_takes_the_direction_of_the_same_share_of_the_way(steps, count) -> None:
    call = object.__new__(Call)
    call.__dict__ |= {"_is_bare": False, "timesteps": lambda: [0.0] * steps}
    taken = []
    for step in range(steps):
        call.__dict__["step"] = lambda step=step: step
        taken += call.progress_in(count)
    assert taken == [step * count // steps for step in range(steps)]
    # The before twin: as a share times a count, some steps take the direction of the one before.
    by_share = [int(step / steps * count) for step in range(steps)]
    assert (by_share != taken) == ((steps, count) in ((50, 50), (49, 49)))


def test_denoisers_that_take_turns_are_steered_where_they_run() -> None:
    """Wan 2.2: layers 0-2 are of the first denoiser, and run at the first steps alone."""
    pipe = tiny.FAMILIES["wan-2.2"]()
    few = {"seeds": [0], "num_inference_steps": 2}
    steering = fit_steering(pipe, CAT.first(1), layers=[0, 3], **few)
    for directions in steering.directions.values():
        torch.testing.assert_close(directions.norm(dim=1), torch.ones(2))
        assert torch.equal(directions[0], directions[1])  # the one step at which the layer runs

    def picture():
        run = generate(pipe, ["a dog in cat"], num_inference_steps=3, progress=False, store=None)
        return run.pictures[0].tobytes()

    plain = picture()
    with steering.applied(pipe):
        assert picture() != plain
    pipe.register_to_config(boundary_ratio=2.0)  # the second denoiser makes every step
    with pytest.raises(LocogenError, match="is not run in 2 steps: take more"):
        fit_steering(pipe, CAT.first(1), layers=[0], **few)
