"""What locogen does to a pipeline, each verb once, on whatever device the pipeline stands."""

import functools
import inspect

from locogen.editing.edit import Edit, fit_edit, undo_all
from locogen.editing.evaluation import evaluate
from locogen.editing.neurons import find_neurons
from locogen.editing.probes import Probe
from locogen.interventions.clamping import clamp
from locogen.interventions.prompts import generators, intervene, record
from locogen.localization.attention import attention_contribution
from locogen.localization.attribution.attribute import attribute
from locogen.localization.causal_tracing import causal_trace
from locogen.localization.localize import localize
from locogen.models.families import family_of
from locogen.models.layers import find_layers
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import generate
from locogen.pictures.score import scorer_for
from locogen.pictures.speed import speed
from locogen.plan import Concept, Intervention, PromptPair, with_target_runs
from support import tiny

CONCEPT = Concept("cat", "style", (PromptPair("a cat in b", "a b"),))
PAIRS = [("a cat in b", "a dog in b"), ("cat", "dog")]
FAST = {"num_inference_steps": 2, "guidance_scale": 3.0, "batch_size": 16, "progress": False}
SCORED = FAST | {"seeds": (0,), "scorer": tiny.FakeScorer()}
EVOLVING = (  # no localizer but locogen's own
    *("sd-3", "flux", "qwen-image", "flux-2", "flux-2-klein", "chroma", "z-image"),
    *("lumina-2", "hidream", "krea-2"),
)
OF_APART = ("edit", "share", "localize", "attribute", "search")  # of layers that read text apart


def refused(name, verb):
    """Whether a family refuses a verb: what it reads is not what the verb needs."""
    if (
        name in ("z-image", "lumina-2") and verb in OF_APART
    ):  # one matrix for text and picture in every layer
        return True
    if name == "hidream" and verb in ("attribute", "search"):  # its text is the last
        return True
    return name in EVOLVING and verb in ("trace", "contribution")


@functools.cache
def neurons_of(pipe):
    # Lumina 2 reads each text as it is long, and means are taken position by position.
    of_one_length = family_of(pipe).joined_mask is not None
    pairs = [PAIRS[0], ("b cat in a", "b dog in a")] if of_one_length else PAIRS
    return find_neurons(pipe, CONCEPT, layers=(0, 1), phrasings=pairs)


def edited_layers(pipe):
    """Two layers; none of a model whose layers all read text and picture with the same matrices."""
    return (0, 1) if any(not layer.joined for layer in find_layers(pipe)) else ()


@functools.cache
def edit_of(pipe):
    return fit_edit(
        pipe,
        CONCEPT,
        layers=edited_layers(pipe),
        phrasings=PAIRS,
        entry=family_of(pipe).text_projection is not None,
    )


def rows(pipe, layers=(0, 1), **more):
    pooled = {"pooled": "target"} if family_of(pipe).pooled and layers else {}
    # Lumina 2 takes a target as long as its prompt.
    target = "dog" if family_of(pipe).joined_mask is None else "a dog in b"
    plan = [Intervention("a cat in b", target, layers, seed, **pooled, **more) for seed in range(2)]
    return with_target_runs(plan) if family_of(pipe).joint_attention else plan


def pictures(pipe, plan, steps=2, **more):
    """A call of one's own, prompts encoded by the pipeline."""
    options = {k: v for k, v in family_of(pipe).options(pipe).items() if k != "negative_prompt"}
    if "clean_caption" in inspect.signature(type(pipe).__call__).parameters:
        options["clean_caption"] = False
    family = family_of(pipe)
    output = pipe(
        prompt=[row.prompt for row in plan],
        generator=generators(plan),
        num_inference_steps=steps,
        output_type="latent",
        **{family.guidance_argument: 3.0},
        **options,
        **more,
    )
    return family.pictures(output, "latent")


def interventions(pipe):
    """Windows at some steps and at all, one batch; then a call of one's own, with targets encoded before."""
    layers = (0, len(find_layers(pipe)) - 1)
    generate(pipe, rows(pipe, layers, timesteps=(0, 0)) + rows(pipe), **FAST)
    plan = rows(pipe, layers)
    with intervene(pipe, plan), record(pipe) as heard:
        pictures(pipe, plan)
    assert all(states[0].device == pipe.device for states in heard.values())


def clamped(pipe):
    selection = neurons_of(pipe).top(8)
    for options in ({}, {"to": "zero"}, {"to": 0.5, "steps": (1,)}):
        with clamp(pipe, selection, **options):
            generate(pipe, rows(pipe, ()), **FAST)


def edited(pipe, folder):
    edit = edit_of(pipe)
    before = fingerprint(pipe)
    with edit.applied(pipe):
        generate(pipe, ["a cat in b"], **FAST)
        assert fingerprint(pipe) != before
    edit.apply_(pipe, 0.5)
    edit.undo_(pipe)
    edit.save(folder / "edit.safetensors")
    Edit.load(folder / "edit.safetensors").apply_(pipe)
    undo_all(pipe)
    assert fingerprint(pipe) == before
    edit.refit(pipe)


def shared(pipe, folder):
    """As LoRA and as a whole model; with preserved prompts."""
    layers = edited_layers(pipe)
    options = {"phrasings": PAIRS, "preserve": ["a dog"], "entry": not layers}
    edit = fit_edit(pipe, CONCEPT, layers=layers, **options)
    edit.export(pipe, folder / "whole")
    if type(pipe).__name__ not in ("PixArtAlphaPipeline", "PixArtSigmaPipeline"):
        edit.to_lora(folder / "lora.safetensors")


def traced(pipe):
    causal_trace(pipe, CONCEPT, **SCORED)


def listened(pipe):
    attention_contribution(pipe, CONCEPT, seeds=(0,), **FAST)


def measured(pipe):
    localize(pipe, CONCEPT, window=len(find_layers(pipe)) - 1, **SCORED)
    probe = Probe("efficacy", "a cat in b", "red", ("red", "blue"))
    evaluate(pipe, {"edit": edit_of(pipe), "none": ()}, [probe], **SCORED)


def sped_up(pipe):
    with speed(pipe, "auto", batch_size=1):
        generate(pipe, rows(pipe), **FAST)


def attributed(pipe):
    """Both ways of gradients."""
    few = {name: FAST[name] for name in ("num_inference_steps", "guidance_scale", "progress")}
    few |= {"seeds": (0,), "points": 2, "most_points": 2}
    attribute(pipe, CONCEPT, steps=(0,), **few)
    attribute(pipe, CONCEPT, how="rows", steps=(0,), **few)
    attribute(pipe, CONCEPT, how="chain", **few)
    attribute(pipe, CONCEPT, how="chain", explain="score", scorer=scorer_for(pipe, "mini"), **few)


def searched(pipe):
    """Gradients propose, and pictures are made by what they say."""
    localize(pipe, CONCEPT, window=1, search="attribute", **SCORED)


VERBS = {
    "intervene": interventions,
    "clamp": clamped,
    "edit": edited,
    "share": shared,
    "trace": traced,
    "contribution": listened,
    "localize": measured,
    "speed": sped_up,
    "attribute": attributed,
    "search": searched,
}


def run(verb, pipe, folder):
    action = VERBS[verb]
    action(pipe, folder) if "folder" in inspect.signature(action).parameters else action(pipe)
