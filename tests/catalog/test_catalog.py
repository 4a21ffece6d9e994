"""The catalog: every entry is in order, the mini model's concepts are of its world, bad files are named."""

import re
from pathlib import Path

import pytest

from locogen.catalog import (
    concept,
    concepts,
    entry_of,
    mini_folder,
    model_entries,
    model_entry,
    model_table,
    models as catalog_models,
    register,
    scorer_entry,
    usual_settings,
)
from locogen.errors import LocogenError
from locogen.mini import world
from locogen.phrasings import neighbor_texts, occurrences
from locogen.plan import KINDS

MINI = list(concepts("mini")["id"])


# --- models and scorers --------------------------------------------------------------------------


def test_every_model_is_complete() -> None:
    names = [entry.name for entry in model_entries()]
    assert {"mini", "sd-1.4", "sd-1.5", "openjourney", "sd-2.1"} <= {
        e.name for e in model_entries() if e.supported
    }
    assert list(model_table()["name"]) == names
    for entry in model_entries():
        assert scorer_entry(entry.scorer).name == entry.scorer
        assert entry.concepts in set(concepts()["model"])
        assert entry.family.endswith("Pipeline") and entry.license and entry.revision
        assert set(entry.published) <= set(KINDS)
        assert all(0 <= start <= entry.layers - entry.window for start in entry.published.values())
        assert entry.embedded or re.fullmatch(r"[\w.-]+/[\w.-]+", entry.id)
        hash(entry)


def test_vanished_models_have_mirrors() -> None:
    for name in ("sd-1.5", "sd-2.1"):
        entry = model_entry(name)
        assert entry.mirrors and entry.id not in entry.mirrors


def test_published_carriers_are_the_table_of_the_method() -> None:
    """No start is there that the authors do not show."""
    published = {entry.name: dict(entry.published) for entry in model_entries() if entry.published}
    one = {"style": 8, "object": 6, "fact": 6}
    assert published == {
        "sd-1.4": one,
        "sd-1.5": one,
        "openjourney": one,
        "sd-2.1": {"style": 8, "object": 8, "fact": 7},
        "sd-xl": {"style": 45, "fact": 45},
    }


def test_the_mini_model_is_in_the_package() -> None:
    assert model_entry("mini").folder == mini_folder()
    assert mini_folder().parent.name == "mini" and model_entry("sd-1.4").folder is None
    assert scorer_entry("mini").folder == mini_folder() / "scorer"
    assert scorer_entry("clip-vit-b-16").folder is None


@pytest.mark.parametrize(
    "ask, words",
    [
        (lambda: model_entry("sd1.4"), "no model 'sd1.4': did you mean 'sd-1.4'"),
        (lambda: model_entry("zzz"), "use one of chroma, flux-2-dev, flux-2-klein-4b"),
        (lambda: scorer_entry("clip"), "no scorer 'clip'"),
        (
            lambda: concept("mini/van-gog"),
            "no concept 'mini/van-gog': did you mean 'mini/van-gogh'",
        ),
        (lambda: concepts("minni"), "no model 'minni': did you mean 'mini'"),
    ],
)
def test_misses_name_the_nearest(ask, words: str) -> None:
    with pytest.raises(LocogenError, match=re.escape(words)):
        ask()


# --- the concepts that come along ----------------------------------------------------------------


@pytest.mark.parametrize("id", list(concepts()["id"]))
def test_every_concept_is_in_order(id: str) -> None:
    found = concept(id)
    assert len(found.pairs) >= 6, "below six prompts the statistics speak for these prompts only"
    for pair in found.pairs:
        assert pair.placebo and pair.placebo not in (pair.prompt, pair.target)
        assert "{" not in f"{pair}" and "  " not in f"{pair.prompt}{pair.target}{pair.placebo}"


def test_the_table_agrees_with_the_concepts() -> None:
    table = concepts()
    assert list(table.columns) == ["id", "model", "name", "kind", "pairs", "note"]
    assert table["id"].is_unique and not table.duplicated(["model", "name"]).any()
    for row in table.itertuples():
        found = concept(str(row.id))
        assert (found.name, found.kind, len(found.pairs)) == (row.name, row.kind, row.pairs)


def test_models_are_asked_about_what_they_know() -> None:
    assert set(concepts("mini")["model"]) == {"mini"}
    assert set(concepts("sd-1.4")["model"]) == {"sd"} == set(concepts("sd-2.1")["model"])
    assert set(concepts("sd-1.4")["kind"]) == set(KINDS)


def seen(prompt: str) -> tuple[str, str] | None:
    """The (object, style) that a canonical prompt of the mini world shows; facts by their answer."""
    match = re.fullmatch(r"a picture of (?:an? )?(.+?)(?: in the style of (.+))?", prompt)
    if match is None:
        return None
    thing, style = match[1], match[2] or world.STYLES[0]
    return world.FACTS.get(thing, thing), style


def test_the_reader_of_prompts_reads() -> None:
    """The twin of the test below: it would notice a held-out pair, and a word from outside the world."""
    assert seen("a picture of a cat in the style of van gogh") == ("cat", "van gogh")
    assert ("cat", "van gogh") in world.HELD_OUT
    assert seen("a picture of the national animal of france in the style of neon") == (
        "rooster",
        "neon",
    )
    assert seen("a picture of an owl") == ("owl", "plain")
    assert seen("a picture in the style of neon") is None


@pytest.mark.parametrize("id", MINI)
def test_mini_prompts_are_of_its_world_and_not_held_out(id: str) -> None:
    found = concept(id)
    for pair in found.pairs:
        for text in (pair.prompt, pair.target):
            if (
                text.startswith("a picture in the style of ")
                and found.kind == "object"
                and text == pair.target
            ):
                assert text.removeprefix("a picture in the style of ") in world.STYLES[1:]
                continue
            shown = seen(text)
            assert shown is not None and shown not in world.HELD_OUT, text
            assert shown[0] in world.OBJECTS and shown[1] in world.STYLES, text
        assert pair.prompt == world.prompt(wording(pair.prompt), style_of(pair.prompt)), (
            "the article is wrong"
        )


def wording(prompt: str) -> str:
    """The thing as the prompt words it, without article."""
    return re.sub(r"^a picture of (an? )?", "", prompt).split(" in the style of ")[0]


def style_of(prompt: str) -> str:
    return prompt.split(" in the style of ")[1]


def test_mini_covers_its_world() -> None:
    table = concepts("mini")
    by_kind = {kind: set(table[table["kind"] == kind]["name"]) for kind in KINDS}
    assert by_kind["style"] == set(world.STYLES[1:])
    assert len(by_kind["object"]) >= 4 and by_kind["object"] <= set(world.OBJECTS)
    facts = table[table["kind"] == "fact"]
    for told, known in (("told", world.TOLD_FACTS), ("untold", world.UNTOLD_FACTS)):
        rows = facts[facts["note"].str.startswith(f"{told}:")]
        assert {f"the {name}" for name in rows["name"]} == set(known)
        for row in rows.itertuples():
            assert str(row.note).endswith(f" {known[f'the {row.name}']}")
    for id in facts["id"]:
        answers = {seen(text) for pair in concept(id).pairs for text in (pair.prompt, pair.target)}
        assert len({answer[0] for answer in answers if answer}) == 2, (
            "prompt and target show the same object"
        )


# --- a file of one's own -------------------------------------------------------------------------

GOOD = """
["my/ukiyo-e"]
name = "ukiyo-e"
kind = "style"
prompt = "{} in the style of ukiyo-e"
target = "{}"
placebo = "{}, drawn as ukiyo-e"
text = "ukiyo-e"
fill = ["a house", "a {boat}"]

["my/snoopy"]
model = "sd-1.4"
name = "snoopy"
kind = "object"
note = "drawn"
pairs = [{ prompt = "snoopy", target = "a dog", text = "a beagle" }]

["my/fact"]
name = "fact"
kind = "fact"
prompt = "the capital of france"
target = "rome"

["my/texts"]
name = "texts"
kind = "style"
prompt = "{} by hokusai"
target = "{}"
text = "{}, hokusai"
fill = ["a wave"]
"""


@pytest.fixture
def own(tmp_path: Path):
    def write(text: str) -> Path:
        (tmp_path / "my.toml").write_text(text, encoding="utf-8")
        return tmp_path / "my.toml"

    return write


def test_own_concepts(own) -> None:
    path = own(GOOD)
    ukiyo = concept("my/ukiyo-e", file=path)
    assert ukiyo.text == "ukiyo-e" and ukiyo.scored_text(ukiyo.pairs[0]) == "ukiyo-e"
    assert ukiyo.pairs[1].prompt == "a {boat} in the style of ukiyo-e"
    assert concept("my/snoopy", file=str(path)).pairs[0].text == "a beagle"
    assert [pair.target for pair in concept("my/fact", file=path).pairs] == ["rome"]
    texts = concept("my/texts", file=path)
    assert texts.text is None and texts.pairs[0].text == "a wave, hokusai"


def test_own_concepts_stand_beside_the_others(own) -> None:
    path = own(GOOD)
    assert {"my/ukiyo-e", "my/snoopy", "mini/neon"} <= set(concepts(file=path)["id"])
    assert {"my/ukiyo-e", "my/snoopy", "sd/monet"} <= set(concepts("sd-1.4", file=path)["id"])
    assert "my/snoopy" not in set(concepts("sd-1.5", file=path)["id"])
    assert "my/ukiyo-e" not in set(concepts()["id"])
    with pytest.raises(LocogenError, match="did you mean 'my/ukiyo-e'"):
        concept("my/ukiyo", file=path)
    assert concept("mini/neon", file=path) == concept("mini/neon")


STYLE = '["my/x"]\nname = "x"\nkind = "style"\n'
BAD = {
    "not TOML": ("[my/x", "is not valid TOML"),
    "a bare value": ('x = "y"', "concept 'x': not a table"),
    "unknown key": (STYLE + 'prompts = "a"', "no key 'prompts': did you mean 'prompt'"),
    "no name": ('["my/x"]\nkind = "style"', "name is missing: add a line name = "),
    "no kind": ('["my/x"]\nname = "x"', "kind is missing"),
    "wrong kind": (
        '["my/x"]\nname = "x"\nkind = "artist"',
        "kind is 'artist': use one of style, object, fact",
    ),
    "unknown model": (
        STYLE + 'model = "sd-1.6"\nprompt = "a"\ntarget = "b"',
        "no model 'sd-1.6': did you mean",
    ),
    "number for text": (STYLE + "prompt = 3", "prompt is 3: give it a text in quotes"),
    "no prompt": (STYLE + 'target = "a"', "prompt is missing: give prompt and target, or pairs"),
    "no target": (STYLE + 'prompt = "a"', "target is missing"),
    "nothing to fill": (
        STYLE + 'prompt = "a"\ntarget = "b {}"\nfill = ["c"]',
        "prompt 'a' has no {} to fill",
    ),
    "target not filled": (
        STYLE + 'prompt = "a {}"\ntarget = "b"\nfill = ["c"]',
        "target 'b' has no {}",
    ),
    "no fill": (
        STYLE + 'prompt = "a {}"\ntarget = "b"',
        "prompt 'a {}' has a {} and there is no fill",
    ),
    "empty fill": (
        STYLE + 'prompt = "a {}"\ntarget = "{}"\nfill = []',
        "fill is not a list of texts",
    ),
    "fill of numbers": (
        STYLE + 'prompt = "a {}"\ntarget = "{}"\nfill = [1]',
        "fill is not a list of texts",
    ),
    "both forms": (STYLE + 'prompt = "a"\npairs = []', "it has both pairs and prompt"),
    "no pairs": (STYLE + "pairs = []", "has no prompt pairs"),
    "pairs of texts": (STYLE + 'pairs = ["a"]', "pairs is not a list of tables"),
    "unknown key in a pair": (STYLE + 'pairs = [{ prompt = "a", taget = "b" }]', "no key 'taget'"),
    "pair without target": (STYLE + 'pairs = [{ prompt = "a" }]', "target is missing"),
    "equal": (STYLE + 'prompt = "a"\ntarget = "a"', "prompt and target are both 'a'"),
    "twice the same": (
        STYLE + 'prompt = "a {}"\ntarget = "{}"\nfill = ["b", "b"]',
        "has the prompt 'a b' twice",
    ),
    "empty": (STYLE + 'prompt = ""\ntarget = "b"', "prompt is ''"),
}


def test_an_empty_target_is_filled_for_every_prompt(own) -> None:
    path = own(STYLE + 'prompt = "a {}"\ntarget = ""\nfill = ["b", "c"]')
    assert [(p.prompt, p.target) for p in concept("my/x", file=path).pairs] == [
        ("a b", ""),
        ("a c", ""),
    ]


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(own, name: str) -> None:
    """The message names the file, the entry and the remedy."""
    text, words = BAD[name]
    path = own(text)
    with pytest.raises(LocogenError, match=re.escape(words)) as caught:
        concepts(file=path)
    assert str(path) in str(caught.value)
    if text.startswith(STYLE):
        assert "concept 'my/x'" in str(caught.value)


def test_taken_ids_and_missing_files(own, tmp_path: Path) -> None:
    taken = own(STYLE.replace("my/x", "mini/neon") + 'prompt = "a"\ntarget = "b"')
    with pytest.raises(
        LocogenError, match="the catalog has a concept 'mini/neon' already: give yours another id"
    ):
        concepts(file=taken)
    with pytest.raises(LocogenError, match=r"cannot read .*nowhere\.toml: No such file"):
        concept("my/x", file=tmp_path / "nowhere.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(LocogenError, match="not UTF-8"):
        concepts(file=tmp_path / "latin.toml")


def test_concepts_of_a_model_from_anywhere(tmp_path: Path) -> None:
    """A hub id that the catalog knows, one that it does not, a folder; a misspelt name is an error above."""
    by_name = set(concepts("sd-1.4")["id"])
    assert set(concepts(model_entry("sd-1.4").id)["id"]) == by_name
    assert set(concepts("me/my-model")["id"]) == set(concepts(str(tmp_path))["id"])
    assert by_name < set(concepts("me/my-model")["id"]) == set(concepts()["id"])


def test_only_a_loaded_model_is_remembered(tmp_path: Path) -> None:
    """Reading an entry changes nothing; registering it does."""
    path = tmp_path / "own.toml"
    path.write_text('[models.mine]\nid = "me/mine"\nfamily = "F"\nwindow = 5\n', encoding="utf-8")
    entry = model_entry("mine", path)
    assert usual_settings("me/mine")["window"] == 2 and entry_of("me/mine") is None
    register(entry)
    assert usual_settings("me/mine")["window"] == 5 and entry_of("me/mine") == entry
    catalog_models._REGISTERED.clear()


def test_every_concept_of_the_catalog_names_neighbors() -> None:
    for id in concepts()["id"]:
        subject = concept(id)
        texts = [neighbor_texts(subject, pair) for pair in subject.pairs]
        assert len({len(each) for each in texts}) == 1 and len(texts[0]) >= 5, id
        for pair, each in zip(subject.pairs, texts, strict=True):
            assert subject.scored_text(pair) not in each
            assert subject.kind != "style" or pair.target in each, "no style is a neighbor"
            if subject.kind == "fact":
                assert subject.answer and occurrences(each[0], subject.answer), "the old answer"


def test_a_file_shares_lists_of_neighbors(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    lists = '[neighbors]\n"my/arts" = ["{} by monet", "cubism"]\n'
    entry = '["my/a"]\nname = "ukiyo-e"\nkind = "style"\nprompt = "{} in ukiyo-e"\ntarget = "{}"\n'
    entry += 'fill = ["a cat"]\nneighbors = "my/arts"\n'
    file.write_text(lists + entry, encoding="utf-8")
    subject = concept("my/a", file=file)
    texts = neighbor_texts(subject, subject.pairs[0])
    assert texts == ("a cat by monet", "a cat in cubism", "a cat")
    file.write_text(lists + entry.replace("my/arts", "my/art"), encoding="utf-8")
    with pytest.raises(LocogenError, match="my/arts"):
        concept("my/a", file=file)


def test_a_model_of_ones_own_is_asked_about_the_concepts_of_its_entry(tmp_path: Path) -> None:
    own = tmp_path / "models.toml"
    family = 'family = "StableDiffusionPipeline"'
    own.write_text(f'[models.mine]\nid = "mine"\n{family}\nconcepts = "mini"\n')
    assert concepts("mine", models_file=own).equals(concepts("mini"))
    with pytest.raises(LocogenError, match="no model 'mine'"):
        concepts("mine")
