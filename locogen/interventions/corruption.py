"""Corrupted prompts: noise on token embeddings, with states of the text encoder restored."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import announced
from locogen.interventions.encoding import on_text_encoders
from locogen.interventions.states import find_text_states
from locogen.models.families import encode, family_of, text_encoders
from locogen.models.hooks import Hook, after
from locogen.models.offload import weight_of
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from locogen.models.text import PromptEncoding

Restored = tuple[tuple[int, int], ...]  # pairs: a place in `find_text_states`, a token position


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the embeddings at token positions `at`, `scale` times their own spread.

    The spread is the standard deviation of all entries of the encoder's token embeddings, and a
    scale of three is that of Meng et al. 2022 (arXiv 2202.05262). `seed` is any text: another text,
    another noise.
    """

    seed: str
    at: tuple[int, ...]
    scale: float = 3.0

    def values(self, embeddings: Tensor) -> Tensor:
        """The noise for token embeddings, (words, width): (positions, width), on the CPU."""
        import torch

        # From the text and not from Python's own hash, which differs from process to process.
        seed = int.from_bytes(hashlib.sha256(self.seed.encode()).digest()[:7])
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn((len(self.at), embeddings.shape[1]), generator=generator)
        spread = embeddings.detach().float().std().cpu()
        return normal * self.scale * spread  # (positions, width)


def corrupted_states(
    pipe: Pipeline, prompt: str, noise: Noise, restored: Sequence[Restored] = ()
) -> PromptEncoding:
    """The corrupted prompt encoded, and again with each of `restored`: 1 + restored rows.

    A row whose noise is zero, or that has nothing left of it, is the clean prompt's within the
    rounding of a batch.
    """
    rows: list[Restored] = [(), *restored]
    with corrupting(pipe, noise, rows):
        return encode(pipe, [prompt] * (1 + len(rows)))[1:]  # the first is the clean one


@contextmanager
def corrupting(pipe: Pipeline, noise: Noise, rows: Sequence[Restored]) -> Iterator[None]:
    """Within the context, encode a clean prompt first, then corrupted ones with `rows[i]` restored.

    Args:
        pipe: The pipeline.
        noise: What is added to the token embeddings.
        rows: States that are taken from the clean row. Positions are those of the states that
            layers get.

    Raises:
        LocogenError: States are not there, or another number of prompts is encoded.
    """
    states = find_text_states(pipe)
    places = {place for row in rows for place, _ in row}
    if not places <= set(range(len(states))):
        raise LocogenError(
            f"some of the text states {list(rows)} do not exist: the encoder has states 0 to "
            f"{len(states) - 1}"
        )
    ahead = _tokens_ahead(pipe)
    hooks: list[Hook] = []
    for part, encoder in text_encoders(pipe).items():
        weight = weight_of(encoder.get_input_embeddings(), f"{part}'s embeddings")
        for module in _embeddings_with(encoder, weight, part):
            change = _noisy(noise, weight, 1 + len(rows), ahead)
            hooks.append(after(module, change, f"the token embedding of {part}"))

    # The clean prompt is encoded in the same batch, so that its states are at hand when a row needs
    # them.
    cells: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, restored in enumerate(rows, start=1):
        for place, token in restored:
            cells[place].append((row, token))
    for place in sorted(cells):
        state = states[place]
        cleaned = _cleaned(cells[place], ahead, family_of(pipe).is_tokens_first)
        hooks.append(after(state.module, cleaned, state.label))

    label = f"corrupting {noise} {list(rows)}"
    with on_text_encoders(pipe, text_encoders(pipe), hooks), announced(pipe, label):
        yield


def _tokens_ahead(pipe: Pipeline) -> Callable[[int], int]:
    """How many of so many tokens that an encoder reads come before those whose states layers get.

    Sana's reads an instruction before the prompt, Qwen-Image's the beginning of a chat.
    """
    family = family_of(pipe)
    if family.dropped_tokens is not None:
        dropped = family.dropped_tokens(pipe)
        return lambda length: dropped
    tokens = encode(pipe, [""]).states.shape[1]
    return lambda length: length - tokens


def _embeddings_with(encoder: Module, weight: Tensor, part: str) -> list[Any]:
    """The encoder's modules that look words up in this weight."""
    from torch.nn import Embedding

    # T5 has two, and looks up in the one that `get_input_embeddings` does not name. They are
    # compared by memory: sequential offload gives each module another tensor in place of the
    # shared weight.
    address = weight.data_ptr()
    return [
        module
        for module in encoder.modules()
        if isinstance(module, Embedding) and weight_of(module, part).data_ptr() == address
    ]


def _noisy(noise: Noise, weight: Tensor, count: int, ahead: Callable[[int], int]) -> Any:
    """A hook that adds noise in all rows but the first."""
    values = noise.values(weight)

    # After the embedding and before positions are added: a word is then corrupted, not its place.
    def hook(module: Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        if len(output) != count:
            raise LocogenError(
                f"{len(output)} prompts are encoded within corrupting, which has {count - 1} rows: "
                f"encode {count}, the first of them clean"
            )
        first = ahead(output.shape[1])
        changed = output.clone()  # (rows, tokens of the encoder, width)
        changed[1:, [first + at for at in noise.at]] += values.to(output)
        return changed

    return hook


def _cleaned(
    cells: Sequence[tuple[int, int]], ahead: Callable[[int], int], is_tokens_first: bool
) -> Any:
    """A hook that copies the first row's output into other rows; cells are (row, position)."""

    def hook(module: Module, args: Any, kwargs: Any, output: Any) -> Any:
        is_attention = isinstance(output, tuple)  # which puts out its weights as well
        changed = (output[0] if is_attention else output).clone()
        states = changed.transpose(0, 1) if is_tokens_first else changed  # (rows, tokens, width)
        first = ahead(states.shape[1])
        rows = [row for row, _ in cells]
        tokens = [first + position for _, position in cells]
        states[rows, tokens] = states[0, tokens]  # a view of what is handed on
        return (changed, *output[1:]) if is_attention else changed

    return hook
