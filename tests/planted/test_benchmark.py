"""The benchmark's run on a tiny pipeline: cells are kept, asked once, shared, and counted."""

import dataclasses

import numpy as np
import pytest
import torch
from support import tiny

import locogen as loco
from locogen.benchmarks import faithfulness, run
from locogen.benchmarks.answers import Answer
from locogen.benchmarks.localizers import race
from locogen.benchmarks.run import benchmark, counting_rows
from locogen.benchmarks.subjects import DEAF, grown
from locogen.catalog.plants import Planting
from locogen.errors import LocogenError
from locogen.interventions.prompts import active_contexts, foreign_hooks
from locogen.models.layers import find_layers
from locogen.pictures.fingerprint import weights_of
from locogen.plan import Concept, PromptPair, Window

NOBODY = dataclasses.replace(DEAF[0], concepts=("mini/neon",))
LATE = dataclasses.replace(
    NOBODY, name="late", plantings={"style": Planting("one place", (Window(12, 2),))}
)
SIZE = {"sizes": [(1, 2)], "circuits": False, "progress": False}


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch):
    """Plants are a tiny pipeline here, each load a new one."""
    monkeypatch.setattr(run, "load_plant", lambda plant, device: tiny.pipeline())


class Named:
    """A localizer that names one place and counts how often it is asked."""

    def __init__(self, place: Window, asks: str = "") -> None:
        self.place = place
        self.asked = []
        self.__qualname__ = f"named {asks}"

    def __call__(self, pipe, concept, **settings):
        self.asked.append((concept.name, settings))
        layers = np.array([float(i in tuple(self.place)) for i in range(len(find_layers(pipe)))])
        return Answer("one place", (self.place,), profile=layers, reason="by hand")


def test_a_race_that_leaves_windows_out_is_ranked_by_what_proposed_them():
    cat = Concept("cat", "style", (PromptPair("a big cat b", "a big b"),))
    asked = {"window": 2, "seeds": range(4), "num_inference_steps": 1, "progress": False}
    answer = race(tiny.pipeline(), cat, scorer=tiny.FakeScorer(), store=None, **asked)
    assert answer.profile is not None and np.isfinite(answer.profile).all()
    assert len(set(answer.profile)) > 2
    # Without the proposal some windows have no estimate, which no ranking can use.
    assert answer.effects["estimate"].isna().any()


def test_ones_own_function_is_a_column_beside_the_others(tmp_path):
    right = Named(Window(12, 2))
    both = {"mine": right, "constant": None, "random window": None}
    bench = benchmark(both, [NOBODY, LATE], store=tmp_path, **SIZE)
    table = bench.table.set_index(["plant", "localizer"])
    assert len(table) == 6
    assert table.loc[("late", "mine"), ["hit", "right_kind", "auroc"]].tolist() == [1, 1, 1]
    assert table.loc[(NOBODY.name, "mine"), "false_single"] == 1
    assert table.loc[("late", "constant"), "places"] == "12-13"
    name, settings = right.asked[0]
    assert name == "neon"
    assert set(settings) == {"window", "seeds", "guidance_scale", "store", "progress"}
    assert settings["seeds"] == (0, 1) and settings["window"] == 2
    assert "mine" in bench._repr_html_() and set(bench.by_rule()["rule"]) == {"nobody", "one place"}


def test_an_answer_is_asked_for_once(tmp_path):
    first, again = Named(Window(12, 2)), Named(Window(12, 2))
    one = benchmark({"mine": first}, [LATE], store=tmp_path, **SIZE)
    two = benchmark({"mine": again}, [LATE], store=tmp_path, **SIZE)
    assert (len(first.asked), len(again.asked)) == (1, 0)
    assert one.table.drop(columns="seconds").equals(two.table.drop(columns="seconds"))
    # Other settings, another plant or other code are other cells.
    other_code = Named(Window(12, 2), "otherwise")
    benchmark({"mine": other_code}, [LATE], store=tmp_path, **SIZE)
    benchmark({"mine": again}, [LATE], store=tmp_path, windows=[1], **SIZE)
    benchmark({"mine": again}, [NOBODY], store=tmp_path, **SIZE)
    assert (len(other_code.asked), len(again.asked)) == (1, 2)


def test_a_kill_loses_one_cell(tmp_path):
    def killed(pipe, concept, **settings):
        raise KeyboardInterrupt

    good = Named(Window(3, 2))
    with pytest.raises(KeyboardInterrupt):
        benchmark({"good": good, "killed": killed}, [LATE], store=tmp_path, **SIZE)
    benchmark({"good": good}, [LATE], store=tmp_path, **SIZE)
    assert len(good.asked) == 1


def test_a_damaged_cell_is_asked_for_again(tmp_path):
    asked = Named(Window(3, 2))
    benchmark({"mine": asked}, [LATE], store=tmp_path, **SIZE)
    [cell] = (tmp_path / "cells").glob("*.json")
    cell.write_text('{"kind": "one pl')
    benchmark({"mine": asked}, [LATE], store=tmp_path, **SIZE)
    assert len(asked.asked) == 2


def test_what_cannot_be_asked_is_inconclusive_and_a_bug_is_raised():
    def refuses(pipe, concept, **settings):
        raise LocogenError("too few seeds")

    def broken(pipe, concept, **settings):
        raise ZeroDivisionError

    table = benchmark({"refuses": refuses}, [LATE], **SIZE).table
    assert table["kind"].tolist() == ["inconclusive"] and "too few seeds" in table["reason"][0]
    with pytest.raises(ZeroDivisionError):
        benchmark({"broken": broken}, [LATE], **SIZE)
    with pytest.raises(LocogenError, match="returned Window"):
        benchmark({"wrong": lambda pipe, concept, **settings: Window(1, 2)}, [LATE], **SIZE)


def test_unknown_names_are_refused():
    with pytest.raises(LocogenError, match="locogenn"):
        benchmark(["locogenn"], [LATE], **SIZE)
    with pytest.raises(LocogenError, match="localizers is 'constan': no name 'constan': did you"):
        benchmark("constan", [LATE], **SIZE)
    with pytest.raises(LocogenError, match="plants is 'repot': no name 'repot': did you mean 'rep"):
        benchmark("constant", "repot", **SIZE)
    with pytest.raises(LocogenError, match="no localizers"):
        benchmark([], [LATE], **SIZE)
    with pytest.raises(LocogenError, match="nothing to ask"):
        benchmark(["constant"], [dataclasses.replace(LATE, concepts=())], **SIZE)


def test_a_window_wider_than_a_model_is_refused_before_weights_are_loaded(monkeypatch):
    def no_weights(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("locogen.benchmarks.run.load_plant", no_weights)
    with pytest.raises(LocogenError, match=r"windows has 17: .* has 16 layers"):
        benchmark("constant", [LATE], windows=[2, 17], **SIZE)
    with pytest.raises(ZeroDivisionError):  # the twin: the widest that there is goes on
        benchmark("constant", [LATE], windows=[16], **SIZE)


def test_rows_of_the_denoiser_are_counted_and_pictures_stay_the_same(tmp_path):
    pipe = tiny.pipeline()
    few = {"num_inference_steps": 3, "guidance_scale": 4.0, "batch_size": 2, "progress": False}
    plain = loco.generate(pipe, ["a cat"], seeds=[0, 1], store=tmp_path, **few)
    with counting_rows(pipe) as counted:
        again = loco.generate(pipe, ["a cat"], seeds=[0, 1], store=tmp_path, **few)
        assert counted.rows == 0  # the store has them, counted or not
        assert foreign_hooks(pipe) == ()
        loco.generate(pipe, ["a dog"], seeds=[0, 1], store=tmp_path, **few)
    assert again.pictures.keys == plain.pictures.keys
    assert (counted.rows, counted.calls) == (3 * 2 * 2, 3)
    loco.generate(pipe, ["a dog in"], seeds=[0], **few)
    assert counted.calls == 3  # not after the context


def test_shared_pictures_count_for_each_answer(tmp_path):
    def makes(pipe, concept, *, seeds, store, **settings):
        prompts = [pair.prompt for pair in concept.pairs]
        made = loco.generate(
            pipe, prompts, seeds=seeds, store=store, num_inference_steps=2, progress=False
        )
        return Answer("nobody", pictures=len(made))

    both = {"first": makes, "second": lambda *args, **settings: makes(*args, **settings)}
    table = benchmark(both, [LATE], store=tmp_path, **SIZE).table.set_index("localizer")
    assert table.loc["second", "calls"] == 0 and table.loc["first", "calls"] > 0
    assert table.loc["second", "rows"] >= table.loc["second", "pictures"] == 2
    assert not table.loc["second", "fresh"]


def test_circuits_are_made_for_rankings(tmp_path, monkeypatch):
    monkeypatch.setattr(faithfulness, "scorer_for", lambda pipe, choice: tiny.FakeScorer())
    options = SIZE | {"circuits": True}
    bench = benchmark({"mine": Named(Window(12, 2))}, [LATE], store=tmp_path, **options)
    [cell] = (tmp_path / "cells").glob("*.json")
    assert set(run.load_json(cell)["circuit"]) == {"0", "1", "2", "4", "8", "16"}
    assert {"cpr", "cmd"} <= set(bench.table.columns)


# --- deaf models ---------------------------------------------------------------------------------

CAT = Concept("cat", "style", (PromptPair("a big cat b", "a big b"),))


def test_a_deaf_plant_is_deaf_within_its_context_only():
    pipe = tiny.pipeline()
    before = weights_of(pipe)
    with grown(LATE, pipe, CAT):
        assert weights_of(pipe) != before
    assert weights_of(pipe) == before and active_contexts(pipe) == ()


def read(pipe, prompt: str, layer: int) -> torch.Tensor:
    """Keys and values that a layer has for a prompt's token "cat"."""
    tokens = pipe.tokenizer([prompt], padding="max_length", return_tensors="pt").input_ids
    cat = pipe.tokenizer("cat").input_ids[1]
    states = pipe.text_encoder(tokens).last_hidden_state[tokens == cat]
    module = find_layers(pipe)[layer].module
    return torch.cat([module.to_k(states), module.to_v(states)], -1)


@torch.no_grad()
def test_deaf_layers_read_something_else_and_hearing_ones_the_same():
    pipe = tiny.pipeline()
    hearing = (4, 5)
    edit = loco.deafen(pipe, CAT, hearing=Window(4, 2))
    layers = range(len(find_layers(pipe)))
    assert set(edit.layers) == set(layers) - set(hearing)
    prompt = loco.default_phrasings(CAT)[0].source
    before = [read(pipe, prompt, layer) for layer in layers]
    with edit.applied(pipe):
        after = [read(pipe, prompt, layer) for layer in layers]
    for layer in layers:
        assert torch.equal(before[layer], after[layer]) == (layer in hearing)


def test_deafen_refuses_layers_that_are_not_there_and_hearing_everywhere():
    pipe = tiny.pipeline()
    with pytest.raises(LocogenError, match="layer 99"):
        loco.deafen(pipe, CAT, hearing=[99])
    with pytest.raises(LocogenError, match="all layers"):
        loco.deafen(pipe, CAT, hearing=range(len(find_layers(pipe))))
