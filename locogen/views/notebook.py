"""What every notebook needs beside its method: figures that can be read without seeing them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def show(figure: Figure | Axes, alt: str) -> None:
    """Display a figure with an alternative text, and close it.

    Args:
        figure: A matplotlib figure, or axes of one.
        alt: What the figure shows, in words: for those who cannot see it, and for exported pages.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display
    from matplotlib.figure import Figure

    drawing = figure if isinstance(figure, Figure) else figure.get_figure(root=True)
    display(drawing, metadata={"image/png": {"alt": alt}})
    # An open figure would be shown again, without its text, at the end of the cell.
    plt.close(drawing)
