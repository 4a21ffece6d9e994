"""The paper's study (reports/paper.toml): complete, and it runs from the hub's cache with tiny pipelines in it."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from support import tiny

from locogen.catalog import (
    concept,
    concepts,
    mini_folder,
    model_entry,
    published_start,
    scorer_entry,
)
from locogen.pages.build import build
from locogen.studies.planning import Planned, read_study
from locogen.studies.study import run_study

STUDY = Path(__file__).resolve().parent.parent.parent / "reports" / "paper.toml"
MODELS = ("sd-1.5", "openjourney", "sd-2.1", "sd-xl", "if-1")
STAND_INS = {"sd-xl": tiny.sdxl, "if-1": tiny.deepfloyd}  # tiny.pipeline stands in for the others
QUICK = {
    "seeds = 4": "seeds = 1",
    "max_prompts = 0": "max_prompts = 1",
    "num_inference_steps = 0": "num_inference_steps = 1",
    'device = "cuda"': 'device = "cpu"',
    'dtype = "float16"': 'dtype = "float32"',
}


def quick(folder: Path) -> tuple[Path, tuple[Planned, ...]]:
    """The study on this machine, with one prompt, seed and step; nothing else of it is changed."""
    text = STUDY.read_text(encoding="utf-8")
    for old, new in QUICK.items():
        assert text.count(f"\n{old}\n") == 1, old
        text = text.replace(f"\n{old}\n", f"\n{new}\n")
    (folder / "paper.toml").write_text(text, encoding="utf-8")
    return folder / "paper.toml", read_study(folder / "paper.toml")[2]


def cached(hub: Path, id: str) -> Path:
    """The folder of a repository's only snapshot in a hub cache."""
    repository = hub / f"models--{id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def test_every_model_meets_every_kind() -> None:
    runs = read_study(STUDY)[2]
    asked = Counter(
        (run.parameters["model"], concept(run.parameters["concept"]).kind) for run in runs
    )
    assert set(asked) == {(model, kind) for model in MODELS for kind in ("style", "object", "fact")}
    assert set(asked.values()) == {3}
    for run in runs:
        assert run.parameters["window"] == 0, "the model's own, from the catalog"
        assert run.parameters["concept"] in set(concepts(run.parameters["model"])["id"])
    assert {model: model_entry(model).window for model in MODELS} == dict(
        zip(MODELS, (2, 2, 2, 5, 3), strict=True)
    )


def test_every_concept_says_where_it_is_from() -> None:
    table = concepts("sd-1.5")
    assert table["note"].str.contains(r"ours|\d{4}").all()
    facts = [concept(id) for id in table[table["kind"] == "fact"]["id"]]
    assert all(fact.answer and fact.answer not in fact.pairs[0].target for fact in facts)


def test_published_starts_are_found_by_name_or_id() -> None:
    assert (
        published_start("sd-1.5", "style")
        == 8
        == published_start("runwayml/stable-diffusion-v1-5", "style")
    )
    assert published_start("sd-2.1", "fact") == 7 and published_start("sd-xl", "object") is None
    assert published_start("mini", "style") is None is published_start("./elsewhere", "style")


@pytest.mark.slow
def test_it_runs_with_tiny_pipelines_in_place_of_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, runs = quick(tmp_path)
    hub = tmp_path / "hf" / "hub"
    shutil.copytree(mini_folder() / "scorer", cached(hub, scorer_entry("clip-vit-b-16").id))
    for model in MODELS:
        STAND_INS.get(model, tiny.pipeline)().save_pretrained(cached(hub, model_entry(model).id))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    chosen = [next(r for r in runs if r.parameters["model"] == model) for model in MODELS]
    of_sd = {r.parameters["concept"]: r for r in runs if r.parameters["model"] == "sd-1.5"}
    chosen += [of_sd["sd/snoopy"], of_sd["sd/us-president"]]  # an object and a fact
    results = run_study(path, only=[run.slug for run in chosen], workers=1)
    for run in chosen:
        told = json.loads((results / run.slug / "result.json").read_text(encoding="utf-8"))
        model = run.parameters["model"]
        assert told["model"] == model
        start = {"sd-xl": 45, "if-1": None}.get(model, 8 if told["kind"] == "style" else 6)
        assert told.get("published") == published_start(model, told["kind"]) == start
        page = json.loads((results / run.slug / "notebook.ipynb").read_text(encoding="utf-8"))
        shown = json.dumps(page["cells"], ensure_ascii=False)
        words = f"Published for {model} (Basu et al. 2024): layers {start}"
        assert (words in shown) == bool(start)
    index = build(results).read_text(encoding="utf-8")
    assert (
        index.count("published: from layer 8") == 3 and index.count("published: from layer 45") == 1
    )
    assert index.count("published: from layer 6") == 2
