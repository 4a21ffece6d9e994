"""Load a model by its name in the catalog, from a folder, or by its hub id, as an ordinary diffusers pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from locogen.catalog import mini_folder, model_entry
from locogen.errors import LocogenError, UnsupportedModel
from locogen.families import FAMILIES, family_of


def load(name: str | Path, *, device: str | None = None, dtype: str = "float32", local_files_only: bool = False) -> Any:
    """The pipeline of a model: `mini`, another name of the catalog, a folder in diffusers' format, or a hub id.

    Safetensors only and no remote code; a plain diffusers pipeline, never wrapped. `dtype`: "float32", "float16",
    "bfloat16", for all parts alike. `device`: None is the CPU. The mini model and folders need no network; others
    are looked for in the local cache when `local_files_only`. Raises `LocogenError` with near matches for an unknown
    name, with the remedy for missing files; `UnsupportedModel` for a family that locogen does not know.
    """
    import torch
    from safetensors import SafetensorError

    if dtype not in ("float32", "float16", "bfloat16"):
        raise LocogenError(f"dtype is {dtype!r}: take 'float32', 'float16' or 'bfloat16'")
    sources, revision = _sources(str(name))
    errors = []
    for place, source in enumerate(sources):
        try:
            with _muted("transformers.utils.import_utils"):  # "install torchvision": we do without on purpose
                at = revision if place == 0 else revision and "main"
                pipe = _fetch(source, at, getattr(torch, dtype), local_files_only)
            break
        except (OSError, ValueError, SafetensorError) as error:  # ValueError: a folder that is not there
            errors.append(error)
    else:
        raise LocogenError(f"the model {str(name)!r} is not to be had: {_remedy(sources[0], revision)}") from errors[0]
    family_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    try:
        with _muted("diffusers.models.modeling_utils"):  # it warns of an empty list of modules
            return pipe.to(device or "cpu", getattr(torch, dtype))
    except (AssertionError, RuntimeError) as error:
        raise LocogenError(f"device {device!r} is not to be had ({error}): take 'cpu', 'cuda' or 'mps'") from error


@contextmanager
def _muted(name: str) -> Iterator[None]:
    """Within the context, one logger of the libraries underneath gives no advice; errors it tells."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _fetch(source: str, revision: str | None, dtype: Any, local_files_only: bool) -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        return DiffusionPipeline.from_pretrained(
            source,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=local_files_only,
            **({"safety_checker": None} if _has_checker(source) else {}),
        )
    finally:
        if shown:
            bars.enable_progress_bar()


def _has_checker(source: str) -> bool:
    """Whether the safety checker has to be turned off: it replaces pictures, and with them what is measured."""
    return not Path(source).is_dir() or (Path(source) / "safety_checker").is_dir()


def _remedy(source: str, revision: str | None) -> str:
    if revision is None:
        return f"{source} holds no diffusers pipeline with safetensors weights (model_index.json beside its parts)"
    gated = "for a gated one: hf auth login, and accept its terms on its page"
    return f"fetch it once with: hf download {source} --revision {revision} ({gated})"


def _sources(name: str) -> tuple[list[str], str | None]:
    """Where to look, first place first, and the revision; the mirrors of a checkpoint that left the hub included."""
    if name == "mini":
        return [str(mini_folder())], None
    if Path(name).is_dir():
        return [name], None
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise LocogenError(f"there is no folder {name}: give one in diffusers' format, a hub id, or a catalog name")
    if "/" in name:
        return [name], "main"
    entry = model_entry(name)
    if entry.family not in FAMILIES:
        raise UnsupportedModel(f"{name} is a {entry.family}: supported are {', '.join(FAMILIES)}")
    return [entry.id, *entry.mirrors], entry.revision
