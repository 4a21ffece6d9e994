"""Prompts heard wrongly: noise on the embeddings of some tokens, with states of the text encoder restored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import announced
from locogen.interventions.encoding import on_text_encoders
from locogen.interventions.states import find_text_states
from locogen.models.families import encode, text_encoders
from locogen.models.hooks import Hook, after
from locogen.models.offload import weight_of

if TYPE_CHECKING:
    from torch import Tensor

    from locogen.models.text import Text

Restored = tuple[tuple[int, int], ...]  # (which of find_text_states, token position), ...


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on the embeddings at token positions `at`: `scale` times the embeddings' own spread.

    The spread is the standard deviation of all entries of the encoder's token embeddings; three times that is what
    Meng et al. 2022 (arXiv 2202.05262) take. `seed` is any text: other texts, other noise.
    """

    seed: str
    at: tuple[int, ...]
    scale: float = 3.0

    def drawn(self, embeddings: Tensor) -> Tensor:
        """The noise for one encoder, whose token embeddings are (words, width): (positions, width), on the CPU."""
        import torch

        seed = int.from_bytes(hashlib.sha256(self.seed.encode()).digest()[:7])
        drawn = torch.randn(
            (len(self.at), embeddings.shape[1]), generator=torch.Generator().manual_seed(seed)
        )
        return drawn * self.scale * embeddings.detach().float().std().cpu()


def corrupted_states(
    pipe: Any, prompt: str, noise: Noise, restored: Sequence[Restored] = ()
) -> Text:
    """The text of the corrupted prompt, and again with each of `restored`: 1 + restored rows.

    The clean prompt is encoded in the same batch, and states are taken from its row: so a row whose noise is zero, or
    that has nothing left of it, is the clean prompt's within the rounding of a batch.
    """
    rows: list[Restored] = [(), *restored]
    with corrupting(pipe, noise, rows):
        return encode(pipe, [prompt] * (1 + len(rows)))[1:]


@contextmanager
def corrupting(pipe: Any, noise: Noise, rows: Sequence[Restored]) -> Iterator[None]:
    """Within the context, the encoder's first row is heard as it is, the others with noise and `rows[i]` restored.

    Positions are those of the states that layers hear: Sana's encoder reads an instruction before them.
    Raises `LocogenError` for states that are not there, and when another number of prompts is encoded.
    """
    from torch.nn import Embedding

    states = find_text_states(pipe)
    if any(not 0 <= place < len(states) for row in rows for place, _ in row):
        raise LocogenError(
            f"text states {list(rows)} are not all there: the encoder has 0 to {len(states) - 1}"
        )
    tokens = encode(pipe, [""]).states.shape[1]
    hooks: list[Hook] = []
    for part, encoder in text_encoders(pipe).items():
        weight = weight_of(encoder.get_input_embeddings(), f"{part}'s embeddings")
        for (
            module
        ) in encoder.modules():  # T5 has it twice, and looks up in the one that it does not name
            # Compared by memory: sequential offload gives each module a stand-in of its own.
            if (
                isinstance(module, Embedding)
                and weight_of(module, part).data_ptr() == weight.data_ptr()
            ):
                change = _noisy(noise, weight, 1 + len(rows), tokens)
                hooks.append(after(module, change, f"the token embedding of {part}"))
    for place, state in enumerate(states):
        cells = [(i, token) for i, row in enumerate(rows, 1) for at, token in row if at == place]
        if cells:
            label = f"{state.part} {state.index} ({state.name})"
            hooks.append(after(state.module, _cleaned(cells, tokens), label))
    label = f"corrupting {noise} {list(rows)}"
    with on_text_encoders(pipe, text_encoders(pipe), hooks), announced(pipe, label):
        yield


def _noisy(noise: Noise, weight: Tensor, count: int, tokens: int) -> Any:
    drawn = noise.drawn(weight)

    def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        if len(output) != count:
            raise LocogenError(
                f"{len(output)} prompts are encoded within corrupting, which was given {count - 1} rows"
            )
        ahead = output.shape[1] - tokens
        changed = output.clone()
        changed[1:, [ahead + at for at in noise.at]] += drawn.to(output)
        return changed

    return hook


def _cleaned(cells: Sequence[tuple[int, int]], count: int) -> Any:
    """A hook that copies what the first row puts out at some tokens into other rows."""

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        states = (
            output[0] if isinstance(output, tuple) else output
        )  # attention puts out its weights as well
        rows, places = (list(side) for side in zip(*cells, strict=True))
        tokens = [states.shape[1] - count + place for place in places]
        changed = states.clone()
        changed[rows, tokens] = states[0, tokens]
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
