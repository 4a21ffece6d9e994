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
from locogen.edit import Edit
from locogen.errors import LocogenError
from locogen.layers import find_layers
from locogen.phrasings import exchanged
from locogen.plan import Concept, PromptPair, distinct_seeds, windows
from locogen.runs import Run, generate

if TYPE_CHECKING:
    import pandas as pd

    from locogen.score import Scorer

Measure = Literal["efficacy", "generality", "specificity"]
MEASURES: tuple[Measure, ...] = ("efficacy", "generality", "specificity")
Array = np.ndarray[Any, Any]
_LPIPS_NET = "alexnet-owt-7be5be79.pth"  # torchvision's file of the network that LPIPS is trained on


@dataclass(frozen=True)
class Probe:
    """One prompt to look at before and after, scored against `text`; it is right where no text of `among` beats it.

    `measure`: efficacy, the edited concept on prompts that the fit has not seen; generality, the same in other
    words; specificity, neighbors that should stay.
    """

    measure: Measure
    prompt: str
    text: str
    among: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise LocogenError(f"measure is {self.measure!r}: take one of {', '.join(MEASURES)}")


def compare(before: Run, after: Run, *, text: str | None = None, scorer: Scorer | str | None = None) -> pd.DataFrame:
    """Two runs of the same prompts and seeds, row by row: prompt, seed, text, before, after, change (raw cosines).

    `text`: what both are scored against; None: each row's own prompt. `scorer`: None is the mini model's. Raises
    `LocogenError` where the rows of the runs are not the same.
    """
    import pandas as pd

    rows = [(row.prompt, row.seed) for row in before.plan]
    if rows != [(row.prompt, row.seed) for row in after.plan]:
        raise LocogenError("the runs have other prompts or seeds: generate both with the same")
    judge = _judge(scorer)
    texts = [text or prompt for prompt, _ in rows]
    old, new = (judge(list(run.pictures), texts)[0] for run in (before, after))
    table = pd.DataFrame(rows, columns=["prompt", "seed"])
    return table.assign(text=texts, before=old, after=new, change=new - old)


def probes_for(concept: Concept, others: Sequence[Concept] = ()) -> tuple[Probe, ...]:
    """Probes from a concept's pairs and its neighbors': prompts, their paraphrases, and the neighbors' prompts.

    Each is right where its own text scores highest among the same text with the neighbors of its kind in its place,
    and the text without the concept. A fact's text names the new answer, so there an edit should make it right.
    """
    every = [concept, *others]
    names = {c.name: _words(c) for c in every}
    found = []
    for c in every:
        measures: tuple[Measure, ...] = ("efficacy", "generality") if c is concept else ("specificity",)
        rivals = [names[o.name] for o in every if o.kind == c.kind and o is not c]
        for pair in c.pairs:
            text = pair.prompt if c is not concept else c.scored_text(pair)
            among = _among(pair, names[c.name], rivals) if c.kind != "fact" else (pair.target, pair.prompt)
            for measure in measures:
                prompt = pair.placebo or pair.prompt if measure == "generality" else pair.prompt
                found.append(Probe(measure, prompt, text, tuple(dict.fromkeys((text, *among)))))
    return tuple(found)


def _words(concept: Concept) -> str:
    """The words that stand for the concept in its prompts."""
    return concept.name if concept.kind == "style" else exchanged(concept.pairs[0])[0]


def _among(pair: PromptPair, own: str, rivals: Iterable[str]) -> tuple[str, ...]:
    return (*(pair.prompt.replace(own, rival) for rival in rivals), pair.target)


def control_edits(pipe: Any, edit: Edit, *, draws: int = 3, seed: int = 0) -> dict[str, Edit]:
    """The same edit elsewhere: at every other window of as many layers, on random layers as many, and on all.

    The keys are names for the table: "layers 2-3", "random layers 4, 9", "all layers".
    """
    count, width = len(find_layers(pipe)), len(edit.layers)
    dice = random.Random(seed)
    places = {str(window): tuple(window) for window in windows(count, width)}
    for _ in range(draws):
        drawn = tuple(sorted(dice.sample(range(count), width)))
        places.setdefault(f"random layers {', '.join(map(str, drawn))}", drawn)
    places["all layers"] = tuple(range(count))
    return {name: edit.refit(pipe, layers) for name, layers in places.items() if set(layers) != set(edit.layers)}


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

    `arms`: name → edit, applied `strength` times (above 1 makes up for what `preserve` holds back, at the neighbors'
    cost). `settings`: `num_inference_steps`, `guidance_scale`, `batch_size` of `generate`. One row an arm, probe and
    seed: `before` and `after` (raw cosine with the probe's text), `right_before` and `right_after`
    (whether it beats the texts of `among`), `ssim` of the two pictures (1: the same), `distance` of their features
    (1 - cosine of the scorer's picture embeddings, where it has them) and `lpips` where that package is installed.
    The model is left as found.
    """
    import pandas as pd

    if not arms or not probes:
        raise LocogenError("there is nothing to evaluate: give at least one arm and one probe")
    drawn, judge = distinct_seeds(seeds), _judge(scorer)
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
        new, after, right = _under(pipe, [edits] if isinstance(edits, Edit) else list(edits), strength, look)
        likeness = _likeness(old, new, features, _features(judge, new))
        measured = dict(before=before, after=after, right_before=right_before, right_after=right)
        measured |= {name: values[[i for *_, i in index]] for name, values in likeness.items()}
        frames.append(_asked(index).assign(**measured).assign(arm=arm))
    table = pd.concat(frames, ignore_index=True)
    return table.loc[:, ["arm", *table.columns.drop("arm")]]


def _asked(index: Sequence[tuple[Probe, int, int]]) -> pd.DataFrame:
    """The columns that are the same in every arm."""
    import pandas as pd

    rows = [(p.measure, p.prompt, p.text, s) for p, s, _ in index]
    return pd.DataFrame(rows, columns=["measure", "prompt", "text", "seed"])


def _under(pipe: Any, edits: Sequence[Edit], strength: float, look: Any) -> Any:
    """What `look` sees with all of the edits applied."""
    if not edits:
        return look()
    with edits[0].applied(pipe, strength):
        return _under(pipe, edits[1:], strength, look)


def summary(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Means with intervals, one row an arm, measure and quantity: `before after change low high n`, of the change.

    Quantities: `score` (raw cosine), `right` (share), `ssim`, `distance`, and `lpips` where there is one; the last
    three have no before, and their interval is of the mean itself. Prompts and seeds are crossed
    (`stats.crossed_bootstrap`). For `right`, `after_high` is the larger of the bootstrap's and Wilson's upper bound
    of the share after: the bootstrap alone says nothing where every picture agrees.
    """
    import pandas as pd

    lines: list[dict[str, Any]] = []
    for (arm, measure), part in table.groupby(["arm", "measure"], sort=False):  # pyright: ignore
        for quantity, old, new in (("score", "before", "after"), ("right", "right_before", "right_after")):
            a, b = _grid(part, new), _grid(part, old)
            change, mean = (stats.crossed_bootstrap(v[None], level=level) for v in (a - b, a))
            after_low, after_high = mean.low[0], mean.high[0]
            if quantity == "right":
                after_low = max(0.0, after_low)
                after_high = min(1.0, np.fmax(after_high, stats.wilson(int(a.sum()), a.size, level)[1]))
            lines.append(
                dict(arm=arm, measure=measure, quantity=quantity, before=b.mean(), after=a.mean())
                | dict(after_low=after_low, after_high=after_high, change=change.estimate[0])
                | dict(low=change.low[0], high=change.high[0], n=a.size)
            )
        for quantity in [name for name in ("ssim", "distance", "lpips") if name in part]:
            found = stats.crossed_bootstrap(_grid(part, quantity)[None], level=level)
            lines.append(
                dict(arm=arm, measure=measure, quantity=quantity, before=np.nan, after=found.estimate[0])
                | dict(after_low=found.low[0], after_high=found.high[0], change=np.nan, low=np.nan, high=np.nan)
                | dict(n=len(part))
            )
    return pd.DataFrame(lines)


def _grid(part: pd.DataFrame, column: str) -> Array:
    """(prompts, seeds) of one column; probes that share a prompt but not a text are rows of their own."""
    wide = part.pivot_table(index=["prompt", "text"], columns="seed", values=column, sort=False)
    return wide.to_numpy(float)


def _judge(chosen: Scorer | str | None) -> Scorer:
    from locogen.score import scorer

    return scorer(chosen or "mini") if chosen is None or isinstance(chosen, str) else chosen


def _measured(judge: Scorer, pictures: Sequence[Any], index: Sequence[tuple[Probe, int, int]]) -> tuple[Array, Array]:
    """Scores against the probes' own texts, and whether each is the highest among its rivals."""
    seen = [pictures[i] for *_, i in index]
    longest = max(len(probe.among) for probe, *_ in index)
    lines = [[probe.text for probe, *_ in index]]
    lines += [[(*probe.among, *[probe.text] * longest)[k] for probe, *_ in index] for k in range(longest)]
    own, *others = judge(seen, *lines)
    highest = np.max(others, axis=0) if others else own
    return own, own >= highest


def _features(judge: Any, pictures: Sequence[Any]) -> Array | None:
    return judge.pictures(pictures) if hasattr(judge, "pictures") else None


def _likeness(old: Sequence[Any], new: Sequence[Any], was: Array | None, now: Array | None) -> dict[str, Array]:
    """How alike the pictures of one prompt and seed stayed."""
    from skimage.metrics import structural_similarity

    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(old, new, strict=True)]
    size = min(7, *(side - 1 + side % 2 for side in pairs[0][0].shape[:2]))
    columns = {"ssim": np.array([structural_similarity(a, b, channel_axis=-1, win_size=size) for a, b in pairs])}
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

    if not (Path(torch.hub.get_dir()) / "checkpoints" / _LPIPS_NET).exists():  # it would be fetched, unasked
        return None
    net = lpips.LPIPS(net="alex", verbose=False)
    sides = [torch.from_numpy(np.stack([p[k] for p in pairs])).permute(0, 3, 1, 2) / 127.5 - 1 for k in (0, 1)]
    with torch.no_grad():
        return np.concatenate(
            [net(a, b).reshape(-1).numpy() for a, b in zip(*(s.split(32) for s in sides), strict=True)]
        )
