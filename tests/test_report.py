"""Pages are made of what runs left, say all of it, run nothing and fetch nothing."""

import base64
import io
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat.v4 as nb
import pandas as pd
import pytest
from PIL import Image

from locogen.cleaning import NO_ALT, arrange, clean
from locogen.errors import LocogenError
from locogen.pages import POLICY, shrink
from locogen.report import build

EVIL = "<script>alert(1)</script>"
ALT = "van gogh: the window of 2 layers from 1 lowers the CLIP-score by 0.34"


def png(color: str = "red", size: tuple[int, int] = (800, 30), mode: str = "RGBA") -> str:
    Image.new(mode, size, color).save(data := io.BytesIO(), "PNG")
    return base64.b64encode(data.getvalue()).decode()


def effects(concept: str, start: int = 1, kind: str = "style") -> pd.DataFrame:
    known = dict(method="locogen", concept=concept, kind=kind, width=2, n=12)
    rows = [dict(known, axis="layer", position=w, estimate=0.34 if w == start else 0.01 * w) for w in range(6)]
    rows.append(dict(known, axis="ceiling", position=pd.NA, estimate=0.4))
    table = pd.DataFrame(rows).astype({"position": "Int64"})
    return table.assign(low=table["estimate"] - 0.06, high=table["estimate"] + 0.06)


def notebook(concept: str, alt: str | None = ALT) -> Any:
    metadata = {"image/png": {"alt": alt}} if alt else {}
    figure = nb.new_output("display_data", data={"image/png": png(), "text/plain": "<Figure>"}, metadata=metadata)
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider()"}
    outputs = [
        nb.new_output("stream", name="stderr", text="SECRET progress 10 %\n"),
        nb.new_output("stream", name="stdout", text="1/9\r5/9\r9/9 pictures\n<b>plain</b>\n"),
        nb.new_output("display_data", data={"text/html": f"<table><tr><td>{concept}</td></tr></table>"}),
        nb.new_output("display_data", data={"text/markdown": f"**{concept}** ![x](https://evil.example/x.png)"}),
        nb.new_output("display_data", data={"application/javascript": "alert(2)", "text/plain": "js"}),
        nb.new_output("display_data", data=widget),
        figure,
    ]
    cells = [
        nb.new_markdown_cell(
            f"# Where is {concept}?\n\n[paper](https://arxiv.org/abs/2405.01008), [csv](pictures.csv)"
        ),
        nb.new_code_cell("run = loco.localize(pipe, concept)", outputs=outputs),
        nb.new_markdown_cell("an unclosed <script> and <!-- comment"),
        nb.new_markdown_cell("The last words."),
    ]
    return nb.new_notebook(cells=cells, metadata={"language_info": {"name": "python"}})


def finish(folder: Path, concept: str, *, start: int | None = 1, alt: str | None = ALT, **more: Any) -> Path:
    """A finished run, as `study` leaves it."""
    folder.mkdir(parents=True)
    nbformat_write(notebook(concept, alt), folder)
    effects(concept, kind=more.get("kind", "style")).to_csv(folder / "effects.csv", index=False)
    pd.DataFrame({"concept": [concept], "clip_score": [0.5]}).to_csv(folder / "pictures.csv", index=False)
    carrier = dict(concept=concept, start=start, width=2, reason="ahead" if start is not None else "no effect")
    result = dict(
        title=f"{concept} in mini", notebook="localize", model="mini", concepts=[concept], kind="style",
        finding=f"{concept}: found", carriers=[carrier], settings={"window": 2, "seeds": [0, 1]},
        versions={"torch": "2.13.0"}, parameters={"concept": concept}, pictures=384, seconds=131.0,
        finished="2025-01-02T03:04:05Z",
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps({**result, **more}), encoding="utf-8")
    return folder


def nbformat_write(book: Any, folder: Path) -> None:
    (folder / "notebook.ipynb").write_text(json.dumps(book), encoding="utf-8")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "reports"
    finish(folder / "van-gogh", "van gogh")
    finish(folder / "evil", EVIL)
    finish(folder / "neon", "neon", start=None)
    failed = folder / "broken"
    failed.mkdir()
    error = dict(title="<b>broken</b>", model="mini", concepts=["<i>unicorn</i>"], error="no <u>concept</u>", cell=4)
    (failed / "error.json").write_text(json.dumps(error))
    (folder / "store").mkdir()  # not a run
    return folder


def pages(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.rglob("*.html")):
        yield path, path.read_text(encoding="utf-8")


class Reader(HTMLParser):
    """All tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def addresses(text: str) -> list[str]:
    """Everything a browser would fetch or follow."""
    read = Reader(text)
    named = [value or "" for _, attrs in read.tags for name, value in attrs.items() if name in ("href", "src")]
    return named + re.findall(r"url\(([^)]*)\)", text) + re.findall(r"@import\s+(\S+)", text)


def warned(folder: Path) -> list[str]:
    """What building a folder warns its user of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        build(folder)
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


def complaints(path: Path, text: str) -> list[str]:
    """What a page must not have: the rules in one place, tried on pages that break them below."""
    found = []
    for tag, attrs in Reader(text).tags:
        if tag in ("script", "iframe", "object", "embed", "form") or any(name.startswith("on") for name in attrs):
            found.append(f"{tag} {attrs} may run")
        if tag == "img" and not (attrs.get("alt") or "").strip():
            found.append("a picture without alt text")
    for address in addresses(text):
        if address.startswith(("data:", "#")):
            continue
        if re.match(r"[a-z]+:|//|/", address) or not (path.parent / address.split("#")[0]).exists():
            found.append(f"{address} is not a file beside the page")
    if POLICY not in text:
        found.append("no content security policy")
    return found


def test_the_pages_follow_the_rules(results: Path) -> None:
    assert build(results) == results / "index.html"
    made = dict(pages(results))
    assert {path.relative_to(results).as_posix() for path in made} == {
        "index.html", "broken/index.html",
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
    fine = f'<meta content="{POLICY}"><a href="#x">x</a>'
    assert not complaints(tmp_path / "index.html", fine)
    assert complaints(tmp_path / "index.html", fine + broken)


def test_the_index_says_everything(results: Path) -> None:
    text = build(results).read_text(encoding="utf-8")
    read = Reader(text)
    for words in (
        "van gogh", EVIL, "layers 1–2", "0.34 [0.28, 0.40]", "85 %", "localized", "no single window", "no effect",
        "failed", "no <u>concept</u> (cell 4)", "<i>unicorn</i>", "4 runs, 1 failed",
    ):  # fmt: skip
        assert words in read.text, words
    images = [attrs for tag, attrs in read.tags if tag == "img"]
    assert len(images) == 1  # one figure, one scale
    assert "van gogh: the window of 2 layers from 1, effect 0.34 [0.28, 0.40]" in (images[0]["alt"] or "")
    for address in ("van-gogh/index.html", "van-gogh/effects.csv", "van-gogh/pictures.csv", "broken/index.html"):
        assert address in addresses(text)
    assert read.text.index("unicorn") > read.text.index("neon")  # what failed comes last


def test_a_run_that_localizes_nothing_is_listed_with_its_finding(results: Path) -> None:
    folder = finish(results / "edit", "neon", carriers=[], finding="neon is <b>gone</b>", title="Neon, edited")
    (folder / "effects.csv").unlink()
    (folder / "summary.csv").write_text("arm\n")
    (folder / "lora.safetensors").write_bytes(b"x")
    text = build(results).read_text(encoding="utf-8")
    listed = text.partition("what else was done")[2]
    assert 'href="edit/index.html"' in listed and "neon is &lt;b&gt;gone&lt;/b&gt;" in listed
    assert 'href="edit/summary.csv"' in listed
    assert "1 failed" in text, "the edit is no failure"
    own = (folder / "index.html").read_text(encoding="utf-8")
    assert 'href="lora.safetensors"' in own and "Failed" not in own


def test_an_open_lead_is_not_called_localized(results: Path) -> None:
    path = results / "van-gogh" / "result.json"
    told = json.loads(path.read_text(encoding="utf-8"))
    assert "lead open" not in build(results).read_text(encoding="utf-8")
    told["carriers"][0]["reason"] = "its lead over other places is not established"
    path.write_text(json.dumps(told), encoding="utf-8")
    assert "lead open" in build(results).read_text(encoding="utf-8")


def test_a_page_shows_the_run_without_its_code(results: Path) -> None:
    build(results)
    text = (results / "van-gogh" / "index.html").read_text(encoding="utf-8")
    said = Reader(text).text
    for words in (
        "van gogh in mini", "van gogh: found", "Where is van gogh?", "9/9 pictures", "<b>plain</b>", "The last words.",
        "paper (arxiv.org/abs/2405.01008)", "window", "2.13.0", "2.2 minutes", "384",
    ):  # fmt: skip
        assert words in said, words
    for words in ("loco.localize", "SECRET", "5/9", "IntSlider", "alert(2)"):
        assert words not in text, words
    assert {"pictures.csv", "effects.csv", "code.html", "../index.html"} <= set(addresses(text))
    assert [attrs["alt"] for tag, attrs in Reader(text).tags if tag == "img"] == [ALT]
    assert len(re.findall("<h1", text)) == 1


def test_the_page_with_code_links_to_the_figures(results: Path) -> None:
    build(results)
    text = (results / "van-gogh" / "code.html").read_text(encoding="utf-8")
    assert "loco.localize(pipe, concept)" in Reader(text).text and ALT in Reader(text).text
    assert "<img" not in text and "index.html#figure-1" in addresses(text)
    assert 'id="figure-1"' in (results / "van-gogh" / "index.html").read_text(encoding="utf-8")


def test_what_people_typed_is_text(results: Path) -> None:
    build(results)
    for path, text in pages(results):
        assert not re.search(r"<script|<i>unicorn|<u>concept|<b>broken", text), path
    page = (results / "evil" / "index.html").read_text(encoding="utf-8")
    assert f"{EVIL} in mini" in Reader(page).text and f"{EVIL}: found" in Reader(page).text
    assert "&lt;b&gt;broken&lt;/b&gt;" in (results / "broken" / "index.html").read_text(encoding="utf-8")


def test_repeating_changes_nothing_and_nothing_is_written_elsewhere(results: Path) -> None:
    outside = results.parent / "outside"
    finish(outside / "run", "elsewhere")
    (results / "linked").symlink_to(outside / "run")
    before = {path for path in results.parent.rglob("*") if path.is_file()}
    build(results)
    first = {path: path.read_bytes() for path in results.parent.rglob("*") if path.is_file()}
    assert {path.name for path in first.keys() - before} == {"index.html", "code.html"}
    assert all(results in path.parents for path in first.keys() - before)
    build(results)
    assert {path: path.read_bytes() for path in results.parent.rglob("*") if path.is_file()} == first


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
        ("effects.csv", "a,b\n1,2\n", "KeyError"),
    ],
)
def test_one_bad_run_does_not_hide_the_others(results: Path, name: str, content: str, words: str) -> None:
    (results / "neon" / name).write_text(content)
    said = Reader(build(results).read_text(encoding="utf-8")).text
    assert words in said and "van gogh" in said and "2 failed" in said


def test_an_unreadable_notebook_leaves_the_rest(results: Path) -> None:
    (results / "neon" / "notebook.ipynb").write_text("{")
    assert [message[:38] for message in warned(results)] == ["neon: the notebook cannot be read: Not"]
    assert "cannot be read" in (results / "neon" / "index.html").read_text(encoding="utf-8")


def test_an_unfinished_run_is_shown_as_such(results: Path) -> None:
    (results / "neon" / "result.json").unlink()
    assert "unfinished: it was stopped" in build(results).read_text(encoding="utf-8")


def test_only_failures_still_give_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "error.json").write_text('{"title": "t", "error": "no"}')
    assert "<img" not in build(tmp_path).read_text(encoding="utf-8")


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(LocogenError, match="python -m locogen run"):
            build(folder)


def test_names_that_look_like_missing_values(tmp_path: Path) -> None:
    for concept in ("NA", "1984"):
        finish(tmp_path / f"run-{concept}", concept)
    said = Reader(build(tmp_path).read_text(encoding="utf-8")).text
    assert "NA" in said and "1984" in said and "0 failed" in said


def test_a_concept_of_two_models_is_told_apart(tmp_path: Path) -> None:
    finish(tmp_path / "a", "van gogh")
    finish(tmp_path / "b", "van gogh", model="sd-1.4")
    finish(tmp_path / "c", "monet")
    finish(tmp_path / "d", "monet")
    (alt,) = re.findall('alt="(.*?)"', build(tmp_path).read_text(encoding="utf-8"))
    for name in ("van gogh, mini:", "van gogh, sd-1.4:", "monet, c:", "monet, d:"):
        assert name in alt


def test_pages_of_a_run_stay_small(results: Path) -> None:
    build(results)
    assert all(len(text) < 1_500_000 for _, text in pages(results))


def test_no_torch(results: Path) -> None:
    code = f"import sys, locogen.report as r; r.build({str(results)!r}); assert 'torch' not in sys.modules"
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
        ("<img src='data:image/png;base64,QQ==' alt='a\"b'>", '<img src="data:image/png;base64,QQ==" alt="a&quot;b">'),
        ("<img src=\"data:text/html;base64,QQ==\" alt='x'>", "[x]"),
        ("</div></p>x", "x"),
        ("<table><tr><td>x", "<table><tr><td>x</td></tr></table>"),
        ("<style>@import url(//x)</style>y", "y"),
        ("<b><i>x</b>y</i>", "<b><i>x</i></b>y"),
        ("<form action='//x'><input></form>", ""),
        ("<meta http-equiv='refresh' content='0;url=//x'>", ""),
    ],
)
def test_clean(given: str, kept: str) -> None:
    assert clean(given) == kept
    assert clean(kept) == kept  # nothing new comes up the second time


@pytest.mark.parametrize("given", ["<![if x]>a", "<!", "<!-- a", "<", "<a", "&#x0;", "<a b='", "<![CDATA[<b>"])
def test_clean_survives_broken_html(given: str) -> None:
    assert "<script" not in clean(given + EVIL)


def test_arrange_lowers_headings_and_wraps() -> None:
    body, silent = arrange("<h1 id='top'>a</h1><h6>b</h6><table><tr><td>c</td></tr></table>")
    assert '<h2 id="top">a</h2><h6>b</h6>' in body and 'class="scroll"' in body and body.endswith("</table></div>")
    assert silent == []


def test_shrink_loses_nothing() -> None:
    for mode in ("RGBA", "RGB", "L"):
        before = png("red" if mode != "L" else "white", mode=mode)
        images = [Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA") for data in (before, shrink(before))]
        assert images[0].tobytes() == images[1].tobytes()
        assert len(shrink(before)) <= len(before)
    half = png("#ff000080")  # transparency that is seen stays
    assert Image.open(io.BytesIO(base64.b64decode(shrink(half)))).convert("RGBA").getpixel((0, 0)) == (255, 0, 0, 128)
