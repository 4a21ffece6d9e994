"""Attack an edit: does a removed concept come back for someone who tries?"""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from locogen import __version__
from locogen.attacks.goal import (
    Goal,
    NeverHad,
    learned_and_judged,
    picture_settings,
)
from locogen.attacks.kinds import (
    KINDS,
    LEARNING,
    OF_WEIGHTS,
    Attacked,
    Attempt,
    Kind,
    Options,
    check_goal,
    steps_and_stops,
)
from locogen.attacks.loss import check_attackable, check_gradients
from locogen.attacks.result import COLUMNS, Attack
from locogen.attacks.training import folder_of, state_name
from locogen.catalog import entry_of
from locogen.console import current, open_bar
from locogen.editing.control_edits import placebo_edit
from locogen.editing.edit import Edit
from locogen.editing.evaluation import Applicable
from locogen.editing.probes import Probe
from locogen.editing.rivals.at_inference import AtInference
from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import active_contexts
from locogen.interventions.words import digest
from locogen.models.defaults import name_of, source_of
from locogen.pictures import score
from locogen.pictures.fingerprint import weights_of
from locogen.plan import Concept, PromptPair, distinct_seeds
from locogen.types import Pipeline

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.score import Scorer

Model = Literal["edited", "unedited", "placebo", "never had"]
MODELS: tuple[Model, ...] = get_args(Model)
LIBRARIES = ("torch", "diffusers", "transformers")  # whose versions are noted
# AdamW's, where nothing else is said.
RATES = {"inversion": 0.02, "states": 0.01, "relearn": 3e-4}


def attack(
    pipe: Pipeline,
    concept: Concept,
    edit: Applicable,
    *,
    kind: Kind = "inversion",
    strength: float = 1.0,
    training: Sequence[PromptPair] | None = None,
    held_out: Sequence[Probe] | None = None,
    seeds: Iterable[int] = range(4),
    models: Sequence[Model] | None = None,
    steps: int | None = None,
    at: Iterable[int] | None = None,
    rate: float | None = None,
    batch: int = 16,
    vectors: int = 1,
    start: Literal["neighbors", "own"] = "neighbors",
    exhaustive: bool = False,
    vocabulary: Sequence[str] | None = None,
    pictures: Sequence[int] = (0, 1, 3, 10),
    trained: Literal["text matrices", "cross attention"] = "text matrices",
    ridge: float = 0.1,
    seed: int = 0,
    placebo: Applicable | None = None,
    never_had: NeverHad | None = None,
    scorer: Scorer | str | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Attack:
    """Try to get a concept back that an edit removed, on the edited model and on its controls.

    Pictures of the concept are made by the unedited model; what is found is judged on other
    prompts. The model is left as it was, also where the attack is stopped.

    Args:
        pipe: A pipeline of Stable Diffusion 1 or 2, not edited, as from `load`.
        concept: What the edit removed.
        edit: The edit, or what acts at inference (whatever `edit_with` gives). The latter changes
            no weight, so that "closed", "relearn" and "completion" refuse it.
        kind: "inversion": token vectors in the place of the concept's words are trained. "states":
            one change of all text states is trained, whether or not words could give it.
            "closed": states that the edited matrices answer as the old ones did, in one solve.
            "discrete": tokens of the vocabulary. "relearn": the layers that read text are trained.
            "completion": the unedited model makes the first steps. "noise": the best of the seeds.
            "inpaint": the middle of a picture of the concept is made anew, and only it is judged.
        strength: How many times the edit, or the placebo, is applied.
        training: Prompt pairs to learn from; None: every other pair of the concept, from the
            first, without those that are judged.
        held_out: What is judged, on prompts that name the concept; None: every other pair, from
            the second, without those that it learns from.
        seeds: Of the judged pictures.
        models: Which models are attacked; None: all four (see `Attack`), "never had" and "placebo"
            only where there is such a concept and such an edit.
        steps: Steps of training or search; None: the last of at=, else 200 (inversion), 100
            (states, relearn), 20 (discrete).
        at: For "inversion" and "states": after how many steps it is judged, the last of which ends
            the training; None: at 0 and at the end. For "completion": the first steps of the
            edited model, None: 0 and the quarters. For "inpaint": how large the hole is, in
            percent of the picture's sides, None: 50 and 75. Other kinds are judged once.
        rate: AdamW's learning rate; None: 0.02 (inversion), 0.01 (states), 0.0003 (relearn).
        batch: Pictures in a step of training; of "discrete" in the loss that is searched.
        vectors: Token vectors, or tokens, in the place of the concept's words.
        start: What the vectors begin with: the mean of the neighbors' words, or the "own" words,
            which need as many vectors as they have tokens; further vectors repeat the last.
        exhaustive: Whether "discrete" tries every combination instead of following gradients.
        vocabulary: Words of one token each that "discrete" may use; None: all.
        pictures: How many pictures of the concept "relearn" sees, besides plain ones, which are
            half of what is drawn.
        trained: What "relearn" trains: keys and values, or the whole cross-attention layers.
        ridge: How much "closed" holds the states, as a share of the matrices' own size.
        seed: Of the attack's own draws.
        placebo: An edit of the same size about something else; None: `placebo_edit`, or the
            edit's own `placebo`.
        never_had: A concept that the model never had; None: for an embedded model (mini, mini-b)
            the concept with red and blue exchanged, else none.
        scorer: What says whether the concept is shown: a scorer or its name; None: the catalog's.
        folder: Where pictures and the state of trainings and searches are kept, so that a stopped
            attack goes on; None: nowhere. Several attacks may share it.
        progress: Whether to show progress bars.
        settings: `num_inference_steps`, `guidance_scale` and `batch_size` of `generate`.

    Returns:
        An `Attack`.

    Raises:
        LocogenError: Another family of models, float16, an unknown kind or model, an option out of
            its range, prompts that do not name the concept, no neighbors to judge by, a kind that
            needs weights, or as `generate`.

    Warns:
        UserWarning: The edit is of another concept, or a prompt is in `training` and `held_out`.

    Example:
        >>> pipe = load("mini")
        >>> neon = concept("mini/neon").first(2)
        >>> edit = fit_edit(pipe, neon, layers=[12, 13])
        >>> few = {"num_inference_steps": 1, "guidance_scale": 1.0, "seeds": [0]}
        >>> few |= {"models": ["edited"], "progress": False}
        >>> attack(pipe, neon, edit, kind="noise", **few).table["model"].tolist()
        ['edited']
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise LocogenError(f"kind is {kind!r}: use one of {', '.join(KINDS)}")
    check_attackable(pipe)
    _check_types(concept, edit, vocabulary, placebo=placebo, never_had=never_had)
    if kind in LEARNING:
        check_gradients()
    _check_edit(kind, concept, edit)
    picture_options = picture_settings("attack", settings)
    count, stops = steps_and_stops(pipe, kind, steps, at, picture_options.num_inference_steps)
    options = Options(
        steps=count,
        at=stops,
        rate=RATES.get(kind, 0.0) if rate is None else rate,
        batch=batch,
        vectors=vectors,
        start=start,
        exhaustive=exhaustive,
        vocabulary=None if vocabulary is None else tuple(vocabulary),
        pictures=cast(Any, pictures),
        trained=trained,
        ridge=ridge,
        seed=seed,
        strength=strength,
    )
    if never_had is None and _is_embedded(pipe):
        never_had = NeverHad()
    pairs, probes = learned_and_judged(concept, training, held_out, learns=kind in LEARNING)
    with _kept(folder) as place, open_bar(progress, "loading the scorer"):
        goal = Goal(
            pipe,
            concept,
            training=pairs,
            probes=probes,
            seeds=distinct_seeds(seeds),
            scorer=score.scorer_for(pipe, scorer),
            store=place / "pictures",
            settings={"progress": progress, **picture_options.as_dict()},
        )
        attacked = _Attacked(goal, edit, placebo, never_had, options, kind, progress)
        attacked.keep = None if folder is None else place
        of_models = _models(models, never_had, has_placebo=attacked.has_placebo)
        attacked.check(of_models)
        return attacked.run(of_models)


def _check_types(concept: Any, edit: Any, vocabulary: Any, *, placebo: Any, never_had: Any) -> None:
    """Refuse a name in the place of the thing, and a text in that of a list."""
    if not isinstance(concept, Concept) or not hasattr(edit, "applied"):
        raise LocogenError(
            f"attack takes a Concept and an Edit, not {type(concept).__name__} and "
            f"{type(edit).__name__}: see concept(), fit_edit() and edit_with()"
        )
    if placebo is not None and not hasattr(placebo, "applied"):
        raise LocogenError(f"placebo is {placebo!r}: give an edit, as from placebo_edit()")
    if never_had is not None and not isinstance(never_had, NeverHad):
        raise LocogenError(
            f"never_had is {never_had!r}: give a NeverHad, of pictures and a name or of neither"
        )
    if isinstance(vocabulary, str) or not isinstance(vocabulary, Iterable | None):
        raise LocogenError(f"vocabulary is {vocabulary!r}: give a list of words")


def _check_edit(kind: str, concept: Concept, edit: Applicable) -> None:
    """Refuse a kind that needs weights where there are none, and warn of another concept's edit."""
    if kind in OF_WEIGHTS and not isinstance(edit, Edit):
        raise LocogenError(
            f"{type(edit).__name__} changes no weight, so {OF_WEIGHTS[kind]}: use another kind "
            f"than {kind!r}, such as 'inversion' or 'states'"
        )
    name = str(getattr(edit, "name", concept.name))
    if concept.name.casefold() not in name.casefold().split(" + "):
        warnings.warn(
            f"the edit is of {name!r}, and {concept.name!r} is attacked, of which nothing was "
            "removed: what comes says nothing of the edit. Give the concept that was edited",
            stacklevel=3,
        )


def _is_embedded(pipe: Any) -> bool:
    """Whether it is a model of the package, all of whose training pictures are known."""
    entry = entry_of(source_of(pipe))
    return entry is not None and entry.embedded


def _models(
    models: Sequence[Model] | None, never_had: NeverHad | None, *, has_placebo: bool
) -> tuple[Model, ...]:
    if models is None:
        return _known_models(never_had, has_placebo=has_placebo)
    every = _names_of(models)
    if "never had" in every and never_had is None:
        raise _unknown_control("concept", "that this model never had", "never_had")
    if "placebo" in every and not has_placebo:
        raise _unknown_control("placebo", "of this edit", "placebo")
    return tuple(every)


def _names_of(models: Any) -> list[Model]:
    """The models that are asked for, each once."""
    is_list = isinstance(models, Iterable) and not isinstance(models, str)
    every: list[Model] = list(models) if is_list else []
    if not every or not all(one in MODELS for one in every):
        raise LocogenError(f"models is {models!r}: use a list of some of {', '.join(MODELS)}")
    if len(set(every)) < len(every):
        raise LocogenError(f"models is {every}: give each model once")
    return every


def _known_models(never_had: NeverHad | None, *, has_placebo: bool) -> tuple[Model, ...]:
    missing = {"placebo": not has_placebo, "never had": never_had is None}
    return tuple(model for model in MODELS if not missing.get(model, False))


def _unknown_control(thing: str, of_what: str, argument: str) -> LocogenError:
    return LocogenError(
        f"no {thing} is known {of_what}: give {argument}=, or leave it out of models="
    )


@contextmanager
def _kept(folder: str | Path | None) -> Iterator[Path]:
    """The folder, or one that is deleted in the end."""
    if folder is not None:
        yield folder_of(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)


class _Attacked:
    """One attack on all of its models."""

    def __init__(
        self,
        goal: Goal,
        edit: Applicable,
        placebo: Applicable | None,
        never_had: NeverHad | None,
        options: Options,
        kind: str,
        progress: bool,
    ) -> None:
        self.goal = goal
        self.edit = edit
        self.placebo = placebo
        self.never_had = never_had
        self.options = options
        self.kind = kind
        self.progress = progress
        self.keep: Path | None = None

    @property
    def has_placebo(self) -> bool:
        """Whether there is an edit about something else, or one can be made."""
        return self.placebo is not None or isinstance(self.edit, (Edit, AtInference))

    def check(self, models: Sequence[Model]) -> None:
        """Refuse what would fail in the middle of the attack on one of the models."""
        if set(models) - {"never had"}:
            check_goal(self.kind, self.goal, self.options)
        if "never had" in models:
            check_goal(self.kind, replace(self.goal, never_had=self.never_had), self.options)

    def run(self, models: Sequence[Model]) -> Attack:
        """Attack one model after the other."""
        import pandas as pd

        weights = weights_of(self.goal.pipe)
        tables: list[pd.DataFrame] = []
        tensors: dict[str, Mapping[str, Any]] = {}
        words: dict[str, tuple[str, ...]] = {}
        for model in models:
            goal, edit = self._target(model)
            label = f"{self.kind}, {model}"
            state = self._state(goal, edit, weights)
            attacked = Attacked(goal, edit, self.options, state, label, self.progress)
            old = self._own_words(attacked)  # pictures
            for attempt in KINDS[self.kind](attacked):
                tables.append(self._table(model, attacked, attempt, old))
                # The last attempt is the strongest.
                tensors[model] = {name: value.cpu() for name, value in attempt.tensors.items()}
                if attempt.words:
                    words[model] = attempt.words
        return Attack(
            concept=self.goal.concept.name,
            kind=self.kind,
            table=pd.concat(tables, ignore_index=True),
            tensors={name: values for name, values in tensors.items() if values},
            words=words,
            settings=self._settings(models, weights),
        )

    def _target(self, model: Model) -> tuple[Goal, Applicable | None]:
        """What is to come back, and the edit of the model that it is to come back from."""
        if model == "never had":
            return replace(self.goal, never_had=self.never_had), self.edit
        if model == "placebo":
            return self.goal, self._placebo()
        return self.goal, self.edit if model == "edited" else None

    def _placebo(self) -> Applicable:
        if self.placebo is None:
            texts: list[str] = []
            for pair in self.goal.training:
                texts += [pair.prompt, pair.target]
            for probe in self.goal.probes:
                texts += [probe.prompt, probe.text, *probe.among]
            self.placebo = self._made_placebo(texts)
        return self.placebo

    def _made_placebo(self, avoid: Sequence[str]) -> Applicable:
        pipe, seed = self.goal.pipe, self.options.seed
        if isinstance(self.edit, Edit):
            return placebo_edit(pipe, self.edit, seed=seed, avoid=avoid)
        assert isinstance(self.edit, AtInference)  # see `has_placebo`
        return self.edit.placebo(pipe, seed, avoid)

    def _own_words(self, attacked: Attacked) -> list[Any]:
        """Pictures of the prompts' own words by the model, not attacked."""
        with attacked.edited():
            return attacked.goal.pictures(attacked.goal.prompts)

    def _table(
        self, model: Model, attacked: Attacked, attempt: Attempt, old_pictures: Sequence[Any]
    ) -> pd.DataFrame:
        """The rows of one attempt."""
        import pandas as pd

        goal = attacked.goal
        with attempt.context():
            pictures = goal.pictures(attempt.prompts, is_stored=attempt.is_stored)
        current().say("scoring pictures")
        new = goal.judge(pictures, attempt.view)
        old = goal.judge(old_pictures, attempt.view)
        lines = []
        for probe, prompt in zip(goal.probes, attempt.prompts, strict=True):
            for seed in goal.seeds:
                unit = probe.unit or probe.prompt
                lines.append((self.kind, model, attempt.strength, prompt, unit, seed))
        table = pd.DataFrame(lines, columns=list(COLUMNS[:6]))
        table = table.assign(
            shown_before=old.shown, shown_after=new.shown, before=old.score, after=new.score
        )
        return _best_so_far(table, goal.seeds) if self.kind == "noise" else table

    def _state(self, goal: Goal, edit: Applicable | None, weights: str) -> Path | None:
        """Where the state of a training is kept, by all that makes a difference to it."""
        if self.keep is None:
            return None
        facts = goal.facts | {
            "options": _as_plain(self.options),
            "weights": weights,
            "edit": _edit_key(goal.pipe, edit),
        }
        return self.keep / state_name(self.kind, facts)

    def _settings(self, models: Sequence[Model], weights: str) -> dict[str, Any]:
        goal = self.goal
        never_had = self.never_had
        placebo = self.placebo if "placebo" in models else None
        return {
            "concept": goal.concept.name,
            "neighbors": list(goal.concept.neighbors),
            "kind": self.kind,
            **_as_plain(self.options),
            "models": list(models),
            "training": [(pair.prompt, pair.target) for pair in goal.training],
            "held_out": [asdict(probe) for probe in goal.probes],
            "seeds": list(goal.seeds),
            "scorer": goal.scorer.settings.get("scorer"),
            "edit": _described(goal.pipe, self.edit),
            "edited_layers": list(getattr(self.edit, "layers", ())),
            "placebo": None if placebo is None else _described(goal.pipe, placebo),
            "never_had": [] if never_had is None else never_had.facts["pictures"],
            **{name: value for name, value in goal.settings.items() if name != "progress"},
            "model": name_of(goal.pipe),
            "weights": weights,
            "versions": {"locogen": __version__} | {name: version(name) for name in LIBRARIES},
        }


def _described(pipe: Pipeline, edit: Applicable) -> dict[str, str]:
    """An edit's name, and a hash of what it changes."""
    changes = hashlib.sha256(" ".join(_edit_key(pipe, edit)).encode()).hexdigest()[:16]
    return {"name": str(getattr(edit, "name", type(edit).__name__)), "digest": changes}


def _as_plain(options: Options) -> dict[str, Any]:
    """The options; a strength of 1 goes without saying, as before there was another."""
    values = asdict(options)
    if options.strength == 1:
        del values["strength"]
    return values


def _edit_key(pipe: Pipeline, edit: Applicable | None) -> list[str]:
    if edit is None:
        return []
    if not isinstance(edit, Edit):
        with edit.applied(pipe):
            return [weights_of(pipe), *active_contexts(pipe)]
    return [f"{name} {digest(change.change)}" for name, change in edit.changes.items()]


def _best_so_far(table: pd.DataFrame, seeds: Sequence[int]) -> pd.DataFrame:
    """Rows of a search for noise: after so many seeds, the best of them; before, the first."""
    by_prompt = table.groupby("prompt", sort=False)
    rank = by_prompt.cumcount() + 1
    return table.assign(
        strength=rank,
        shown_before=by_prompt["shown_before"].transform("first"),
        before=by_prompt["before"].transform("first"),
        shown_after=by_prompt["shown_after"].cummax(),
        after=by_prompt["after"].cummax(),
    )
