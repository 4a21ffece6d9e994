"""Find, show and edit where text-to-image models keep what they know.

>>> import locogen as loco
>>> pipe = loco.load("mini")  # an ordinary diffusers pipeline
>>> run = loco.localize(pipe, loco.concept("mini/van-gogh"), window=2, seeds=range(4))
>>> loco.plot_effect(loco.effect(run.table))

Importing locogen costs next to nothing: each name below is fetched from its module, and with it torch,
diffusers, transformers, pandas or seaborn, when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .catalog import concept, concepts, model_table
    from .editing.edit import Edit, fit_edit, undo_all
    from .editing.evaluation import Probe, compare, control_edits, evaluate, probes_for
    from .editing.neurons import Neurons, find_neurons
    from .errors import LocogenError, UnsupportedModel
    from .interventions.clamping import Selection, clamp
    from .interventions.prompts import generators, intervene, record
    from .localization.attention import attention_contribution, contribution_effect
    from .localization.causal_tracing import causal_trace
    from .localization.comparison import Agreement, Located, agree, localizers, locate
    from .localization.effects import carrier, effect
    from .localization.localize import localize
    from .localization.sample_size import plan_seeds
    from .localization.trace_effects import trace_effect
    from .models.layers import Layer, find_layers
    from .models.load import load
    from .pictures.runs import Run, generate
    from .pictures.score import Scorer, scorer
    from .pictures.speed import Pace, speed
    from .plan import Concept, Intervention, PromptPair, Settings, Window, sweep, with_riders
    from .views.localizer_plots import plot_trace
    from .views.plots import describe, plot_curve, plot_effect, plot_evaluation, plot_scores, plot_strip, plot_timesteps
    from .views.widgets import explore

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "Concept",
    "Edit",
    "Intervention",
    "Layer",
    "Located",
    "LocogenError",
    "Neurons",
    "Pace",
    "Probe",
    "PromptPair",
    "Run",
    "Scorer",
    "Selection",
    "Settings",
    "UnsupportedModel",
    "Window",
    "agree",
    "attention_contribution",
    "carrier",
    "causal_trace",
    "clamp",
    "compare",
    "concept",
    "concepts",
    "contribution_effect",
    "control_edits",
    "describe",
    "effect",
    "evaluate",
    "explore",
    "find_layers",
    "find_neurons",
    "fit_edit",
    "generate",
    "generators",
    "intervene",
    "load",
    "localize",
    "localizers",
    "locate",
    "model_table",
    "plan_seeds",
    "plot_curve",
    "plot_effect",
    "plot_evaluation",
    "plot_scores",
    "plot_strip",
    "plot_timesteps",
    "plot_trace",
    "probes_for",
    "record",
    "scorer",
    "speed",
    "sweep",
    "trace_effect",
    "undo_all",
    "with_riders",
]

# module -> the public names it defines
_PUBLIC = {
    "catalog": ("concept", "concepts", "model_table"),
    "interventions.clamping": ("Selection", "clamp"),
    "localization.attention": ("attention_contribution", "contribution_effect"),
    "editing.edit": ("Edit", "fit_edit", "undo_all"),
    "localization.effects": ("carrier", "effect"),
    "editing.evaluation": ("Probe", "compare", "control_edits", "evaluate", "probes_for"),
    "errors": ("LocogenError", "UnsupportedModel"),
    "interventions.prompts": ("generators", "intervene", "record"),
    "models.layers": ("Layer", "find_layers"),
    "localization.localize": ("localize",),
    "models.load": ("load",),
    "editing.neurons": ("Neurons", "find_neurons"),
    "pictures.speed": ("Pace", "speed"),
    "plan": ("Concept", "Intervention", "PromptPair", "Settings", "Window", "sweep", "with_riders"),
    "views.plots": (
        "describe",
        "plot_curve",
        "plot_effect",
        "plot_evaluation",
        "plot_scores",
        "plot_strip",
        "plot_timesteps",
    ),
    "localization.trace_effects": ("trace_effect",),
    "localization.comparison": ("Agreement", "Located", "agree", "localizers", "locate"),
    "pictures.runs": ("Run", "generate"),
    "pictures.score": ("Scorer", "scorer"),
    "localization.sample_size": ("plan_seeds",),
    "localization.causal_tracing": ("causal_trace",),
    "views.localizer_plots": ("plot_trace",),
    "views.widgets": ("explore",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module on first use (PEP 562), and keep it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: see dir({__name__})")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, those not fetched yet included."""
    return sorted({*globals(), *__all__})
