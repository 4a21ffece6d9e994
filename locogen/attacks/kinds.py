"""The kinds of attacks: each trains, solves or searches, and says how to make pictures with it."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from locogen.attacks.goal import Goal, words_in
from locogen.attacks.inpainting import cropped, filling, smallest_hole
from locogen.attacks.loss import DenoisingLoss, latents_of
from locogen.attacks.search import (
    count_of,
    exhaustive_search,
    gradient_search,
    vocabulary_of,
)
from locogen.attacks.states import changed_states, text_weights
from locogen.attacks.training import optimize
from locogen.attacks.weights import text_names, weights_now, with_weights, with_weights_from
from locogen.editing.closed_form import returning_map
from locogen.editing.edit import Edit
from locogen.editing.evaluation import Applicable
from locogen.errors import LocogenError
from locogen.interventions.words import NewWord, digest, speaking, states_of, token_for
from locogen.models.families import denoiser_of
from locogen.types import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Kind = Literal[
    "inversion", "states", "closed", "discrete", "relearn", "completion", "noise", "inpaint"
]
Context = Callable[[], Any]


LARGEST_SEED = 10**12  # a step's draws are under a multiple of it, which torch takes up to 2**63


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value as a whole number; raises `LocogenError` for another one, or for True."""
    limits = f"from {least} up" if most is None else f"from {least} to {most}"
    wrong = LocogenError(f"{name} is {value!r}: give a whole number {limits}")
    try:
        whole = operator.index(value)
    except TypeError:
        raise wrong from None
    if isinstance(value, bool) or whole < least or (most is not None and whole > most):
        raise wrong
    return whole


def whole_numbers(name: str, values: Any) -> tuple[int, ...]:
    """Whole numbers from 0 up; raises `LocogenError` for none, for others, or for a text."""
    every = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else []
    if not every:
        raise LocogenError(f"{name} is {values!r}: give a list of whole numbers from 0 up")
    return tuple(whole_number(name, value, 0) for value in every)


def number(name: str, value: Any, least: float = 0.0) -> float:
    """The value as a finite number; raises `LocogenError` for another one, or for True."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < least:
        above = "finite number" if least == -math.inf else f"number from {least:g} up"
        raise LocogenError(f"{name} is {value!r}: give a {above}")
    return float(value)


@dataclass(frozen=True)
class Options:
    """What an attack does; `attack` says what each of them means."""

    steps: int
    at: tuple[int, ...]
    rate: float
    batch: int
    vectors: int
    start: Literal["neighbors", "own"]
    exhaustive: bool
    vocabulary: tuple[str, ...] | None
    pictures: tuple[int, ...]
    trained: Literal["text matrices", "cross attention"]
    ridge: float
    seed: int
    strength: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what no attack could do, before anything is trained; numbers become Python's."""
        choices = {"start": ("neighbors", "own"), "trained": ("text matrices", "cross attention")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                words = ", ".join(map(repr, allowed))
                raise LocogenError(f"{name} is {getattr(self, name)!r}: use one of {words}")
        if self.exhaustive not in (True, False):
            raise LocogenError(f"exhaustive is {self.exhaustive!r}: give True or False")
        for name, number in self._numbers().items():
            object.__setattr__(self, name, number)

    def _numbers(self) -> dict[str, Any]:
        """The numbers, checked, as plain ones: a file of the attack holds them."""
        least = {"steps": 0, "batch": 1, "vectors": 1}
        whole = {name: whole_number(name, getattr(self, name), low) for name, low in least.items()}
        pictures = whole_numbers("pictures", self.pictures)
        if len(set(pictures)) < len(pictures):
            raise LocogenError(f"pictures is {pictures}: give each number once")
        return whole | {
            # As all strengths: the last row of a model speaks for the attack.
            "pictures": tuple(sorted(pictures)),
            "seed": whole_number("seed", self.seed, -LARGEST_SEED, LARGEST_SEED),
            "strength": number("strength", self.strength, -math.inf),
            "rate": number("rate", self.rate),
            "ridge": number("ridge", self.ridge),
        }


@dataclass(frozen=True, eq=False)
class Attempt:
    """One way to make pictures: within its context, of its prompts.

    Attributes:
        strength: Steps, tokens, pictures or seeds: what the kind counts.
        context: Opens a context in which the model is edited (or not) and attacked.
        prompts: What the pictures are made of, one a probe.
        tensors: What the attack found, by name.
        words: Tokens that it found.
        view: What is judged of a picture; None: all of it.
        is_stored: Whether the pictures may be kept in the store.
    """

    strength: int
    context: Context
    prompts: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    view: Callable[[Any], Any] | None = None
    is_stored: bool = True


@dataclass(frozen=True, eq=False)
class Attacked:
    """A model under attack.

    Attributes:
        goal: What is to come back.
        edit: The edit that the model has, or what acts at inference; None: none.
        options: The attack's.
        state: Where its state is kept; None: nowhere.
        label: For progress bars.
        progress: Whether to show them.
    """

    goal: Goal
    edit: Applicable | None
    options: Options
    state: Path | None
    label: str
    progress: bool

    @property
    def pipe(self) -> Pipeline:
        """The pipeline."""
        return self.goal.pipe

    @property
    def changes(self) -> list[str]:
        """Names of the weights that the edit changes."""
        return list(self.edit.changes) if isinstance(self.edit, Edit) else []

    @contextmanager
    def edited(self) -> Iterator[None]:
        """Within the context, the model has its edit."""
        if self.edit is None:
            yield
            return
        with self.edit.applied(self.pipe, self.options.strength):
            yield

    def within_edit(self, context: Context) -> Context:
        """A context within the edit's."""

        @contextmanager
        def both() -> Iterator[None]:
            with ExitStack() as stack:
                stack.enter_context(self.edited())
                stack.enter_context(context())
                yield

        return both

    def optimized(
        self, start: Mapping[str, Tensor], loss_at: Callable[[int, Any], Tensor], name: str = ""
    ) -> dict[int, dict[str, Tensor]]:
        """The values of the steps that are looked at: see `optimize`."""
        path = self.state
        if path is not None and name:
            path = path.with_name(f"{path.stem}-{name}{path.suffix}")
        return optimize(
            start,
            loss_at,
            stops=self.options.at,
            rate=self.options.rate,
            path=path,
            label=f"{self.label} {name}".strip(),
            progress=self.progress,
        )


# --- by words ------------------------------------------------------------------------------------


def inversion(model: Attacked) -> Iterator[Attempt]:
    """Token vectors in the place of the concept's words (Pham et al. 2023, arXiv 2308.01508)."""
    goal = model.goal
    token = token_for(model.pipe, goal.concept.name)
    pictures, pairs = goal.learned
    loss = DenoisingLoss.of(model.pipe, pictures)
    captions = [goal.with_token(pair.prompt, token) for pair in pairs]
    options = model.options
    start = _start(model)  # (vectors, width)
    word = NewWord(model.pipe, token, start)

    def loss_at(step: int, values: Mapping[str, Tensor]) -> Tensor:
        noised = loss.draw(options.seed, step, options.batch)
        word.vectors = values["vectors"]
        states = word.states([captions[row] for row in noised.rows.tolist()])
        return loss.per_row(noised, states).mean()

    with model.edited():
        values = model.optimized({"vectors": start}, loss_at)
    for step, tensors in values.items():
        yield _with_vectors(model, step, token, tensors["vectors"])


def _start(model: Attacked) -> Tensor:
    """The vectors to begin with: the mean of the neighbors' words, or the concept's own words.

    (vectors, width), in float32
    """
    import torch

    pipe = model.pipe
    table = pipe.text_encoder.get_input_embeddings().weight.detach().float()  # (words, width)
    concept = model.goal.concept
    count = model.options.vectors
    if model.options.start == "own":
        words = words_in(concept, concept.pairs[0].prompt)
        name_vectors = table[_ids(pipe, words)]  # (tokens of the words, width)
        places = [min(place, len(name_vectors) - 1) for place in range(count)]
        return name_vectors[places].clone()
    means = [table[_ids(pipe, name)].mean(0) for name in concept.neighbors if name != concept.name]
    mean = torch.stack(means).mean(0) if means else table.mean(0)  # (width,)
    return mean.expand(count, -1).clone()


def _ids(pipe: Pipeline, words: str) -> list[int]:
    return pipe.tokenizer(words, add_special_tokens=False).input_ids


def _with_vectors(
    model: Attacked, strength: int, token: str, vectors: Tensor, words: tuple[str, ...] = ()
) -> Attempt:
    """Pictures of the held-out prompts with a token of these vectors."""
    prompts = tuple(model.goal.with_token(prompt, token) for prompt in model.goal.prompts)
    context = model.within_edit(lambda: speaking(model.pipe, token, vectors))
    return Attempt(strength, context, prompts, {token: vectors}, words)


def discrete(model: Attacked) -> Iterator[Attempt]:
    """Tokens of the vocabulary in the place of the concept's words (arXiv 2310.11868)."""
    goal = model.goal
    options = model.options
    token = token_for(model.pipe, goal.concept.name)
    pictures, pairs = goal.learned
    loss = DenoisingLoss.of(model.pipe, pictures)
    captions = [goal.with_token(pair.prompt, token) for pair in pairs]
    vocabulary = vocabulary_of(model.pipe, options.vocabulary)
    if options.exhaustive:
        search = exhaustive_search
    else:
        search = partial(gradient_search, steps=options.steps)
    with model.edited():
        ids = search(
            model.pipe,
            token,
            loss,
            captions,
            vocabulary,
            tokens=options.vectors,
            batch=options.batch,
            seed=options.seed,
            path=model.state,
            label=model.label,
            progress=model.progress,
        )
    table = model.pipe.text_encoder.get_input_embeddings().weight.detach().float()
    words = tuple(model.pipe.tokenizer.convert_ids_to_tokens(ids))
    yield _with_vectors(model, options.vectors, token, table[ids].clone(), words)


# --- by states -----------------------------------------------------------------------------------


def states(model: Attacked) -> Iterator[Attempt]:
    """Any states: one change for every prompt is trained, whether or not words could give it."""
    import torch

    goal = model.goal
    options = model.options
    pictures, pairs = goal.learned
    loss = DenoisingLoss.of(model.pipe, pictures)
    with torch.no_grad():
        text = _own_states(model.pipe, [pair.prompt for pair in pairs])
    start = torch.zeros_like(text[0], dtype=torch.float32)  # (tokens, width)

    def loss_at(step: int, values: Mapping[str, Tensor]) -> Tensor:
        noised = loss.draw(options.seed, step, options.batch)
        rows = noised.rows.to(text.device)
        return loss.per_row(noised, text[rows] + values["change"].to(text)).mean()

    with model.edited():
        values = model.optimized({"change": start}, loss_at)
    for step, tensors in values.items():
        change = tensors["change"]
        yield _with_change(
            model, step, "added", change, lambda states, added=change: states + added.to(states)
        )


def _own_states(pipe: Pipeline, prompts: Sequence[str]) -> Tensor:
    """Text states of prompts, (prompts, tokens, width)."""
    tokens = pipe.tokenizer(
        list(prompts), padding="max_length", truncation=True, return_tensors="pt"
    )
    return states_of(pipe, tokens)


def closed(model: Attacked) -> Iterator[Attempt]:
    """States that the edited matrices answer as the old ones did: one solve, nothing trained."""
    old = text_weights(model.pipe)
    with model.edited():
        new = text_weights(model.pipe)
    matrix = returning_map(old, new, ridge=model.options.ridge).float()  # (width, width)
    yield _with_change(model, 1, "mapped", matrix, lambda text: text + text @ matrix.T.to(text))


def _with_change(
    model: Attacked, strength: int, verb: str, change: Tensor, function: Callable[[Tensor], Tensor]
) -> Attempt:
    """Pictures of the held-out prompts' own words with changed states."""
    label = f"states {verb} {digest(change)}"
    context = model.within_edit(lambda: changed_states(model.pipe, function, label))
    return Attempt(strength, context, model.goal.prompts, {"states": change})


# --- by training the model -----------------------------------------------------------------------


def relearn(model: Attacked) -> Iterator[Attempt]:
    """The layers that read text, trained on plain pictures and a few of the concept.

    Without any of the concept, what comes back was only covered (arXiv 2410.08074).
    """
    for count in model.options.pictures:
        yield _relearned(model, count)


def _relearned(model: Attacked, count: int) -> Attempt:
    import torch
    from torch.func import functional_call

    goal = model.goal
    pipe = model.pipe
    options = model.options
    pictures, captions = _lesson(goal, count)
    loss = DenoisingLoss.of(pipe, pictures)
    with torch.no_grad():
        text = _own_states(pipe, captions)  # (pictures, tokens, width)
    denoiser = denoiser_of(pipe)
    trained = text_names(pipe, everything=options.trained == "cross attention")
    edited_names = model.changes
    with model.edited():
        start = weights_now(pipe, list(dict.fromkeys([*trained, *edited_names])))

    def loss_at(step: int, values: Mapping[str, Tensor]) -> Tensor:
        noised = loss.draw(options.seed, step, options.batch)
        weights = {**fixed, **{name: value.to(start[name]) for name, value in values.items()}}

        def predict(*args: Any, **kwargs: Any) -> Any:
            return functional_call(denoiser, weights, args, kwargs)

        return loss.per_row(noised, text[noised.rows.to(text.device)], predict).mean()

    # Other weights that the edit changed keep what it made of them.
    fixed = {name: start[name] for name in edited_names if name not in trained}
    first = {name: start[name].float() for name in trained}
    values = model.optimized(first, loss_at, f"with {count}")
    weights = start | {name: value.to(start[name]) for name, value in values[max(values)].items()}
    return Attempt(count, lambda: with_weights(pipe, weights), goal.prompts)


def _lesson(goal: Goal, count: int) -> tuple[list[Image], list[str]]:
    """Plain pictures and so many of the concept, which make up half of what is drawn; captions."""
    plain, plain_pairs = goal.plain
    if not count:
        return plain, [pair.target for pair in plain_pairs]
    learned, pairs = goal.learned_at_least(count)
    half = max(len(plain), count)  # the fewer ones are repeated
    pictures = [plain[i % len(plain)] for i in range(half)]
    captions = [plain_pairs[i % len(plain)].target for i in range(half)]
    pictures += [learned[i % count] for i in range(half)]
    captions += [pairs[i % count].prompt for i in range(half)]
    return pictures, captions


# --- without text --------------------------------------------------------------------------------


def completion(model: Attacked) -> Iterator[Attempt]:
    """The unedited model makes the first steps, the edited one the rest (arXiv 2505.17013)."""
    goal = model.goal
    pipe = model.pipe
    with model.edited():
        weights = weights_now(pipe, model.changes)
    label = f"the edit of {model.edit.digest}" if isinstance(model.edit, Edit) else "no edit"
    sizes = [digest(value) for value in weights.values()]
    for step in model.options.at:

        def late(step: int = step) -> Any:
            return with_weights_from(pipe, weights, step, f"{label} {sizes}")

        yield Attempt(step, late, goal.prompts)


def noise(model: Attacked) -> Iterator[Attempt]:
    """Only the noise is sought: the best of so many seeds, by the prompts' own words."""
    yield Attempt(len(model.goal.seeds), model.edited, model.goal.prompts)


def inpaint(model: Attacked) -> Iterator[Attempt]:
    """The middle of a picture of the concept is made anew, the rest given (arXiv 2505.17013)."""
    goal = model.goal
    pictures = goal.pictures(goal.prompts)  # by the unedited model
    if goal.never_had is not None:
        pictures = goal.as_never_had(pictures)
    clean = latents_of(model.pipe, pictures)  # (pictures, channels, height, width)
    for percent in model.options.at:
        share = percent / 100
        yield Attempt(
            percent,
            model.within_edit(
                lambda share=share: filling(model.pipe, clean, share, model.options.seed)
            ),
            goal.prompts,
            view=cropped(share),
            is_stored=False,
        )


# --- what is asked for ---------------------------------------------------------------------------

HOLES = (50, 75)  # percent of a picture's sides
# Steps of training or search where nothing else is said.
STEPS = {"inversion": 200, "states": 100, "discrete": 20, "relearn": 100}
LEARNING = tuple(STEPS)  # kinds that learn from pictures
JUDGED_ON_THE_WAY = ("inversion", "states")  # after several numbers of steps


def steps_and_stops(
    pipe: Pipeline, kind: str, steps: int | None, at: Iterable[int] | None, of_picture: int
) -> tuple[int, tuple[int, ...]]:
    """How many steps a kind trains or searches, and after how many it is judged.

    Args:
        pipe: The pipeline.
        kind: The kind of attack.
        steps: As `attack` was asked for.
        at: As `attack` was asked for.
        of_picture: Denoising steps of a picture.

    Raises:
        LocogenError: Numbers that the kind has no use for, or that contradict each other.
    """
    count = STEPS.get(kind, 0) if steps is None else whole_number("steps", steps, 0)
    stops = None if at is None else tuple(sorted(set(whole_numbers("at", at))))
    if kind in ("completion", "inpaint"):
        return 0, _of_pictures(pipe, kind, stops, of_picture)
    if stops is not None:
        return _last_of(kind, stops, steps), stops
    # A model that is trained for no pictures is another one than the model itself.
    return count, (count,) if kind == "relearn" else tuple(sorted({0, count}))


def _of_pictures(
    pipe: Pipeline, kind: str, stops: tuple[int, ...] | None, of_picture: int
) -> tuple[int, ...]:
    """The first steps that a completion makes, or percents of the sides that a hole has."""
    if kind == "inpaint":
        # A smaller hole holds no latent: the picture itself would be judged.
        return _within(kind, stops or HOLES, smallest_hole(pipe), 100)
    quarters = tuple(sorted({of_picture * quarter // 4 for quarter in range(4)}))
    return _within(kind, stops or quarters, 0, of_picture - 1)


def _within(kind: str, stops: tuple[int, ...], least: int, most: int) -> tuple[int, ...]:
    if stops[0] < least or stops[-1] > most:
        what = "percent of the sides" if kind == "inpaint" else "steps of the picture"
        raise LocogenError(f"at is {stops}: of {kind!r} give {what}, from {least} up to {most}")
    return stops


def _last_of(kind: str, stops: tuple[int, ...], steps: int | None) -> int:
    """Training ends where it is judged last."""
    if kind not in JUDGED_ON_THE_WAY:
        judged = "by numbers of pictures=" if kind == "relearn" else "once"
        raise LocogenError(f"at is {stops}, and {kind!r} is judged {judged}: leave out at=")
    if steps is not None and steps != stops[-1]:
        raise LocogenError(
            f"steps is {steps}, and at is {stops}: training ends where it is judged last, so leave "
            f"out steps=, or let at= end with {steps}"
        )
    return stops[-1]


def check_goal(kind: str, goal: Goal, options: Options) -> None:
    """Raise `LocogenError` for what would fail in the middle, before anything is made."""
    never_had = goal.never_had
    if never_had is not None:
        for probe in goal.probes:
            never_had.probe(probe, goal.concept)
    if kind in _CHECKS:
        _CHECKS[kind](goal, options)


def check_words(goal: Goal, options: Options) -> None:
    """Prompts have a place for a token, and the words to begin with are not cut."""
    _check_places(goal)
    words = words_in(goal.concept, goal.concept.pairs[0].prompt)
    count = len(_ids(goal.pipe, words))
    if options.start == "own" and options.vectors < count:
        raise LocogenError(
            f"{words!r} is {count} tokens, and vectors is {options.vectors}: start='own' would "
            f"drop the rest, so give vectors={count}, or start='neighbors'"
        )


def _check_places(goal: Goal) -> None:
    for prompt in [*(pair.prompt for pair in goal.training), *goal.prompts]:
        words_in(goal.concept, prompt)


def _check_vocabulary(goal: Goal, options: Options) -> None:
    _check_places(goal)
    vocabulary = vocabulary_of(goal.pipe, options.vocabulary)
    if options.exhaustive:
        count_of(vocabulary, options.vectors)


def _check_counts(goal: Goal, options: Options) -> None:
    goal.check_count(max(options.pictures))


def _check_exchange(goal: Goal, options: Options) -> None:
    if goal.never_had is not None:
        goal.as_never_had(())


_CHECKS: dict[str, Callable[[Goal, Options], None]] = {
    "inversion": check_words,
    "discrete": _check_vocabulary,
    "relearn": _check_counts,
    "inpaint": _check_exchange,
}

# Kinds that look at what an edit changed in the weights: why nothing else can be attacked so.
OF_WEIGHTS = {
    "closed": "its matrices answer as they did, and nothing is to be solved for",
    "relearn": "it has nothing to learn again: whoever trains the weights can leave it out",
    "completion": "there are no edited weights for the later steps",
}

KINDS: dict[str, Callable[[Attacked], Iterator[Attempt]]] = {
    "inversion": inversion,
    "states": states,
    "closed": closed,
    "discrete": discrete,
    "relearn": relearn,
    "completion": completion,
    "noise": noise,
    "inpaint": inpaint,
}
