"""How each family reads a prompt: the states its layers get, and where words stand in them.

Encoding is always the pipeline's own `encode_prompt`. Small functions that `families.FAMILIES` puts
together.
"""

from __future__ import annotations

import copy
import inspect
import math
import threading
import unicodedata
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.models.denoisers import Z_BLOCK
from locogen.types import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

SD3_LIMIT = 256  # tokens that SD 3's T5 reads
CHROMA_LIMIT = 512  # tokens that Chroma's T5 reads
Z_LIMIT = 512  # tokens that Z-Image's Qwen reads, its template's included
QWEN_LIMIT = 512  # tokens of text that a call of Qwen-Image's pipeline takes
KREA2_LIMIT = 512  # states of text that Krea 2's denoiser gets, its template's end included
QWEN_BLOCK = 64  # to a multiple of which prompts are padded, so that their batches are alike
KOLORS_LIMIT = 256  # tokens that Kolors' ChatGLM reads, its two marks included
WAN_LIMIT = 512  # tokens that Wan's T5 reads
LUMINA_LIMIT = 256  # tokens that Lumina 2's Gemma reads, the system's prompt included
HIDREAM_LIMIT = 128  # tokens that HiDream's T5 and Llama read
SANA_LIMIT = (
    300  # tokens that Sana's layers get, with the start mark and the instruction's last one
)


@dataclass(frozen=True, eq=False)
class PromptEncoding:
    """Encoded prompts."""

    states: Tensor
    """(prompts, tokens, width); of Krea 2 (prompts, tokens, encoder layers, width)"""

    mask: Tensor | None = None
    """(prompts, tokens), 1 where attention reads a token; None for families that pass no mask"""

    pooled: Tensor | None = None
    """(prompts, width), the vector by which text enters outside of the layers, if any"""

    mask_argument: str = "prompt_attention_mask"
    """name of the pipeline's argument for the mask"""

    by_layer: Tensor | None = None
    """(prompts, layers, tokens, width): all layers of a second encoder; a block hears one"""

    as_list: bool = False
    """whether the pipeline takes a list of one tensor a prompt, without padding and mask"""

    def __len__(self) -> int:
        return len(self.states)

    def rows(self) -> list[Tensor]:
        """Each prompt by itself without its padding, (tokens, width) each."""
        if self.mask is None:
            return list(self.states)
        return [states[mask.bool()] for states, mask in zip(self.states, self.mask, strict=True)]

    def _arguments_as_list(self, prefix: str) -> dict[str, Any]:
        by_name: dict[str, Any] = {prefix + "prompt_embeds": self.rows()}
        # Z-Image's pipeline encodes nothing, and says nothing, unless it is given prompts as well.
        return by_name if prefix else by_name | {"prompt": [""] * len(self)}

    def _arguments_by_layer(self, prefix: str, by_layer: Tensor) -> dict[str, Any]:
        return {
            prefix + "prompt_embeds_t5": self.states,
            prefix + "prompt_embeds_llama3": by_layer.transpose(0, 1),  # (layers, prompts, ...)
            prefix + "pooled_prompt_embeds": self.pooled,
        }

    @property
    def places(self) -> int:
        """How many tokens of text a layer reads."""
        # HiDream's read the first encoder's states, and of the second the last layer and their own.
        again = 0 if self.by_layer is None else 2 * self.by_layer.shape[2]
        return self.states.shape[1] + again

    def arguments(self, prefix: str = "") -> dict[str, Any]:
        """The arguments by which a pipeline takes this encoding; a negative with its prefix."""
        if self.as_list:
            return self._arguments_as_list(prefix)
        if self.by_layer is not None:
            return self._arguments_by_layer(prefix, self.by_layer)
        by_name = {
            "prompt_embeds": self.states,
            self.mask_argument: self.mask,
            "pooled_prompt_embeds": self.pooled,
        }
        return {prefix + name: value for name, value in by_name.items() if value is not None}

    def __getitem__(self, rows: slice) -> PromptEncoding:
        return replace(
            self,
            states=self.states[rows],
            mask=None if self.mask is None else self.mask[rows],
            pooled=None if self.pooled is None else self.pooled[rows],
            by_layer=None if self.by_layer is None else self.by_layer[rows],
        )

    def expanded(self, count: int) -> PromptEncoding:
        """The one prompt, `count` times, without copies in memory."""
        return replace(
            self,
            states=self.states.expand(count, *self.states.shape[1:]),  # (count, tokens, ...)
            mask=None if self.mask is None else self.mask.expand(count, -1),  # (count, tokens)
            pooled=None if self.pooled is None else self.pooled.expand(count, -1),  # (count, width)
            by_layer=None if self.by_layer is None else self.by_layer.expand(count, -1, -1, -1),
        )

    def padded(self, tokens: int) -> PromptEncoding:
        """The same text with zeros behind it, which the mask leaves out, up to some tokens."""
        from torch.nn.functional import pad

        missing = tokens - self.states.shape[1]
        if not missing:
            return self
        assert self.mask is not None  # all prompts of families without one have one length
        behind_axes = [0, 0] * (self.states.ndim - 2)
        states = pad(self.states, (*behind_axes, 0, missing))  # (prompts, tokens, ...)
        return replace(self, states=states, mask=pad(self.mask, (0, missing)))  # (prompts, tokens)

    @staticmethod
    def stack(encodings: Iterable[PromptEncoding]) -> PromptEncoding:
        """Several encodings of one family, one after another."""
        import torch

        parts = list(encodings)
        longest = max(part.states.shape[1] for part in parts)
        parts = [part.padded(longest) for part in parts]
        return replace(
            parts[0],
            states=torch.cat([part.states for part in parts]),  # (prompts, tokens, ...)
            mask=_one_after_another(part.mask for part in parts),  # (prompts, tokens)
            pooled=_one_after_another(part.pooled for part in parts),  # (prompts, width)
            # (prompts, layers, tokens, width)
            by_layer=_one_after_another(part.by_layer for part in parts),
        )


def _one_after_another(tensors: Iterable[Tensor | None]) -> Tensor | None:
    import torch

    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


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


def encode_flux2(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """Three layers of Mistral side by side. FLUX.2 dev is guided by a number."""
    length = pipe.tokenizer_max_length
    return states_of(pipe.encode_prompt(list(prompts), max_sequence_length=length)), None


def flux2_tapped(pipe: Pipeline) -> tuple[int, ...]:
    """Which layers of its encoder FLUX.2 takes, as its call says that nobody told otherwise."""
    return inspect.signature(type(pipe).encode_prompt).parameters["text_encoder_out_layers"].default


def encode_klein(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """Three layers of Qwen side by side; guided by a call for "" unless it was distilled."""
    states, _ = encode_flux2(pipe, prompts, guided)
    if not guided or pipe.config.is_distilled:
        return states, None
    return states, encode_flux2(pipe, [""] * len(prompts), guided)[0]


def chroma_states_of(returned: tuple[Any, ...]) -> PromptEncoding:
    """The prompts' encoding among what `encode_prompt` of Chroma returns."""
    return PromptEncoding(returned[0], mask=returned[2])


def encode_chroma(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """T5 with a mask that keeps one token of padding; guided by a call for the negative."""
    returned = pipe.encode_prompt(
        list(prompts), do_classifier_free_guidance=guided, max_sequence_length=CHROMA_LIMIT
    )
    negative = PromptEncoding(returned[3], mask=returned[5]) if guided else None
    return chroma_states_of(returned), negative


def z_image_states_of(returned: tuple[Any, ...]) -> PromptEncoding:
    """The prompts' encoding among what `encode_prompt` of Z-Image returns."""
    return _from_list(returned[0])


def encode_z_image(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """Qwen's states before its last layer, the chat's marks included."""
    positive, negative = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=guided)
    return _from_list(positive), _from_list(negative) if guided else None


def _from_list(rows: Sequence[Tensor]) -> PromptEncoding:
    """Prompts of any lengths, padded to whole blocks."""
    from torch.nn.utils.rnn import pad_sequence

    states = pad_sequence(list(rows), batch_first=True)  # (prompts, tokens, width)
    ones = [row.new_ones(len(row)).long() for row in rows]
    text = PromptEncoding(states, pad_sequence(ones, batch_first=True), as_list=True)
    return text.padded(math.ceil(states.shape[1] / Z_BLOCK) * Z_BLOCK)


def encode_wan(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """T5 with zeros behind the prompt, which attention reads too."""
    states, negative = pipe.encode_prompt(
        list(prompts), do_classifier_free_guidance=guided, max_sequence_length=WAN_LIMIT
    )
    return PromptEncoding(states), PromptEncoding(negative) if guided else None


def cleaned_by_wan(prompt: str) -> str:
    """A prompt as Wan's pipeline cleans it: signs written out, single spaces."""
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    return prompt_clean(prompt)


def qwen_states_of(returned: tuple[Any, ...]) -> PromptEncoding:
    """The prompts' encoding among what `encode_prompt` of Qwen-Image returns."""
    states, mask = returned  # (prompts, tokens, width), (prompts, tokens)
    if mask is None:  # all are of one length
        mask = states.new_ones(states.shape[:2]).long()
    return PromptEncoding(states, mask, mask_argument="prompt_embeds_mask")


def encode_qwen(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """Qwen's last states behind the template's beginning; it is guided by a call for " "."""

    def encoded(texts: Sequence[str]) -> PromptEncoding:
        returned = pipe.encode_prompt(list(texts), max_sequence_length=QWEN_LIMIT)
        text = qwen_states_of(returned)
        blocks = math.ceil(text.states.shape[1] / QWEN_BLOCK)
        return text.padded(blocks * QWEN_BLOCK)

    return encoded(prompts), encoded([" "] * len(prompts)) if guided else None


def krea2_states_of(returned: tuple[Any, ...]) -> PromptEncoding:
    """The prompts' encoding among what `encode_prompt` of Krea 2 returns."""
    return PromptEncoding(returned[0], returned[1], mask_argument="prompt_embeds_mask")


def encode_krea2(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """Several layers of Qwen for each token, of which the denoiser makes one; guided by ""."""

    def encoded(texts: Sequence[str]) -> PromptEncoding:
        return krea2_states_of(pipe.encode_prompt(list(texts), max_sequence_length=KREA2_LIMIT))

    return encoded(prompts), encoded([""] * len(prompts)) if guided else None


def hidream_states_of(returned: tuple[Any, ...]) -> PromptEncoding:
    """The prompts' encoding among what `encode_prompt` of HiDream returns."""
    return _with_llama(returned[0], returned[2], returned[4])


def encode_hidream(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    """T5, all layers of Llama, and the pooled vectors of two CLIPs side by side."""
    returned = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=guided)
    negative = _with_llama(returned[1], returned[3], returned[5]) if guided else None
    return hidream_states_of(returned), negative


def _with_llama(states: Tensor, llama: Tensor, pooled: Tensor) -> PromptEncoding:
    """Of Llama's states (layers, prompts, tokens, width)."""
    return PromptEncoding(states, pooled=pooled, by_layer=llama.transpose(0, 1))


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


def kolors_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """In ChatGLM's states: padding first, then its two marks, then the prompt up to the end."""
    look = tokenizer_to_look_with(pipe.tokenizer)
    words = tuple(_tokens(look, prompt)[2:])
    count = KOLORS_LIMIT - 2
    ids = words[:count]
    start = KOLORS_LIMIT - len(ids)
    return (TokenSpan(ids, start, KOLORS_LIMIT - 1, look, words[count:], KOLORS_LIMIT),)


def qwen_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """In Qwen's states, whose first ones are those of the template's beginning, left out."""
    before, after = pipe.prompt_template_encode.split("{}")
    dropped = pipe.prompt_template_encode_start_idx
    return (_within_template(pipe.tokenizer, before, prompt, after, QWEN_LIMIT, dropped),)


def flux2_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """In Mistral's states, behind the system's message."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": pipe.system_message}]},
        {"role": "user", "content": [{"type": "text", "text": _PLACE}]},
    ]
    template = pipe.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=False
    )
    tokenizer = getattr(pipe.tokenizer, "tokenizer", pipe.tokenizer)  # a processor holds it
    before, after = template.split(_PLACE)
    return (_within_template(tokenizer, before, prompt, after, pipe.tokenizer_max_length),)


def klein_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """In Qwen's states, behind the template's beginning."""
    template = _user_template(pipe.tokenizer, enable_thinking=False)
    before, after = template.split(_PLACE)
    return (_within_template(pipe.tokenizer, before, prompt, after, pipe.tokenizer_max_length),)


def krea2_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """In Qwen's states, from the first one on; padding comes behind, then the template's end."""
    before = pipe.prompt_template_encode_prefix
    dropped = pipe.prompt_template_encode_start_idx
    count = KREA2_LIMIT - pipe.prompt_template_encode_num_suffix_tokens
    span = _within_template(pipe.tokenizer, before, prompt, "", count, dropped)
    # The first token of the template's end has read all of the prompt, wherever the prompt ends.
    return (replace(span, end=count, limit=KREA2_LIMIT),)


def z_image_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """In Qwen's states, behind the template's beginning; padding comes later and behind."""
    before, after = _user_template(pipe.tokenizer, enable_thinking=True).split(_PLACE)
    span = _within_template(pipe.tokenizer, before, prompt, after, Z_LIMIT)
    return (span,)


def z_image_template(pipe: Pipeline, prompt: str) -> str:
    """A prompt in the chat template of Z-Image."""
    return _user_template(pipe.tokenizer, enable_thinking=True).replace(_PLACE, prompt)


def z_image_length(pipe: Pipeline, prompt: str) -> int:
    """How many tokens Z-Image makes of a prompt with its template, in whole blocks."""
    tokens = token_ids(pipe.tokenizer, z_image_template(pipe, prompt))
    return math.ceil(min(len(tokens), Z_LIMIT) / Z_BLOCK) * Z_BLOCK


def lumina_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """In Gemma's states, behind the start mark and the system's prompt; there is no end mark."""
    look = tokenizer_to_look_with(pipe.tokenizer)
    beginning = _lumina_text(pipe, "").rstrip()  # the space belongs to the prompt's first word
    first = len(_tokens(look, beginning))
    words = tuple(_tokens(look, _lumina_text(pipe, prompt))[first:])
    count = LUMINA_LIMIT - first
    end = first + min(len(words), count) - 1
    return (TokenSpan(words[:count], first, end, look, words[count:], LUMINA_LIMIT),)


def lumina_length(pipe: Pipeline, prompt: str) -> int:
    """How many tokens Lumina 2 makes of a prompt behind the system's."""
    return min(len(token_ids(pipe.tokenizer, _lumina_text(pipe, prompt))), LUMINA_LIMIT)


def _lumina_text(pipe: Pipeline, prompt: str) -> str:
    """What Lumina 2's pipeline has its tokenizer read."""
    return f"{pipe.system_prompt} <Prompt Start> {prompt}"


def hidream_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """In T5's states, then in those of Llama's last layer, then in those of a block's own one."""
    limits = [min(HIDREAM_LIMIT, pipe.tokenizer_3.model_max_length)]
    limits.append(min(HIDREAM_LIMIT, pipe.tokenizer_4.model_max_length))
    spans = [token_span(pipe, pipe.tokenizer_3, prompt, limits[0])]
    look = tokenizer_to_look_with(pipe.tokenizer_4)
    ids = _tokens(look, prompt)
    marks = int(bool(ids) and ids[0] == look.bos_token_id)
    words = tuple(ids[marks:])  # there is no end mark
    is_left = pipe.tokenizer_4.padding_side == "left"
    padding = max(limits[1] - len(ids), 0) if is_left else 0
    count = limits[1] - marks
    for offset in (limits[0], sum(limits)):
        start = offset + padding + marks
        end = max(start + min(len(words), count) - 1, offset)
        spans.append(TokenSpan(words[:count], start, end, look, words[count:], limits[1]))
    return tuple(spans)


_PLACE = "the prompt's place"


def _user_template(tokenizer: Any, **options: Any) -> str:
    """A chat in which `_PLACE` is all that the user says, up to where the model would answer."""
    messages = [{"role": "user", "content": _PLACE}]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **options
    )


def _within_template(
    tokenizer: Any, before: str, prompt: str, after: str, limit: int, dropped: int = 0
) -> TokenSpan:
    """A prompt between the two parts of a chat template, read from left to right.

    Padding may stand on either side of it, as the tokenizer says.

    Args:
        tokenizer: The pipeline's.
        before: The template up to the prompt.
        prompt: The prompt.
        after: The template behind the prompt. Its first token has read all of the prompt.
        limit: How many states the denoiser gets.
        dropped: How many states, the first ones, it does not get.
    """
    look = tokenizer_to_look_with(tokenizer)

    def tokens_of(text: str) -> list[int]:
        # The template writes its own marks out.
        options = {"add_special_tokens": False, "truncation": False, "padding": False}
        return look(text, verbose=False, **options).input_ids

    first = len(tokens_of(before))
    last = len(tokens_of(after))
    tokens = tokens_of(before + prompt + after)
    words = tuple(tokens[first : len(tokens) - last])
    padding = max(limit - len(tokens), 0) if tokenizer.padding_side == "left" else 0
    start = padding + first - dropped
    count = limit - start
    end = min(start + len(words), limit - 1)
    return TokenSpan(words[:count], start, end, look, words[count:], limit)
