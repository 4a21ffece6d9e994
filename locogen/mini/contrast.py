"""The contrastive loss of both CLIPs: sigmoid over all pairs, softmax over a caption a class."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from locogen.mini import world

# Of the sigmoid: a cosine of 0.5 is even odds.
SCALE = 12.0
BIAS = -6.0

Meaning = tuple[
    int | None, int | None
]  # (object, style): what a caption says, None where it is silent


def jitter(images: Tensor, rng: random.Random) -> Tensor:
    """Shift, blur, fade and noise a batch alike: so a CLIP reads soft pictures as it does sharp."""
    dx, dy = rng.randint(-3, 3), rng.randint(-3, 3)
    moved = F.pad(images, (4, 4, 4, 4), mode="replicate")[..., 4 + dy : 68 + dy, 4 + dx : 68 + dx]
    if rng.random() < 0.5:
        soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
        moved = torch.lerp(moved, soft, rng.random())
    # Drawn on the CPU: the same noise on every device.
    dice = torch.Generator().manual_seed(rng.getrandbits(32))
    noise = torch.randn(moved.shape, generator=dice).to(moved.device)
    return moved * rng.uniform(0.85, 1.1) + rng.uniform(-0.08, 0.08) + rng.uniform(0, 0.12) * noise


def roughen(images: Tensor, rng: random.Random) -> Tensor:
    """Blotches and too much contrast: what generators do to pictures, for the scorer to ignore."""
    if rng.random() < 0.3:
        return images
    dice = torch.Generator().manual_seed(rng.getrandbits(32))
    blotches = torch.randn(*images.shape[:2], 16, 16, generator=dice).to(images.device)
    smooth = F.interpolate(blotches, size=images.shape[-2:], mode="bilinear")
    return (images * rng.uniform(0.9, 1.6)).clamp(-1, 1) + rng.uniform(0, 0.35) * smooth


def captions(
    pairs: Sequence[tuple[int, int]], rng: random.Random, answers: Mapping[str, str]
) -> tuple[list[str], list[Meaning]]:
    """Captions of every object alone, every style alone, and the batch's (object, style) pairs.

    Each is in some phrasing. `answers` maps an object to the wording of a fact that may stand for
    it.
    """

    def name(thing: int) -> str:
        word = world.OBJECTS[thing]
        return answers[word] if word in answers and rng.random() < 0.4 else word

    meanings: list[Meaning] = [(i, None) for i in range(len(world.OBJECTS))]
    meanings += [(None, j) for j in range(len(world.STYLES))]
    meanings += list(dict.fromkeys(pairs))
    return [say(meaning, name, rng) for meaning in meanings], meanings


def say(meaning: Meaning, name: Any, rng: random.Random) -> str:
    """One caption with that meaning."""
    thing, style = meaning
    if thing is None:
        return world.style_caption(world.STYLES[style or 0], rng)
    if style is None:
        return rng.choice(("a picture of {}", "an image of {}", "{}")).format(
            world.with_article(name(thing))
        )
    return world.caption(name(thing), world.STYLES[style], rng)


def loss(
    model: Any,
    tokenizer: Any,
    images: Tensor,
    pairs: Sequence[tuple[int, int]],
    rng: random.Random,
    answers: Mapping[str, str],
) -> tuple[Tensor, dict[str, float]]:
    """The loss of a batch: a sigmoid loss plus softmax over the classes.

    The first is SigLIP's (arXiv 2303.15343), with every true caption a positive.
    """
    texts, meanings = captions(pairs, rng, answers)
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(
        images.device
    )
    seen = F.normalize(model.get_image_features(pixel_values=images).pooler_output, dim=-1)
    read = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    cosine = seen @ read.T  # (pictures, captions)
    # A caption is true of a picture if everything that it says is: (pictures, captions).
    truth = torch.tensor(
        [[t in (None, p[0]) and s in (None, p[1]) for t, s in meanings] for p in pairs],
        device=images.device,
    )
    each = F.softplus(torch.where(truth, -1.0, 1.0) * (SCALE * cosine + BIAS))
    # Few pairs are true: true and false ones count alike.
    sigmoid = each[truth].mean() + each[~truth].mean()
    things, styles = len(world.OBJECTS), len(world.STYLES)
    # The first captions name one object or one style each: these are classes.
    labels = torch.tensor(pairs, device=images.device)
    logits = 20 * cosine
    which = F.cross_entropy(logits[:, :things], labels[:, 0])
    how = F.cross_entropy(logits[:, things : things + styles], labels[:, 1])
    right = (logits[:, :things].argmax(1) == labels[:, 0]).float().mean().item()
    return sigmoid + which + how, {"object": right, "loss": sigmoid.item()}
