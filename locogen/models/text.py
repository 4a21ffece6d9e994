"""How each family reads a prompt: the states its layers hear, what else it makes of the text, and where words stand.

Encoding is always the pipeline's own `encode_prompt`; nothing here knows what becomes of the text afterwards.
"""

from __future__ import annotations

import inspect
import unicodedata
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SD3_LIMIT = 256  # tokens that SD 3's T5 hears
SANA_LIMIT = (
    300  # tokens that Sana's layers hear, the start mark and the instruction's last one included
)


@dataclass(frozen=True, eq=False)
class Text:
    """Encoded prompts.

    `states`: (prompts, tokens, width); `mask`: (prompts, tokens), 1 where a token is heard, for families that pass one;
    `pooled`: (prompts, width), the vector by which text enters beside the layers, if any.
    """

    states: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def arguments(self, sign: str = "") -> dict[str, Any]:
        """The keyword arguments of a pipeline call that take this text; `sign="negative_"` for the negative one."""
        named = {
            "prompt_embeds": self.states,
            "prompt_attention_mask": self.mask,
            "pooled_prompt_embeds": self.pooled,
        }
        return {sign + name: value for name, value in named.items() if value is not None}

    def __getitem__(self, rows: slice) -> Text:
        return Text(*(None if part is None else part[rows] for part in self._parts))  # pyright: ignore[reportArgumentType]

    def expanded(self, count: int) -> Text:
        """The one prompt, `count` times."""
        return Text(
            *(None if part is None else part.expand(count, *part.shape[1:]) for part in self._parts)
        )  # pyright: ignore[reportArgumentType]

    @property
    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.states, self.mask, self.pooled

    @staticmethod
    def stack(texts: Iterable[Text]) -> Text:
        """Several texts, one after another."""
        import torch

        columns = zip(*(text._parts for text in texts), strict=True)
        return Text(*(None if column[0] is None else torch.cat(column) for column in columns))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class Spoken:
    """Where a prompt stands in the states of one encoder.

    `ids`: its tokens that are heard, without marks and padding; `start`: the position of the first one; `end`: the
    position whose state has read all of them (the end mark, or the last word where there is none); `unheard`: the
    tokens that a limit of `limit` tokens cuts off; `beside`: the same of an encoder whose states lie at the same
    positions (SD-XL's second one).
    """

    ids: tuple[int, ...]
    start: int
    end: int
    tokenizer: Any
    unheard: tuple[int, ...] = ()
    limit: int = 0
    beside: Spoken | None = None

    @property
    def pieces(self) -> list[str]:
        """All tokens of the prompt as the tokenizer writes them."""
        return self.tokenizer.convert_ids_to_tokens(list(self.whole))

    @property
    def whole(self) -> tuple[int, ...]:
        """All tokens of the prompt, heard or not."""
        return self.ids + self.unheard

    @property
    def last(self) -> int:
        """The position of the last word, punctuation after it left out; the end of a prompt without words."""
        added = self._added()
        for place in reversed(range(len(self.ids))):
            if self._is_word(self.ids[place], added):
                return self.start + place
        return self.end

    def words(self, positions: Iterable[int]) -> tuple[int, ...]:
        """Those of some positions that are neither punctuation nor a space; all of them where there is nothing else."""
        positions = tuple(positions)
        added = self._added()
        words = [at for at in positions if self._is_word(self.ids[at - self.start], added)]
        return tuple(words) or positions

    def _is_word(self, token: int, added: Container[int]) -> bool:
        if token in added:
            return True
        return token not in self.unknown and any(
            not _is_mark(letter) for letter in self.written([token])
        )

    def written(self, tokens: Iterable[int]) -> str:
        """What some tokens stand for, marks left out."""
        letters = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return letters.replace(
            "</w>", " "
        ).strip()  # a copied CLIP tokenizer leaves its ends of words

    def _added(self) -> set[int]:
        """Tokens of textual inversion: some take "*" for theirs, which is no punctuation then."""
        return {*self.tokenizer.get_added_vocab().values()} - {*self.tokenizer.all_special_ids}

    @property
    def unknown(self) -> frozenset[int]:
        """Tokens that stand for words which the tokenizer does not know, and marks that no word should be."""
        names = ("unk_token_id", "eos_token_id", "bos_token_id")  # not padding: SD 2 pads with "!"
        return frozenset(getattr(self.tokenizer, name) for name in names) - {None}


def _is_mark(letter: str) -> bool:
    """Whether a letter is punctuation or a symbol; the sign for a part of a letter is not."""
    return unicodedata.category(letter)[0] in "PS" and letter != "\N{REPLACEMENT CHARACTER}"


Encoded = tuple[Text, Text | None]  # the prompts, and the pipeline's own negative for them


def states_of(returned: tuple[Any, ...]) -> Text:
    """The prompts' text among what `encode_prompt` of Stable Diffusion, LCM and IF returns."""
    return Text(returned[0])


def pooled_states_of(returned: tuple[Any, ...]) -> Text:
    """The prompts' text among what `encode_prompt` of SD-XL and SD 3 returns."""
    return Text(returned[0], pooled=returned[2])


def flux_states_of(returned: tuple[Any, ...]) -> Text:
    """The prompts' text among what `encode_prompt` of FLUX returns."""
    return Text(returned[0], pooled=returned[1])


def masked_states_of(returned: tuple[Any, ...]) -> Text:
    """The prompts' text among what `encode_prompt` of PixArt and Sana returns."""
    return Text(returned[0], mask=returned[1])


def encode_sd(pipe: Any, prompts: Sequence[str], guided: bool) -> Encoded:
    """CLIP's last hidden states after its final norm."""
    states, negative = pipe.encode_prompt(list(prompts), pipe._execution_device, 1, guided)
    return Text(states), Text(negative) if guided else None


def encode_lcm(pipe: Any, prompts: Sequence[str], guided: bool) -> Encoded:
    """As Stable Diffusion, but never with a negative: its guidance was distilled into a number."""
    return encode_sd(pipe, prompts, False)


def encode_sdxl(pipe: Any, prompts: Sequence[str], guided: bool) -> Encoded:
    """Two CLIPs side by side, each one's last but one hidden states; the pooled vector is the second one's."""
    found = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=guided)
    return _with_pooled(*found, guided=guided)


def encode_sd3(pipe: Any, prompts: Sequence[str], guided: bool) -> Encoded:
    """Two CLIPs side by side, then T5 along the tokens; the pooled vectors of both CLIPs side by side."""
    found = pipe.encode_prompt(list(prompts), None, None, do_classifier_free_guidance=guided)
    return _with_pooled(*found, guided=guided)


def _with_pooled(
    states: Tensor, negative: Any, pooled: Tensor, negative_pooled: Any, *, guided: bool
) -> Encoded:
    return Text(states, pooled=pooled), Text(negative, pooled=negative_pooled) if guided else None


def encode_flux(pipe: Any, prompts: Sequence[str], guided: bool) -> Encoded:
    """T5, and CLIP's pooled vector. FLUX is guided by a number, not by a negative prompt."""
    states, pooled, _ = pipe.encode_prompt(list(prompts), max_sequence_length=flux_limit(pipe))
    return Text(states, pooled=pooled), None


def flux_limit(pipe: Any) -> int:
    """How many tokens FLUX hears: schnell, which is told no guidance, was made for half as many as dev."""
    return 512 if pipe.transformer.config.guidance_embeds else 256


def encode_if(pipe: Any, prompts: Sequence[str], guided: bool) -> Encoded:
    """T5, which the U-Net projects, and pools by itself."""
    states, negative = pipe.encode_prompt(list(prompts), guided)
    return Text(states), Text(negative) if guided else None


def encode_masked(pipe: Any, prompts: Sequence[str], guided: bool) -> Encoded:
    """PixArt's T5 and Sana's Gemma, with the mask of what is heard; Sana's with the instruction of its own call."""
    usual = inspect.signature(type(pipe).__call__).parameters.get("complex_human_instruction")
    told = {} if usual is None else {"complex_human_instruction": usual.default}
    states, mask, negative, negative_mask = pipe.encode_prompt(list(prompts), guided, **told)
    return Text(states, mask), Text(negative, negative_mask) if guided else None


def spoken_by(pipe: Any, tokenizer: Any, prompt: str, limit: int, offset: int = 0) -> Spoken:
    """The prompt in the states of an encoder with an end mark and maybe a start mark, cut at `limit` tokens."""
    ids = _tokens(tokenizer, _converted(pipe, tokenizer, prompt))
    marks = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
    words = tuple(ids[marks:-1])
    count = limit - marks - 1  # the end mark has the last place
    start = offset + marks
    end = start + min(len(words), count)
    return Spoken(words[:count], start, end, tokenizer, words[count:], limit)


def _converted(pipe: Any, tokenizer: Any, prompt: str) -> str:
    """The prompt with each token of textual inversion that has several vectors written out, as the pipeline does."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    return prompt if convert is None else convert(prompt, tokenizer)


def _tokens(tokenizer: Any, prompt: str) -> list[int]:
    return tokenizer(prompt, truncation=False, padding=False, verbose=False).input_ids


def spoken_clip(pipe: Any, prompt: str) -> tuple[Spoken, ...]:
    """In CLIP's states; SD-XL's two encoders share their vocabulary and lie side by side, at the same positions."""
    tokenizers = [getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")]
    encoders = [
        spoken_by(pipe, one, prompt, one.model_max_length) for one in tokenizers if one is not None
    ]
    return (replace(encoders[0], beside=encoders[-1]),)


def spoken_sd3(pipe: Any, prompt: str) -> tuple[Spoken, ...]:
    """In the states of the CLIPs, and behind them in those of T5, unless it was left out to save memory."""
    limit = pipe.tokenizer_max_length
    clips = spoken_by(pipe, pipe.tokenizer, prompt, limit)
    if pipe.text_encoder_3 is None:
        return (clips,)
    return clips, spoken_by(pipe, pipe.tokenizer_3, prompt, SD3_LIMIT, limit)


def spoken_flux(pipe: Any, prompt: str) -> tuple[Spoken, ...]:
    """In T5's states."""
    return (spoken_by(pipe, pipe.tokenizer_2, prompt, flux_limit(pipe)),)


def spoken_sana(pipe: Any, prompt: str) -> tuple[Spoken, ...]:
    """Behind the start mark and the last token of the instruction, which are all that is kept of it; no end mark."""
    usual = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
    instruction = "\n".join(usual)
    before = len(pipe.tokenizer.encode(instruction))
    words = tuple(_tokens(pipe.tokenizer, instruction + prompt)[before - 1 :])
    count = SANA_LIMIT - 1
    end = min(len(words), count)
    return (Spoken(words[:count], 1, end, pipe.tokenizer, words[count:], SANA_LIMIT),)
