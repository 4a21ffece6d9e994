"""Causal tracing, the baseline that LocoGen replaces.

The concept's tokens are corrupted by noise, and then one state of the clean run is put back. Three
kinds of rows: the clean prompt, the corrupted one, and the corrupted one with one state restored.
What a state brings back of the score is its indirect effect (Meng et al. 2022, arXiv 2202.05262;
for text-to-image models Basu et al. 2024, arXiv 2405.01008, section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen.console import open_bar
from locogen.errors import LocogenError, unknown
from locogen.files import AUTO
from locogen.interventions.corruption import Noise, Restored, corrupted_states
from locogen.interventions.states import (
    DENOISER_PARTS,
    TEXT_PARTS,
    check_apart,
    find_states,
    find_text_states,
    restoring,
)
from locogen.localization.scored_pictures import in_reading_order, score_columns
from locogen.models.defaults import settings_for
from locogen.models.families import end_position, subject_occurrences, warn_unread
from locogen.models.text import PromptEncoding
from locogen.phrasings import shown_text, subject_in
from locogen.pictures.batches import Batch, Texts, call_pipeline, halved_batch_size
from locogen.pictures.default_store import Place
from locogen.pictures.runs import Run, intervention_key, make_run
from locogen.pictures.score import scorer_for
from locogen.pictures.store import content_key
from locogen.plan import Concept, Intervention, Settings, distinct_seeds
from locogen.types import Pipeline

if TYPE_CHECKING:
    import pandas as pd

    from locogen.pictures.score import Scorer

Array = np.ndarray[Any, Any]
PARTS = (*DENOISER_PARTS, *TEXT_PARTS)
TOKENS = ("first", "last subject", "last")  # at which states of the text encoder are restored
NOISES_AT_ONCE = 4  # whose text is remembered
SMALLEST = 2  # places of a batch: a restored row, and the clean row that its states come from


@dataclass(frozen=True)
class Restoration:
    """One picture to make.

    Attributes:
        prompt: The prompt.
        seed: The seed of the picture's own noise.
        noise: What corrupts the prompt's embeddings; None: nothing, the row is clean.
        states: Which of `find_states` are those of the clean run.
        text: Which states of the text encoder are: (which of `find_text_states`, token) pairs.
        role: What the row is for: baseline, corrupted or restored.
        axis: The part of the restored state; for the text encoder, also the token.
        position: The layer of the restored state within its part.
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
        """The row that states come from: the prompt without noise, under the same seed."""
        return Restoration(self.prompt, self.seed)

    @property
    def plain(self) -> Intervention:
        """The prompt's own row, which has the seed of this one."""
        return Intervention(self.prompt, self.prompt, (), self.seed)


def causal_trace(
    pipe: Pipeline,
    concept: Concept,
    *,
    subject: str | None = None,
    parts: Iterable[str] = PARTS,
    noise_scale: float = 3.0,
    noises: int = 1,
    seeds: Iterable[int] = range(4),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    scorer: Scorer | str | None = None,
    store: Place = AUTO,
    progress: bool = True,
) -> Run:
    """Restore every state of the denoiser and the text encoder, each in a picture of its own.

    States of the denoiser are restored at every step and every place of the picture. States of the
    text encoder are restored, in each layer, at the subject's first token, at its last token (of
    each occurrence alike), and at the end mark ("last"). Pictures are scored against what the
    prompt shows, those of a fact against its answer.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        concept: What to look for.
        subject: The words that get the noise, at each of their occurrences in the prompt; None: the
            concept's name, or the words that the target exchanges.
        parts: Which states to restore, of `DENOISER_PARTS` and `TEXT_PARTS` in
            `locogen.interventions.states`.
        noise_scale: Size of the noise, in standard deviations of the embeddings.
        noises: Number of noises for each seed.
        seeds: Random seeds; every prompt is made with each of them.
        num_inference_steps: Denoising steps; None: the catalog's number for this model.
        guidance_scale: Classifier-free guidance; None: the catalog's value for this model.
        batch_size: Pictures made at once, at least two.
        scorer: A scorer or its name (see `scorer`); None: the catalog's for this model.
        store: Folder for the pictures; what it holds is not made again. "auto": `store_folder`, in
            this user's cache; None: a temporary folder.
        progress: Whether to show a progress bar.

    Returns:
        A `Run` whose table has the roles baseline, corrupted and restored; `trace_effect` computes
        the effects. `settings["generations"]` counts all rows that go through the denoiser,
        including the clean ones that ride along with restored ones.

    Raises:
        LocogenError: For unknown parts, a prompt without its subject, a batch of one, and as
            `generate` does.

    Example:
        >>> pipe = load("mini")
        >>> cat = Concept("cat", "object", (PromptPair("a picture of a cat", "a picture"),))
        >>> few = {"seeds": [0], "num_inference_steps": 1, "guidance_scale": 1.0}
        >>> run = causal_trace(pipe, cat, parts=["text MLP"], progress=False, **few)
        >>> run.table.groupby("role").size().to_dict()
        {'baseline': 1, 'corrupted': 1, 'restored': 9}
    """
    check_apart(pipe, "causal tracing")
    settings = settings_for(
        pipe,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
    )
    traced_parts = _checked_parts(parts)
    warn_unread(pipe, (pair.prompt for pair in concept.pairs))
    if noises < 1 or batch_size < SMALLEST:
        raise LocogenError(
            f"noises={noises} and batch_size={batch_size}: "
            "give at least one noise, and two pictures"
        )

    plan: list[Restoration] = []
    distinct = distinct_seeds(seeds)
    numbered = [(noise_scale, number) for number in range(noises)]
    for pair in concept.pairs:
        words = subject or subject_in(concept, pair)
        for seed in distinct:
            plan += planned_rows(pipe, pair.prompt, words, seed, traced_parts, numbered)

    # The scorer comes before the pictures: what is wrong with it should not cost a trace.
    with open_bar(progress, "loading the scorer"):
        judge = scorer_for(pipe, scorer)
        run = _pictures_of(pipe, plan, settings, store, progress)
        # There is no second text, of what should stay: `content` is empty.
        table = run.table.assign(**_scored_against(concept, plan))
        scores = score_columns(run, table.assign(content=None), judge)
    return run.with_table(
        in_reading_order(table.assign(**scores)),
        noise_scale=noise_scale,
        noises=noises,
        generations=generations(plan, batch_size),
        **judge.settings,
    )


def _checked_parts(parts: Iterable[str]) -> tuple[str, ...]:
    checked = tuple(parts)
    for part in checked:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    if not checked:
        raise LocogenError(f"there are no parts to restore: give some of {', '.join(PARTS)}")
    return checked


# --- the plan ------------------------------------------------------------------------------------


def planned_rows(
    pipe: Pipeline,
    prompt: str,
    subject: str,
    seed: int,
    parts: Sequence[str],
    noises: Sequence[tuple[float, int]],
) -> Iterator[Restoration]:
    """All rows of one prompt and seed. `noises`: (scale, number) of each."""
    occurrences = subject_occurrences(pipe, prompt, subject)
    # The noise is on all occurrences: on one of two it would leave the other one clean.
    corrupted_tokens = tuple(token for tokens in occurrences for token in tokens)
    first = [tokens[0] for tokens in occurrences]
    last = [tokens[-1] for tokens in occurrences]
    end = [end_position(pipe, prompt)]
    restored_tokens: dict[str, list[int]] = dict(zip(TOKENS, (first, last, end), strict=True))
    yield Restoration(prompt, seed)
    for scale, number in noises:
        noise = Noise(f"noise {seed} {number}", corrupted_tokens, scale)
        corrupted = Restoration(prompt, seed, noise, role="corrupted")
        yield corrupted
        yield from _denoiser_rows(pipe, corrupted, parts)
        yield from _text_rows(pipe, corrupted, parts, restored_tokens)


def _denoiser_rows(
    pipe: Pipeline, corrupted: Restoration, parts: Sequence[str]
) -> Iterator[Restoration]:
    """A corrupted row with each state of the denoiser restored in turn."""
    for place, state in enumerate(find_states(pipe)):
        if state.part in parts:
            yield replace(
                corrupted,
                states=(place,),
                role="restored",
                axis=state.part,
                position=state.index,
            )


def _text_rows(
    pipe: Pipeline,
    corrupted: Restoration,
    parts: Sequence[str],
    restored_tokens: Mapping[str, Sequence[int]],
) -> Iterator[Restoration]:
    """A corrupted row with each state of the text encoder restored in turn, token by token."""
    for place, state in enumerate(find_text_states(pipe)):
        if state.part not in parts:
            continue
        for name, tokens in restored_tokens.items():
            yield replace(
                corrupted,
                text=tuple((place, token) for token in tokens),
                role="restored",
                axis=f"{state.part}, {name}",
                position=state.index,
            )


def _columns(plan: Sequence[Restoration]) -> pd.DataFrame:
    """The columns of the pictures table that come from the rows."""
    import pandas as pd

    records = []
    for row in plan:
        record: dict[str, Any] = {"role": row.role, "prompt": row.prompt, "target": row.prompt}
        record["start"] = row.position
        record["width"] = None if row.position is None else 1
        record["seed"] = row.seed
        record["axis"] = row.axis
        record["noise"] = None if row.noise is None else row.noise.seed
        records.append(record)
    return pd.DataFrame(records).astype({"start": "Int64", "width": "Int64"})


def _scored_against(concept: Concept, plan: Sequence[Restoration]) -> dict[str, list[str]]:
    """Columns that say what each row is about and what its picture is scored against."""
    # A fact's prompt shows the answer: that is what noise takes, and what comes back.
    texts = {pair.prompt: shown_text(concept, pair) for pair in concept.pairs}
    return {
        "concept": [concept.name] * len(plan),
        "kind": [concept.kind] * len(plan),
        "text": [texts[row.prompt] for row in plan],
    }


# --- pictures ------------------------------------------------------------------------------------


def _pictures_of(
    pipe: Pipeline,
    plan: Sequence[Restoration],
    settings: Settings,
    store: Place,
    progress: bool,
) -> Run:
    def batches(
        missing_rows: Sequence[Restoration],
        all_rows: Sequence[Restoration],
        known_batch_size: int | None,
    ) -> Iterator[Batch[Restoration]]:
        size = max(known_batch_size or settings.batch_size, SMALLEST)
        return _made_batches(pipe, missing_rows, replace(settings, batch_size=size))

    return make_run(
        pipe,
        plan,
        settings=settings,
        key_of=_key_of,
        columns=_columns(plan),
        batches=batches,
        store=store,
        progress=progress,
    )


def _key_of(row: Restoration, circumstances: Mapping[str, Any]) -> str:
    """The key of a row's picture: a clean one is that which `generate` makes of the prompt."""
    if row.noise is None:
        return intervention_key(row.plain, circumstances)
    traced = {"noise": asdict(row.noise), "states": row.states, "text": row.text}
    parts = {"prompt": row.prompt, "seed": row.seed, "traced": traced}
    return content_key({**circumstances, **parts})


def _made_batches(
    pipe: Pipeline, missing_rows: Sequence[Restoration], settings: Settings
) -> Iterator[Batch[Restoration]]:
    """The pictures of the rows; clean ones that ride along are given once, if they are missing."""
    size = settings.batch_size
    texts = TracedTexts(pipe, missing_rows)
    waiting = dict.fromkeys(missing_rows)  # in order, and quick to look up
    while waiting:
        rows = next(_batches(waiting, size))
        try:
            pixels = make_batch(pipe, rows, texts, replace(settings, batch_size=size))
        except Exception as error:
            size = halved_batch_size(pipe, error, size, SMALLEST)
            continue
        # Clean rows ride along in many batches, and may be in the store already.
        places = [i for i, row in enumerate(rows) if row in waiting]
        new = [rows[i] for i in places]
        yield Batch(new, pixels[places], size)
        for row in new:
            del waiting[row]


def _batches(rows: Iterable[Restoration], size: int) -> Iterator[list[Restoration]]:
    """Rows in batches, each with the clean rows whose states it restores."""
    batch: list[Restoration] = []
    for row in dict.fromkeys(rows):
        needed = [row.clean, row] if row.states else [row]
        # One clean row serves all rows of a batch that need it.
        added = [each for each in needed if each not in batch]
        if len(batch) + len(added) > size:
            yield batch
            batch = []
            added = needed
        batch += added
    if batch:
        yield batch


def generations(plan: Sequence[Restoration], batch_size: int) -> int:
    """How many pictures the rows take, including the clean ones that ride along in each batch."""
    # Rows that differ in what they are for alone are made once.
    distinct = [replace(row, role="baseline", axis=None, position=None) for row in plan]
    return sum(len(batch) for batch in _batches(distinct, batch_size))


class TracedTexts:
    """The encoded text of each row: of the clean prompts, and of each noise with what it restores.

    All variants of one noise are encoded together, since states are copied within that batch.
    """

    def __init__(self, pipe: Pipeline, rows: Sequence[Restoration]) -> None:
        self.pipe = pipe
        self.clean = Texts(pipe, [Intervention(row.prompt, row.prompt) for row in rows])
        # What is restored under each noise, in the order of the rows.
        self.variants: dict[tuple[str, Noise], dict[Restored, None]] = {}
        self.encoded: dict[tuple[str, Noise], dict[Restored, PromptEncoding]] = {}
        for row in rows:
            if row.noise is not None:
                self.variants.setdefault((row.prompt, row.noise), {})[row.text] = None

    def of(self, row: Restoration) -> PromptEncoding:
        """The row's text, one row."""
        if row.noise is None:
            return self.clean.of[row.prompt]
        condition = (row.prompt, row.noise)
        if condition not in self.encoded:
            # Rows come noise by noise: what was encoded long ago is not needed again.
            if len(self.encoded) == NOISES_AT_ONCE:
                self.encoded.clear()
            self.encoded[condition] = self._encode(row.prompt, row.noise)
        return self.encoded[condition][row.text]

    def _encode(self, prompt: str, noise: Noise) -> dict[Restored, PromptEncoding]:
        """The text under a noise by what is restored; `()` is the corrupted text itself."""
        restored = [variant for variant in self.variants[prompt, noise] if variant]
        text = corrupted_states(self.pipe, prompt, noise, restored)  # 1 + len(restored) rows
        return {variant: text[i : i + 1] for i, variant in enumerate([(), *restored])}

    def arguments(self, rows: Sequence[Restoration]) -> dict[str, Any]:
        """The arguments of a call of the pipeline with these rows."""
        return self.clean.with_negative(
            PromptEncoding.stack(self.of(row) for row in rows), len(rows)
        )


def make_batch(
    pipe: Pipeline, rows: Sequence[Restoration], texts: TracedTexts, settings: Settings
) -> Array:
    """The pictures of one batch in 0..1, (rows, height, width, 3)."""
    # All batches have one size, so that sums are taken in the same order in each.
    padded = [*rows, *[rows[-1]] * (settings.batch_size - len(rows))]
    arguments = texts.arguments(padded)
    # (the row that states are copied from, which states): itself where nothing is restored.
    sources = []
    for place, row in enumerate(padded):
        source = padded.index(row.clean) if row.states else place
        sources.append((source, row.states))
    with restoring(pipe, sources):
        pixels = call_pipeline(pipe, [row.plain for row in padded], arguments, settings)
    return pixels[: len(rows)]
