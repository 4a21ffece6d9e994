"""What an edit did and what it broke: paired pictures before and after, with controls that a claim must beat."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from locogen import stats
from locogen.editing.edit import Edit
from locogen.errors import LocogenError
from locogen.models.layers import find_layers
from locogen.models.offload import resting_device
from locogen.phrasings import phrase_in
from locogen.pictures.runs import Run, generate
from locogen.plan import Concept, PromptPair, distinct_seeds, windows

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.score import Scorer

Measure = Literal["efficacy", "generality", "specificity", "ordinary"]
MEASURES: tuple[Measure, ...] = ("efficacy", "generality", "specificity", "ordinary")
Array = np.ndarray[Any, Any]
_BOUNDS = (("ssim", -1.0, 1.0), ("distance", 0.0, 2.0), ("lpips", 0.0, np.inf))
_LPIPS_NET = (
    "alexnet-owt-7be5be79.pth"  # torchvision's file of the network that LPIPS is trained on
)


@dataclass(frozen=True)
class Probe:
    """One prompt to look at before and after, scored against `text`; it is right where no text of `among` beats it.

    `measure`: efficacy, the edited concept on prompts that the fit has not seen; generality, the same in other
    words; specificity, neighbors that should stay; ordinary, pictures that have nothing to do with it. `comes`: the
    edit should make it right (a fact's new answer), instead of wrong; neighbors should always stay right.
    """

    measure: Measure
    prompt: str
    text: str
    among: tuple[str, ...] = ()
    comes: bool = False

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise LocogenError(f"measure is {self.measure!r}: take one of {', '.join(MEASURES)}")

    @property
    def sign(self) -> int:
        """1 where more right pictures are what the edit should bring, -1 where fewer are."""
        return 1 if self.comes or self.measure in ("specificity", "ordinary") else -1


def compare(
    before: Run, after: Run, *, text: str | None = None, scorer: Scorer | str | None = None
) -> pd.DataFrame:
    """Two runs of the same prompts and seeds, row by row: prompt, seed, text, before, after, change (raw cosines).

    `text`: what both are scored against; None: each row's own prompt. `scorer`: None is the catalog's for the model
    of the first run. Raises `LocogenError` where the rows of the runs are not the same.
    """
    import pandas as pd

    rows = [(row.prompt, row.seed) for row in before.plan]
    if rows != [(row.prompt, row.seed) for row in after.plan]:
        raise LocogenError("the runs have other prompts or seeds: generate both with the same")
    judge = _judge(scorer, str(before.settings["model"]))
    texts = [text or prompt for prompt, _ in rows]
    old, new = (judge(list(run.pictures), texts)[0] for run in (before, after))
    table = pd.DataFrame(rows, columns=["prompt", "seed"])
    return table.assign(text=texts, before=old, after=new, change=new - old)


def probes_for(concept: Concept, others: Sequence[Concept] = ()) -> tuple[Probe, ...]:
    """Probes from a concept's pairs and its neighbors': prompts, their paraphrases, and the neighbors' prompts.

    Each is right where its own text scores highest among the same text with the neighbors of its kind in its place,
    and the text without the concept. A fact's text names the new answer, so there an edit should make it right. The
    ordinary pictures are those of the pairs' targets, but for empty ones. A pair without a paraphrase has no probe of
    generality.
    """
    every = [concept, *others]
    names = {c.name: _words(c) for c in every}
    found: list[Probe] = []
    for c in every:
        rivals = [names[o.name] for o in every if o.kind == c.kind and o is not c]
        for pair in c.pairs:
            text = pair.prompt if c is not concept else c.scored_text(pair)
            among = (
                _among(pair, names[c.name], rivals)
                if c.kind != "fact"
                else (pair.target, pair.prompt)
            )
            texts = dict.fromkeys((text, *among))
            asked: dict[str, Any] = dict(text=text, among=tuple(rival for rival in texts if rival))
            if c is not concept:
                found.append(Probe("specificity", pair.prompt, **asked))
                continue
            comes = c.kind == "fact"
            found.append(Probe("efficacy", pair.prompt, **asked, comes=comes))
            if pair.placebo:
                found.append(Probe("generality", pair.placebo, **asked, comes=comes))
            if pair.target:  # nothing can be scored against an empty text
                found.append(Probe("ordinary", pair.target, pair.target))
    return tuple(dict.fromkeys(found))


def _words(concept: Concept) -> str:
    """The words that stand for the concept in its prompts."""
    return concept.name if concept.kind == "style" else phrase_in(concept, concept.pairs[0])


def _among(pair: PromptPair, own: str, rivals: Iterable[str]) -> tuple[str, ...]:
    return (*(pair.prompt.replace(own, rival) for rival in rivals), pair.target)


def control_edits(pipe: Any, edit: Edit, *, draws: int = 3, seed: int = 0) -> dict[str, Edit]:
    """The same edit elsewhere: at every other window of as many layers, on random layers as many, and on all.

    The keys are names for the table: "layers 2-3", "layers 7-8 (shares 8)" where a window shares layers with the edit,
    "random layers 4, 9" of those that the edit leaves alone, "all layers". Of layers that can be edited, each time:
    those that read text and picture by the same matrices (`Layer.joined`) are left out.
    """
    found, width = find_layers(pipe), len(edit.layers)
    apart = [layer.index for layer in found if not layer.joined]
    dice, free = random.Random(seed), [i for i in apart if i not in edit.layers]
    places = {}
    for window in [w for w in windows(len(found), width) if set(w) <= set(apart)]:
        shared = sorted(set(window) & set(edit.layers))
        places[f"{window} (shares {', '.join(map(str, shared))})" if shared else str(window)] = (
            tuple(window)
        )
    for _ in range(draws if len(free) >= width else 0):
        drawn = tuple(sorted(dice.sample(free, width)))
        places.setdefault(f"random layers {', '.join(map(str, drawn))}", drawn)
    places["all layers"] = tuple(apart)
    return {
        name: edit.refit(pipe, layers)
        for name, layers in places.items()
        if set(layers) != set(edit.layers)
    }


def evaluate(
    pipe: Any,
    arms: Mapping[str, Edit | Sequence[Edit]],
    probes: Sequence[Probe],
    *,
    seeds: Iterable[int] = range(2),
    strength: float = 1.0,
    scorer: Scorer | str | None = None,
    store: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> pd.DataFrame:
    """Pictures of every probe and seed without and with each arm's edit (or edits, together), measured in pairs.

    `arms`: name → edit (or () for none), applied `strength` times (above 1 makes up for what `preserve` holds back,
    at the neighbors' cost). `scorer`: None is the catalog's for the model, as in `localize`. `settings`:
    `num_inference_steps`, `guidance_scale`, `batch_size` of `generate`. One row an arm, probe and seed: `before` and
    `after` (raw cosine with the probe's text), `right_before` and `right_after` (1 where it beats the texts of
    `among`, else 0; NaN where there are none), `sign` (`Probe.sign`), `ssim` of the two pictures (1: the same),
    `distance` of their features (1 - cosine of the scorer's picture embeddings, where it has them) and `lpips` where
    that package is installed.
    The model is left as found.
    """
    import pandas as pd

    if not arms or not probes:
        raise LocogenError("there is nothing to evaluate: give at least one arm and one probe")
    model = str(getattr(pipe.config, "_name_or_path", "") or "")
    drawn, judge = distinct_seeds(seeds), _judge(scorer, model, resting_device(pipe))
    prompts = list(dict.fromkeys(probe.prompt for probe in probes))
    rows = {(p, s): i for i, (p, s) in enumerate((p, s) for p in prompts for s in drawn)}
    index = [(probe, s, rows[probe.prompt, s]) for probe in probes for s in drawn]

    def look() -> tuple[list[Any], Array, Array]:
        run = generate(pipe, prompts, seeds=drawn, store=store, progress=progress, **settings)
        pictures = list(run.pictures)
        return pictures, *_measured(judge, pictures, index)

    old, before, right_before = look()
    features = _features(judge, old)
    frames = []
    for arm, edits in arms.items():
        several = [edits] if isinstance(edits, Edit) else list(edits)
        new, after, right = (
            _under(pipe, several, strength, look) if several else (old, before, right_before)
        )
        likeness = _likeness(old, new, features, _features(judge, new))
        measured = dict(before=before, after=after, right_before=right_before, right_after=right)
        measured |= {name: values[[i for *_, i in index]] for name, values in likeness.items()}
        frames.append(_asked(index).assign(**measured).assign(arm=arm))
    table = pd.concat(frames, ignore_index=True)
    return table.loc[:, ["arm", *table.columns.drop("arm")]]


def _asked(index: Sequence[tuple[Probe, int, int]]) -> pd.DataFrame:
    """The columns that are the same in every arm."""
    import pandas as pd

    rows = [(p.measure, p.prompt, p.text, s, p.sign) for p, s, _ in index]
    return pd.DataFrame(rows, columns=["measure", "prompt", "text", "seed", "sign"])


def _under(pipe: Any, edits: Sequence[Edit], strength: float, look: Any) -> Any:
    """What `look` sees with all of the edits applied."""
    if not edits:
        return look()
    with edits[0].applied(pipe, strength):
        return _under(pipe, edits[1:], strength, look)


def summary(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Means with intervals, one row an arm, measure and quantity: `before after change low high n sign`, of the change.

    Quantities: `score` (raw cosine), `right` (share), `ssim`, `distance`, and `lpips` where there is one; the last
    three have no before, and their interval is of the mean itself. Prompts and seeds are crossed
    (`stats.crossed_bootstrap`), probes that share a prompt averaged. `after_low` and `after_high` of `right` are the
    wider of the bootstrap's and Wilson's, of as many trials as there are prompts: the bootstrap says nothing where
    every picture agrees, and seeds of one prompt are no trials of their own. Where no picture changed, the change has
    Wilson's bound of none in as many.
    """
    import pandas as pd

    lines: list[dict[str, Any]] = []
    for (arm, measure), part in table.groupby(["arm", "measure"], sort=False):  # pyright: ignore
        told = dict(arm=arm, measure=measure, sign=int(part["sign"].iloc[0]))
        for quantity, old, new in (
            ("score", "before", "after"),
            ("right", "right_before", "right_after"),
        ):
            if bool(part[new].notna().to_numpy().all()):
                share = quantity == "right"
                lines.append(
                    told
                    | dict(quantity=quantity)
                    | _paired(_grid(part, old), _grid(part, new), level, share)
                )
        for quantity, least, most in [bounds for bounds in _BOUNDS if bounds[0] in part]:
            values = _grid(part, quantity)
            found = stats.crossed_bootstrap(values[None], level=level)
            lines.append(
                told
                | dict(quantity=quantity, before=np.nan, after=found.estimate[0], change=np.nan)
                | dict(after_low=max(found.low[0], least), after_high=min(found.high[0], most))
                | dict(low=np.nan, high=np.nan, n=values.size)
            )
    return pd.DataFrame(lines)


def _paired(old: Array, new: Array, level: float, share: bool) -> dict[str, Any]:
    """Means and change of two (prompts, seeds) arrays, with intervals; `share`: they are shares of right pictures."""
    change, mean = (stats.crossed_bootstrap(v[None], level=level) for v in (new - old, new))
    ends = [change.low[0], change.high[0], mean.low[0], mean.high[0]]
    if share:
        low, high = stats.wilson(new.mean() * len(new), len(new), level)
        ends[2:] = max(0.0, np.fmin(ends[2], low)), min(1.0, np.fmax(ends[3], high))
        if (new == old).all():
            ends[1] = stats.wilson(0, len(new), level)[1]
            ends[0] = -ends[1]
    return dict(before=old.mean(), after=new.mean(), after_low=ends[2], after_high=ends[3]) | dict(
        change=change.estimate[0], low=ends[0], high=ends[1], n=new.size
    )


def lead(table: pd.DataFrame, arm: str, *, level: float = 0.95) -> pd.DataFrame:
    """How much better an arm tells its concept from the neighbors than each other arm: `rival estimate low high`.

    What it brings is the change of `efficacy` in the wanted direction (`sign`) plus that of `specificity`, in shares
    of right pictures: 1 is all one can have. Paired on the same prompts and seeds; both differences' half-widths are
    added in quadrature; intervals are Bonferroni-corrected for the number of rivals, so that all hold at once. A
    window that shares layers with the arm's is a rival that should do alike. Raises `LocogenError` where the table
    lacks the arm, others, or one of the measures.
    """
    import pandas as pd

    rivals = [a for a in table["arm"].unique() if a != arm]
    measures = [m for m in ("efficacy", "specificity") if m in set(table["measure"])]
    if not rivals or len(rivals) == table["arm"].nunique() or len(measures) < 2:
        raise LocogenError(
            f"there is nothing to compare {arm!r} with: give evaluate it, controls, and both measures"
        )
    parts = dict(iter(table.groupby(["arm", "measure"], sort=False)))
    lines = []
    for rival in rivals:
        estimate, below, above = 0.0, 0.0, 0.0
        for measure in measures:
            own, other = parts[arm, measure], parts[rival, measure]
            gap = int(own["sign"].iloc[0]) * (
                _grid(own, "right_after") - _grid(other, "right_after")
            )
            found = stats.crossed_bootstrap(gap[None], level=1 - (1 - level) / len(rivals))
            none = stats.wilson(0, len(gap), level)[1] if not gap.any() else 0.0
            estimate += found.estimate[0]
            below = np.hypot(below, max(found.estimate[0] - found.low[0], none))
            above = np.hypot(above, max(found.high[0] - found.estimate[0], none))
        lines.append((rival, estimate, estimate - below, estimate + above))
    return pd.DataFrame(lines, columns=["rival", "estimate", "low", "high"])


def _grid(part: pd.DataFrame, column: str) -> Array:
    """(prompts, seeds) of one column; probes that share a prompt share its pictures, and are averaged."""
    return part.pivot_table(index="prompt", columns="seed", values=column, sort=False).to_numpy(
        float
    )


def _judge(chosen: Scorer | str | None, model: str, device: str = "cpu") -> Scorer:
    """The scorer asked for, else the one for a model by the folder or hub id that it was loaded from."""
    from locogen.pictures.score import default_scorer, scorer

    chosen = chosen or default_scorer(model)
    return scorer(chosen, device=device) if isinstance(chosen, str) else chosen


def _measured(
    judge: Scorer, pictures: Sequence[Any], index: Sequence[tuple[Probe, int, int]]
) -> tuple[Array, Array]:
    """Scores against the probes' own texts, and whether each is the highest among its rivals."""
    seen = [pictures[i] for *_, i in index]
    longest = max(len(probe.among) for probe, *_ in index)
    lines = [[probe.text for probe, *_ in index]]
    lines += [
        [(*probe.among, *[probe.text] * longest)[k] for probe, *_ in index] for k in range(longest)
    ]
    own, *others = judge(seen, *lines)
    alone = np.array([not probe.among for probe, *_ in index])
    highest = np.max(others, axis=0) if others else own
    return own, np.where(alone, np.nan, own >= highest)


def _features(judge: Any, pictures: Sequence[Any]) -> Array | None:
    return judge.pictures(pictures) if hasattr(judge, "pictures") else None


def _likeness(
    old: Sequence[Any], new: Sequence[Any], was: Array | None, now: Array | None
) -> dict[str, Array]:
    """How alike the pictures of one prompt and seed stayed."""
    from skimage.metrics import structural_similarity

    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(old, new, strict=True)]
    size = min(7, *(side - 1 + side % 2 for side in pairs[0][0].shape[:2]))
    columns = {
        "ssim": np.array(
            [structural_similarity(a, b, channel_axis=-1, win_size=size) for a, b in pairs]
        )
    }
    if was is not None and now is not None:
        columns["distance"] = 1 - np.einsum("id,id->i", was, now)
    perceived = _lpips(pairs)
    return columns if perceived is None else columns | {"lpips": perceived}


def _lpips(pairs: Sequence[tuple[Array, Array]]) -> Array | None:
    """LPIPS (Zhang et al. 2018) of picture pairs, where the package `lpips` and its network are installed."""
    try:
        lpips = import_module("lpips")
    except ImportError:
        return None
    import torch

    if not (
        Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_NET
    ).exists():  # it would be fetched, unasked
        return None
    net = lpips.LPIPS(net="alex", verbose=False)
    sides = [
        torch.from_numpy(np.stack([p[k] for p in pairs])).permute(0, 3, 1, 2) / 127.5 - 1
        for k in (0, 1)
    ]
    with torch.no_grad():
        return np.concatenate(
            [
                net(a, b).reshape(-1).numpy()
                for a, b in zip(*(s.split(32) for s in sides), strict=True)
            ]
        )
