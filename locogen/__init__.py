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
    from .clamping import Selection, clamp
    from .contribution import attention_contribution, contribution_effect
    from .edit import Edit, fit_edit, undo_all
    from .errors import LocogenError, UnsupportedModel
    from .evaluation import Probe, compare, control_edits, evaluate, probes_for
    from .hooks import generators, intervene, record
    from .layers import Layer, find_layers
    from .localization import carrier, effect, localize
    from .models import load
    from .neurons import Neurons, find_neurons
    from .plan import Concept, Intervention, PromptPair, Settings, Window, sweep, with_riders
    from .plots import describe, plot_curve, plot_effect, plot_evaluation, plot_scores, plot_strip, plot_timesteps
    from .recovery import trace_effect
    from .rivals import Agreement, Located, agree, localizers, locate
    from .runs import Run, generate
    from .score import Scorer, scorer
    from .trace import causal_trace
    from .trace_plots import plot_trace
    from .widgets import explore

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
    "sweep",
    "trace_effect",
    "undo_all",
    "with_riders",
]

# module -> the public names it defines
_PUBLIC = {
    "catalog": ("concept", "concepts", "model_table"),
    "clamping": ("Selection", "clamp"),
    "contribution": ("attention_contribution", "contribution_effect"),
    "edit": ("Edit", "fit_edit", "undo_all"),
    "evaluation": ("Probe", "compare", "control_edits", "evaluate", "probes_for"),
    "errors": ("LocogenError", "UnsupportedModel"),
    "hooks": ("generators", "intervene", "record"),
    "layers": ("Layer", "find_layers"),
    "localization": ("carrier", "effect", "localize"),
    "models": ("load",),
    "neurons": ("Neurons", "find_neurons"),
    "plan": ("Concept", "Intervention", "PromptPair", "Settings", "Window", "sweep", "with_riders"),
    "plots": (
        "describe",
        "plot_curve",
        "plot_effect",
        "plot_evaluation",
        "plot_scores",
        "plot_strip",
        "plot_timesteps",
    ),
    "recovery": ("trace_effect",),
    "rivals": ("Agreement", "Located", "agree", "localizers", "locate"),
    "runs": ("Run", "generate"),
    "score": ("Scorer", "scorer"),
    "trace": ("causal_trace",),
    "trace_plots": ("plot_trace",),
    "widgets": ("explore",),
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
