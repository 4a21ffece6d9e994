"""`make docs`: every public name with its example, in files that fetch nothing."""

import re
import shlex
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

import locogen

ROOT = Path(__file__).resolve().parent.parent


def command() -> list[str]:
    """What the Makefile calls, as the arguments of Python."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    [line] = re.findall(r"^docs:.*\n\t\$\(PY\) (.*)$", text, re.MULTILINE)
    return shlex.split(line)


def outside(html: str) -> list[str]:
    """What a page would fetch: scripts, styles, pictures."""
    sources = re.findall(r"<(?:script|img|link)\b[^>]*\b(?:src|href)=[\"']([^\"']+)", html)
    return [source for source in sources if re.match(r"(https?:)?//", source)]


def test_what_is_outside_is_found() -> None:
    assert outside('<script src="https://x.org/a.js"></script><a href="https://y.org">') == [
        "https://x.org/a.js"
    ]


@pytest.mark.slow
def test_the_reference_is_whole_and_offline(tmp_path: Path) -> None:
    asked = [str(tmp_path) if part == "build/docs" else part for part in command()]
    assert str(tmp_path) in asked
    done = subprocess.run(
        [sys.executable, *asked], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    front = (tmp_path / "locogen.html").read_text(encoding="utf-8")
    missing = [name for name in locogen.__all__ if f'id="{name}"' not in front]
    assert not missing, f"not on the front page: {missing}"
    text = unescape(re.sub(r"<[^>]+>", "", front))
    assert "store_folder().name" in text and "num_inference_steps" in text, "with their examples"
    assert text.count(">>> ") > 60
    for page in tmp_path.rglob("*.html"):
        assert not outside(page.read_text(encoding="utf-8")), page.name
    assert (tmp_path / "locogen" / "studies" / "planning.html").is_file(), "what a study may say"
