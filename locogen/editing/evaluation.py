"""What an edit did and what it broke: pictures before and after, in pairs, and what they show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from locogen import stats
from locogen.console import current, open_bar
from locogen.editing.likeness import likeness
from locogen.editing.probes import Probe
from locogen.editing.weights import refuse_edited
from locogen.errors import LocogenError
from locogen.files import AUTO
from locogen.pictures import score
from locogen.pictures.default_store import Place
from locogen.pictures.runs import Run, generate
from locogen.plan import distinct_seeds, settings_from
from locogen.stats import Array
from locogen.types import Pipeline

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image

    from locogen.pictures.score import Scorer

# Quantities with a value before and one after an edit: their columns.
BEFORE_AND_AFTER = {"score": ("before", "after"), "right": ("right_before", "right_after")}
# Quantities of a pair of pictures: the smallest and the largest value that they can have.
OF_PAIRS = {"ssim": (-1.0, 1.0), "distance": (0.0, 2.0), "lpips": (0.0, np.inf)}


# --- from pictures to a table --------------------------------------------------------------------


def compare(
    before: Run, after: Run, *, text: str | None = None, scorer: Scorer | str | None = None
) -> pd.DataFrame:
    """Score two runs of the same prompts and seeds, row by row.

    Args:
        before: A run of `generate`.
        after: The same prompts and seeds, for example with an edit applied.
        text: What all pictures are scored against; None: each row's own prompt.
        scorer: A scorer or its name (see `scorer`); None: the catalog's for the first run's model.

    Returns:
        A table with one row a prompt and seed: `prompt`, `seed`, `text`, `before` and `after`
        (raw cosines), `change`.

    Raises:
        LocogenError: The runs have different prompts or seeds.

    Example:
        >>> pipe = load("mini")
        >>> few = {"num_inference_steps": 1, "guidance_scale": 1.0, "progress": False}
        >>> before = generate(pipe, ["a picture of a cat"], **few)
        >>> with fit_edit(pipe, concept("mini/cat"), layers=range(8)).applied(pipe):
        ...     after = generate(pipe, ["a picture of a cat"], **few)
        >>> list(compare(before, after, text="a cat").columns)
        ['prompt', 'seed', 'text', 'before', 'after', 'change']
    """
    import pandas as pd

    rows = [(row.prompt, row.seed) for row in before.plan]
    if rows != [(row.prompt, row.seed) for row in after.plan]:
        raise LocogenError("the runs have other prompts or seeds: generate both with the same")
    judge = _judge_of(before, scorer)
    texts = [text or prompt for prompt, _ in rows]
    old = judge(list(before.pictures), texts)[0]  # (rows,)
    new = judge(list(after.pictures), texts)[0]
    table = pd.DataFrame(rows, columns=["prompt", "seed"])
    return table.assign(text=texts, before=old, after=new, change=new - old)


def _judge_of(run: Run, choice: Scorer | str | None) -> Scorer:
    """The scorer of a run whose pipeline may be gone: so a named one is loaded on the CPU."""
    if choice is None:
        choice = score.default_scorer(str(run.settings["model"]))
    return score.scorer(choice) if isinstance(choice, str) else choice


class Applicable(Protocol):
    """What a model can have within a context: an `Edit`, a `Steering`."""

    def applied(self, pipe: Pipeline, strength: float = 1.0) -> AbstractContextManager[Any]:
        """Within the context, it holds."""
        ...


def evaluate(
    pipe: Pipeline,
    arms: Mapping[str, Applicable | Sequence[Applicable]],
    probes: Sequence[Probe],
    *,
    seeds: Iterable[int] = range(4),
    strength: float = 1.0,
    scorer: Scorer | str | None = None,
    store: Place = AUTO,
    progress: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Measure edits in pairs: pictures of every probe and seed without and with each of them.

    The model is left as it was.

    Args:
        pipe: The pipeline.
        arms: What is compared: name -> an edit, several that are applied together, or () for none.
            A `Steering`, and anything else with its `applied`, counts as an edit.
        probes: Prompts to look at, as from `probes_for`.
        seeds: Random seeds; every prompt is made with each of them.
        strength: How many times each edit is added. Above 1 makes up for what `preserve` holds
            back, at the neighbors' cost.
        scorer: A scorer or its name (see `scorer`); None: the catalog's for the model.
        store: Folder for the pictures; "auto": `store_folder`; None: a temporary folder.
        progress: Whether to show a progress bar.
        settings: `num_inference_steps`, `guidance_scale` and `batch_size` of `generate`.

    Returns:
        A table with one row an arm, probe and seed. `before`, `after`: raw cosines with the
        probe's text. `right_before`, `right_after`: 1 if that text beats those of `among`, else 0;
        NaN without such texts. `sign`, `unit`: see `Probe`. `image_before`, `image_after`: names of
        the two pictures in the store. `ssim`: their likeness (1: the same). `distance`: 1 - cosine
        of their features, if the scorer has features. `lpips`: if that package is installed.

    Raises:
        LocogenError: No arm or no probe, an arm that is no edit, an unknown setting, a model that
            is edited already, an edit of another model, and as `generate`.

    Example:
        >>> pipe = load("mini")
        >>> edit = fit_edit(pipe, concept("mini/neon"), layers=[2, 3])
        >>> probe = Probe("efficacy", "a picture of a cat in the style of neon", "neon")
        >>> few = {"num_inference_steps": 1, "guidance_scale": 1.0, "progress": False}
        >>> table = evaluate(pipe, {"carrier": edit, "none": ()}, [probe], seeds=[0], **few)
        >>> (table["before"] == table["after"]).tolist()
        [False, True]
    """
    import pandas as pd

    edits_of = _edits_of(arms)
    if not edits_of or not probes:
        raise LocogenError("there is nothing to evaluate: give at least one arm and one probe")
    settings_from("evaluate", settings)  # before any picture
    refuse_edited(pipe, "evaluate")
    prompts = list(dict.fromkeys(probe.prompt for probe in probes))
    seeds = distinct_seeds(seeds)
    with open_bar(progress, "loading the scorer") as bar:
        measuring = _Measuring(
            pipe,
            prompts,
            seeds,
            _rows(probes, prompts, seeds),
            # Before the pictures: a mistake in the scorer should not cost a run.
            score.scorer_for(pipe, scorer),
            {"store": store, "progress": progress, **settings},
        )
        # Of all arms at once: the bar then says how long all of them take.
        bar.expect("picture", len(prompts) * len(seeds) * (1 + len(edits_of)))
        old = measuring.measure((), strength)
        tables = []
        for name, edits in edits_of.items():
            new = measuring.measure(edits, strength) if edits else old
            tables.append(measuring.table(old, new).assign(arm=name))
    table = pd.concat(tables, ignore_index=True)
    return table.loc[:, ["arm", *table.columns.drop("arm")]]


def _edits_of(arms: Any) -> dict[str, list[Applicable]]:
    """Each arm's edits as a list, empty for none."""
    if not isinstance(arms, Mapping):
        raise LocogenError(
            f"arms is of type {type(arms).__name__}: give what is compared by name, such as "
            '{"edit": edit, "no edit": ()}'
        )
    edits_of = {}
    for name, arm in arms.items():
        are_several = isinstance(arm, Sequence) and not isinstance(arm, str)
        edits = list(arm) if are_several else [arm]
        for edit in edits:
            if not hasattr(edit, "applied"):
                raise LocogenError(
                    f"the arm {name!r} has {edit!r}, which is no edit: give one, as from fit_edit "
                    "or edit_with, a list of several, or () for none"
                )
        edits_of[str(name)] = edits
    return edits_of


@dataclass(frozen=True)
class _Row:
    """A row of every arm: a probe under a seed, and the number of its picture.

    Probes with one prompt share its pictures.
    """

    probe: Probe
    seed: int
    picture: int


def _rows(probes: Iterable[Probe], prompts: Sequence[str], seeds: Sequence[int]) -> list[_Row]:
    """All rows, probe by probe. Pictures are numbered prompt by prompt, as in `generate`."""
    rows: list[_Row] = []
    for probe in probes:
        first = prompts.index(probe.prompt) * len(seeds)
        rows += [_Row(probe, seed, first + place) for place, seed in enumerate(seeds)]
    return rows


@dataclass(frozen=True, eq=False)
class _Measured:
    """Pictures of all prompts and seeds, and what the scorer says of them."""

    pictures: Sequence[Image]
    names: Sequence[str]  # of the pictures, in the store
    scores: Array  # (rows,), raw cosines with the probe's text
    right: Array  # (rows,), 1, 0 or NaN
    features: Array | None  # (pictures, width)


@dataclass(frozen=True, eq=False)
class _Measuring:
    """Makes and scores the pictures of the rows, always with the same pipeline and settings."""

    pipe: Pipeline
    prompts: Sequence[str]
    seeds: Sequence[int]
    rows: Sequence[_Row]
    scorer: Scorer
    settings: Mapping[str, Any]

    def measure(self, edits: Iterable[Applicable], strength: float) -> _Measured:
        """With all of the edits applied."""
        with ExitStack() as contexts:
            for edit in edits:
                contexts.enter_context(edit.applied(self.pipe, strength))
            run = generate(self.pipe, self.prompts, seeds=self.seeds, **self.settings)
            current().say("scoring pictures")
            pictures = list(run.pictures)
            names = list(run.table["image"])
            scores, right = self._scores(pictures)
        # A scorer need not have features: those of the catalog do.
        features_of = getattr(self.scorer, "pictures", None)
        features = None if features_of is None else features_of(pictures)
        return _Measured(pictures, names, scores, right, features)

    def _scores(self, pictures: Sequence[Image]) -> tuple[Array, Array]:
        """Scores with the probes' own texts, and whether no other text is higher, (rows,) each."""
        pictures_of_rows = [pictures[row.picture] for row in self.rows]
        own_texts = [row.probe.text for row in self.rows]
        most = max(len(row.probe.among) for row in self.rows)
        other_texts: list[list[str]] = []
        for k in range(most):
            line = []
            for row in self.rows:
                # Shorter lists are filled up with the own text, which cannot beat itself.
                among = row.probe.among
                line.append(among[k] if k < len(among) else row.probe.text)
            other_texts.append(line)
        own_scores, *other_scores = self.scorer(pictures_of_rows, own_texts, *other_texts)

        if not other_scores:
            return own_scores, np.full(len(self.rows), np.nan)
        highest = np.max(other_scores, axis=0)  # (rows,)
        # Its own text alone would always be the best of all.
        comparable = np.array([bool(set(row.probe.among) - {row.probe.text}) for row in self.rows])
        return own_scores, np.where(comparable, own_scores >= highest, np.nan)

    def table(self, old: _Measured, new: _Measured) -> pd.DataFrame:
        """One row a probe and seed: what it is, and what was measured before and after."""
        import pandas as pd

        lines = []
        for row in self.rows:
            probe = row.probe
            unit = probe.unit or probe.prompt
            lines.append((probe.measure, unit, probe.prompt, probe.text, row.seed, probe.sign))
        columns = ["measure", "unit", "prompt", "text", "seed", "sign"]
        table = pd.DataFrame(lines, columns=columns)
        table = table.assign(
            before=old.scores,
            after=new.scores,
            right_before=old.right,
            right_after=new.right,
        )
        places = [row.picture for row in self.rows]
        table = table.assign(
            image_before=[old.names[place] for place in places],
            image_after=[new.names[place] for place in places],
        )
        alike = likeness(old.pictures, new.pictures, old.features, new.features)
        return table.assign(**{name: values[places] for name, values in alike.items()})


# --- from the table to claims --------------------------------------------------------------------


def summary(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Average an evaluation, with intervals: one row an arm, measure and quantity.

    Units and seeds are crossed (`stats.crossed_bootstrap`); probes of one unit (`Probe.unit`: its
    wordings, or texts of one prompt) are averaged. Bounds of shares are no nearer than so many
    independent units allow (`stats.clopper_pearson`), however many pictures there are of each.

    Args:
        table: From `evaluate`.
        level: Coverage of the intervals.

    Returns:
        A table of `arm measure sign quantity before after after_low after_high change low high n
        units seeds`.
        Quantities: `score` (raw cosine), `right` (share), `ssim`, `distance`, and `lpips` if it
        was measured. `low` and `high` are of the change; the last three quantities have none, only
        the interval of `after`. `n`: number of pictures; `units`: of units; `seeds`: of seeds.

    Example:
        >>> import pandas as pd
        >>> probe = {"arm": "layer 3", "measure": "efficacy", "sign": -1, "prompt": "a neon cat"}
        >>> scores = {"before": 0.75, "after": 0.5, "right_before": 1, "right_after": 0}
        >>> table = pd.DataFrame([probe | {"seed": seed} | scores for seed in range(2)])
        >>> summary(table)[["measure", "quantity", "before", "after", "change", "n"]]
            measure quantity  before  after  change  n
        0  efficacy    score    0.75    0.5   -0.25  2
        1  efficacy    right    1.00    0.0   -1.00  2
    """
    import pandas as pd

    lines: list[dict[str, Any]] = []
    for (arm, measure), part in table.groupby(["arm", "measure"], sort=False):  # pyright: ignore
        labels = {"arm": arm, "measure": measure, "sign": int(part["sign"].iloc[0])}
        counts = {
            "n": _pictures(part),
            "units": part[_unit_column(part)].nunique(),
            "seeds": part["seed"].nunique(),
        }
        for quantity, (before, after) in BEFORE_AND_AFTER.items():
            if bool(part[after].isna().to_numpy().any()):
                continue  # probes without alternatives are neither right nor wrong
            means = _paired_means(
                _grid(part, before), _grid(part, after), level, shares=quantity == "right"
            )
            lines.append(labels | {"quantity": quantity} | means | counts)
        for quantity, bounds in OF_PAIRS.items():
            # What is joined to an evaluation, such as attacks, may lack them.
            if quantity in part and not bool(part[quantity].isna().to_numpy().all()):
                means = _pair_means(_grid(part, quantity), level, bounds)
                lines.append(labels | {"quantity": quantity} | means | counts)
    return pd.DataFrame(lines)


def _paired_means(old: Array, new: Array, level: float, *, shares: bool) -> dict[str, Any]:
    """Means and change of two (units, seeds) arrays, with intervals.

    `shares`: they are shares of right pictures.
    """
    change = stats.crossed_bootstrap((new - old)[None], level=level, yes_no=False)
    mean = stats.crossed_bootstrap(new[None], level=level, yes_no=False)
    change_low = change.low[0]
    change_high = change.high[0]
    after_low = mean.low[0]
    after_high = mean.high[0]
    if shares:
        # The bootstrap says nothing where every picture agrees (its own floor for yes/no scores
        # knows of no units, and is left out). So the wider of its interval and
        # the exact one is taken; the number of trials is that of units, since pictures of one unit
        # succeed and fail together.
        units = len(new)
        least, most = stats.clopper_pearson(_within_one(new.mean()) * units, units, level)
        after_low = max(0.0, np.fmin(after_low, least))
        after_high = min(1.0, np.fmax(after_high, most))
        below, above = _smallest_reach(new - old, level)
        change_low = max(-1.0, np.fmin(change_low, change.estimate[0] - below))
        change_high = min(1.0, np.fmax(change_high, change.estimate[0] + above))
    return {
        "before": old.mean(),
        "after": new.mean(),
        "after_low": after_low,
        "after_high": after_high,
        "change": change.estimate[0],
        "low": change_low,
        "high": change_high,
    }


def _within_one(share: float) -> float:
    """A mean of shares, which rounding may have put a little above 1."""
    return min(1.0, float(share))


def _smallest_reach(changes: Array, level: float) -> tuple[float, float]:
    """How far an interval of the mean change of shares reaches at least, below and above it.

    `changes`: (units, seeds), -1 to 1. Gains and losses are shares of the units, each known no
    better than by `stats.clopper_pearson`. What no unit shows may still happen to some.
    """
    units = len(changes)
    gained = _within_one(np.maximum(changes, 0).mean())
    lost = _within_one(np.maximum(-changes, 0).mean())
    least_gained, most_gained = stats.clopper_pearson(gained * units, units, level)
    least_lost, most_lost = stats.clopper_pearson(lost * units, units, level)
    below = math.hypot(gained - least_gained, most_lost - lost)
    above = math.hypot(lost - least_lost, most_gained - gained)
    return below, above


def _pair_means(values: Array, level: float, bounds: tuple[float, float]) -> dict[str, Any]:
    """The mean of a quantity of pairs, (units, seeds), with its interval within the bounds."""
    smallest, largest = bounds
    mean = stats.crossed_bootstrap(values[None], level=level, yes_no=False)
    return {
        "before": np.nan,
        "after": mean.estimate[0],
        "change": np.nan,
        "after_low": max(mean.low[0], smallest),
        "after_high": min(mean.high[0], largest),
        "low": np.nan,
        "high": np.nan,
    }


def lead(table: pd.DataFrame, arm: str, *, level: float = 0.95) -> pd.DataFrame:
    """Compare an arm with every other: which separates its concept better from the neighbors.

    An arm's outcome is the change of `efficacy` in the direction that is meant (`sign`) plus that
    of `specificity`, in shares of right pictures: at most 1. A window that shares layers with the
    arm's is a rival that should do about as well.

    Args:
        table: From `evaluate`.
        arm: The arm that is compared with all others.
        level: Coverage of all intervals together (Bonferroni).

    Returns:
        A table of `rival estimate low high`, one row another arm; above 0 the arm is better.

    Raises:
        LocogenError: The table lacks the arm, others, or one of the two measures, or these have
            pictures that are neither right nor wrong.

    Example:
        >>> import pandas as pd
        >>> names = ["arm", "measure", "sign", "right_after"]
        >>> rows = [("layer 3", "efficacy", -1, 0), ("layer 3", "specificity", 1, 1)]
        >>> rows += [("layer 7", "efficacy", -1, 1), ("layer 7", "specificity", 1, 1)]
        >>> table = pd.DataFrame(rows, columns=names).assign(prompt="a neon cat")
        >>> table = pd.concat([table.assign(seed=seed) for seed in range(2)])
        >>> lead(table, "layer 3")[["rival", "estimate"]]
             rival  estimate
        0  layer 7       1.0
    """
    import pandas as pd

    rivals = [name for name in table["arm"].unique() if name != arm]
    parts = dict(iter(table.groupby(["arm", "measure"], sort=False)))
    measures = [name for name in ("efficacy", "specificity") if name in set(table["measure"])]
    if not rivals or arm not in set(table["arm"]) or len(measures) < 2:
        raise LocogenError(
            f"there is nothing to compare {arm!r} with: evaluate it and other arms together "
            f"(the table has {', '.join(map(str, table['arm'].unique()))}), with efficacy and "
            "specificity, as from probes_for(concept, others)"
        )
    _check_judged(arm, measures, parts)
    lines = []
    for rival in rivals:
        gaps = [
            _gap(parts[arm, measure], parts[rival, measure], level, len(rivals))
            for measure in measures
        ]
        lines.append((rival, *_sum_of(gaps)))
    return pd.DataFrame(lines, columns=["rival", "estimate", "low", "high"])


def _sum_of(gaps: Sequence[_Gap]) -> tuple[float, float, float]:
    """The sum of gaps of different pictures, with the ends of its interval."""
    estimate = 0.0
    below = 0.0
    above = 0.0
    for gap in gaps:
        estimate += gap.estimate
        # The measures come from different pictures: half-widths add in quadrature.
        below = np.hypot(below, gap.below)
        above = np.hypot(above, gap.above)
    return estimate, estimate - below, estimate + above


def _check_judged(arm: str, measures: Iterable[str], parts: Mapping[Any, pd.DataFrame]) -> None:
    """Raise where pictures are neither right nor wrong, since nothing else could be shown."""
    for measure in measures:
        part = parts[arm, measure]
        unjudged: Any = part[part["right_after"].isna()]
        if len(unjudged):
            raise LocogenError(
                f"{measure} has pictures that are neither right nor wrong, such as of "
                f"{unjudged['prompt'].iloc[0]!r}: its probe names nothing else that they could "
                "show; give the concept a target or neighbors, or the probe among="
            )


class _Gap(NamedTuple):
    """A difference of shares, and how far its interval reaches below and above it."""

    estimate: float
    below: float
    above: float


def _gap(part: pd.DataFrame, other: pd.DataFrame, level: float, rivals: int) -> _Gap:
    """How much more of one arm's pictures are as they should be; paired on units and seeds."""
    sign = int(part["sign"].iloc[0])
    gap = sign * (_grid(part, "right_after") - _grid(other, "right_after"))  # (units, seeds)
    shared = 1 - (1 - level) / rivals  # Bonferroni
    mean = stats.crossed_bootstrap(gap[None], level=shared, yes_no=False)
    below, above = _smallest_reach(gap, shared)
    return _Gap(
        mean.estimate[0],
        below=np.fmax(mean.estimate[0] - mean.low[0], below),
        above=np.fmax(mean.high[0] - mean.estimate[0], above),
    )


def _grid(part: pd.DataFrame, column: str) -> Array:
    """One column as (units, seeds); probes of one unit are averaged."""
    import pandas as pd

    unit = _unit_column(part)
    means = pd.DataFrame(part.groupby([unit, "seed"], sort=False)[column].mean()).reset_index()
    levels = {name: list(means[name].unique()) for name in (unit, "seed")}
    return stats.cube(means, column, levels)


def _unit_column(part: pd.DataFrame) -> str:
    """The column of units; a table without one has a unit for each prompt."""
    return "unit" if "unit" in part else "prompt"


def _pictures(part: pd.DataFrame) -> int:
    """How many pictures there are: probes that share a prompt share them."""
    return len(part.drop_duplicates(["prompt", "seed"]))
