"""Generate the pictures of a plan, in batches, each made once: `generate(pipe, plan) -> Run`."""

from __future__ import annotations

import io
import platform
import shutil
import tempfile
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

import numpy as np

from locogen import markup
from locogen.console import current, open_bar
from locogen.errors import LocogenError, name_interrupt
from locogen.files import AUTO, data_uri
from locogen.interventions.prompts import active_contexts, foreign_hooks
from locogen.models.defaults import name_of
from locogen.models.families import check_lengths, warn_unread
from locogen.pictures.batches import Batch, pictures_of
from locogen.pictures.checks import check_scheduler, oddities
from locogen.pictures.default_store import (
    Place,
    place_of,
    shortened,
    size_of,
    store_folder,
    warn_if_large,
)
from locogen.pictures.description import (
    describe_pipeline,
    describe_scheduler,
    replaced_methods,
    torch_settings,
)
from locogen.pictures.fingerprint import digest_of, undescribed, weights_of
from locogen.pictures.progress import beat
from locogen.pictures.store import PictureStore, Record, Writer, content_key
from locogen.plan import Intervention, Settings, distinct_seeds
from locogen.types import Pipeline

# Part of every key: raised when pictures are made in another way here, so that none of the old way
# is taken for one of the new.
PICTURE_FORMAT = 2

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image


class Pictures(Sequence["Image"]):
    """The pictures of a run, read from the store when looked at."""

    def __init__(self, store: PictureStore, keys: Sequence[str]) -> None:
        self.store = store
        self.keys = tuple(keys)

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image]: ...
    def __getitem__(self, index: int | slice) -> Image | list[Image]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        key = self.keys[index]
        picture = self.store.get(key)
        if picture is None:
            place = self.store.path(key)
            raise LocogenError(
                f"picture {place} is missing or damaged: "
                "call generate or localize again to remake it"
            )
        return picture


@dataclass(frozen=True, eq=False)
class Run:
    """What `generate`, `localize` and `causal_trace` return.

    `plan[i]`, `pictures[i]` and `table.iloc[i]` are one row. A run shows itself in a notebook: its
    settings, its first pictures and the head of its table.

    Attributes:
        plan: The rows: Interventions, or Restorations of `causal_trace`.
        pictures: Their pictures, read from the store when looked at.
        table: The pictures table, one row a picture.
        settings: Everything but the rows that is needed to make the pictures again. The store has
            it too, with the names of the pictures, in the file `run-….json`.
        made_by: A weak reference to the pipeline, which lives as long as somebody keeps it.
        attributions: By concept, the `Attribution` that proposed its windows, for runs of
            `localize` with search="attribute"; else empty.

    Example:
        >>> pipe = load("mini")
        >>> few = {"num_inference_steps": 1, "guidance_scale": 1.0, "progress": False}
        >>> run = generate(pipe, ["a picture of a cat"], seeds=[0, 1], **few)
        >>> len(run.plan), len(run.pictures), len(run.table)
        (2, 2, 2)
        >>> run.pictures[1].size, run.plan[1].seed, int(run.table["seed"][1])
        ((64, 64), 1, 1)
    """

    plan: tuple[Any, ...]
    pictures: Pictures
    table: pd.DataFrame
    settings: dict[str, Any] = field(default_factory=dict)
    made_by: weakref.ref[Any] | None = field(default=None, repr=False)
    attributions: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.plan)

    def with_table(self, table: pd.DataFrame, **settings: Any) -> Run:
        """The same run with more columns and settings; row for row."""
        if len(table) != len(self.plan):
            raise ValueError(
                f"the table has {len(table)} rows, and the plan has {len(self.plan)}: give a table "
                "with one row for each row of the plan"
            )
        return replace(self, table=table, settings={**self.settings, **settings})

    def _repr_html_(self) -> str:
        settings = {}
        for name, value in self.settings.items():
            if not isinstance(value, (dict, list)):
                settings[name] = value
        pictures = []
        for row, picture in zip(self.plan[:8], self.pictures, strict=False):
            pictures.append({"alt": row.prompt, "source": _thumbnail(picture)})
        table = markup.table_html(self.table.head())
        return markup.shown(
            "run",
            count=len(self),
            settings=settings,
            pictures=pictures,
            table=table,
            place=self._place(),
        )

    def _place(self) -> str:
        """Where the pictures are, in words; of the user's cache also how large it is."""
        folder = self.pictures.store.folder
        if folder == store_folder():
            return f"{shortened(folder)}, which holds {size_of(folder)} (locogen clean empties it)"
        return shortened(folder)


def _thumbnail(picture: Image) -> str:
    """A small copy of the picture, as an address for `<img>`."""
    buffer = io.BytesIO()
    small = picture.copy()  # `thumbnail` changes the picture itself
    small.thumbnail((128, 128))
    small.save(buffer, "png")
    return data_uri(buffer.getvalue())


def generate(
    pipe: Pipeline,
    plan_or_prompts: Sequence[Intervention] | Sequence[str] | str,
    *,
    seeds: Iterable[int] | None = None,
    store: Place = AUTO,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    batch_size: int = 32,
    progress: bool = True,
) -> Run:
    """Make the picture of every row, in batches; what the store holds already is not made again.

    Each distinct prompt is encoded once, each row has its own CPU generator, and the last batch is
    padded. The batch size is kept in the run's file: a resumed run repeats a fresh one, in float32
    within one step of 8-bit color. Warns if the tokenizer cuts a prompt or does not know its words.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        plan_or_prompts: The rows of a plan, or one or more prompts, which are then combined with
            every seed, prompt by prompt.
        seeds: Random seeds for prompts; None: seed 0. A plan has its own.
        store: Folder for the pictures; "auto": `store_folder`; None: a temporary folder, deleted
            with the run.
        num_inference_steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is off.
        batch_size: Largest number of pictures made at once. On a GPU fewer are made if its free
            memory asks for it, and half as many, with a warning, if memory runs out all the same.
            SD 3 and FLUX need places of a batch for the targets' own runs.
        progress: Whether to show a progress bar.

    Returns:
        A `Run`: the rows, their pictures and the pictures table, row for row.

    Raises:
        LocogenError: For no rows, a prompt of spaces only, timesteps that the call does not have,
            pictures that are not finite, a picture too large for the memory, or a store that lacks
            pictures and cannot be written. Pictures made before the error are kept.

    Example:
        >>> pipe = load("mini")
        >>> few = {"num_inference_steps": 1, "guidance_scale": 1.0, "progress": False}
        >>> cat = Intervention("a neon cat", "a cat", layers=(8, 9), seed=3)
        >>> run = generate(pipe, [cat], **few)
        >>> run.table[["prompt", "target", "seed"]].to_dict("records")
        [{'prompt': 'a neon cat', 'target': 'a cat', 'seed': 3}]
    """
    plan = _as_plan(plan_or_prompts, seeds)
    settings = Settings(num_inference_steps, float(guidance_scale), batch_size)
    _check_prompts(pipe, plan)
    _check_timesteps(plan, num_inference_steps)

    def batches(
        missing_rows: Sequence[Intervention],
        all_rows: Sequence[Intervention],
        known_batch_size: int | None,
    ) -> Iterator[Batch[Intervention]]:
        return pictures_of(
            pipe, missing_rows, settings, all_rows=all_rows, known_batch_size=known_batch_size
        )

    return make_run(
        pipe,
        plan,
        settings=settings,
        key_of=intervention_key,
        columns=_columns(plan),
        batches=batches,
        store=store,
        progress=progress,
    )


def _as_plan(
    plan_or_prompts: Sequence[Intervention] | Sequence[str] | str, seeds: Iterable[int] | None
) -> list[Intervention]:
    # A text is a sequence too, of letters.
    rows: list[Any] = (
        [plan_or_prompts] if isinstance(plan_or_prompts, str) else list(plan_or_prompts)
    )
    if not rows:
        raise LocogenError("there is nothing to generate: give a plan or at least one prompt")
    if all(isinstance(row, str) for row in rows):
        return _paired(rows, distinct_seeds((0,) if seeds is None else seeds))

    strangers = [row for row in rows if not isinstance(row, Intervention)]
    if strangers:
        raise LocogenError(
            f"generate takes the rows of a plan or prompts, got {strangers[0]!r}: give one kind"
        )
    if seeds is not None:
        raise LocogenError(
            "a plan has its own seeds: leave out seeds=, or give prompts in place of the plan"
        )
    return rows


def _paired(prompts: Sequence[str], seeds: Sequence[int]) -> list[Intervention]:
    """A plain row for each prompt and seed."""
    # str(): a subclass, such as numpy's, would show in the table.
    return [
        Intervention(str(prompt), str(prompt), (), seed, "baseline")
        for prompt in prompts
        for seed in seeds
    ]


def _check_prompts(pipe: Pipeline, plan: Sequence[Intervention]) -> None:
    prompts = dict.fromkeys(text for row in plan for text in (row.prompt, row.target))
    for prompt in prompts:
        if prompt and not prompt.strip():
            raise LocogenError(
                f"a prompt is {prompt!r}, which looks empty: "
                "give it words, or '' for the empty prompt"
            )
    warn_unread(pipe, prompts, stacklevel=3)
    # Of all rows, before the first picture is made.
    check_lengths(pipe, [(row.prompt, row.target) for row in plan if row.layers])


def _check_timesteps(plan: Sequence[Intervention], count: int) -> None:
    last = max((row.timesteps[1] for row in plan if row.timesteps is not None), default=0)
    if last >= count:
        raise LocogenError(
            f"there is no step {last}: num_inference_steps={count} makes steps 0 to {count - 1}"
        )


def intervention_key(row: Intervention, circumstances: Mapping[str, Any]) -> str:
    """The key of a row's picture; rows that make the same picture share it.

    If nothing is replaced, the target does not matter.
    """
    replaces = not row.is_plain and row.target != row.prompt
    parts: dict[str, Any] = {"prompt": row.prompt, "target": None, "seed": row.seed, "layers": ()}
    if replaces:
        parts["target"] = row.target
        parts["layers"] = row.layers
        # Left out in the plain cases: keys of pictures from before there was a choice stay valid.
        if row.timesteps is not None:
            parts["timesteps"] = row.timesteps
        if row.pooled != "keep":
            parts["pooled"] = row.pooled
    return content_key({**circumstances, **parts})


def _columns(plan: Sequence[Intervention]) -> pd.DataFrame:
    """The columns of the pictures table that come from the rows."""
    import pandas as pd

    names = ["role", "prompt", "target", "start", "width", "seed", "pooled"]
    table = pd.DataFrame([[getattr(row, name) for name in names] for row in plan], columns=names)
    spans = [row.timesteps or (None, None) for row in plan]
    table["first_timestep"] = [first for first, _ in spans]
    table["last_timestep"] = [last for _, last in spans]
    # Int64 has NA: controls have no window, and most rows no timesteps.
    whole_numbers = ("start", "width", "first_timestep", "last_timestep")
    return table.astype(dict.fromkeys(whole_numbers, "Int64"))


# --- the engine ----------------------------------------------------------------------------------


class PlannedPicture(Protocol):
    """A row of any plan: what an error must say of it."""

    @property
    def prompt(self) -> str:
        """What the picture is of."""
        ...

    @property
    def seed(self) -> int:
        """The seed of its noise."""
        ...

    @property
    def role(self) -> str:
        """What the row is for."""
        ...


Row = TypeVar("Row", bound=PlannedPicture)


def make_run(
    pipe: Pipeline,
    plan: Sequence[Row],
    *,
    settings: Settings,
    key_of: Callable[[Row, Mapping[str, Any]], str],
    columns: pd.DataFrame,
    batches: Callable[[Sequence[Row], Sequence[Row], int | None], Iterator[Batch[Row]]],
    store: Place,
    progress: bool,
) -> Run:
    """Make those pictures of a plan that the store does not hold; give all of them as a `Run`.

    Every kind of plan goes through here: its pictures are looked up, made, checked, written in the
    background and recorded in the same way.

    Args:
        pipe: The pipeline.
        plan: The rows.
        settings: How pictures are made.
        key_of: The key of a row's picture, given the circumstances (`circumstances_of`).
        columns: What the pictures table says of each row.
        batches: Makes pictures, given the distinct rows whose pictures are missing, all distinct
            rows, and the batch size of an earlier, interrupted call (None: there was none). It
            yields each missing row once, in any order.
        store: Folder for the pictures; "auto": `store_folder`; None: a temporary folder, deleted
            with the run.
        progress: Whether to show a progress bar.

    Returns:
        The run; its table is `columns`, then edit, image and the settings.
    """
    import pandas as pd

    with open_bar(progress, "reading the model"):
        # Keys come first: they hold the weights and contexts of this moment.
        circumstances = circumstances_of(pipe, settings)
        place = _place_for(store, circumstances)
        shelf = PictureStore(tempfile.mkdtemp(prefix="locogen-") if place is None else place)
        keys = [key_of(row, circumstances) for row in plan]
        facts = {"model": name_of(pipe), **circumstances, "pictures": len(plan)}
        images = [f"{key}.png" for key in keys]

        # Rows that make the same picture share a key: it is made once.
        rows_by_key = dict(zip(keys, plan, strict=True))
        fate = "they are not kept" if place is None else f"they are kept in {shortened(place)}"
        has_made = _make_missing(rows_by_key, shelf, {**facts, "images": images}, batches, fate)
        if has_made and store == AUTO and place is not None:
            warn_if_large(place)

        pictures = Pictures(shelf, keys)
        # Pictures are read from the folder: it goes when they do.
        if place is None:
            weakref.finalize(pictures, shutil.rmtree, shelf.folder, ignore_errors=True)
        table = columns.assign(edit=pd.NA, image=images, **settings.as_dict())
        return Run(tuple(plan), pictures, table, facts, weakref.ref(pipe))


def _place_for(store: Place, circumstances: Mapping[str, Any]) -> Path | None:
    # Nobody finds pictures of unknown code again: they would only fill the user's cache.
    if store == AUTO and circumstances["foreign"]:
        return None
    return place_of(store)


def _make_missing(
    rows_by_key: Mapping[str, Row],
    shelf: PictureStore,
    facts: Mapping[str, Any],
    batches: Callable[[Sequence[Row], Sequence[Row], int | None], Iterator[Batch[Row]]],
    fate: str,
) -> bool:
    """Make the pictures that the store does not hold; whether there were any."""
    missing = {key: row for key, row in rows_by_key.items() if shelf.get(key) is None}
    if not missing:
        return False
    # A store that cannot be written is noticed here, before a batch is made.
    record = Record(shelf, facts)
    new = batches(list(missing.values()), list(rows_by_key.values()), record.batch)
    _write_pictures(new, missing, record, len(rows_by_key), fate)
    return True


def _write_pictures(
    batches: Iterator[Batch[Row]],
    missing: Mapping[str, Row],
    record: Record,
    total: int,
    fate: str,
) -> None:
    """Write pictures as they are made; the bar and the study's progress file count them.

    Args:
        batches: Makes them.
        missing: Key → row of those to make.
        record: Of the run.
        total: How many pictures the run has, those that are there already included.
        fate: What becomes of the pictures if the run is stopped, in words.
    """
    keys = {row: key for key, row in missing.items()}
    done = total - len(missing)
    beat.ask(len(missing))
    bar = current()
    seconds = bar.seconds
    try:
        # The writer is left first: all pictures are on disk before an error leaves.
        with bar.counting("picture", total, done), Writer(record.shelf) as writer:
            for rows, pixels, batch_size in batches:
                record.settle(batch_size)
                # Good pictures of a batch are written, even if another one ends the run.
                is_finite = [bool(np.isfinite(picture).all()) for picture in pixels]
                good = [(keys[row], pixels[i]) for i, row in enumerate(rows) if is_finite[i]]
                writer.put(good)
                _check_finite(rows, is_finite)
                done += len(rows)
                bar.add(len(rows))
                beat.add(len(rows), bar.seconds - seconds)
                seconds = bar.seconds
    except KeyboardInterrupt as interrupt:
        name_interrupt(interrupt, f"stopped at {done} of {total}; {fate}")
        raise


def _check_finite(rows: Sequence[PlannedPicture], is_finite: Sequence[bool]) -> None:
    for row, good in zip(rows, is_finite, strict=True):
        if not good:
            raise LocogenError(
                f"the {row.role} picture of {row.prompt!r} (seed {row.seed}) has non-finite "
                "pixels: load the model in float32 or bfloat16, or lower the guidance; pictures "
                "made before are kept"
            )


def circumstances_of(pipe: Pipeline, settings: Settings) -> dict[str, Any]:
    """Everything but the row that makes a picture.

    The model, its scheduler, the settings, the active contexts and the versions of the libraries.
    """
    check_scheduler(pipe)
    # First: what is left out of the weights' hash is known once it is computed.
    weights = weights_of(pipe)
    foreign = (*foreign_hooks(pipe), *replaced_methods(pipe), *undescribed(pipe))
    if foreign:
        warnings.warn(
            "hooks or methods that are not locogen's, or settings that it cannot describe, are on "
            f"{', '.join(foreign[:3])}: pictures are made afresh, none are reused",
            stacklevel=4,
        )
    if getattr(pipe, "safety_checker", None) is not None:
        warnings.warn(
            "the safety checker is on: it replaces pictures by black ones, and a run stops at the "
            "first of these. Turn it off with pipe.safety_checker = None",
            stacklevel=4,
        )
    for oddity in oddities(pipe):
        warnings.warn(oddity, stacklevel=4)
    device = pipe._execution_device.type
    return {
        "format": PICTURE_FORMAT,
        "weights": weights,
        "contexts": list(active_contexts(pipe)),
        # What foreign code does cannot be known: a random part makes every key a new one.
        "foreign": [*foreign, uuid.uuid4().hex] if foreign else [],
        "pipeline": digest_of(describe_pipeline(pipe))[:16],
        "scheduler": _scheduler_facts(pipe.scheduler),
        **settings.as_dict(),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": device,
        "torch": torch_settings(device),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "python": platform.python_version(),
    }


def _scheduler_facts(scheduler: Any) -> dict[str, Any]:
    """Its class and config, to be read, and a hash of these and of all its other attributes."""
    facts: dict[str, Any] = {"class": type(scheduler).__name__}
    for name, value in dict(scheduler.config).items():
        if not name.startswith("_"):
            facts[name] = value
    facts["state"] = digest_of(describe_scheduler(scheduler))[:16]
    return facts
