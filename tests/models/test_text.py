"""One tokenization, the pipeline's own: where words stand, which are cut, and which are not known."""

import copy
import threading
import time
import warnings

import pytest
import torch
from support import tiny

import locogen as loco
from locogen.errors import LocogenError
from locogen.interventions.layer_inputs import LayerInputs
from locogen.models.families import (
    check_known,
    cut_words,
    encode,
    end_position,
    family_of,
    subject_occurrences,
    subject_positions,
    token_spans,
    unknown_words,
    warn_unread,
)
from locogen.models.layers import find_layers
from locogen.plan import Concept, PromptPair

VECTORS = 3


def with_inversion(pipe, token="<neon>", parts=("", "_2"), vectors=VECTORS):
    """The pipeline with a token of textual inversion, in tokenizers of its own."""
    torch.manual_seed(7)
    for part in parts:
        words = copy.deepcopy(getattr(pipe, f"tokenizer{part}"))
        pipe.register_modules(**{f"tokenizer{part}": words})
        encoder = getattr(pipe, f"text_encoder{part}")
        pipe.load_textual_inversion(
            torch.randn(vectors, tiny.WIDTH), token, tokenizer=words, text_encoder=encoder
        )
    return pipe


@pytest.fixture(scope="module")
def inverted():
    return with_inversion(tiny.pipeline(), parts=("",))


@pytest.fixture(scope="module")
def mini():
    return loco.load("mini")


@pytest.fixture(
    scope="module", params=["sd", "sd-xl", "sd-3", "flux", "if", "pixart-alpha", "sana"]
)
def pipe(request):
    return tiny.FAMILIES[request.param]()


def letters(pipe, prompt, subject, encoder=0):
    """What is written at each occurrence's positions."""
    heard = token_spans(pipe, prompt)[encoder]
    found = subject_occurrences(pipe, prompt, subject, encoder=encoder)
    return [heard.decode(heard.ids[at - heard.start] for at in words) for words in found]


# --- whose tokenizer -----------------------------------------------------------------------------


def states_of(pipe):
    """What a call of a fast tokenizer sets in it, and the next call may find there."""
    parts = [part for name, part in pipe.components.items() if name.startswith("tokenizer")]
    return [(part.backend_tokenizer.padding, part.backend_tokenizer.truncation) for part in parts]


def test_looks_at_tokens_leave_the_pipelines_tokenizer_as_it_is(pipe):
    """Another thread may encode with it at the same time, and would get the other padding."""
    parts = [part for name, part in pipe.components.items() if name.startswith("tokenizer")]
    prompt, subject = "cat on a", "cat"
    for part in parts:
        part(prompt, padding="max_length", truncation=True, max_length=9)
    before = states_of(pipe)
    assert None not in before[0]
    token_spans(pipe, prompt)
    subject_occurrences(pipe, prompt, subject)
    warn_unread(pipe, [prompt])
    check_known(pipe, Concept("cat", "object", (PromptPair(prompt, "on a"),)))
    LayerInputs(pipe, find_layers(pipe)).exchange(prompt, "dog on a", subject, "subject", "dog")
    assert states_of(pipe) == before
    for part in parts:  # the twin: a look with the tokenizer itself
        part(prompt)
    assert states_of(pipe) != before


def test_tokens_that_are_added_later_are_seen():
    pipe = tiny.pipeline()
    assert len(token_spans(pipe, "cat <neon>")[0].ids) > 1 + VECTORS
    pipe.load_textual_inversion(torch.randn(VECTORS, tiny.WIDTH), "<neon>")
    assert len(token_spans(pipe, "cat <neon>")[0].ids) == 1 + VECTORS
    pipe.unload_textual_inversion()
    assert len(token_spans(pipe, "cat <neon>")[0].ids) > 1 + VECTORS


def test_threads_encode_one_after_another(monkeypatch):
    """Each encoding sets the padding and resets it: pipelines may share the tokenizer."""
    pipe = tiny.pipeline()
    inside, most = [], []
    encode_prompt = pipe.encode_prompt

    def watched(*args, **options):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        inside.pop()
        return encode_prompt(*args, **options)

    monkeypatch.setattr(pipe, "encode_prompt", watched)
    threads = [threading.Thread(target=encode, args=(pipe, ["a cat"])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]


# --- textual inversion ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sd-xl"])
def test_every_vector_of_a_textual_inversion_has_a_position(kind):
    """Its states are those that change with the token's vectors; the words behind it stand further on."""
    pipe = with_inversion(tiny.FAMILIES[kind](), parts=("",) if kind == "sd" else ("", "_2"))
    prompt = "cat <neon> dog"
    before = encode(pipe, [prompt]).states[0]
    places = subject_positions(pipe, prompt, "<neon>")
    assert len(places) == VECTORS
    assert subject_positions(pipe, prompt, "dog") == (places[-1] + 1,)
    assert end_position(pipe, prompt) == places[-1] + 2
    weight = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[pipe.tokenizer.convert_tokens_to_ids("<neon>_2")] += torch.randn(tiny.WIDTH)
    moved = (encode(pipe, [prompt]).states[0] - before).norm(dim=1) > 1e-6
    assert (
        int(moved.nonzero()[0]) == places[-1]
    )  # CLIP reads from left to right: no state before has heard it


def test_the_end_is_behind_every_vector(inverted):
    """The state at the end is the pooled one of CLIP: the first end mark, of the prompt as it is encoded."""
    prompt = "cat <neon> dog"
    reader = LayerInputs(inverted, find_layers(inverted)[:1])
    converted = inverted.maybe_convert_prompt(prompt, inverted.tokenizer)
    ids = inverted.tokenizer(converted).input_ids
    assert reader.places(prompt, "end") == (ids.index(inverted.tokenizer.eos_token_id),)
    assert reader.places("cat dog", "end") == (3,)


def test_a_prompt_is_cut_where_its_vectors_are(inverted):
    fits = "<neon> " * 12
    assert cut_words(inverted, fits)[0] == ""
    cut, limit = cut_words(inverted, fits + "<neon> cat")
    assert limit == 40 and cut.startswith("<neon>_2") and cut.endswith("cat")
    with pytest.warns(UserWarning, match="longer than 40 tokens"):
        warn_unread(inverted, [fits + "cat <neon>"])


def test_a_sign_may_be_the_token_of_a_textual_inversion():
    pipe = with_inversion(tiny.pipeline(), token="<*>", parts=("",), vectors=2)
    assert len(subject_positions(pipe, "a <*>, b", "<*>")) == 2
    assert token_spans(pipe, "a <*> .")[0].last == token_spans(pipe, "a <*>")[0].last == 3


def test_a_token_that_one_encoder_of_two_knows_has_no_position():
    pipe = with_inversion(tiny.sdxl(), parts=("",))
    with pytest.raises(LocogenError, match="load the textual inversion into both"):
        subject_positions(pipe, "cat <neon>", "cat")
    assert subject_positions(pipe, "a cat", "cat") == (2,)
    assert cut_words(pipe, "a <neon>")[0] == ""  # pictures of it are right, and are made
    check_known(pipe, Concept("<neon>", "style", (PromptPair("a cat in <neon>", "a cat"),)))
    with_inversion(pipe, token="<lit>", parts=("_2",), vectors=12)
    assert "<lit>_11" in cut_words(pipe, "cat " * 30 + "<lit>")[0]  # of the second encoder alone


# --- where words stand ---------------------------------------------------------------------------


def test_a_name_inside_a_token_of_textual_inversion_is_not_its(inverted):
    assert letters(inverted, "neon <neon>", "neon") == ["neon"]
    with pytest.raises(LocogenError, match="does not contain"):
        subject_positions(inverted, "a <neon>", "neon")


@pytest.mark.parametrize(
    ("prompt", "subject", "written"),
    [
        ("a cat, on b", "cat", ["cat"]),
        ("a cat, on b", "cat,", ["cat"]),
        ("cat", "cat", ["cat"]),
        ("a cat on a cat", "cat", ["cat", "cat"]),
        ("concat cats catalog cat", "cat", ["cat"]),
        ("ab's dog-like cat", "ab", ["ab"]),
        ("ab's dog-like cat", "dog", ["dog"]),
        ("a cat dog, cat", "cat dog", ["cat dog"]),
        ("a cat  dog", "cat dog", ["cat dog"]),
    ],
)
def test_a_subject_stands_at_its_own_tokens(pipe, prompt, subject, written):
    for encoder in range(len(token_spans(pipe, prompt))):
        found = letters(pipe, prompt, subject, encoder)
        assert ["".join(words.split()) for words in found] == [
            "".join(words.split()) for words in written
        ]


def test_no_position_is_that_of_punctuation(pipe):
    """Not inside a name either, and not at the end of a prompt."""
    for encoder, heard in enumerate(token_spans(pipe, "a wall-e.")):
        (places,) = subject_occurrences(pipe, "a wall-e.", "wall-e", encoder=encoder)
        assert heard.last == places[-1]
        assert all(
            heard.tokenizer.decode([heard.ids[at - heard.start]]).strip() not in "-."
            for at in places
        )


def test_what_is_not_there_is_refused(pipe):
    for prompt in ("a dog", "concat cats"):
        with pytest.raises(LocogenError, match="does not contain"):
            subject_positions(pipe, prompt, "cat")


def test_a_subject_behind_the_limit_is_refused_and_one_before_it_found(mini):
    long = "a picture of " * 8
    with pytest.raises(LocogenError, match="is cut after 20 tokens"):
        subject_positions(mini, long + "cat", "cat")
    assert subject_positions(mini, "cat " + long + "cat", "cat") == (1,)


def test_capitals_are_found_by_tokenizers_that_hear_them(mini):
    assert (
        subject_positions(mini, "A CAT", "cat") == subject_positions(mini, "a cat", "Cat") == (2,)
    )
    pipe = tiny.flux()
    assert family_of(pipe).normalize("A B") == "A B"
    assert letters(pipe, "a CAT, cat", "cat")[1] == "cat"


# --- words that are not known --------------------------------------------------------------------


def test_unknown_words_are_named(mini):
    assert unknown_words(mini, 'a "cat" and a 猫') == ('"', "猫")
    assert unknown_words(mini, "a cat, on a hill: van gogh's") == (":",)
    assert unknown_words(mini, "a picture of a cat") == ()


def test_a_tokenizer_of_t5_says_what_it_does_not_know():
    pipe = tiny.sd3()
    assert unknown_words(pipe, "a cat 猫 b") == ("猫",)
    assert unknown_words(pipe, "a cat b") == ()
    pipe.register_modules(text_encoder_3=None, tokenizer_3=None)
    assert unknown_words(pipe, "A cat") == ()  # CLIP hears small letters, T5 has no A here
    assert unknown_words(tiny.sd3(), "A cat") == ("A",)


def test_unheard_words_are_warned_of_once_a_prompt(mini):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_unread(mini, ["a 猫", "a 猫", "a cat"], stacklevel=1)
    (warning,) = caught
    assert "does not know '猫' in 'a 猫'" in str(warning.message)
    assert warning.filename == __file__


def test_a_concept_that_is_not_heard_is_refused(mini):
    pair = PromptPair("a picture of a 猫", "a picture")
    with pytest.raises(LocogenError, match="knows no word of '猫'"):
        check_known(mini, Concept("猫", "object", (pair,)))
    with pytest.raises(LocogenError, match="knows no word of '猫'"):
        subject_positions(mini, pair.prompt, "猫")
    same = PromptPair("a picture of a 猫", "a picture of a 犬")
    with pytest.raises(LocogenError, match="become the same tokens"):
        check_known(mini, Concept("pets", "object", (same,)))
    capitals = PromptPair("a picture of a Cat", "a picture of a cat")
    with pytest.raises(LocogenError, match="become the same tokens"):
        check_known(mini, Concept("Cat", "object", (capitals,)))
    check_known(mini, Concept("cat", "object", (PromptPair("a picture of a cat", ""),)))
