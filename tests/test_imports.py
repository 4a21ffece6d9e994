"""The rules of the house, read from the source: which way modules import, and what is never used.

Every rule is a function from source code to complaints. It is tried on the package, where it must find
nothing, and on snippets that break it, where it must complain: a rule that cannot fail says nothing.
"""

import ast
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "locogen"

# A module imports from its own room and from rooms above it in this list. `errors` may be imported by all.
ROOMS = (
    *(
        "errors",
        "types",
        "console",
        "files",
        "markup",
        "plan",
        "finding",
        "phrasings",
        "stats",
        "catalog",
        "models",
        "interventions",
    ),
    *(
        "pictures",
        "localization",
        "editing",
        "attacks",
        "benchmarks",
        "views",
        "studies",
        "pages",
        "questions",
        "mini",
        "planting",
        "__main__",
    ),
)
APART = {"localization", "editing"}  # they never meet
STUDIES_KNOW = {
    "errors",
    "console",
    "files",
    "phrasings",
    "plan",
    "finding",
    "catalog",
    "models.checkpoint",  # how many layers a folder has, by the names of its weights
    "pictures.progress",
}  # a study starts kernels: it makes no picture
WITHOUT_TORCH = (
    "phrasings",
    "plan",
    "stats",
    "pages",
    "views.tables",
    "views.plots",
    "localization.effects",
)
WITHOUT_TORCH += ("localization.racing", "errors", "console", "files", "markup", "finding")
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING = {"torch.load", "torch.save", "read_pickle", "to_pickle"}

Rule = Callable[[str, ast.Module, str], Iterator[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    """`locogen/mini/world.py` → `mini.world`; a package goes by its own name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def sources() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.Module, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything imported anywhere in the module, also inside functions.

    `from a import b` gives `a.b`: whether b is a module or not does not matter to the rules.
    """
    package = (
        ["locogen", *module.split(".")] if is_package else ["locogen", *module.split(".")[:-1]]
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}"


def is_package(module: str) -> bool:
    return (PACKAGE / module.replace(".", "/") / "__init__.py").is_file()


def arrows(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """A module imports only from its own room and from those above it; localization and editing never meet."""
    room = module.split(".")[0]
    if room == "__init__":
        return
    if room not in ROOMS:
        yield f"{module} is in no room of ROOMS (tests/test_imports.py)"
        return
    above = set(ROOMS[: ROOMS.index(room) + 1])
    if room in APART:
        above -= APART - {room}
    for line, name in imported(tree, module, is_package(module)):
        parts = name.split(".")
        if parts[0] != "locogen" or name == "locogen.__version__":
            continue
        target = parts[1] if len(parts) > 1 else "__init__"
        if target not in above:
            yield f"{module}:{line} imports locogen.{target}, which is not above {room}"


def studies_make_no_pictures(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """A study starts kernels and waits: of what makes pictures it knows the progress file alone."""
    if module.split(".")[0] != "studies":
        return
    for line, name in imported(tree, module, is_package(module)):
        inner = name.removeprefix("locogen.")
        if inner in ("__version__", name) or inner.split(".")[0] == "studies":
            continue
        if not any(inner == known or inner.startswith(f"{known}.") for known in STUDIES_KNOW):
            yield f"{module}:{line} imports {name}"


def no_torch(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """Modules that work from tables alone never import torch."""
    if any(module == room or module.startswith(f"{room}.") for room in WITHOUT_TORCH):
        for line, name in imported(tree, module):
            if name.split(".")[0] in {"torch", "diffusers", "transformers"}:
                yield f"{module}:{line} imports {name}"


def plan_is_plain(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """What is pure data imports the standard library only."""
    if module in ("plan", "finding"):
        for line, name in imported(tree, module):
            if name.split(".")[0] not in sys.stdlib_module_names | {"locogen"}:
                yield f"{module}:{line} imports {name}, which is not in the standard library"


def no_star(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """No `import *`."""
    for line, name in imported(tree, module):
        if name.endswith(".*"):
            yield f"{module}:{line} imports *"


def no_bare_except(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """No `except:`, and no `except BaseException` that swallows an interrupt."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            catches_all = node.type is None or ast.unparse(node.type) == "BaseException"
            if catches_all and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node)):
                yield f"{module}:{node.lineno} catches everything and raises nothing"


def no_pickle(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """Nothing is written or read that runs code when loaded."""
    for line, name in imported(tree, module):
        if name.split(".")[0] in PICKLERS:
            yield f"{module}:{line} imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (
            ast.unparse(node) in PICKLING or node.attr in PICKLING
        ):
            yield f"{module}:{node.lineno} uses {ast.unparse(node)}"
        allowed = isinstance(node, ast.keyword) and node.arg == "allow_pickle"
        if allowed and ast.unparse(node.value) != "False":
            yield f"{module}:{node.value.lineno} allows pickle"


def names_of_their_own(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """A public name is never that of a room: `locogen.pages` cannot be both."""
    for node in tree.body:
        if isinstance(node, Function) and node.name in ROOMS:
            yield f"{module}:{node.lineno} {node.name}() has the name of a room"


TWINS: list[tuple[Rule, str, str]] = [  # the rule, a module, a source for it that breaks the rule
    (arrows, "plan", "from .pictures.runs import generate"),
    (arrows, "plan", "def f():\n    from locogen.pictures.runs import generate"),
    (arrows, "catalog.models", "import locogen.pictures.runs"),
    (arrows, "models.layers", "from ..interventions import prompts"),
    (arrows, "localization.effects", "from locogen.editing import edit"),
    (arrows, "editing.edit", "from locogen.localization.effects import carrier"),
    (arrows, "catalog", "from ..models import load"),
    (arrows, "localization.localize", "import locogen as loco"),
    (arrows, "nowhere", ""),
    (studies_make_no_pictures, "studies.study", "from locogen.pictures.runs import generate"),
    (
        studies_make_no_pictures,
        "studies.worker",
        "def f():\n    from locogen.editing.edit import Edit",
    ),
    (no_torch, "views.plots", "def f():\n    import torch"),
    (no_torch, "stats", "from torch import nn"),
    (plan_is_plain, "plan", "import numpy as np"),
    (plan_is_plain, "finding", "def f():\n    import pandas as pd"),
    (no_star, "plan", "from math import *"),
    (no_bare_except, "plan", "try:\n    f()\nexcept:\n    pass"),
    (no_bare_except, "plan", "try:\n    f()\nexcept BaseException:\n    pass"),
    (no_pickle, "plan", "import pickle"),
    (no_pickle, "plan", "from joblib import dump"),
    (no_pickle, "mini.train", "import torch\ntorch.save({}, 'x')"),
    (no_pickle, "runs", "table.to_pickle('x')"),
    (no_pickle, "runs", "np.load('x', allow_pickle=True)"),
    (names_of_their_own, "catalog", "def models(): ..."),
    (names_of_their_own, "views.plots", "def editing(): ..."),
]
RULES: list[Rule] = list(dict.fromkeys(rule for rule, _, _ in TWINS))

HARMLESS = '''
"""Uses what the rules come close to forbidding."""
import json
from .errors import LocogenError
def f():
    """Return what it reads."""
    try:
        return json.loads("1")
    except ValueError:
        raise LocogenError("no")
    except BaseException:
        clean_up()
        raise
class A:
    def score(self):
        return self.load(allow_pickle=False)
'''


@functools.cache
def parsed(path: Path) -> tuple[str, ast.Module]:
    text = path.read_text(encoding="utf-8")
    return text, ast.parse(text)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_follows_the_rule(rule: Rule) -> None:
    complaints: list[str] = []
    for module, path in sources().items():
        text, tree = parsed(path)
        complaints += rule(module, tree, text)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("rule, module, text", TWINS)
def test_the_rule_can_fail(rule: Rule, module: str, text: str) -> None:
    assert list(rule(module, ast.parse(text), text))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_leaves_harmless_code_alone(rule: Rule) -> None:
    assert not list(rule("plan", ast.parse(HARMLESS), HARMLESS))


def test_the_rules_see_the_package() -> None:
    assert "__init__" in sources()
