"""All that depends on a model's family: its denoiser, its encoding, and where text enters.

To add a family: one `Family` in `FAMILIES`, keyed by the pipeline's class name. Nothing else in
locogen asks what kind of model it has.
"""

from __future__ import annotations

import re
import threading
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError, UnsupportedModel
from locogen.models import denoisers, text as texts
from locogen.models.compilation import uncompiled_module
from locogen.models.denoisers import Change
from locogen.models.hooks import DenoisersInTurn, Hook, parts_of
from locogen.models.offload import taken_back
from locogen.models.text import EncodedPrompts, PromptEncoding, TokenSpan
from locogen.phrasings import Phrasing, occurrences, shared_length, without_marks
from locogen.plan import Concept
from locogen.types import Pipeline

if TYPE_CHECKING:
    from torch import Tensor

_ENCODING = threading.RLock()
# The same object for the same denoisers: what is known of them is kept by it.
_IN_TURN: WeakKeyDictionary[Any, WeakKeyDictionary[Any, DenoisersInTurn]] = WeakKeyDictionary()


def _no_options(pipe: Pipeline) -> dict[str, Any]:
    return {}


def _images(output: Any, output_type: str) -> Any:
    return output.images


def _same_time(pipe: Pipeline, timestep: Any) -> Any:
    return timestep


def _accept(pipe: Pipeline) -> None:
    pass


def _one_denoiser(pipe: Pipeline) -> tuple[str, ...]:
    return ()


def _current_time(pipe: Pipeline, timestep: Any) -> Any:
    now = getattr(pipe, "current_timestep", None)
    return 1000 * timestep if now is None else now  # modular pipelines do not keep it


@dataclass(frozen=True)
class Family:
    """What locogen must know of a family of pipelines."""

    name: str

    # --- the denoiser ---

    denoiser: str
    """attribute of the pipeline; of several denoisers the first one's"""

    is_denoiser: Callable[[Any], bool]
    """whether a bare denoiser is of this family"""

    dummy_inputs: Callable[[Any], Mapping[str, Any]]
    """`(denoiser)`: keyword arguments of the smallest forward pass"""

    check: Callable[[Any], None]
    """`(denoiser)`: raises where an intervention would be wrong"""

    # --- from prompts to states ---

    encode: Callable[[Any, Sequence[str], bool], EncodedPrompts]
    """`(pipe, prompts, guided)`: the prompts, encoded, and if guided the pipeline's negative"""

    token_spans: Callable[[Any, str], tuple[TokenSpan, ...]]
    """`(pipe, normalized prompt)`: where its tokens stand in the states

    One span for each encoder that has separate positions; the one that reads most of a prompt is
    the last.
    """

    encoding_of: Callable[[tuple[Any, ...]], PromptEncoding] = texts.states_of
    """`(returned)`: the prompts' encoding among what `encode_prompt` returns"""

    turns: Callable[[Any], Sequence[str]] = _one_denoiser
    """`(pipe)`: attributes of denoisers that take the steps in turn, in order; or fewer than two"""

    check_pipeline: Callable[[Any], None] = _accept
    """`(pipe)`: raises where the pipeline's other parts make an intervention wrong"""

    normalize: Callable[[str], str] = str
    """`(prompt)`: what the pipeline makes of a prompt before its tokenizer"""

    sets_padding: bool = False
    """whether encoding sets the tokenizer's padding side: then it is not a setting of the model"""

    dropped_tokens: Callable[[Any], int] | None = None
    """`(pipe)`: how many tokens its encoder reads before those whose states layers get

    None: as many as it reads more than there are states.
    """

    is_tokens_first: bool = False
    """whether the encoder's parts put out (tokens, rows, width), and not (rows, tokens, width)"""

    tapped_layers: Callable[[Any], tuple[int, ...]] | None = None
    """`(pipe)`: which layers of its encoder each token is taken from, if several

    Counted as the encoder's hidden states are: 0 is the embedding. Their states lie side by side in
    width, or on an axis of their own.
    """

    encoded_by: str | None = None
    """what encodes prompts where no pipeline of diffusers does so in its call

    Then locogen acts on calls of the denoiser that others make, and makes no pictures itself.
    """

    # --- calls of the denoiser ---

    text_argument: str = "encoder_hidden_states"
    """name of the denoiser's argument for encoded text: one tensor, or a list of one a row"""

    time_argument: str = "timestep"
    """name of the denoiser's argument for the time"""

    layer_text: str = "encoder_hidden_states"
    """name of a layer's argument for text beside the picture"""

    layer_states: str = "hidden_states"
    """name of a layer's argument for the picture, or for text and picture as one sequence"""

    joined_length: Callable[[Mapping[str, Any]], int] | None = None
    """`(dummy inputs)`: how many tokens a layer gets that reads text and picture as one sequence

    None: there is no such layer.
    """

    joined_text: Callable[[Mapping[str, Any], int], slice] = denoisers.text_first
    """`(denoiser's arguments, tokens of text)`: where such a sequence holds the text"""

    joined_mask: str | None = None
    """name of the denoiser's argument that says which of those tokens are text in each row

    None: in every row all of them are. Else the picture follows where a row's own text ends.
    """

    length_class: Callable[[Any, str], int] | None = None
    """`(pipe, prompt)`: how long a prompt counts where the picture's positions follow the text

    Prompt and target must be equal in it. None: positions do not depend on the text.
    """

    written_into_list: Callable[[Any, str], str] | None = None
    """`(pipe, prompt)`: what the pipeline writes in place of a prompt into its caller's own list

    None: it leaves the list as it is.
    """

    # --- from states to the matrices of a layer ---

    matrices: Callable[[Any], Mapping[str, Any]] = denoisers.keys_and_values
    """`(layer.module)`: the linear maps "k" and "v" that read text"""

    columns: Callable[[Any], Mapping[str, slice]] = denoisers.whole_columns
    """`(layer.module)`: which columns of what each of them puts out are keys or values"""

    project_states: Callable[[Any, Tensor], Tensor] = denoisers.unchanged
    """`(denoiser, states)`: what the denoiser makes of encoded states before its layers get them"""

    norm_states: Callable[[Any, Tensor], Tensor] = denoisers.unchanged
    """`(layer.module, projected states)`: what a layer's matrices read of them"""

    joint_attention: bool = False
    """whether text changes from block to block together with the picture

    Then a layer takes a target from the target's own run in the same batch, and not from its
    encoding.
    """

    layer_mask: str | None = None
    """name of a layer's argument that says which tokens of text it reads, with joint attention"""

    pooled: Callable[[Any, Change], list[Hook]] | None = None
    """`(denoiser, change)`: hooks that change the pooled text; None if only layers read text"""

    # --- calls of the pipeline ---

    time: Callable[[Any, Any], Any] = _same_time
    """`(pipe, timestep)`: the scheduler's timestep for the one that the denoiser is called with"""

    options: Callable[[Any], dict[str, Any]] = _no_options
    """`(pipe)`: keyword arguments that every call of the pipeline takes"""

    guidance_argument: str = "guidance_scale"
    """name of the pipeline's argument for the scale of guidance"""

    copies_argument: str = "num_images_per_prompt"
    """name of the pipeline's argument for the number of pictures of each prompt"""

    pictures: Callable[[Any, str], Any] = _images
    """`(output, output type)`: the pictures in what the pipeline returns"""

    # --- edits ---

    tokens: Literal["last_subject", "subject"] = "last_subject"
    """which states hold a subject

    The subject's last token where an encoder reads from left to right; all its tokens where each
    reads all others.
    """

    text_projection: str | None = None
    """name of the linear map by which text enters outside of the layers"""

    text_projection_input: Callable[[Any, PromptEncoding, Sequence[int]], Tensor] | None = None
    """`(denoiser, encoding, positions)`: what that map reads, (rows, width)"""

    kohya_name: Callable[[Any, str], str] | None = None
    """`(denoiser, module's name)`: its name in LoRA files of kohya's tools, if it has one"""


def _lowered(prompt: str) -> str:
    """What diffusers' `_text_preprocessing` makes of a prompt if it does not clean the caption."""
    return prompt.lower().strip()


def _t5_span(tokenizer: str, limit: int) -> Callable[[Any, str], tuple[TokenSpan, ...]]:
    return lambda pipe, prompt: (texts.token_span(pipe, getattr(pipe, tokenizer), prompt, limit),)


def _exact_size(pipe: Pipeline) -> dict[str, Any]:
    """Pictures of the checkpoint's own size; and no negative prompt, since it comes encoded."""
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    return {"negative_prompt": None, "use_resolution_binning": False, "height": side, "width": side}


def _sized(pipe: Pipeline) -> dict[str, Any]:
    """Pictures of the pipeline's usual size, or of `default_sample_size` latents a side if set."""
    side = getattr(pipe, "default_sample_size", None)
    if side is None:
        return {}
    of_a_picture = getattr(pipe, "vae_scale_factor", None)
    pixels = side * (of_a_picture or pipe.vae_scale_factor_spatial)  # Wan makes videos
    return {"height": pixels, "width": pixels}


def _one_frame(pipe: Pipeline) -> dict[str, Any]:
    """A video of one frame is a picture."""
    return {"num_frames": 1, **_sized(pipe)}


def _flux2_length(pipe: Pipeline) -> dict[str, Any]:
    """As many tokens as its prompts are encoded with."""
    return {"max_sequence_length": pipe.tokenizer_max_length}


def _first_frames(output: Any, output_type: str) -> Any:
    """The only frame of each video; of latents, (videos, channels, frames, height, width)."""
    frames = output.frames
    if output_type == "latent":
        return frames[:, :, 0]
    if output_type == "pil":
        return [video[0] for video in frames]
    return frames[:, 0]


_SD = Family(
    name="Stable Diffusion 1 and 2",
    denoiser="unet",
    is_denoiser=denoisers.is_unet_with(None),
    dummy_inputs=denoisers.unet_inputs,
    encode=texts.encode_sd,
    check=denoisers.check_unmodified,
    token_spans=texts.clip_spans,
    kohya_name=denoisers.kohya_name_plain,
)
_PIXART = replace(
    _SD,
    name="PixArt-α",
    denoiser="transformer",
    is_denoiser=denoisers.has_class("PixArtTransformer2DModel"),
    dummy_inputs=denoisers.caption_inputs,
    encode=texts.encode_masked,
    encoding_of=texts.masked_states_of,
    normalize=_lowered,
    token_spans=_t5_span("tokenizer", 120),
    project_states=denoisers.project_caption,
    options=_exact_size,
    tokens="subject",
    kohya_name=None,
)
_SDXL = replace(
    _SD,
    name="SD-XL",
    is_denoiser=denoisers.is_unet_with("text_time"),
    encode=texts.encode_sdxl,
    encoding_of=texts.pooled_states_of,
    pooled=denoisers.added_text,
    text_projection="add_embedding.linear_1",
    text_projection_input=denoisers.pooled_input,
    kohya_name=denoisers.kohya_name_sdxl,
)
_SD3 = replace(
    _SD,
    name="Stable Diffusion 3",
    denoiser="transformer",
    is_denoiser=denoisers.has_class("SD3Transformer2DModel"),
    dummy_inputs=denoisers.joint_inputs,
    encode=texts.encode_sd3,
    encoding_of=texts.pooled_states_of,
    token_spans=texts.sd3_spans,
    matrices=denoisers.added_keys_and_values,
    pooled=denoisers.pooled_projections,
    joint_attention=True,
    tokens="subject",
    text_projection="context_embedder",
    text_projection_input=denoisers.embedder_input,
    kohya_name=None,
)
_FLUX = replace(
    _SD3,
    name="FLUX.1",
    is_denoiser=denoisers.has_class("FluxTransformer2DModel"),
    joined_length=denoisers.joined_length,
    encode=texts.encode_flux,
    encoding_of=texts.flux_states_of,
    token_spans=texts.flux_spans,
    # The denoiser is called with a thousandth of it, rounded.
    time=_current_time,
)
_FLUX2 = replace(
    _FLUX,
    name="FLUX.2",
    is_denoiser=denoisers.has_class("Flux2Transformer2DModel"),
    dummy_inputs=denoisers.flux2_inputs,
    encode=texts.encode_flux2,
    encoding_of=texts.states_of,
    token_spans=texts.flux2_spans,
    tapped_layers=texts.flux2_tapped,
    matrices=denoisers.flux2_keys_and_values,
    columns=denoisers.flux2_columns,
    pooled=None,
    options=_flux2_length,
    tokens="last_subject",
)
_FLUX3 = replace(
    _FLUX2,
    name="FLUX.3",
    is_denoiser=denoisers.has_class("Flux3Transformer2DModel"),
    dummy_inputs=denoisers.flux3_inputs,
    encoded_by="diffusers.modular_pipelines.flux3.Flux3TextEncoderStep",
    tapped_layers=None,
    # All its layers are as FLUX's single blocks, with a matrix for each of keys and values. Before
    # them text passes through blocks of its own, which are a part of the encoding.
    matrices=denoisers.keys_and_values,
    columns=denoisers.whole_columns,
    options=_no_options,
    text_projection=None,
    text_projection_input=None,
)
# Known by their denoiser alone, since no pipeline of diffusers encodes and draws in one call.
WITHOUT_PIPELINE = (_FLUX3,)
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": _SD,
    "LatentConsistencyModelPipeline": replace(
        _SD, name="Latent Consistency", encode=texts.encode_lcm
    ),
    "StableDiffusionXLPipeline": _SDXL,
    "KolorsPipeline": replace(
        _SDXL,
        name="Kolors",
        is_denoiser=denoisers.is_unet_with("text_time", projected=True),
        token_spans=texts.kolors_spans,
        is_tokens_first=True,
        project_states=denoisers.project_text,
        kohya_name=None,
    ),
    "IFPipeline": replace(
        _SD,
        name="DeepFloyd IF",
        is_denoiser=denoisers.is_unet_with("text", projected=True),
        encode=texts.encode_if,
        normalize=_lowered,
        token_spans=_t5_span("tokenizer", 77),
        matrices=denoisers.added_keys_and_values,
        project_states=denoisers.project_text,
        norm_states=denoisers.norm_text,
        pooled=denoisers.pooled_inside,
        tokens="subject",
        kohya_name=None,
    ),
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": _FLUX,
    "Flux2Pipeline": _FLUX2,
    "Flux2KleinPipeline": replace(
        _FLUX2, name="FLUX.2 klein", encode=texts.encode_klein, token_spans=texts.klein_spans
    ),
    "ChromaPipeline": replace(
        _FLUX,
        name="Chroma",
        is_denoiser=denoisers.has_class("ChromaTransformer2DModel"),
        dummy_inputs=denoisers.chroma_inputs,
        encode=texts.encode_chroma,
        encoding_of=texts.chroma_states_of,
        token_spans=_t5_span("tokenizer", texts.CHROMA_LIMIT),
        layer_mask="attention_mask",
        pooled=None,
    ),
    "ZImagePipeline": replace(
        _FLUX,
        name="Z-Image",
        is_denoiser=denoisers.has_class("ZImageTransformer2DModel"),
        dummy_inputs=denoisers.z_image_inputs,
        text_argument="cap_feats",
        time_argument="t",
        joined_length=denoisers.z_image_joined_length,
        joined_text=denoisers.z_image_text,
        length_class=texts.z_image_length,
        written_into_list=texts.z_image_template,
        encode=texts.encode_z_image,
        encoding_of=texts.z_image_states_of,
        token_spans=texts.z_image_spans,
        dropped_tokens=lambda pipe: 0,
        matrices=denoisers.keys_and_values,
        pooled=None,
        time=lambda pipe, timestep: 1000 - 1000 * timestep,
        options=_sized,
        tokens="last_subject",
        text_projection=None,
        text_projection_input=None,
    ),
    "QwenImagePipeline": replace(
        _SD3,
        name="Qwen-Image",
        is_denoiser=denoisers.has_class("QwenImageTransformer2DModel"),
        dummy_inputs=denoisers.qwen_inputs,
        encode=texts.encode_qwen,
        encoding_of=texts.qwen_states_of,
        token_spans=texts.qwen_spans,
        dropped_tokens=lambda pipe: pipe.prompt_template_encode_start_idx,
        layer_mask="encoder_hidden_states_mask",
        pooled=None,
        guidance_argument="true_cfg_scale",
        time=_current_time,
        tokens="last_subject",
        text_projection="txt_in",
        text_projection_input=denoisers.normed_input,
        kohya_name=denoisers.kohya_name_plain,
    ),
    "Krea2Pipeline": replace(
        _FLUX,
        name="Krea 2",
        is_denoiser=denoisers.has_class("Krea2Transformer2DModel"),
        dummy_inputs=denoisers.krea2_inputs,
        encode=texts.encode_krea2,
        encoding_of=texts.krea2_states_of,
        token_spans=texts.krea2_spans,
        tapped_layers=lambda pipe: tuple(pipe.text_encoder_select_layers),
        matrices=denoisers.keys_and_values,
        layer_mask="attention_mask",
        pooled=None,
        options=_sized,
        tokens="last_subject",
        text_projection="txt_in.linear_1",
        text_projection_input=denoisers.fused_input,
    ),
    "WanPipeline": replace(
        _SD,
        name="Wan",
        denoiser="transformer",
        is_denoiser=denoisers.has_class("WanTransformer3DModel"),
        dummy_inputs=denoisers.wan_inputs,
        check=denoisers.check_wan,
        turns=denoisers.wan_turns,
        check_pipeline=denoisers.check_turns,
        encode=texts.encode_wan,
        normalize=texts.cleaned_by_wan,
        token_spans=_t5_span("tokenizer", texts.WAN_LIMIT),
        project_states=denoisers.project_wan,
        options=_one_frame,
        copies_argument="num_videos_per_prompt",
        pictures=_first_frames,
        tokens="subject",
        kohya_name=denoisers.kohya_name_wan,
    ),
    "Lumina2Pipeline": replace(
        _FLUX,
        name="Lumina 2",
        is_denoiser=denoisers.has_class("Lumina2Transformer2DModel"),
        dummy_inputs=denoisers.lumina_inputs,
        joined_length=denoisers.lumina_joined_length,
        joined_text=denoisers.lumina_text,
        joined_mask="encoder_attention_mask",
        length_class=texts.lumina_length,
        encode=texts.encode_masked,
        encoding_of=texts.masked_states_of,
        token_spans=texts.lumina_spans,
        matrices=denoisers.keys_and_values,
        pooled=None,
        time=lambda pipe, timestep: 1000 - 1000 * timestep,
        options=_sized,
        tokens="last_subject",
        text_projection=None,
        text_projection_input=None,
    ),
    "HiDreamImagePipeline": replace(
        _SD3,
        name="HiDream",
        is_denoiser=denoisers.has_class("HiDreamImageTransformer2DModel"),
        dummy_inputs=denoisers.hidream_inputs,
        text_argument="encoder_hidden_states_t5",
        time_argument="timesteps",
        layer_text="norm_encoder_hidden_states",
        layer_states="norm_hidden_states",
        joined_length=denoisers.hidream_joined_length,
        joined_text=denoisers.hidream_text,
        encode=texts.encode_hidream,
        encoding_of=texts.hidream_states_of,
        token_spans=texts.hidream_spans,
        matrices=denoisers.hidream_keys_and_values,
        pooled=denoisers.pooled_embeds,
        text_projection=None,
        text_projection_input=None,
    ),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": replace(
        _PIXART, name="PixArt-Σ", token_spans=_t5_span("tokenizer", 300)
    ),
    "SanaPipeline": replace(
        _PIXART,
        name="Sana",
        is_denoiser=denoisers.has_class("SanaTransformer2DModel"),
        token_spans=texts.sana_spans,
        tokens="last_subject",
        time=lambda pipe, timestep: timestep / pipe.transformer.config.timestep_scale,
        sets_padding=True,
    ),
}


def family_of(model: Any) -> Family:
    """The family of a pipeline, or of a bare denoiser.

    Raises:
        UnsupportedModel: The model is of none of them, or has an IP-Adapter.
        LocogenError: A feature cache skips blocks, so that interventions would be wrong.
    """
    uncompiled = uncompiled_module(model)
    family = FAMILIES.get(type(uncompiled).__name__)
    if family is None:
        parts = _denoisers_of_modular(uncompiled) or [uncompiled]
        families = (*FAMILIES.values(), *WITHOUT_PIPELINE)
        by_denoiser = (one for one in families for part in parts if one.is_denoiser(part))
        family = next(by_denoiser, None)
    if family is None:
        raise UnsupportedModel(
            f"{type(uncompiled).__name__} is not supported: use one of {', '.join(FAMILIES)}, "
            "or its denoiser"
        )
    family.check_pipeline(model)
    for part in parts_of(denoiser_of(model, family)):
        family.check(part)
    return family


def _is_modular(model: Any) -> bool:
    # By name: to import diffusers' modular pipelines takes seconds.
    return any(each.__name__ == "ModularPipeline" for each in type(model).__mro__)


def _denoisers_of_modular(model: Any) -> list[Any]:
    """The denoisers of a modular pipeline, whose class does not say what it makes; else none."""
    if not _is_modular(model):
        return []
    parts = [getattr(model, name, None) for name in ("unet", "transformer")]
    return [uncompiled_module(part) for part in parts if part is not None]


def denoiser_of(model: Any, family: Family | None = None) -> Any:
    """The denoiser of a pipeline, as it was before `torch.compile`; a bare denoiser is its own.

    Several that take turns are one `DenoisersInTurn`.
    """
    family = family or family_of(model)
    parts = {name: uncompiled_module(part) for name, part in held_denoisers(model, family).items()}
    first, *others = parts.values()
    if not others:
        return first
    by_last = _IN_TURN.setdefault(first, WeakKeyDictionary())
    last = others[-1]
    if last not in by_last:
        by_last[last] = DenoisersInTurn(parts)
    return by_last[last]


def held_denoisers(model: Any, family: Family) -> dict[str, Any]:
    """A pipeline's denoisers as it holds them, compiled or not, in the order of their turns."""
    names = family.turns(model)
    if len(names) < 2 or not hasattr(model, family.denoiser):
        return {family.denoiser: getattr(model, family.denoiser, model)}
    return {name: getattr(model, name) for name in names}


def missing_encoders(pipe: Pipeline) -> list[str]:
    """The text encoders and tokenizers that the pipeline cannot read prompts without, and lacks."""
    # SD 3 is made to run without its T5, HiDream is not.
    has_more = "text_encoder_4" in pipe.components
    optional = set[str]() if has_more else {"text_encoder_3", "tokenizer_3"}
    parts = sorted(
        name for name in pipe.components if name.startswith(("text_encoder", "tokenizer"))
    )
    return [name for name in parts if getattr(pipe, name) is None and name not in optional]


def check_encoders(pipe: Pipeline) -> None:
    """Raise `LocogenError` if the pipeline cannot read prompts: a part of it was left out.

    Raises:
        UnsupportedModel: No pipeline of the family reads prompts in its call, or it is modular.
    """
    family = family_of(pipe)
    if family.encoded_by is not None:
        raise UnsupportedModel(
            f"locogen reads no prompts of {family.name} and makes no pictures with it, since "
            f"diffusers has it in modular blocks only: encode prompts with {family.encoded_by}, "
            "call the denoiser or its modular pipeline yourself, and within that use "
            "intervene(model, plan, targets=…, rows=…), record and clamp"
        )
    if _is_modular(pipe):
        classic = next(name for name, one in FAMILIES.items() if one is family)
        raise UnsupportedModel(
            f"locogen reads no prompts through a modular pipeline: build the classic {classic} of "
            f"its parts, or call {type(pipe).__name__} yourself within intervene(model, plan, "
            "targets=…, rows=…), record or clamp"
        )
    missing = missing_encoders(pipe)
    if missing:
        raise LocogenError(
            f"this {type(pipe).__name__} has no {' and no '.join(missing)}, so it cannot read "
            "prompts: load it with its text encoders and tokenizers, or encode the prompts with a "
            "pipeline that has them: intervene(pipe, plan, targets=…) takes the encoded targets, "
            "and the pipeline's own call takes prompt_embeds="
        )


def encode(pipe: Pipeline, prompts: Sequence[str]) -> PromptEncoding:
    """Prompts as the pipeline itself encodes them."""
    return _encode(pipe, prompts, guided=False)[0]


def encode_guided(pipe: Pipeline, prompts: Sequence[str]) -> EncodedPrompts:
    """Prompts encoded, and the pipeline's own negative for them, None in families without one."""
    return _encode(pipe, prompts, guided=True)


def _encode(pipe: Pipeline, prompts: Sequence[str], guided: bool) -> EncodedPrompts:
    import torch

    check_encoders(pipe)
    # Pipelines of several threads may share a tokenizer, whose padding each encoding sets and
    # resets again: two at the same time could get one another's. Encoders that offload brings to
    # the device for this would stay there, since no pipeline's call ends.
    with _ENCODING, torch.no_grad(), taken_back(*text_encoders(pipe).values()):
        return family_of(pipe).encode(pipe, prompts, guided)


def text_encoders(pipe: Pipeline) -> dict[str, Any]:
    """The pipeline's text encoders by their attribute, without compiled code around them."""
    return {
        name: uncompiled_module(part)
        for name, part in pipe.components.items()
        if name.startswith("text_encoder") and part is not None
    }


# --- words that a model does not read ------------------------------------------------------------


def token_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    """Where a prompt stands in its states, a span for each encoder that has separate positions.

    Raises:
        LocogenError: One position holds the states of two different tokens.
    """
    spans = _unchecked_spans(pipe, prompt)
    for span in spans:
        if span.paired is not None and span.pieces != span.paired.pieces:
            raise LocogenError(
                f"the two tokenizers split {prompt!r} into different tokens, so a position means "
                "two words: load the textual inversion into both, with tokenizer=pipe.tokenizer_2 "
                "and text_encoder=pipe.text_encoder_2 for the second"
            )
    return spans


def _unchecked_spans(pipe: Pipeline, prompt: str) -> tuple[TokenSpan, ...]:
    check_encoders(pipe)
    family = family_of(pipe)
    return family.token_spans(pipe, family.normalize(prompt))


def end_position(pipe: Pipeline, prompt: str, *, encoder: int = 0) -> int:
    """Where the encoded prompt ends: its (first) end mark, or its last word without one."""
    return token_spans(pipe, prompt)[encoder].end


def cut_words(pipe: Pipeline, prompt: str) -> tuple[str, int]:
    """The end of the prompt that the tokenizer's limit cuts off, empty if none; and the limit."""
    span = _unchecked_spans(pipe, prompt)[-1]
    if span.paired is not None and len(span.paired.cut_ids) > len(span.cut_ids):
        span = span.paired
    return span.decode(span.cut_ids), span.limit


def unknown_words(pipe: Pipeline, prompt: str) -> tuple[str, ...]:
    """The words of a prompt that a tokenizer of the pipeline does not know, each once.

    They become the token for unknown words, or a mark that ends the prompt, so that the model
    cannot tell them apart.
    """
    if not _has_unknown(pipe, prompt):
        return ()
    unknown: dict[str, None] = {}  # in place of a set, for the order
    for word in unicodedata.normalize("NFC", prompt).split():
        if not _has_unknown(pipe, word):
            continue
        parts = [part for part in re.findall(r"\w+|[^\w\s]", word) if _has_unknown(pipe, part)]
        unknown |= dict.fromkeys(parts or [word])
    return tuple(unknown or [prompt])


def _has_unknown(pipe: Pipeline, words: str) -> bool:
    return any(_lacks(span) for span in _unchecked_spans(pipe, words))


def _lacks(span: TokenSpan) -> bool:
    """Whether a token of the prompt stands for something that the tokenizer does not know."""
    return not span.unknown.isdisjoint(span.all_ids)


def warn_unread(pipe: Pipeline, prompts: Iterable[str], *, stacklevel: int = 2) -> None:
    """Warn of each prompt that the model does not read as written: cut, or with unknown words.

    Args:
        pipe: A pipeline of a known family.
        prompts: Any prompts; those that come twice are looked at once.
        stacklevel: As of `warnings.warn`, counted from the caller.
    """
    for prompt in dict.fromkeys(prompts):
        cut, limit = cut_words(pipe, prompt)
        if cut:
            message = f"{prompt!r} is longer than {limit} tokens: the model does not read {cut!r}"
            warnings.warn(message, stacklevel=stacklevel + 1)
        unknown = unknown_words(pipe, prompt)
        if unknown:
            names = ", ".join(map(repr, unknown))
            message = (
                f"the tokenizer does not know {names} in {prompt!r}: the model cannot tell them "
                "from any other unknown word"
            )
            warnings.warn(message, stacklevel=stacklevel + 1)


def check_lengths(pipe: Pipeline, pairs: Iterable[tuple[str, str]]) -> None:
    """Raise `LocogenError` for a prompt and a target between which the picture would move.

    In some families the picture's positions begin where the text ends, so that a target of another
    length cannot be exchanged with the prompt.

    Args:
        pipe: A pipeline of a known family.
        pairs: Prompts and their targets.
    """
    family = family_of(pipe)
    is_bare = not hasattr(pipe, "components")  # a denoiser without its pipeline
    if family.length_class is None or is_bare or missing_encoders(pipe):
        return
    for prompt, target in dict.fromkeys(pairs):
        lengths = [family.length_class(pipe, text) for text in (prompt, target)]
        if lengths[0] != lengths[1]:
            # Where a mask says where each text ends, the picture follows there, without padding.
            padding = ", padding included," if family.joined_mask is None else ""
            raise LocogenError(
                f"{family.name} reads {prompt!r} as {lengths[0]} tokens and {target!r} as "
                f"{lengths[1]}{padding} and puts the picture behind them: it would stand "
                "elsewhere. Add words to the shorter one, or choose another wording, until both "
                "count alike. Where the concept is the catalog's, or the second one its placebo, "
                "write your own: loco.Concept(name, kind, (loco.PromptPair(prompt, target, "
                "placebo=…),))"
            )


# --- where a subject stands ----------------------------------------------------------------------


def subject_occurrences(
    pipe: Pipeline, prompt: str, subject: str, *, encoder: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Where the subject's tokens stand in the encoded prompt, at each of its occurrences.

    A subject is found in the prompt's text, as whole words, and its tokens are those that the
    pipeline's tokenizer makes of them there: several for a token of textual inversion with several
    vectors.

    Args:
        pipe: A pipeline of a known family.
        prompt: What is encoded.
        subject: Words that the prompt holds, such as a concept's name.
        encoder: Which of several encoders that lie one after another along the tokens (SD 3: the
            CLIPs, then T5).

    Returns:
        For each occurrence, from left to right, its positions, counted from 0. One that the limit
        cuts is left out.

    Raises:
        LocogenError: The prompt does not hold the subject, is cut before its end, or the tokenizer
            knows none of its words.
    """
    span = token_spans(pipe, prompt)[encoder]
    places = _spans_of_subject(pipe, prompt, subject, encoder)
    if not places:
        raise LocogenError(
            f"the prompt {prompt!r} does not contain the subject {subject!r} as whole words: "
            "give the words that it has in subject="
        )

    uncut = [tokens for tokens in places if tokens.stop <= len(span.ids)]
    if not uncut:
        raise LocogenError(
            f"the prompt {prompt!r} is cut after {span.limit} tokens, before the end of "
            f"{subject!r}: make it shorter"
        )
    if all(span.ids[token] in span.unknown for tokens in uncut for token in tokens):
        raise LocogenError(
            f"the tokenizer knows no word of {subject!r}, so the model cannot read it: use words "
            "that it knows"
        )
    return tuple(span.words(span.start + token for token in tokens) for tokens in uncut)


def _spans_of_subject(pipe: Pipeline, prompt: str, subject: str, encoder: int) -> list[range]:
    """Which of a prompt's tokens a subject became, at each occurrence."""
    family = family_of(pipe)
    text = family.normalize(prompt)
    words = family.normalize(subject)
    # With its punctuation first, such as the "." of "st. petersburg".
    spans = _spans_of_words(pipe, text, words, encoder)
    return spans or _spans_of_words(pipe, text, without_marks(words), encoder)


def _spans_of_words(pipe: Pipeline, text: str, words: str, encoder: int) -> list[range]:
    """Which of a prompt's tokens some words became, at each occurrence."""
    spans_of = family_of(pipe).token_spans
    all_ids = spans_of(pipe, text)[encoder].all_ids
    spans = []
    for start, end in occurrences(text, words):
        # The tokens of the text up to a letter are the first ones of the whole text's, if a token
        # ends there. If none does, as inside a token of textual inversion, the words do not stand
        # for themselves.
        before = spans_of(pipe, text[:start].rstrip())[encoder].all_ids
        through = spans_of(pipe, text[:end])[encoder].all_ids
        first = shared_length(before, all_ids)
        if first < len(through) and through == all_ids[: len(through)]:
            spans.append(range(first, len(through)))
    return spans


def subject_positions(
    pipe: Pipeline, prompt: str, subject: str, *, encoder: int = 0
) -> tuple[int, ...]:
    """Where the subject's tokens stand at its last occurrence: see `subject_occurrences`."""
    return subject_occurrences(pipe, prompt, subject, encoder=encoder)[-1]


# --- concepts that a model cannot read -----------------------------------------------------------


def check_known(pipe: Pipeline, concept: Concept) -> None:
    """Raise `LocogenError` for a concept that the model cannot read: measuring it means nothing.

    That is one whose name, in a prompt that holds it, has no word that a tokenizer knows, and one
    whose prompt and target become the same tokens.
    """
    check_lengths(pipe, [(pair.prompt, pair.target) for pair in concept.pairs])
    for pair in concept.pairs:
        if occurrences(pair.prompt, concept.name) and _all_unknown(pipe, concept.name):
            raise LocogenError(
                f"the tokenizer knows no word of {concept.name!r}, so the model cannot read it in "
                f"{pair.prompt!r}: use words that it knows"
            )
        _check_differ(pipe, pair.prompt, pair.target)


def check_phrasings(pipe: Pipeline, phrasings: Iterable[Phrasing]) -> None:
    """Raise `LocogenError` for a phrasing whose source and target become the same tokens."""
    for phrasing in phrasings:
        _check_differ(pipe, phrasing.source, phrasing.target)


def _check_differ(pipe: Pipeline, prompt: str, target: str) -> None:
    if _ids(pipe, prompt) == _ids(pipe, target):
        raise LocogenError(
            f"{prompt!r} and {target!r} become the same tokens, so the model cannot tell them "
            "apart: use words that its tokenizer knows, within its limit of tokens"
        )


def _ids(pipe: Pipeline, prompt: str) -> list[tuple[int, ...]]:
    """What every tokenizer makes of the prompt, up to its limit."""
    ids = []
    for span in _unchecked_spans(pipe, prompt):
        ids.append(span.ids)
        if span.paired is not None:
            ids.append(span.paired.ids)
    return ids


def _all_unknown(pipe: Pipeline, words: str) -> bool:
    """Whether no tokenizer of the pipeline knows any of the words."""
    parts = re.findall(r"\w+", words) or [words]
    return all(_lacks(span) for part in parts for span in _unchecked_spans(pipe, part))
