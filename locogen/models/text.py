"""How each family reads a prompt: the states its layers get, and where words stand in them.

Encoding is always the pipeline's own `encode_prompt`. Small functions that `families.FAMILIES` puts
together.
"""

from __future__ import annotations

import copy
import inspect
import threading
import unicodedata
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.types import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

SD3_LIMIT = 256  # tokens that SD 3's T5 reads
SANA_LIMIT = (
    300  # tokens that Sana's layers get, with the start mark and the instruction's last one
)


@dataclass(frozen=True, eq=False)
class PromptEncoding:
    """Encoded prompts."""

    states: Tensor
    """(prompts, tokens, width)"""

    mask: Tensor | None = None
    """(prompts, tokens), 1 where attention reads a token; None for families that pass no mask"""

    pooled: Tensor | None = None
    """(prompts, width), the vector by which text enters outside of the layers, if any"""

    def __len__(self) -> int:
        return len(self.states)

    def arguments(self, prefix: str = "") -> dict[str, Tensor]:
        """The arguments by which a pipeline takes this encoding; a negative with its prefix."""
        by_name = {
            "prompt_embeds": self.states,
            "prompt_attention_mask": self.mask,
            "pooled_prompt_embeds": self.pooled,
        }
        return {prefix + name: value for name, value in by_name.items() if value is not None}

    def __getitem__(self, rows: slice) -> PromptEncoding:
        return PromptEncoding(
            self.states[rows],
            mask=None if self.mask is None else self.mask[rows],
            pooled=None if self.pooled is None else self.pooled[rows],
        )

    def expanded(self, count: int) -> PromptEncoding:
        """The one prompt, `count` times, without copies in memory."""
        return PromptEncoding(
            self.states.expand(count, -1, -1),  # (count, tokens, width)
            mask=None if self.mask is None else self.mask.expand(count, -1),  # (count, tokens)
            pooled=None if self.pooled is None else self.pooled.expand(count, -1),  # (count, width)
        )

    @staticmethod
    def stack(encodings: Iterable[PromptEncoding]) -> PromptEncoding:
        """Several encodings of one family, one after another."""
        import torch

        parts = list(encodings)
        masks = [part.mask for part in parts if part.mask is not None]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return PromptEncoding(
            torch.cat([part.states for part in parts]),  # (prompts, tokens, width)
            mask=torch.cat(masks) if masks else None,  # (prompts, tokens)
            pooled=torch.cat(pooled) if pooled else None,  # (prompts, width)
        )


@dataclass(frozen=True)
class TokenSpan:
    """Where the tokens of a prompt stand in the states of one encoder."""

    ids: tuple[int, ...]
    """the tokens that the encoder reads, without marks and padding"""

    start: int
    """position of the first of them"""

    end: int
    """position whose state has read all: the end mark, or the last word if there is none"""

    tokenizer: Any
    """one to look with, not the pipeline's own: see `tokenizer_to_look_with`"""

    cut_ids: tuple[int, ...] = ()
    """the tokens that the limit cuts off"""

    limit: int = 0
    """how many tokens the encoder reads, marks included"""

    paired: TokenSpan | None = None
    """the same prompt in an encoder whose states lie at the same positions: SD-XL's second one"""

    @property
    def pieces(self) -> list[str]:
        """All tokens of the prompt as the tokenizer writes them."""
        return self.tokenizer.convert_ids_to_tokens(list(self.all_ids))

    @property
    def all_ids(self) -> tuple[int, ...]:
        """All tokens of the prompt, those that the limit cuts off included."""
        return self.ids + self.cut_ids

    @property
    def last(self) -> int:
        """The position of the last word, punctuation left out; the end if there is no word."""
        inverted = self._inverted_ids()
        for place in reversed(range(len(self.ids))):
            if self._is_word(self.ids[place], inverted):
                return self.start + place
        return self.end

    def words(self, positions: Iterable[int]) -> tuple[int, ...]:
        """Those of some positions that are words, not punctuation or a space; all if none is."""
        positions = tuple(positions)
        inverted = self._inverted_ids()
        words = [at for at in positions if self._is_word(self.ids[at - self.start], inverted)]
        return tuple(words) or positions

    def _is_word(self, token: int, inverted: Container[int]) -> bool:
        if token in inverted:
            return True
        if token in self.unknown:
            return False
        return any(not _is_mark(letter) for letter in self.decode([token]))

    def decode(self, tokens: Iterable[int]) -> str:
        """What some tokens stand for, marks left out."""
        letters = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        # A copied CLIP tokenizer leaves the marks of its ends of words in the text.
        return letters.replace("</w>", " ").strip()

    def _inverted_ids(self) -> set[int]:
        """Tokens of textual inversion: some are written "*", which is not punctuation then."""
        return {*self.tokenizer.get_added_vocab().values()} - {*self.tokenizer.all_special_ids}

    @property
    def unknown(self) -> frozenset[int]:
        """Tokens for words that the tokenizer does not know, and marks that no word should be."""
        names = ("unk_token_id", "eos_token_id", "bos_token_id")  # not padding: SD 2 pads with "!"
        return frozenset(getattr(self.tokenizer, name) for name in names) - {None}


def _is_mark(letter: str) -> bool:
    """Whether a letter is punctuation or a symbol; the sign for a part of a letter is not."""
    return unicodedata.category(letter)[0] in "PS" and letter != "\N{REPLACEMENT CHARACTER}"


# --- the pipelines' own encoding -----------------------------------------------------------------

EncodedPrompts = tuple[
    PromptEncoding, PromptEncoding | None
]  # prompts, and the pipeline's negative


def states_of(returned: tuple[Any, ...]) -> PromptEncoding:
    """The prompts' encoding among what `encode_prompt` of Stable Diffusion, LCM and IF returns."""
    return PromptEncoding(returned[0])


def pooled_states_of(returned: tuple[Any, ...]) -> PromptEncoding:
    """The prompts' encoding among what `encode_prompt` of SD-XL and SD 3 returns."""
    return PromptEncoding(returned[0], pooled=returned[2])


def flux_states_of(returned: tuple[Any, ...]) -> PromptEncoding:
    """The prompts' encoding among what `encode_prompt` of FLUX returns."""
    return PromptEncoding(returned[0], pooled=returned[1])


def masked_states_of(returned: tuple[Any, ...]) -> PromptEncoding:
    """The prompts' encoding among what `encode_prompt` of PixArt and Sana returns."""
    return PromptEncoding(returned[0], mask=returned[1])


def encode_sd(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """CLIP's last hidden states after its final norm."""
    states, negative = pipe.encode_prompt(list(prompts), pipe._execution_device, 1, guided)
    return PromptEncoding(states), PromptEncoding(negative) if guided else None


def encode_lcm(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """As Stable Diffusion, but never with a negative: its guidance was distilled into a number."""
    return encode_sd(pipe, prompts, False)


def encode_sdxl(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """Two CLIPs side by side, before their last layers; the second one's pooled vector."""
    returned = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=guided)
    return _with_pooled(*returned, guided=guided)


def encode_sd3(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """Two CLIPs side by side, then T5 along the tokens; both pooled vectors side by side."""
    returned = pipe.encode_prompt(list(prompts), None, None, do_classifier_free_guidance=guided)
    return _with_pooled(*returned, guided=guided)


def _with_pooled(
    states: Tensor, negative: Any, pooled: Tensor, negative_pooled: Any, *, guided: bool
) -> EncodedPrompts:
    prompts = PromptEncoding(states, pooled=pooled)
    return prompts, PromptEncoding(negative, pooled=negative_pooled) if guided else None


def encode_flux(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """T5, and CLIP's pooled vector. FLUX is guided by a number, not by a negative prompt."""
    states, pooled, _ = pipe.encode_prompt(list(prompts), max_sequence_length=flux_limit(pipe))
    return PromptEncoding(states, pooled=pooled), None


def flux_limit(pipe: Pipeline) -> int:
    """How many tokens FLUX reads: dev, which takes a guidance scale, 512; schnell 256."""
    return 512 if pipe.transformer.config.guidance_embeds else 256


def encode_if(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """T5, which the U-Net projects, and pools by itself."""
    states, negative = pipe.encode_prompt(list(prompts), guided)
    return PromptEncoding(states), PromptEncoding(negative) if guided else None


def encode_masked(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """PixArt's T5 and Sana's Gemma, masked; Sana's with the instruction of its own call."""
    # `encode_prompt` of Sana has no default for the instruction that its `__call__` gives it.
    instruction = inspect.signature(type(pipe).__call__).parameters.get("complex_human_instruction")
    options = {} if instruction is None else {"complex_human_instruction": instruction.default}
    states, mask, negative, negative_mask = pipe.encode_prompt(list(prompts), guided, **options)
    return PromptEncoding(states, mask), PromptEncoding(negative, negative_mask) if guided else None


# --- tokens, looked at ---------------------------------------------------------------------------

_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class _Copied:
    """A private copy of a tokenizer, and what the tokenizer was when it was copied."""

    rules: tuple[Any, ...]
    tokenizer: Any


_COPIES: WeakKeyDictionary[Any, _Copied] = WeakKeyDictionary()


def tokenizer_to_look_with(tokenizer: Any) -> Any:
    """A tokenizer that makes the same tokens, whose use leaves the pipeline's own alone.

    Every look at tokens goes through this one. It follows tokens that are added or removed later.
    """
    # A fast tokenizer keeps padding and truncation as a state that each call sets. Set in one
    # thread while a pipeline encodes in another, it changes the text of that pipeline's picture.
    # The copy's state is set once, so that threads may share the copy. Slow ones keep no state.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer
    with _LOCK:
        rules = _rules(tokenizer, backend)
        copied = _COPIES.get(tokenizer)
        if copied is None or copied.rules != rules:
            copied = _Copied(rules, _without_state(tokenizer))
            _COPIES[tokenizer] = copied
        return copied.tokenizer


def _rules(tokenizer: Any, backend: Any) -> tuple[Any, ...]:
    """What a textual inversion, or a change of marks, makes another of."""
    # The backend itself, kept and not only its `id`: a new one could get the `id` of an old one.
    return (
        backend,
        len(tokenizer),
        tokenizer.get_added_vocab(),
        tokenizer.special_tokens_map,
        repr(backend.post_processor),
    )


def _without_state(tokenizer: Any) -> Any:
    private = copy.deepcopy(tokenizer)
    private.backend_tokenizer.no_truncation()
    private.backend_tokenizer.no_padding()
    return private


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """All tokens of a text with their marks, neither cut nor padded."""
    return _tokens(tokenizer_to_look_with(tokenizer), text)


def _tokens(look: Any, text: str) -> list[int]:
    return look(text, truncation=False, padding=False, verbose=False).input_ids


# --- where words stand ---------------------------------------------------------------------------


def token_span(
    pipe: Pipeline, tokenizer: Any, prompt: str, limit: int, offset: int = 0
) -> TokenSpan:
    """The prompt in an encoder with an end mark and maybe a start mark, cut at `limit` tokens."""
    look = tokenizer_to_look_with(tokenizer)
    ids = _tokens(look, _converted(pipe, look, prompt))
    marks = int(bool(ids) and ids[0] == look.bos_token_id)
    words = tuple(ids[marks:-1])
    count = limit - marks - 1  # the end mark has the last place
    start = offset + marks
    end = start + min(len(words), count)
    return TokenSpan(words[:count], start, end, look, words[count:], limit)


def _converted(pipe: Pipeline, tokenizer: Any, prompt: str) -> str:
    """The prompt with inverted tokens of several vectors written out, as the pipeline does."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return prompt if convert is None else convert(prompt, tokenizer)


def clip_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """In CLIP's states; SD-XL's two encoders lie side by side, at the same positions."""
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    spans = [
        token_span(pipe, tokenizer, prompt, tokenizer.model_max_length)
        for tokenizer in tokenizers
        if tokenizer is not None
    ]
    return (replace(spans[0], paired=spans[-1]),)


def sd3_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """In the states of the CLIPs, and behind them of T5, unless it was left out."""
    limit = pipe.tokenizer_max_length
    clips = token_span(pipe, pipe.tokenizer, prompt, limit)
    if pipe.text_encoder_3 is None:
        return (clips,)
    return clips, token_span(pipe, pipe.tokenizer_3, prompt, SD3_LIMIT, offset=limit)


def flux_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """In T5's states."""
    return (token_span(pipe, pipe.tokenizer_2, prompt, flux_limit(pipe)),)


def sana_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """Behind the start mark and the instruction's last token; there is no end mark."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    instruction = "\n".join(parameters["complex_human_instruction"].default)
    look = tokenizer_to_look_with(pipe.tokenizer)
    before = len(_tokens(look, instruction))
    words = tuple(_tokens(look, instruction + prompt)[before - 1 :])
    count = SANA_LIMIT - 1
    end = min(len(words), count)
    return (TokenSpan(words[:count], 1, end, look, words[count:], SANA_LIMIT),)
