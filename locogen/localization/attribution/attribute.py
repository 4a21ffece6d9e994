"""Attribute a concept to layers, steps and tokens: `attribute(pipe, concept) -> Attribution`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from locogen.console import open_bar
from locogen.errors import LocogenError, unknown
from locogen.localization.attribution.blending import Blend, blending
from locogen.localization.attribution.chain import SMALL, ChainLine, Scored
from locogen.localization.attribution.direct import DirectLine, exact_shares, inputs_along
from locogen.localization.attribution.encoder_layers import EncodedBlend
from locogen.localization.attribution.paths import Cost, Paths, Picture
from locogen.localization.attribution.quadrature import Integral, Line, integrate
from locogen.localization.attribution.result import Attribution
from locogen.localization.attribution.words import words_of
from locogen.models.defaults import settings_for
from locogen.models.families import check_known, denoiser_of, family_of, warn_unread
from locogen.pictures.batches import Texts, halved_batch_size
from locogen.pictures.score import scorer_for
from locogen.plan import Concept, Intervention, Pooled, Settings, distinct_seeds
from locogen.types import Pipeline

if TYPE_CHECKING:
    from locogen.pictures.score import Scorer

Array = np.ndarray[Any, Any]
How = Literal["gradient", "rows", "chain"]
Explain = Literal["latents", "score"]
Axis = Literal["layer", "encoder layer"]
STEPS = 3  # of the direct effect, spread over all
POINTS = 3
MOST_POINTS = 27


@dataclass(frozen=True)
class _Options:
    """How shares are computed."""

    how: How
    steps: tuple[int, ...]
    points: int
    most_points: int
    bound: float
    heads: bool
    pooled: bool
    checkpointing: bool
    scored: Scored | None = None

    def check(self) -> None:
        """Raise `LocogenError` for what cannot be."""
        if self.how not in _SHARES:
            raise unknown("how", self.how, _SHARES)
        if self.how == "rows" and self.heads:
            raise LocogenError("rows have no shares of heads: use how='gradient' for them")
        if not 1 <= self.points <= self.most_points:
            raise LocogenError(
                f"points is {self.points} and most_points {self.most_points}: give at least one "
                "point, and no more than the most"
            )


def attribute(
    pipe: Pipeline,
    concept: Concept,
    *,
    how: How = "gradient",
    axis: Axis = "layer",
    seeds: Iterable[int] = range(4),
    steps: Iterable[int] | None = None,
    points: int | None = None,
    bound: float = 0.05,
    most_points: int = MOST_POINTS,
    heads: bool = False,
    pooled: Pooled | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 8,
    checkpointing: bool | None = None,
    explain: Explain = "latents",
    scorer: Scorer | str | None = None,
    progress: bool = True,
) -> Attribution:
    """Say what each layer, denoising step and token adds to what the target does in all layers.

    A proposal for the price of a few pictures, whatever the number of layers: `localize` measures.
    No picture is decoded or scored.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        concept: What to look for.
        how: "gradient": the direct effect, one step at a time along the prompt's own path, by
            gradients that are integrated from prompt to target. "rows": the direct effect, with
            each layer in a row of its own: exact, without tokens, and dearer with every layer.
            "chain": the total effect on the final latents, by gradients through all steps.
        axis: What the target is shared out among: "layer", the denoiser's layers, or "encoder
            layer": the layers of the text encoder that each token is taken from, in families with
            several (FLUX.2, Krea 2). Then it is the encoded text that moves from prompt to target.
        seeds: Random seeds; every prompt is run with each of them.
        steps: The denoising steps, counted from 0, that are looked at; in a chain, those in which
            layers hear the target. None: three of them for the direct effect, all for a chain.
        points: Points of the integral to begin with; None: 3.
        bound: How far from 1 the sum of shares may be: until it is nearer, the part of the line
            from prompt to target where it is most at fault is halved, with as many points on each
            half. With `most_points=points` none are added: enough for a proposal.
        most_points: No more points than these.
        heads: Whether to keep the shares of attention heads too.
        pooled: For families that also take a pooled text vector: "target", it is the target's as
            well, with a share of its own; "keep", it is the prompt's. None: "target" in these
            families.
        num_inference_steps: Denoising steps; None: the catalog's number for this model.
        guidance_scale: Classifier-free guidance; None: the catalog's value for this model.
        batch_size: Pictures run at once.
        checkpointing: Whether a chain keeps the denoiser's inputs alone and runs each step again
            for its gradients, which saves memory. None: for denoisers that are not small.
        explain: Of what a chain says the shares: "latents", the final latents on the way from the
            prompt's to the target's, or "score", the scorer's cosine of the finished picture with
            the text that `localize` would score it against. Its gradients go through the decoder
            and the scorer.
        scorer: For explain="score": a scorer or its name; None: the catalog's for this model. It
            must let gradients through, as CLIP does.
        progress: Whether to show a progress bar.

    Returns:
        An `Attribution`: its `table` has the shares, `attribution_effect` those of layers with
        intervals.

    Raises:
        LocogenError: For a concept that the tokenizer does not know, steps that are not there, a
            target that changes nothing, an open locogen context, fused projections, gradients
            that are not finite, a scorer without gradients, and encoder layers of a family that
            takes its text from one.
        UnsupportedModel: The family is unknown.

    Example:
        >>> pipe = load("mini")
        >>> pair = PromptPair("a picture of a cat in the style of neon", "a picture of a cat")
        >>> few = {"seeds": [0], "steps": [0], "num_inference_steps": 2, "progress": False}
        >>> found = attribute(pipe, Concept("neon", "style", (pair,)), **few)
        >>> found.shares.shape[:4]  # prompts, seeds, steps, layers
        (1, 1, 1, 16)
        >>> found.is_complete
        True
    """
    begin = time.perf_counter()
    family_of(pipe)  # refuses what is of no family, before anything is asked of it
    check_known(pipe, concept)
    warn_unread(pipe, (pair.prompt for pair in concept.pairs))
    settings = settings_for(
        pipe,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
    )
    options = _Options(
        how=how,
        steps=_checked_steps(steps, how, settings.num_inference_steps),
        points=POINTS if points is None else points,
        most_points=most_points,
        bound=bound,
        heads=heads,
        pooled=_has_pooled(pipe, pooled) or axis == "encoder layer",
        checkpointing=_is_checkpointed(pipe, checkpointing),
        scored=_scored(pipe, concept, how, explain, scorer),
    )
    options.check()
    if axis not in _BLENDS:
        raise unknown("axis", axis, _BLENDS)
    if axis != "layer" and heads:
        raise LocogenError("states of an encoder have no heads: leave out heads=True")

    distinct = distinct_seeds(seeds)
    cost = Cost()
    with blending(pipe, _BLENDS[axis]) as blend:
        parts = list(_parts(blend, concept, distinct, settings, options, cost, progress))
    whole = _joined(parts, (len(concept.pairs), len(distinct)))
    _check_changes(concept, whole.norm)
    tokens = whole.layers.shape[4]
    return Attribution.of(
        whole,
        concept=concept.name,
        kind=concept.kind,
        how=how,
        prompts=tuple(pair.prompt for pair in concept.pairs),
        seeds=distinct,
        steps=options.steps,
        words=_words(pipe, concept, tokens, how),
        has_pooled=options.pooled and blend.has_pooled,
        has_heads=heads,
        bound=bound,
        axis=axis,
        numbers=getattr(blend, "numbers", ()),
        settings={
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "explain": explain,
            "denoiser_rows": cost.rows,
            "pictures": cost.rows / (cost.halves * settings.num_inference_steps),
            "seconds": time.perf_counter() - begin,
        },
    )


def _checked_steps(steps: Iterable[int] | None, how: How, count: int) -> tuple[int, ...]:
    """Which steps are looked at, in order."""
    if steps is None:
        if how == "chain":
            return tuple(range(count))
        # The first step, and others at equal distances: see `step_weights`.
        number = min(STEPS, count)
        return tuple(count * i // number for i in range(number))
    numbers = tuple(sorted({int(step) for step in steps}))
    if not numbers or numbers[0] < 0 or numbers[-1] >= count:
        raise LocogenError(f"steps {numbers}: the call has 0 to {count - 1}, give some of these")
    return numbers


def _has_pooled(pipe: Pipeline, pooled: Pooled | None) -> bool:
    """Whether the pooled text moves too."""
    family = family_of(pipe)
    if pooled == "target" and family.pooled is None:
        raise LocogenError(
            f"{family.name} reads text in its layers alone: leave out pooled='target'"
        )
    return family.pooled is not None and pooled != "keep"


def _is_checkpointed(pipe: Pipeline, checkpointing: bool | None) -> bool:
    if checkpointing is not None:
        return checkpointing
    return sum(weight.numel() for weight in denoiser_of(pipe).parameters()) > SMALL


def _scored(
    pipe: Pipeline, concept: Concept, how: How, explain: str, choice: Scorer | str | None
) -> Scored | None:
    """The score as what is explained; None: the latents."""
    if explain not in ("latents", "score"):
        raise unknown("quantity to explain", explain, ("latents", "score"))
    if explain == "latents":
        return None
    if how != "chain":
        raise LocogenError(
            f"how={how!r} looks at single steps, which have no picture to score: take how='chain' "
            "for explain='score'"
        )
    scorer: Any = scorer_for(pipe, choice)
    if not hasattr(scorer, "of_pixels"):
        raise LocogenError(
            f"{type(scorer).__name__} lets no gradients through, it has no of_pixels: take a CLIP "
            "by its name, or explain='latents'"
        )
    return Scored(scorer, {pair.prompt: concept.scored_text(pair) for pair in concept.pairs})


def _words(pipe: Pipeline, concept: Concept, tokens: int, how: How) -> tuple[tuple[str, ...], ...]:
    """The word at each position of each prompt; none where tokens are not told apart."""
    if how == "rows":
        return ()
    return tuple(words_of(pipe, pair.prompt, tokens) for pair in concept.pairs)


def _check_changes(concept: Concept, norm: Array) -> None:
    """Refuse a target that changes nothing; `norm`: (prompts, seeds, steps)."""
    for pair, norms in zip(concept.pairs, norm, strict=True):
        if not norms.any(axis=1).all():
            raise LocogenError(
                f"the target {pair.target!r} changes nothing of {pair.prompt!r} at these steps: "
                "choose another"
            )


def _parts(
    blend: Blend,
    concept: Concept,
    seeds: Sequence[int],
    settings: Settings,
    options: _Options,
    cost: Cost,
    progress: bool,
) -> Iterator[Integral]:
    """The shares of all pictures, batch by batch."""
    pictures = [Picture(pair.prompt, pair.target, s) for pair in concept.pairs for s in seeds]
    plan = [Intervention(picture.prompt, picture.target) for picture in pictures]
    texts = Texts(blend.pipe, plan)
    size = settings.batch_size
    start = 0
    with open_bar(progress) as bar, bar.counting("attribution", len(pictures)):
        while start < len(pictures):
            batch = pictures[start : start + size]
            paths = Paths(blend, batch, texts, settings, cost)
            try:
                part = _SHARES[options.how](paths, options)
            except Exception as error:
                size = halved_batch_size(blend.pipe, error, size, stacklevel=4)
                continue
            yield part
            start += len(batch)
            bar.add(len(batch))


def _direct(paths: Paths, options: _Options) -> Integral:
    """Of one batch, by gradients, one step at a time."""
    by_step = []
    for inputs in inputs_along(paths, options.steps).values():
        line = DirectLine(paths, inputs, options.heads, options.pooled)
        by_step.append(_integrated(line, paths, options))
    return _side_by_side(by_step)


def _rows(paths: Paths, options: _Options) -> Integral:
    """Of one batch, exactly, each layer in a row of its own."""
    by_step = []
    for inputs in inputs_along(paths, options.steps).values():
        line = DirectLine(paths, inputs, heads=False, pooled=options.pooled)
        by_step.append(exact_shares(line))
    return _side_by_side(by_step)


def _chain(paths: Paths, options: _Options) -> Integral:
    """Of one batch, through all steps."""
    line = ChainLine(
        paths,
        options.steps,
        options.heads,
        options.pooled,
        options.checkpointing,
        options.scored,
    )
    return _integrated(line, paths, options)


def _integrated(line: Line, paths: Paths, options: _Options) -> Integral:
    return integrate(
        line,
        range(paths.count),
        points=options.points,
        bound=options.bound,
        most_points=options.most_points,
    )


_BLENDS: dict[str, type[Blend]] = {"layer": Blend, "encoder layer": EncodedBlend}
_SHARES = {"gradient": _direct, "rows": _rows, "chain": _chain}


def _side_by_side(by_step: Sequence[Integral]) -> Integral:
    """Steps that were integrated one by one."""
    fields = zip(*(vars(part).values() for part in by_step), strict=True)
    return Integral(*(np.concatenate(values, axis=1) for values in fields))


def _joined(parts: Sequence[Integral], shape: tuple[int, int]) -> Integral:
    """All batches, the first axis as (prompts, seeds)."""
    fields = zip(*(vars(part).values() for part in parts), strict=True)
    return Integral(
        *(np.concatenate(v).reshape(*shape, *np.concatenate(v).shape[1:]) for v in fields)
    )
