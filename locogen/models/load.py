"""Load a model by its name in the catalog, from a folder, or by its hub id, as an ordinary diffusers pipeline."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from locogen.catalog import mini_folder, model_entry
from locogen.errors import LocogenError, UnsupportedModel
from locogen.models.families import FAMILIES, family_of


def load(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str = "float32",
    offload: Literal["model", "sequential"] | None = None,
    local_files_only: bool = False,
    file: str | Path | None = None,
) -> Any:
    """The pipeline of a model: `mini`, another name of the catalog, a folder in diffusers' format, or a hub id.

    Safetensors only and no remote code; a plain diffusers pipeline, never wrapped. `dtype`: "float32", "float16",
    "bfloat16", for all parts alike. `device`: None is the CPU. `offload`: keep the weights in main memory and bring
    them to the device (None: "cuda") part by part ("model", whose largest part must fit) or layer by layer
    ("sequential", slow). `file`: a TOML file with entries of your own (see `locogen.catalog`). Folders and files that
    are in the local cache need no network; others are fetched, unless `local_files_only`.

    Raises `LocogenError` with near matches for an unknown name, with the command or page that mends it for missing
    files; `UnsupportedModel` for a family that locogen does not know.
    """
    import torch

    if dtype not in ("float32", "float16", "bfloat16"):
        raise LocogenError(f"dtype is {dtype!r}: take 'float32', 'float16' or 'bfloat16'")
    if offload not in (None, "model", "sequential"):
        raise LocogenError(f"offload is {offload!r}: take 'model', 'sequential', or None")
    wanted = _wanted(str(name), file)
    with _muted("transformers.utils.import_utils"):  # "install torchvision": we do without on purpose
        pipe = _found(str(name), wanted, getattr(torch, dtype), local_files_only)
    family_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    try:
        if offload is not None:
            torch.zeros(1, device=device or "cuda")  # else its lack shows in the first call only
        with _muted("diffusers.models.modeling_utils"):  # it warns of an empty list of modules
            pipe.to((device or "cpu") if offload is None else "cpu", getattr(torch, dtype))
        if offload is None:
            return pipe
        offloading = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}[offload]
        getattr(pipe, offloading)(device=device or "cuda")
        return pipe
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


@dataclass(frozen=True)
class _Wanted:
    """Where to look, first place first, mirrors included; no `revision` for folders."""

    sources: tuple[str, ...]
    revision: str | None = None
    gated: bool = False


def _found(name: str, wanted: _Wanted, dtype: Any, local_files_only: bool) -> Any:
    """The first source that is there: on this machine, and only then on the hub."""
    from safetensors import SafetensorError

    errors = []
    for local in (True,) if local_files_only or wanted.revision is None else (True, False):
        for place, source in enumerate(wanted.sources):
            revision = wanted.revision if place == 0 else "main"  # a mirror is taken as it is
            try:
                return _fetch(source, revision, dtype, local)
            except (OSError, ValueError, SafetensorError) as error:  # ValueError: a folder that is not there
                errors.append(error)
    raise LocogenError(f"the model {name!r} is not to be had: {_remedy(wanted)}") from errors[-1]


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
            **_shared(source),
            **({"safety_checker": None} if _has_checker(source) else {}),
        )
    finally:
        if shown:
            bars.enable_progress_bar()


def _shared(source: str) -> dict[str, Any]:
    """The parts that the second embedded model has of the first: all but the U-Net."""
    from diffusers import DiffusionPipeline

    if source != str(mini_folder("mini-b")):
        return {}
    first = DiffusionPipeline.from_pretrained(mini_folder(), unet=None, use_safetensors=True, local_files_only=True)
    return {name: part for name, part in first.components.items() if name != "unet"}


def _has_checker(source: str) -> bool:
    """Whether the safety checker has to be turned off: it replaces pictures, and with them what is measured."""
    return not Path(source).is_dir() or (Path(source) / "safety_checker").is_dir()


def _remedy(wanted: _Wanted) -> str:
    source = wanted.sources[0]
    if wanted.revision is None:
        return f"{source} holds no diffusers pipeline with safetensors weights (model_index.json beside its parts)"
    fetch = f"fetch it once with: hf download {source} --revision {wanted.revision}"
    terms = f"accept its terms on https://huggingface.co/{source}, log in with: hf auth login"
    return f"it is gated: {terms}, and {fetch}" if wanted.gated else f"{fetch} (where it is gated, first {terms})"


def _wanted(name: str, file: str | Path | None) -> _Wanted:
    if name in ("mini", "mini-b"):
        return _Wanted((str(mini_folder(name)),))
    if Path(name).is_dir():
        return _Wanted((name,))
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise LocogenError(f"there is no folder {name}: give one in diffusers' format, a hub id, or a catalog name")
    if "/" in name and file is None:
        return _Wanted((name,), "main")
    entry = model_entry(name, file)
    if entry.family not in FAMILIES:
        raise UnsupportedModel(f"{name} is a {entry.family}: supported are {', '.join(FAMILIES)}")
    if Path(entry.id).is_dir():
        return _Wanted((entry.id,))
    return _Wanted((entry.id, *entry.mirrors), entry.revision, entry.gated)
