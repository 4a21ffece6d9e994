"""All that depends on a model's family: its denoiser, dummy inputs, prompt encoding, and where text enters.

To add a family: one `Family` entry in `FAMILIES`, keyed by the pipeline's class name. Nothing else in locogen asks
what kind of model it has.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from locogen.errors import LocogenError, UnsupportedModel
from locogen.models import denoisers, text as texts
from locogen.models.compilation import uncompiled_module
from locogen.models.denoisers import Change
from locogen.models.hooks import Hook
from locogen.models.offload import taken_back
from locogen.models.text import Encoded, Spoken, Text
from locogen.phrasings import Phrasing, occurrences, shared_length, without_marks
from locogen.plan import Concept

if TYPE_CHECKING:
    from torch import Tensor


def _nothing(pipe: Any) -> dict[str, Any]:
    return {}


def _lowered(words: str) -> str:
    """What diffusers' `_text_preprocessing` makes of a prompt where the caption is not cleaned, locogen's own case."""
    return words.lower().strip()


def _given_time(pipe: Any, given: Any) -> Any:
    return given


@dataclass(frozen=True)
class Family:
    """What locogen must know of a family of pipelines.

    `denoiser`: attribute of the pipeline; `built_as`: whether a bare denoiser is of this family;
    `dummy_inputs(denoiser)`: keyword arguments of the smallest forward pass; `encode(pipe, prompts, guided)`: the
    prompts' text, and the pipeline's own negative; `check(denoiser)` raises where an intervention would be wrong;
    `spelled(words)`: what the pipeline makes of a prompt before its tokenizer; `spoken(pipe, spelled)`: where its
    words stand in the states, one entry for each encoder with positions of its own, the one that hears most of a
    prompt last; `matrices(layer.module)`: the linear maps that read text, "k" and "v".

    `heard(denoiser, states)`: what the layers hear of encoded states; `read(layer.module, heard)`: what the matrices
    read of that. `pooled(denoiser, change)`: hooks that apply a change to the rows of the vector by which text enters
    beside the layers; None where it does not. `evolves`: text changes from block to block, so that a target is heard
    from its own run in the same batch (patching) and not from its encoding. `time(pipe, given)`: the scheduler's
    timestep for the one that the denoiser is given. `options(pipe)`: arguments that every call takes. `sets_padding`:
    encoding sets the tokenizer's padding side by itself, so that it is no setting of the model.

    For edits: `tokens`, which states hold a subject ("last_subject" where text is read from left to right, "subject"
    where every word hears every other); `entry`: the map by which text enters beside or before the layers, and
    `entry_reads(denoiser, text, places)`, what it reads of a text; `kohya_name(denoiser, module)`: the name of a
    module in LoRA files of kohya's tools, None where they have no such names.
    """

    name: str
    denoiser: str
    built_as: Callable[[Any], bool]
    dummy_inputs: Callable[[Any], Mapping[str, Any]]
    encode: Callable[[Any, Sequence[str], bool], Encoded]
    check: Callable[[Any], None]
    spoken: Callable[[Any, str], tuple[Spoken, ...]]
    matrices: Callable[[Any], Mapping[str, Any]]
    text_of: Callable[[tuple[Any, ...]], Text] = texts.states_of
    spelled: Callable[[str], str] = str
    heard: Callable[[Any, Tensor], Tensor] = denoisers.same
    read: Callable[[Any, Tensor], Tensor] = denoisers.same
    pooled: Callable[[Any, Change], list[Hook]] | None = None
    evolves: bool = False
    time: Callable[[Any, Any], Any] = _given_time
    options: Callable[[Any], dict[str, Any]] = _nothing
    sets_padding: bool = False
    tokens: Literal["last_subject", "subject"] = "last_subject"
    entry: str | None = None
    entry_reads: Callable[[Any, Text, Sequence[int]], Tensor] | None = None
    kohya_name: Callable[[Any, str], str] | None = None


def _t5(tokenizer: str, limit: int) -> Callable[[Any, str], tuple[Spoken, ...]]:
    return lambda pipe, prompt: (texts.spoken_by(pipe, getattr(pipe, tokenizer), prompt, limit),)


def _exact_size(pipe: Any) -> dict[str, Any]:
    """Pictures of the checkpoint's own size, not resized; the negative comes encoded."""
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return {"negative_prompt": None, "use_resolution_binning": False, "height": side, "width": side}


_SD = Family(
    name="Stable Diffusion 1 and 2",
    denoiser="unet",
    built_as=denoisers.unet_with(None),
    dummy_inputs=denoisers.unet_inputs,
    encode=texts.encode_sd,
    check=denoisers.check_seen_through,
    spoken=texts.spoken_clip,
    matrices=denoisers.keys_and_values,
    kohya_name=denoisers.kohya_name_sd,
)
_PIXART = replace(
    _SD,
    name="PixArt-α",
    denoiser="transformer",
    built_as=denoisers.built_as("PixArtTransformer2DModel"),
    dummy_inputs=denoisers.caption_inputs,
    encode=texts.encode_masked,
    text_of=texts.masked_states_of,
    spelled=_lowered,
    spoken=_t5("tokenizer", 120),
    heard=denoisers.captioned,
    options=_exact_size,
    tokens="subject",
    kohya_name=None,
)
_SD3 = replace(
    _SD,
    name="Stable Diffusion 3",
    denoiser="transformer",
    built_as=denoisers.built_as("SD3Transformer2DModel"),
    dummy_inputs=denoisers.joint_inputs,
    encode=texts.encode_sd3,
    text_of=texts.pooled_states_of,
    spoken=texts.spoken_sd3,
    matrices=denoisers.added_keys_and_values,
    pooled=denoisers.pooled_projections,
    evolves=True,
    tokens="subject",
    entry="context_embedder",
    entry_reads=denoisers.embedder_entry,
    kohya_name=None,
)
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": _SD,
    "LatentConsistencyModelPipeline": replace(
        _SD, name="Latent Consistency", encode=texts.encode_lcm
    ),
    "StableDiffusionXLPipeline": replace(
        _SD,
        name="SD-XL",
        built_as=denoisers.unet_with("text_time"),
        encode=texts.encode_sdxl,
        text_of=texts.pooled_states_of,
        pooled=denoisers.added_text,
        entry="add_embedding.linear_1",
        entry_reads=denoisers.pooled_entry,
        kohya_name=denoisers.kohya_name_sdxl,
    ),
    "IFPipeline": replace(
        _SD,
        name="DeepFloyd IF",
        built_as=denoisers.unet_with("text"),
        encode=texts.encode_if,
        spelled=_lowered,
        spoken=_t5("tokenizer", 77),
        matrices=denoisers.added_keys_and_values,
        heard=denoisers.projected,
        read=denoisers.normed,
        pooled=denoisers.pooled_inside,
        tokens="subject",
        kohya_name=None,
    ),
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": replace(
        _SD3,
        name="FLUX.1",
        built_as=denoisers.built_as("FluxTransformer2DModel"),
        encode=texts.encode_flux,
        text_of=texts.flux_states_of,
        spoken=texts.spoken_flux,
        time=lambda pipe, given: (
            pipe.current_timestep
        ),  # the denoiser is given a thousandth of it, rounded
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": replace(_PIXART, name="PixArt-Σ", spoken=_t5("tokenizer", 300)),
    "SanaPipeline": replace(
        _PIXART,
        name="Sana",
        built_as=denoisers.built_as("SanaTransformer2DModel"),
        spoken=texts.spoken_sana,
        tokens="last_subject",
        time=lambda pipe, given: given / pipe.transformer.config.timestep_scale,
        sets_padding=True,
    ),
}


def family_of(model: Any) -> Family:
    """The family of a pipeline, or of a bare denoiser.

    Raises `UnsupportedModel` with the supported pipelines for any other, `LocogenError` for a model whose current
    state (feature cache, IP-Adapter) an intervention cannot see through.
    """
    uncompiled = uncompiled_module(model)
    family = FAMILIES.get(type(uncompiled).__name__)
    if family is None:
        family = next((one for one in FAMILIES.values() if one.built_as(uncompiled)), None)
    if family is None:
        raise UnsupportedModel(
            f"{type(uncompiled).__name__} is not supported: locogen knows {', '.join(FAMILIES)} and their denoisers"
        )
    family.check(denoiser_of(model, family))
    return family


def denoiser_of(model: Any, family: Family | None = None) -> Any:
    """The denoiser of a pipeline, as it was before `torch.compile`; a bare denoiser is its own."""
    family = family or family_of(model)
    return uncompiled_module(getattr(model, family.denoiser, model))


def check_encoders(pipe: Any) -> None:
    """Raise `LocogenError` where the pipeline cannot read prompts, because a text encoder was left out of it."""
    optional = {"text_encoder_3"}  # SD 3 is made to run without its T5
    parts = sorted(name for name in pipe.components if name.startswith("text_encoder"))
    missing = [name for name in parts if getattr(pipe, name) is None and name not in optional]
    if missing:
        raise LocogenError(
            f"this {type(pipe).__name__} has no {' and no '.join(missing)}, so it cannot read prompts: load it with "
            "its text encoders, or encode the prompts with a pipeline that has them: intervene(pipe, plan, targets=…) "
            "takes the encoded targets, and the pipeline's own call takes prompt_embeds="
        )


def encode(pipe: Any, prompts: Sequence[str]) -> Text:
    """The text of prompts as the pipeline itself encodes it."""
    import torch

    check_encoders(pipe)
    with torch.no_grad(), taken_back(*text_encoders(pipe).values()):
        return family_of(pipe).encode(pipe, prompts, False)[0]


def encode_guided(pipe: Any, prompts: Sequence[str]) -> Encoded:
    """The text of prompts, and the pipeline's own negative for them; None where there is no such thing."""
    import torch

    check_encoders(pipe)
    with torch.no_grad(), taken_back(*text_encoders(pipe).values()):
        return family_of(pipe).encode(pipe, prompts, True)


def text_encoders(pipe: Any) -> dict[str, Any]:
    """The pipeline's text encoders by their attribute."""
    return {
        name: uncompiled_module(part)
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and part is not None
    }


def cut_words(pipe: Any, prompt: str) -> tuple[str, int]:
    """The end of the prompt that the tokenizer's limit cuts off, empty where all of it is heard; and the limit."""
    most = _encoders(pipe, prompt)[-1]
    if most.beside is not None and len(most.beside.unheard) > len(most.unheard):
        most = most.beside
    return most.written(most.unheard), most.limit


def unknown_words(pipe: Any, prompt: str) -> tuple[str, ...]:
    """The words of a prompt that a tokenizer of the pipeline does not know, each once.

    They become the token for unknown words, or a mark that ends the prompt: the model hears them all alike.
    """
    if not _has_unknown(pipe, prompt):
        return ()
    words: dict[str, None] = {}
    for word in unicodedata.normalize("NFC", prompt).split():
        if _has_unknown(pipe, word):
            parts = [part for part in re.findall(r"\w+|[^\w\s]", word) if _has_unknown(pipe, part)]
            words |= dict.fromkeys(parts or [word])
    return tuple(words or [prompt])


def _has_unknown(pipe: Any, words: str) -> bool:
    return any(_lacks(encoder) for encoder in _encoders(pipe, words))


def _lacks(encoder: Spoken) -> bool:
    """Whether a token of the prompt stands for something that the tokenizer does not know."""
    return not encoder.unknown.isdisjoint(encoder.whole)


def warn_unheard(pipe: Any, prompts: Iterable[str], *, stacklevel: int = 2) -> None:
    """Warn of each prompt that the model does not hear as it is written: it is cut, or has unknown words.

    Args:
        pipe: A pipeline of a known family.
        prompts: Any prompts; those that come twice are looked at once.
        stacklevel: As of `warnings.warn`, counted from the caller.
    """
    for prompt in dict.fromkeys(prompts):
        cut, limit = cut_words(pipe, prompt)
        if cut:
            message = f"{prompt!r} is longer than {limit} tokens: the model does not hear {cut!r}"
            warnings.warn(message, stacklevel=stacklevel + 1)
        unknown = unknown_words(pipe, prompt)
        if unknown:
            names = ", ".join(map(repr, unknown))
            message = f"the tokenizer does not know {names} in {prompt!r}: the model hears any other unknown word alike"
            warnings.warn(message, stacklevel=stacklevel + 1)


def subject_occurrences(
    pipe: Any, prompt: str, subject: str, *, encoder: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Where the subject's tokens stand in the encoded prompt, at each of its occurrences, punctuation left out.

    A subject is found in the prompt's text, as words of their own, and its tokens are those that the pipeline's
    tokenizer makes of them there: several for a token of textual inversion with several vectors.

    Args:
        pipe: A pipeline of a known family.
        prompt: What is encoded.
        subject: Words that the prompt holds, such as a concept's name.
        encoder: Which of several encoders that lie one after another along the tokens (SD 3: the CLIPs, then T5).

    Returns:
        For each occurrence, from left to right, its positions, counted from 0. One that the limit cuts is left out.

    Raises:
        LocogenError: Where the prompt does not hold the subject, is cut before its end, or the tokenizer knows none
            of its words.
    """
    family = family_of(pipe)
    whole = spoken(pipe, prompt)[encoder]
    text = family.spelled(prompt)
    words = family.spelled(subject)
    places = _token_spans(pipe, text, words, encoder) or _token_spans(
        pipe, text, without_marks(words), encoder
    )
    if not places:
        raise LocogenError(
            f"the prompt {prompt!r} does not hold the subject {subject!r} as words of its own: give subject="
        )
    uncut = [tokens for tokens in places if tokens.stop <= len(whole.ids)]
    if not uncut:
        raise LocogenError(
            f"the prompt {prompt!r} is cut after {whole.limit} tokens, before the end of {subject!r}: make it shorter"
        )
    if all(whole.ids[token] in whole.unknown for tokens in uncut for token in tokens):
        raise LocogenError(
            f"the tokenizer knows no word of {subject!r}, so the model cannot hear it: take words that it knows"
        )
    return tuple(whole.words(whole.start + token for token in tokens) for tokens in uncut)


def _token_spans(pipe: Any, text: str, words: str, encoder: int) -> list[range]:
    """Which of a prompt's tokens some words became, at each occurrence.

    The tokens of the text up to a letter are the first ones of the whole text's, where a token ends there. Where none
    does, as inside a token of textual inversion, the words do not stand for themselves.
    """
    spoken_by = family_of(pipe).spoken
    whole = spoken_by(pipe, text)[encoder].whole
    spans = []
    for start, end in occurrences(text, words):
        before = spoken_by(pipe, text[:start].rstrip())[encoder].whole
        through = spoken_by(pipe, text[:end])[encoder].whole
        first = shared_length(before, whole)
        if first < len(through) and through == whole[: len(through)]:
            spans.append(range(first, len(through)))
    return spans


def subject_positions(pipe: Any, prompt: str, subject: str, *, encoder: int = 0) -> tuple[int, ...]:
    """Where the subject's tokens stand in the encoded prompt, counted from 0, at its last occurrence.

    See `subject_occurrences`, which has all of them.
    """
    return subject_occurrences(pipe, prompt, subject, encoder=encoder)[-1]


def check_known(pipe: Any, concept: Concept) -> None:
    """Raise `LocogenError` for a concept that the model cannot hear, where a measurement would say nothing of it.

    That is one whose name has no word that any tokenizer knows, in a prompt that holds it, and one whose prompt and
    target become the same tokens.
    """
    for pair in concept.pairs:
        if occurrences(pair.prompt, concept.name) and _all_unknown(pipe, concept.name):
            raise LocogenError(
                f"the tokenizer knows no word of {concept.name!r}, so the model cannot hear it in {pair.prompt!r}: "
                "take words that it knows"
            )
        _check_apart(pipe, pair.prompt, pair.target)


def check_phrasings(pipe: Any, phrasings: Iterable[Phrasing]) -> None:
    """Raise `LocogenError` for a phrasing whose source and target become the same tokens: there is nothing to fit."""
    for phrasing in phrasings:
        _check_apart(pipe, phrasing.source, phrasing.target)


def _check_apart(pipe: Any, prompt: str, target: str) -> None:
    if _ids(pipe, prompt) == _ids(pipe, target):
        raise LocogenError(
            f"{prompt!r} and {target!r} become the same tokens, so the model cannot tell them apart: take words that "
            "its tokenizer knows, within its limit"
        )


def _ids(pipe: Any, prompt: str) -> list[tuple[int, ...]]:
    """What every tokenizer makes of the prompt, as far as it is heard."""
    encoders = _encoders(pipe, prompt)
    return [one.ids for encoder in encoders for one in (encoder, encoder.beside) if one is not None]


def _all_unknown(pipe: Any, words: str) -> bool:
    """Whether no tokenizer of the pipeline knows any of the words."""
    parts = re.findall(r"\w+", words) or [words]
    return all(_lacks(encoder) for part in parts for encoder in _encoders(pipe, part))


def _encoders(pipe: Any, prompt: str) -> tuple[Spoken, ...]:
    check_encoders(pipe)
    family = family_of(pipe)
    return family.spoken(pipe, family.spelled(prompt))


def spoken(pipe: Any, prompt: str) -> tuple[Spoken, ...]:
    """Where a prompt stands in its states, an entry for each encoder with positions of its own.

    Raises `LocogenError` where one position holds the states of two different tokens.
    """
    encoders = _encoders(pipe, prompt)
    for encoder in encoders:
        if encoder.beside is not None and encoder.pieces != encoder.beside.pieces:
            raise LocogenError(
                f"the two tokenizers split {prompt!r} into other tokens, so a position is not one word's: load the "
                "textual inversion into both, with tokenizer=pipe.tokenizer_2 and text_encoder=pipe.text_encoder_2 "
                "for the second"
            )
    return encoders


def end_position(pipe: Any, prompt: str, *, encoder: int = 0) -> int:
    """Where the encoded prompt ends: the position of its (first) end mark, or of its last word where there is none."""
    return spoken(pipe, prompt)[encoder].end
