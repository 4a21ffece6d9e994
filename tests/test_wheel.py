"""A built wheel, installed elsewhere, works like the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SHIPPED = {"", ".py", ".typed", ".toml", ".json", ".safetensors", ".txt", ".md", ".ipynb"}
SHIPPED |= {".css", ".html", ".js"}  # of the pages


def files(folder: Path) -> set[str]:
    """What a folder of the checkout holds that the wheel must hold, relative to it."""
    found = (
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in SHIPPED
    )
    hidden = ("__pycache__", ".")
    return {
        path.as_posix() for path in found if not any(part.startswith(hidden) for part in path.parts)
    }


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, so that nothing is left in it."""
    source = tmp_path_factory.mktemp("source")
    for name in ("locogen", "notebooks"):
        shutil.copytree(
            root / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(root / name, source)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = out.glob("locogen-*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a new environment that has the wheel, and the running one's packages behind it."""
    home = tmp_path_factory.mktemp("elsewhere") / "venv"
    venv.create(home, with_pip=False)
    paths = sysconfig.get_paths(vars={"base": str(home), "platbase": str(home)}, scheme="venv")
    python = Path(paths["scripts"]) / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", wheel], check=True)
    # The running environment's packages come after the new one's own; its .pth files (the checkout) do not.
    borrowed = sysconfig.get_paths()["purelib"]
    (Path(paths["purelib"]) / "borrowed.pth").write_text(borrowed + "\n", encoding="utf-8")
    return Path(paths["scripts"])


def run(elsewhere: Path, folder: Path, *command: str) -> str:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTHON")
    }
    program, *arguments = command
    result = subprocess.run(
        [elsewhere / program, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_holds_everything(wheel: Path, root: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = {f"locogen/{name}" for name in files(root / "locogen")}
    expected |= {f"locogen/notebooks/{name}" for name in files(root / "notebooks")}
    assert {
        "locogen/py.typed",
        "locogen/catalog/models.toml",
        "locogen/notebooks/localize.ipynb",
    } <= expected
    assert not expected - held
    assert not {name for name in held if name.startswith(("tests/", "reports/", "notebooks/"))}


def test_it_is_the_installed_one(elsewhere: Path, tmp_path: Path) -> None:
    where = run(elsewhere, tmp_path, "python", "-c", "import locogen; print(locogen.__file__)")
    assert Path(where.strip()).is_relative_to(elsewhere.parent)


@pytest.mark.parametrize("command", [("python", "-m", "locogen"), ("locogen",)])
def test_it_lists_its_models(elsewhere: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
    assert "mini" in run(elsewhere, tmp_path, *command, "models")


def test_it_generates(elsewhere: Path, tmp_path: Path) -> None:
    """The weights come along, and make a picture."""
    code = """
import locogen
pipe = locogen.load("mini")
picture = pipe("a picture of a cat", num_inference_steps=2).images[0]
print(picture.size)
"""
    assert run(elsewhere, tmp_path, "python", "-c", code).strip().endswith("(64, 64)")
