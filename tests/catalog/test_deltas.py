"""Weights kept as differences of a byte a number."""

import pytest
import torch

from locogen.catalog.deltas import add_deltas, load_deltas, save_deltas
from locogen.errors import LocogenError


def module() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(7, 5)


def test_differences_come_back_within_half_a_step(tmp_path):
    deltas = {name: torch.randn_like(weight) for name, weight in module().named_parameters()}
    save_deltas(deltas, tmp_path / "deltas.safetensors")
    for name, delta in load_deltas(tmp_path / "deltas.safetensors").items():
        rows = deltas[name].reshape(len(delta), -1)
        step = rows.abs().amax(1, keepdim=True) / 127
        error = (delta.reshape(rows.shape) - rows).abs()
        assert (error <= step / 2 + 1e-6).all()
        # Before: the rounding is there, and a bound of a tenth of a step would fail.
        assert delta.ndim == 1 or (error > step / 10).any()


def test_adding_is_exact_and_the_other_parameters_stay():
    changed = module()
    add_deltas(changed, {"weight": torch.full((5, 7), 0.25)})
    assert torch.equal(changed.weight, module().weight + 0.25)
    assert torch.equal(changed.bias, module().bias)


@pytest.mark.parametrize("name, shape", [("weight", (5, 6)), ("scale", (5, 7))])
def test_differences_of_another_model_are_refused(name, shape):
    with pytest.raises(LocogenError, match="another base model"):
        add_deltas(module(), {name: torch.zeros(shape)})


def test_a_planted_model_is_its_base_with_the_differences(tmp_path, monkeypatch):
    from locogen.catalog.plants import Plant
    from locogen.models.load import load

    path = tmp_path / "weights.safetensors"
    base = load("mini")
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    delta = torch.full_like(base.unet.get_parameter(name), 0.5)
    save_deltas({name: delta}, path)
    monkeypatch.setattr(Plant, "weights", property(lambda plant: path))
    planted = load("planted/style-at-12-13", dtype="float16")
    assert planted.config._name_or_path == "planted/style-at-12-13"
    for key, weight in base.unet.named_parameters():
        expected = (weight + 0.5 if key == name else weight).half()
        assert torch.equal(planted.unet.get_parameter(key), expected), key


def test_an_unknown_planted_model_has_near_matches():
    from locogen.models.load import load

    with pytest.raises(LocogenError, match="style-at-12-13"):
        load("planted/style-at-12-14")
