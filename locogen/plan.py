"""An experiment as data: which prompt does each layer hear, under which seed. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from locogen.errors import LocogenError

Kind = Literal["style", "object", "fact"]
KINDS: tuple[Kind, ...] = ("style", "object", "fact")
Role = Literal["baseline", "window", "ceiling", "placebo", "insert", "timesteps"]
Pooled = Literal["keep", "target"]

_OPENINGS = (
    ("a picture of ", "an image of "),
    ("a photo of ", "a picture of "),
    ("an image of ", "a picture of "),
)


def sign_of(kind: str) -> int:
    """+1 where windows that carry the concept raise the score (facts), -1 where they lower it."""
    return 1 if kind == "fact" else -1


def paraphrase(prompt: str, target: str = "") -> str:
    """The same prompt in other words, for the placebo: its opening exchanged, or one put in front; never the target."""
    texts = []
    for opening, other in _OPENINGS:
        if prompt.lower().startswith(opening):
            texts.append(other + prompt[len(opening) :])
    texts += [f"an image of {prompt}", f"one image of {prompt}"]
    return next(text for text in texts if text != target)


@dataclass(frozen=True)
class PromptPair:
    """A prompt that holds the concept and the target with it removed (style, object) or updated (fact).

    The target may be empty (""), for layers that hear nothing of the prompt. `text` is what the pair's pictures are
    scored against; None leaves it to the concept. `placebo` is a paraphrase of the prompt that keeps the concept;
    None derives one. Raises `LocogenError` when another text is empty or prompt and target are equal.
    """

    prompt: str
    target: str
    text: str | None = None
    placebo: str | None = None

    def __post_init__(self) -> None:
        for field in ("prompt", "target", "text", "placebo"):
            self._check_text(field)
        if self.prompt.split() == self.target.split():
            raise LocogenError(
                f"prompt and target are both {self.prompt!r}: a target leaves the concept out"
            )
        if self.placebo in (self.prompt, self.target):
            raise LocogenError(
                f"the placebo {self.placebo!r} is the pair's own: a placebo says the prompt otherwise"
            )

    def _check_text(self, field: str) -> None:
        value = getattr(self, field)
        if value is None and field in ("text", "placebo"):
            return
        if value == "" and field == "target":
            return
        if not isinstance(value, str) or not value.strip():
            remedy = "give it a text, or '' for nothing" if field == "target" else "give it a text"
            raise LocogenError(f"a prompt pair's {field} is {value!r}: {remedy}")


@dataclass(frozen=True)
class Concept:
    """What is looked for: a style, an object or a fact, with the prompt pairs that show it.

    The text that a pair's pictures are scored against is the pair's `text`, else the concept's, else the paper's
    choice: the prompt for styles and objects, the target for facts (Basu et al. 2024, section 4). `answer`: what a
    fact's prompts show, such as "barack obama", in the place of the words that ask for it.
    """

    name: str
    kind: Kind
    pairs: tuple[PromptPair, ...]
    text: str | None = None
    answer: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise LocogenError(f"a concept is named {self.name!r}: give it a name")
        if self.kind not in KINDS:
            raise LocogenError(
                f"concept {self.name!r} is of kind {self.kind!r}: take one of {', '.join(KINDS)}"
            )
        object.__setattr__(self, "pairs", tuple(self.pairs))
        if not self.pairs:
            raise LocogenError(f"concept {self.name!r} has no prompt pairs: give it at least one")
        if self.kind == "fact":
            for pair in self.pairs:
                self._check_answer(pair)
        prompts = [pair.prompt for pair in self.pairs]
        twice = next((p for p in prompts if prompts.count(p) > 1), None)
        if twice:
            raise LocogenError(
                f"concept {self.name!r} has the prompt {twice!r} twice: each prompt counts once"
            )

    def _check_answer(self, pair: PromptPair) -> None:
        text = self.scored_text(pair)
        if text == pair.prompt:
            raise LocogenError(
                f"fact {self.name!r} is scored against its prompt {text!r}: a fact's text names the new answer"
            )
        if not text:
            raise LocogenError(
                f"fact {self.name!r} has an empty target for {pair.prompt!r}, and no text to score its pictures "
                "against: give text=, which names the new answer"
            )

    def scored_text(self, pair: PromptPair) -> str:
        """What the pair's pictures are scored against."""
        return pair.text or self.text or (pair.target if self.kind == "fact" else pair.prompt)

    def content_text(self, pair: PromptPair) -> str | None:
        """What should stay when a style or an object goes: the target. None for a fact, and where the target is empty.

        A fact replaces its content, and an empty target says of nothing that it should stay.
        """
        return None if self.kind == "fact" else pair.target or None

    @property
    def sign(self) -> int:
        """+1 where the concept's own windows raise the score (facts), -1 where they lower it."""
        return sign_of(self.kind)


@dataclass(frozen=True)
class Intervention:
    """One picture to make: the layers in `layers` hear `target`, the rest hear `prompt`; `()` is the baseline.

    Layers are 0-based in execution order. `timesteps`: the first and the last denoising step, counted from 0, at which
    they hear it; None: all. `pooled`: what is heard beside the layers, where the model has such a path (SD-XL, IF,
    SD 3, FLUX): "keep", the prompt's, or "target", the target's at the same steps. `role`, `start` and `width` say
    what the row is for; they do not change the picture.
    """

    prompt: str
    target: str
    layers: tuple[int, ...] = ()
    seed: int = 0
    role: Role = "window"
    start: int | None = None
    width: int | None = None
    timesteps: tuple[int, int] | None = None
    pooled: Pooled = "keep"

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(int(i) for i in self.layers))
        object.__setattr__(self, "seed", int(self.seed))
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", _span(self.timesteps))
        if self.pooled not in ("keep", "target"):
            raise LocogenError(f"pooled is {self.pooled!r}: take 'keep' or 'target'")
        for field in ("prompt", "target"):
            if not isinstance(getattr(self, field), str):
                raise LocogenError(
                    f"an intervention's {field} is {getattr(self, field)!r}: give it a text"
                )

    @property
    def is_plain(self) -> bool:
        """Whether the picture is the prompt's own, whatever the target."""
        return not self.layers and self.pooled == "keep"


def _span(given: Any) -> tuple[int, int]:
    try:
        first, last = (int(step) for step in given)
    except (TypeError, ValueError):
        first, last = 0, -1
    if not 0 <= first <= last:
        raise LocogenError(
            f"timesteps is {given!r}: give the first and the last denoising step, counted from 0"
        )
    return first, last


def missing_target_runs(plan: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """The targets' own runs that a plan lacks, each once: baselines of the targets, under the same seeds."""
    present = {(row.prompt, row.seed) for row in plan if row.is_plain}
    needed = dict.fromkeys((row.target, row.seed) for row in plan if not row.is_plain)
    return tuple(
        Intervention(text, text, (), seed, "baseline")
        for text, seed in needed
        if (text, seed) not in present
    )


def with_target_runs(plan: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """Add the targets' own runs that SD 3 and FLUX need in the same batch.

    In these models text changes from block to block, so that a layer takes the target from a run of the target
    itself. Other families encode the target instead and need no such rows.

    Args:
        plan: The rows. Of those that replace anything, the target's own run is a plain row (no layers) whose prompt
            is the target, under the same seed.

    Returns:
        The plan, and behind it the runs that it lacks, each once.

    Example:
        >>> plan = [Intervention("a red house", "a house", (3, 4), seed=7)]
        >>> [(row.prompt, row.layers, row.seed) for row in with_target_runs(plan)]
        [('a red house', (3, 4), 7), ('a house', (), 7)]
    """
    return (*plan, *missing_target_runs(plan))


with_riders = with_target_runs  # its name until now


@dataclass(frozen=True)
class Window:
    """`width` neighboring layers from `start`; with `start=None` there is no single window, and `reason` says why.

    Iterates over its layers, none where there is no window.
    """

    start: int | None
    width: int
    reason: str = ""

    def __iter__(self) -> Iterator[int]:
        return iter(() if self.start is None else range(self.start, self.start + self.width))

    def __len__(self) -> int:
        return 0 if self.start is None else self.width

    def __str__(self) -> str:
        if self.start is None:
            return f"no single window ({self.reason})" if self.reason else "no single window"
        return f"layers {self.label}" if self.width > 1 else f"layer {self.label}"

    @property
    def label(self) -> str:
        """The layers in short, `8-9` or `8`; empty where there is no window."""
        if self.start is None:
            return ""
        if self.width == 1:
            return f"{self.start}"
        return f"{self.start}-{self.start + self.width - 1}"


@dataclass(frozen=True)
class Settings:
    """How pictures are made: denoising steps, guidance scale and rows a batch (the last one is padded)."""

    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    batch_size: int = 32

    def __post_init__(self) -> None:
        for field in ("num_inference_steps", "batch_size"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LocogenError(f"{field} is {value!r}: give it a whole number from 1 up")
        if not self.guidance_scale >= 0:
            raise LocogenError(
                f"guidance_scale is {self.guidance_scale!r}: give it a number from 0 up (1 is off)"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the store's `run-….json` and the tables."""
        return asdict(self)


def windows(n_layers: int, window: int) -> tuple[Window, ...]:
    """All `n_layers - window + 1` windows (the paper's text; its pseudo-code loops one too few)."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise LocogenError(f"window is {window!r}: give the number of layers, from 1 up")
    if window > n_layers:
        raise LocogenError(
            f"a window of {window} layers does not fit a model of {n_layers}: take at most {n_layers}"
        )
    return tuple(Window(start, window) for start in range(n_layers - window + 1))


def sweep(
    concept: Concept,
    *,
    n_layers: int,
    window: int = 2,
    seeds: Iterable[int],
    controls: bool = True,
    timesteps: Iterable[tuple[int, int]] = (),
    pooled: Pooled = "keep",
) -> tuple[Intervention, ...]:
    """Every row of LocoGen's experiment on one concept, prompt by prompt and seed by seed.

    With `controls`: the baseline, the ceiling (all layers hear the target), the placebo (all layers hear a
    paraphrase) and, beside each window, its insert (only the window hears the prompt): `2 W + 3` rows a prompt and
    seed. Without: the baseline and the `W` windows. `timesteps`: spans (first, last) of denoising steps, counted from
    0; each window is then also made with its target heard at each span alone (role "timesteps"), `W` rows a span.
    `pooled`: see `Intervention`; for every row but the baseline.
    """
    places = windows(n_layers, window)
    spans = tuple(dict.fromkeys(_span(given) for given in timesteps))
    drawn = distinct_seeds(seeds)
    found = (
        r
        for pair in concept.pairs
        for seed in drawn
        for r in _rows(pair, seed, places, n_layers, controls, spans)
    )
    return tuple(row if row.role == "baseline" else replace(row, pooled=pooled) for row in found)


def distinct_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    """The seeds as a tuple; raises `LocogenError` when there are none or one comes twice."""
    try:
        drawn = tuple(int(seed) for seed in seeds)
    except TypeError:
        raise LocogenError(
            f"seeds is {seeds!r}: give several whole numbers, such as range(4)"
        ) from None
    if not drawn:
        raise LocogenError("there are no seeds: give at least one, such as seeds=range(4)")
    if len(set(drawn)) < len(drawn):
        raise LocogenError(f"seeds {drawn} has one twice: it would count the same picture twice")
    return drawn


def _rows(
    pair: PromptPair,
    seed: int,
    places: Sequence[Window],
    n_layers: int,
    controls: bool,
    spans: Sequence[tuple[int, int]],
) -> Iterator[Intervention]:
    every = tuple(range(n_layers))
    prompt, target = pair.prompt, pair.target
    yield Intervention(prompt, target, (), seed, "baseline")
    for place in places:
        yield Intervention(prompt, target, tuple(place), seed, "window", place.start, place.width)
    for span in spans:
        for place in places:
            yield Intervention(
                prompt, target, tuple(place), seed, "timesteps", place.start, place.width, span
            )
    if not controls:
        return
    for place in places:
        rest = tuple(i for i in every if i not in tuple(place))
        yield Intervention(prompt, target, rest, seed, "insert", place.start, place.width)
    yield Intervention(prompt, target, every, seed, "ceiling")
    yield Intervention(prompt, pair.placebo or paraphrase(prompt, target), every, seed, "placebo")
