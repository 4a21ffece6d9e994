"""What a notebook takes: find it, read its parameters without starting a kernel, check values against them."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import json
import os
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from locogen.errors import LocogenError, unknown

ARRANGED = ("results",)  # parameters that a study sets itself
_PACKAGE = Path(__file__).resolve().parent.parent
_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
}


def notebook_file(name: str, base: Path) -> Path:
    """A notebook by its path from `base` (with .ipynb), or one of locogen's own by its name."""
    if name.endswith(".ipynb"):
        if not (base / name).is_file():
            raise LocogenError(f"there is no notebook {base / name}")
        return base / name
    places = (_PACKAGE / "notebooks", _PACKAGE.parent / "notebooks")  # in a wheel, in a checkout
    own = {file.stem: file for place in places for file in place.glob("*.ipynb")}
    if name not in own:
        raise unknown("notebook", name, own)
    return own[name]


def source_of(notebook: Path) -> list[tuple[str, str]]:
    """The notebook's cells, (kind, source): what it does, without outputs and metadata."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (ValueError, KeyError, TypeError):
        raise LocogenError(f"{notebook} is not a notebook: save it from JupyterLab") from None


def parameters_of(notebook: Path) -> dict[str, dict[str, str]]:
    """Name → type, default and help of the notebook's parameters, as papermill's `inspect_notebook` tells them.

    Read from the source here: importing papermill alone takes longer than a plan may take to be shown.
    """
    return _read(notebook, notebook.stat().st_mtime_ns)


@functools.lru_cache
def _read(notebook: Path, changed: int) -> dict[str, dict[str, str]]:
    source_of(notebook)  # refuses what is not a notebook
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if not tagged:
        raise LocogenError(
            f"{notebook} has no parameters: give the cell that holds them the tag 'parameters'"
        )
    source = "".join(tagged[0]["source"])
    try:
        return {told["name"]: told for told in _assigned(source)}
    except (SyntaxError, tokenize.TokenError):
        raise LocogenError(
            f"{notebook}: its parameters are not plain Python, a line each: seeds: int = 4"
        ) from None


def _assigned(source: str) -> Iterator[dict[str, str]]:
    """Each assignment of a cell: name, type as annotated, default as written, and the comment behind it."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokens
        if token.type == tokenize.COMMENT
    }
    for node in ast.parse(source).body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
        if (
            isinstance(target, ast.Name)
            and isinstance(node, ast.Assign | ast.AnnAssign)
            and node.value is not None
        ):
            kind = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else "None"
            default = ast.get_source_segment(source, node.value) or ""
            told = {"name": target.id, "inferred_type_name": kind, "default": default}
            yield told | {"help": comments.get(node.end_lineno or 0, "")}


def defaults_of(notebook: Path) -> dict[str, Any]:
    """Name → default of the notebook's parameters; one that is not plainly written down is left out."""
    found: dict[str, Any] = {}
    for name, told in parameters_of(notebook).items():
        with contextlib.suppress(ValueError, SyntaxError):
            found[name] = ast.literal_eval(told["default"])
    return found


def check_parameters(values: Mapping[str, Any], notebook: Path) -> None:
    """Raise `LocogenError` for a parameter that the notebook does not have, or a value of another type."""
    valid = parameters_of(notebook)
    for name, value in values.items():
        if name in ARRANGED:
            raise LocogenError(f"{name} is set by the study itself: leave it out")
        if name not in valid:
            listed = ", ".join(each for each in valid if each not in ARRANGED)
            raise LocogenError(
                f"{unknown('parameter', name, valid)} ({notebook.name} takes: {listed})"
            )
        kind = valid[name]["inferred_type_name"]
        if kind in _TYPES and not _fits(value, kind):
            raise LocogenError(f"{name} is {value!r}: {notebook.name} takes a value of type {kind}")


def _fits(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and (kind == "bool" or not isinstance(value, bool))


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
        f"{value!r} is no parameter: give a text, a number, true, false or a list of these"
    )
