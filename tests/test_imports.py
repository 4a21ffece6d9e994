"""The rules of the house, read from the source: which way modules import, their length, what is never used.

Every rule is a function from source code to complaints. It is tried on the package, where it must find
nothing, and on snippets that break it, where it must complain: a rule that cannot fail says nothing.
"""

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "locogen"

# What each module may import from locogen. Everyone may import `errors`; `__init__` may name everything.
# Arrows point down this list only: a module that is not in it yet is added with its arrows.
ARROWS: dict[str, set[str]] = {
    "__main__": {"study", "report", "catalog"},
    "report": {"overview", "provenance", "results", "tables", "cleaning", "pages"},
    "overview": {"results", "thumbnails", "tables", "pages"},
    "provenance": {"results", "pages", "parameters"},
    "results": {"planning", "plan", "tables"},
    "thumbnails": {"plots", "tables"},
    "study": {"planning", "engines", "progress", "estimates", "worker", "kernel", "atomic"},
    "engines": {"worker", "planning", "catalog"},
    "progress": {"estimates", "worker", "planning", "heartbeat", "atomic"},
    "worker": {"planning", "kernel", "keys", "parameters", "heartbeat", "atomic", "plan"},
    "estimates": {"planning", "catalog", "plan", "atomic"},
    "planning": {"catalog", "keys", "parameters", "atomic"},
    "keys": {"catalog", "parameters"},
    "kernel": set(),
    "parameters": set(),
    "widgets": {"exploring", "plots", "tables", "runs"},
    "trace_plots": {"plots"},
    "plots": {"tables"},
    "exploring": {
        "clamping",
        "edit",
        "families",
        "layers",
        "effects",
        "neurons",
        "phrasings",
        "plan",
        "runs",
        "tables",
    },
    "tables": set(),
    "cleaning": {"pages"},
    "pages": set(),
    "evaluation": {"runs", "score", "stats", "edit", "layers", "phrasings", "plan"},
    "neurons": {"clamping", "readings", "layers", "families", "hooks", "phrasings", "plan", "stats", "offloads"},
    "clamping": {"layers", "families", "hooks", "calls"},
    "edit": {"fitting", "readings", "layers", "families", "solve", "patches", "editfiles", "phrasings", "plan"},
    "fitting": {"readings", "layers", "solve", "phrasings"},
    "readings": {"layers", "families", "denoisers", "calls", "texts", "offloads"},
    "patches": {"solve", "offloads"},
    "editfiles": {"solve"},
    "rivals": {"trace", "recovery", "contribution", "localization", "effects", "ranks", "plan", "score"},
    "recovery": {"effects", "plan", "stats"},
    "trace": {
        "corruption",
        "states",
        "batches",
        "heartbeat",
        "texts",
        "localization",
        "runs",
        "hooks",
        "families",
        "store",
        "score",
        "catalog",
        "phrasings",
        "plan",
    },
    "contribution": {
        "states",
        "batches",
        "calls",
        "localization",
        "effects",
        "hooks",
        "layers",
        "families",
        "catalog",
        "phrasings",
        "plan",
        "stats",
    },
    "corruption": {"states", "hooks", "calls", "families", "texts"},
    "states": {"hooks", "calls", "families"},
    "ranks": {"stats"},
    "sizing": {"effects", "plan", "runs", "stats"},
    "effects": {"plan", "stats", "raced"},
    "localization": {"plan", "catalog", "layers", "runs", "score", "raced", "racing"},
    "raced": {"plan", "racing", "runs", "stats"},
    "racing": {"plan", "stats"},
    "score": {"catalog"},
    "runs": {"plan", "batches", "hooks", "families", "store", "heartbeat", "offloads"},
    "heartbeat": {"atomic"},
    "atomic": set(),
    "pace": {"plan", "batches", "hooks", "families"},
    "batches": {"plan", "hooks", "families", "texts"},
    "store": set(),
    "hooks": {"plan", "layers", "families", "texts", "calls"},
    "calls": {"families"},
    "models": {"catalog", "families"},
    "phrasings": {"plan"},
    "layers": {"families"},
    "families": {"denoisers", "texts"},
    "denoisers": {"texts", "offloads"},
    "offloads": set(),
    "texts": set(),
    "solve": set(),
    "stats": set(),
    "catalog": {"plan"},
    "plan": set(),
    "mini": set(),
    "errors": set(),
}
PACKAGES = {"catalog", "mini"}
WITHOUT_TORCH = {"plan", "stats", "ranks", "racing", "effects", "plots", "tables", "cleaning", "pages", "report"}
WITHOUT_TORCH |= {"overview", "provenance", "results", "thumbnails"}
MODULE_LINES = 350
FUNCTION_LINES = 45  # the docstring and decorators not counted
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
    package = ["locogen", *module.split(".")] if is_package else ["locogen", *module.split(".")[:-1]]
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
    return module in PACKAGES or (PACKAGE / module.replace(".", "/") / "__init__.py").is_file()


def arrows(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """A module imports from locogen only what its row allows, and its own package."""
    home = module.split(".")[0]
    if home == "__init__":
        return
    if home not in ARROWS:
        yield f"{module} has no row in ARROWS (tests/test_imports.py)"
        return
    for line, name in imported(tree, module, is_package(module)):
        parts = name.split(".")
        if parts[0] != "locogen":
            continue
        target = parts[1] if len(parts) > 1 else "__init__"
        if target == "__version__":
            continue
        if target not in ARROWS[home] | {home, "errors"}:
            yield f"{module}:{line} imports locogen.{target}, which is not in its row"


def no_torch(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """Modules that work from tables alone never import torch."""
    if module in WITHOUT_TORCH:
        for line, name in imported(tree, module):
            if name.split(".")[0] in {"torch", "diffusers", "transformers"}:
                yield f"{module}:{line} imports {name}"


def plan_is_plain(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """`plan` is pure data: the standard library only."""
    if module == "plan":
        for line, name in imported(tree, module):
            if name.split(".")[0] not in sys.stdlib_module_names | {"locogen"}:
                yield f"{module}:{line} imports {name}, which is not in the standard library"


def short_modules(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """Past 350 lines, something in a module is a second idea."""
    if (lines := len(text.splitlines())) > MODULE_LINES:
        yield f"{module} has {lines} lines, more than {MODULE_LINES}"


def code_lines(function: Function) -> int:
    """Lines from `def` to the end, less those of the docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or 0) - docstring.lineno + 1
    return lines


def short_functions(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """No function is over 45 lines."""
    for node in ast.walk(tree):
        if isinstance(node, Function) and (lines := code_lines(node)) > FUNCTION_LINES:
            yield f"{module}:{node.lineno} {node.name} has {lines} lines, more than {FUNCTION_LINES}"


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
        if isinstance(node, ast.Attribute) and (ast.unparse(node) in PICKLING or node.attr in PICKLING):
            yield f"{module}:{node.lineno} uses {ast.unparse(node)}"
        allowed = isinstance(node, ast.keyword) and node.arg == "allow_pickle"
        if allowed and ast.unparse(node.value) != "False":
            yield f"{module}:{node.value.lineno} allows pickle"


def names_of_their_own(module: str, tree: ast.Module, text: str) -> Iterator[str]:
    """A function never shares its name with a module: `locogen.score` cannot be both."""
    modules = set(ARROWS) | {part for name in sources() for part in name.split(".")}
    for node in tree.body:
        if isinstance(node, Function) and node.name in modules:
            yield f"{module}:{node.lineno} {node.name}() has the name of a module"


LONG = "\n".join(f"    x{i} = {i}" for i in range(FUNCTION_LINES))
TWINS: list[tuple[Rule, str, str]] = [  # the rule, a module, a source for it that breaks the rule
    (arrows, "plan", "from .runs import generate"),
    (arrows, "plan", "def f():\n    from locogen.runs import generate"),
    (arrows, "score", "import locogen.runs"),
    (arrows, "layers", "from . import hooks"),
    (arrows, "mini.world", "from ..models import load"),
    (arrows, "catalog", "from ..models import load"),
    (arrows, "localization", "import locogen as loco"),
    (arrows, "nowhere", ""),
    (no_torch, "plots", "def f():\n    import torch"),
    (no_torch, "stats", "from torch import nn"),
    (plan_is_plain, "plan", "import numpy as np"),
    (short_modules, "plan", "\n" * (MODULE_LINES + 1)),
    (short_functions, "plan", f"def f():\n{LONG}"),
    (short_functions, "plan", f"class A:\n  async def f():\n{LONG}"),
    (no_star, "plan", "from math import *"),
    (no_bare_except, "plan", "try:\n    f()\nexcept:\n    pass"),
    (no_bare_except, "plan", "try:\n    f()\nexcept BaseException:\n    pass"),
    (no_pickle, "plan", "import pickle"),
    (no_pickle, "plan", "from joblib import dump"),
    (no_pickle, "mini.train", "import torch\ntorch.save({}, 'x')"),
    (no_pickle, "runs", "table.to_pickle('x')"),
    (no_pickle, "runs", "np.load('x', allow_pickle=True)"),
    (names_of_their_own, "catalog", "def models(): ..."),
    (names_of_their_own, "score", "def score(): ..."),
]
RULES: list[Rule] = list(dict.fromkeys(rule for rule, _, _ in TWINS))

HARMLESS = f'''
"""Uses what the rules come close to forbidding."""
import json
from .errors import LocogenError
def f():
    """{"line" + chr(10) * FUNCTION_LINES}"""
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


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_follows_the_rule(rule: Rule) -> None:
    complaints: list[str] = []
    for module, path in sources().items():
        text = path.read_text(encoding="utf-8")
        complaints += rule(module, ast.parse(text), text)
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("rule, module, text", TWINS)
def test_the_rule_can_fail(rule: Rule, module: str, text: str) -> None:
    assert list(rule(module, ast.parse(text), text))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_leaves_harmless_code_alone(rule: Rule) -> None:
    assert not list(rule("plan", ast.parse(HARMLESS), HARMLESS))


def test_arrows_point_one_way() -> None:
    """The table itself has no cycle: every row's arrows go to rows below it."""
    order = list(ARROWS)
    for home, targets in ARROWS.items():
        assert all(order.index(target) > order.index(home) for target in targets), home


def test_the_rules_see_the_package() -> None:
    assert "__init__" in sources()
