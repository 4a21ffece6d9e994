"""Pages in a real browser, where there is one: nothing sticks out on a wide or a narrow screen, nothing is fetched."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_up import finish

from locogen.report import build

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")
WIDTHS = (1200, 400)
# Each page in a frame as wide as a screen: the window of a headless browser has a least width of its own.
FRAME = '<iframe width="{}" height="800" style="border: 0" srcdoc="{}"></iframe>'
MEASURE = """<pre id="found"></pre><script>onload = () => {
  const told = ({contentDocument: {documentElement: page}, contentWindow: {performance}}) =>
    [page.scrollWidth, page.clientWidth, performance.getEntriesByType("resource").map(each => each.name)];
  found.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(told));
}</script>"""
WIDE = '<!DOCTYPE html><p style="width: 1500px">wide<img src="http://outside.example/x.png"></p>'

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]


def opened(pages: list[str], folder: Path) -> list[tuple[int, int, list[str]]]:
    """For each page and screen: the width of what it shows, that of the screen, and what the page has asked for."""
    frames = "".join(FRAME.format(width, html.escape(text)) for text in pages for width in WIDTHS)
    (folder / "all.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{frames}{MEASURE}", encoding="utf-8")
    nowhere = ("--proxy-server=127.0.0.1:9", f"--user-data-dir={folder / 'profile'}")
    command = [str(CHROMIUM), *QUIET, *nowhere, "--dump-dom", (folder / "all.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout)
    return json.loads(found)


def test_pages_fit_every_screen_and_ask_nothing_of_the_outside(tmp_path: Path) -> None:
    finish(tmp_path / "reports" / "neon", "neon")
    finish(tmp_path / "reports" / "word", "a" * 120, start=None)
    build(tmp_path / "reports")
    pages = [path.read_text(encoding="utf-8") for path in sorted((tmp_path / "reports").rglob("*.html"))]
    assert len(pages) == 5
    found = opened(pages, tmp_path)
    assert [screen for _, screen, _ in found] == [*WIDTHS] * 5
    assert all(shown <= screen and asked == [] for shown, screen, asked in found), found


def test_a_page_that_does_neither_is_noticed(tmp_path: Path) -> None:
    """The twin of the test above."""
    found = opened([WIDE], tmp_path)
    assert all(shown > screen and asked == ["http://outside.example/x.png"] for shown, screen, asked in found)
