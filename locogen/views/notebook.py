"""What every notebook needs besides its method: figures with words, and tables that are kept."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from locogen.finding import Finding

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def show(figure: Figure | Axes, alt: str) -> None:
    """Display a figure with an alternative text, and close it.

    Args:
        figure: A matplotlib figure, or axes of one.
        alt: What the figure shows, in words: for those who cannot see it, and for exported pages.

    Returns:
        Nothing: the figure is displayed, and closed.

    Example:
        >>> from matplotlib.figure import Figure
        >>> show(Figure(), "An empty figure.")
        Figure(640x480)
    """
    import matplotlib.pyplot as plt
    from IPython.display import display
    from matplotlib.figure import Figure

    drawing: Any = figure if isinstance(figure, Figure) else figure.get_figure(root=True)
    bundle, metadata = _drawn(drawing, alt)
    if "image/png" in bundle:
        display(bundle, metadata=metadata, raw=True)
    else:
        display(drawing)
    # An open figure would be shown again, without its text, at the end of the cell.
    plt.close(drawing)


def _drawn(drawing: Figure, alt: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a notebook keeps of a figure, with its alternative text in both of its forms.

    JupyterLab and nbconvert's own template show a picture without the words that its metadata has;
    of HTML they show the words. locogen's pages read the metadata. Empty outside of a notebook.
    """
    from IPython.core.getipython import get_ipython
    from IPython.core.pylabtools import print_figure

    shell: Any = get_ipython()
    if shell is None:
        return {}, {}
    data, metadata = shell.display_formatter.format(drawing)
    # Where another backend than a notebook's own is chosen, nothing draws figures by itself.
    png = data.get("image/png") or print_figure(drawing, fmt="png", base64=True)
    if png is None:  # nothing is in the figure
        return data, metadata
    if isinstance(png, bytes):
        png = base64.b64encode(png).decode()
    address = f"data:image/png;base64,{png.strip()}"
    image = Markup('<img alt="{}" src="{}">').format(alt, address)
    size = metadata.get("image/png", {})
    return (
        {**data, "image/png": png, "text/html": str(image)},
        {**metadata, "image/png": {**size, "alt": alt}},
    )


def save(results: Path | str, finding: Finding, **tables: Any) -> None:
    """Write what a notebook has found into its folder of results, where a study's pages read it.

    Args:
        results: The folder, which exists; "" writes nothing, so that a notebook leaves no files
            unless it is asked to.
        finding: What was found, and from what; `finding.json`.
        tables: File name without `.csv` → a table (pandas); None writes nothing. Tables with an
            index that has a name are written with it.

    Returns:
        Nothing.

    Raises:
        LocogenError: The folder takes no files.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> finding = Finding("mini", ["neon"], "style", "neon: layers 12-13")
        >>> save(folder, finding, models=model_table())
        >>> Finding.read(folder).finding
        'neon: layers 12-13'
    """
    if not results:
        return
    folder = Path(results)
    for name, table in tables.items():
        if table is None:
            continue
        named = any(level is not None for level in table.index.names)
        table.to_csv(folder / f"{name}.csv", index=named)
    finding.write(folder)
