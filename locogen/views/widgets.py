"""`explore(run)`: click a cell of the heatmap and see its pictures; each view leaves a static twin in saved pages."""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets
from IPython.display import HTML, display, update_display

from locogen.errors import LocogenError
from locogen.views.explorer import Explorer, Look, Shown
from locogen.views.plots import figure_size, plot_effect
from locogen.views.tables import describe, effect_matrix, number, precision

if TYPE_CHECKING:
    from PIL.Image import Image

    from locogen.pictures.runs import Run

PICTURE = 150  # pixels across on the screen; small pictures are enlarged square by square
AT_ONCE = 3  # baseline, window and ceiling come together
LIFELESS = "In Jupyter this can be clicked. Here stands what was looked at last:"
STYLE = """
.{name} .widget-toggle-buttons {{ height: auto; max-width: 100%; }}
.{name} .widget-toggle-button {{ white-space: pre-line; line-height: 1.25; height: auto; width: 3.8em; padding: 2px; }}
.{name} .mod-active {{ outline: 3px solid #111; outline-offset: -3px; box-shadow: 0 0 0 2px #fff; font-weight: bold; }}
.{name} .widget-toggle-button:focus-visible {{ outline: 3px dashed var(--jp-brand-color1, #1976d2); }}
.{name} .widget-html-content {{ line-height: 1.4; overflow: visible; }}
.{name}-twin {{ display: none; }}
"""


def explore(run: Run, *, pipe: Any = None, **options: Any) -> ExplorerBox:
    """Look at a run of `localize` by hand: its heatmap as buttons, and under it the pictures of what is chosen.

    Choose a window by its cell or by the slider, a prompt, any seed; edit the window's layers at some strength, or
    clamp some of their neurons. What the run has is shown at once, what it has not is made by its pipeline, or by
    `pipe`; without either only the run's own pictures can be looked at. `options`: how an edit is fitted, such as
    `tokens` and `ridge`, see `fit_edit`. All of it works by keyboard. Nothing is written, the model is left as found.

    In a saved notebook and in exported pages, where no widget lives, stands what was looked at last. Raises
    `LocogenError` for a run without scores, and for a model whose weights are not the run's.
    """
    maker = run.made_by() if run.made_by is not None else None
    return ExplorerBox(Explorer(run, maker if pipe is None else pipe, options))


class ExplorerBox(ipywidgets.VBox):
    """The controls over an `Explorer`; `prompt`, `seed`, `window`, `strength`, `neurons` may be set by code as well."""

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self._name = f"loco-{uuid.uuid4().hex[:8]}"
        self._busy = self._displayed = False
        self._concept = explorer.first_look().concept
        self._heatmap = ""
        self._make_controls(explorer.first_look())
        self.status, self.pictures = ipywidgets.HTML(), ipywidgets.HTML()
        style = ipywidgets.HTML(f"<style>{STYLE.format(name=self._name)}{''.join(self._colors())}</style>")
        controls = ipywidgets.HBox(self._controls(), layout=ipywidgets.Layout(flex_flow="row wrap"))
        super().__init__([style, *self.cells.values(), controls, self.status, self.pictures])
        self.add_class(self._name)
        for name, row in self.cells.items():
            row.observe(lambda change, name=name: self._choose(name, change.new), "value")
        for control in self._controls():
            control.observe(lambda change: self._update(), "value")
        self._update()

    def _make_controls(self, look: Look) -> None:
        explorer, live = self.explorer, self.explorer.pipe is not None
        usual: dict[str, Any] = dict(style={"description_width": "6.5em"}, continuous_update=False)
        prompts = [pair.prompt for pair in explorer.concepts[look.concept].pairs]
        self.cells = {name: self._row(name, place) for place, name in enumerate(explorer.concepts)}
        self.prompt = ipywidgets.Dropdown(options=prompts, description="prompt", style=usual["style"])
        self.prompt.layout.width = "min(36em, 100%)"
        self.seed = ipywidgets.BoundedIntText(look.seed, 0, 2**31 - 1, description="seed", **usual)
        chosen, last = (look.first, look.last), explorer.n_layers - 1
        self.window = ipywidgets.IntRangeSlider(value=chosen, min=0, max=last, description="layers", **usual)
        self.strength = ipywidgets.FloatSlider(
            0, min=0, max=2, step=0.25, description="edit strength", disabled=not live, **usual
        )
        self.neurons = ipywidgets.IntSlider(0, min=0, max=1, description="neurons", disabled=not live, **usual)
        self.strength.tooltip = "how much of an edit of these layers is applied; 0: none"
        self.neurons.tooltip = "how many neurons of each key and value matrix of these layers are clamped; 0: none"

    def _controls(self) -> tuple[Any, ...]:
        return self.prompt, self.seed, self.window, self.strength, self.neurons

    def _row(self, name: str, place: int) -> Any:
        """One concept's row of the heatmap, a button a window."""
        cells = self.explorer.cells(name)
        digits = precision(*(row["estimate"] for row in cells.values()))
        star = self.explorer.carriers[name].start
        options = [
            (f"{_layers(start, self.explorer.width)}{' ★' * (start == star)}\n{number(row['estimate'], digits)}", start)
            for start, row in cells.items()
        ]
        look = self.explorer.first_look()
        told = [f"{name}, layers {label.splitlines()[0]}: effect {label.splitlines()[1]}" for label, _ in options]
        row = ipywidgets.ToggleButtons(options=options, value=None, tooltips=told, description=name)
        row.style.description_width, row.style.button_width = "7em", "3.8em"
        row.add_class(f"{self._name}-{place}")
        row.value = look.first if name == look.concept else None
        return row

    def _colors(self) -> Iterator[str]:
        """The heatmap's colors, one scale around zero for all concepts as in `plot_effect`; text that can be read."""
        import seaborn as sns
        from matplotlib.colors import to_hex

        colors = sns.color_palette("vlag", as_cmap=True)
        matrix = effect_matrix(self.explorer.effects)
        most = matrix.abs().max().max() or 1.0
        for place, name in enumerate(self.explorer.concepts):
            for child, row in enumerate(self.explorer.cells(name).values(), 1):
                color = colors(0.5 + row["estimate"] / most / 2)
                light = 0.2126 * color[0] + 0.7152 * color[1] + 0.0722 * color[2] > 0.45
                button = f".{self._name}-{place} .widget-toggle-button:nth-of-type({child})"
                yield f"{button} {{ background: {to_hex(color)}; color: {'#000' if light else '#fff'}; }}\n"

    @property
    def look(self) -> Look:
        """What is looked at now."""
        first, last = self.window.value
        return Look(
            self._concept, str(self.prompt.value), first, last, self.seed.value, self.strength.value, self.neurons.value
        )

    def _choose(self, concept: str, start: int | None) -> None:
        """A cell was clicked."""
        if self._busy or start is None:
            return
        self._busy = True
        if concept != self._concept:
            self._concept = concept
            self.prompt.options = [pair.prompt for pair in self.explorer.concepts[concept].pairs]
        self.window.value = (start, start + self.explorer.width - 1)
        self._busy = False
        self._update()

    def _update(self) -> None:
        """Show what the controls ask for."""
        if self._busy:
            return
        self._busy = True
        try:
            self.neurons.max = max(1, self.explorer.narrowest(self.look))
            look = self.look
            swept = len(look.window) == self.explorer.width
            for name, row in self.cells.items():
                row.value = look.first if swept and name == self._concept else None
            self.status.value = "<p role='status'>Making pictures …</p>"
            shown = []
            for one in self.explorer.show(look):  # the slow ones come last: show the others meanwhile
                shown.append(one)
                if len(shown) >= AT_ONCE:
                    self.pictures.value = _figures(shown)
            self.status.value = f"<p role='status'>{escape(self.explorer.finding(look))}</p>"
        except LocogenError as error:
            self.pictures.value = ""
            self.status.value = f"<p role='alert'><b>{escape(str(error))}</b></p>"
        finally:
            self._busy = False
        if self._displayed:
            update_display(HTML(self.twin()), display_id=self._name)

    def twin(self) -> str:
        """The same view as plain HTML: the heatmap as a picture, what is chosen, and its pictures."""
        self._heatmap = self._heatmap or self._drawn()
        look = self.look
        asked = f"<p>Prompt “{escape(look.prompt)}”, seed {look.seed}.</p>"
        return f'<div class="{self._name}-twin">{self._heatmap}{self.status.value}{asked}{self.pictures.value}</div>'

    def _drawn(self) -> str:
        import matplotlib.style
        from matplotlib.figure import Figure

        effects, carriers = self.explorer.effects, self.explorer.carriers
        with matplotlib.style.context("default"):
            drawing = Figure(figsize=figure_size(effect_matrix(effects)), dpi=120, layout="constrained")
            plot_effect(effects, carriers=carriers, ax=drawing.add_subplot())
            drawing.savefig(buffer := io.BytesIO(), format="png")
        alt = f"Heatmap of the effect of each window. {describe(effects, carriers)}"
        width = round(96 * drawing.get_figwidth())
        return f"<p>{_image(buffer.getvalue(), alt, width)}</p>"

    def _ipython_display_(self) -> None:
        """The live widget, and beside it its twin, which a style within the widget hides while that lives."""
        self._displayed = True
        display((self._repr_mimebundle_() or {}) | {"text/plain": LIFELESS}, raw=True)
        display(HTML(self.twin()), display_id=self._name)


def _layers(start: int, width: int) -> str:
    return f"{start}" if width == 1 else f"{start}–{start + width - 1}"


def _figures(shown: Sequence[Shown]) -> str:
    """Pictures side by side, each with what it is and its CLIP-score."""
    before = shown[0].score
    return f'<div style="display: flex; flex-wrap: wrap; gap: 12px">{"".join(_figure(s, before) for s in shown)}</div>'


def _figure(shown: Shown, before: float | None) -> str:
    score = ""
    if shown.score is not None:
        change = "" if before in (None, shown.score) else f" ({shown.score - before:+.2f})".replace("-", "−")
        score = f"<br>CLIP-score {number(shown.score)}{change}"
    picture = _image(_png(shown.picture), shown.label, PICTURE, "image-rendering: pixelated")
    caption = f"<figcaption>{escape(shown.label)}{score}</figcaption>"
    return f'<figure style="margin: 0; width: {PICTURE}px">{picture}{caption}</figure>'


def _png(picture: Image) -> bytes:
    small = picture.copy()
    small.thumbnail((2 * PICTURE, 2 * PICTURE))
    small.save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def _image(png: bytes, alt: str, width: int, style: str = "") -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<img alt="{escape(alt)}" width="{width}" style="max-width: 100%; {style}" src="data:image/png;base64,{data}">'
    )
