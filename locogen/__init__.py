"""Find, show and edit where text-to-image models keep what they know.

>>> import locogen as loco
>>> pipe = loco.load("mini")  # an ordinary diffusers pipeline
>>> run = loco.localize(pipe, loco.concept("mini/van-gogh"), window=2, seeds=range(4))
>>> loco.plot_effect(loco.effect(run.table))

Importing locogen costs next to nothing: each name below is fetched from its module, and with it
torch, diffusers, transformers, pandas or seaborn, when it is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Each public name by the module that defines it. `__init__.pyi` says the same to type checkers.
_PUBLIC = {
    "errors": ("LocogenError", "UnsupportedModel"),
    "plan": (
        "Concept",
        "Intervention",
        "parse_ids",
        "parse_layers",
        "parse_names",
        "parse_numbers",
        "PromptPair",
        "Settings",
        "sweep",
        "Verdict",
        "Window",
        "with_riders",
        "with_target_runs",
    ),
    "finding": ("Finding",),
    "markup": ("interval_text", "readable"),
    "phrasings": ("default_phrasings", "shown_text", "subject_in"),
    "stats": ("crossed_bootstrap", "wilson"),
    "attacks.attack": ("attack",),
    "attacks.goal": ("NeverHad",),
    "attacks.harden": ("harden",),
    "attacks.result": ("Attack", "attack_kinds"),
    "benchmarks.answers": ("Answer",),
    "benchmarks.run": ("Benchmark", "benchmark"),
    "catalog": ("concept", "concepts", "model_table", "plants", "published_start"),
    "models.layers": ("find_layers", "Layer"),
    "models.load": ("load",),
    "interventions.clamping": ("clamp", "Selection"),
    "interventions.prompts": ("generators", "intervene", "record"),
    "interventions.states": ("find_states", "find_text_states"),
    "pictures.default_store": ("store_folder",),
    "pictures.runs": ("generate", "Run"),
    "pictures.score": ("default_scorer", "Scorer", "scorer"),
    "pictures.speed": ("Pace", "speed"),
    "localization.attention": ("attention_contribution", "contribution_effect"),
    "localization.attribution.attribute": ("attribute",),
    "localization.attribution.result": (
        "Attribution",
        "attribution_effect",
        "attribution_window",
    ),
    "localization.causal_tracing": ("causal_trace",),
    "localization.comparison": (
        "agree",
        "Agreement",
        "agreement",
        "localizers",
        "locate",
        "Located",
    ),
    "localization.effects": ("carrier", "effect"),
    "localization.localize": ("localize",),
    "localization.sample_size": ("plan_seeds",),
    "localization.trace_effects": ("best_state", "sides", "trace_effect"),
    "editing.control_edits": ("control_edits", "placebo_edit"),
    "editing.deafening": ("deafen",),
    "editing.edit": ("Edit", "fit_edit", "undo_all"),
    "editing.evaluation": ("compare", "evaluate", "lead", "summary"),
    "editing.files": ("kilobytes",),
    "editing.neurons": ("find_neurons", "Neurons"),
    "editing.rivals.choosing": ("best_arm", "editor_settings"),
    "editing.rivals.editors": ("edit_with", "editors"),
    "editing.rivals.orthogonal_values": ("fit_orthogonal_values", "OrthogonalValues"),
    "editing.rivals.steering": ("fit_steering", "Steering"),
    "editing.probes": ("Probe", "probes_for", "prompt_kind_probes"),
    "views.attribution_plots": ("attribution_shares", "plot_attribution"),
    "views.editors": ("describe_editors", "editor_table", "plot_editors"),
    "views.localizer_plots": ("plot_profiles", "plot_trace"),
    "views.notebook": ("save", "show"),
    "views.planted": ("describe_benchmark", "plot_places", "plot_shares", "score_table"),
    "views.plots": (
        "plot_curve",
        "plot_effect",
        "plot_evaluation",
        "plot_scores",
        "plot_strip",
        "plot_timesteps",
    ),
    "views.sentences": (
        "answer_edit",
        "describe_choice",
        "describe_clamping",
        "describe_edit",
        "describe_erasure",
        "describe_localizers",
        "describe_side_counts",
        "describe_sides",
        "describe_steps",
        "describe_trace",
        "share_text",
    ),
    "views.tables": ("describe", "evaluation_table", "strip_rows"),
    "views.widgets": ("explore",),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


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
