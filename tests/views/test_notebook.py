"""`show`: a figure with words, shown once, and read by every kind of reader."""

import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from matplotlib import pyplot as plt
from nbconvert.exporters import HTMLExporter
from support.made_up import png

from locogen.pages.notebook import notebook_html, read_notebook
from locogen.views.notebook import show

WORDS = 'a "rising" <curve>'


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A notebook's interpreter, whose figures are one small picture."""
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance()
    drawn = ({"image/png": png(), "text/plain": "<Figure>"}, {"image/png": {"width": 9}})
    monkeypatch.setattr(shell.display_formatter, "format", lambda figure: drawn)
    yield shell
    InteractiveShell.clear_instance()


def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    calls: list[tuple[Any, dict[str, Any]]] = []
    display = lambda *things, **options: calls.append((things[0], options))  # noqa: E731
    monkeypatch.setattr("IPython.display.display", display)
    return calls


class Alts(HTMLParser):
    """The alternative texts of all pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.alts: list[str | None] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.alts.append(dict(attrs).get("alt"))


def test_a_figure_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = shown(monkeypatch)
    figure, ax = plt.subplots()
    with capture_output():
        show(ax, WORDS)
    assert calls == [(figure, {})]
    assert not plt.get_fignums(), "left open, it would be shown again without its words"
    other = plt.figure()
    show(other, "the figure itself")
    assert calls[1][0] == other


def test_it_is_drawn_whatever_the_backend(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell.display_formatter, "format", lambda figure: ({"text/plain": "x"}, {}))
    calls = shown(monkeypatch)
    show(plt.subplots(figsize=(1, 1))[0], WORDS)
    [(bundle, _)] = calls
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")


def test_its_words_are_there_for_every_reader(
    shell: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = shown(monkeypatch)
    show(plt.figure(), WORDS)
    [(bundle, options)] = calls
    assert options["metadata"] == {"image/png": {"width": 9, "alt": WORDS}}
    assert base64.b64decode(bundle["image/png"])
    output = nbformat.v4.new_output("display_data", data=bundle, metadata=options["metadata"])
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output])])
    assert Alts(HTMLExporter().from_notebook_node(book)[0]).alts == [WORDS]
    nbformat.write(book, tmp_path / "notebook.ipynb")
    read = read_notebook(tmp_path / "notebook.ipynb")
    assert "text/html" not in read.cells[0].outputs[0].data, "once in a page is enough"
    assert Alts(notebook_html(read, run="x", code=False)).alts == [WORDS]
    said = Alts(HTMLExporter().from_notebook_node(read)[0]).alts
    assert said != [WORDS], "the twin: nbconvert's own template passes over the metadata"
