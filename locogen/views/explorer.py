"""What one look at a run shows: the pictures of a window, of the controls, of an edit or a clamp.

No widgets here: a `Look` is the question, an `Explorer` answers with labeled pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from locogen.editing.edit import Edit, fit_edit
from locogen.editing.fit import reason_for_no_edit
from locogen.editing.neurons import Neurons, find_neurons
from locogen.errors import LocogenError
from locogen.interventions.clamping import clamp
from locogen.localization.effects import carrier, effect
from locogen.markup import number, precision
from locogen.models.families import family_of
from locogen.models.layers import find_layers
from locogen.phrasings import default_phrasings
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import Run, generate
from locogen.pictures.score import scorer
from locogen.plan import Concept, Intervention, PromptPair, Window
from locogen.types import Pipeline
from locogen.views.sentences import few_seeds_note
from locogen.views.tables import amount, ceiling_share, missing

if TYPE_CHECKING:
    from PIL.Image import Image

    from locogen.localization.attribution.result import Attribution
    from locogen.pictures.score import Scorer


# What a picture depends on besides its row: compared with the run's before a picture is shown.
CIRCUMSTANCES = ("weights", "contexts", "pipeline", "scheduler", "dtype", "device", "torch")


@dataclass(frozen=True)
class Look:
    """What to look at: a prompt, a seed, layers `first` to `last`, and what is done to them.

    `strength`: how much of an edit of these layers is applied, 0 for none; `neurons`: how many of
    each of their matrices are clamped, 0 for none.
    """

    concept: str
    prompt: str
    first: int
    last: int
    seed: int
    strength: float = 0.0
    neurons: int = 0

    @property
    def window(self) -> Window:
        """The layers as a window."""
        return Window(self.first, self.last - self.first + 1)


class Shown(NamedTuple):
    """A picture, what it is, and its CLIP-score: None where the run's scorer is not here."""

    label: str
    picture: Image
    score: float | None = None


class Explorer:
    """Answers looks at a run of `localize`, with `pipe` also for missing pictures.

    `options` are those of the edits, see `edit.fit_edit`; `attribution` is one more map beside
    those of the run; `scorer` scores what is made, None: the run's own, if it can be loaded here.
    Pictures, edits and neurons are kept in memory, none is written. Raises `LocogenError` for a run
    without scores, and for a model that has changed since the run.
    """

    def __init__(
        self,
        run: Run,
        pipe: Pipeline = None,
        options: Mapping[str, Any] | None = None,
        attribution: Attribution | None = None,
        scorer: Scorer | str | None = None,
    ) -> None:
        if "clip_score" not in run.table:
            raise LocogenError(
                "this run has no scores, so there is no heatmap to explore: give explore a run of "
                "localize"
            )
        if pipe is not None and fingerprint(pipe) != run.settings["weights"]:
            raise LocogenError(
                "the model's weights are not the run's: undo its edits, or call localize again"
            )
        self.run = run
        self.pipe = pipe
        self.options = dict(options or {})
        self._scorer = scorer
        self.effects: Any = effect(run.table)
        self.concepts = {concept.name: concept for concept in _concepts(run.table)}
        self.attributions = dict(run.attributions)  # by concept
        if attribution is not None:
            self._add(attribution)
        self.carriers = {name: self._carrier(name) for name in self.concepts}
        self.n_layers = int(run.settings["n_layers"])
        self.width = int(run.settings["window"])
        self.pooled = _pooled(run)
        self.seeds = sorted({row.seed for row in run.plan})
        # Several rows may ask for the same picture: the first one counts.
        self._rows: dict[Any, int] = {}  # what makes a picture → its number in the run
        for i, row in enumerate(run.plan):
            self._rows.setdefault(_what_makes(row), i)
        self._memory: dict[Any, Any] = {}  # pictures, edits and neurons made for looks

    def _add(self, attribution: Attribution) -> None:
        if attribution.concept not in self.concepts:
            raise LocogenError(
                f"the attribution is of {attribution.concept!r}, which the run is not about: "
                f"give one of {', '.join(self.concepts)}"
            )
        self.attributions[attribution.concept] = attribution

    def _carrier(self, concept: str) -> Window:
        return carrier(self.effects[self.effects["concept"] == concept])

    def first_look(self) -> Look:
        """The carrier of the first concept, or its largest effect; its first prompt and seed."""
        concept = next(iter(self.concepts.values()))
        start = self.carriers[concept.name].start
        if start is None:
            cells = self.cells(concept.name)
            looked_at = [place for place in cells if not missing(cells[place]["estimate"])]
            start = max(looked_at, key=lambda place: cells[place]["estimate"])
        prompt = concept.pairs[0].prompt
        return Look(concept.name, prompt, start, start + self.width - 1, self.seeds[0])

    def cells(self, concept: str) -> dict[int, dict[str, Any]]:
        """The heatmap's row of one concept: window start → its row of the effects table."""
        is_cell = (self.effects["concept"] == concept) & (self.effects["axis"] == "layer")
        rows: Any = self.effects[is_cell].sort_values("position")
        return {int(row["position"]): row for row in rows.to_dict("records")}

    def pair(self, look: Look) -> PromptPair:
        """The prompt looked at with its target."""
        return next(
            pair for pair in self.concepts[look.concept].pairs if pair.prompt == look.prompt
        )

    def reason_for_no_edit(self) -> str:
        """Why no layer of the model can be edited; empty where some can, or without a model."""
        return "" if self.pipe is None else reason_for_no_edit(self.pipe)

    def narrowest(self, look: Look) -> int:
        """How many neurons the narrowest matrix of the layers looked at has; 0 without a model."""
        if self.pipe is None:
            return 0
        family = family_of(self.pipe)
        sizes = []
        for layer in find_layers(self.pipe)[look.first : look.last + 1]:
            sizes += [matrix.out_features for matrix in family.matrices(layer.module).values()]
        return min(sizes)

    def finding(self, look: Look) -> str:
        """What the heatmap's cell says, in a sentence; windows that were not swept have none."""
        cells = self.cells(look.concept)
        # A window of another width may begin at the same layer: it was not swept.
        is_swept = len(look.window) == self.width and look.first in cells
        if not is_swept:
            return (
                f"{look.concept}, {look.window}: "
                "not a window of this run, so its effect was not measured."
            )
        row = cells[look.first]
        if missing(row["estimate"]):
            return f"{look.concept}, {look.window}: this window was not looked at."
        share = ""
        if not missing(row["share"]):
            share = f", {ceiling_share(row)} of the ceiling"
        is_carrier = self.carriers[look.concept].start == look.first
        starred = " ★ the carrier." if is_carrier else ""
        count = int(row["n"])
        seeds: Any = row.get("n_seeds")
        # A window on which a search spent few pictures has no interval that could be worth little.
        has_interval = not (missing(seeds) or missing(row["low"]))
        note = few_seeds_note(seeds) if has_interval else ""
        effect = f"effect {amount(row)}{share}, n = {count}{note}"
        return f"{look.concept}, {look.window}: {effect}.{starred}"

    def outcome(self, look: Look, shown: Sequence[Shown]) -> str:
        """What an edit or a clamp did to this picture's score; empty where nothing was done.

        One picture has no interval: the numbers stand beside those of the baseline and of the
        target in all layers, and claim nothing beyond it.
        """
        baseline, _, ceiling, *changed = shown
        if baseline.score is None or ceiling.score is None:
            return ""
        sentences = []
        for one in changed:
            if one.score is None:
                continue
            digits = precision(baseline.score, one.score, ceiling.score)
            before, after, all_layers = (
                number(score, digits) for score in (baseline.score, one.score, ceiling.score)
            )
            label = one.label[0].upper() + one.label[1:]
            sentences.append(
                f"{label}: score {before} → {after} on this picture, where “"
                f"{self.pair(look).target}” in all layers makes it {all_layers}."
            )
        return " ".join(sentences)

    def show(self, look: Look) -> Iterator[Shown]:
        """The baseline, the window and the ceiling of the look; then edited and clamped.

        Raises `LocogenError` for pictures that the run does not have if there is no model to make
        them.
        """
        pair = self.pair(look)
        common: Any = {"prompt": pair.prompt, "target": pair.target, "seed": look.seed}
        replaced = common | {"pooled": self.pooled}
        every = tuple(range(self.n_layers))
        rows = {
            "baseline": Intervention(role="baseline", **common),
            f"{look.window} hearing “{pair.target}”": Intervention(
                layers=tuple(look.window), **replaced
            ),
            f"all layers hearing “{pair.target}”": Intervention(
                layers=every, role="ceiling", **replaced
            ),
        }
        pictures = self._pictures(list(rows.values()), pair)
        for label, (picture, score) in zip(rows, pictures, strict=True):
            yield Shown(label, picture, score)
        yield from self._changed(look)

    def _pictures(
        self, rows: Sequence[Intervention], pair: PromptPair
    ) -> list[tuple[Image, float | None]]:
        """Of the unedited model; all that are missing are made in one batch."""
        keys = [_what_makes(row) for row in rows]
        lacking = {}  # several rows may ask for the same picture: it is made once
        for key, row in zip(keys, rows, strict=True):
            if key not in self._rows and key not in self._memory:
                lacking[key] = row
        if lacking:
            new_pictures = self._make(list(lacking.values()))
            self._memory |= zip(lacking, new_pictures, strict=True)
        return [self._picture(key, pair) for key in keys]

    def _picture(self, key: Any, pair: PromptPair) -> tuple[Image, float | None]:
        """A picture of the run with its score, or one from memory, which is scored now."""
        if key not in self._rows:
            return self._memory[key], self._score(key, pair)
        place = self._rows[key]
        return self.run.pictures[place], float(self.run.table["clip_score"].iloc[place])

    def _changed(self, look: Look) -> Iterator[Shown]:
        """The baseline under an edit of the layers looked at, and with their neurons clamped."""
        row = Intervention(look.prompt, look.prompt, (), look.seed, "baseline")
        if look.strength:
            key = replace(look, neurons=0)  # the edited picture does not depend on the clamp
            if key not in self._memory:
                with self._edit(look).applied(self.pipe, look.strength):
                    (self._memory[key],) = self._make([row], besides="weights")
            label = f"edit of {look.window}, strength {look.strength:g}"
            yield Shown(label, self._memory[key], self._score(key, self.pair(look)))
        if look.neurons:
            key = replace(look, strength=0.0)  # nor the clamped one on the edit
            if key not in self._memory:
                with clamp(self.pipe, self._neurons(look).top(look.neurons)):
                    (self._memory[key],) = self._make([row], besides="contexts")
            label = f"{look.window} with {look.neurons} of each matrix’ neurons clamped"
            yield Shown(label, self._memory[key], self._score(key, self.pair(look)))

    def _score(self, key: Any, pair: PromptPair) -> float | None:
        """The CLIP-score of a picture in memory, as the run would have scored it."""
        judge = self._judge()
        if judge is None or pair.text is None:
            return None
        place = ("score", key, pair.text)
        if place not in self._memory:
            [cosines] = judge([self._memory[key]], [pair.text])
            self._memory[place] = float(cosines[0])
        return self._memory[place]

    def _judge(self) -> Scorer | None:
        """The run's scorer; None if it is not here, or another one by now."""
        if "judge" not in self._memory:
            self._memory["judge"] = self._loaded_scorer()
        return self._memory["judge"]

    def _loaded_scorer(self) -> Scorer | None:
        choice = self._scorer or self.run.settings.get("scorer")
        judge: Any = choice
        if isinstance(choice, str):
            try:
                judge = scorer(choice, local_files_only=True)
            except LocogenError:
                return None
        if judge is None:
            return None
        # Scores of two scorers cannot be compared.
        same = all(self.run.settings.get(name) == value for name, value in judge.settings.items())
        return judge if same else None

    def _make(self, rows: list[Intervention], *, besides: str = "") -> list[Image]:
        """Pictures with the run's settings, on a model that is as it was for the run.

        `besides`: the one setting that may differ, because it is being changed.
        """
        # Compared after the pictures are made: their settings are those that were in force.
        settings = {
            name: self.run.settings[name] for name in ("num_inference_steps", "guidance_scale")
        }
        run = generate(
            self._model(), rows, batch_size=len(rows), store=None, progress=False, **settings
        )
        for name in sorted(set(CIRCUMSTANCES) - {besides}):
            if run.settings[name] != self.run.settings[name]:
                raise LocogenError(
                    f"the model's {name} changed since the run: undo it, or call localize again"
                )
        return list(run.pictures)

    def _model(self) -> Any:
        if self.pipe is None:
            raise LocogenError(
                "the run has no such picture, and there is no model to make it: "
                "explore(run, pipe=…)"
            )
        return self.pipe

    def _edit(self, look: Look) -> Edit:
        # Strength and seed do not change how an edit is fitted.
        key = ("edit", look.concept, look.window)
        if key not in self._memory:
            concept = self.concepts[look.concept]
            edit = fit_edit(self._model(), concept, layers=look.window, **self.options)
            self._memory[key] = edit
        return self._memory[key]

    def _neurons(self, look: Look) -> Neurons:
        key = ("neurons", look.concept, look.window)
        if key not in self._memory:
            concept = self.concepts[look.concept]
            # One pair is too few to tell neurons apart: then other phrasings are read as well.
            phrasings = default_phrasings(concept) if len(concept.pairs) == 1 else None
            self._memory[key] = find_neurons(
                self._model(), concept, layers=look.window, phrasings=phrasings
            )
        return self._memory[key]


def _what_makes(row: Intervention) -> tuple[Any, ...]:
    """What makes a row's picture; the target does not matter where no layer gets it."""
    target = None if row.is_plain else row.target
    return row.prompt, target, row.layers, row.seed, row.pooled, row.timesteps


def _pooled(run: Run) -> Any:
    """What the run's pooled text vector was: that of the prompt or of the target."""
    for row in run.plan:
        if row.layers:
            return row.pooled
    return "keep"


def _concepts(table: Any) -> Iterator[Concept]:
    """The concepts of a pictures table, with the prompts that it has."""
    for name, rows in table[table["role"] == "window"].groupby("concept", sort=False):
        distinct = rows.drop_duplicates("prompt")[["prompt", "target", "text"]]
        pairs = tuple(PromptPair(*values) for values in distinct.itertuples(index=False, name=None))
        yield Concept(str(name), rows["kind"].iloc[0], pairs)
