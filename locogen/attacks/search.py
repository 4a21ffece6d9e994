"""Tokens that lower a loss: found by trying all of them, or by following gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locogen.attacks.loss import DenoisingLoss, Draws, Noised
from locogen.attacks.training import read_state, write_state
from locogen.console import open_bar
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
        return _tokens_of(tokenizer, words)
    added = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    return [token for token in sorted(tokenizer.get_vocab().values()) if token not in added]


def _tokens_of(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The tokens of words that are one each."""
    if not words or not all(isinstance(word, str) for word in words):
        raise LocogenError(f"vocabulary is {list(words)}: give words of one token each")
    pieces = {word: tokenizer(word, add_special_tokens=False).input_ids for word in words}
    split = [word for word in words if len(pieces[word]) != 1]
    if split:
        raise LocogenError(
            f"vocabulary needs words of one token each, not {split[:3]}: leave them out"
        )
    return list(dict.fromkeys(ids[0] for ids in pieces.values()))


def count_of(vocabulary: Sequence[int], tokens: int) -> int:
    """How many candidates an exhaustive search tries; raises `LocogenError` for too many."""
    count = len(vocabulary) ** tokens
    if count > MOST_TRIED:
        raise LocogenError(
            f"{tokens} of {len(vocabulary)} tokens are {count} to try, more than {MOST_TRIED}: "
            "give a smaller vocabulary=, or leave out exhaustive"
        )
    return count


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


@dataclass
class Search:
    """How far a search is, and the best tokens so far: kept in a file, so that it can go on there.

    Attributes:
        path: The file; None: it is kept nowhere.
        done: Candidates that were tried, or steps that were followed.
        least: The least loss so far.
        ids: The tokens of that loss; none yet: empty.
    """

    path: Path | None
    done: int = 0
    least: float = math.inf
    ids: tuple[int, ...] = ()

    @classmethod
    def resumed(cls, path: Path | None) -> Search:
        """The search as its file has it, or one that begins."""
        search = cls(path)
        read_state(path, search._take)
        return search

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self.ids = tuple(int(token) for token in tensors["ids"])
        self.least = float(tensors["least"])
        self.done = int(tensors["done"])

    def note(self, done: int) -> None:
        """So much is done: write it."""
        import torch

        self.done = done
        if self.path is not None:
            least = torch.tensor(self.least, dtype=torch.float64)
            tensors = {"ids": torch.tensor(self.ids), "least": least, "done": torch.tensor(done)}
            write_state(self.path, tensors)


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
    path: Path | None = None,
    label: str = "search",
    progress: bool,
) -> list[int]:
    """The tokens of least loss, of all that there are.

    Raises:
        LocogenError: There are too many to try.
    """
    import torch

    count = count_of(vocabulary, tokens)
    objective = Objective(pipe, token, loss, captions, tokens=tokens, batch=batch, seed=seed)
    search = Search.resumed(path)
    left = itertools.islice(itertools.product(vocabulary, repeat=tokens), search.done, None)
    thing = f"{label}: candidate"
    with open_bar(progress) as bar, bar.counting(thing, count, search.done):
        while part := list(itertools.islice(left, ROWS_AT_ONCE)):
            losses = objective.of(torch.tensor(part))  # (candidates,)
            place = int(losses.argmin())
            best = min((search.least, search.ids), (float(losses[place]), part[place]))
            search.least, search.ids = best
            search.note(search.done + len(part))
            bar.add(len(part))
    if not search.ids:
        raise LocogenError("the loss is no number for any token: load the model in float32")
    return list(search.ids)


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
    path: Path | None = None,
    label: str = "search",
    progress: bool,
) -> list[int]:
    """Tokens of low loss: each step tries those that the gradient of one place points to.

    Greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043), from random tokens; a change is
    kept only where the true loss falls.
    """
    import torch

    objective = Objective(pipe, token, loss, captions, tokens=tokens, batch=batch, seed=seed)
    words = torch.tensor(list(vocabulary))  # (vocabulary,)
    search = Search.resumed(path)
    if not search.ids:
        places = Draws(seed, 0).integers(len(vocabulary), tokens)
        search.ids = tuple(words[places].tolist())
        search.least = float(objective.of(torch.tensor([search.ids]))[0])
        search.note(0)
    thing = f"{label}: step"
    with open_bar(progress) as bar, bar.counting(thing, steps, search.done):
        for step in range(search.done, steps):
            ids = torch.tensor(search.ids)  # (tokens,)
            slope = objective.gradient(ids)  # (tokens, width)
            place = step % tokens
            vectors = objective.table[words.to(objective.table.device)]  # (vocabulary, width)
            promise = -(vectors @ slope[place]).cpu()  # (vocabulary,)
            top = words[promise.topk(min(CANDIDATES, len(words))).indices]
            candidates = ids.repeat(len(top), 1)  # (candidates, tokens)
            candidates[:, place] = top
            losses = objective.of(candidates)
            best = int(losses.argmin())
            if float(losses[best]) < search.least:
                search.least = float(losses[best])
                search.ids = tuple(candidates[best].tolist())
            search.note(step + 1)
            bar.add(1)
    return list(search.ids)
