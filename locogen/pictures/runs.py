"""Generate the pictures of a plan, in batches, each made once: `generate(pipe, plan) -> Run`."""

from __future__ import annotations

import base64
import html
import io
import platform
import shutil
import tempfile
import uuid
import warnings
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from locogen.errors import LocogenError
from locogen.interventions.prompts import active_contexts, foreign_hooks
from locogen.models.families import warn_unread
from locogen.pictures.batches import pictures_of
from locogen.pictures.checks import check_scheduler
from locogen.pictures.description import (
    describe_pipeline,
    describe_scheduler,
    replaced_methods,
    torch_settings,
)
from locogen.pictures.fingerprint import digest_of, weights_of
from locogen.pictures.progress import beat
from locogen.pictures.store import PictureStore, Record, Writer, content_key
from locogen.plan import Intervention, Settings, distinct_seeds

PICTURE_FORMAT = (
    2  # raised when the way pictures are made here changes, so that none made before is taken
)

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
                f"picture {place} is missing or damaged: call generate or localize again to remake it"
            )
        return picture


@dataclass(frozen=True, eq=False)
class Run:
    """What `generate` and `localize` return: `plan[i]`, `pictures[i]` and `table.iloc[i]` are one row.

    `settings` is everything but the rows that is needed to make the pictures again. It stands in the store too, with
    the names of the pictures, in the `run-….json` of the run that made them.
    """

    plan: tuple[Any, ...]  # Interventions; of causal_trace, Restorations
    pictures: Pictures
    table: pd.DataFrame
    settings: dict[str, Any] = field(default_factory=dict)
    made_by: weakref.ref[Any] | None = field(
        default=None, repr=False
    )  # the pipeline, as long as somebody keeps it

    def __len__(self) -> int:
        return len(self.plan)

    def with_table(self, table: pd.DataFrame, **settings: Any) -> Run:
        """The same run with more columns and settings; row for row."""
        if len(table) != len(self.plan):
            raise ValueError(f"the table has {len(table)} rows, the plan {len(self.plan)}")
        return replace(self, table=table, settings={**self.settings, **settings})

    def _repr_html_(self) -> str:
        told = {k: v for k, v in self.settings.items() if not isinstance(v, (dict, list))}
        items = " · ".join(f"{html.escape(str(k))} {html.escape(str(v))}" for k, v in told.items())
        strip = "".join(
            _thumbnail(self.pictures[i], self.plan[i].prompt) for i in range(min(8, len(self)))
        )
        head = self.table.head()._repr_html_()
        return f"<p><b>Run</b> of {len(self)} pictures</p><p>{items}</p><div>{strip}</div>{head}"


def _thumbnail(picture: Image, alt: str) -> str:
    buffer = io.BytesIO()
    small = picture.copy()
    small.thumbnail((128, 128))
    small.save(buffer, "png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="{html.escape(alt, quote=True)}" width="96" src="data:image/png;base64,{data}">'
    )


def generate(
    pipe: Any,
    plan_or_prompts: Sequence[Intervention] | Sequence[str] | str,
    *,
    seeds: Iterable[int] | None = None,
    store: str | Path | None = None,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    batch_size: int = 32,
    progress: bool = True,
) -> Run:
    """Make the picture of every row, in batches; what the store holds already is not made again.

    `plan_or_prompts`: a plan, or prompts which are then paired with every seed (default: seed 0), prompt by prompt.
    `store`: a folder; None: a temporary one that goes with the returned run. Each distinct prompt is encoded once, each
    row has its own CPU generator, the last batch is padded, and the batch size is kept in the run's file, so a resumed
    run repeats a fresh one, in float32 within one step of 8-bit color. `batch_size`: at most so many; on a GPU fewer
    where its free memory asks for it, and half as many, with a warning, where memory runs out all the same. SD 3 and
    FLUX spend places of a batch on the targets' own runs. Warns when the tokenizer cuts a prompt, or lacks its words.
    Raises `LocogenError` for no rows, a blank prompt (other than ""), steps that the call has not, non-finite pictures,
    a picture too large for the memory, or a store that lacks pictures and cannot be written: those made are kept.
    """
    plan = _as_plan(plan_or_prompts, seeds)
    chosen = Settings(num_inference_steps, float(guidance_scale), batch_size)
    _check_prompts(pipe, plan)
    _check_timesteps(plan, num_inference_steps)
    shelf = PictureStore(tempfile.mkdtemp(prefix="locogen-") if store is None else store)
    common = _circumstances(pipe, chosen)
    model = str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)
    keys = [_key(row, common) for row in plan]
    settings = {"model": model, **common, "pictures": len(plan)}
    table = _table(plan, keys, chosen)
    missing = {key: row for key, row in zip(keys, plan, strict=True) if shelf.get(key) is None}
    if missing:
        told = {**settings, "images": list(table["image"])}
        whole = dict(zip(keys, plan, strict=True))
        _make(pipe, missing, list(whole.values()), Record(shelf, told), chosen, progress)
    pictures = Pictures(shelf, keys)
    if store is None:
        weakref.finalize(pictures, shutil.rmtree, shelf.folder, ignore_errors=True)
    return Run(tuple(plan), pictures, table, settings, weakref.ref(pipe))


def _as_plan(
    rows: Sequence[Intervention] | Sequence[str] | str, seeds: Iterable[int] | None
) -> list[Intervention]:
    given = [rows] if isinstance(rows, str) else list(rows)
    if not given:
        raise LocogenError("there is nothing to generate: give a plan or at least one prompt")
    strangers = [row for row in given if not isinstance(row, (Intervention, str))]
    if strangers or len({type(row) for row in given}) > 1:
        raise LocogenError(
            f"generate takes a plan or prompts, not both nor {strangers[:1]}: give one kind"
        )
    if all(isinstance(row, Intervention) for row in given):
        if seeds is not None:
            raise LocogenError(
                "a plan has its own seeds: leave out seeds=, or give prompts in place of the plan"
            )
        return given  # pyright: ignore[reportReturnType]
    drawn = distinct_seeds(seeds if seeds is not None else (0,))
    return [Intervention(str(p), str(p), (), seed, "baseline") for p in given for seed in drawn]


def _check_prompts(pipe: Any, plan: Sequence[Intervention]) -> None:
    prompts = dict.fromkeys(text for row in plan for text in (row.prompt, row.target))
    blank = [prompt for prompt in prompts if prompt and not prompt.strip()]
    if blank:
        raise LocogenError(
            f"a prompt is {blank[0]!r}, which looks empty: give it words, or '' for the empty prompt"
        )
    warn_unread(pipe, prompts, stacklevel=3)


def _check_timesteps(plan: Sequence[Intervention], count: int) -> None:
    last = max((row.timesteps[1] for row in plan if row.timesteps is not None), default=0)
    if last >= count:
        raise LocogenError(
            f"step {last} is not there: num_inference_steps={count} makes the steps 0 to {count - 1}"
        )


def _circumstances(pipe: Any, chosen: Settings) -> dict[str, Any]:
    """Everything but the row that makes a picture: model, scheduler, settings, active contexts and versions."""
    check_scheduler(pipe)
    foreign = (*foreign_hooks(pipe), *replaced_methods(pipe))
    if foreign:
        warnings.warn(
            f"hooks or methods that are not locogen's sit on {', '.join(foreign[:3])}: pictures are made afresh, "
            "none are reused",
            stacklevel=3,
        )
    if getattr(pipe, "safety_checker", None) is not None:
        warnings.warn(
            "the safety checker is on: it replaces pictures by black ones, and a run stops at the first of these. "
            "Turn it off with pipe.safety_checker = None",
            stacklevel=3,
        )
    device = pipe._execution_device.type
    return {
        "format": PICTURE_FORMAT,
        "weights": weights_of(pipe),
        "contexts": list(active_contexts(pipe)),
        "foreign": [*foreign, uuid.uuid4().hex] if foreign else [],
        "pipeline": digest_of(describe_pipeline(pipe))[:16],
        "scheduler": _scheduler(pipe.scheduler),
        **chosen.as_dict(),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": device,
        "torch": torch_settings(device),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "python": platform.python_version(),
    }


def _scheduler(scheduler: Any) -> dict[str, Any]:
    """Its class and config, to be read, and a hash of these and of all its other attributes."""
    config = {
        name: value for name, value in dict(scheduler.config).items() if not name.startswith("_")
    }
    state = digest_of(describe_scheduler(scheduler))[:16]
    return {"class": type(scheduler).__name__, **config, "state": state}


def _key(row: Intervention, common: dict[str, Any]) -> str:
    """Rows that make the same picture share a key: where nothing is replaced, the target does not matter."""
    changed = not row.is_plain and row.target != row.prompt
    made: dict[str, Any] = {
        "prompt": row.prompt,
        "target": row.target if changed else None,
        "seed": row.seed,
    }
    made["layers"] = row.layers if changed else ()
    if changed and row.timesteps is not None:
        made["timesteps"] = row.timesteps
    if changed and row.pooled != "keep":
        made["pooled"] = row.pooled
    return content_key({**common, **made})


def _make(
    pipe: Any,
    missing: dict[str, Intervention],
    whole: Sequence[Intervention],
    record: Record,
    chosen: Settings,
    progress: bool,
) -> None:
    from tqdm import tqdm

    beat.ask(len(missing))
    bar = tqdm(
        total=len(missing),
        unit=" pictures",
        desc="generating",
        disable=not progress,
        mininterval=0.5,
    )
    keys = iter(missing)
    with bar, Writer(record.shelf) as writer:
        for rows, made, size in pictures_of(
            pipe, list(missing.values()), chosen, whole, record.batch
        ):
            record.settle(size)
            finite = [bool(np.isfinite(pixels).all()) for pixels in made]
            writer.put(
                [
                    (key, pixels)
                    for pixels, good, key in zip(made, finite, keys, strict=False)
                    if good
                ]
            )
            _check_finite(rows, finite)
            bar.update(len(rows))
            beat.add(len(rows))


def _check_finite(rows: Sequence[Intervention], finite: Any) -> None:
    for row in [row for row, good in zip(rows, finite, strict=True) if not good]:
        raise LocogenError(
            f"the picture of {row.prompt!r} (seed {row.seed}, layers {row.layers}) has non-finite pixels: load the "
            "model in float32 or bfloat16, or lower the guidance; pictures made before are kept"
        )


def _table(plan: Sequence[Intervention], keys: Sequence[str], chosen: Settings) -> pd.DataFrame:
    import pandas as pd

    columns = ["role", "prompt", "target", "start", "width", "seed", "pooled"]
    table = pd.DataFrame(
        [[getattr(row, name) for name in columns] for row in plan], columns=columns
    )
    spans = [row.timesteps or (None, None) for row in plan]
    table["first_timestep"], table["last_timestep"] = zip(*spans, strict=True)
    table = table.astype(
        dict.fromkeys(("start", "width", "first_timestep", "last_timestep"), "Int64")
    )
    table["edit"] = pd.NA
    table["image"] = [f"{key}.png" for key in keys]
    for name, value in chosen.as_dict().items():
        table[name] = value
    return table
