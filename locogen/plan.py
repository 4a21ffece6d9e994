"""An experiment as data: which prompt does each layer get, under which seed.

Standard library only.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Real
from typing import Any, Literal

from locogen.errors import LocogenError, unknown

Kind = Literal["style", "object", "fact"]
KINDS: tuple[Kind, ...] = ("style", "object", "fact")
Role = Literal["baseline", "window", "ceiling", "placebo", "insert", "timesteps"]
Pooled = Literal["keep", "target"]

# `4`, or `0-1`, with spaces where people put them.
_LAYER_SPAN = re.compile(r"(?P<first>\d+)(\s*-\s*(?P<last>\d+))?")

# Openings of a prompt, and the one that takes its place in the placebo.
_OPENINGS = (
    ("a picture of ", "an image of "),
    ("a photo of ", "a picture of "),
    ("an image of ", "a picture of "),
)


_OPTIONAL_TEXTS = ("text", "placebo", "content")  # of a prompt pair
# Words that say nothing where what they lead to is gone: "a dog in the style of".
_DANGLING = frozenset(
    ("a", "an", "the", "in", "of", "by", "as", "on", "at", "with", "like", "style")
)


def sign_of(kind: str) -> int:
    """+1 where windows that carry the concept raise the score (facts), -1 where they lower it."""
    return 1 if kind == "fact" else -1


def paraphrase(prompt: str, target: str = "") -> str:
    """The same prompt in other words, for the placebo; never the target.

    Its opening is exchanged, or one is put in front.
    """
    texts = []
    for opening, other in _OPENINGS:
        if prompt.lower().startswith(opening):
            texts.append(other + prompt[len(opening) :])
    # Two more, for the first of them may be the target.
    texts += [f"an image of {prompt}", f"one image of {prompt}"]
    return next(text for text in texts if text != target)


def common_content(prompt: str, target: str) -> str | None:
    """What a prompt and its target both say; None where they have nothing in common.

    >>> common_content("a dog in the style of neon", "a dog")
    'a dog'
    >>> common_content("a dog in the style of neon", "a dog in the style of pop art")
    'a dog'
    """
    words = prompt.split()
    others = target.split()
    left = iter(words)
    only_leaves_out = all(word in left for word in others)  # in order: `in` moves `left` on
    if only_leaves_out:
        return target or None

    # The target puts something else in the concept's place, and that should come, not stay.
    before = _shared(words, others)
    rest = len(before)
    after = _shared(words[rest:][::-1], others[rest:][::-1])[::-1]
    while before and before[-1].lower() in _DANGLING:
        before.pop()
    if all(word.lower() in _DANGLING for word in after):  # "in neon style"
        after = []
    return " ".join([*before, *after]).rstrip(" ,;") or None


def _shared(words: Sequence[str], others: Sequence[str]) -> list[str]:
    """The words with which both begin."""
    count = 0
    for word, other in zip(words, others, strict=False):
        if word.lower() != other.lower():
            break
        count += 1
    return list(words[:count])


def _names(names: Iterable[str], owner: str) -> tuple[str, ...]:
    """Neighbors as a tuple; raises `LocogenError` where one is no text."""
    if isinstance(names, str):
        raise LocogenError(f"the neighbors of {owner} are {names!r}: give a list of texts")
    checked = tuple(names)
    for name in checked:
        if not isinstance(name, str) or not name.strip():
            raise LocogenError(f"a neighbor of {owner} is {name!r}: give it a text")
    return checked


@dataclass(frozen=True)
class PromptPair:
    """A prompt that holds the concept, and a target in which it is removed or updated.

    Attributes:
        prompt: A prompt that holds the concept.
        target: The same without the concept (style, object), or with the new answer (fact). Empty
            (""): the layers get an empty prompt.
        text: What the pair's pictures are scored against; None leaves it to the concept.
        placebo: A paraphrase of the prompt that keeps the concept; None derives one.
        neighbors: Texts that say what else the picture could show, in the place of `text`; see
            `Concept`. Only where a text cannot be had by exchanging the concept's name.
        content: What should stay when the concept goes; None: the words that prompt and target
            have in common.

    Raises:
        LocogenError: If another text is empty, or prompt and target are equal.

    Example:
        >>> pair = PromptPair("a house in the style of van gogh", "a house")
        >>> pair.target
        'a house'
    """

    prompt: str
    target: str
    text: str | None = None
    placebo: str | None = None
    neighbors: tuple[str, ...] = ()
    content: str | None = None

    def __post_init__(self) -> None:
        for field in ("prompt", "target", *_OPTIONAL_TEXTS):
            self._check_text(field)
        object.__setattr__(self, "neighbors", _names(self.neighbors, "a prompt pair"))
        # White space makes no difference to a text encoder.
        if self.prompt.split() == self.target.split():
            raise LocogenError(
                f"prompt and target are both {self.prompt!r}: a target leaves the concept out"
            )
        if self.placebo in (self.prompt, self.target):
            raise LocogenError(
                f"the placebo {self.placebo!r} is the prompt or the target: "
                "give a paraphrase of the prompt"
            )

    def _repr_html_(self) -> str:
        from locogen import markup

        facts = {"scored against": self.text, "placebo": self.placebo, "content": self.content}
        facts["neighbors"] = ", ".join(self.neighbors)
        facts = {label: value for label, value in facts.items() if value}
        return markup.shown("pair", prompt=self.prompt, target=self.target, facts=facts)

    def _check_text(self, field: str) -> None:
        value = getattr(self, field)
        is_optional = field in _OPTIONAL_TEXTS
        may_be_empty = field == "target"
        if value is None and is_optional:
            return
        if value == "" and may_be_empty:
            return
        if isinstance(value, str) and value.strip():
            return

        remedy = "give it a text"
        if may_be_empty:
            remedy += ", or '' for nothing"
        raise LocogenError(f"a prompt pair's {field} is {value!r}: {remedy}")


@dataclass(frozen=True)
class Concept:
    """What is looked for: a style, an object or a fact, with the prompt pairs that show it.

    Attributes:
        name: The concept in words, such as "van gogh".
        kind: "style", "object" or "fact".
        pairs: The prompts, each with its target; at least one.
        text: What pictures are scored against where a pair has no `text` itself. None: the paper's
            choice, the prompt for styles and objects, the target for facts (Basu et al. 2024,
            section 4).
        answer: What a fact's prompts show, such as "barack obama", for "the president of the us".
        neighbors: What a picture could show in the concept's place: other styles, other objects,
            other answers ("a dog"). They turn the score into a probability: is it still neon,
            rather than one of these? The prompt's own name among them is left out, and a style's
            target ("no style") and a fact's old answer are always added.

    Raises:
        LocogenError: For an empty name, another kind, no pairs, a prompt that comes twice, or a
            fact that is not scored against a new answer.

    Example:
        >>> things = ("a cat", "a dog")
        >>> pairs = [PromptPair(f"{thing} in the style of van gogh", thing) for thing in things]
        >>> concept = Concept("van gogh", "style", pairs)
        >>> concept.scored_text(concept.pairs[0])
        'a cat in the style of van gogh'
        >>> len(concept.first(1).pairs)
        1
    """

    name: str
    kind: Kind
    pairs: tuple[PromptPair, ...]
    text: str | None = None
    answer: str | None = None
    neighbors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise LocogenError(f"a concept is named {self.name!r}: give it a name")
        if self.kind not in KINDS:
            raise LocogenError(
                f"concept {self.name!r} is of kind {self.kind!r}: use one of {', '.join(KINDS)}"
            )
        # Lists are welcome, but a frozen concept holds nothing that can be changed.
        object.__setattr__(self, "pairs", tuple(self.pairs))
        object.__setattr__(self, "neighbors", _names(self.neighbors, f"concept {self.name!r}"))
        if not self.pairs:
            raise LocogenError(f"concept {self.name!r} has no prompt pairs: give it at least one")
        if self.kind == "fact":
            for pair in self.pairs:
                self._check_answer(pair)
        prompts = [pair.prompt for pair in self.pairs]
        if len(set(prompts)) < len(prompts):
            repeated = max(prompts, key=prompts.count)
            raise LocogenError(
                f"concept {self.name!r} has the prompt {repeated!r} twice: each prompt counts once"
            )

    def _check_answer(self, pair: PromptPair) -> None:
        text = self.scored_text(pair)
        # A scorer that does not know the fact cannot tell its old answer from the new one.
        if text == pair.prompt:
            raise LocogenError(
                f"fact {self.name!r} is scored against its prompt {text!r}: "
                "a fact's text names the new answer"
            )
        if not text:
            raise LocogenError(
                f"fact {self.name!r} has an empty target for {pair.prompt!r}, and no text to score "
                "its pictures against: give text=, which names the new answer"
            )

    def _repr_html_(self) -> str:
        from locogen import markup

        pairs = [
            {"prompt": pair.prompt, "target": pair.target, "text": self.scored_text(pair)}
            for pair in self.pairs
        ]
        return markup.shown(
            "concept",
            name=self.name,
            sort=self.kind,
            text=self.text,
            neighbors=self.neighbors,
            pairs=pairs,
        )

    def first(self, n: int, after: int = 0) -> Concept:
        """The concept with fewer prompts: `n` pairs behind the first `after`; 0: all of them."""
        end = after + n if n else None
        return replace(self, pairs=self.pairs[after:end])

    def halves(self, prompts: int) -> tuple[Concept, Concept]:
        """Split the prompts into some to choose on, and as many others to report on.

        Args:
            prompts: The number of prompts of each half.

        Returns:
            The concept with its first prompts, and with those that follow.

        Raises:
            LocogenError: For fewer than one, or where not as many others are left.

        Example:
            >>> pairs = [PromptPair(f"{thing} in neon", thing) for thing in ("a cat", "a dog")]
            >>> choosing, reporting = Concept("neon", "style", pairs).halves(1)
            >>> reporting.pairs[0].prompt
            'a dog in neon'
        """
        if prompts < 1:
            raise LocogenError(
                f"prompts is {prompts}: give a number from 1 up, to choose on and, of others, to "
                "report on"
            )
        count = len(self.pairs)
        if 2 * prompts > count:
            remedy = f"use at most {count // 2}, or give it more" if count > 1 else "give it more"
            prompts_in_all = "1 prompt" if count == 1 else f"{count} prompts"
            raise LocogenError(
                f"prompts is {prompts}: as many others should be left to report on, and concept "
                f"{self.name!r} has {prompts_in_all} in all: {remedy}"
            )
        return self.split(prompts, prompts)

    def split(self, choosing: int, reporting: int) -> tuple[Concept, Concept]:
        """Split the prompts into some to choose on, and others to report on.

        Args:
            choosing: The number of prompts to choose on; 0: none is set apart, both are the same.
            reporting: The number of prompts to report on, or as many as are left; 0: all others.

        Returns:
            The concept with its first prompts, and with those that follow.

        Raises:
            LocogenError: For fewer than none, or where no prompt is left to report on.

        Example:
            >>> pairs = [PromptPair(f"{thing} in neon", thing) for thing in ("a cat", "a dog")]
            >>> choosing, reporting = Concept("neon", "style", pairs).split(1, 8)
            >>> reporting.pairs[0].prompt
            'a dog in neon'
        """
        if choosing < 0 or reporting < 0:
            raise LocogenError(
                f"{choosing} prompts to choose on and {reporting} to report on: give numbers from "
                "0 up"
            )
        if choosing >= len(self.pairs):
            raise LocogenError(
                f"{choosing} prompts to choose on leave none to report on, of the "
                f"{len(self.pairs)} of concept {self.name!r}: choose on fewer, or give it more"
            )
        reported = self.first(reporting, after=choosing)
        return (self.first(choosing) if choosing else reported), reported

    def scored_text(self, pair: PromptPair) -> str:
        """What the pair's pictures are scored against."""
        explicit = pair.text or self.text
        if explicit:
            return explicit
        # The picture of a fact should come to show the target's answer; a style or an object
        # should go, so its own prompt fits less and less.
        if self.kind == "fact":
            return pair.target
        return pair.prompt

    def content_text(self, pair: PromptPair) -> str | None:
        """What should stay when a style or an object goes: what prompt and target share."""
        # A fact replaces its content.
        if self.kind == "fact":
            return None
        return pair.content or common_content(pair.prompt, pair.target)

    @property
    def sign(self) -> int:
        """+1 where the concept's windows raise the score (facts), -1 where they lower it."""
        return sign_of(self.kind)


@dataclass(frozen=True)
class Intervention:
    """One picture to make: some layers get the target, all others the prompt.

    Attributes:
        prompt: The prompt of the picture.
        target: What `layers` get in its place.
        layers: Indices of layers, from 0 in execution order; () is the baseline.
        seed: Of the picture's initial noise.
        role: What the row is for; like `start` and `width`, it does not change the picture.
        start: The first layer of the row's window.
        width: The number of layers in the row's window.
        timesteps: The first and the last denoising step, from 0, at which the layers get the
            target; None: all steps.
        pooled: The prompt whose pooled embedding is used, where a model has one (SD-XL, IF, SD 3,
            FLUX): "keep", the prompt's, or "target", the target's at the same steps.

    Raises:
        LocogenError: For a text or span of steps that is none, or another word for `pooled`.

    Example:
        >>> row = Intervention("a cat in van gogh style", "a cat", layers=(8, 9), seed=1)
        >>> row.is_plain
        False
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
        # Layers and seeds often come from NumPy: as plain numbers they can be stored and compared.
        object.__setattr__(self, "layers", tuple(int(i) for i in self.layers))
        object.__setattr__(self, "seed", int(self.seed))
        if self.timesteps is not None:
            object.__setattr__(self, "timesteps", _span(self.timesteps))
        if self.pooled not in ("keep", "target"):
            raise LocogenError(f"pooled is {self.pooled!r}: use 'keep' or 'target'")
        for field in ("prompt", "target"):
            if not isinstance(getattr(self, field), str):
                raise LocogenError(
                    f"an intervention's {field} is {getattr(self, field)!r}: give it a text"
                )

    @property
    def is_plain(self) -> bool:
        """Whether the picture is that of the prompt alone, whatever the target."""
        return not self.layers and self.pooled == "keep"


def _span(steps: Any) -> tuple[int, int]:
    """A span of denoising steps, checked."""
    problem = LocogenError(
        f"timesteps is {steps!r}: give the first and the last denoising step, counted from 0"
    )
    try:
        first, last = (int(step) for step in steps)
    except (TypeError, ValueError):
        raise problem from None
    if not 0 <= first <= last:
        raise problem
    return first, last


def missing_target_runs(plan: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """The targets' own runs that a plan lacks, each once: baselines, under the same seeds."""
    # SD 3 and FLUX change the text from layer to layer, and together with the picture. So what a
    # layer would get of the target is known only in a run of the target itself, in the same batch.
    present = {(row.prompt, row.seed) for row in plan if row.is_plain}
    missing: dict[tuple[str, int], Intervention] = {}
    for row in plan:
        run = (row.target, row.seed)
        if not row.is_plain and run not in present:
            missing[run] = Intervention(row.target, row.target, (), row.seed, "baseline")
    return tuple(missing.values())


def with_target_runs(plan: Sequence[Intervention]) -> tuple[Intervention, ...]:
    """Append the runs of the targets that SD 3 and FLUX need in the same batch.

    Args:
        plan: The rows of an experiment.

    Returns:
        The plan, and behind it the baseline of each target and seed that it lacks. Other families
        of models do not need these rows, and their pictures stay the same.

    Example:
        >>> row = Intervention("a cat in van gogh style", "a cat", layers=(8,))
        >>> [each.prompt for each in with_target_runs([row])]
        ['a cat in van gogh style', 'a cat']
    """
    return (*plan, *missing_target_runs(plan))


with_riders = with_target_runs  # its name until now


@dataclass(frozen=True)
class Window:
    """Neighboring layers; iterates over their indices.

    Attributes:
        start: The first layer, from 0 in execution order; None: no single window, and no layers.
        width: The number of layers.
        reason: Why it is this window, or why there is none.

    Example:
        >>> list(Window(8, 2))
        [8, 9]
        >>> print(Window(8, 2), "or", Window(None, 2, "no effect"))
        layers 8-9 or no single window (no effect)
    """

    start: int | None
    width: int
    reason: str = ""

    @classmethod
    def of(cls, layers: Sequence[int]) -> Window:
        """The window of these layers; one without layers where they are not neighbors in order."""
        start = layers[0] if layers else None
        if start is None or list(layers) != list(range(start, start + len(layers))):
            return cls(None, 1, "these layers are not neighbors")
        return cls(start, len(layers))

    def __iter__(self) -> Iterator[int]:
        return iter(() if self.start is None else range(self.start, self.start + self.width))

    def __len__(self) -> int:
        return 0 if self.start is None else self.width

    def __str__(self) -> str:
        if self.start is None:
            why = f" ({self.reason})" if self.reason else ""
            return f"no single window{why}"
        noun = "layers" if self.width > 1 else "layer"
        return f"{noun} {self.label}"

    def _repr_html_(self) -> str:
        from locogen import markup

        return markup.shown("window", title=type(self).__name__, text=str(self), reason=self.reason)

    @property
    def label(self) -> str:
        """The layers in short, `8-9` or `8`; empty where there is no window."""
        if self.start is None:
            return ""
        if self.width == 1:
            return f"{self.start}"
        return f"{self.start}-{self.start + self.width - 1}"


def one_concept(concept: object) -> Concept:
    """The concept itself, of what a verb was given for one.

    Raises:
        LocogenError: It is a concept's name, several concepts, or something else.
    """
    if isinstance(concept, Concept):
        return concept
    what = repr(concept) if isinstance(concept, str) else f"a {type(concept).__name__}"
    raise LocogenError(f'concept is {what}: give one Concept, as from concept("mini/neon")')


def listed(places: Iterable[object]) -> str:
    """Places, or names, in words.

    >>> listed([Window(0, 2), Window(5, 1), Window(12, 2)])
    'layers 0-1, layer 5 and layers 12-13'
    """
    names = [str(place) for place in places]
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


VERDICT_KINDS = (
    *("one place", "each necessary", "each sufficient"),
    *("spread", "nobody", "inconclusive"),
)
VerdictKind = Literal[
    "one place", "each necessary", "each sufficient", "spread", "nobody", "inconclusive"
]


@dataclass(frozen=True)
class Verdict(Window):
    """Where a concept is: an answer of a named kind. As a `Window`, it is its one place.

    Attributes:
        kind: "one place": the picture needs it, and no other place. "each necessary": several
            places, and the picture needs each. "each sufficient": each of several places alone
            brings the concept. "spread": no place alone decides. "nobody": no layer hears the
            concept. "inconclusive": more pictures are needed; the reason says how many.
        places: The windows that it speaks of.
        evidence: What it rests on, a table with one row a question and place; see `carrier`.

    Example:
        >>> both = (Window(0, 2), Window(12, 2))
        >>> verdict = Verdict(None, 2, "each suffices", kind="each sufficient", places=both)
        >>> print(verdict, list(verdict))
        layers 0-1 and layers 12-13, each sufficient []
    """

    kind: VerdictKind = "inconclusive"
    places: tuple[Window, ...] = ()
    evidence: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        places = listed(self.places)
        why = f" ({self.reason})" if self.reason else ""
        words = {
            "one place": places,
            "each necessary": f"{places}, each necessary",
            "each sufficient": f"{places}, each sufficient",
            "spread": f"spread over {places or 'the layers'}",
            "nobody": "nobody hears it",
            "inconclusive": "inconclusive",
        }
        # A place says all; where there is none, the reason is the answer.
        return words[self.kind] if self.kind in _NAMES_PLACES else f"{words[self.kind]}{why}"


# Kinds of verdicts whose places are the answer.
_NAMES_PLACES = ("one place", "each necessary", "each sufficient")


@dataclass(frozen=True)
class Settings:
    """How pictures are made.

    Attributes:
        num_inference_steps: Denoising steps.
        guidance_scale: How strongly pictures follow the prompt; 1 is off.
        batch_size: Pictures in a batch; the last batch is padded.

    Raises:
        LocogenError: For a number out of range.

    Example:
        >>> Settings(num_inference_steps=50).as_dict()
        {'num_inference_steps': 50, 'guidance_scale': 7.5, 'batch_size': 32}
    """

    num_inference_steps: int = 20
    guidance_scale: float = 7.5
    batch_size: int = 32

    def __post_init__(self) -> None:
        for field in ("num_inference_steps", "batch_size"):
            value = getattr(self, field)
            # True counts as 1 in Python; here it is a mistake.
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise LocogenError(f"{field} is {value!r}: give it a whole number from 1 up")
        if not self.guidance_scale >= 0:
            raise LocogenError(
                f"guidance_scale is {self.guidance_scale!r}: give it a number from 0 up (1 is off)"
            )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the store's `run-….json` and the tables."""
        return asdict(self)


def settings_from(verb: str, settings: Mapping[str, Any]) -> Settings:
    """How pictures are made, of what a verb was given besides its own arguments.

    Args:
        verb: Who was asked, for the error.
        settings: By name; NumPy's numbers become Python's.

    Raises:
        LocogenError: For a setting that pictures do not have, or a number out of range.

    Example:
        >>> settings_from("evaluate", {"batch_size": 4}).batch_size
        4
    """
    names = [field.name for field in fields(Settings)]
    for name in settings:
        if name not in names:
            raise unknown(f"setting of {verb}", name, names)
    guidance = settings.get("guidance_scale", 0)
    if isinstance(guidance, bool) or not isinstance(guidance, Real):
        raise LocogenError(f"guidance_scale is {guidance!r}: give it a number from 0 up (1 is off)")
    return Settings(**{name: _plain_number(value) for name, value in settings.items()})


def _plain_number(value: Any) -> Any:
    """NumPy's numbers as Python's, for files; anything else as it is."""
    item = getattr(value, "item", None)
    return item() if item is not None and isinstance(value, Real) else value


def parse_layers(text: str | int) -> tuple[int, ...]:
    """Read layers as people write them.

    Args:
        text: Indices and ranges, separated by commas, such as "0-1,4"; or one index.

    Returns:
        The indices, in the order of the text; the ends of a range belong to it.

    Raises:
        LocogenError: For anything else, an empty range included.

    Example:
        >>> parse_layers("0-1,4")
        (0, 1, 4)
    """
    layers: list[int] = []
    for part in str(text).split(","):
        span = _LAYER_SPAN.fullmatch(part.strip())
        if span is None:
            raise _not_layers(text)
        first = int(span["first"])
        # A single index is a range from itself to itself.
        last = int(span["last"] or first)
        if first > last:
            raise _not_layers(text)
        layers += range(first, last + 1)
    return tuple(layers)


def _not_layers(text: str | int) -> LocogenError:
    return LocogenError(f"layers is {text!r}: write indices and ranges, such as 0-1,4")


def parse_numbers(
    text: str,
    name: str,
    *,
    whole: bool = False,
    most: float = math.inf,
    below: tuple[str, float] | None = None,
) -> tuple[float, ...]:
    """Read numbers as people write them in a notebook's parameter.

    Args:
        text: Numbers above 0, separated by commas, such as "0.01, 0.1".
        name: The parameter's, for the error.
        whole: Whether only whole numbers will do.
        most: The largest that will do.
        below: Name and value of another parameter, which all numbers have to stay below.

    Returns:
        The numbers, in the order of the text, none twice.

    Raises:
        LocogenError: For anything else; it names the parameter and its value.

    Example:
        >>> parse_numbers("0.01, 0.1", "ridges"), parse_numbers("4, 8", "steps", whole=True)
        ((0.01, 0.1), (4, 8))
    """
    numbers = _positive_numbers(text, int if whole else float, most)
    if not numbers:
        noun, example = ("whole numbers", "4, 8, 20") if whole else ("numbers", "0.5, 1, 10")
        upper = "" if most == math.inf else f" and up to {most:g}"
        raise LocogenError(
            f"{name} is {text!r}: write {noun} above 0{upper}, separated by commas, "
            f"such as {example}"
        )
    if below is not None and max(numbers) >= below[1]:
        raise LocogenError(f"{name} is {text!r}: give numbers below {below[1]}, the {below[0]}")
    return tuple(dict.fromkeys(numbers))


def _positive_numbers(text: str, number_of: type[float], most: float) -> list[float]:
    """Finite numbers above 0 and up to another; none where one of them is anything else."""
    try:
        numbers = [number_of(part) for part in str(text).split(",")]
    except ValueError:
        return []
    # A comparison with NaN is false.
    are_all = all(0 < number <= most and number < math.inf for number in numbers)
    return numbers if are_all else []


def parse_names(text: str, name: str, choices: Iterable[str]) -> tuple[str, ...]:
    """Read names as people write them in a notebook's parameter.

    Args:
        text: Names, separated by commas; one of the choices may have a comma itself.
        name: The parameter's, for the error.
        choices: All names that there are.

    Returns:
        The names, in the order of the text, none twice; none for an empty text.

    Raises:
        LocogenError: For an unknown name, or a text of spaces and commas alone; it names the
            parameter and its value.

    Example:
        >>> parse_names("UCE, LocoEdit, preserved", "editors", ["LocoEdit, preserved", "UCE"])
        ('UCE', 'LocoEdit, preserved')
    """
    names_there_are = tuple(choices)
    parts = [part.strip() for part in str(text).split(",") if part.strip()]
    if text and not parts:
        raise LocogenError(
            f"{name} is {text!r}: write names, separated by commas, or leave it empty"
        )
    names: list[str] = []
    while parts:
        # The longest name first: "LocoEdit" is the beginning of another one.
        lengths = [n for n in range(len(parts), 0, -1) if ", ".join(parts[:n]) in names_there_are]
        if not lengths:
            raise LocogenError(f"{name} is {text!r}: {unknown('name', parts[0], names_there_are)}")
        names.append(", ".join(parts[: lengths[0]]))
        del parts[: lengths[0]]
    return tuple(dict.fromkeys(names))


def parse_ids(text: str, name: str, choices: Iterable[str]) -> tuple[str, ...]:
    """Read the ids of concepts as people write them in a notebook's parameter.

    Args:
        text: Ids, separated by commas.
        name: The parameter's, for the error.
        choices: All ids that there are, such as `concepts().id`.

    Returns:
        The ids, in the order of the text; at least one.

    Raises:
        LocogenError: For no id, one that is unknown, or one that comes twice; it names the
            parameter and its value.

    Example:
        >>> parse_ids("mini/neon, mini/cat", "ids", ["mini/cat", "mini/neon", "mini/owl"])
        ('mini/neon', 'mini/cat')
    """
    if not str(text).strip():
        raise LocogenError(
            f"{name} is {text!r}: write ids of concepts, separated by commas, such as mini/neon "
            "(`locogen concepts` lists them)"
        )
    ids_there_are = tuple(choices)
    ids = tuple(part.strip() for part in str(text).split(","))
    for id in ids:
        if id not in ids_there_are:
            raise LocogenError(f"{name} is {text!r}: {unknown('concept', id, ids_there_are)}")
        if ids.count(id) > 1:
            raise LocogenError(f"{name} is {text!r}: {id} is there twice, name each concept once")
    return ids


def windows(n_layers: int, window: int) -> tuple[Window, ...]:
    """All windows of `window` layers, one for each start."""
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise LocogenError(f"window is {window!r}: give the number of layers, from 1 up")
    if window > n_layers:
        raise LocogenError(
            f"a window of {window} layers does not fit a model of {n_layers}: "
            f"use at most {n_layers}"
        )
    # n_layers - window + 1 of them, as in the paper's text; its pseudo-code makes one too few.
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
    """List every picture of LocoGen's experiment on one concept, as rows of a plan.

    Args:
        concept: The concept, with its prompt pairs.
        n_layers: The number of layers of the model, `len(find_layers(pipe))`.
        window: The number of neighboring layers that get the target.
        seeds: Of the initial noise: pictures for each prompt and window.
        controls: Whether to add the ceiling (all layers get the target), the placebo (all layers
            get a paraphrase) and for each window its insert (only the window gets the prompt).
        timesteps: Spans (first, last) of denoising steps, from 0; for each span, every window is
            also made with its target at these steps only.
        pooled: See `Intervention`; for every row but the baseline.

    Returns:
        The rows, prompt by prompt and seed by seed. With `W` windows there are `2 W + 3` rows for
        each prompt and seed, `W + 1` without controls, and `W` more for each span of steps.

    Raises:
        LocogenError: For a window that does not fit, no seeds, or a span that is none.

    Example:
        >>> pair = PromptPair("a cat in van gogh style", "a cat")
        >>> plan = sweep(Concept("van gogh", "style", (pair,)), n_layers=16, window=2, seeds=[0])
        >>> len(plan), plan[1].role, plan[1].layers
        (33, 'window', (0, 1))
    """
    places = windows(n_layers, window)
    # A span that comes twice would make the same rows twice.
    spans = tuple(dict.fromkeys(_span(steps) for steps in timesteps))
    all_seeds = distinct_seeds(seeds)
    plan: list[Intervention] = []
    for pair in concept.pairs:
        for seed in all_seeds:
            plan.append(Intervention(pair.prompt, pair.target, (), seed, "baseline"))
            replaced = _Rows(pair, seed, pooled)
            plan += replaced.windows(places)
            for span in spans:
                plan += replaced.windows(places, span)
            if controls:
                plan += replaced.controls(places, n_layers)
    return tuple(plan)


def distinct_seeds(seeds: Iterable[int]) -> tuple[int, ...]:
    """The seeds as a tuple; raises `LocogenError` when there are none or one comes twice."""
    numbers = tuple(_whole_seeds(seeds))
    if not numbers:
        raise LocogenError("there are no seeds: give at least one, such as seeds=range(4)")
    if len(set(numbers)) < len(numbers):
        raise LocogenError(f"seeds {numbers} has one twice: it would count the same picture twice")
    return numbers


def _whole_seeds(seeds: Iterable[int]) -> Iterator[int]:
    """Each seed as a number that torch takes; neither cut to a whole one nor read from a text."""
    remedy = "give several whole numbers from 0 up, such as range(4)"
    if isinstance(seeds, str):
        raise LocogenError(f"seeds is {seeds!r}: {remedy}")
    try:
        every = list(seeds)
    except TypeError:
        raise LocogenError(f"seeds is {seeds!r}: {remedy}") from None
    for seed in every:
        is_whole = hasattr(seed, "__index__") and not isinstance(seed, bool)
        if not is_whole or not 0 <= int(seed) < 2**63:
            raise LocogenError(f"seed {seed!r}: {remedy}")
        yield int(seed)


@dataclass(frozen=True)
class _Rows:
    """The rows of one prompt pair and seed in which something is replaced."""

    pair: PromptPair
    seed: int
    pooled: Pooled

    def windows(
        self, places: Sequence[Window], span: tuple[int, int] | None = None
    ) -> Iterator[Intervention]:
        """Each window gets the target; with a span, at these denoising steps only."""
        role: Role = "window" if span is None else "timesteps"
        for place in places:
            yield self._row(role, tuple(place), place, timesteps=span)

    def controls(self, places: Sequence[Window], n_layers: int) -> Iterator[Intervention]:
        """Inserts, the ceiling and the placebo: what gives the effect of a window its meaning."""
        every = range(n_layers)
        # An insert is the opposite of its window: all other layers get the target.
        for place in places:
            rest = tuple(i for i in every if i not in tuple(place))
            yield self._row("insert", rest, place)
        # Every layer gets the target: the largest effect that a window can have.
        yield self._row("ceiling", tuple(every))
        # The placebo keeps the concept: what it changes is due to other words alone.
        other_words = self.pair.placebo or paraphrase(self.pair.prompt, self.pair.target)
        yield replace(self._row("placebo", tuple(every)), target=other_words)

    def _row(
        self,
        role: Role,
        layers: tuple[int, ...],
        place: Window | None = None,
        timesteps: tuple[int, int] | None = None,
    ) -> Intervention:
        return Intervention(
            prompt=self.pair.prompt,
            target=self.pair.target,
            layers=layers,
            seed=self.seed,
            role=role,
            start=None if place is None else place.start,
            width=None if place is None else place.width,
            timesteps=timesteps,
            pooled=self.pooled,
        )
