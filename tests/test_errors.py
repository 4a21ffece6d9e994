"""Errors in a notebook: the message and its remedy, not the inside of the package; the rest on request."""

import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell

from locogen.errors import unknown
from locogen.studies.worker import execute

WRONG = "import locogen as loco\n\nloco.concept('mini/neo')"
REMEDY = "LocogenError: no concept 'mini/neo': did you mean 'mini/neon'"


@pytest.fixture(name="shell")
def make_shell():
    """A notebook's interpreter, without its kernel."""
    InteractiveShell.clear_instance()
    yield InteractiveShell.instance(colors="nocolor")
    InteractiveShell.clear_instance()


def shown(shell: InteractiveShell, cell: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    shell.run_cell(cell)
    return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()


def test_the_message_and_the_line_that_was_typed(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    message, _, place, more = shown(shell, WRONG, capsys)
    assert message.startswith(REMEDY)
    assert place == "in line 3 of the cell: loco.concept('mini/neo')"
    assert more == "(for the whole traceback: %tb Verbose)"


def test_the_whole_traceback_is_to_be_had(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    shown(shell, WRONG, capsys)
    whole = "\n".join(shown(shell, "%tb Verbose", capsys))
    assert "raise unknown(" in whole and "catalog" in whole and REMEDY in whole
    assert len(shown(shell, "%tb", capsys)) == 4, "and the next one is short again"


def test_a_stopped_run_shows_one_line(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = "from locogen.errors import name_interrupt\nstop = KeyboardInterrupt()\n"
    named = stop + "name_interrupt(stop, 'stopped at 27 of 132; they are kept')\nraise stop"
    assert shown(shell, named, capsys) == ["stopped at 27 of 132; they are kept"]
    assert len(shown(shell, f"{stop}raise stop", capsys)) > 3, "the twin: a traceback"


def test_other_errors_keep_their_traceback(
    shell: InteractiveShell, capsys: pytest.CaptureFixture[str]
) -> None:
    """The twin of the tests above: what locogen does not raise is shown as ever."""
    assert any(
        "Traceback (most recent call last)" in line for line in shown(shell, "[][0]", capsys)
    )


def test_what_a_study_leaves_of_an_error_is_short_too(tmp_path: Path) -> None:
    tag = {"tags": ["parameters"]}
    cells = [
        nbformat.v4.new_code_cell("seeds: int = 1  # help", metadata=tag),
        nbformat.v4.new_code_cell(WRONG),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "wrong.ipynb")
    (tmp_path / "out").mkdir()
    failure = execute(tmp_path / "wrong.ipynb", tmp_path / "out", {})
    assert failure and failure.message.startswith(REMEDY.partition(": ")[2])
    book = nbformat.read(tmp_path / "out" / "notebook.ipynb", as_version=4)
    (error,) = [
        o
        for cell in book.cells
        if cell.cell_type == "code"
        for o in cell.outputs
        if o.output_type == "error"
    ]
    assert error.traceback[0].startswith(REMEDY) and len(error.traceback) == 4


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("uce", "did you mean 'UCE'?"),
        ("advd", "did you mean 'AdaVD'?"),
        ("SPEDE", "did you mean 'SPEED'?"),
        ("xyz", "use one of AdaVD, SPEED, UCE"),
    ],
)
def test_a_name_is_known_again_in_another_case(name: str, hint: str) -> None:
    """The last one is the twin: where nothing is alike, all names are listed."""
    assert str(unknown("editor", name, ["UCE", "SPEED", "AdaVD"])) == f"no editor {name!r}: {hint}"
