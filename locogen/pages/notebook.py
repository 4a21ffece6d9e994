"""An executed notebook as the body of a page: what is shown of its outputs, as cleaned HTML."""

from __future__ import annotations

import copy
import logging
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from locogen.files import ENCODING
from locogen.pages.cleaning import arrange, clean
from locogen.pages.png import shrink

# Tag of cells that only the notebook itself and the page with code show.
DIRECTION = "notebook"
# Outputs that need a running kernel or a script: they do nothing in a saved page.
LIVE = {"application/vnd.jupyter.widget-view+json", "application/javascript"}


def read_notebook(path: Path) -> Any:
    """Read a run's notebook, with what a page shows of its outputs.

    Args:
        path: `notebook.ipynb`.

    Returns:
        The notebook; None if there is none, because a run failed before it had one.

    Raises:
        Exception: The notebook is damaged; nbformat and Pillow raise errors of many kinds.
    """
    import nbformat

    if not path.exists():
        return None
    notebook = nbformat.reads(path.read_text(encoding=ENCODING), as_version=4)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        # nbconvert makes the id of the cell's element from it: `code.html#cell-id-5` then leads to
        # the cell whose number stands in an error.
        if cell.get("execution_count") is not None:
            cell["id"] = str(cell["execution_count"])
        cell.outputs = [_prepare(output) for output in cell.outputs if _is_shown(output)]
    return notebook


def _is_shown(output: Any) -> bool:
    """Whether a page shows an output: no standard error (progress bars), nothing live."""
    if output.output_type == "stream":
        return output.name != "stderr"
    return not LIVE & set(output.get("data") or {})


def _prepare(output: Any) -> Any:
    """An output as the page shows it: progress lines in their last state, pictures made small."""
    if output.output_type == "stream":
        # A carriage return starts the line again: "1/9\r9/9" is shown as "9/9".
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")]
        output.text = "\n".join(lines)
    data = output.get("data") or {}
    if "image/png" in data:
        data["image/png"] = shrink(data["image/png"])
        # The same picture again, for readers that pass over the words in its metadata.
        data.pop("text/html", None)
    return output


def notebook_html(notebook: Any, *, run: str, code: bool) -> Markup:
    """The notebook as HTML, cleaned and fitted to a page.

    Args:
        notebook: From `read_notebook`.
        run: The name of the run's folder, for warnings.
        code: Whether to show the code; figures are then links to the page without it.

    Returns:
        The HTML. Warns of figures without a description, once, on the page that shows them.
    """
    shown = notebook if code else _without_directions(notebook)
    fragment, _ = _exporter(code).from_notebook_node(shown)
    body, undescribed = arrange(fragment, figures_at="index.html" if code else "")
    if not code:
        remedy = 'display it with metadata={"image/png": {"alt": "what it shows"}}'
        for figure in undescribed:
            warnings.warn(f"{run}: {figure} has no description: {remedy}", stacklevel=2)
    return body


def _without_directions(notebook: Any) -> Any:
    """The notebook less the cells that speak to who runs it: "Change these lines"."""
    shown = copy.copy(notebook)
    shown.cells = [
        cell for cell in notebook.cells if DIRECTION not in cell.metadata.get("tags", [])
    ]
    return shown


@cache
def _exporter(code: bool) -> Any:
    from nbconvert.exporters import HTMLExporter

    # nbconvert warns of missing descriptions as well, without saying where or what helps.
    quiet = logging.getLogger("locogen.nbconvert")
    quiet.setLevel(logging.ERROR)
    return HTMLExporter(
        template_name="basic",
        # Each output is cleaned by itself: a tag that it leaves open must not take in the next one.
        sanitize_html=True,
        filters={"clean_html": clean},
        exclude_input=not code,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
        log=quiet,
        # The page fetches nothing.
        mathjax_url="",
        require_js_url="",
        jquery_url="",
    )
