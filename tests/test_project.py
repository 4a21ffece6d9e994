"""The project's own files: one list of dependencies, a lazy package, commands that explain themselves."""

import ast
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import locogen

ROOT = Path(__file__).resolve().parent.parent
CONDA_NAMES = {"pytorch": "torch"}  # what conda-forge calls by another name
IMPORT_NAMES = {
    "scikit-image": "skimage",
    "pillow": "PIL",
    "resvg-py": "resvg_py",
    "pyyaml": "yaml",
}
HEAVY = ("torch", "diffusers", "transformers", "pandas", "seaborn", "matplotlib", "numpy")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(lines: list[str]) -> dict[str, str]:
    """Canonical name → version bounds."""
    parsed = [Requirement(line) for line in lines]
    return {
        canonicalize_name(requirement.name): str(requirement.specifier) for requirement in parsed
    }


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))["project"]


NEWEST, OLDEST = "constraints.txt", "constraints-oldest.txt"


def pinned(name: str) -> dict[str, str]:
    return requirements(
        [line for line in read(name).splitlines() if line and not line.startswith("#")]
    )


# Dependencies


def test_conda_environment_names_the_same(project: dict[str, Any]) -> None:
    listed = yaml.safe_load(read("environment.yml"))["dependencies"]
    conda = requirements([line for line in listed if isinstance(line, str)])
    assert conda.pop("python") == project["requires-python"]
    assert "pip" in conda and conda.pop("pip") == ""
    conda = {CONDA_NAMES.get(name, name): bounds for name, bounds in conda.items()}
    assert conda == requirements(project["dependencies"])
    assert [line["pip"] for line in listed if isinstance(line, dict)] == [["-e ."]]


@pytest.mark.parametrize("name", [NEWEST, OLDEST])
def test_constraints_pin_what_is_needed(project: dict[str, Any], name: str) -> None:
    pins, extras = pinned(name), project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["train"], *extras["dask"]]
    needed += [
        line for line in project["optional-dependencies"]["dev"] if not line.startswith("locogen")
    ]
    for requirement in map(Requirement, needed):
        pin = pins.get(canonicalize_name(requirement.name), "")
        assert pin.startswith("=="), f"{requirement.name} is not pinned in {name}"
        assert requirement.specifier.contains(pin[2:]), f"{requirement} excludes the pin {pin}"
        if name == OLDEST:
            (bound,) = [part for part in requirement.specifier if part.operator == ">="]
            assert Version(bound.version) == Version(pin[2:]), (
                f"{requirement} admits older than {name} has: {pin}"
            )


@pytest.mark.parametrize("name", [NEWEST, OLDEST])
def test_constraints_hold_elsewhere(name: str) -> None:
    """No local build, no path, no address: the file means the same on another machine."""
    pins = pinned(name)
    assert pins["torch"] == {NEWEST: "==2.13.0", OLDEST: "==2.6.0"}[name]
    assert "torchvision" not in pins
    assert not re.search(r"[@/\\]|\+", "\n".join(f"{name}{pin}" for name, pin in pins.items()))
    assert not re.search(r"^-|://|file:", read(name), flags=re.MULTILINE)


@pytest.mark.parametrize("name", [NEWEST, OLDEST])
def test_constraints_admit_the_first_python_of_the_project(
    project: dict[str, Any], name: str
) -> None:
    """A pin may ask for a patch release (3.11.5) that Debian's Python does not have; seen where it is installed."""
    oldest_python = project["requires-python"].removeprefix(">=") + ".0"
    pins = pinned(name)
    for found in distributions():
        pin = pins.get(canonicalize_name(found.name), "")
        if f"=={found.version}" == pin and "Requires-Python" in found.metadata:
            needs = SpecifierSet(found.metadata["Requires-Python"])
            assert needs.contains(oldest_python), (
                f"{found.name}{pin} needs Python {needs}, not {oldest_python}"
            )


def test_the_oldest_versions_are_those_of_gpu_machines(project: dict[str, Any]) -> None:
    """What stands on rented machines and Colab is taken as it is: torch since 2.6 (as diffusers 0.42), pandas 2.2."""
    bounds = {
        name: SpecifierSet(bound) for name, bound in requirements(project["dependencies"]).items()
    }
    there = {
        "torch": "2.6.0",
        "pandas": "2.2.2",
        "numpy": "2.0.2",
        "matplotlib": "3.10.0",
        "pillow": "11.3.0",
    }
    there |= {
        "psutil": "5.9.5",
        "rich": "13.9.4",
        "scikit-image": "0.25.2",
        "nbconvert": "7.16.6",
        "accelerate": "1.6.0",
    }
    assert all(bounds[name].contains(version) for name, version in there.items())
    assert not bounds["torch"].contains("2.5.1"), "the twin"


def third_party(path: Path) -> set[str]:
    """Top-level names that a file imports and that are neither locogen's nor Python's."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names - {"locogen"}


def test_every_import_is_declared(project: dict[str, Any]) -> None:
    """What the package imports is in the list of dependencies; `mini` and `engines` may use an extra as well."""
    core = requirements(project["dependencies"])
    train = {**core, **requirements(project["optional-dependencies"]["train"])}
    dask = {**core, **requirements(project["optional-dependencies"]["dask"])}
    for path in sorted((ROOT / "locogen").rglob("*.py")):
        listed = (
            train if path.parent.name == "mini" else dask if path.name == "engines.py" else core
        )
        # distributed is Dask's own part, named by dask[distributed].
        declared = {"distributed"} if "dask" in listed else set()
        declared |= {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in listed}
        # IPython is what ipywidgets and jupyterlab are made for; the kernel and notebook parts are nbconvert's own.
        undeclared = (
            third_party(path)
            - declared
            - {
                "IPython",
                "nbformat",
                "nbclient",
                "jupyter_client",
                "jupyter_core",
                "traitlets",
                "huggingface_hub",
            }
        )
        assert not undeclared, (
            f"{path.relative_to(ROOT)} imports {undeclared}, absent from pyproject.toml"
        )


# The lazy package


def run_python(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_import_is_light() -> None:
    """`import locogen` loads nothing heavy and takes under 0.3 s (best of three: the cores may be busy)."""
    code = (
        "import json, sys, time; start = time.perf_counter(); import locogen; "
        f"print(json.dumps([time.perf_counter() - start, [m for m in {HEAVY!r} if m in sys.modules]]))"
    )
    runs = [json.loads(run_python(code)) for _ in range(3)]
    assert all(loaded == [] for _, loaded in runs)
    assert min(seconds for seconds, _ in runs) < 0.3


def test_a_heavy_import_would_be_noticed() -> None:
    """The twin of the test above."""
    assert run_python("import sys, locogen, numpy; print('numpy' in sys.modules)").strip() == "True"


def test_plain_data_needs_no_torch() -> None:
    code = f"import sys, locogen; locogen.PromptPair; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def stub_imports() -> dict[str, str]:
    """Name → module, as type checkers see the package."""
    tree = ast.parse(read("locogen/__init__.pyi"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def test_lazy_names_agree() -> None:
    """What type checkers see, what is fetched and what is announced are the same names."""
    assert stub_imports() == locogen._HOME
    assert sorted(locogen.__all__) == sorted(locogen._HOME)
    assert set(locogen.__all__) <= set(dir(locogen))


@pytest.mark.parametrize("name", sorted(locogen._HOME))
def test_public_names_resolve(name: str) -> None:
    module = import_module(f"locogen.{locogen._HOME[name]}")
    assert getattr(locogen, name) is getattr(module, name)
    assert getattr(module, name).__doc__, f"{name} has no docstring"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'localise'"):
        locogen.localise  # noqa: B018
    assert not hasattr(locogen, "__wrapped__")


# The files around it


def test_version_is_in_the_changelog() -> None:
    headings = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] in ("Unreleased", locogen.__version__)


def test_citation_is_the_paper() -> None:
    paper = yaml.safe_load(read("CITATION.cff"))["preferred-citation"]
    assert len(paper["authors"]) == 8
    assert paper["identifiers"][0]["value"] == "arXiv:2405.01008"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_make_knows_its_targets() -> None:
    for target in ("demo", "test", "test-all", "reports"):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")
def test_an_old_python_is_refused_kindly(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text('#!/bin/sh\ncase "$1" in --version) echo Python 3.9.2;; *) exit 1;; esac\n')
    old.chmod(0o755)
    refused = {str(old): "is Python 3.9.2", "no-such-python": "there is no 'no-such-python'"}
    for interpreter, words in refused.items():
        command = ["make", "--no-print-directory", "python", f"PYTHON={interpreter}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode != 0
        assert "needs Python 3.11 or later" in result.stdout and words in result.stdout
    good = ["make", "--no-print-directory", "python", f"PYTHON={sys.executable}"]
    subprocess.run(good, cwd=ROOT, check=True, capture_output=True)
