"""Load a model by its catalog name, from a folder or a single file, or by its hub id, as a diffusers pipeline."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from locogen.catalog import entry_of, mini_folder, model_entry, register
from locogen.errors import LocogenError, UnsupportedModel
from locogen.models.checkpoint import (
    INDEX,
    PICKLED,
    complaint,
    file_problem,
    model_index,
    parts_of,
    pickled_remedy,
)
from locogen.models.families import FAMILIES, family_of
from locogen.models.memory import out_of_memory

# diffusers' names for what a single file holds, and the pipeline that it makes.
SINGLE_FILES = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "playground-v2-5": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}


def load(
    name: str | Path,
    *,
    device: str | None = None,
    dtype: str = "float32",
    offload: Literal["model", "sequential"] | None = None,
    local_files_only: bool = False,
    file: str | Path | None = None,
) -> Any:
    """Load a model as a plain diffusers pipeline, from safetensors only and without remote code.

    Where a part of a folder has its weights as one variant only (`model.fp16.safetensors`), that one
    is loaded. A safety checker is left out: it would replace pictures, and with them what is measured.

    Args:
        name: `mini`, another name of the catalog, a hub id, a folder in diffusers' format, or a single
            `.safetensors` file of a whole checkpoint. The configuration of a single file is the folder
            that it lies in, where that has a `model_index.json`, or else the original checkpoint's.
        device: where the pipeline computes; left out, the CPU, or with `offload` "cuda".
        dtype: "float32", "float16" or "bfloat16", for all parts. transformers keeps some weights of
            T5 in float32 all the same, because they overflow in float16.
        offload: "model" keeps the weights in main memory and brings one part at a time to the device;
            "sequential" brings one layer at a time, which takes the least memory and is slow.
        local_files_only: never use the network. Files in the local cache are used without it anyway.
        file: a TOML file with models of your own (see `locogen.catalog.models`).

    Returns:
        The pipeline, of one of the classes in `locogen.models.families.FAMILIES`.

    Raises:
        LocogenError: for an unknown name (with near matches), for files that are missing, damaged or
            pickled, for a device that is not available, and for weights too large for its memory.
        UnsupportedModel: for a family that locogen does not know.
    """
    import torch

    if dtype not in ("float32", "float16", "bfloat16"):
        raise LocogenError(f"dtype is {dtype!r}: use 'float32', 'float16' or 'bfloat16'")
    if offload not in (None, "model", "sequential"):
        raise LocogenError(f"offload is {offload!r}: use 'model', 'sequential', or None")
    wanted = _wanted(str(name), file)
    with _muted(
        "transformers.utils.import_utils"
    ):  # "install torchvision": we do without on purpose
        pipe = _found(str(name), wanted, getattr(torch, dtype), local_files_only)
    family_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    target = device or ("cpu" if offload is None else "cuda")
    try:
        _place(pipe, target, offload)
    except (AssertionError, RuntimeError) as error:
        if out_of_memory(error):
            raise LocogenError(_too_large(pipe, target, offload)) from error
        raise LocogenError(
            f"the device {target!r} is not available ({_first_line(error)}): use 'cpu', 'cuda' or 'mps'"
        ) from error
    if dtype == "float32" and target.startswith("cuda") and not wanted.embedded:
        _hint_at_half_precision(target)
    return pipe


def _place(pipe: Any, device: str, offload: str | None) -> None:
    """Move the weights, or have them moved when they are needed; their types stay what `from_pretrained` made them."""
    import torch

    if offload is None:
        with _muted(
            "diffusers.pipelines.pipeline_utils"
        ):  # float16 on the CPU: the call says so, if it fails
            pipe.to(device)
        return
    torch.zeros(1, device=device)  # otherwise a missing device would show in the first call only
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)


def _too_large(pipe: Any, device: str, offload: str | None) -> str:
    """What to do about weights that do not fit; offload needs room for the largest part, or for one layer."""
    sizes = [
        _weight_bytes(part) for part in pipe.components.values() if hasattr(part, "parameters")
    ]
    remedy = {
        None: "load with dtype='float16' or 'bfloat16', or with offload='model' or 'sequential'",
        "model": "load with dtype='float16' or 'bfloat16', or with offload='sequential'",
        "sequential": "close what else uses it, or use a larger device",
    }[offload]
    return f"the weights ({sum(sizes) / 1e9:.1f} GB) do not fit the memory of {device!r}: {remedy}"


def _weight_bytes(module: Any) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


@functools.cache
def _hint_at_half_precision(device: str) -> None:
    """Once a process: the precision that is right on a CPU is rarely wanted on a card."""
    warnings.warn(
        f"float32 on {device!r} takes twice the memory of half precision and is several times slower: consider "
        "load(…, dtype='float16') or 'bfloat16', or loco.speed",
        stacklevel=3,
    )


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
    """Where to look, first place first, mirrors included; no `revision` for folders and files."""

    sources: tuple[str, ...]
    revision: str | None = None
    gated: bool = False
    embedded: bool = False


def _found(name: str, wanted: _Wanted, dtype: Any, local_files_only: bool) -> Any:
    """The first source that can be loaded: on this machine, and only then on the hub."""
    errors = []
    for local in (True,) if local_files_only or wanted.revision is None else (True, False):
        for place, source in enumerate(wanted.sources):
            revision = wanted.revision if place == 0 else "main"  # a mirror is taken as it is
            try:
                return _fetch(source, revision, dtype, local)
            except UnsupportedModel:
                raise
            except (
                LocogenError,
                OSError,
                ValueError,
            ) as error:  # ValueError: a folder that is not there
                errors.append(error)
    # Files that are there and damaged tell more than places where there is nothing.
    damaged = next((error for error in errors if isinstance(error, LocogenError)), None)
    if damaged is not None:
        raise LocogenError(f"could not load the model {name!r}: {damaged}") from damaged
    raise LocogenError(
        f"could not load the model {name!r}: {_remedy(wanted, errors[-1])}"
    ) from errors[-1]


def _fetch(source: str, revision: str | None, dtype: Any, local_files_only: bool) -> Any:
    """The pipeline of one source: a single file, a folder, or a hub id whose files are fetched first."""
    with _without_bars():
        if Path(source).is_file():
            pipe = _from_file(Path(source), dtype, local_files_only)
        elif Path(source).is_dir():
            return _from_folder(Path(source), dtype)
        else:
            pipe = _from_folder(_downloaded(source, revision, local_files_only), dtype)
    pipe.register_to_config(_name_or_path=source)  # not the place in the cache: settings go by it
    return pipe


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within the context diffusers shows no progress bars."""
    from diffusers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _downloaded(source: str, revision: str | None, local_files_only: bool) -> Path:
    """The folder in the local cache that holds a hub id's files, those that are missing fetched."""
    from diffusers import DiffusionPipeline

    options = {
        "revision": revision,
        "use_safetensors": True,
        "local_files_only": local_files_only,
        "safety_checker": None,
    }
    try:
        return Path(DiffusionPipeline.download(source, **options))
    except OSError as error:
        if "safetensors" not in str(error):
            raise
    # No complete set of plain safetensors weights: the half-precision ones may be the only ones.
    return Path(DiffusionPipeline.download(source, variant="fp16", **options))


def _from_folder(folder: Path, dtype: Any) -> Any:
    """The pipeline that a folder holds. Raises `LocogenError` with what is wrong with the folder."""
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **_parts_apart(folder, dtype),
        )
    except Exception as error:
        if out_of_memory(error):
            raise LocogenError(
                f"the weights of {folder} do not fit the main memory: use a smaller dtype"
            ) from error
        problem = (
            complaint(folder, _left_out(folder))
            or f"diffusers cannot load {folder}: {_first_line(error)}"
        )
        raise LocogenError(problem) from error


def _parts_apart(folder: Path, dtype: Any) -> dict[str, Any]:
    """The parts that `from_pretrained` cannot find by itself, and None for those that are left out."""
    if folder == mini_folder("mini-b"):
        return _shared_with_mini(dtype)
    parts: dict[str, Any] = dict.fromkeys(_left_out(folder))
    for part in parts_of(folder):
        if part.name not in parts and part.has_weights and part.only_variant is not None:
            kind = getattr(importlib.import_module(part.library), part.kind)
            parts[part.name] = kind.from_pretrained(
                part.folder,
                variant=part.only_variant,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
            )
    return parts


def _shared_with_mini(dtype: Any) -> dict[str, Any]:
    """The parts that the second embedded model has of the first: all but the U-Net."""
    from diffusers import DiffusionPipeline

    first = DiffusionPipeline.from_pretrained(
        mini_folder(), unet=None, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    return {name: part for name, part in first.components.items() if name != "unet"}


def _left_out(folder: Path) -> list[str]:
    """The safety checker, and parts that were deleted and that the pipeline can do without."""
    import diffusers

    kind = getattr(diffusers, str(model_index(folder).get("_class_name")), None)
    optional = getattr(kind, "_optional_components", [])
    return [
        part.name
        for part in parts_of(folder)
        if part.name == "safety_checker" or (part.name in optional and not part.folder.is_dir())
    ]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- single files --------------------------------------------------------------------------------


def _from_file(file: Path, dtype: Any, local_files_only: bool) -> Any:
    """The pipeline of a single file, converted by diffusers with a configuration in its own format."""
    import diffusers

    if file.suffix != ".safetensors":
        raise LocogenError(f"{file} is not a .safetensors file: {pickled_remedy(file)}")
    problem = file_problem(file)
    if problem is not None:
        raise LocogenError(f"the checkpoint {file} {problem}")
    class_name, original = _kind_of_file(file)
    config = _config_of(file, original, local_files_only)
    try:
        kind = getattr(diffusers, class_name)
        return kind.from_single_file(
            str(file), config=str(config), dtype=dtype, local_files_only=True
        )
    except Exception as error:
        if out_of_memory(error):
            raise LocogenError(
                f"the weights of {file} do not fit the main memory: use a smaller dtype"
            ) from error
        raise LocogenError(
            f"diffusers cannot convert {file} with the configuration {config} ({_first_line(error)}): put the folder "
            f"of the whole pipeline in diffusers' format ({INDEX}) around the file, or load that folder"
        ) from error


def _kind_of_file(file: Path) -> tuple[str, str]:
    """The pipeline's class, and the hub id of the checkpoint with the same configuration; from names and shapes."""
    import torch
    from diffusers.loaders.single_file_utils import (
        fetch_diffusers_config,
        infer_diffusers_model_type,
    )
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    outline = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        content = infer_diffusers_model_type(outline)
    except (LookupError, UnboundLocalError):  # it looks for tensors that this file does not have
        content = "v1"
    # diffusers calls everything that it does not know "v1".
    if content == "v1" and "model.diffusion_model.input_blocks.0.0.weight" not in shapes:
        raise LocogenError(
            f"{file} is not a checkpoint of a whole pipeline (a LoRA, a VAE or an embedding?): load the pipeline it "
            "belongs to, and then the file with diffusers' own loaders"
        )
    if content not in SINGLE_FILES:
        raise UnsupportedModel(
            f"{file} is a {content} checkpoint: supported are {', '.join(SINGLE_FILES)}"
        )
    return SINGLE_FILES[content], fetch_diffusers_config(outline)["pretrained_model_name_or_path"]


def _config_of(file: Path, original: str, local_files_only: bool) -> Path:
    """A folder with the configuration of a single file: the one it lies in, or the original's small files."""
    from huggingface_hub import snapshot_download

    if (file.parent / INDEX).is_file():
        return file.parent
    entry = entry_of(original)
    sources = (original,) if entry is None else (*entry.mirrors, entry.id)
    small = ["*.json", "*.txt", "*.model"]
    for local in (True,) if local_files_only else (True, False):
        for source in sources:
            try:
                return Path(snapshot_download(source, allow_patterns=small, local_files_only=local))
            except (OSError, ValueError):
                continue
    patterns = " ".join(f"--include '{pattern}'" for pattern in small)
    raise LocogenError(
        f"the single file {file} has no configuration: fetch it once with: hf download {sources[0]} {patterns}, or "
        f"put {INDEX} and the folders of its parts, in diffusers' format, next to the file"
    )


# --- names ---------------------------------------------------------------------------------------


def _remedy(wanted: _Wanted, error: Exception) -> str:
    """How to get the files; the first mirror is named where the original has vanished from the hub."""
    source = wanted.sources[0]
    if wanted.revision is None:
        return f"{source}: {_first_line(error)}"
    if len(wanted.sources) > 1:
        return f"{source} is gone from the hub: fetch a copy once with: hf download {wanted.sources[1]}"
    fetch = f"fetch it once with: hf download {source} --revision {wanted.revision}"
    terms = f"accept its terms on https://huggingface.co/{source}, log in with: hf auth login"
    if wanted.gated:
        return f"it is gated: {terms}, and {fetch}"
    if "safetensors" in str(error):
        return f"{source} has no complete safetensors weights, and pickled ones are refused: use a converted copy"
    return f"{fetch} (where it is gated, first {terms})"


def _wanted(name: str, file: str | Path | None) -> _Wanted:
    if name in ("mini", "mini-b"):
        return _Wanted((str(mini_folder(name)),), embedded=True)
    place = Path(name).expanduser()
    is_checkpoint = place.suffix in (".safetensors", *PICKLED)
    if place.is_dir() or (is_checkpoint and place.is_file()):
        return _Wanted((str(place),))
    if is_checkpoint:
        raise LocogenError(
            f"there is no file {place}: give a .safetensors file, a folder, a hub id or a catalog name"
        )
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise LocogenError(
            f"there is no folder {place}: give one in diffusers' format, a hub id, or a catalog name"
        )
    if "/" in name and file is None:
        return _Wanted((name,), "main")
    entry = model_entry(name, file)
    if file is not None:
        register(entry)
    if entry.family not in FAMILIES:
        raise UnsupportedModel(f"{name} is a {entry.family}: supported are {', '.join(FAMILIES)}")
    place = Path(entry.id).expanduser()
    if place.exists():
        return _Wanted((str(place),))
    return _Wanted((entry.id, *entry.mirrors), entry.revision, entry.gated)
