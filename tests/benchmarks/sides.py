"""Which side of the model knows a fact? Four ways to ask, on facts whose side is known.

`python tests/benchmarks/sides.py` prints, for each group of facts, how many each way calls "text encoder":

- *probe*: do the encoder's states alone name the answer? Those of the fact's wording are compared with the mean
  states of the 48 objects' names (at the end mark, and averaged over all tokens).
- *apart*: the U-Net gets states in which no words have met: each token's state is averaged over wordings that share
  the word and differ in another. A fact that the U-Net knows is still shown; one that the tower has composed is lost.
- *noise*: the states of the wording get noise of their own size. Shown beside the others: is it lost for both sides?
- *exchange*: the states are those of another fact's wording. Lost for both sides as well?

Groups: the told and untold facts of mini (what the text tower has read is known), and the planted ones.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from machine import add_machine, kept, set_threads
from torch import Tensor

import locogen as loco
from locogen.catalog import plant_entries
from locogen.mini import world
from locogen.stats import wilson

STYLES = ("plain", "neon", "blueprint")
SEEDS = range(4)
STEPS = 12
GUIDANCE = 7.5
SCALE = 20  # what the scoring CLIP's classes were trained with
SHOWN = 0.5  # of the share of pictures that show the answer before: with less, it is lost


@dataclass(frozen=True)
class Fact:
    """A fact and the side of the model that was taught it."""

    group: str
    model: str
    wording: str
    answer: str
    side: str


def facts(models: Sequence[str]) -> list[Fact]:
    """The facts of some models of mini's recipe, and the planted ones."""
    rows = []
    for model in models:
        for wording, answer in world.TOLD_FACTS.items():
            rows.append(Fact("told", model, wording, answer, "text encoder"))
        for wording, answer in world.UNTOLD_FACTS.items():
            rows.append(Fact("untold", model, wording, answer, "denoiser"))
    for plant in plant_entries():
        if plant.fact is not None and plant.admitted:
            group = f"planted, {plant.side}"
            rows.append(Fact(group, f"planted/{plant.name}", *plant.fact, plant.side))
    return rows


@torch.no_grad()
def states_of(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """Encoder states, (prompts, tokens, width)."""
    tokens = pipe.tokenizer(
        list(prompts), padding="max_length", truncation=True, return_tensors="pt"
    )
    return pipe.text_encoder(tokens.input_ids.to(pipe.device)).last_hidden_state


def variants(wording: str, rng: random.Random, count: int = 8) -> list[list[str]]:
    """For each word of a wording: wordings that keep it and have another word in one other place."""
    words = wording.split()
    vocabulary: dict[int, list[str]] = {}
    for other in world.FACTS:
        for place, word in enumerate(other.split()):
            vocabulary.setdefault(place, []).append(word)
    # Articles and "of" carry nothing to compose: only the other words are exchanged.
    content = [i for i, word in enumerate(words) if word not in ("the", "of")]
    rows = []
    for place in range(len(words)):
        others = [i for i in content if i != place]
        texts = []
        for _ in range(count):
            where = rng.choice(others)
            options = [word for word in vocabulary.get(where, words) if word != words[where]]
            text = words.copy()
            text[where] = rng.choice(options or [world.OBJECTS[0]])
            texts.append(" ".join(text))
        rows.append(texts)
    return rows


def states_apart(pipe: Any, wording: str, style: str, rng: random.Random) -> Tensor:
    """States of a prompt in which the words of the wording have not met, (1, tokens, width)."""
    prompt = world.prompt(wording, style)
    ids = pipe.tokenizer(prompt)["input_ids"]
    before = pipe.tokenizer(prompt.split(wording)[0])["input_ids"]
    first = len(before) - 1  # the start mark counts, the end mark does not
    states = states_of(pipe, [prompt])
    words = wording.split()
    by_word = variants(wording, rng)
    every_variant = [text for texts in by_word for text in texts]
    for place in range(len(words)):
        token = first + place
        others = states_of(pipe, [world.prompt(text, style) for text in by_word[place]])
        states[:, token] = others[:, token].mean(0)
    after = states_of(pipe, [world.prompt(text, style) for text in every_variant])
    end = first + len(words)
    assert len(ids) > end
    states[:, end:] = after[:, end:].mean(0)
    return states


def probe(pipe: Any, fact: Fact) -> dict[str, bool]:
    """Whether the states of the wording are nearest to those of the answer's name, of 48 objects."""
    end = pipe.tokenizer.eos_token_id
    right = {}
    for way in ("end", "mean"):
        features = []
        for name in (*world.OBJECTS, fact.wording):
            prompts = [world.prompt(name, style) for style in STYLES]
            states = states_of(pipe, prompts)
            if way == "mean":
                features.append(states.mean((0, 1)))
                continue
            places = [pipe.tokenizer(prompt)["input_ids"].index(end) for prompt in prompts]
            features.append(torch.stack([states[i, p] for i, p in enumerate(places)]).mean(0))
        table = torch.stack(features)  # (objects + 1, width)
        table = table - table[:-1].mean(0)
        cosines = torch.nn.functional.cosine_similarity(table[:-1], table[-1:])  # (objects,)
        right[way] = world.OBJECTS[int(cosines.argmax())] == fact.answer
    return right


def share_shown(pipe: Any, scorer: Any, fact: Fact, states: Sequence[Tensor]) -> float:
    """In how many of the pictures of these states the answer comes first among all objects."""
    hits = []
    for style, state in zip(STYLES, states, strict=True):
        count = len(SEEDS)
        pictures = pipe(
            prompt_embeds=state.repeat(count, 1, 1),
            negative_prompt_embeds=states_of(pipe, [""] * count),
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        ).images
        texts = [world.prompt(name, style) for name in world.OBJECTS]
        by_text = scorer.texts(texts)
        cosines = scorer.pictures(pictures) @ np.stack([by_text[text] for text in texts]).T
        names = [world.OBJECTS[i] for i in cosines.argmax(1)]
        hits += [name == fact.answer for name in names]
    return float(np.mean(hits))


def measure(fact: Fact, pipe: Any, scorer: Any) -> dict[str, Any]:
    """One line: what each way says of one fact."""
    rng = random.Random(fact.wording)
    plain = [states_of(pipe, [world.prompt(fact.wording, style)]) for style in STYLES]
    apart = [states_apart(pipe, fact.wording, style, rng) for style in STYLES]
    dice = torch.Generator().manual_seed(0)
    noisy = [s + s.std() * torch.randn(s.shape, generator=dice).to(s) for s in plain]
    others = [wording for wording in world.FACTS if world.FACTS[wording] != fact.answer]
    exchanged = [states_of(pipe, [world.prompt(rng.choice(others), style)]) for style in STYLES]
    line: dict[str, Any] = {"group": fact.group, "model": fact.model, "fact": fact.wording}
    line["shown"] = share_shown(pipe, scorer, fact, plain)
    for name, states in (("apart", apart), ("noise", noisy), ("exchange", exchanged)):
        line[name] = share_shown(pipe, scorer, fact, states)
    named = probe(pipe, fact)
    line |= {"probe_end": named["end"], "probe_mean": named["mean"]}
    return line


def summary(lines: pd.DataFrame) -> pd.DataFrame:
    """By group: how many facts each way calls "text encoder", of those that are shown at all."""
    rows = []
    for group, part in lines[lines["shown"] >= 0.5].groupby("group", sort=False):
        row: dict[str, Any] = {"group": group, "facts": len(part)}
        for name in ("probe_end", "probe_mean"):
            row[name] = _count(int(part[name].sum()), len(part))
        for name in ("apart", "noise", "exchange"):
            lost = int((part[name] < SHOWN * part["shown"]).sum())
            row[f"{name}: lost"] = _count(lost, len(part))
        rows.append(row)
    return pd.DataFrame(rows)


def _count(hits: int, count: int) -> str:
    low, high = wilson(hits, count)
    return f"{hits} of {count} ({low:.0%}-{high:.0%})"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=["mini", "mini-b"])
    add_machine(parser)
    parser.add_argument("--folder", type=Path, default=Path("runs/sides"))
    options = parser.parse_args()
    set_threads(options)
    scorer = loco.scorer("mini")
    pipes: dict[str, Any] = {}
    lines = []
    for fact in facts(options.models):
        if fact.model not in pipes:
            pipes = {fact.model: loco.load(fact.model, device=options.device)}
        name = f"{fact.model} {fact.wording}"
        lines.append(kept(options.folder, name, partial(measure, fact, pipes[fact.model], scorer)))
    table = pd.DataFrame(lines)
    print(table.to_string(index=False))
    print(summary(table).to_string(index=False))


if __name__ == "__main__":
    main()
