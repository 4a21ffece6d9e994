"""The public names and their types: the same table as `__init__._PUBLIC` (a test compares them)."""

from .catalog import (
    concept as concept,
    concepts as concepts,
    model_table as model_table,
)
from .editing.edit import (
    Edit as Edit,
    fit_edit as fit_edit,
    undo_all as undo_all,
)
from .editing.evaluation import (
    Probe as Probe,
    compare as compare,
    control_edits as control_edits,
    evaluate as evaluate,
    probes_for as probes_for,
)
from .editing.neurons import (
    Neurons as Neurons,
    find_neurons as find_neurons,
)
from .errors import (
    LocogenError as LocogenError,
    UnsupportedModel as UnsupportedModel,
)
from .finding import (
    Finding as Finding,
)
from .interventions.clamping import (
    Selection as Selection,
    clamp as clamp,
)
from .interventions.prompts import (
    generators as generators,
    intervene as intervene,
    record as record,
)
from .localization.attention import (
    attention_contribution as attention_contribution,
    contribution_effect as contribution_effect,
)
from .localization.causal_tracing import (
    causal_trace as causal_trace,
)
from .localization.comparison import (
    Agreement as Agreement,
    Located as Located,
    agree as agree,
    localizers as localizers,
    locate as locate,
)
from .localization.effects import (
    carrier as carrier,
    effect as effect,
)
from .localization.localize import (
    localize as localize,
)
from .localization.sample_size import (
    plan_seeds as plan_seeds,
)
from .localization.trace_effects import (
    trace_effect as trace_effect,
)
from .models.layers import (
    Layer as Layer,
    find_layers as find_layers,
)
from .models.load import (
    load as load,
)
from .pictures.runs import (
    Run as Run,
    generate as generate,
)
from .pictures.score import (
    Scorer as Scorer,
    scorer as scorer,
)
from .pictures.speed import (
    Pace as Pace,
    speed as speed,
)
from .plan import (
    Concept as Concept,
    Intervention as Intervention,
    PromptPair as PromptPair,
    Settings as Settings,
    Window as Window,
    sweep as sweep,
    with_riders as with_riders,
    with_target_runs as with_target_runs,
)
from .views.localizer_plots import (
    plot_trace as plot_trace,
)
from .views.notebook import (
    save as save,
    show as show,
)
from .views.plots import (
    describe as describe,
    plot_curve as plot_curve,
    plot_effect as plot_effect,
    plot_evaluation as plot_evaluation,
    plot_scores as plot_scores,
    plot_strip as plot_strip,
    plot_timesteps as plot_timesteps,
)
from .views.widgets import (
    explore as explore,
)

__version__: str
__all__: list[str]
