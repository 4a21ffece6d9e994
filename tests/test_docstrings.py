"""Public functions explain themselves: each argument, what comes back, and an example that runs.

Examples share one mini pipeline, and see the public names as after `from locogen import *`.
"""

import dataclasses
import doctest
import functools
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import locogen

ROOT = Path(__file__).resolve().parent.parent

FUNCTIONS = [name for name in locogen.__all__ if inspect.isfunction(getattr(locogen, name))]
# Classes that users make themselves. Others are results, which verbs return and explain.
CLASSES = ("Concept", "Finding", "Intervention", "PromptPair", "Settings", "Window")
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Example")


def sections(text: str) -> dict[str, str]:
    """The sections of a Google docstring by name; "" is what stands before them."""
    found = {"": ""}
    name = ""
    for line in inspect.cleandoc(text).splitlines():
        if line.endswith(":") and line[:-1] in SECTIONS:
            name = line[:-1]
            found[name] = ""
        else:
            found[name] += line + "\n"
    return found


def complaints(function: Callable[..., Any]) -> Iterator[str]:
    """What a reader would miss in a function's docstring."""
    parts = sections(function.__doc__ or "")
    summary = parts[""].splitlines()[0] if parts[""] else ""
    if not summary.endswith((".", ":")):
        yield "no summary line"
    described = [
        line.split(":")[0].strip() for line in parts.get("Args", "").splitlines() if ":" in line
    ]
    for name in inspect.signature(function).parameters:
        if name not in described:
            yield f"Args: says nothing about {name}"
    if not parts.get("Returns", "").strip():
        yield "no Returns:"
    if ">>>" not in parts.get("Example", ""):
        yield "no Example: with >>>"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_explains_itself(name: str) -> None:
    assert list(complaints(getattr(locogen, name))) == []


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_explains_itself(name: str) -> None:
    assert list(class_complaints(getattr(locogen, name))) == []


def class_complaints(kind: type[Any]) -> Iterator[str]:
    """What a reader would miss in the docstring of a data class."""
    parts = sections(kind.__doc__ or "")
    for field in dataclasses.fields(kind):
        if f"    {field.name}: " not in parts.get("Attributes", ""):
            yield f"Attributes: says nothing about {field.name}"
    if ">>>" not in parts.get("Example", ""):
        yield "no Example: with >>>"


@functools.cache
def shared_load(name: str) -> Any:
    """One pipeline for all examples."""
    return locogen.load(name)


_ATTRIBUTIONS: dict[str, Any] = {}


def shared_attribution(pipe: Any, concept: Any, **options: Any) -> Any:
    """One attribution for all examples that ask for the same: they only read it."""
    asked = repr((concept, sorted(options.items())))
    if asked not in _ATTRIBUTIONS:
        _ATTRIBUTIONS[asked] = locogen.attribute(pipe, concept, **options)
    return _ATTRIBUTIONS[asked]


@pytest.mark.parametrize(
    "name", [name for name in locogen.__all__ if ">>>" in (getattr(locogen, name).__doc__ or "")]
)
def test_its_example_runs(name: str) -> None:
    names = {public: getattr(locogen, public) for public in locogen.__all__}
    names |= {"load": shared_load, "attribute": shared_attribution}
    output: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for example in doctest.DocTestFinder(recurse=False).find(
        getattr(locogen, name), name, globs=names
    ):
        runner.run(example, out=output.append)
    assert not runner.failures, "".join(output)
    assert runner.tries


def test_the_check_can_fail() -> None:
    def bare(first: int, second: int) -> int:
        """Add two numbers.

        Args:
            first: The one.
        """
        return first + second

    assert list(complaints(bare)) == [
        "Args: says nothing about second",
        "no Returns:",
        "no Example: with >>>",
    ]


def test_the_check_of_classes_can_fail() -> None:
    @dataclasses.dataclass
    class Bare:
        """Hold a number."""

        number: int

    assert list(class_complaints(Bare)) == [
        "Attributes: says nothing about number",
        "no Example: with >>>",
    ]


# The reference


@pytest.mark.slow
def test_the_reference_is_built_offline(tmp_path: Path) -> None:
    """By the command of `make docs`: every public verb with its example, and nothing to fetch."""
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    [arguments] = re.findall(r"\$\(PY\) -m pdoc (.*)", recipe)
    command = arguments.replace("build/docs", str(tmp_path)).split()
    subprocess.run([sys.executable, "-m", "pdoc", *command], check=True, cwd=ROOT)
    text = (tmp_path / "locogen.html").read_text(encoding="utf-8")
    for name in ("localize", "fit_edit", "explore", "readable"):
        assert f'id="{name}"' in text
    assert text.count("Example") > 100
    pages = [page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")]
    assert not [page for page in pages if re.search(r'(src|<link[^>]*href)="?https?:', page)]
