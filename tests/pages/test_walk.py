"""A walk over the pages in Chromium: by mouse and by keys, wide and narrow, light and dark, with and without script.

The network is off. What a page asks for beside itself may only be a full picture in the run's own folder.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.made_up import edited, finish, study, swept

from locogen.pages.build import build

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SCREENS = ((1280, "light"), (390, "dark"))
ARMS = ("no edit", "layers 1-2", "layers 3-4")
SERIOUS = ("serious", "critical")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt install it"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that localize, with every picture, and one that edits."""
    folder = study(tmp_path_factory.mktemp("walk") / "reports", ("mini",), ("neon", "owl"))
    for number, concept in enumerate(("neon", "owl")):
        table = swept(concept)
        table.to_csv(folder / f"mini-{number}" / "pictures.csv", index=False)
    edit = finish(folder / "edit", "neon", carriers=[], notebook="edit", finding="it is gone")
    (edit / "effects.csv").unlink()
    edited(ARMS).to_csv(edit / "evaluation.csv", index=False)
    build(folder)
    return folder


@pytest.fixture(params=SCREENS, ids=str)
def walk(browser: Any, reports: Path, request: pytest.FixtureRequest) -> Iterator[Callable]:
    """Opens a page: `walk("mini-0/index.html#window=2")`. In the end nothing may have gone wrong."""
    width, scheme = request.param
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("request", lambda wanted: asked.append(wanted.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))

    def walking(address: str) -> Any:
        page.goto(f"{reports.as_uri()}/{address}")
        return page

    yield walking
    context.close()
    assert said == []
    # An enlarged picture may come from the run's folder: nothing from anywhere else.
    assert all(url.startswith((reports.as_uri(), "data:")) for url in asked), asked


def chosen(page: Any) -> list[str]:
    """First layers of the windows that are chosen."""
    return page.eval_on_selector_all(
        ".cells button[aria-checked=true]", "cells => cells.map(cell => cell.dataset.start)"
    )


def fits(page: Any) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def serious(page: Any) -> list[Any]:
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    return [
        (each["id"], each["nodes"][0]["html"][:200])
        for each in violations
        if each["impact"] in SERIOUS
    ]


def test_windows_are_chosen_by_mouse_and_keys(walk: Callable) -> None:
    page = walk("mini-0/index.html")
    assert chosen(page) == ["0"], "the carrier first"
    assert page.locator(".sample").count() == 2
    assert "0.34 [0.28, 0.40]" in page.inner_text(".shown-window")
    page.click(".cells button[data-start='3']")
    assert chosen(page) == ["3"] and page.url.endswith("#window=3")
    assert "layers 3–4" in page.inner_text(".shown-window")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert chosen(page) == ["1"] and page.url.endswith("#window=1")
    assert page.evaluate("document.activeElement.dataset.start") == "1"
    texts = page.locator(".sample").first.locator("figcaption").all_inner_texts()
    assert [" ".join(text.split()) for text in texts] == [
        "baseline CLIP-score 0.50",
        "without it here CLIP-score 0.16 (−0.34)",
        "only here CLIP-score 0.50 (0.00)",
        "without it anywhere CLIP-score 0.16 (−0.34)",
    ]
    page.keyboard.press("End")
    assert chosen(page) == ["5"]
    page.keyboard.press("ArrowRight")
    assert chosen(page) == ["0"], "round the end"
    assert fits(page) and serious(page) == []


def test_an_address_names_a_window(walk: Callable) -> None:
    page = walk("mini-0/index.html#window=4")
    assert chosen(page) == ["4"]
    assert page.evaluate("document.querySelector('.sweep').getBoundingClientRect().top") < 900
    page.evaluate("location.hash = 'window=2'")
    page.wait_for_function("document.querySelector('[aria-checked=true]').dataset.start === '2'")
    page.evaluate("location.hash = 'window=99'")
    page.evaluate("location.hash = 'window=<img src=x>'")
    page.wait_for_timeout(50)
    assert chosen(page) == ["2"], "no such window: nothing changes"


def test_pictures_are_enlarged(walk: Callable) -> None:
    page = walk("mini-0/index.html")
    first = page.locator("button.enlarge").first
    first.focus()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog")
    assert dialog.is_visible() and "a house in neon, seed 0" in dialog.inner_text()
    page.wait_for_function("document.querySelector('.stage img').src.endsWith('0-baseline.png')")
    assert page.evaluate("document.querySelector('.stage img').naturalWidth") == 64
    assert serious(page) == []
    page.keyboard.press("ArrowRight")
    assert "only" in dialog.inner_text()
    page.keyboard.press("Escape")
    assert dialog.is_hidden()
    page.locator("button.enlarge").nth(2).click()
    page.click("dialog [data-close]")
    assert dialog.is_hidden()
    assert page.evaluate("document.activeElement.className") == "enlarge", "back where one was"


def test_edits_slide_from_before_to_after(walk: Callable) -> None:
    page = walk("edit/index.html")
    options = page.locator("#page\\.arm option").all_inner_texts()
    assert options == ["layers 1-2", "layers 3-4"], "not the one that changes nothing"
    assert page.locator(".pairs figure").count() == 4
    assert "recognized before, not after" in page.inner_text(".pairs figure")
    assert "<script>alert(1)</script>" in page.inner_text(".pairs figure"), "as text"
    slider = page.locator(".slide input").first
    clip = "document.querySelector('.compare .before').style.clipPath"
    half = page.evaluate(clip)
    slider.focus()
    page.keyboard.press("Home")
    assert page.evaluate(clip) == "inset(0px 100% 0px 0px)" != half, "all of it after"
    page.keyboard.press("End")
    assert page.evaluate(clip) in ("inset(0px)", "inset(0px 0% 0px 0px)"), "all of it before"
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    assert 15 <= int(slider.input_value()) <= 35
    page.locator("button.enlarge").first.click()
    assert page.locator("dialog .slide input").is_visible()
    page.keyboard.press("Escape")
    page.select_option("#page\\.arm", "1")
    assert page.locator(".pairs figure").count() == 4
    assert fits(page) and serious(page) == []


def test_the_index_leads_to_windows_and_keeps_its_filters(walk: Callable) -> None:
    page = walk("index.html")
    assert page.inner_text("#count") == "3 shown"
    page.select_option("[name=kind]", "style")
    page.fill("[name=words]", "neon")
    assert page.inner_text("#count") == "2 of 3 shown", "the edit is filtered too"
    assert page.url.endswith("#words=neon&kind=style")
    strip = page.locator(".run:visible .cells-link").first
    strip.scroll_into_view_if_needed()
    box = strip.locator("img").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 3.5 / 6, box["y"] + box["height"] / 2)
    assert strip.locator(".readout").inner_text().startswith("layers 3–4: 0.03")
    page.mouse.click(box["x"] + box["width"] * 3.5 / 6, box["y"] + box["height"] / 2)
    page.wait_for_url("**/mini-0/index.html#window=3")
    assert chosen(page) == ["3"]
    page.go_back()
    page.wait_for_url("**#words=neon&kind=style")
    assert page.input_value("[name=words]") == "neon"
    assert page.inner_text("#count") == "2 of 3 shown"

    strip = page.locator(".run:visible .cells-link").first
    strip.focus()
    page.keyboard.press("End")
    assert strip.locator(".readout").inner_text().startswith("layers 5–6")
    page.keyboard.press("Enter")
    page.wait_for_url("**/mini-0/index.html#window=5")
    page.go_back()
    page.select_option("[name=state]", "other")
    assert page.inner_text("#count") == "0 of 3 shown" or page.locator("tr.other:visible").count()
    assert fits(page) and serious(page) == []


def test_pages_are_printed_whole(walk: Callable) -> None:
    for name in ("mini-0/index.html", "edit/index.html"):
        page = walk(name)
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 718, "height": 900})
        assert fits(page)
        assert page.locator("dialog, .slide, .contents").locator("visible=true").count() == 0
        for text in page.locator("details").all():
            assert text.evaluate("each => each.lastElementChild.getClientRects().length") > 0
        assert page.pdf(format="A4").startswith(b"%PDF")


@pytest.mark.parametrize("width", [1280, 390])
def test_without_a_script_a_page_says_what_it_always_said(
    browser: Any, reports: Path, width: int
) -> None:
    context = browser.new_context(
        viewport={"width": width, "height": 900}, java_script_enabled=False, offline=True
    )
    for name in ("mini-0/index.html", "edit/index.html"):
        page = context.new_page()
        page.goto(f"{reports.as_uri()}/{name}")
        for hidden in ("section .cells", "#page\\.edits", "dialog", "[data-scripted]"):
            assert page.locator(hidden).locator("visible=true").count() == 0
        assert page.locator(".finding").is_visible() and page.locator("h1").is_visible()
        assert page.locator("text=The last words.").is_visible()
    context.close()
