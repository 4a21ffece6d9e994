# The public names and their types: the same table as `__init__._PUBLIC` (a test compares them).

from .attacks.attack import (
    attack as attack,
)
from .attacks.goal import (
    NeverHad as NeverHad,
)
from .attacks.harden import (
    harden as harden,
)
from .attacks.result import (
    Attack as Attack,
    attack_kinds as attack_kinds,
)
from .benchmarks.answers import (
    Answer as Answer,
)
from .benchmarks.run import (
    Benchmark as Benchmark,
    benchmark as benchmark,
)
from .catalog import (
    concept as concept,
    concepts as concepts,
    model_table as model_table,
    plants as plants,
    published_start as published_start,
)
from .editing.control_edits import (
    control_edits as control_edits,
    placebo_edit as placebo_edit,
)
from .editing.deafening import (
    deafen as deafen,
)
from .editing.edit import (
    Edit as Edit,
    fit_edit as fit_edit,
    undo_all as undo_all,
)
from .editing.evaluation import (
    compare as compare,
    evaluate as evaluate,
    lead as lead,
    summary as summary,
)
from .editing.files import (
    kilobytes as kilobytes,
)
from .editing.neurons import (
    Neurons as Neurons,
    find_neurons as find_neurons,
)
from .editing.probes import (
    Probe as Probe,
    probes_for as probes_for,
    prompt_kind_probes as prompt_kind_probes,
)
from .editing.rivals.choosing import (
    best_arm as best_arm,
    editor_settings as editor_settings,
)
from .editing.rivals.editors import (
    edit_with as edit_with,
    editors as editors,
)
from .editing.rivals.orthogonal_values import (
    OrthogonalValues as OrthogonalValues,
    fit_orthogonal_values as fit_orthogonal_values,
)
from .editing.rivals.steering import (
    Steering as Steering,
    fit_steering as fit_steering,
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
from .interventions.states import (
    find_states as find_states,
    find_text_states as find_text_states,
)
from .localization.attention import (
    attention_contribution as attention_contribution,
    contribution_effect as contribution_effect,
)
from .localization.attribution.attribute import (
    attribute as attribute,
)
from .localization.attribution.result import (
    Attribution as Attribution,
    attribution_effect as attribution_effect,
    attribution_window as attribution_window,
)
from .localization.causal_tracing import (
    causal_trace as causal_trace,
)
from .localization.comparison import (
    Agreement as Agreement,
    Located as Located,
    agree as agree,
    agreement as agreement,
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
    best_state as best_state,
    sides as sides,
    trace_effect as trace_effect,
)
from .markup import (
    interval_text as interval_text,
    readable as readable,
)
from .models.layers import (
    Layer as Layer,
    find_layers as find_layers,
)
from .models.load import (
    load as load,
)
from .phrasings import (
    default_phrasings as default_phrasings,
    shown_text as shown_text,
    subject_in as subject_in,
)
from .pictures.default_store import (
    store_folder as store_folder,
)
from .pictures.runs import (
    Run as Run,
    generate as generate,
)
from .pictures.score import (
    Scorer as Scorer,
    default_scorer as default_scorer,
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
    Verdict as Verdict,
    Window as Window,
    parse_ids as parse_ids,
    parse_layers as parse_layers,
    parse_names as parse_names,
    parse_numbers as parse_numbers,
    sweep as sweep,
    with_riders as with_riders,
    with_target_runs as with_target_runs,
)
from .stats import (
    crossed_bootstrap as crossed_bootstrap,
    wilson as wilson,
)
from .views.attribution_plots import (
    attribution_shares as attribution_shares,
    plot_attribution as plot_attribution,
)
from .views.editors import (
    describe_editors as describe_editors,
    editor_table as editor_table,
    plot_editors as plot_editors,
)
from .views.localizer_plots import (
    plot_profiles as plot_profiles,
    plot_trace as plot_trace,
)
from .views.notebook import (
    save as save,
    show as show,
)
from .views.planted import (
    describe_benchmark as describe_benchmark,
    plot_places as plot_places,
    plot_shares as plot_shares,
    score_table as score_table,
)
from .views.plots import (
    plot_curve as plot_curve,
    plot_effect as plot_effect,
    plot_evaluation as plot_evaluation,
    plot_scores as plot_scores,
    plot_strip as plot_strip,
    plot_timesteps as plot_timesteps,
)
from .views.sentences import (
    answer_edit as answer_edit,
    describe_choice as describe_choice,
    describe_clamping as describe_clamping,
    describe_edit as describe_edit,
    describe_erasure as describe_erasure,
    describe_localizers as describe_localizers,
    describe_side_counts as describe_side_counts,
    describe_sides as describe_sides,
    describe_steps as describe_steps,
    describe_trace as describe_trace,
    share_text as share_text,
)
from .views.tables import (
    describe as describe,
    evaluation_table as evaluation_table,
    strip_rows as strip_rows,
)
from .views.widgets import (
    explore as explore,
)

__version__: str
__all__: list[str]
