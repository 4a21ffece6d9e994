"""What an attack is to bring back, from which pictures, and how one sees whether it did."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.editing.probes import Probe
from locogen.errors import LocogenError
from locogen.phrasings import (
    neighbor_texts,
    occurrences,
    phrase_in,
    put_for,
    shown_text,
    subject_in,
)
from locogen.pictures.description import describe_pipeline, describe_scheduler
from locogen.pictures.fingerprint import digest_of
from locogen.pictures.runs import generate
from locogen.pictures.score import probabilities
from locogen.plan import Concept, PromptPair, Settings, settings_from
from locogen.stats import Array
from locogen.types import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image

    from locogen.pictures.score import Scorer

View = Callable[[Any], Any]  # what is looked at of a picture

# Of the pictures that an attack learns from: far from the seeds that people judge pictures by.
# Where these are too few, the next ones follow.
LEARNING_SEEDS = (1_000, 1_001)


@dataclass(frozen=True)
class NeverHad:
    """A concept that the model never had: what an attack brings of it, the attack has taught.

    Attributes:
        pictures: Of the concept; picture `i` shows what the training pair `i` names (counted round
            where there are more). Empty: the attacked concept's own pictures with red and blue
            exchanged. The judge then sees every picture with both put back, and its colors have to
            be nearer to the exchanged pictures' than to those before: see `exchanged_colors`.
        name: What stands in the place of the concept's name in the texts for the scorer. Only with
            pictures.

    Raises:
        LocogenError: Pictures without a name, a name without pictures, or what is no picture.

    Example:
        >>> NeverHad().exchanges_colors
        True
    """

    pictures: tuple[Any, ...] = ()
    name: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pictures", _pictures_in(self.pictures))
        if bool(self.pictures) != bool(self.name):
            raise LocogenError(
                "a concept that the model never had needs pictures= and name=, or neither: then "
                "red and blue of the concept's own pictures are exchanged"
            )

    @property
    def exchanges_colors(self) -> bool:
        """Whether it is the concept with red and blue exchanged."""
        return not self.pictures

    @property
    def facts(self) -> dict[str, Any]:
        """What it is, as plain values."""
        digests = [digest_of_picture(picture) for picture in self.pictures]
        return {"name": self.name, "pictures": digests}

    def probe(self, probe: Probe, concept: Concept) -> Probe:
        """What a picture is asked instead of the probe."""
        if self.name is None:
            return probe
        text = probe.text.replace(concept.name, self.name)
        if text == probe.text:
            raise LocogenError(
                f"the text {probe.text!r} lacks {concept.name!r}, so {self.name!r} cannot take its "
                "place: give probes whose texts name the concept"
            )
        return replace(probe, text=text, among=(*probe.among, probe.text))


def _pictures_in(pictures: Any) -> tuple[Any, ...]:
    """Pictures as a tuple; raises `LocogenError` for one alone, or for names of files."""
    from PIL.Image import Image

    every = tuple(pictures) if isinstance(pictures, Iterable) else (None,)
    strange = [one for one in every if not isinstance(one, Image)]
    if strange:
        raise LocogenError(
            f"NeverHad has pictures={pictures!r:.80}: give a list of PIL pictures, such as "
            "[PIL.Image.open(path)]"
        )
    return every


def digest_of_picture(picture: Image) -> str:
    """A hash of a picture's pixels and size."""
    text = f"{picture.mode} {picture.size} ".encode()
    return hashlib.sha256(text + picture.tobytes()).hexdigest()[:16]


def exchanged(picture: Image) -> Image:
    """The picture with red and blue exchanged; twice, it is the old one."""
    from PIL import Image as Images

    return Images.fromarray(np.asarray(picture.convert("RGB"))[..., ::-1].copy())


def exchanged_colors(pictures: Sequence[Image], references: Sequence[Image]) -> Array:
    """Whether pictures have the colors of references rather than those with red and blue exchanged.

    By the sign of their product with the references' mean difference of red and blue, on 8 x 8
    means: exchanging the two turns the sign, so 0 lies in the middle.

    Args:
        pictures: Any pictures.
        references: Pictures with exchanged colors.

    Returns:
        (pictures,), 0 or 1.
    """
    template = _red_over_blue(references).mean(0)  # (64,)
    return (_red_over_blue(pictures) @ template > 0).astype(float)


def _red_over_blue(pictures: Sequence[Image]) -> Array:
    """Red minus blue of 8 x 8 means, (pictures, 64)."""
    from PIL import Image as Images

    rows = []
    for picture in pictures:
        small = picture.convert("RGB").resize((8, 8), Images.Resampling.BOX)
        values = np.asarray(small, float)  # (8, 8, 3)
        rows.append((values[..., 0] - values[..., 2]).ravel())
    return np.stack(rows)


def _all_of(picture: Image) -> Image:
    return picture


def words_in(concept: Concept, prompt: str) -> str:
    """The words of a prompt that an attack puts its own in the place of.

    Raises `LocogenError` if the prompt does not name the concept.
    """
    first = concept.pairs[0]
    names = [subject_in(concept, first), concept.name]
    if concept.kind == "fact":
        # The words that ask for the answer belong to its name: "the animal of" france.
        names.insert(0, phrase_in(concept, first))
    for name in names:
        places = occurrences(prompt, name)
        if places:
            start, end = places[0]
            return prompt[start:end]
    raise LocogenError(
        f"the prompt {prompt!r} does not name {concept.name!r}, so there is no place for an "
        "attack's words: give prompts that do"
    )


def _facts_of(concept: Concept) -> dict[str, Any]:
    """What of a concept says where its words are and what they begin with."""
    return {
        "name": concept.name,
        "kind": concept.kind,
        "answer": concept.answer,
        "neighbors": list(concept.neighbors),
        "first pair": asdict(concept.pairs[0]),
    }


def probes_of(concept: Concept, pairs: Sequence[PromptPair]) -> tuple[Probe, ...]:
    """Probes that ask whether the concept is still shown, of a fact its old answer.

    Raises `LocogenError` where nothing says what else a picture could show.
    """
    probes = []
    for pair in pairs:
        text = shown_text(concept, pair)
        others = [*neighbor_texts(concept, pair)]
        if concept.kind == "fact":
            others.append(concept.scored_text(pair))
        among = tuple(other for other in dict.fromkeys(others) if other != text)
        if not among:
            raise LocogenError(
                f"nothing says what pictures of {pair.prompt!r} could show in place of "
                f"{concept.name!r}: give the concept neighbors=, or held_out= probes with among="
            )
        probes.append(Probe("efficacy", pair.prompt, text, among))
    return tuple(probes)


def picture_settings(verb: str, settings: Mapping[str, Any]) -> Settings:
    """How pictures are made; raises `LocogenError` for settings that `generate` does not have."""
    if "store" in settings:
        raise LocogenError(f"{verb} keeps pictures in folder=: give that in place of store=")
    return settings_from(verb, settings)


def training_pairs(training: Any) -> tuple[PromptPair, ...]:
    """The pairs that are given to learn from; raises `LocogenError` for none, or for texts."""
    pairs = tuple(training) if isinstance(training, Iterable) else ()
    if not pairs or not all(isinstance(pair, PromptPair) for pair in pairs):
        raise LocogenError(
            f"training is {training!r:.80}: give a list of prompt pairs, such as concept.pairs[:4]"
        )
    return pairs


def held_out_probes(concept: Concept, held_out: Any) -> tuple[Probe, ...]:
    """The probes that are given to judge by; raises `LocogenError` for what cannot be judged."""
    probes = tuple(held_out) if isinstance(held_out, Iterable) else ()
    if not probes or not all(isinstance(probe, Probe) for probe in probes):
        raise LocogenError(
            f"held_out is {held_out!r:.80}: give a list of Probe, as from probes_for, or leave it "
            "out for the concept's own"
        )
    for probe in probes:
        words_in(concept, probe.prompt)
    _check_judgeable(probes)
    return probes


def _check_judgeable(probes: Sequence[Probe]) -> None:
    silent = [probe.prompt for probe in probes if not set(probe.among) - {probe.text}]
    if silent:
        raise LocogenError(
            f"held_out needs probes with among=, what else their pictures could show: {silent[:1]}"
        )
    prompts = [probe.prompt for probe in probes]
    if len(set(prompts)) < len(prompts):
        raise LocogenError("held_out has a prompt twice: each prompt is judged once")


def learned_and_judged(
    concept: Concept,
    training: Sequence[PromptPair] | None,
    held_out: Sequence[Probe] | None,
    *,
    learns: bool,
) -> tuple[tuple[PromptPair, ...], tuple[Probe, ...]]:
    """What an attack learns from, and what it is judged on: other prompts.

    Args:
        concept: The concept.
        training: As `attack` was asked for.
        held_out: As `attack` was asked for.
        learns: Whether it learns at all; else both may have the same prompts.

    Raises:
        LocogenError: Nothing is left for one of them.

    Warns:
        UserWarning: A prompt is given for both.
    """
    if held_out is None:
        pairs = concept.pairs[::2] if training is None else training_pairs(training)
        return pairs, probes_of(concept, _judged_pairs(concept, pairs, learns))
    probes = held_out_probes(concept, held_out)
    prompts = [probe.prompt for probe in probes]
    if training is None:
        return _learned_pairs(concept, prompts, learns), probes
    pairs = training_pairs(training)
    if learns:
        _remark_overlap(pairs, prompts)
    return pairs, probes


def _judged_pairs(
    concept: Concept, training: Sequence[PromptPair], learns: bool
) -> tuple[PromptPair, ...]:
    """Every other pair, from the second, without those that are learned from; else all others."""
    pairs = _others(concept, 1, [pair.prompt for pair in training], learns)
    if not pairs:
        raise LocogenError(
            f"an attack learns from every prompt of {concept.name!r}, and is judged on others: "
            "give the concept more pairs, or held_out=, or fewer pairs in training="
        )
    return pairs


def _learned_pairs(concept: Concept, judged: Sequence[str], learns: bool) -> tuple[PromptPair, ...]:
    """Every other pair, from the first, without those that are judged; else all others."""
    pairs = _others(concept, 0, judged, learns)
    if not pairs:
        raise LocogenError(
            f"every prompt of {concept.name!r} is in held_out=, and an attack learns from others: "
            "give training=, or leave some out of held_out="
        )
    return pairs


def _others(
    concept: Concept, first: int, prompts: Sequence[str], learns: bool
) -> tuple[PromptPair, ...]:
    """Every other pair from `first`, if it learns without these prompts; else all but these."""
    every_other = _pairs_without(concept.pairs[first::2], prompts if learns else ())
    return every_other or _pairs_without(concept.pairs, prompts)


def _remark_overlap(training: Sequence[PromptPair], judged: Sequence[str]) -> None:
    """Warn of prompts that are given for both: to choose an edit by them may be meant."""
    apart = _pairs_without(training, judged)
    overlap = [pair.prompt for pair in training if pair not in apart]
    if overlap:
        warnings.warn(
            f"{overlap[0]!r} is in training= and in held_out=, as are {len(overlap)} prompts in "
            "all: the attack is judged on what it learned from, which says nothing of other "
            "prompts. Leave them out of one of the two",
            stacklevel=4,
        )


def _pairs_without(pairs: Sequence[PromptPair], prompts: Sequence[str]) -> tuple[PromptPair, ...]:
    """Those pairs whose prompts are none of these, whatever their case and white space."""
    left_out = {_plain(prompt) for prompt in prompts}
    return tuple(pair for pair in pairs if _plain(pair.prompt) not in left_out)


def _plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


@dataclass(frozen=True, eq=False)
class Judged:
    """What a scorer says of pictures, row by row: probes times seeds.

    Attributes:
        shown: Whether no other text of the probe fits better, (rows,), 0 or 1.
        score: The probability of the probe's text among all of them; the raw score where the
            scorer has no `logit_scale`, (rows,).
    """

    shown: Array
    score: Array


@dataclass(frozen=True, eq=False)
class Goal:
    """A concept to bring back: pictures to learn from, and others to be judged by.

    Attributes:
        pipe: The pipeline.
        concept: The concept.
        training: Pairs that are learned from.
        probes: Held-out prompts that are judged.
        seeds: Of the judged pictures.
        scorer: What judges.
        store: Folder of the pictures.
        settings: Of `generate`.
        never_had: Instead of the concept, one that the model never had.
    """

    pipe: Pipeline
    concept: Concept
    training: tuple[PromptPair, ...]
    probes: tuple[Probe, ...]
    seeds: tuple[int, ...]
    scorer: Scorer
    store: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    never_had: NeverHad | None = None

    @property
    def prompts(self) -> tuple[str, ...]:
        """The probes' prompts, in order."""
        return tuple(probe.prompt for probe in self.probes)

    @property
    def facts(self) -> dict[str, Any]:
        """What pictures and captions to learn from depend on, but for the weights.

        With them, the options and the edit, it names the state of a training.
        """
        scheduler = digest_of(describe_scheduler(self.pipe.scheduler))
        never_had = self.never_had
        return {
            "concept": _facts_of(self.concept),
            "training": [(pair.prompt, pair.target) for pair in self.training],
            "settings": {name: self.settings[name] for name in self.settings if name != "progress"},
            # Its noise levels and what it predicts are those of the loss.
            "scheduler": scheduler[:16],
            "pipeline": digest_of(describe_pipeline(self.pipe))[:16],
            "never_had": None if never_had is None else never_had.facts,
        }

    def with_token(self, prompt: str, token: str) -> str:
        """The prompt with a token in the place of the words that name the concept, at each mention.

        A mention that stayed would be what brings the concept back.
        """
        words = words_in(self.concept, prompt)
        return put_for(prompt, occurrences(prompt, words), token)

    @cached_property
    def learned(self) -> tuple[list[Image], list[PromptPair]]:
        """Pictures of the concept and the pair that each shows; the model is not edited now."""
        if self.never_had is not None and self.never_had.pictures:
            pictures = list(self.never_had.pictures)
            pairs = [self.training[i % len(self.training)] for i in range(len(pictures))]
            return pictures, pairs
        return self._learned_under(LEARNING_SEEDS)

    def learned_at_least(self, count: int) -> tuple[list[Image], list[PromptPair]]:
        """`learned`, and further seeds' pictures where those are fewer than so many.

        The first ones stay the same whatever the count is: they are made by themselves.

        Raises `LocogenError` where the pictures are given and are too few.
        """
        pictures, pairs = self.learned
        missing = count - len(pictures)
        if missing <= 0:
            return pictures, pairs
        self.check_count(count)
        first = LEARNING_SEEDS[-1] + 1
        rounds = math.ceil(missing / len(self.training))
        more, their_pairs = self._learned_under(range(first, first + rounds))
        return pictures + more, pairs + their_pairs

    def check_count(self, count: int) -> None:
        """Raise `LocogenError` for more pictures than are given of what the model never had."""
        available = len(self.never_had.pictures) if self.never_had is not None else 0
        if available and count > available:
            raise LocogenError(
                f"never_had has {available} pictures to learn from, not {count}: give it more, or "
                "fewer in pictures="
            )

    def _learned_under(self, seeds: Sequence[int]) -> tuple[list[Image], list[PromptPair]]:
        pictures, pairs = self._made([pair.prompt for pair in self.training], seeds)
        if self.never_had is not None:
            pictures = self.as_never_had(pictures)
        return pictures, pairs

    def as_never_had(self, pictures: Sequence[Image]) -> list[Image]:
        """Pictures of the concept as those of the one that the model never had."""
        if self.never_had is None or not self.never_had.exchanges_colors:
            raise LocogenError(
                "this attack needs pictures of the held-out prompts: leave 'never had' out of "
                "models=, or let it be the concept with exchanged colors"
            )
        return [exchanged(picture) for picture in pictures]

    @cached_property
    def plain(self) -> tuple[list[Image], list[PromptPair]]:
        """Pictures without the concept, of the training pairs' targets, and their pairs."""
        return self._made([pair.target for pair in self.training], LEARNING_SEEDS)

    def _made(
        self, prompts: Sequence[str], seeds: Sequence[int]
    ) -> tuple[list[Image], list[PromptPair]]:
        """Pictures by the model as it is: seed by seed, so that the first show different things."""
        run = generate(self.pipe, prompts, seeds=seeds, store=self.store, **self.settings)
        count = len(seeds)
        pictures: list[Image] = []
        for place in range(count):
            pictures += run.pictures[place::count]  # those of one seed
        return pictures, [*self.training] * count

    def pictures(self, prompts: Sequence[str], *, is_stored: bool = True) -> list[Image]:
        """Pictures of the probes, prompt by prompt and seed by seed, by the model as it is now."""
        store = self.store if is_stored else None
        run = generate(self.pipe, prompts, seeds=self.seeds, store=store, **self.settings)
        return list(run.pictures)

    def judge(self, pictures: Sequence[Image], view: View | None = None) -> Judged:
        """Whether pictures of the probes and seeds show what the attack is to bring.

        Args:
            pictures: Prompt by prompt and seed by seed.
            view: What is looked at of each picture; None: all of it.
        """
        look = view or _all_of
        pictures = [look(picture) for picture in pictures]
        never_had = self.never_had
        if never_had is None:
            return self._judged(pictures, self.probes)
        probes = [never_had.probe(probe, self.concept) for probe in self.probes]
        if not never_had.exchanges_colors:
            return self._judged(pictures, probes)
        # Scorers look at shapes: the concept itself would pass for its exchange. So the colors have
        # to be those of the exchanged pictures as well.
        put_back = self._judged([exchanged(picture) for picture in pictures], probes)
        has_colors = exchanged_colors(
            pictures, [look(picture) for picture in self.learned[0]]
        )  # (rows,)
        return Judged(put_back.shown * has_colors, put_back.score * has_colors)

    def _judged(self, pictures: Sequence[Image], probes: Sequence[Probe]) -> Judged:
        """What the scorer says of pictures of these probes, each under every seed."""
        rows = [probe for probe in probes for _ in self.seeds]
        most = max(len(probe.among) for probe in rows)
        lines = [[probe.text for probe in rows]]
        for place in range(most):
            # Shorter lists are filled up with the own text, which cannot beat itself.
            line = [(*probe.among, *[probe.text] * most)[place] for probe in rows]
            lines.append(line)
        scores = np.stack(self.scorer(pictures, *lines))  # (texts, rows)
        shown = (scores[0] >= scores[1:].max(0)).astype(float)
        return Judged(shown, self._probability(scores, lines))

    def _probability(self, scores: Array, lines: Sequence[Sequence[str]]) -> Array:
        """The first text's probability among the others, (rows,); raw where there is no scale."""
        scale = self.scorer.settings.get("logit_scale")
        if scale is None:
            return scores[0]
        distinct = scores.copy()  # (texts, rows)
        for place, line in enumerate(lines[1:], start=1):
            for row, text in enumerate(line):
                if text == lines[0][row]:
                    distinct[place, row] = np.nan
        return probabilities(distinct, scale)[0]
