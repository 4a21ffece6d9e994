"""The Stop button: one line, no traceback, and the cell run again goes on. By a kernel alone; in JupyterLab: `test_lab.py`."""

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

LOAD = (
    "import locogen as loco\npipe = loco.load('mini')\nconcept = loco.concept('mini/neon').first(1)"
)
SWEEP = """
run = loco.localize(pipe, concept, window=8, seeds=range(2), num_inference_steps=4, batch_size=2)
print(len(run), "rows")
"""


def errors(cell: Any) -> list[Any]:
    return [output for output in cell.outputs if output.output_type == "error"]


def interrupt_when_begun(client: Any, store: Path, stopped: threading.Event) -> None:
    """As the button does, as soon as some pictures are there."""
    end = time.monotonic() + 240
    while len(list(store.glob("*.png"))) < 4 and time.monotonic() < end:
        time.sleep(0.02)
    pid = client.km.provisioner.pid

    os.kill(pid, signal.SIGINT)  # the manager's own way is a coroutine of another thread's loop
    stopped.set()


def test_a_sweep_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCOGEN_CACHE", str(tmp_path / "cache"))
    store = tmp_path / "cache" / "pictures"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(LOAD)])
    book.cells += [nbformat.v4.new_code_cell(SWEEP) for _ in range(2)]
    client = NotebookClient(book, timeout=600, allow_errors=True, kernel_name="python3")
    with client.setup_kernel():
        client.execute_cell(book.cells[0], 0)
        assert not errors(book.cells[0]), book.cells[0].outputs
        assert not [o for o in book.cells[0].outputs if "Loading weights" in str(o)]

        stopped = threading.Event()
        stop = threading.Thread(target=interrupt_when_begun, args=(client, store, stopped))
        stop.start()
        client.execute_cell(book.cells[1], 1)
        stop.join()
        [error] = errors(book.cells[1])
        assert error.ename == "KeyboardInterrupt"
        [line] = error.traceback
        said = re.fullmatch(r"stopped at (\d+) of (\d+); they are kept in .*pictures", line)
        assert said, line
        there = {file.name: file.stat().st_mtime_ns for file in store.glob("*.png")}
        assert len(there) == int(said[1]) < int(said[2])

        client.execute_cell(book.cells[2], 2)
    assert not errors(book.cells[2]), book.cells[2].outputs
    assert any("rows" in output.get("text", "") for output in book.cells[2].outputs)
    assert len(list(store.glob("*.png"))) == int(said[2])
    kept = {name: (store / name).stat().st_mtime_ns for name in there}
    assert kept == there, "what was there was not made again"
