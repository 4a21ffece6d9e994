"""The notebook to start with, in JupyterLab in a real browser, where there is one: run, clicked, changed, looked at."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbconvert.exporters import HTMLExporter

ROOT = Path(__file__).resolve().parent.parent.parent
START = "00_start_here.ipynb"
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUICK = {"max_prompts": 1, "seeds": 1, "num_inference_steps": 2}
SETTINGS = {
    "notebook-extension/tracker": {
        "windowingMode": "none"
    },  # every cell is in the page, wherever it is scrolled to
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
TIMEOUT = 240_000  # milliseconds; how long it takes is measured elsewhere

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def quick(path: Path) -> None:
    """A copy of the notebook with few steps and seeds."""
    book = nbformat.read(ROOT / "notebooks" / START, as_version=4)
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", []):
            for name, value in QUICK.items():
                cell.source = re.sub(
                    rf"^({name}: int) = \d+", rf"\1 = {value}", cell.source, flags=re.MULTILINE
                )
    nbformat.write(book, path)


@pytest.fixture(name="lab")
def start_lab(tmp_path: Path) -> Iterator[str]:
    """The address of a notebook in a JupyterLab of its own, which keeps its files in the test's folder."""
    quick(tmp_path / START)
    for name, value in SETTINGS.items():
        place = tmp_path / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(value))
    port, token = free_port(), "token-of-the-test"
    options = [
        f"--ServerApp.port={port}",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={tmp_path}",
    ]
    options += [
        "--no-browser",
        "--allow-root",
        f"--LabApp.user_settings_dir={tmp_path / 'settings'}",
    ]
    options += [f"--LabApp.workspaces_dir={tmp_path / 'workspaces'}"]
    places = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | places | {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}
    environment |= {"DIFFUSERS_VERBOSITY": "error", "IPYTHONDIR": str(tmp_path / "ipython")}
    with (tmp_path / "lab.log").open("w") as log:
        lab = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], stdout=log, stderr=log, env=environment
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", lab)
            yield f"http://127.0.0.1:{port}/lab/tree/{START}?token={token}"
        finally:
            lab.terminate()
            lab.wait(30)


def wait_for(address: str, server: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("JupyterLab did not start")


@pytest.fixture(name="page")
def open_page() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
    )
    with sync_api.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(TIMEOUT)
        yield page
        browser.close()


def pictures(page: Any) -> dict[str, str]:
    """Alt text → picture of those that the living widget shows."""
    found = page.locator(".widget-vbox figure img")
    return dict(found.evaluate_all("all => all.map(each => [each.alt, each.src])"))


def wait_for_picture(page: Any, words: str) -> None:
    page.locator(f'.widget-vbox figure img[alt*="{words}"]').wait_for()


def run_all(page: Any, lab: str) -> None:
    page.goto(lab)
    page.get_by_role("heading", name="Start here").wait_for()
    page.get_by_text("Python 3 | Idle").or_(
        page.get_by_text("Python 3 (ipykernel) | Idle")
    ).first.wait_for()
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.get_by_text("pictures after undoing are the same, byte for byte").wait_for()


def test_the_first_notebook_by_hand(lab: str, page: Any, tmp_path: Path) -> None:
    run_all(page, lab)
    explorer = page.locator(".widget-vbox").first
    explorer.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "lab-1280.png")
    cells = explorer.get_by_role("gridcell")
    cells.first.wait_for()
    assert cells.count() == 15
    assert page.locator("[class$=-twin]").is_hidden(), "beside the living widget its twin is hidden"

    cells.nth(3).click()
    wait_for_picture(page, "layers 3-4 hearing")
    before = pictures(page)
    check_heatmap(page, explorer)
    assert pictures(page)["baseline"] == before["baseline"]
    check_names(page, explorer)

    seed = explorer.get_by_label("seed")
    seed.fill("7")
    seed.press("Enter")
    page.wait_for_function(
        "old => document.querySelector('.widget-vbox figure img').src != old",
        arg=before["baseline"],
    )
    for name, words in (("edit", "edit of layers 12-13, strength 0.25"), ("neurons", "with 1 of")):
        explorer.locator(f".widget-hslider:has-text('{name}') .noUi-handle").first.focus()
        page.keyboard.press("ArrowRight")
        wait_for_picture(page, words)
    found = pictures(page)
    assert len(found) == len(set(found.values())) == 5
    page.screenshot(path=tmp_path / "lab-changed.png")
    page.keyboard.press("Control+b")  # away with the sidebar
    page.set_viewport_size({"width": 390, "height": 1000})
    explorer.scroll_into_view_if_needed()
    assert explorer.evaluate("box => box.scrollWidth <= box.clientWidth + 1")
    page.screenshot(path=tmp_path / "lab-390.png")
    check_after_loading_again(page, lab, tmp_path)
    check_twin(page, tmp_path, pictures(page))


def check_heatmap(page: Any, explorer: Any) -> None:
    """Pointed at, a cell says its effect; by keyboard alone another window is reached and chosen."""
    cells = explorer.get_by_role("gridcell")
    line = explorer.locator(".loco-line")
    cells.nth(5).hover()
    assert re.match(r"neon, layers 5-6: effect .*, n = 1\.", line.inner_text())
    page.mouse.move(0, 0)
    cells.nth(3).focus()
    assert explorer.locator("[role=gridcell][tabindex='0']").count() == 1
    for key in ("End", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    assert line.inner_text().startswith("neon, layers 12-13: effect")
    assert cells.nth(12).get_attribute("aria-label") == line.inner_text()
    assert cells.nth(3).get_attribute("aria-selected") == "true", "walking alone chooses nothing"
    page.keyboard.press("Enter")
    wait_for_picture(page, "layers 12-13 hearing")
    assert explorer.locator("[role=gridcell][aria-selected=true]").all_inner_texts() == [
        cells.nth(12).inner_text()
    ]


def check_names(page: Any, explorer: Any) -> None:
    """Every slider's handle and number has a name, which ipywidgets does not give it; axe agrees."""
    handles = explorer.get_by_role("slider")
    names = handles.evaluate_all("all => all.map(each => each.getAttribute('aria-label'))")
    assert names == ["first layer", "last layer", "edit strength", "neurons"]
    assert explorer.get_by_role("textbox", name="edit strength, as a number").count() == 1
    assert explorer.locator(".loco-status[aria-live=polite]").count() == 1
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page, context=".loco-explore").response["violations"]
    serious = [each for each in violations if each["impact"] in ("serious", "critical")]
    assert not [(each["id"], each["nodes"][0]["html"][:200]) for each in serious]


def check_after_loading_again(page: Any, lab: str, folder: Path) -> None:
    """The widget lives on with what was chosen, and what is changed now is saved as well."""
    page.set_viewport_size({"width": 1280, "height": 1000})
    shown = pictures(page)
    page.keyboard.press("Control+s")
    page.wait_for_timeout(2000)
    page.goto("about:blank")
    page.goto(lab)
    wait_for_picture(page, "with 1 of")
    assert pictures(page) == shown
    explorer = page.locator(".widget-vbox").first
    chosen = explorer.locator("[role=gridcell][aria-selected=true]")
    assert chosen.get_attribute("aria-label").startswith("neon, layers 12-13")
    assert page.locator("[class$=-twin]").is_hidden()
    explorer.get_by_role("gridcell").nth(7).click()
    wait_for_picture(page, "edit of layers 7-8")
    wait_for_picture(page, "with 1 of")


def check_twin(page: Any, folder: Path, found: dict[str, str]) -> None:
    """What the saved notebook, exported, shows where no kernel and no network is: the last view."""
    last = list(found)[-1]
    for _ in range(100):  # the twin follows the widget a moment later
        page.keyboard.press("Control+s")
        page.wait_for_timeout(500)
        if last in (folder / START).read_text(encoding="utf-8"):
            break
    body, _ = HTMLExporter().from_filename(str(folder / START))
    (folder / "exported.html").write_text(body, encoding="utf-8")
    page.set_viewport_size({"width": 1280, "height": 1000})
    page.context.set_offline(True)
    page.goto((folder / "exported.html").as_uri())
    twin = page.locator("[class$=-twin]")
    twin.scroll_into_view_if_needed()
    shown = twin.locator("figure img").evaluate_all("all => all.map(each => [each.alt, each.src])")
    assert dict(shown) == found and twin.locator("img[alt^='Heatmap of the effect']").is_visible()
    page.screenshot(path=folder / "exported.png")


SWEEP = (
    "import os\nos.environ['LOCOGEN_CACHE'] = 'cache'\nimport locogen as loco\npipe = loco.load('mini')",
    "run = loco.localize(pipe, loco.concept('mini/neon').first(1), window=8, seeds=range(2), num_inference_steps=4, batch_size=2)\n"
    "print(len(run), 'rows in all')",
)


def test_a_stopped_sweep_goes_on(lab: str, page: Any, tmp_path: Path) -> None:
    """Run, stop, run again: one line and no traceback, and what was there is not made again."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in SWEEP])
    # Without it JupyterLab asks which kernel to start.
    book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)"}
    nbformat.write(book, tmp_path / "sweep.ipynb")
    store = tmp_path / "cache" / "pictures"
    page.goto(lab.replace(START, "sweep.ipynb"))
    idle = page.get_by_text("Python 3 | Idle")
    idle.or_(page.get_by_text("Python 3 (ipykernel) | Idle")).first.wait_for()

    def run_cells() -> None:
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    run_cells()
    page.get_by_text(re.compile(r"picture\s\d+\sof\s\d+")).first.wait_for()
    while len(list(store.glob("*.png"))) < 4:
        page.wait_for_timeout(50)
    page.screenshot(path=tmp_path / "bar.png")
    page.locator("[data-command='notebook:interrupt-kernel']").first.click()
    line = page.get_by_text(re.compile(r"^stopped at \d+ of \d+; they are kept in "))
    line.wait_for()
    page.screenshot(path=tmp_path / "stopped.png")
    assert page.get_by_text("Traceback").count() == 0
    left = page.locator(".jp-OutputArea").get_by_text(re.compile("weights|picture \\d|\\d/\\d"))
    assert not [text for text in left.all_inner_texts() if text.strip()], (
        "no bar is left, nor a second one"
    )
    numbers = re.findall(r"\d+", line.inner_text())
    there = {file.name: file.stat().st_mtime_ns for file in store.glob("*.png")}
    assert len(there) == int(numbers[0]) < int(numbers[1])

    run_cells()
    page.get_by_text(re.compile(r"^\d+ rows in all")).wait_for()
    page.screenshot(path=tmp_path / "whole.png")
    assert len(list(store.glob("*.png"))) == int(numbers[1])
    assert {name: (store / name).stat().st_mtime_ns for name in there} == there
