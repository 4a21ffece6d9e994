"""Causal tracing, the baseline that LocoGen replaces: hear the concept wrongly, then put one clean state back.

Three kinds of rows: the prompt as it is, the prompt with noise on the concept's tokens (corrupted), and the corrupted
one with one state of the clean run restored. What a state brings back of the score is its effect (Meng et al. 2022,
arXiv 2202.05262; for text-to-image models Basu et al. 2024, arXiv 2405.01008, section 3).
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.catalog import usual_settings
from locogen.errors import LocogenError, unknown
from locogen.interventions.corruption import Noise, Restored, corrupted_states
from locogen.interventions.states import (
    DENOISER_PARTS,
    TEXT_PARTS,
    check_apart,
    find_states,
    find_text_states,
    restoring,
)
from locogen.localization.localize import in_reading_order, score_columns, scorer_for, source_of
from locogen.models.families import end_position, subject_occurrences, warn_unread
from locogen.models.text import PromptEncoding
from locogen.phrasings import shown_text, subject_in
from locogen.pictures.batches import Texts, called, halved
from locogen.pictures.progress import beat
from locogen.pictures.runs import Pictures, Run, _check_finite, _circumstances, _key
from locogen.pictures.store import PictureStore, Record, content_key
from locogen.plan import Concept, Intervention, Settings, distinct_seeds

if TYPE_CHECKING:
    from locogen.pictures.score import Scorer

TOKENS = ("first", "last subject", "last")
FEW = 4  # noises whose text states are kept


@dataclass(frozen=True)
class Restoration:
    """One picture to make: `prompt` under `seed`; with `noise`, corrupted; with `states` or `text`, some of it undone.

    `states`: which of `find_states` are those of the clean run; `text`: (which of `find_text_states`, token position).
    `axis` and `position` say what the row is for: the part (for text also the token), and its layer.
    """

    prompt: str
    seed: int
    noise: Noise | None = None
    states: tuple[int, ...] = ()
    text: Restored = ()
    role: str = "baseline"
    axis: str | None = None
    position: int | None = None

    @property
    def clean(self) -> Restoration:
        """The prompt as it is, under the same seed."""
        return Restoration(self.prompt, self.seed)


def causal_trace(
    pipe: Any,
    concept: Concept,
    *,
    subject: str | None = None,
    parts: Iterable[str] = (*DENOISER_PARTS, *TEXT_PARTS),
    noise_scale: float = 3.0,
    noises: int = 1,
    seeds: Iterable[int] = range(4),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    scorer: Scorer | str | None = None,
    store: str | Path | None = None,
    progress: bool = True,
) -> Run:
    """Restore every state of the denoiser and the text encoder in turn, each in a picture of its own.

    Noise of `noise_scale` times the embeddings' spread is put on the tokens of `subject` (default:
    the concept's name, or the words that the target exchanges), wherever the prompt has it; each
    seed has `noises` of its own. Denoiser states are restored at every step and every place of the
    picture; states of the text encoder, in each layer, at the subject's first and last token, of
    each occurrence alike, and at the end mark ("last"). `parts`: which of `states.DENOISER_PARTS`
    and `TEXT_PARTS`. Pictures are scored against what the prompt shows, a fact against its answer.
    Other arguments as in `localize`.

    Returns a `Run` whose table has the roles baseline, corrupted and restored; `trace_effect` makes the effects of it.
    `settings["generations"]` counts every row that went through the denoiser, clean ones that rode along included.
    Raises `LocogenError` for unknown parts, a prompt without its subject, a batch too small, and as `generate` does.
    """
    check_apart(pipe, "causal tracing")
    usual = usual_settings(source_of(pipe))
    steps = usual["num_inference_steps"] if num_inference_steps is None else num_inference_steps
    guidance = usual["guidance_scale"] if guidance_scale is None else guidance_scale
    chosen = Settings(steps, float(guidance), batch_size)
    wanted = _known_parts(parts)
    warn_unread(pipe, (pair.prompt for pair in concept.pairs))
    drawn, plan = distinct_seeds(seeds), []
    for pair in concept.pairs:
        words = subject or subject_in(concept, pair)
        for seed in drawn:
            plan += _rows(
                pipe, pair.prompt, words, seed, wanted, [(noise_scale, k) for k in range(noises)]
            )
    if noises < 1 or batch_size < 2:
        raise LocogenError(
            f"noises={noises} and batch_size={batch_size}: give at least one noise, and two pictures"
        )
    judge = scorer_for(pipe, scorer)
    run = _made(pipe, plan, chosen, store, progress)
    table = run.table.assign(**_described(concept, plan))
    scores = score_columns(run, table.assign(content=None), judge)
    told = {
        "noise_scale": noise_scale,
        "noises": noises,
        "generations": generations(plan, batch_size),
    }
    return run.with_table(in_reading_order(table.assign(**scores)), **told, **judge.settings)


def _known_parts(parts: Iterable[str]) -> tuple[str, ...]:
    wanted, known = tuple(parts), (*DENOISER_PARTS, *TEXT_PARTS)
    for part in wanted:
        if part not in known:
            raise unknown("part", part, known)
    if not wanted:
        raise LocogenError(f"there are no parts to restore: give some of {', '.join(known)}")
    return wanted


def _rows(
    pipe: Any,
    prompt: str,
    subject: str,
    seed: int,
    parts: Sequence[str],
    noises: Sequence[tuple[float, int]],
) -> Iterator[Restoration]:
    """All rows of one prompt and seed; the noise is on every occurrence of the subject, and all are restored alike."""
    occurrences = subject_occurrences(pipe, prompt, subject)
    every = tuple(place for words in occurrences for place in words)
    tokens = {
        "first": [words[0] for words in occurrences],
        "last subject": [words[-1] for words in occurrences],
        "last": [end_position(pipe, prompt)],
    }
    yield Restoration(prompt, seed)
    for scale, k in noises:
        noise = Noise(f"noise {seed} {k}", every, scale)
        yield Restoration(prompt, seed, noise, role="corrupted")
        for place, state in enumerate(find_states(pipe)):
            if state.part in parts:
                yield Restoration(
                    prompt, seed, noise, (place,), (), "restored", state.part, state.index
                )
        for place, state in enumerate(find_text_states(pipe)):
            if state.part not in parts:
                continue
            for name in TOKENS:
                axis = f"{state.part}, {name}"
                text = tuple((place, token) for token in tokens[name])
                yield Restoration(prompt, seed, noise, (), text, "restored", axis, state.index)


def _described(concept: Concept, plan: Sequence[Restoration]) -> dict[str, list[Any]]:
    pairs = {pair.prompt: pair for pair in concept.pairs}
    return {
        "concept": [concept.name] * len(plan),
        "kind": [concept.kind] * len(plan),
        "text": [shown_text(concept, pairs[row.prompt]) for row in plan],
    }


# --- pictures ------------------------------------------------------------------------------------


def _made(
    pipe: Any,
    plan: Sequence[Restoration],
    chosen: Settings,
    store: str | Path | None,
    progress: bool,
) -> Run:
    """The pictures of the rows, those that the store has not."""
    shelf = PictureStore(tempfile.mkdtemp(prefix="locogen-") if store is None else store)
    common = _circumstances(pipe, chosen)
    keys = [_row_key(row, common) for row in plan]
    missing = {row: key for row, key in zip(plan, keys, strict=True) if shelf.get(key) is None}
    model = str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)
    settings = {"model": model, **common, "pictures": len(plan)}
    table = _table(plan, keys, chosen)
    if missing:
        told = {**settings, "images": list(table["image"])}
        Record(shelf, told)
        _make(pipe, {key: row for row, key in missing.items()}, shelf, chosen, progress)
    pictures = Pictures(shelf, keys)
    if store is None:
        weakref.finalize(pictures, rmtree, shelf.folder, ignore_errors=True)
    return Run(tuple(plan), pictures, table, settings)


def _row_key(row: Restoration, common: dict[str, Any]) -> str:
    """A clean picture is the one that `generate` makes of the prompt; where nothing is restored, that does not show."""
    if row.noise is None:
        return _key(Intervention(row.prompt, row.prompt, (), row.seed), common)
    traced = {"noise": asdict(row.noise), "states": row.states, "text": row.text}
    return content_key({**common, "prompt": row.prompt, "seed": row.seed, "traced": traced})


def _make(
    pipe: Any,
    missing: dict[str, Restoration],
    shelf: PictureStore,
    chosen: Settings,
    progress: bool,
) -> None:
    from tqdm import tqdm

    waiting, size = {row: key for key, row in missing.items()}, chosen.batch_size
    texts = _Texts(pipe, list(waiting))
    beat.ask(len(waiting))
    bar = tqdm(
        total=len(waiting), unit=" pictures", desc="tracing", disable=not progress, mininterval=0.5
    )
    with bar:
        while waiting:
            batch = next(_batches(waiting, size))
            try:
                made = _batch(pipe, batch, texts, replace(chosen, batch_size=size))
            except Exception as error:
                size = halved(pipe, error, size, 2)  # a clean row rides along
                continue
            finite = np.isfinite(made).all((1, 2, 3))
            wanted = [row in waiting for row in batch]
            for row, pixels, good in zip(batch, made, finite & wanted, strict=True):
                if good:
                    shelf.put(waiting.pop(row), (pixels * 255).round().astype("uint8"))
            _check_finite(
                [Intervention(row.prompt, row.prompt, (), row.seed) for row in batch], finite
            )
            bar.update(sum(wanted))
            beat.add(sum(wanted))


def _batches(rows: Iterable[Restoration], size: int) -> Iterator[list[Restoration]]:
    """Rows in batches, each with the clean rows whose states it restores."""
    batch: list[Restoration] = []
    for row in dict.fromkeys(rows):
        needed = [r for r in ((row.clean, row) if row.states else (row,)) if r not in batch]
        if len(batch) + len(needed) > size:
            yield batch
            batch, needed = [], [row.clean, row] if row.states else [row]
        batch += needed
    if batch:
        yield batch


def generations(plan: Sequence[Restoration], batch_size: int) -> int:
    """How many pictures the rows take to make, clean ones that ride along again included; equal ones are made once."""
    distinct = [replace(row, role="baseline", axis=None, position=None) for row in plan]
    return sum(len(batch) for batch in _batches(distinct, batch_size))


class _Texts:
    """What each row hears: the clean prompts, and all that is asked of one noise in one encoding."""

    def __init__(self, pipe: Any, rows: Sequence[Restoration]) -> None:
        self.pipe = pipe
        self.clean = Texts(pipe, [Intervention(row.prompt, row.prompt) for row in rows])
        self.asked: dict[tuple[str, Noise], dict[Restored, None]] = {}
        self.heard: dict[tuple[str, Noise], dict[Restored, PromptEncoding]] = {}
        for row in rows:
            if row.noise is not None:
                self.asked.setdefault((row.prompt, row.noise), {})[row.text] = None

    def of(self, row: Restoration) -> PromptEncoding:
        """The row's text; that of few noises is kept, since rows come noise by noise."""
        if row.noise is None:
            return self.clean.of[row.prompt]
        told = row.prompt, row.noise
        if told not in self.heard:
            if len(self.heard) == FEW:
                self.heard.clear()
            restored = [variant for variant in self.asked[told] if variant]
            found = corrupted_states(self.pipe, *told, restored)
            self.heard[told] = {
                variant: found[i : i + 1] for i, variant in enumerate([(), *restored])
            }
        return self.heard[told][row.text]

    def arguments(self, rows: Sequence[Restoration]) -> dict[str, Any]:
        """What a call of the pipeline takes for these rows."""
        negative = self.clean.negative
        guided = {} if negative is None else negative.expanded(len(rows)).arguments("negative_")
        return PromptEncoding.stack(self.of(row) for row in rows).arguments() | guided


def _batch(pipe: Any, rows: Sequence[Restoration], texts: _Texts, chosen: Settings) -> Any:
    """Pictures of one batch in 0..1, (rows, height, width, 3); padded to the batch size by repeating its last row."""
    padded = [*rows, *[rows[-1]] * (chosen.batch_size - len(rows))]
    arguments = texts.arguments(padded)
    sources = [
        (padded.index(row.clean) if row.states else i, row.states) for i, row in enumerate(padded)
    ]
    drawn = [Intervention(row.prompt, row.prompt, (), row.seed) for row in padded]
    with restoring(pipe, sources):
        made = called(pipe, drawn, arguments, chosen)
    return made[: len(rows)]


def _table(plan: Sequence[Restoration], keys: Sequence[str], chosen: Settings) -> Any:
    import pandas as pd

    table = pd.DataFrame(
        {
            "role": [row.role for row in plan],
            "prompt": [row.prompt for row in plan],
            "target": [row.prompt for row in plan],
            "start": pd.array([row.position for row in plan], dtype="Int64"),
            "width": pd.array([None if row.position is None else 1 for row in plan], dtype="Int64"),
            "seed": [row.seed for row in plan],
            "edit": pd.NA,
            "image": [f"{key}.png" for key in keys],
            "axis": [row.axis for row in plan],
            "noise": [None if row.noise is None else row.noise.seed for row in plan],
        }
    )
    return table.assign(**chosen.as_dict())
