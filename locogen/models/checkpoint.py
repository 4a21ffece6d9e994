"""The files of a checkpoint: which weights each part has, and why a folder cannot be loaded."""

from __future__ import annotations

import codecs
import json
import re
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model_index.json"
# Parts must be of a class of these: anything else is code that comes with the checkpoint.
LIBRARIES = ("diffusers", "transformers")
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
STEMS = ("diffusion_pytorch_model", "model")  # how diffusers and transformers name a part's weights

# model.safetensors, model.fp16.safetensors, model-00001-of-00002.safetensors,
# model.fp16-00001-of-00002.safetensors, and, as older versions wrote it,
# model-00001-of-00002.fp16.safetensors
_WEIGHTS = re.compile(
    rf"(?:{'|'.join(STEMS)})"
    r"(?:\.(?P<variant>[\w.]+?))?"
    r"(?:-\d{5}-of-\d{5})?"
    r"(?:\.(?P<old>\w+))?"
    r"\.safetensors"
)

# The files of which a tokenizer needs all of one line.
VOCABULARIES = (
    {"tokenizer.json"},
    {"vocab.json", "merges.txt"},
    {"spiece.model"},
    {"tokenizer.model"},
    {"vocab.txt"},
)

# The beginning of a file that stands for one that Git LFS did not fetch.
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Part:
    """One part of a pipeline as `model_index.json` names it, and the files of its folder.

    Attributes:
        name: As in the pipeline, such as "unet".
        library: The library of its class.
        kind: The name of its class.
        folder: Where its files are.
        plain: Whether it has weights without a variant, as safetensors.
        variants: Names of the variants, such as "fp16", that it has as safetensors.
    """

    name: str
    library: str
    kind: str
    folder: Path
    plain: bool
    variants: tuple[str, ...]

    @property
    def has_weights(self) -> bool:
        """Whether it is a model: schedulers, tokenizers and processors have no `config.json`."""
        return (self.folder / "config.json").is_file()

    @property
    def is_tokenizer(self) -> bool:
        """Whether it turns text into tokens, by the name of its class."""
        return "Tokenizer" in self.kind

    @property
    def only_variant(self) -> str | None:
        """The variant to load, if the part has no plain weights and just one variant."""
        single = not self.plain and len(self.variants) == 1 and self.library in LIBRARIES
        return self.variants[0] if single else None


def model_index(folder: Path) -> Mapping[str, Any]:
    """What `model_index.json` holds; nothing if it is missing or damaged."""
    try:
        content = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def parts_of(folder: Path) -> Iterator[Part]:
    """The parts that `model_index.json` names, in its order, whether their folders exist or not."""
    for name, entry in model_index(folder).items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2:
            continue  # a setting
        if entry[0] is None:
            continue  # a part that the pipeline does without
        place = folder / name
        plain, variants = _weights_in(place)
        yield Part(name, str(entry[0]), str(entry[1]), place, plain, variants)


def _weights_in(folder: Path) -> tuple[bool, tuple[str, ...]]:
    """Whether a folder has weights without a variant, and the variants that it has."""
    plain = False
    variants = set()
    for file in folder.glob("*.safetensors"):
        match = _WEIGHTS.fullmatch(file.name)
        if match is None:
            continue
        variant = match["variant"] or match["old"]
        if variant is None:
            plain = True
        else:
            variants.add(variant)
    return plain, tuple(sorted(variants))


def complaint(folder: Path, left_out: Collection[str] = ()) -> str | None:
    """Why a folder cannot be loaded.

    Args:
        folder: where the checkpoint lies.
        left_out: the names of parts that are not loaded, whatever is wrong with them.

    Returns:
        The first problem, with its place and remedy; None if the files look right.
    """
    if not (folder / INDEX).is_file():
        return _no_pipeline(folder)
    index = model_index(folder)
    if not index:
        return f"{folder / INDEX} {_json_problem(folder / INDEX) or 'is damaged: fetch it again'}"
    if not isinstance(index.get("_class_name"), str):
        return (
            f"{folder / INDEX} needs a pipeline class from the checkpoint, "
            f"{index.get('_class_name')}: locogen does not run such code; use one of diffusers' "
            "own pipelines"
        )
    return _first_problem(folder, left_out, _problem)


def replaced_in_silence(folder: Path, left_out: Collection[str] = ()) -> str | None:
    """What a folder lacks, and diffusers and transformers would make up without an error.

    A tokenizer without files is one without words, and a model without its configuration is one of
    the size that its class has by default.

    Args:
        folder: where the checkpoint lies.
        left_out: the names of parts that are not loaded.

    Returns:
        The first gap, with its place and remedy; None if there is none.
    """
    return _first_problem(folder, left_out, _missing_files)


def _first_problem(
    folder: Path, left_out: Collection[str], problem_of: Callable[[Part], str | None]
) -> str | None:
    for part in parts_of(folder):
        if part.name in left_out:
            continue
        problem = problem_of(part)
        if problem is not None:
            return f"the part {part.name!r} of {folder} {problem}"
    return None


def _no_pipeline(folder: Path) -> str:
    """What a folder without `model_index.json` is, and what to give instead."""
    singles = sorted(folder.glob("*.safetensors"))
    if (folder / "config.json").is_file():
        return (
            f"{folder} holds one part of a pipeline (config.json, no {INDEX}): "
            "give the folder of the whole pipeline"
        )
    if singles:
        return (
            f"{folder} has no {INDEX} but the single file {singles[0].name}: "
            f"give the file itself, {singles[0]}"
        )
    pickled = _pickled_in(folder)
    if pickled:
        return f"{folder} holds {pickled[0]}: {pickled_remedy(folder / pickled[0])}"
    return f"{folder} holds no pipeline: give a folder in diffusers' format, {INDEX} and its parts"


def pickled_remedy(file: Path) -> str:
    """Why pickled weights are refused, and how to convert them."""
    if file.suffix == ".ckpt":
        return (
            "pickled weights are refused, since unpickling can run any code: get the .safetensors "
            "file of the same checkpoint, or convert it where you trust its source"
        )
    return (
        "pickled weights are refused, since unpickling can run any code: where you trust their "
        "source, convert them once with diffusers, DiffusionPipeline.from_pretrained(FOLDER, "
        "use_safetensors=False).save_pretrained(NEW), and load NEW"
    )


def _pickled_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*") if file.suffix in PICKLED)


def _problem(part: Part) -> str | None:
    """What is wrong with one part, as the end of a sentence."""
    gap = _missing_files(part)
    if gap is not None:
        return gap
    if part.library not in LIBRARIES and any(part.folder.glob("*.py")):
        return (
            f"needs a class from the checkpoint, {part.library}.{part.kind}: locogen does not run "
            "such code; use a checkpoint of classes that diffusers or transformers have"
        )
    problem = _unreadable_file(part)
    if problem is not None or not part.has_weights:
        return problem
    return _missing_shard(part) or _missing_weights(part)


def _unreadable_file(part: Part) -> str | None:
    """The first file of a part that cannot be read, and why."""
    for file in sorted(part.folder.glob("*.safetensors")):
        problem = file_problem(file)
        if problem is not None:
            return problem
    for file in sorted(part.folder.glob("*.json")):
        problem = _json_problem(file)
        if problem is not None:
            return f"has a file that cannot be read: {file.name} {problem}"
    return None


def _missing_files(part: Part) -> str | None:
    """Which file of a part is not there, as the end of a sentence."""
    if not part.folder.is_dir():
        return (
            f"is missing: fetch its folder again, or set it to [null, null] in {INDEX} "
            "where the pipeline allows it"
        )
    names = {file.name for file in part.folder.iterdir()}
    if not names:
        return "is an empty folder: fetch it again"
    if (part.plain or part.variants) and not part.has_weights:
        return "has weights but no config.json: fetch its folder again"
    return _missing_words(part, names) if part.is_tokenizer else None


def _missing_words(part: Part, names: Collection[str]) -> str | None:
    """Which file a tokenizer lacks among the `names` of its files, as the end of a sentence."""
    if not any(files.issubset(names) for files in VOCABULARIES):
        return "has no vocabulary (such as tokenizer.json): fetch its folder again"
    # CLIP's pipelines ask the tokenizer how long a prompt may be. Those with T5 know it themselves.
    if part.kind.startswith("CLIP") and "tokenizer_config.json" not in names:
        return "has no tokenizer_config.json: fetch its folder again"
    return None


def _json_problem(file: Path) -> str | None:
    """Why a JSON file cannot be read, as the end of a sentence; None if it can."""
    content = file.read_bytes()
    if content.startswith(codecs.BOM_UTF8):
        return (
            "begins with a byte-order mark, which diffusers does not read: "
            "save the file as UTF-8 without byte-order mark"
        )
    try:
        json.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        return (
            "is not UTF-8 text: save the file as UTF-8 without byte-order mark, or fetch it again"
        )
    except ValueError:
        return "is damaged: fetch it again"
    return None


def missing_weights(names: Sequence[str]) -> str:
    """What to do about weights that are in none of a part's files, as the end of a sentence."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"lacks the weight {names[0]}{more}: the checkpoint is incomplete; fetch the part again, "
        "or save it again with the tool that made it"
    )


def _missing_weights(part: Part) -> str | None:
    """Why none of a part's weights can be chosen."""
    if part.plain or part.only_variant is not None:
        return None
    if part.variants:
        names = ", ".join(part.variants)
        return (
            f"has no plain weights and several variants ({names}): keep one of them in the folder"
        )
    pickled = _pickled_in(part.folder)
    if pickled:
        remedy = pickled_remedy(part.folder / pickled[0])
        return f"has no safetensors weights, only {pickled[0]}: {remedy}"
    return "has no safetensors weights: fetch them again"


def _missing_shard(part: Part) -> str | None:
    """A file that an index of weights in several files names, and that does not exist."""
    for index in sorted(part.folder.glob("*.safetensors.index*.json")):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return f"has a damaged {index.name}: fetch it again"
        missing = sorted(name for name in files if not (part.folder / name).is_file())
        present = len(files) - len(missing)
        # An index without any of its files is left over from another variant.
        if missing and present:
            return f"lacks {missing[0]}, one of {len(files)} files of its weights: fetch it again"
    return None


def file_problem(file: Path) -> str | None:
    """Why a safetensors file cannot be read, as the end of a sentence; None if it is whole."""
    # The header alone is read: 8 bytes give its length, and it says how many bytes must follow.
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(_POINTER))
        if start == _POINTER:
            return (
                f"has a Git LFS pointer in place of {file.name}: "
                "run git lfs pull in its folder, or fetch it again"
            )
        length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else size
        if length + 8 > size:
            return _cut_short(file, size)
        stream.seek(8)
        try:
            header = json.loads(stream.read(length))
            ends = [
                entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return f"has a damaged file, {file.name}: fetch it again"
    if 8 + length + max(ends, default=0) > size:
        return _cut_short(file, size)
    return None


def count_layers(folder: Path) -> int | None:
    """How many layers of a pipeline's denoiser read text, by the names of its weights.

    No weight is read. `find_layers` says the same of the loaded pipeline.

    Args:
        folder: A folder in diffusers' format.

    Returns:
        The number; None if it cannot be seen from the names.
    """
    names: set[str] = set()
    for part in ("unet", "transformer", *_later_denoisers(folder)):
        for file in (folder / part).glob("*.safetensors"):
            names |= {f"{part}.{name}" for name in _tensor_names(file)}
    # Families whose attention reads picture and text together; of these some have an `attn2` too,
    # in which the picture reads itself.
    joint = _ending(names, ("add_k_proj.weight", "to_k_t.weight"))
    single = set(re.findall(_SINGLE_BLOCK, "\n".join(names), re.MULTILINE))
    # Krea 2's, whose small transformer before them is named otherwise.
    single |= set(re.findall(_GATED_BLOCK, "\n".join(names), re.MULTILINE))
    cross = _ending(names, "attn2.to_k.weight")
    return len(joint) + len(single) or len(cross) or None


_GATED_BLOCK = r"^transformer\.transformer_blocks\.\d+\.attn\.to_gate\."
# Of FLUX, and of families whose blocks are all of one stream (Z-Image, Lumina 2).
_SINGLE_BLOCK = r"^\w+\.(?:single_transformer_blocks|single_stream_blocks|layers)\.\d+\."


def _later_denoisers(folder: Path) -> tuple[str, ...]:
    """The denoisers that take a turn after the first one's (Wan 2.2): none without a boundary."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    has_boundary = isinstance(index, dict) and index.get("boundary_ratio") is not None
    return ("transformer_2",) if has_boundary else ()


def _ending(names: Iterable[str], end: str | tuple[str, ...]) -> list[str]:
    return [name for name in names if name.endswith(end)]


def _tensor_names(file: Path) -> set[str]:
    """The names of a file's tensors; none of a damaged one, of which `load` says what it is."""
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(min(length, file.stat().st_size)))
    except (OSError, ValueError, struct.error):
        return set()
    return set(header) if isinstance(header, dict) else set()


def _cut_short(file: Path, size: int) -> str:
    return (
        f"has a file that was cut short, {file.name} ({size} bytes): delete it and fetch it again"
    )
