"""What one look at a run shows: a window's pictures beside the baseline, and those of an edit or a clamp.

No widgets here: a `Look` says what is asked for, an `Explorer` answers with labeled pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from locogen.editing.edit import Edit, fit_edit
from locogen.editing.neurons import Neurons, find_neurons
from locogen.errors import LocogenError
from locogen.interventions.clamping import clamp
from locogen.localization.effects import carrier, effect
from locogen.models.families import family_of
from locogen.models.layers import find_layers
from locogen.phrasings import default_phrasings
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import Run, generate
from locogen.plan import Concept, Intervention, PromptPair, Window
from locogen.views.tables import interval, missing, number, precision

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Look:
    """What to look at: one prompt and seed, the layers `first` to `last`, and what is done to them besides.

    `strength`: how much of an edit of these layers is applied, 0 for none; `neurons`: how many of each of their
    matrices are clamped, 0 for none.
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
    """A picture and what it is; `score` is its CLIP-score where the run has it."""

    label: str
    picture: Image
    score: float | None = None


class Explorer:
    """Answers looks at a run of `localize`, from its pictures, or with `pipe` by making those it has not.

    `options` are those of the edits, see `edit.fit_edit`. Pictures, edits and neurons are kept in memory, none is
    written. Raises `LocogenError` for a run without scores, and for a model that is not as it was for the run.
    """

    def __init__(self, run: Run, pipe: Any = None, options: Mapping[str, Any] | None = None) -> None:
        if "clip_score" not in run.table:
            raise LocogenError("explore shows a run of localize: this one has no scores, so there is no heatmap")
        if pipe is not None and fingerprint(pipe) != run.settings["weights"]:
            raise LocogenError("the model's weights are not the run's: undo its edits, or call localize again")
        self.run, self.pipe, self.options = run, pipe, dict(options or {})
        self.effects: Any = effect(run.table)
        self.concepts = {concept.name: concept for concept in _concepts(run.table)}
        self.carriers = {name: carrier(self.effects[self.effects["concept"] == name]) for name in self.concepts}
        self.n_layers = int(run.settings["n_layers"])
        self.width = int(run.settings["window"])
        self.pooled = next((row.pooled for row in run.plan if row.layers), "keep")
        self.seeds = sorted({row.seed for row in run.plan})
        self._rows = {_made(row): i for i, row in reversed(list(enumerate(run.plan)))}
        self._kept: dict[Any, Any] = {}

    def first_look(self) -> Look:
        """The carrier of the first concept, or its largest effect; its first prompt and seed."""
        concept = next(iter(self.concepts.values()))
        cells = self.cells(concept.name)
        start = self.carriers[concept.name].start
        start = max(cells, key=lambda place: cells[place]["estimate"]) if start is None else start
        return Look(concept.name, concept.pairs[0].prompt, start, start + self.width - 1, self.seeds[0])

    def cells(self, concept: str) -> dict[int, dict[str, Any]]:
        """The heatmap's row of one concept: window start → its row of the effects table."""
        rows: Any = self.effects[(self.effects["concept"] == concept) & (self.effects["axis"] == "layer")]
        return {int(row["position"]): row for row in rows.sort_values("position").to_dict("records")}

    def pair(self, look: Look) -> PromptPair:
        """The prompt looked at with its target."""
        return next(pair for pair in self.concepts[look.concept].pairs if pair.prompt == look.prompt)

    def narrowest(self, look: Look) -> int:
        """How many neurons the narrowest matrix of the layers looked at has; 0 without a model."""
        if self.pipe is None:
            return 0
        family, layers = family_of(self.pipe), find_layers(self.pipe)[look.first : look.last + 1]
        return min(m.out_features for layer in layers for m in family.matrices(layer.module).values())

    def finding(self, look: Look) -> str:
        """What the heatmap's cell says, in a sentence; windows that were not swept have none."""
        row = self.cells(look.concept).get(look.first) if len(look.window) == self.width else None
        if row is None:
            return f"{look.concept}, {look.window}: not a window of this run, so without a measured effect."
        digits = precision(row["estimate"])
        share = "" if missing(row["share"]) else f", {number(100 * row['share'], 0)} % of the ceiling"
        starred = " ★ the carrier." if self.carriers[look.concept].start == look.first else ""
        effect = number(row["estimate"], digits) + interval(row, digits)
        return f"{look.concept}, {look.window}: effect {effect}{share}, n = {int(row['n'])}.{starred}"

    def show(self, look: Look) -> Iterator[Shown]:
        """The baseline, the window and the ceiling of the look; then edited and clamped, each when it is made.

        Raises `LocogenError` for pictures that the run has not when there is no model to make them.
        """
        pair, window, every = self.pair(look), look.window, tuple(range(self.n_layers))
        changed: Any = dict(prompt=pair.prompt, target=pair.target, seed=look.seed, pooled=self.pooled)
        rows = {
            "baseline": Intervention(pair.prompt, pair.target, (), look.seed, "baseline"),
            f"{window} hearing “{pair.target}”": Intervention(layers=tuple(window), **changed),
            f"all layers hearing “{pair.target}”": Intervention(layers=every, role="ceiling", **changed),
        }
        found = self._pictures(list(rows.values()))
        yield from (Shown(label, *one) for label, one in zip(rows, found, strict=True))
        yield from self._changed(look)

    def _pictures(self, rows: Sequence[Intervention]) -> list[tuple[Image, float | None]]:
        """Of the unedited model: from the run, from memory, or made now, all that are missing in one batch."""
        keys = [_made(row) for row in rows]
        lacking = {key: row for key, row in zip(keys, rows, strict=True) if not {key} & {*self._rows, *self._kept}}
        if lacking:
            self._kept |= zip(lacking, self._make(list(lacking.values())), strict=True)
        scores, table = self.run.table["clip_score"], self._rows
        return [
            (self.run.pictures[table[key]], float(scores.iloc[table[key]])) if key in table else (self._kept[key], None)
            for key in keys
        ]

    def _changed(self, look: Look) -> Iterator[Shown]:
        """The baseline again, under an edit of the layers looked at, and with their neurons clamped."""
        row = Intervention(look.prompt, look.prompt, (), look.seed, "baseline")
        if look.strength:
            key = replace(look, neurons=0)
            if key not in self._kept:
                with self._edit(look).applied(self.pipe, look.strength):
                    (self._kept[key],) = self._make([row], besides="weights")
            yield Shown(f"edit of {look.window}, strength {look.strength:g}", self._kept[key])
        if look.neurons:
            key = replace(look, strength=0.0)
            if key not in self._kept:
                with clamp(self.pipe, self._neurons(look).top(look.neurons)):
                    (self._kept[key],) = self._make([row], besides="contexts")
            yield Shown(f"{look.window} with {look.neurons} of each matrix’ neurons clamped", self._kept[key])

    def _make(self, rows: list[Intervention], *, besides: str = "") -> list[Image]:
        """Pictures with the run's settings; all of these are compared with the run's, `besides` the one in force."""
        names = ("num_inference_steps", "guidance_scale")
        settings = {name: self.run.settings[name] for name in names}
        made = generate(self._model(), rows, batch_size=len(rows), progress=False, **settings)
        for name in {"weights", "contexts", "pipeline", "scheduler", "dtype", "device", "torch"} - {besides}:
            if made.settings[name] != self.run.settings[name]:
                raise LocogenError(f"the model's {name} changed since the run: undo that, or call localize again")
        return list(made.pictures)

    def _model(self) -> Any:
        if self.pipe is None:
            raise LocogenError("the run has no such picture, and there is no model to make it: explore(run, pipe=…)")
        return self.pipe

    def _edit(self, look: Look) -> Edit:
        key = ("edit", look.concept, look.window)
        if key not in self._kept:
            concept = self.concepts[look.concept]
            self._kept[key] = fit_edit(self._model(), concept, layers=look.window, **self.options)
        return self._kept[key]

    def _neurons(self, look: Look) -> Neurons:
        key = ("neurons", look.concept, look.window)
        if key not in self._kept:
            concept = self.concepts[look.concept]
            told = None if len(concept.pairs) > 1 else default_phrasings(concept)
            self._kept[key] = find_neurons(self._model(), concept, layers=look.window, phrasings=told)
        return self._kept[key]


def _made(row: Intervention) -> tuple[Any, ...]:
    """What makes a row's picture: where nothing of the target is heard, it does not matter."""
    return row.prompt, None if row.is_plain else row.target, row.layers, row.seed, row.pooled, row.timesteps


def _concepts(table: Any) -> Iterator[Concept]:
    """The concepts of a pictures table, with the prompts that it has."""
    for name, rows in table[table["role"] == "window"].groupby("concept", sort=False):
        seen = rows.drop_duplicates("prompt")[["prompt", "target", "text"]]
        pairs = tuple(PromptPair(*values) for values in seen.itertuples(index=False, name=None))
        yield Concept(str(name), rows["kind"].iloc[0], pairs)
