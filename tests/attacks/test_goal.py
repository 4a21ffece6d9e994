"""What an attack learns from and is judged on; theorems on a tiny model, each with its twin."""

import dataclasses
import inspect
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from support import tiny

from locogen.attacks import goal as goals
from locogen.attacks.attack import attack
from locogen.attacks.goal import Goal, NeverHad
from locogen.attacks.kinds import _lesson
from locogen.catalog import concept
from locogen.editing.edit import fit_edit
from locogen.errors import LocogenError
from locogen.phrasings import occurrences
from locogen.plan import Concept, PromptPair

FEW = {"num_inference_steps": 2, "guidance_scale": 2.0, "progress": False}


class Reds:
    """A scorer of red, whatever the text is."""

    settings: ClassVar = {"scorer": "reds"}

    def __call__(self, pictures, *texts):
        reds = np.array([np.asarray(picture, float)[..., 0].mean() / 255 for picture in pictures])
        return [reds if line[0].endswith("cat") else np.full(len(reds), 0.5) for line in texts]


def cat(*words: str) -> Concept:
    pairs = tuple(PromptPair(f"{word} in cat", word) for word in words)
    return Concept("cat", "style", pairs, neighbors=("ca",))


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def edit(pipe):
    return fit_edit(pipe, cat("a dog", "a do"), layers=[0, 1], ridge=0.1)


def goal_of(pipe, tmp_path, subject, **options):
    given = {"training": subject.pairs[::2], "probes": (), "seeds": (0,), "scorer": Reds()}
    return Goal(pipe, subject, store=tmp_path, settings=FEW, **(given | options))


# --- pictures to learn from -----------------------------------------------------------------------


def test_relearning_gets_as_many_pictures_as_it_asks_for(pipe, tmp_path, monkeypatch) -> None:
    """As many as `attack` asks for by itself, of a concept with few pairs."""
    subject = cat("a dog", "a do", "go", "od")
    seeds: list[list[int]] = []
    generate = goals.generate

    def noting(pipe, prompts, **options):
        seeds.append(list(options["seeds"]))
        return generate(pipe, prompts, **options)

    monkeypatch.setattr(goals, "generate", noting)
    goal = goal_of(pipe, tmp_path, subject)
    few, captions = _lesson(goal, 3)
    assert seeds == [[1000, 1001], [1000, 1001]]  # plain ones, and the concept's
    assert captions[4:] == ["a dog in cat", "go in cat", "a dog in cat", "a dog in cat"]
    many, captions = _lesson(goal, 10)
    assert seeds[2:] == [[1002, 1003, 1004]]
    assert len(many) == len(captions) == 20  # half of what is drawn
    different = {picture.tobytes() for picture in many[10:]}
    assert len(different) == 10
    # What a smaller request draws is what it drew before.
    assert [one.tobytes() for one in many[10:13]] == [one.tobytes() for one in few[4:7]]


def test_relearning_uses_all_pictures_that_it_is_given(pipe, tmp_path) -> None:
    shown = tuple(Image.new("RGB", (16, 16), (9 * i, 0, 0)) for i in range(10))
    never_had = NeverHad(pictures=shown, name="zyx")
    goal = goal_of(pipe, tmp_path, cat("a dog", "a do"), never_had=never_had)
    pictures, _ = _lesson(goal, 10)
    assert {picture.tobytes() for picture in pictures[10:]} == {one.tobytes() for one in shown}
    with pytest.raises(LocogenError, match="never_had has 10 pictures to learn from, not 11"):
        _lesson(goal, 11)


def test_a_concept_of_the_catalog_can_be_learned_again_by_default(pipe, tmp_path) -> None:
    goal = goal_of(pipe, tmp_path, concept("mini/neon"))
    most = max(inspect.signature(attack).parameters["pictures"].default)
    assert len(goal.learned[0]) < most  # so few there are under the first seeds
    pictures, captions = _lesson(goal, most)
    assert len(pictures) == len(captions) == 2 * most


# --- words that are put in the concept's place ----------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cartoon of a car", "a cartoon of a <car>"),
        ("Car, a card and a car's door", "<car>, a card and a <car>'s door"),
        ("a car", "a <car>"),
    ],
)
def test_a_token_takes_the_place_of_whole_words_at_each_mention(
    pipe, tmp_path, prompt, expected
) -> None:
    car = Concept("car", "style", (PromptPair("a cartoon of a car", "a cartoon"),))
    assert goal_of(pipe, tmp_path, car).with_token(prompt, "<car>") == expected


def test_no_attacked_prompt_of_the_catalog_still_names_its_concept(pipe, tmp_path) -> None:
    for name in ("mini/neon", "mini/van-gogh", "mini/cat", "sd/van-gogh"):
        subject = concept(name)
        goal = goal_of(pipe, tmp_path, subject)
        for pair in subject.pairs:
            spoken = goal.with_token(pair.prompt, "<new>")
            assert spoken.count("<new>") == 1
            assert not occurrences(spoken, subject.name)
            assert occurrences(pair.prompt, subject.name)  # the twin


# --- states of trainings --------------------------------------------------------------------------


def test_a_state_is_not_used_for_a_training_that_begins_otherwise(pipe, edit, tmp_path) -> None:
    given = {"models": ["edited"], "scorer": Reds(), "seeds": [0], "steps": 0, **FEW}

    def vectors(folder, neighbor):
        other = dataclasses.replace(cat("a dog", "a do"), neighbors=(neighbor,))
        return attack(pipe, other, edit, folder=folder, **given).tensors["edited"]["<cat>"].tolist()

    first = vectors(tmp_path, "ca")
    assert vectors(tmp_path, "dog") == vectors(None, "dog") != first


def test_the_name_of_a_state_holds_what_the_scheduler_predicts(tmp_path) -> None:
    from diffusers import DDIMScheduler

    own = tiny.pipeline()
    goal = goal_of(own, tmp_path, cat("a dog", "a do"))
    before = goal.facts
    assert goal.facts == before  # the twin
    own.scheduler = DDIMScheduler(steps_offset=1, clip_sample=False, prediction_type="v_prediction")
    assert goal.facts != before
