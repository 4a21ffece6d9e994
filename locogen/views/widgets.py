"""`explore(run)`: click a cell of the heatmap and see its pictures.

Each view also leaves a static twin, which stays in saved notebooks and pages where no widget runs.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets
from IPython.display import HTML, display, update_display
from markupsafe import Markup

from locogen.errors import LocogenError
from locogen.files import data_uri
from locogen.markup import macros, number
from locogen.types import Pipeline
from locogen.views.attribution_plots import By, attribution_matrix, plot_attribution
from locogen.views.explorer import Explorer, Look, Shown
from locogen.views.heatmap import Heatmap
from locogen.views.plots import figure_size, plot_effect
from locogen.views.tables import describe, effect_matrix

if TYPE_CHECKING:
    from PIL.Image import Image

    from locogen.localization.attribution.result import Attribution
    from locogen.pictures.runs import Run
    from locogen.pictures.score import Scorer

PICTURE = 150  # pixels across on the screen; small pictures are enlarged square by square
AT_ONCE = 3  # baseline, window and ceiling come together
LIFELESS = "In Jupyter this can be clicked. This is what was looked at last:"
STYLE = """
.{name} .widget-html-content {{ line-height: 1.4; overflow: visible; }}
.{name} .widget-html-content > p {{ margin: 4px 0; }}
.{name}-twin {{ display: none; }}
"""


def explore(
    run: Run,
    *,
    pipe: Pipeline = None,
    attribution: Attribution | None = None,
    scorer: Scorer | str | None = None,
    phrasings: Sequence[Any] | None = None,
    subject: str | None = None,
    becomes: str | None = None,
    ridge: float | None = None,
    ridge_v: float | None = None,
    tokens: str | None = None,
    preserve: Iterable[str] | None = None,
    preserve_weight: float | None = None,
    null_space: bool | None = None,
    ordinary: Iterable[str] | None = None,
    entry: bool | None = None,
    filtered: bool | None = None,
    anchored: bool | None = None,
    augmented: int | None = None,
    matrices: str | None = None,
    rounds: int | None = None,
    side: str | None = None,
) -> ExplorerBox:
    """Look at a run of `localize` by hand: its heatmap to walk on, its pictures below.

    Point at a cell of the heatmap, or walk there with the arrow keys, to read its effect; choose
    it, or any layers by the slider, a prompt, any seed; edit the window's layers at some strength
    (where the family of models has edits), or clamp some of their neurons. Whatever is made is
    scored as the run was: the captions, and a sentence, say what an edit did to this picture's
    score. All of it works by keyboard. Nothing is written, and the model is left as it was. In a
    saved notebook and in exported pages, where no widget runs, the last view stays.

    Args:
        run: A run of `localize`. Its own pictures are shown at once.
        pipe: The pipeline that makes other pictures; None: the run's own, if it still exists.
            Without any, only the run's own pictures can be looked at.
        attribution: What `attribute` says of a concept of the run: its map of layers × steps and
            × words stands under the heatmap. None: that of a run of search="attribute".
        scorer: What scores pictures that are made here; None: the run's own, if it has a name and
            can be loaded without the network. It must be the run's.
        phrasings: How edits are fitted: as in `fit_edit`, like all arguments below. None: its
            default.
        subject: The words that the phrasings share.
        becomes: What the concept turns into.
        ridge: λ of the keys, and of the values.
        ridge_v: λ of the values.
        tokens: Which states are edited.
        preserve: Prompts that should stay as they are.
        preserve_weight: How much they count.
        null_space: Whether to keep them exactly.
        ordinary: Captions whose directions should stay.
        entry: Whether to edit also the map by which text enters outside of the layers.
        filtered: Whether to keep only the preserved prompts that an edit would move most.
        anchored: Whether to keep also what every prompt holds.
        augmented: How often preserved states are repeated with noise.
        matrices: "kv", or "v" for values alone, "k" for keys.
        rounds: How many times the states that would bring the concept back are edited as well.
        side: "input" for other answers to the concept's states, "output" for no such answer at all.

    Returns:
        A widget: display it in Jupyter, or set its controls by code.

    Raises:
        LocogenError: For a run without scores, and a model whose weights are not the run's.

    Example:
        >>> pipe = load("mini")
        >>> pair = PromptPair("a picture of a cat in the style of neon", "a picture of a cat")
        >>> few = {"seeds": [0], "controls": False, "num_inference_steps": 1, "progress": False}
        >>> run = localize(pipe, Concept("neon", "style", (pair,)), window=8, **few)
        >>> box = explore(run, tokens="end")
        >>> box.look.prompt
        'a picture of a cat in the style of neon'
    """
    options = {
        "phrasings": phrasings,
        "subject": subject,
        "becomes": becomes,
        "ridge": ridge,
        "ridge_v": ridge_v,
        "tokens": tokens,
        "preserve": preserve,
        "preserve_weight": preserve_weight,
        "null_space": null_space,
        "ordinary": ordinary,
        "entry": entry,
        "filtered": filtered,
        "anchored": anchored,
        "augmented": augmented,
        "matrices": matrices,
        "rounds": rounds,
        "side": side,
    }
    chosen_options = {name: value for name, value in options.items() if value is not None}
    if pipe is None and run.made_by is not None:
        pipe = run.made_by()  # None where the pipeline is gone
    return ExplorerBox(Explorer(run, pipe, chosen_options, attribution, scorer))


class ExplorerBox(ipywidgets.VBox):
    """The controls over an `Explorer`.

    `heatmap.selected`, `prompt`, `seed`, `window`, `strength` and `neurons` may be set by code as
    well.
    """

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self._name = f"loco-{uuid.uuid4().hex[:8]}"  # CSS class: several may stand in one page
        self._busy = False  # while controls are set by code, their changes are not followed
        self._displayed = False
        self._concept = explorer.first_look().concept
        self._heatmap = ""
        self._make_controls(explorer.first_look())
        self.heatmap = Heatmap(explorer, self._name, self._slider_names())
        self.status = ipywidgets.HTML()
        self.status.add_class("loco-status")  # what changes in it is said by screen readers
        self.pictures = ipywidgets.HTML()
        self.map = ipywidgets.HTML()
        self._maps: dict[str, str] = {}  # by concept, drawn when first looked at
        style = ipywidgets.HTML(f"<style>{STYLE.format(name=self._name)}</style>")
        # On a narrow screen the controls stand below each other.
        wrap = ipywidgets.Layout(flex_flow="row wrap")
        controls = ipywidgets.HBox(self._controls(), layout=wrap)
        below = [controls, *self._remarks(explorer), self.status, self.pictures]
        super().__init__([style, self.heatmap, self.map, *below])
        self.add_class(self._name)
        self.add_class("loco-explore")
        self.heatmap.observe(self._cell_selected, "selected")
        for control in self._controls():
            control.observe(self._control_moved, "value")
        self._update()

    def _remarks(self, explorer: Explorer) -> list[ipywidgets.HTML]:
        """Why a control does nothing here, in words: nobody can point at one that is disabled."""
        reason = explorer.reason_for_no_edit()
        if not reason:
            return []
        return [ipywidgets.HTML(_rendered("status", text=f"Edit strength is off: {reason}."))]

    def _cell_selected(self, change: Any) -> None:
        if change.new is not None:
            self._choose(*change.new)

    def _control_moved(self, change: Any) -> None:
        self._update()

    def _make_controls(self, look: Look) -> None:
        explorer = self.explorer
        no_model = explorer.pipe is None
        common: dict[str, Any] = {
            "style": {"description_width": "6.5em"},
            "continuous_update": False,
        }
        prompts = [pair.prompt for pair in explorer.concepts[look.concept].pairs]
        self.prompt = ipywidgets.Dropdown(
            options=prompts, description="prompt", style=common["style"]
        )
        self.prompt.layout.width = "min(36em, 100%)"
        self.prompt.tooltip = "which of the concept's prompts is shown"
        self.seed = ipywidgets.BoundedIntText(look.seed, 0, 2**31 - 1, description="seed", **common)
        self.window = ipywidgets.IntRangeSlider(
            value=(look.first, look.last),
            min=0,
            max=explorer.n_layers - 1,
            description="layers",
            **common,
        )
        self.seed.tooltip = "the noise that pictures begin with; seeds of the run are shown at once"
        self.window.tooltip = "the first and the last layer that hear the target"
        no_edit = explorer.reason_for_no_edit()
        self.strength = ipywidgets.FloatSlider(
            0, min=0, max=2, step=0.25, description="edit strength", **common
        )
        self.strength.disabled = no_model or bool(no_edit)
        does = "how much of an edit of these layers is applied; 0: none"
        self.strength.tooltip = no_edit or does
        self.neurons = ipywidgets.IntSlider(
            0, min=0, max=1, description="neurons", disabled=no_model, **common
        )
        self.neurons.tooltip = (
            "how many neurons of each key and value matrix of these layers are clamped; 0: none"
        )

    def _controls(self) -> tuple[Any, ...]:
        return self.prompt, self.seed, self.window, self.strength, self.neurons

    def _slider_names(self) -> dict[str, Any]:
        """What a slider's handles are called: ipywidgets gives them no names."""
        ends = {self.window.description: ["first layer", "last layer"]}
        return {
            slider.description: {
                "handles": ends.get(slider.description, [slider.description]),
                "hint": slider.tooltip,
            }
            for slider in (self.window, self.strength, self.neurons)
        }

    @property
    def look(self) -> Look:
        """What is looked at now."""
        first, last = self.window.value
        return Look(
            concept=self._concept,
            prompt=str(self.prompt.value),
            first=first,
            last=last,
            seed=self.seed.value,
            strength=self.strength.value,
            neurons=self.neurons.value,
        )

    def _choose(self, concept: str, start: int) -> None:
        """A cell was selected."""
        if self._busy:
            return
        self._busy = True
        # Another concept has other prompts: its first one is shown.
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
            self._mark_cell(self.look)
            self.map.value = self._drawn_map(self._concept)
            self._show(self.look)
        except LocogenError as error:
            self.status.value = _rendered("status", text=str(error), bold=True)
        finally:
            self._busy = False
        # What is saved with the notebook follows what is seen.
        if self._displayed:
            self.heatmap.twin = self.twin()
            update_display(HTML(self.heatmap.twin), display_id=self._name)

    def _mark_cell(self, look: Look) -> None:
        """Mark the cell of the window looked at; windows of another width have none."""
        is_swept = len(look.window) == self.explorer.width
        self.heatmap.selected = (self._concept, look.first) if is_swept else None

    def _show(self, look: Look) -> None:
        """The pictures and the finding of a look, those that are quick first."""
        self.status.value = _rendered("status", text="Making pictures …")
        shown = []
        try:
            for picture in self.explorer.show(look):
                shown.append(picture)
                # Edited and clamped pictures come last and are slow: show the others meanwhile.
                if len(shown) >= AT_ONCE:
                    self.pictures.value = _figures(shown)
        except LocogenError:
            # What could be made stays. Pictures of an earlier look do not: captions name no seed.
            if not shown:
                self.pictures.value = ""
            raise
        sentences = f"{self.explorer.finding(look)} {self.explorer.outcome(look, shown)}".strip()
        self.status.value = _rendered("status", text=sentences)

    def twin(self) -> str:
        """The same view as plain HTML: the heatmap as a picture, the choice, and its pictures."""
        if not self._heatmap:
            self._heatmap = self._draw_heatmap()
        # The widgets' values were rendered by the same template.
        status = Markup(self.status.value)
        pictures = Markup(self.pictures.value)
        return _rendered(
            "twin",
            name=self._name,
            heatmap=Markup(self._heatmap + self.map.value),
            status=status,
            prompt=self.look.prompt,
            seed=self.look.seed,
            pictures=pictures,
        )

    def _draw_heatmap(self) -> str:
        import matplotlib.style
        from matplotlib.figure import Figure

        effects = self.explorer.effects
        carriers = self.explorer.carriers
        png = io.BytesIO()
        with matplotlib.style.context("default"):
            # A figure outside of pyplot: notebooks show those of pyplot by themselves.
            size = figure_size(effect_matrix(effects))
            drawing = Figure(figsize=size, dpi=120, layout="constrained")
            plot_effect(effects, carriers=carriers, ax=drawing.add_subplot())
            drawing.savefig(png, format="png")
        alt = f"Heatmap of the effect of each window. {describe(effects, carriers)}"
        width = round(96 * drawing.get_figwidth())
        return _rendered("heatmap", alt=alt, width=width, source=data_uri(png.getvalue()))

    def _drawn_map(self, concept: str) -> str:
        """The attribution map of a concept, by step and by word; empty where there is none."""
        if concept not in self.explorer.attributions:
            return ""
        if concept not in self._maps:
            self._maps[concept] = _map(self.explorer.attributions[concept])
        return self._maps[concept]

    def _ipython_display_(self) -> None:
        """The live widget and its twin, which a style in the widget hides while that lives."""
        self._displayed = True
        # Two outputs, for notebooks drop HTML beside a widget.
        display((self._repr_mimebundle_() or {}) | {"text/plain": LIFELESS}, raw=True)
        self.heatmap.twin = self.twin()
        display(HTML(self.heatmap.twin), display_id=self._name)


def _map(attribution: Attribution) -> str:
    """The maps of an attribution as pictures: layers × steps, and layers × words if it has any."""
    import matplotlib.style
    from matplotlib.figure import Figure

    shown = []
    table = attribution.table
    by_word: tuple[By, ...] = ("token",) if attribution.how != "rows" else ()
    for by in ("step", *by_word):
        png = io.BytesIO()
        with matplotlib.style.context("default"):
            size = figure_size(attribution_matrix(table, by))
            drawing = Figure(figsize=size, dpi=120, layout="constrained")
            plot_attribution(table, by=by, ax=drawing.add_subplot())
            drawing.savefig(png, format="png")
        words = "denoising step" if by == "step" else "word"
        alt = f"Map of the shares of each layer and {words}. {attribution.remark}."
        width = round(96 * drawing.get_figwidth())
        shown.append(_rendered("heatmap", alt=alt, width=width, source=data_uri(png.getvalue())))
    return "".join(shown)


def _rendered(macro: str, **values: Any) -> str:
    """A piece of `templates/twin.html`: every value that it is given is escaped."""
    return str(getattr(macros("locogen.views", "twin.html"), macro)(**values))


def _figures(shown: Sequence[Shown]) -> str:
    """Pictures side by side, each with what it is and its CLIP-score."""
    baseline = shown[0].score
    pictures = []
    for one in shown:
        source = data_uri(_png(one.picture))
        score = _score(one.score, baseline)
        pictures.append({"label": one.label, "source": source, "score": score})
    return _rendered("figures", pictures=pictures, width=PICTURE)


def _score(score: float | None, baseline: float | None) -> str:
    """The CLIP-score of a picture, and how it differs from the baseline's."""
    if score is None:
        return ""
    change = ""
    if baseline is not None and baseline != score:
        change = number(score - baseline)
        sign = "" if change.startswith("−") or not float(change) else "+"
        change = f" ({sign}{change})"
    return f"{number(score)}{change}"


def _png(picture: Image) -> bytes:
    small = picture.copy()  # `thumbnail` changes the picture itself
    small.thumbnail((2 * PICTURE, 2 * PICTURE))
    png = io.BytesIO()
    small.save(png, "png")
    return png.getvalue()
