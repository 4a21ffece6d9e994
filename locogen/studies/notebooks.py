"""What a notebook takes: find it, read its parameters without a kernel, and check values."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import math
import os
import re
import shutil
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from locogen.catalog.plants import SETS, plant_entries
from locogen.errors import LocogenError, unknown
from locogen.files import writing
from locogen.plan import KINDS, parse_layers, parse_names, parse_numbers

ARRANGED = ("results",)  # parameters that a study sets itself
_PACKAGE = Path(__file__).resolve().parent.parent
# Annotations that are checked. Others, such as `list[int]`, are left to the notebook.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
}


def notebook_file(name: str, base: Path) -> Path:
    """Find a notebook.

    Args:
        name: A path that ends in .ipynb, or the name of one of locogen's notebooks.
        base: The folder where paths start.

    Returns:
        The file.

    Raises:
        LocogenError: There is no such notebook.
    """
    if name.endswith(".ipynb"):
        if not (base / name).is_file():
            raise LocogenError(
                f"there is no notebook {base / name}: give a path relative to the study's file, or "
                "the name of a notebook that comes with locogen"
            )
        return base / name
    files = _shipped()
    if name not in files:
        raise unknown("notebook", name, files)
    return files[name]


def _shipped() -> dict[str, Path]:
    """Name → file of locogen's notebooks."""
    # In a wheel they lie within the package, in a checkout next to it.
    inside = (_PACKAGE / "notebooks").glob("*.ipynb")
    outside = (_PACKAGE.parent / "notebooks").glob("*.ipynb")
    return {file.stem: file for file in (*inside, *outside)}


def copy_notebooks(folder: Path) -> list[str]:
    """Copy locogen's notebooks into a folder; nothing that is there is written over.

    Args:
        folder: Where to; made if it is not there.

    Returns:
        The names of the files, the first one to open first.

    Raises:
        LocogenError: If one of them is there already.
    """
    if folder.exists() and not folder.is_dir():
        raise LocogenError(f"{folder} is a file: give a folder for the notebooks")
    files = sorted(_shipped().values(), key=lambda file: file.name)
    for file in files:
        if (folder / file.name).exists():
            raise LocogenError(
                f"{folder / file.name} is there already: give another folder, or remove it there"
            )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(file, folder / file.name)
    return [file.name for file in files]


def source_of(notebook: Path) -> list[tuple[str, str]]:
    """The notebook's cells as (kind, source): what it does, without outputs and metadata."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (ValueError, KeyError, TypeError):
        raise LocogenError(f"{notebook} is not a notebook: save it from JupyterLab") from None


# --- its parameters ------------------------------------------------------------------------------


def parameters_of(notebook: Path) -> dict[str, dict[str, str]]:
    """The notebook's parameters, in the form of papermill's `inspect_notebook`.

    They are read from the source here, since importing papermill alone takes longer than a person
    should wait for a plan.

    Args:
        notebook: The file.

    Returns:
        Name → name, `inferred_type_name`, default and help, all as text.

    Raises:
        LocogenError: The file is not a notebook, or has no cell with plain parameters.
    """
    return _read(notebook, notebook.stat().st_mtime_ns)


@functools.lru_cache
def _read(notebook: Path, changed: int) -> dict[str, dict[str, str]]:
    """`changed` makes the cache forget a notebook that was saved again."""
    source_of(notebook)  # raises for what is not a notebook
    source = _parameters_cell(notebook)
    try:
        return {parameter["name"]: parameter for parameter in _assignments(source)}
    except (SyntaxError, tokenize.TokenError):
        raise LocogenError(
            f"{notebook}: its parameters are not plain Python: write one on each line, such as "
            "seeds: int = 4"
        ) from None


def _parameters_cell(notebook: Path) -> str:
    """The source of the cell that papermill takes the parameters from."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        tags = cell.get("metadata", {}).get("tags", [])
        if "parameters" in tags:
            return "".join(cell["source"])
    raise LocogenError(
        f"{notebook} has no parameters: give the cell that holds them the tag 'parameters'"
    )


def _assignments(source: str) -> Iterator[dict[str, str]]:
    """Each assignment of a cell: name, type as annotated, default as written, and its comment."""
    comments = _comments(source)
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign):
            target = node.target
            kind = ast.unparse(node.annotation)
        elif isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            kind = "None"  # papermill's word for a parameter without an annotation
        else:
            continue
        if not isinstance(target, ast.Name) or node.value is None:
            continue
        yield {
            "name": target.id,
            "inferred_type_name": kind,
            "default": ast.get_source_segment(source, node.value) or "",
            "help": comments.get(node.end_lineno or 0, ""),
        }


def _comments(source: str) -> dict[int, str]:
    """Line → comment: the syntax tree has none, so they are found among the tokens."""
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    return comments


def defaults_of(notebook: Path) -> dict[str, Any]:
    """Name → default of the notebook's parameters, without those that are computed."""
    defaults: dict[str, Any] = {}
    for name, parameter in parameters_of(notebook).items():
        with contextlib.suppress(ValueError, SyntaxError):
            defaults[name] = ast.literal_eval(parameter["default"])
    return defaults


def check_parameters(values: Mapping[str, Any], notebook: Path) -> None:
    """Compare values with the parameters of a notebook.

    Args:
        values: Name → value.
        notebook: The file.

    Raises:
        LocogenError: The notebook has no such parameter, or it has another type.
    """
    valid = parameters_of(notebook)
    has_rules = is_shipped(notebook)
    for name, value in values.items():
        _check_name(name, valid, notebook)
        kind = valid[name]["inferred_type_name"]
        if kind in _TYPES and not _has_type(value, kind):
            raise LocogenError(f"{name} is {value!r}: {notebook.name} takes a value of type {kind}")
        # An empty text is checked like any other where the notebook gives it no meaning.
        is_left_out = value == "" and may_be_empty(valid[name])
        if has_rules and not is_left_out:
            _check_value(name, value, valid[name])


def _check_name(name: str, valid: Iterable[str], notebook: Path) -> None:
    """Refuse a parameter that the notebook lacks, or that the study sets."""
    if name in ARRANGED:
        raise LocogenError(f"{name} is set by the study itself: leave it out")
    if name not in valid:
        names = ", ".join(each for each in valid if each not in ARRANGED)
        raise LocogenError(f"{unknown('parameter', name, valid)} ({notebook.name} takes: {names})")


# What the parameters of locogen's own notebooks may be, by name: a kernel would take seconds to
# find out. Those of other notebooks may mean anything.
_COUNTS = ("seeds", "batch_size", "window", "num_inference_steps", "noises", "draws", "step")
_COUNTS += ("reference", "most_points")
_ABOVE_ZERO = ("ridge",)
_SHARES = ("enough",)
_AMOUNTS = ("guidance_scale", "strength", "noise_scale", "max_prompts", "most")
_AMOUNTS += ("neighbors", "controls", "prompts", "attack_steps", "concepts")
_CHOICES = {
    "dtype": ("float32", "float16", "bfloat16"),
    "offload": ("", "model", "sequential"),
    "kind": KINDS,
    "search": ("all", "race", "attribute"),
    "to": ("mean", "zero"),
    "explain": ("latents", "score"),
}
_TOKENS = ("last_subject", "subject", "end", "all")
# Lists that are written as text: numbers, and how they are read.
_NUMBERS: dict[str, dict[str, Any]] = {
    "ridges": {},
    "shares": {"most": 100},
    "steps": {"whole": True},
    "windows": {"whole": True},
    "guidance_scales": {},
}
_SIZE = re.compile(r"[1-9]\d*x[1-9]\d*")
# And names. They stand here too, since the modules that have them load torch.
NAMES = {
    "editors": (
        *("LocoEdit", "all layers", "random layers", "UCE", "LocoEdit, preserved", "covariance"),
        *("null space", "SPEED", "steering", "AdaVD", "neurons"),
    ),
    "attacks": (
        *("inversion", "states", "closed", "discrete"),
        *("relearn", "completion", "noise", "inpaint"),
    ),
    "localizers": (
        *("locogen", "locogen race", "locogen (attribute)", "causal tracing"),
        *("attention contribution", "attribution", "attribution (chain)"),
        *("bare argmin", "constant", "random window"),
    ),
}


def _check_value(name: str, value: Any, parameter: Mapping[str, str]) -> None:
    """Raise `LocogenError` for a value that the notebook would refuse."""
    # 0 means "as is usual" where that is the notebook's own value.
    least = 0 if parameter["default"] == "0" else 1
    if name in _COUNTS and value < least:
        raise LocogenError(f"{name} is {value}: give a whole number from {least} up")
    _check_amount(name, value)
    if name in _CHOICES and value not in _CHOICES[name]:
        raise LocogenError(f"{name} is {value!r}: use one of {_listed(_CHOICES[name])}")
    _check_words(name, value)
    _check_list(name, value, parameter)
    # Of texts that may be anything, and so have passed.
    if isinstance(value, str) and value != "" and not value.strip():
        raise LocogenError(f"{name} is {value!r}, spaces alone: write a text, or leave it out")


def may_be_empty(parameter: Mapping[str, str]) -> bool:
    """Whether an empty text has a meaning: the parameter's default, or its help says which.

    Args:
        parameter: One of `parameters_of`.
    """
    return parameter["default"] == '""' or "empty:" in parameter["help"]


def _check_amount(name: str, value: Any) -> None:
    if name in _AMOUNTS and not (value >= 0 and math.isfinite(value)):
        raise LocogenError(f"{name} is {value}: give a finite number from 0 up")
    if name in _ABOVE_ZERO and not 0 < value < math.inf:
        raise LocogenError(f"{name} is {value}: give a finite number above 0")
    if name in _SHARES and not 0 < value <= 1:
        raise LocogenError(f"{name} is {value}: give a share above 0 and up to 1, such as 0.9")
    if isinstance(value, float) and not math.isfinite(value):
        raise LocogenError(f"{name} is {value}: give a finite number")


def _check_words(name: str, value: Any) -> None:
    """The same of what is written in words."""
    if name == "device" and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", value):
        raise LocogenError(f"device is {value!r}: use 'cpu', 'cuda', 'cuda:0' or 'mps'")
    if name == "layers":
        parse_layers(value)


def _check_list(name: str, value: Any, parameter: Mapping[str, str]) -> None:
    """The same of lists that are written as text, such as "0.1, 1"."""
    if name in _NUMBERS:
        parse_numbers(value, name, **_NUMBERS[name])
    elif name in NAMES:
        parse_names(value, name, NAMES[name])
    elif name == "plants":
        _check_plants(value)
    elif name == "sizes":
        _check_sizes(value)
    elif name == "tokens":
        _check_tokens(value, many="," in parameter["default"])


def _check_plants(value: str) -> None:
    if value not in SETS:
        parse_names(value, "plants", [plant.name for plant in plant_entries()])


def _check_sizes(value: str) -> None:
    if not all(_SIZE.fullmatch(part.strip()) for part in value.split(",")):
        raise LocogenError(
            f"sizes is {value!r}: write prompts x seeds, separated by commas, such as 2x4, 6x6"
        )


def _check_tokens(value: str, *, many: bool) -> None:
    tokens = [part.strip() for part in value.split(",")]
    if not set(tokens) <= set(_TOKENS):
        raise LocogenError(f"tokens is {value!r}: use one of {_listed(_TOKENS)}")
    if len(tokens) > 1 and not many:
        raise LocogenError(f"tokens is {value!r}: here it is one of {_listed(_TOKENS)}")


def _listed(choices: Iterable[str]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def is_shipped(notebook: Path) -> bool:
    """Whether a notebook is one of locogen's own."""
    return notebook in _shipped().values()


def _has_type(value: Any, kind: str) -> bool:
    # For Python true and false are whole numbers too; for a person they are not.
    if isinstance(value, bool):
        return kind == "bool"
    return isinstance(value, _TYPES[kind])


def plain(value: Any) -> Any:
    """The value in plain JSON types: papermill makes strings of tuples and numpy's numbers."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy's and torch's scalars (some are floats too) and arrays
        return value.tolist()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Iterable):
        return [plain(inner) for inner in value]
    raise LocogenError(
        f"{value!r} is not a parameter: give a text, a number, true, false or a list of these"
    )
