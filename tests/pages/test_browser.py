"""Pages in a real browser, where there is one: fit, offline, harmless, usable by keyboard and by all eyes, printed.

Chromium is Debian's, driven by Playwright; the network is off, and every request of a page is noted.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.made_up import ATTACKS, EVIL, fail, finish, study

from locogen.pages.build import build
from locogen.pages.cleaning import arrange, clean

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDTHS = (1280, 390)
EYES = ((1280, "light"), (390, "dark"))
IMAGE = "<img src=x onerror=alert(1)>"
WIDE = '<!DOCTYPE html><p style="width: 1500px">wide<img src="http://outside.example/x.png"></p>'
PAGES = ("index.html", "study.html", "model-mini.html", "concept-neon.html", "mini-0/index.html", "mini-0/code.html",
         "lost/index.html", "lost/code.html")  # fmt: skip
SERIOUS = ("serious", "critical")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium here: apt install it"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Any]:
    """Opens a page without a network: `opened(path, width=…)`; its `asked` are the addresses it wanted."""
    contexts = []

    def opening(path: Path, *, width: int = 1280, **settings: Any) -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, offline=True, **settings
        )
        contexts.append(context)
        page = context.new_page()
        page.asked, page.said = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("dialog", lambda dialog: (page.said.append(dialog.message), dialog.dismiss()))
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield opening
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, four concepts, one with a name that would run and one with no end, and a run that failed."""
    folder = study(
        tmp_path_factory.mktemp("pages") / "reports",
        ("mini", "mini-b"),
        ("neon", "owl", IMAGE, "a" * 120),
    )
    fail(
        folder / "lost", f"lost {EVIL}", f"there is no {IMAGE}", parameters={"concept": "mini/neon"}
    )
    finish(folder / "edit", "neon", carriers=[], notebook="edit", finding="it is gone")
    (folder / "edit" / "effects.csv").unlink()
    build(folder)
    return folder


def foreign(page: Any) -> list[str]:
    """What a page has asked for beside itself and what is inside it."""
    return [
        url
        for url in page.asked
        if not url.startswith("data:") and url.partition("#")[0] != page.url.partition("#")[0]
    ]


@pytest.mark.parametrize(
    "name", [PAGES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PAGES[1:])]
)
def test_pages_fit_every_screen_and_ask_nothing(reports: Path, opened: Any, name: str) -> None:
    for width in WIDTHS:
        page = opened(reports / name, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} at {width}"
        assert foreign(page) == [] and page.said == []


@pytest.mark.slow
def test_a_page_that_does_neither_is_noticed(tmp_path: Path, opened: Any) -> None:
    """The twin of the test above."""
    (tmp_path / "wide.html").write_text(WIDE, encoding="utf-8")
    for width in WIDTHS:
        page = opened(tmp_path / "wide.html", width=width)
        assert page.evaluate("document.documentElement.scrollWidth") > width
        assert foreign(page) == ["http://outside.example/x.png"]


@pytest.mark.parametrize(
    "name", [PAGES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in PAGES[1:])]
)
def test_axe_finds_nothing_serious(reports: Path, opened: Any, name: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    for width, scheme in EYES:
        page = opened(reports / name, width=width, color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        found = Axe().run(page).response["violations"]
        bad = [
            (each["id"], each["nodes"][0]["html"][:200])
            for each in found
            if each["impact"] in SERIOUS
        ]
        assert not bad, (name, scheme, width, bad)


@pytest.mark.slow
def test_axe_can_find_something(tmp_path: Path, opened: Any) -> None:
    """The twin of the test above."""
    from axe_playwright_python.sync_playwright import Axe

    (tmp_path / "bad.html").write_text(
        '<p style="color: #ccc">pale<img src="data:,"></p>', encoding="utf-8"
    )
    found = Axe().run(opened(tmp_path / "bad.html")).response["violations"]
    assert {"image-alt", "color-contrast"} <= {
        each["id"] for each in found if each["impact"] in SERIOUS
    }


def test_what_people_typed_is_shown_and_not_run(reports: Path, opened: Any) -> None:
    name = next(path.name for path in reports.glob("concept-img*.html"))
    for path in ("index.html", name, "mini-2/index.html", "lost/index.html", "study.html"):
        page = opened(reports / path)
        assert page.said == [] and page.locator("img[src=x], img[onerror]").count() == 0, path
        assert IMAGE in page.inner_text("body") or path == "study.html", path


@pytest.mark.parametrize("cleaning", [clean, lambda text: arrange(text)[0]])
def test_cleaned_attacks_do_nothing_even_without_a_policy(
    tmp_path: Path, opened: Any, cleaning: Callable[[str], str]
) -> None:
    (tmp_path / "clean.html").write_text("".join(map(cleaning, ATTACKS)), encoding="utf-8")
    page = opened(tmp_path / "clean.html")
    page.wait_for_timeout(200)
    assert foreign(page) == [] and page.said == []


@pytest.mark.slow
def test_attacks_do_something(tmp_path: Path, opened: Any) -> None:
    """The twin of the test above, each by itself: some wait for a click or for another browser."""
    harmful = 0
    for number, attack in enumerate(ATTACKS):
        (tmp_path / f"{number}.html").write_text(f"<!DOCTYPE html>{attack}", encoding="utf-8")
        page = opened(tmp_path / f"{number}.html")
        page.wait_for_timeout(50)
        harmful += bool(foreign(page) or page.said)
        page.close()
    assert harmful >= len(ATTACKS) / 2


@pytest.mark.slow
def test_the_policy_stops_what_would_get_through(
    reports: Path, tmp_path: Path, opened: Any
) -> None:
    """Escaping is the first wall; this is the second: the same page, with what should never have come in."""
    text = (reports / "index.html").read_text(encoding="utf-8")
    unescaped = text.replace("</h1>", f"</h1>{IMAGE}<script>document.title = 'taken'</script>", 1)
    (tmp_path / "index.html").write_text(unescaped, encoding="utf-8")
    page = opened(tmp_path / "index.html")
    assert page.title() == "A study" and not any(word == "1" for word in page.said)
    assert page.locator("#count").inner_text(), "our own script still runs"
    start, end = (
        unescaped.index('<meta http-equiv="Content'),
        unescaped.index('<meta name="viewport"'),
    )
    (tmp_path / "open.html").write_text(unescaped[:start] + unescaped[end:], encoding="utf-8")
    assert opened(tmp_path / "open.html").title() == "taken", "without the policy it would"


def shown(page: Any) -> list[str]:
    """Concepts of the rows that are to be seen, in their order."""
    return page.eval_on_selector_all(
        "#matrix tbody tr:not([hidden])", "rows => rows.map(row => row.dataset.concept)"
    )


@pytest.mark.slow
def test_the_index_filters_and_sorts_by_keyboard(reports: Path, opened: Any) -> None:
    page = opened(reports / "index.html")
    everything = shown(page)
    assert len(everything) == 4
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    while page.evaluate("document.activeElement.name") != "words":
        page.keyboard.press("Tab")
    from playwright.sync_api import expect

    page.keyboard.type("OWL mini-b")
    assert shown(page) == ["owl"] and "1 of 10 shown" in page.inner_text("#count")
    page.click("text=Show all")
    expect(page.locator("#count")).to_have_text("10 shown")
    assert shown(page) == everything
    page.select_option("[name=state]", "failed")
    assert shown(page) == ["neon"], "the failed run stands under the concept it was asked for"
    page.select_option("[name=state]", "")
    page.select_option("[name=sort]", "name")
    assert shown(page) == sorted(everything) != everything
    page.select_option("[name=sort]", "effect")
    rows = page.locator("#matrix tbody tr").all()
    effects = [
        [float(run.get_attribute("data-estimate") or -1) for run in row.locator(".run").all()]
        for row in rows
    ]
    largest = [max(values) for values in effects]
    assert largest == sorted(largest, reverse=True) and len(set(largest)) > 1
    page.select_option("[name=model]", "mini-b")
    assert page.locator("#matrix th[data-model=mini]").is_hidden()
    assert page.locator("#matrix th[data-model=mini-b]").is_visible()


@pytest.mark.slow
def test_the_index_says_everything_without_a_script(reports: Path, opened: Any) -> None:
    page = opened(reports / "index.html", java_script_enabled=False)
    assert page.locator("#controls").is_hidden()
    assert page.locator("#matrix .run").count() == 9
    for number in range(9):
        assert page.locator("#matrix .run").nth(number).is_visible()


@pytest.mark.slow
def test_the_folder_works_from_anywhere(reports: Path, tmp_path: Path, opened: Any) -> None:
    """As copied to a USB stick: every link leads to a file of the folder, page by page."""
    stick = shutil.copytree(reports, tmp_path / "a stick" / "my results")
    page = opened(stick / "index.html")
    page.click("#matrix tbody tr:first-child th a")
    assert page.url == (stick / "concept-neon.html").as_uri()
    page.click("text=All runs")
    page.click("text=cell 5")
    assert page.url == (stick / "lost" / "code.html").as_uri() + "#cell-id-5"
    assert "step(5)" in page.locator("#cell-id-5").inner_text()
    page.goto((stick / "index.html").as_uri())
    page.locator(".pictures a").first.click()
    assert (
        page.url.endswith("pictures/0-baseline.png")
        and page.evaluate("document.images[0].naturalWidth") == 64
    )


@pytest.mark.slow
def test_pages_print_well(reports: Path, opened: Any) -> None:
    """Nothing wider than a sheet, black on white, no controls: and a PDF comes out."""
    for name in ("index.html", "model-mini.html", "mini-0/index.html", "study.html"):
        page = opened(
            reports / name, width=718, color_scheme="dark"
        )  # A4 less its margins, at 96 pixels an inch
        page.emulate_media(media="print")
        assert page.evaluate("document.documentElement.scrollWidth") <= 718, name
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )
        assert page.locator("nav").locator("visible=true").count() == 0
        assert (
            page.evaluate("getComputedStyle(document.querySelector('table')).display") == "table"
        ), "no cards on paper"
        assert page.locator("#controls").count() == 0 or page.locator("#controls").is_hidden()
        assert (
            page.evaluate("getComputedStyle(document.querySelector('main')).color")
            == "rgb(0, 0, 0)"
        )
        assert page.pdf(format="A4").startswith(b"%PDF")
