"""Pages are made of what runs left, say all of it, run nothing and fetch nothing."""

import base64
import io
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from markupsafe import Markup
from PIL import Image
from support.made_up import ALT, ATTACKS, EVIL, finish, png

from locogen.errors import LocogenError
from locogen.markup import macros
from locogen.pages.build import build
from locogen.pages.cleaning import NO_ALT, arrange, clean
from locogen.pages.html import POLICY, POLICY_WITH_FILES, read_template
from locogen.pages.png import shrink
from locogen.pages.provenance import Fact


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return some_runs(tmp_path / "reports")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its pages, for tests that only read them."""
    folder = some_runs(tmp_path_factory.mktemp("study") / "reports")
    build(folder)
    return folder


def some_runs(folder: Path) -> Path:
    finish(folder / "van-gogh", "van gogh")
    finish(folder / "evil", EVIL)
    finish(folder / "neon", "neon", start=None)
    failed = folder / "broken"
    failed.mkdir()
    error = dict(
        title="<b>broken</b>",
        model="mini",
        concepts=["<i>unicorn</i>"],
        error="no <u>concept</u>",
        cell=4,
    )
    (failed / "error.json").write_text(json.dumps(error))
    (folder / "store").mkdir()  # not a run
    return folder


def pages(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*.html")):
        yield path, path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """All tags with their attributes, the text that is shown, and the scripts that may run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts.append(data)
        elif self.cdata_elem != "style":
            self.text += data


def addresses(text: str) -> list[str]:
    """Everything a browser would fetch or follow."""
    read = Reader(text)
    named = [
        value or ""
        for _, attrs in read.tags
        for name, value in attrs.items()
        if name in ("href", "src")
    ]
    return named + re.findall(r"url\(([^)]*)\)", text) + re.findall(r"@import\s+(\S+)", text)


def warned(folder: Path) -> list[str]:
    """What building a folder warns its user of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        build(folder)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def is_json(text: str) -> bool:
    """Data runs nothing: it cannot even end its element."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return "<" not in text


def complaints(path: Path, text: str) -> list[str]:
    """What a page must not have: the rules in one place, tried on pages that break them below."""
    found = []
    read = Reader(text)
    for tag, attrs in read.tags:
        if tag in ("iframe", "object", "embed") or any(name.startswith("on") for name in attrs):
            found.append(f"{tag} {attrs} may run")
        is_data = attrs == {"type": "application/json", "id": "page.data"}
        if (tag == "script" and attrs and not is_data) or (tag == "form" and "action" in attrs):
            found.append(f"{tag} {attrs} leads elsewhere")
        if tag == "img" and not (attrs.get("alt") or "").strip():
            found.append("a picture without alt text")
    for address in addresses(text):
        if address.startswith(("data:", "#")):
            continue
        if (
            re.match(r"[a-z]+:|//|/", address)
            or not (path.parent / unquote(address.split("#")[0])).exists()
        ):
            found.append(f"{address} is not a file beside the page")
    found += [
        f"a script that is not ours: {script}"
        for script in read.scripts
        if script not in map(read_template, ("index.js", "run.js")) and not is_json(script)
    ]
    policies = [
        f'http-equiv="Content-Security-Policy" content="{policy}; style-src \'sha256-'
        for policy in (POLICY, POLICY_WITH_FILES)
    ]
    if not any(policy in text for policy in policies):
        found.append("no content security policy")
    return found


def test_the_pages_follow_the_rules(built: Path) -> None:
    made = dict(pages(built))
    assert {path.relative_to(built).as_posix() for path in made} == {
        "index.html", "study.html", "broken/index.html", "model-mini.html",
        *(f"concept-{name}.html" for name in ("van-gogh", "neon", "script-alert-1-script", "i-unicorn-i")),
        *(f"{run}/{page}.html" for run in ("van-gogh", "evil", "neon") for page in ("index", "code")),
    }  # fmt: skip
    assert not [complaint for path, text in made.items() for complaint in complaints(path, text)]


@pytest.mark.parametrize(
    "broken",
    [
        EVIL,
        '<a href="https://example.org">x</a>',
        '<a href="missing.csv">x</a>',
        '<img src="data:,">',
        '<b onclick="x()">x</b>',
        "<style>@import url(//example.org/x.css)</style>",
    ],
)
def test_the_rules_can_fail(tmp_path: Path, broken: str) -> None:
    fine = f"""<meta http-equiv="Content-Security-Policy" content="{POLICY}; style-src 'sha256-x'"><a href="#x">x</a>"""
    assert not complaints(tmp_path / "index.html", fine)
    assert complaints(tmp_path / "index.html", fine + broken)


def test_the_index_says_everything(results: Path) -> None:
    index = build(results)
    assert index == results / "index.html"
    text = index.read_text(encoding="utf-8")
    read = Reader(text)
    for words in (
        "van gogh", EVIL, "layers 1–2", "0.34 [0.28, 0.40]", "85 %", "localized", "no single window", "no effect",
        "failed", "no <u>concept</u> (cell 4)", "<i>unicorn</i>", "4 runs, 1 failed",
        "2 localized, 1 no single window",
    ):  # fmt: skip
        assert words in read.text, words
    alts = [attrs["alt"] or "" for tag, attrs in read.tags if tag == "img"]
    assert len(alts) == 4  # the legend, and a strip for each run that has an effect
    assert any(
        "mini, van gogh: the window of layers 1-2, effect 0.34 [0.28, 0.40]" in alt for alt in alts
    )
    for address in (
        "van-gogh/index.html",
        "van-gogh/effects.csv",
        "van-gogh/pictures.csv",
        "broken/index.html",
    ):
        assert address in addresses(text)
    assert read.text.index("unicorn") > read.text.index("neon")  # what failed comes last


def test_a_run_that_localizes_nothing_is_listed_with_its_finding(results: Path) -> None:
    folder = finish(
        results / "edit", "neon", carriers=[], finding="neon is <b>gone</b>", title="Neon, edited"
    )
    (folder / "effects.csv").unlink()
    (folder / "summary.csv").write_text("arm\n")
    (folder / "lora.safetensors").write_bytes(b"x")
    text = build(results).read_text(encoding="utf-8")
    listed = text.partition("What else was done")[2]
    assert 'href="edit/index.html"' in listed and "neon is &lt;b&gt;gone&lt;/b&gt;" in listed
    assert 'href="edit/summary.csv"' in listed
    assert "1 failed" in text, "the edit is no failure"
    own = (folder / "index.html").read_text(encoding="utf-8")
    assert 'href="lora.safetensors"' in own and "Failed" not in own


def test_an_index_without_sweeps_explains_no_windows(results: Path, tmp_path: Path) -> None:
    assert "The ceiling is the effect" in build(results).read_text(encoding="utf-8"), "the twin"
    folder = finish(tmp_path / "edits" / "edit", "neon", carriers=[], finding="neon is gone")
    (folder / "effects.csv").unlink()
    text = build(tmp_path / "edits").read_text(encoding="utf-8")
    assert "Each line is one run" in text and "What was done" in text
    assert "ceiling" not in text and "window" not in text.partition("<main")[2]


def test_an_open_lead_is_not_called_localized(results: Path) -> None:
    path = results / "van-gogh" / "result.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    assert "lead open" not in build(results).read_text(encoding="utf-8")
    told["carriers"][0]["reason"] = "its lead over other places is not established"
    path.write_text(json.dumps(told), encoding="utf-8")
    assert "lead open" in build(results).read_text(encoding="utf-8")


def test_a_page_shows_the_run_without_its_code(built: Path) -> None:
    text = (built / "van-gogh" / "index.html").read_text(encoding="utf-8")
    said = Reader(text).text
    for words in (
        "van gogh in mini", "van gogh: found", "Where is van gogh?", "9/9 pictures", "<b>plain</b>", "The last words.",
        "paper (arxiv.org/abs/2405.01008)", "window", "2.13.0", "2 min", "384",
    ):  # fmt: skip
        assert words in said, words
    for words in ("loco.localize", "SECRET", "5/9", "IntSlider", "alert(2)"):
        assert words not in text, words
    assert {"pictures.csv", "effects.csv", "code.html", "../index.html"} <= set(addresses(text))
    assert [attrs["alt"] for tag, attrs in Reader(text).tags if tag == "img"] == [ALT]
    assert len(re.findall("<h1", text)) == 1


def test_the_page_with_code_links_to_the_figures(built: Path) -> None:
    text = (built / "van-gogh" / "code.html").read_text(encoding="utf-8")
    assert "loco.localize(pipe, concept)" in Reader(text).text and ALT in Reader(text).text
    assert "<img" not in text and "index.html#figure-1" in addresses(text)
    assert 'id="figure-1"' in (built / "van-gogh" / "index.html").read_text(encoding="utf-8")


def test_what_people_typed_is_text(built: Path) -> None:
    for path, text in pages(built):
        assert not re.search(r"<script>a|<i>unicorn|<u>concept|<b>broken", text), path
    page = (built / "evil" / "index.html").read_text(encoding="utf-8")
    assert f"{EVIL} in mini" in Reader(page).text and f"{EVIL}: found" in Reader(page).text
    assert "&lt;b&gt;broken&lt;/b&gt;" in (built / "broken" / "index.html").read_text(
        encoding="utf-8"
    )


def test_repeating_changes_nothing_and_nothing_is_written_elsewhere(results: Path) -> None:
    outside = results.parent / "outside"
    finish(outside / "run", "elsewhere")
    (results / "linked").symlink_to(outside / "run")
    before = {path for path in results.parent.rglob("*") if path.is_file()}
    build(results)
    first = {path: path.read_bytes() for path in results.parent.rglob("*") if path.is_file()}
    made = {path.name for path in first.keys() - before}
    assert {"index.html", "code.html", "study.html", "model-mini.html"} <= made
    assert all(name.endswith(".html") for name in made)
    assert all(results in path.parents for path in first.keys() - before)
    build(results)
    assert {
        path: path.read_bytes() for path in results.parent.rglob("*") if path.is_file()
    } == first


def test_a_figure_without_description_is_told_about(tmp_path: Path) -> None:
    finish(tmp_path / "silent", "van gogh", alt=None)
    (message,) = warned(tmp_path)
    assert message.startswith("silent: figure-1 has no description")
    assert f'alt="{NO_ALT}"' in (tmp_path / "silent" / "index.html").read_text(encoding="utf-8")
    finish(tmp_path / "quiet" / "run", "van gogh")
    assert warned(tmp_path / "quiet") == []  # the twin


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("result.json", "{", "result.json cannot be read"),
        ("result.json", "[]", "does not hold an object"),
        ("effects.csv", "", "EmptyDataError"),
        ("effects.csv", "a,b\n1,2\n", "effects.csv has no column concept"),
    ],
)
def test_one_bad_run_does_not_hide_the_others(
    results: Path, name: str, content: str, words: str
) -> None:
    (results / "neon" / name).write_text(content)
    said = Reader(build(results).read_text(encoding="utf-8")).text
    assert words in said and "van gogh" in said and "2 failed" in said


def test_an_unreadable_notebook_leaves_the_rest(results: Path) -> None:
    (results / "neon" / "notebook.ipynb").write_text("{")
    assert [message[:38] for message in warned(results)] == [
        "neon: the notebook cannot be read: Not"
    ]
    assert "cannot be read" in (results / "neon" / "index.html").read_text(encoding="utf-8")


def test_a_result_with_groups_that_are_none_is_shown_as_damaged(results: Path) -> None:
    file = results / "neon" / "result.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(
        json.dumps({**told, "settings": "x", "parameters": 3, "versions": ["y"]}), encoding="utf-8"
    )
    shown = Reader(build(results).read_text(encoding="utf-8")).text
    assert "result.json is damaged: settings is 'x', not a table of plain values" in shown
    assert "versions is ['y'], not" in shown and "parameters is 3, not" in shown


def test_an_unfinished_run_is_shown_as_such(results: Path) -> None:
    (results / "neon" / "result.json").unlink()
    assert "unfinished: it was stopped" in build(results).read_text(encoding="utf-8")


def test_only_failures_still_give_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "error.json").write_text('{"title": "t", "error": "no"}')
    said = Reader(build(tmp_path).read_text(encoding="utf-8")).text
    assert "1 failed" in said and "failed: no" in said


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(LocogenError, match=r"with `locogen run STUDY\.toml`"):
            build(folder)


def test_names_that_look_like_missing_values(tmp_path: Path) -> None:
    for concept in ("NA", "1984"):
        finish(tmp_path / f"run-{concept}", concept)
    said = Reader(build(tmp_path).read_text(encoding="utf-8")).text
    assert "NA" in said and "1984" in said and "none failed" in said


def test_a_concept_of_two_models_is_told_apart(tmp_path: Path) -> None:
    finish(tmp_path / "a", "van gogh")
    finish(tmp_path / "b", "van gogh", model="sd-1.4")
    finish(tmp_path / "c", "monet")
    finish(tmp_path / "d", "monet")
    read = Reader(build(tmp_path).read_text(encoding="utf-8"))
    alts = " ".join(attrs["alt"] or "" for tag, attrs in read.tags if tag == "img")
    assert "mini, van gogh:" in alts and "sd-1.4, van gogh:" in alts
    assert "monet in mini, c" in read.text and "monet in mini, d" in read.text


def test_pages_of_a_run_stay_small(built: Path) -> None:
    assert all(len(text) < 1_500_000 for _, text in pages(built))


def test_no_torch(tmp_path: Path) -> None:
    finish(tmp_path / "neon", "neon")
    code = f"import sys, locogen.pages.build as r; r.build({str(tmp_path)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Cleaning


@pytest.mark.parametrize(
    "given, kept",
    [
        ("<p>a <b>b</b> &amp; c &lt;d&gt;</p>", "<p>a <b>b</b> &amp; c &lt;d&gt;</p>"),
        ("<p onclick='x()' style='color: red; width: 5px'>a", '<p style="width: 5px">a</p>'),
        (f"a{EVIL}b", "ab"),
        ("a<SCRIPT src=//x>b", "a"),
        ("<svg><script>x</script><a>t</a></svg>after", "after"),
        ("<iframe src='x'>", ""),
        ("<a href='javascript:x()'>a</a>", "<a>a</a>"),
        ("<a href='JaVa\tscript:x()'>a</a>", "<a>a</a>"),
        ("<a href='#here'>a</a>", '<a href="#here">a</a>'),
        ("<a href='../../secret'>a</a>", '<a>a <span class="soft">(../../secret)</span></a>'),
        ("<img src='https://x/y.png' alt='what'>", "[what]"),
        (
            "<img src='data:image/png;base64,QQ==' alt='a\"b'>",
            '<img src="data:image/png;base64,QQ==" alt="a&quot;b">',
        ),
        ("<img src=\"data:text/html;base64,QQ==\" alt='x'>", "[x]"),
        ("</div></p>x", "<p></p>x"),
        ("<table><tr><td>x", "<table><tbody><tr><td>x</td></tr></tbody></table>"),
        ("<style>@import url(//x)</style>y", "y"),
        ("<b><i>x</b>y</i>", "<b><i>x</i></b><i>y</i>"),
        ("<form action='//x'><input></form>", ""),
        ("<meta http-equiv='refresh' content='0;url=//x'>", ""),
    ],
)
def test_clean(given: str, kept: str) -> None:
    assert clean(given) == kept
    assert clean(kept) == kept  # nothing new comes up the second time


@pytest.mark.parametrize(
    "given", ["<![if x]>a", "<!", "<!-- a", "<", "<a", "&#x0;", "<a b='", "<![CDATA[<b>"]
)
def test_clean_survives_broken_html(given: str) -> None:
    assert "<script" not in clean(given + EVIL)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("cleaning", [clean, lambda text: arrange(text)[0]])
def test_attacks_leave_nothing_that_runs_or_loads(cleaning: Callable[[str], str], attack: str):
    cleaned = cleaning(f"<p>before</p>{attack}")
    assert "before" in cleaned
    assert dangers(cleaned) == []
    assert cleaning(cleaned) == cleaned or "class=" in cleaned, "stable: no mutation"


def test_dangers_can_be_found() -> None:
    """The twin of the test above: most attacks are dangerous as they are."""
    harmless = [attack for attack in ATTACKS if not dangers(attack)]
    assert len(harmless) < len(ATTACKS) / 4, harmless


def dangers(text: str) -> list[str]:
    """What a browser could run or load, as far as a parser finds it."""
    tags = Reader(text).tags
    found = [tag for tag, _ in tags if tag in ("script", "style", "form", "meta", "base", "link")]
    found += [tag for tag, _ in tags if tag in ("svg", "math", "iframe", "object", "embed", "body")]
    for _, attrs in tags:
        for name, value in attrs.items():
            address = name in ("href", "src") and not (value or "").startswith(("data:image/", "#"))
            style = name == "style" and re.search(r"url|expression", value or "")
            if address or style or name in LOADING or name.startswith("on"):
                found.append(f"{name}={value}")
    return found


LOADING = ("srcset", "srcdoc", "background", "action", "formaction")


def test_a_blank_first_line_of_an_output_stays() -> None:
    """HTML ignores one line break after `<pre>`: a second one is the output's own."""
    for cleaned in (clean("<pre>\n\na</pre>"), clean(clean("<pre>\n\na</pre>"))):
        assert cleaned == "<pre>\n\na</pre>"
    assert clean("<pre>a</pre>") == "<pre>\na</pre>"


def test_templates_escape_everything() -> None:
    """Each value of each template, but for HTML that is marked as such."""
    picture = {"source": EVIL, "alt": '" onerror="x', "width": 0}
    pieces: Any = macros("locogen.pages", "pieces.html")
    shown = pieces.image(picture) + pieces.value_table([EVIL], [[EVIL]], EVIL)
    shown += pieces.facts([(EVIL, [Fact(EVIL, EVIL, EVIL)])])
    assert "<script" not in shown and dangers(shown) == ["src=" + EVIL]
    assert EVIL in pieces.cell("x", Markup(EVIL)), "the twin"


def test_arrange_lowers_headings_and_wraps() -> None:
    body, silent = arrange("<h1 id='top'>a</h1><h6>b</h6><table><tr><td>c</td></tr></table>")
    assert (
        '<h2 id="top">a</h2><h6>b</h6>' in body
        and 'class="scroll"' in body
        and body.endswith("</table></div>")
    )
    assert silent == []


@pytest.mark.parametrize(
    ("width", "wide"),
    [("50%", 0), ("900%", 0), ("auto", 0), ("300px", 0), ("900px", 1), ("900.5", 1), ("²", 0)],
)
def test_arrange_takes_any_width(width: str, wide: int) -> None:
    body, _ = arrange(
        f'<img src="data:image/png;base64,{png(size=(9, 9))}" alt="a cat" width="{width}">'
    )
    assert body.count('class="wide"') == wide and 'alt="a cat"' in body


def test_shrink_loses_nothing() -> None:
    for mode in ("RGBA", "RGB", "L"):
        before = png("red" if mode != "L" else "white", mode=mode)
        images = [
            Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")
            for data in (before, shrink(before))
        ]
        assert images[0].tobytes() == images[1].tobytes()
        assert len(shrink(before)) <= len(before)
    half = png("#ff000080")  # transparency that is seen stays
    assert Image.open(io.BytesIO(base64.b64decode(shrink(half)))).convert("RGBA").getpixel(
        (0, 0)
    ) == (255, 0, 0, 128)
