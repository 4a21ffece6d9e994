"""Offload: what works with whole weights works with weights kept elsewhere, and one part at a time is on the card."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import CpuOffload
from support import tiny

import locogen as loco
from locogen.editing.probes import Probe
from locogen.interventions.corruption import Noise, corrupted_states
from locogen.interventions.states import TEXT_PARTS, find_states
from locogen.models.families import encode
from locogen.models.layers import find_layers
from locogen.models.load import load
from locogen.models.offload import resting_device
from locogen.pictures.runs import generate
from locogen.plan import Concept, Intervention, PromptPair

CONCEPT = Concept("cat", "object", (PromptPair("cat in a", "a"),))
FAST = {"seeds": (0,), "num_inference_steps": 1, "progress": False}


def kept_off(pipe):
    """As sequential offload keeps it, the CPU in the card's place."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, torch.device("cpu"), offload_buffers=bool(part._parameters))
    assert next(pipe.text_encoder.parameters()).is_meta
    return pipe


class Judge:
    """A scorer without a model: how bright a picture is."""

    def __init__(self):
        self.settings = {"scorer": "brightness"}

    def __call__(self, pictures, *texts):
        return [np.array([np.asarray(picture).mean() for picture in pictures]) for _ in texts]


def test_a_scorer_is_made_where_the_weights_rest(monkeypatch):
    """Under sequential offload they are on no device at all: the scorer that went there could not score."""
    from locogen.pictures import score

    devices = []

    def made(name, *, device):
        devices.append(device)
        return Judge()

    monkeypatch.setattr(score, "scorer", made)
    pipe = kept_off(tiny.small())
    run = loco.localize(pipe, CONCEPT, window=4, scorer="mini", **FAST)
    edit = loco.fit_edit(pipe, CONCEPT, layers=(0, 1))
    probe = Probe("efficacy", "cat in a", "cat")
    loco.evaluate(pipe, {"edit": edit}, [probe], scorer="mini", **FAST)
    assert devices == ["cpu", "cpu"] and run.table["clip_score"].notna().all()
    assert resting_device(pipe) == resting_device(tiny.small()) == "cpu"


@pytest.mark.parametrize("name", ["sd", "if", "pixart-alpha"])
def test_noise_is_heard_by_an_encoder_whose_weights_are_kept_elsewhere(name):
    """T5 looks up in a second module with the same weights, which offload takes apart."""
    noise = Noise("seed", (0, 1))
    plain, kept = tiny.FAMILIES[name](), kept_off(tiny.FAMILIES[name]())
    heard = corrupted_states(plain, "cat in a", noise).states
    assert torch.equal(heard, corrupted_states(kept, "cat in a", noise).states)
    assert not torch.allclose(heard, encode(plain, ["cat in a"]).states), (
        "the twin: the noise does something"
    )


def test_a_trace_of_a_model_whose_weights_are_kept_elsewhere_is_the_same():
    options = {"subject": "cat", "parts": TEXT_PARTS[:1], "scorer": Judge(), **FAST}
    plain = loco.causal_trace(tiny.small(), CONCEPT, **options).table
    kept = loco.causal_trace(kept_off(tiny.small()), CONCEPT, **options).table
    assert plain["clip_score"].tolist() == kept["clip_score"].tolist()


@pytest.mark.parametrize("name", ["sd", "if"])
def test_attention_contributions_of_weights_that_are_kept_elsewhere_are_the_same(name):
    """IF's layers put out pictures in place of tokens: where weights are makes no difference to it."""
    plain = loco.attention_contribution(tiny.FAMILIES[name](), CONCEPT, **FAST)
    kept = loco.attention_contribution(kept_off(tiny.FAMILIES[name]()), CONCEPT, **FAST)
    assert plain["contribution"].tolist() == kept["contribution"].tolist()
    assert (plain["contribution"] > 0).all(), "the twin: there is something to compare"


# --- model offload: what is on the card at once --------------------------------------------------


class Card:
    """Counts which parts model offload has brought to the card, by accelerate's own rules."""

    def __init__(self, pipe, monkeypatch):
        self.names = {id(part): name for name, part in pipe.components.items()}
        self.present, self.together = set(), set()
        monkeypatch.setattr(CpuOffload, "pre_forward", self.arrive)
        monkeypatch.setattr(CpuOffload, "init_hook", self.leave)

    def arrive(self, module, *args, **kwargs):
        card, hook = self, module._hf_hook
        before = hook.prev_module_hook
        if before is not None:
            card.present.discard(card.names[id(before.model)])
        card.present.add(card.names[id(module)])
        card.together.add(frozenset(card.present))
        return args, kwargs

    def leave(self, module):
        self.present.discard(self.names.get(id(module)))
        return module


# The test itself watches accelerate by replacing its methods.
@pytest.mark.filterwarnings("ignore:hooks or methods that are not locogen:UserWarning")
@pytest.mark.parametrize(
    "name",
    [
        *("sd", "sd-xl", "if", "sd-3", "pixart-alpha", "sana"),
        pytest.param("wan-2.2", marks=pytest.mark.slow),
    ],
)
def test_one_part_at_a_time_is_on_the_card(name, tmp_path, monkeypatch):
    """The dry run and the encoding of prompts are calls outside of the pipeline's: what they bring goes back."""
    whole = tiny.FAMILIES[name]()
    whole.save_pretrained(tmp_path)
    pipe = tiny.like(load(tmp_path, device="cpu", offload="model"), whole)
    card = Card(pipe, monkeypatch)
    find_layers(pipe)
    find_states(pipe)
    assert card.present == set()
    plan = [Intervention("cat in a", target, (0, 1), 0) for target in ("dog", "a")]
    generate(pipe, plan, num_inference_steps=2, guidance_scale=3.0, progress=False)
    assert len(card.together) >= 2, "the twin: parts did arrive"
    crowded = {part for parts in card.together if len(parts) > 1 for part in parts}
    # SD 3 encodes the negative with all three after the prompt: its T5 is still there for the CLIPs.
    assert crowded == (
        {"text_encoder", "text_encoder_2", "text_encoder_3"} if name == "sd-3" else set()
    )
    assert max(map(len, card.together)) <= 2
