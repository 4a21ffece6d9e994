"""The documents: short where people land, and every file that they link is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(
        "README.md",
        "CHANGELOG.md",
        "reports/results.md",
        "reports/performance.md",
        "reports/studies.md",
    ),
    *("locogen/README.md", "locogen/models/README.md", "locogen/mini/README.md"),
]


def missing_links(text: str, folder: Path) -> list[str]:
    """Relative links of a Markdown text that lead nowhere."""
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    relative = [target for target in targets if "://" not in target]
    return [target for target in relative if not (folder / target).exists()]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    assert not missing_links(path.read_text(encoding="utf-8"), path.parent)


def test_a_link_to_nowhere_is_found() -> None:
    assert missing_links("[a](no-such-file.md) [b](README.md#part) [c](https://x.org)", ROOT) == [
        "no-such-file.md"
    ]


def test_the_readme_is_short() -> None:
    """People read the landing page to its end: details live in reports/ and next to the code."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert len(text.split()) <= 1500


@pytest.mark.parametrize("name", ["README.md", "reports/results.md", "reports/performance.md"])
def test_commands_that_make_figures_are_there(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    scripts = re.findall(r"python (tests/\S+?\.py)", text)
    assert scripts
    assert not [script for script in scripts if not (ROOT / script).is_file()]


# --- the rooms -----------------------------------------------------------------------------------


def unnamed_modules(text: str, package: Path) -> list[str]:
    """Modules that the table of rooms leaves out."""
    rows = dict(re.findall(r"^\| `(\w+)/` \| (.*) \|$", text, re.MULTILINE))
    unnamed = []
    for path in sorted(package.glob("*/[a-z]*.py")):
        if f"`{path.stem}`" not in rows.get(path.parent.name, ""):
            unnamed.append(f"{path.parent.name}/{path.name}")
    return unnamed


def missing_files(text: str, package: Path) -> list[str]:
    """Files and folders in backticks that are not there, seen from the package or from its parent."""
    names = re.findall(r"`((?:[a-z]+/)+(?:\w+\.\w+)?)`", text)
    return [
        name for name in names if not any((at / name).exists() for at in (package, package.parent))
    ]


def test_the_rooms_are_true() -> None:
    text = (ROOT / "locogen/README.md").read_text(encoding="utf-8")
    assert not unnamed_modules(text, ROOT / "locogen")
    assert not missing_files(text, ROOT / "locogen")


def test_a_wrong_room_is_found(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name in ("__init__.py", "text.py", "load.py"):
        (tmp_path / "models" / name).touch()
    text = "| `models/` | `text` and `family` |\n`models/text.py`, `models/family.py`\n"
    assert unnamed_modules(text, tmp_path) == ["models/load.py"]
    assert missing_files(text, tmp_path) == ["models/family.py"]


def test_what_the_studies_make_is_no_part_of_the_repository() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    made = {f"/reports/{study.stem}/" for study in (ROOT / "reports").glob("*.toml")}
    assert len(made) > 3 and made <= set(ignored)
    assert "/reports/sample/" not in ignored  # the twin: shown from the repository
