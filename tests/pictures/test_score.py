"""CLIP-score: cosines of unit vectors, each text with its own picture, whatever the batch."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from locogen.catalog import mini_folder
from locogen.errors import LocogenError
from locogen.pictures.score import Clip, default_scorer, scorer


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A tiny random CLIP, saved and loaded as a user's own folder."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = tiny.tokenizer()
    tower = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = tower | dict(
        vocab_size=len(words), max_position_embeddings=40, eos_token_id=words.eos_token_id
    )
    config = CLIPConfig(
        text_config=text, vision_config=tower | dict(image_size=16, patch_size=8), projection_dim=8
    )
    CLIPModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False).save_pretrained(
        folder
    )
    return scorer(str(folder))


def pictures(count):
    dice = np.random.default_rng(0)
    return [Image.fromarray(dice.integers(0, 255, (16, 16, 3), np.uint8)) for _ in range(count)]


def test_scores_are_cosines_of_each_pair(judge):
    made, texts = pictures(3), ["cat", "dog", "cat"]
    seen, read = judge.pictures(made), judge.texts(texts)
    assert np.allclose(np.linalg.norm(seen, axis=1), 1)
    (scores,) = judge(made, texts)
    assert np.allclose(scores, [seen[i] @ read[t] for i, t in enumerate(texts)])
    assert np.abs(scores).max() <= 1
    assert scores[0] != pytest.approx(judge(made, ["dog", "dog", "dog"])[0][0])  # the text matters


def test_several_texts_in_one_pass(judge):
    made = pictures(2)
    one, two = judge(made, ["cat", "dog"], ["dog", "cat"])
    assert np.array_equal(one, judge(made, ["cat", "dog"])[0])
    assert np.array_equal(two, judge(made, ["dog", "cat"])[0])


def test_batches_do_not_matter(judge):
    small = Clip(judge.model, judge.processor, judge.tokenizer, batch_size=2)
    assert np.allclose(
        small(pictures(5), ["cat"] * 5)[0], judge(pictures(5), ["cat"] * 5)[0], atol=1e-6
    )


def test_what_is_recorded(judge):
    assert judge.settings["preprocessing"] == "PIL"
    assert judge.settings["scale"] == 1.0


def test_bad_input(judge, tmp_path):
    with pytest.raises(LocogenError, match="2 pictures and 1 texts"):
        judge(pictures(2), ["cat"])
    with pytest.raises(LocogenError, match="clip-vit-b-16"):
        scorer("clip-vit-b16")
    with pytest.raises(LocogenError, match="could not load the scorer"):
        scorer(str(tmp_path))


def test_each_model_has_its_default(tmp_path):
    from locogen.catalog import mini_folder

    assert default_scorer(str(mini_folder())) == "mini"
    assert default_scorer("CompVis/stable-diffusion-v1-4") == "clip-vit-b-16"
    for stranger in ("somebody/a-model", "", str(tmp_path)):
        assert default_scorer(stranger) == "clip-vit-b-16"
    (tmp_path / "scorer").mkdir()  # a folder that locogen.mini.train has made
    assert default_scorer(str(tmp_path)) == str(tmp_path / "scorer")


@pytest.mark.parametrize("limit", [5, 1])
def test_pictures_are_scored_in_smaller_parts_where_the_memory_is_full(judge, monkeypatch, limit):
    shown = [
        Image.new("RGB", (32, 32), color)
        for color in ("red", "blue", "green", "black", "white", "gray")
    ]
    whole = judge.pictures(shown)
    features = judge.model.get_image_features

    def small(pixel_values):
        if len(pixel_values) > limit:
            raise RuntimeError(
                "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
            )
        return features(pixel_values=pixel_values)

    monkeypatch.setattr(judge.model, "get_image_features", small)
    assert np.abs(judge.pictures(shown) - whole).max() < 1e-5
    monkeypatch.setattr(judge.model, "get_image_features", lambda **_: small(range(9)))
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        judge.pictures(shown)


def test_a_scorer_that_lacks_a_weight_is_refused(tmp_path) -> None:
    """transformers would fill it with random numbers, and the scores would be of another model."""
    source = mini_folder() / "scorer"
    folder = tmp_path / "scorer"
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LocogenError, match=r"lacks the weight text_projection\.weight"):
        scorer(str(folder))
    assert scorer(str(source)).settings["preprocessing"] == "PIL"  # the twin


def test_cosines_become_probabilities():
    from locogen.pictures.score import probabilities

    cosines = np.array([[0.5, 0.5], [0.5, 0.4], [np.nan, 0.3]])
    found = probabilities(cosines, 100)
    assert np.allclose(found.sum(0), 1) and np.allclose(found[:, 0], [0.5, 0.5, 0])
    assert found[0, 1] > 0.99


def test_a_text_is_read_once(judge, monkeypatch):
    asked = []
    monkeypatch.setattr(Clip, "_text", lambda self, text: asked.append(text) or np.ones(8))
    fresh = Clip(judge.model, judge.processor, judge.tokenizer)
    for _ in range(2):
        fresh.texts(["cat", "dog", "cat"])
    assert asked == ["cat", "dog"]


def test_the_scale_of_the_softmax_is_the_catalogs_or_the_models_own(judge):
    own = float(judge.model.logit_scale.detach().exp())
    assert judge.settings["logit_scale"] == pytest.approx(own)
    assert scorer("mini").settings["logit_scale"] == 20
