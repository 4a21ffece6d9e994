"""Load a model by catalog name or hub id, or from a folder or file, as a diffusers pipeline."""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from locogen.catalog import entry_of, mini_folder, model_entries, model_entry, register
from locogen.catalog.models import PLANTED
from locogen.catalog.plants import plant_entry
from locogen.console import open_bar
from locogen.errors import LocogenError, UnsupportedModel
from locogen.models.checkpoint import (
    INDEX,
    PICKLED,
    Part,
    complaint,
    file_problem,
    missing_weights,
    model_index,
    parts_of,
    pickled_remedy,
    replaced_in_silence,
)
from locogen.models.families import FAMILIES, family_of
from locogen.models.memory import out_of_memory
from locogen.types import Module, Pipeline

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

    If a part of a folder has its weights as one variant only (`model.fp16.safetensors`), that one
    is loaded. A safety checker is left out: it would replace pictures, which would change what is
    measured.

    Args:
        name: "mini", another name of the catalog, "planted/…" (see `plants`), a hub id, a folder in
            diffusers' format, or a single `.safetensors` file of a whole checkpoint. A single file
            is configured by the folder that it lies in, if that has a `model_index.json`, or else
            as the original checkpoint.
        device: Where the pipeline computes; None: the CPU, or "cuda" with `offload`.
        dtype: "float32", "float16" or "bfloat16", for all parts. transformers keeps some weights of
            T5 in float32 all the same, because they overflow in float16.
        offload: "model" keeps the weights in main memory and brings one part at a time to the
            device; "sequential" brings one layer at a time, which takes the least memory and is
            slow. None: all weights are on the device.
        local_files_only: Never use the network. Files in the local cache are used without it
            anyway.
        file: A TOML file with more models (see `locogen.catalog.models`).

    Returns:
        The pipeline, of one of the classes in `locogen.models.families.FAMILIES`.

    Raises:
        LocogenError: For an unknown name (with near matches), for files that are missing, damaged
            or pickled, for a device that is not available, and for weights too large for its
            memory.
        UnsupportedModel: For a family that locogen does not know.

    Example:
        >>> pipe = load("mini")
        >>> type(pipe).__name__, pipe.device.type
        ('StableDiffusionPipeline', 'cpu')
    """
    _check_options(dtype, offload)
    # Before torch is imported, which takes seconds: a person should see at once that work begins.
    with open_bar(True, f"loading weights of {name}"):
        if str(name).startswith(PLANTED):
            return _planted(str(name), device=device, dtype=dtype, offload=offload)
        sources = _sources_of(str(name), file)
        return _loaded(str(name), sources, device, dtype, offload, local_files_only)


def _loaded(
    name: str,
    sources: _Sources,
    device: str | None,
    dtype: str,
    offload: Literal["model", "sequential"] | None,
    local_files_only: bool,
) -> Any:
    """The pipeline of the first source that can be loaded, where it is to compute."""
    import torch

    # It advises to install torchvision, which locogen does not need.
    with _muted("transformers.utils.import_utils"):
        pipe = _first_that_loads(name, sources, getattr(torch, dtype), local_files_only)
    family_of(pipe)
    pipe.set_progress_bar_config(disable=True)
    target = device or ("cpu" if offload is None else "cuda")
    try:
        _place(pipe, target, offload)
    except (AssertionError, RuntimeError) as error:
        if out_of_memory(error):
            raise LocogenError(_too_large(pipe, target, offload)) from error
        raise LocogenError(
            f"the device {target!r} is not available ({_first_line(error)}): "
            "use 'cpu', 'cuda' or 'mps'"
        ) from error
    if dtype == "float32" and target.startswith("cuda") and not sources.embedded:
        _hint_at_half_precision(target)
    return pipe


def _check_options(dtype: str, offload: str | None) -> None:
    if dtype not in ("float32", "float16", "bfloat16"):
        raise LocogenError(f"dtype is {dtype!r}: use 'float32', 'float16' or 'bfloat16'")
    if offload not in (None, "model", "sequential"):
        raise LocogenError(f"offload is {offload!r}: use 'model', 'sequential', or None")


def _planted(name: str, *, device: str | None, dtype: str, offload: Any) -> Any:
    """A planted model: its base, with the differences that were trained."""
    from locogen.catalog.deltas import add_deltas, load_deltas

    plant = plant_entry(name)
    # Added in full precision: the base's own rounding to another type comes after.
    pipe = load(plant.base)
    trained = pipe.text_encoder if plant.side == "text encoder" else pipe.unet
    add_deltas(trained, load_deltas(plant.weights))
    pipe.register_to_config(_name_or_path=PLANTED + plant.name)
    if dtype != "float32":
        import torch

        # It names the parts that should stay in float32: of these models, none.
        with _muted("diffusers.models.modeling_utils"):
            pipe.to(dtype=getattr(torch, dtype))
    _place(pipe, device or ("cpu" if offload is None else "cuda"), offload)
    return pipe


def _place(pipe: Pipeline, device: str, offload: str | None) -> None:
    """Move the weights, or have them moved when they are needed; their types stay."""
    import torch

    if offload is None:
        # It warns of float16 on the CPU: if that fails, the call says so.
        with _muted("diffusers.pipelines.pipeline_utils"):
            pipe.to(device)
        return
    # Otherwise a missing device would show in the first call only.
    torch.zeros(1, device=device)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)


def _too_large(pipe: Pipeline, device: str, offload: str | None) -> str:
    """What to do about weights that do not fit the device."""
    sizes = [
        _weight_bytes(part) for part in pipe.components.values() if hasattr(part, "parameters")
    ]
    # Offload needs room for the largest part, or for one layer.
    remedy = {
        None: "load with dtype='float16' or 'bfloat16', or with offload='model' or 'sequential'",
        "model": "load with dtype='float16' or 'bfloat16', or with offload='sequential'",
        "sequential": "close what else uses it, or use a larger device",
    }[offload]
    return f"the weights ({sum(sizes) / 1e9:.1f} GB) do not fit the memory of {device!r}: {remedy}"


def _weight_bytes(module: Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


@functools.cache
def _hint_at_half_precision(device: str) -> None:
    """Warn, once in a process: the precision that is right on a CPU rarely is on a card."""
    warnings.warn(
        f"float32 on {device!r} takes twice the memory of half precision and is several times "
        "slower: consider load(…, dtype='float16') or 'bfloat16', or loco.speed",
        stacklevel=4,
    )


@contextmanager
def _muted(name: str) -> Iterator[None]:
    """Within the context, one logger of the libraries underneath reports errors alone."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class _Sources:
    """Where to look for a model.

    Attributes:
        places: Folders, files or hub ids, first place first; the others are mirrors of it.
        revision: On the hub; None for folders and files.
        gated: Whether its terms must be accepted on the hub.
        embedded: Whether it comes with locogen.
    """

    places: tuple[str, ...]
    revision: str | None = None
    gated: bool = False
    embedded: bool = False


def _first_that_loads(name: str, sources: _Sources, dtype: Any, local_files_only: bool) -> Any:
    """The pipeline of the first source that can be loaded."""
    errors = []
    for source, revision, local in _attempts(sources, local_files_only):
        try:
            return _fetch(source, revision, dtype, local)
        except UnsupportedModel:
            raise
        except (LocogenError, OSError, ValueError) as error:  # ValueError: a missing folder
            errors.append(error)
    # Files that are there but damaged say more than places where there is nothing.
    for error in errors:
        if isinstance(error, LocogenError):
            raise LocogenError(f"could not load the model {name!r}: {error}") from error
    last = errors[-1]
    raise LocogenError(f"could not load the model {name!r}: {_remedy(sources, last)}") from last


def _attempts(sources: _Sources, local_files_only: bool) -> Iterator[tuple[str, str | None, bool]]:
    """(source, revision, local files only): all places on this machine, and only then the hub."""
    only_local = local_files_only or sources.revision is None
    for local in (True,) if only_local else (True, False):
        for i, place in enumerate(sources.places):
            # Revisions of a mirror are not those of the original: its newest one is used.
            yield place, sources.revision if i == 0 else "main", local


def _fetch(source: str, revision: str | None, dtype: Any, local_files_only: bool) -> Any:
    """The pipeline of one source; the files of a hub id are fetched first."""
    is_on_hub = not Path(source).exists()
    # Downloads show the hub's own bars: they take long, and say how much is left.
    place = _downloaded(source, revision, local_files_only) if is_on_hub else Path(source)
    with without_library_bars():
        if place.is_file():
            pipe = _from_file(place, dtype, local_files_only)
        else:
            pipe = _from_folder(place, dtype)
    _check_complete(pipe)
    # Not the place in the cache: the catalog's settings are looked up by it.
    if not Path(source).is_dir():
        pipe.register_to_config(_name_or_path=source)
    return pipe


def _check_complete(pipe: Pipeline) -> None:
    """Raise for weights that no file holds: diffusers leaves them without values."""
    for name, part in pipe.components.items():
        if not hasattr(part, "named_parameters"):
            continue
        weights = [*part.named_parameters(), *part.named_buffers()]
        missing = [path for path, weight in weights if weight.is_meta]
        if missing:
            raise LocogenError(f"the part {name!r} {missing_weights(missing)}")


@contextmanager
def without_library_bars() -> Iterator[None]:
    """Within the context diffusers and transformers show no bars; what was set before comes back.

    Bars of downloads are the hub's, and not for this context: download before it.
    """
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging as of_transformers

    hub_is_silent = are_progress_bars_disabled()
    shown = [bars for bars in (of_diffusers, of_transformers) if bars.is_progress_bar_enabled()]
    for bars in shown:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        for bars in shown:
            bars.enable_progress_bar()
        # transformers switches the hub's bars along with its own.
        if hub_is_silent and of_transformers in shown:
            disable_progress_bars()


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
    """The pipeline of a folder; raises `LocogenError` with what is wrong with the folder."""
    from diffusers import DiffusionPipeline

    gap = replaced_in_silence(folder, _left_out(folder))
    if gap is not None and folder != mini_folder("mini-b"):
        raise LocogenError(gap)
    try:
        return DiffusionPipeline.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            **_parts_apart(folder, dtype),
        )
    except LocogenError:
        raise
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
    """Parts that the pipeline's `from_pretrained` does not load, or not safely; None: left out."""
    if folder == mini_folder("mini-b"):
        return _shared_with_mini(dtype)
    parts: dict[str, Any] = dict.fromkeys(_left_out(folder))
    for part in parts_of(folder):
        if part.name in parts or not part.has_weights:
            continue
        # The pipeline looks for one variant in all parts. And it passes over what transformers
        # says of a weight that no file holds: that it now has random values.
        can_be_incomplete = part.library == "transformers" and part.plain
        if can_be_incomplete or part.only_variant is not None:
            parts[part.name] = _load_part(part, dtype)
    return parts


def _load_part(part: Part, dtype: Any) -> Any:
    """One part by itself; raises `LocogenError` if a weight is missing or has another shape."""
    kind = getattr(importlib.import_module(part.library), part.kind)
    # Only in transformers this makes a wrong shape an entry of the report: in diffusers it raises.
    options = {"ignore_mismatched_sizes": True} if part.library == "transformers" else {}
    model, report = kind.from_pretrained(
        part.folder,
        variant=part.only_variant,
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )
    # Buffers may be missing: the model computes them.
    missing = [name for name, _ in model.named_parameters() if name in report["missing_keys"]]
    if missing:
        raise LocogenError(f"the part {part.name!r} of {part.folder} {missing_weights(missing)}")
    for name, in_file, in_model in sorted(report["mismatched_keys"]):
        raise LocogenError(
            f"the part {part.name!r} of {part.folder} has {name} of shape {tuple(in_file)}, where "
            f"its config.json asks for {tuple(in_model)}: weights and config.json are of two "
            "models; fetch the folder again"
        )
    return model


def _shared_with_mini(dtype: Any) -> dict[str, Any]:
    """The parts that the second embedded model shares with the first: all but the U-Net."""
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
    parts = list(parts_of(folder))
    existing = {part.name for part in parts if part.folder.is_dir()}

    left_out: list[str] = []
    for part in parts:
        # A text encoder reads nothing without its tokenizer: the two go together.
        is_needed = part.is_tokenizer and part.name.replace("tokenizer", "text_encoder") in existing
        deleted = part.name in optional and part.name not in existing
        if part.name == "safety_checker" or (deleted and not is_needed):
            left_out.append(part.name)
    return left_out


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- single files --------------------------------------------------------------------------------


def _from_file(file: Path, dtype: Any, local_files_only: bool) -> Any:
    """The pipeline of a single file, converted by diffusers."""
    import diffusers

    if file.suffix != ".safetensors":
        raise LocogenError(f"{file} is not a .safetensors file: {pickled_remedy(file)}")
    problem = file_problem(file)
    if problem is not None:
        raise LocogenError(f"the checkpoint {file} {problem}")
    class_name, original = _kind_of_file(file)
    config = _config_of(file, original, local_files_only)
    gap = replaced_in_silence(config, _left_out(config))
    if gap is not None:
        raise LocogenError(f"{file} is configured by {config}: {gap}")
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
        # What the file does not hold stays without values, and cannot be cast.
        if "meta tensor" in str(error):
            raise LocogenError(
                f"the checkpoint {file} lacks weights that its configuration {config} asks for: "
                "fetch it again, or give it the configuration of its own model"
            ) from error
        raise LocogenError(
            f"diffusers cannot convert {file} with the configuration {config} "
            f"({_first_line(error)}): put the folder of the whole pipeline in diffusers' format "
            f"({INDEX}) around the file, or load that folder"
        ) from error


def _kind_of_file(file: Path) -> tuple[str, str]:
    """The pipeline's class, and the hub id of the checkpoint with the same configuration."""
    import torch
    from diffusers.loaders.single_file_utils import (
        fetch_diffusers_config,
        infer_diffusers_model_type,
    )
    from safetensors import safe_open

    # Names and shapes of the tensors are enough, and are read without the tensors.
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
        shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    outline = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        content = infer_diffusers_model_type(outline)
    except (LookupError, UnboundLocalError):  # it looks for tensors that this file does not have
        content = "v1"
    # diffusers calls everything that it does not know "v1".
    if content == "v1" and "model.diffusion_model.input_blocks.0.0.weight" not in shapes:
        raise LocogenError(f"{file} is not a checkpoint of a whole pipeline {_what_to_load(file)}")
    if content not in SINGLE_FILES:
        raise UnsupportedModel(
            f"{file} is a {content} checkpoint: supported are {', '.join(SINGLE_FILES)}"
        )
    return SINGLE_FILES[content], fetch_diffusers_config(outline)["pretrained_model_name_or_path"]


def _what_to_load(file: Path) -> str:
    """What to load in the place of a file that does not hold a whole pipeline."""
    whole = file.absolute().parent.parent
    if (whole / INDEX).is_file():
        return f"but one of its parts: load the folder of the whole, load({str(whole)!r})"
    if (file.parent / "config.json").is_file():
        return (
            "but one of its parts: load the folder of the whole pipeline, the one with "
            f"{INDEX} in it"
        )
    return (
        "(a LoRA, a VAE or an embedding?): load the pipeline it belongs to, and then the file with "
        "diffusers' own loaders"
    )


def _config_of(file: Path, original: str, local_files_only: bool) -> Path:
    """A folder with the configuration of a single file: its own, or the original checkpoint's."""
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
        f"the single file {file} has no configuration: fetch it once with: hf download "
        f"{sources[0]} {patterns}, or put {INDEX} and the folders of its parts, in diffusers' "
        "format, next to the file"
    )


# --- names ---------------------------------------------------------------------------------------


def _remedy(sources: _Sources, error: Exception) -> str:
    """How to get the files."""
    source = sources.places[0]
    if sources.revision is None:
        return f"{source}: {_first_line(error)}"
    # Only models that have vanished from the hub have mirrors in the catalog.
    if len(sources.places) > 1:
        mirror = sources.places[1]
        return f"{source} is gone from the hub: fetch a copy once with: hf download {mirror}"
    fetch = f"fetch it once with: hf download {source} --revision {sources.revision}"
    terms = f"accept its terms on https://huggingface.co/{source}, log in with: hf auth login"
    if sources.gated:
        return f"it is gated: {terms}, and {fetch}"
    if "safetensors" in str(error):
        return (
            f"{source} has no complete safetensors weights, and pickled ones are refused: "
            "use a converted copy"
        )
    return f"{fetch} (if it is gated, first {terms})"


def _sources_of(name: str, file: str | Path | None) -> _Sources:
    """Where to look for a model: what is on this machine comes before the hub and the catalog."""
    if name in ("mini", "mini-b"):
        return _Sources((str(mini_folder(name)),), embedded=True)
    place = Path(name).expanduser()
    is_checkpoint = place.suffix in (".safetensors", *PICKLED)
    if place.is_dir() or (is_checkpoint and place.is_file()):
        return _Sources((str(place),))
    _check_is_no_path(name, place, is_checkpoint)
    is_named = file is not None and name in {entry.name for entry in model_entries(file)}
    if "/" in name and not is_named:
        return _Sources((name,), "main")
    return _sources_of_entry(name, file)


def _check_is_no_path(name: str, place: Path, is_checkpoint: bool) -> None:
    """Refuse what can only be a path, and does not exist."""
    if is_checkpoint:
        raise LocogenError(
            f"there is no file {place.absolute()}: "
            "give the path of a .safetensors file, a folder, a hub id or a catalog name"
        )
    # A hub id has one slash.
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise LocogenError(
            f"there is no folder {place}: "
            "give one in diffusers' format, a hub id, or a catalog name"
        )


def _sources_of_entry(name: str, file: str | Path | None) -> _Sources:
    """Where the catalog, or a user's TOML file, says that a model is."""
    entry = model_entry(name, file)
    if entry.family not in FAMILIES:
        raise UnsupportedModel(f"{name} is a {entry.family}: supported are {', '.join(FAMILIES)}")
    places = [Path(entry.id).expanduser()]
    if file is not None:
        places.append(Path(file).parent / entry.id)  # a folder may start where its file is
    for place in places:
        if place.exists():
            # A pipeline remembers the place that it came from, and finds its defaults by it.
            register(replace(entry, id=str(place)))
            return _Sources((str(place),))
    if file is not None:
        register(entry)
    return _Sources((entry.id, *entry.mirrors), entry.revision, entry.gated)
