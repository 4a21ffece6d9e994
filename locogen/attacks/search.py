"""Tokens that lower a loss: found by trying all of them, or by following gradients."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from locogen.attacks.loss import DenoisingLoss, Draws, Noised
from locogen.errors import LocogenError
from locogen.interventions.words import NewWord, states_of
from locogen.types import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

MOST_TRIED = 200_000  # candidates of an exhaustive search
ROWS_AT_ONCE = 128
CANDIDATES = 32  # tried a step, of those that the gradient points to


def vocabulary_of(pipe: Pipeline, words: Sequence[str] | None) -> list[int]:
    """The tokens that a search may use: all but marks and inverted ones, or those of some words.

    Raises `LocogenError` for words that are more than one token.
    """
    tokenizer = pipe.tokenizer
    if words is not None:
        ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
        split = [word for word, pieces in zip(words, ids, strict=True) if len(pieces) != 1]
        if split or not ids:
            raise LocogenError(
                f"vocabulary needs words of one token each, not {split[:3]}: leave them out"
            )
        return list(dict.fromkeys(pieces[0] for pieces in ids))
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    return [token for token in sorted(tokenizer.get_vocab().values()) if token not in added]


class Objective:
    """The loss of a few pictures under fixed noise, by the tokens in a word's place."""

    def __init__(
        self,
        pipe: Pipeline,
        token: str,
        loss: DenoisingLoss,
        captions: Sequence[str],
        *,
        tokens: int,
        batch: int,
        seed: int,
    ) -> None:
        import torch

        table = pipe.text_encoder.get_input_embeddings().weight.detach()  # (words, width)
        self.pipe = pipe
        self.table = table
        self.loss = loss
        self.noised = loss.fixed(seed, batch)
        rows: list[int] = self.noised.rows.tolist()
        self.captions = [captions[row] for row in rows]
        self.word = NewWord(pipe, token, torch.zeros(tokens, table.shape[1]).to(table))
        self.ids = self.word.ids(self.captions)

    def of(self, candidates: Tensor) -> Tensor:
        """The loss of each candidate, (candidates, tokens) -> (candidates,)."""
        import torch

        at_once = max(1, ROWS_AT_ONCE // len(self.captions))
        with torch.no_grad():
            return torch.cat([self._of(part) for part in candidates.split(at_once)])

    def _of(self, candidates: Tensor) -> Tensor:
        import torch

        count = len(candidates)
        ids = self.ids.input_ids.expand(count, -1, -1)  # (candidates, rows, places)
        offsets = ids - self.word.first
        flat = offsets.clamp(min=0).flatten(1)  # (candidates, rows · places)
        tokens_of_rows = candidates.gather(1, flat).view_as(ids)  # (candidates, rows, places)
        ids = torch.where(offsets >= 0, tokens_of_rows, ids).flatten(
            0, 1
        )  # (candidates · rows, places)
        tokens = dict(self.ids)
        tokens["input_ids"] = ids
        if "attention_mask" in tokens:
            tokens["attention_mask"] = self.ids.attention_mask.repeat(count, 1)
        states = states_of(self.pipe, type(self.ids)(tokens))
        rows = self.loss.per_row(_repeated(self.noised, count), states)
        return rows.unflatten(0, (count, -1)).mean(1).cpu()  # (candidates,)

    def gradient(self, ids: Tensor) -> Tensor:
        """How the loss changes with the vectors in the word's place, (tokens, width)."""
        import torch

        vectors = self.table[ids.to(self.table.device)].clone().requires_grad_()
        self.word.vectors = vectors
        with torch.enable_grad():
            states = self.word.states(self.captions)
            loss = self.loss.per_row(self.noised, states).mean()
            return torch.autograd.grad(loss, [vectors])[0]


def _repeated(noised: Noised, count: int) -> Noised:
    return Noised(
        noised.rows.repeat(count),
        noised.latents.repeat(count, 1, 1, 1),
        noised.times.repeat(count),
        noised.target.repeat(count, 1, 1, 1),
    )


def exhaustive_search(
    pipe: Pipeline,
    token: str,
    loss: DenoisingLoss,
    captions: Sequence[str],
    vocabulary: Sequence[int],
    *,
    tokens: int,
    batch: int,
    seed: int,
    progress: bool,
) -> list[int]:
    """The tokens of least loss, of all that there are.

    Raises:
        LocogenError: There are too many to try.
    """
    import torch
    from tqdm import tqdm

    count = len(vocabulary) ** tokens
    if count > MOST_TRIED:
        raise LocogenError(
            f"{tokens} of {len(vocabulary)} tokens are {count} to try, more than {MOST_TRIED}: "
            "give a smaller vocabulary=, or leave out exhaustive"
        )
    objective = Objective(pipe, token, loss, captions, tokens=tokens, batch=batch, seed=seed)
    best: tuple[float, list[int]] = (float("inf"), [])
    every = itertools.product(vocabulary, repeat=tokens)
    with tqdm(total=count, desc="trying tokens", disable=not progress) as bar:
        while part := list(itertools.islice(every, ROWS_AT_ONCE)):
            losses = objective.of(torch.tensor(part))  # (candidates,)
            least = int(losses.argmin())
            best = min(best, (float(losses[least]), list(part[least])))
            bar.update(len(part))
    return best[1]


def gradient_search(
    pipe: Pipeline,
    token: str,
    loss: DenoisingLoss,
    captions: Sequence[str],
    vocabulary: Sequence[int],
    *,
    tokens: int,
    steps: int,
    batch: int,
    seed: int,
    progress: bool,
) -> list[int]:
    """Tokens of low loss: each step tries those that the gradient of one place points to.

    Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043), from random tokens; a change is
    kept only where the true loss falls.
    """
    import torch
    from tqdm import tqdm

    objective = Objective(pipe, token, loss, captions, tokens=tokens, batch=batch, seed=seed)
    places = Draws(seed, 0).integers(len(vocabulary), tokens)
    words = torch.tensor(list(vocabulary))  # (vocabulary,)
    ids = words[places]  # (tokens,)
    least = float(objective.of(ids[None])[0])
    for step in tqdm(range(steps), desc="following gradients", disable=not progress):
        slope = objective.gradient(ids)  # (tokens, width)
        place = step % tokens
        vectors = objective.table[words.to(objective.table.device)]  # (vocabulary, width)
        promise = -(vectors @ slope[place]).cpu()  # (vocabulary,)
        top = words[promise.topk(min(CANDIDATES, len(words))).indices]
        candidates = ids.repeat(len(top), 1)  # (candidates, tokens)
        candidates[:, place] = top
        losses = objective.of(candidates)
        best = int(losses.argmin())
        if float(losses[best]) < least:
            least = float(losses[best])
            ids = candidates[best]
    return ids.tolist()
