"""New words for a model: contexts in which a prompt may name vectors that an attack found.

Nothing of the model changes: its tokenizer is exchanged for a copy that knows the words, and hooks
on the table of embeddings put the vectors in their place.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import announced
from locogen.interventions.encoding import on_text_encoders
from locogen.models.families import text_encoders
from locogen.models.hooks import Hook, after, before, hooked
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor


def token_for(pipe: Pipeline, name: str) -> str:
    """A word for a concept that the tokenizer does not have yet, such as `<van-gogh>`."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    token = f"<{plain}>"
    while token in pipe.tokenizer.get_vocab():
        token = f"<{token[1:-1]}+>"
    return token


def digest(tensor: Tensor) -> str:
    """A hash of numbers, for labels that keys of pictures are made of."""
    values = tensor.detach().float().cpu().contiguous().numpy()
    return hashlib.sha256(values.tobytes()).hexdigest()[:16]


@dataclass(eq=False)
class NewWord:
    """One word of one or more vectors, as hooks on a table of embeddings.

    Attributes:
        pipe: The pipeline.
        token: The word; several vectors are `<x>`, `<x>_1` …, as diffusers writes them.
        vectors: (vectors, width).
        tokenizer: A copy of the pipeline's that knows the word.
    """

    pipe: Pipeline
    token: str
    vectors: Tensor
    tokenizer: Any = None
    _offsets: Any = None  # (prompts, tokens), of the call that is running

    def __post_init__(self) -> None:
        self.tokenizer = copy.deepcopy(self.pipe.tokenizer)
        numbered = [f"{self.token}_{i}" for i in range(1, len(self.vectors))]
        names = [self.token, *numbered]
        if self.tokenizer.add_tokens(names) != len(names):
            raise LocogenError(
                f"the tokenizer knows {self.token!r} already: unload that textual inversion first"
            )
        self.first = self.tokenizer.convert_tokens_to_ids(self.token)

    def ids(self, prompts: Sequence[str]) -> Any:
        """The tokenizer's answer for prompts, padded as the pipeline pads them."""
        converted = self.pipe.maybe_convert_prompt(list(prompts), self.tokenizer)
        return self.tokenizer(
            converted,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )

    def hooks(self) -> list[Hook]:
        """What has the table of embeddings answer with the vectors."""
        table = self.pipe.text_encoder.get_input_embeddings()
        label = "the token embedding"
        return [before(table, self._hide, label), after(table, self._put, label)]

    def _hide(self, module: Module, args: Any, kwargs: Any) -> Any:
        ids = args[0]  # (prompts, tokens)
        self._offsets = ids - self.first
        # Any word that the table has: its vector is replaced below. Other new words are left to
        # their own hooks.
        return (ids.masked_fill(self._is_own, 0), *args[1:]), kwargs

    def _put(self, module: Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        import torch

        is_own = self._is_own  # (prompts, tokens)
        places = self._offsets.masked_fill(~is_own, 0)
        vectors = self.vectors.to(output)[places]  # (prompts, tokens, width)
        return torch.where(is_own[..., None], vectors, output)

    @property
    def _is_own(self) -> Any:
        """Which tokens of the call that is running are the word's, (prompts, tokens)."""
        return (self._offsets >= 0) & (self._offsets < len(self.vectors))

    def states(self, prompts: Sequence[str]) -> Tensor:
        """Text states of prompts, through which gradients flow to the vectors.

        (prompts, tokens, width)
        """
        with hooked(self.hooks()):
            return states_of(self.pipe, self.ids(prompts))


def states_of(pipe: Pipeline, tokens: Any) -> Tensor:
    """Text states of tokenized prompts as the pipeline computes them, (prompts, tokens, width)."""
    encoder = pipe.text_encoder
    mask = None
    if getattr(encoder.config, "use_attention_mask", False):
        mask = tokens.attention_mask.to(encoder.device)  # (prompts, tokens)
    return encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0]


@contextmanager
def speaking(pipe: Pipeline, token: str, vectors: Tensor) -> Iterator[None]:
    """Within the context, prompts may use a word whose embeddings are these vectors.

    The same pictures come of `pipe.load_textual_inversion` with a file of the vectors.

    Args:
        pipe: The pipeline.
        token: The word, which the tokenizer does not have.
        vectors: (vectors, width).
    """
    word = NewWord(pipe, token, vectors)
    tokenizer = pipe.tokenizer
    label = f"the word {token} of vectors {digest(vectors)}"
    with on_text_encoders(pipe, text_encoders(pipe), word.hooks()), announced(pipe, label):
        try:
            pipe.tokenizer = word.tokenizer
            yield
        finally:
            pipe.tokenizer = tokenizer


def check_speakable(pipe: Pipeline, words: Mapping[str, Tensor]) -> None:
    """Raise `LocogenError` for a pipeline that cannot read these words: another encoder also reads.

    Args:
        pipe: The pipeline.
        words: Vectors by word, (vectors, width).
    """
    encoders = text_encoders(pipe)
    if len(encoders) != 1:
        raise LocogenError(
            f"the edit has trained words, and {', '.join(encoders)} of this pipeline would each "
            "need vectors of their own: fit the edit without them, then harden it on this model"
        )
    [encoder] = encoders.values()
    width = encoder.get_input_embeddings().weight.shape[1]
    others = sorted({vectors.shape[1] for vectors in words.values()} - {width})
    if others:
        raise LocogenError(
            f"the edit's trained words have {others[0]} numbers a vector, this text encoder reads "
            f"{width}: fit the edit without them, then harden it on this model"
        )


@contextmanager
def speaking_all(pipe: Pipeline, words: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context, prompts may use all of these words: see `speaking`."""
    with ExitStack() as stack:
        for token, vectors in words.items():
            stack.enter_context(speaking(pipe, token, vectors))
        yield
