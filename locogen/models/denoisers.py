"""What is particular to each kind of denoiser: smallest inputs, matrices, where text enters.

Small functions that `families.FAMILIES` puts together; none asks which pipeline it serves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError, UnsupportedModel
from locogen.models.hooks import Hook, before
from locogen.models.offload import computes_on, stands_on
from locogen.types import Module

if TYPE_CHECKING:
    from torch import Tensor

    from locogen.models.text import PromptEncoding

Change = Callable[["Tensor"], "Tensor"]  # of some rows of a tensor, (rows, ...) in and out
FUSED = "to_qkv_mlp_proj"  # FLUX.2's matrix for queries, keys, values and more, side by side
POOLED = "the pooled text"  # what messages call the path by which text enters outside of the layers


# --- the smallest forward pass -------------------------------------------------------------------


def _zeros(denoiser: Module, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Zeros on the device where the denoiser computes, the meta device included."""
    import torch

    # Under offload the weights are on another device (or on none) than the one that computes.
    device = computes_on(denoiser) or denoiser.device
    return {
        name: torch.zeros(shape, device=device, dtype=denoiser.dtype)
        for name, shape in shapes.items()
    }


def unet_inputs(unet: Module) -> dict[str, Any]:
    """One 8 x 8 latent and two text tokens; for SD-XL also the size of the picture."""
    config = unet.config
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    inputs: dict[str, Any] = _zeros(
        unet, sample=(1, config.in_channels, 8, 8), encoder_hidden_states=(1, 2, width)
    )
    inputs["timestep"] = inputs["sample"].new_zeros(1).long()
    if config.addition_embed_type == "text_time":
        # SD-XL's projection reads the pooled text and six numbers of the picture's size, embedded.
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = _zeros(unet, text_embeds=(1, pooled), time_ids=(1, 6))
    return inputs


def joint_inputs(denoiser: Module) -> dict[str, Any]:
    """One patch of picture and two text tokens, for SD 3 and FLUX."""
    config = denoiser.config
    inputs: dict[str, Any] = _zeros(
        denoiser,
        encoder_hidden_states=(1, 2, config.joint_attention_dim),
        pooled_projections=(1, config.pooled_projection_dim),
        timestep=(1,),
    )

    # SD 3 takes latents.
    if "sample_size" in config:
        side = config.patch_size
        return inputs | _zeros(denoiser, hidden_states=(1, config.in_channels, side, side))

    # FLUX takes latents that are packed into tokens, and the positions of all tokens.
    inputs |= _zeros(
        denoiser, hidden_states=(1, 1, config.in_channels), txt_ids=(2, 3), img_ids=(1, 3)
    )
    if config.guidance_embeds:
        inputs |= _zeros(denoiser, guidance=(1,))
    return inputs


def qwen_inputs(denoiser: Module) -> dict[str, Any]:
    """One patch of picture and two text tokens, for Qwen-Image."""
    config = denoiser.config
    inputs: dict[str, Any] = _zeros(
        denoiser,
        hidden_states=(1, 1, config.in_channels),
        encoder_hidden_states=(1, 2, config.joint_attention_dim),
        timestep=(1,),
    )
    return inputs | {"img_shapes": [[(1, 1, 1)]]}


def flux2_inputs(denoiser: Module) -> dict[str, Any]:
    """One patch of picture and two text tokens, for FLUX.2."""
    inputs = _flux2_tokens(denoiser)
    if denoiser.config.guidance_embeds:
        inputs |= _zeros(denoiser, guidance=(1,))
    return inputs


def flux3_inputs(denoiser: Module) -> dict[str, Any]:
    """One patch of picture and two text tokens, for FLUX.3; if distilled, the time it jumps to."""
    inputs = _flux2_tokens(denoiser)
    if denoiser.config.flow_map:
        inputs |= _zeros(denoiser, target_timestep=(1,))
    return inputs


def _flux2_tokens(denoiser: Module) -> dict[str, Any]:
    config = denoiser.config
    return _zeros(
        denoiser,
        hidden_states=(1, 1, config.in_channels),
        encoder_hidden_states=(1, 2, config.joint_attention_dim),
        timestep=(1,),
        txt_ids=(2, 4),
        img_ids=(1, 4),
    )


def chroma_inputs(denoiser: Module) -> dict[str, Any]:
    """One patch of picture and two text tokens, for Chroma."""
    config = denoiser.config
    return _zeros(
        denoiser,
        hidden_states=(1, 1, config.in_channels),
        encoder_hidden_states=(1, 2, config.joint_attention_dim),
        timestep=(1,),
        txt_ids=(2, 3),
        img_ids=(1, 3),
    )


def wan_inputs(denoiser: Module) -> dict[str, Any]:
    """One patch of a frame and two text tokens, for Wan."""
    config = denoiser.config
    return _zeros(
        denoiser,
        hidden_states=(1, config.in_channels, *config.patch_size),
        encoder_hidden_states=(1, 2, config.text_dim),
        timestep=(1,),
    )


def krea2_inputs(denoiser: Module) -> dict[str, Any]:
    """Two text tokens, and more tokens of picture than encoder layers: so no two lengths agree."""
    import torch

    config = denoiser.config
    patches = config.num_text_layers
    inputs: dict[str, Any] = _zeros(
        denoiser,
        hidden_states=(1, patches, config.in_channels),
        encoder_hidden_states=(1, 2, config.num_text_layers, config.text_hidden_dim),
        timestep=(1,),
    )
    places = torch.zeros(2 + patches, 3, device=inputs["timestep"].device)
    return inputs | {"position_ids": places}


def caption_inputs(denoiser: Module) -> dict[str, Any]:
    """One patch of picture and two text tokens; for PixArt-α also the picture's size."""
    config = denoiser.config
    side = config.patch_size
    inputs: dict[str, Any] = _zeros(
        denoiser,
        hidden_states=(1, config.in_channels, side, side),
        encoder_hidden_states=(1, 2, config.caption_channels),
        encoder_attention_mask=(1, 2),  # equal for both tokens, so that neither is left out
        timestep=(1,),
    )
    if getattr(denoiser, "use_additional_conditions", False):
        inputs["added_cond_kwargs"] = _zeros(denoiser, resolution=(1, 2), aspect_ratio=(1, 1))
    return inputs


Z_BLOCK = 32  # Z-Image pads text and picture to multiples of it, with tokens that are read


def _in_blocks(tokens: int) -> int:
    return math.ceil(tokens / Z_BLOCK) * Z_BLOCK


def _z_image_patches(picture: Any, patch: int) -> int:
    """How many tokens Z-Image makes of a picture, (channels, frames, height, width)."""
    _, frames, height, width = picture.shape
    return _in_blocks(frames * (height // patch) * (width // patch))


def z_image_inputs(denoiser: Module) -> dict[str, Any]:
    """Two blocks of picture and one of text, so that no two lengths are alike."""
    config = denoiser.config
    side = 8 * config.all_patch_size[0]
    inputs: dict[str, Any] = _zeros(denoiser, t=(1,))
    picture = _zeros(denoiser, x=(config.in_channels, 1, side, side))
    text = _zeros(denoiser, cap_feats=(2, config.cap_feat_dim))
    return inputs | {"x": [picture["x"]], "cap_feats": [text["cap_feats"]]}


def z_image_joined_length(inputs: Mapping[str, Any]) -> int:
    """How many tokens text and picture of `z_image_inputs` have together."""
    return 3 * Z_BLOCK


def z_image_text(call: Mapping[str, Any], tokens: int) -> slice:
    """Where Z-Image's sequence holds the text: behind the picture, padding included."""
    return slice(_z_image_patches(call["x"][0], call.get("patch_size", 2)), None)


def lumina_inputs(denoiser: Module) -> dict[str, Any]:
    """One patch of picture and two text tokens, for Lumina 2."""
    config = denoiser.config
    side = config.patch_size
    inputs: dict[str, Any] = _zeros(
        denoiser,
        hidden_states=(1, config.in_channels, side, side),
        encoder_hidden_states=(1, 2, config.cap_feat_dim),
        timestep=(1,),
    )
    mask = inputs["timestep"].new_ones((1, 2)).long()  # the denoiser counts with it
    return inputs | {"encoder_attention_mask": mask}


def lumina_joined_length(inputs: Mapping[str, Any]) -> int:
    """How many tokens text and picture of `lumina_inputs` have together."""
    return inputs["encoder_hidden_states"].shape[1] + 1


def lumina_text(call: Mapping[str, Any], tokens: int) -> slice:
    """Where Lumina 2's sequence holds the longest text: in front, without its padding."""
    return slice(int(call["encoder_attention_mask"].sum(1).max()))


def hidream_inputs(denoiser: Module) -> dict[str, Any]:
    """One patch of picture, and two tokens of T5 and of each layer of Llama, for HiDream."""
    config = denoiser.config
    of_t5, of_llama = config.caption_channels
    return _zeros(
        denoiser,
        hidden_states=(1, config.in_channels, config.patch_size, config.patch_size),
        timesteps=(1,),
        encoder_hidden_states_t5=(1, 2, of_t5),
        encoder_hidden_states_llama3=(max(config.llama_layers) + 1, 1, 2, of_llama),
        pooled_embeds=(1, config.text_emb_dim),
    )


def hidream_joined_length(inputs: Mapping[str, Any]) -> int:
    """How many tokens text and picture of `hidream_inputs` have together."""
    return 1 + _hidream_tokens(inputs)


def hidream_text(call: Mapping[str, Any], tokens: int) -> slice:
    """Where HiDream's sequence holds the text: behind the picture."""
    return slice(-_hidream_tokens(call), None)


def _hidream_tokens(call: Mapping[str, Any]) -> int:
    """How many tokens each block reads: T5's, and those of Llama's last layer and of its own."""
    of_t5 = call["encoder_hidden_states_t5"].shape[1]
    of_llama = call["encoder_hidden_states_llama3"].shape[2]
    return of_t5 + 2 * of_llama


def text_first(call: Mapping[str, Any], tokens: int) -> slice:
    """Where a sequence of text and picture holds the text, if it comes first."""
    return slice(tokens)


def joined_length(inputs: Mapping[str, Any]) -> int:
    """How many tokens text and picture have together in the smallest forward pass."""
    return inputs["encoder_hidden_states"].shape[1] + inputs["hidden_states"].shape[1]


# --- what a denoiser is --------------------------------------------------------------------------


def is_unet_with(addition: str | None, *, projected: bool = False) -> Callable[[Any], bool]:
    """Recognizes U-Nets, which share one class.

    Args:
        addition: What they take in addition to text and time.
        projected: Whether they project the text before their blocks.
    """
    return lambda model: (
        type(model).__name__ == "UNet2DConditionModel"
        and model.config.addition_embed_type == addition
        and (model.config.encoder_hid_dim_type == "text_proj") == projected
    )


def has_class(name: str) -> Callable[[Any], bool]:
    """Recognizes a denoiser by the name of its class."""
    return lambda model: type(model).__name__ == name


def check_unmodified(denoiser: Module) -> None:
    """Raise for additions to a denoiser under which an intervention would be wrong."""
    name = type(denoiser).__name__
    projection = getattr(denoiser.config, "encoder_hid_dim_type", None)
    has_projection = getattr(denoiser, "encoder_hid_proj", None) is not None
    # "text_proj" is DeepFloyd's own; an IP-Adapter brings another, whose pictures no prompt
    # replaces.
    if projection != "text_proj" and (projection or has_projection):
        raise UnsupportedModel(
            f"this {name} also reads pictures (IP-Adapter): call pipe.unload_ip_adapter() first"
        )
    if getattr(denoiser, "is_cache_enabled", False):
        raise LocogenError(
            f"the {name} skips blocks through a feature cache: call its disable_cache() first"
        )


def check_wan(denoiser: Module) -> None:
    """Raise for a Wan that reads a picture too, whose tokens stand before those of the text."""
    check_unmodified(denoiser)
    if denoiser.config.image_dim is not None or denoiser.config.added_kv_proj_dim is not None:
        raise UnsupportedModel(
            f"this {type(denoiser).__name__} also reads a picture: use one that makes pictures "
            "from text alone"
        )


def wan_turns(pipe: Any) -> tuple[str, ...]:
    """What a pipeline of Wan calls its denoisers, in the order in which they take the steps."""
    # The second one takes the steps below a boundary, and is never called without one.
    config = getattr(pipe, "config", {})
    has_boundary = config.get("boundary_ratio") is not None
    return ("transformer", "transformer_2") if has_boundary else ("transformer",)


def check_turns(pipe: Any) -> None:
    """Raise for a pipeline of Wan that lacks one of its two denoisers."""
    if not hasattr(pipe, "components"):
        return
    missing = [name for name in wan_turns(pipe) if getattr(pipe, name, None) is None]
    if missing:
        raise UnsupportedModel(
            f"this {type(pipe).__name__} has no {' and no '.join(missing)}: load it with all of "
            "its denoisers, or set boundary_ratio to None in its config"
        )


def check_call(call: Mapping[str, Any]) -> None:
    """Raise for a call of a denoiser that keeps keys and values of an earlier one.

    Args:
        call: Its arguments by name.
    """
    if call.get("kv_cache_mode") is not None:
        raise LocogenError(
            "the denoiser is called with a cache of keys and values, which passes what a layer "
            "reads now by: use a pipeline without it (Flux2KleinPipeline)"
        )


def skipped_blocks(call: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of blocks that a call of the denoiser skips: SD 3's guidance by skipped layers.

    Args:
        call: The keyword arguments of the call.
    """
    return tuple(f"transformer_blocks.{index}." for index in call.get("skip_layers") or ())


# --- from encoded text to the matrices of a layer ------------------------------------------------


def unchanged(module: Module, states: Tensor) -> Tensor:
    """The states themselves: nothing stands between them and what reads them."""
    return states


def project_text(unet: Module, states: Tensor) -> Tensor:
    """What the U-Net of DeepFloyd and of Kolors makes of text, (rows, tokens, width)."""
    return unet.encoder_hid_proj(states)


def project_wan(denoiser: Module, states: Tensor) -> Tensor:
    """What Wan makes of T5's states before its blocks, (rows, tokens, width)."""
    return denoiser.condition_embedder.text_embedder(states)


def project_caption(denoiser: Module, states: Tensor) -> Tensor:
    """What PixArt and Sana make of a caption before their blocks, (rows, tokens, width)."""
    if denoiser.caption_projection is not None:
        states = denoiser.caption_projection(states)
    if hasattr(denoiser, "caption_norm"):
        states = denoiser.caption_norm(states)
    return states


def norm_text(attention: Any, states: Tensor) -> Tensor:
    """What a layer of DeepFloyd makes of the text before its matrices, (rows, tokens, width)."""
    return attention.norm_encoder_hidden_states(states) if attention.norm_cross else states


def keys_and_values(attention: Any) -> dict[str, Any]:
    """Of a cross-attention layer: text is all that they read."""
    return {"k": attention.to_k, "v": attention.to_v}


def added_keys_and_values(attention: Any) -> dict[str, Any]:
    """Of an attention that joins text to the picture's own tokens."""
    # FLUX's single blocks have one pair of matrices for text and picture.
    if getattr(attention, "add_k_proj", None) is None:
        return keys_and_values(attention)
    return {"k": attention.add_k_proj, "v": attention.add_v_proj}


def hidream_keys_and_values(attention: Any) -> dict[str, Any]:
    """Of HiDream: its single blocks have one pair of matrices for text and picture."""
    if attention.single:
        return keys_and_values(attention)
    return {"k": attention.to_k_t, "v": attention.to_v_t}


def flux2_keys_and_values(attention: Any) -> dict[str, Any]:
    """Of FLUX.2: its single blocks have one matrix for all that they make of their sequence."""
    fused = getattr(attention, FUSED, None)
    return added_keys_and_values(attention) if fused is None else {"k": fused, "v": fused}


def flux2_columns(attention: Any) -> dict[str, slice]:
    """Of FLUX.2: in the matrix of a single block, keys and values stand behind the queries."""
    if getattr(attention, FUSED, None) is None:
        return whole_columns(attention)
    width = attention.inner_dim
    return {"k": slice(width, 2 * width), "v": slice(2 * width, 3 * width)}


def whole_columns(attention: Any) -> dict[str, slice]:
    """Of layers with a matrix for keys and one for values: all that each puts out."""
    return {"k": slice(None), "v": slice(None)}


# --- the pooled text, which enters outside of the layers -----------------------------------------


def added_text(denoiser: Module, change: Change) -> list[Hook]:
    """SD-XL takes the pooled vector together with the picture's size."""

    def hook(module: Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        conditions = kwargs["added_cond_kwargs"]
        # A new dictionary: the pipeline hands the same one to each step.
        changed = {**conditions, "text_embeds": change(conditions["text_embeds"])}
        return args, {**kwargs, "added_cond_kwargs": changed}

    return [before(denoiser, hook, POOLED)]


def pooled_projections(denoiser: Module, change: Change) -> list[Hook]:
    """SD 3 and FLUX take the pooled vector as an argument by itself."""

    def hook(module: Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "pooled_projections": change(kwargs["pooled_projections"])}

    return [before(denoiser, hook, POOLED)]


def pooled_embeds(denoiser: Module, change: Change) -> list[Hook]:
    """HiDream takes the pooled vectors as an argument by itself."""

    def hook(module: Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "pooled_embeds": change(kwargs["pooled_embeds"])}

    return [before(denoiser, hook, POOLED)]


def pooled_inside(unet: Module, change: Change) -> list[Hook]:
    """DeepFloyd's U-Net pools the text in its `add_embedding`: what that reads is changed."""

    def hook(module: Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (change(args[0]), *args[1:]), kwargs

    return [before(unet.add_embedding, hook, POOLED)]


def pooled_input(unet: Module, text: PromptEncoding, places: Sequence[int]) -> Tensor:
    """What SD-XL's `add_embedding.linear_1` reads: pooled text, zeros for the size, (1, width)."""
    assert text.pooled is not None
    rows = text.pooled.new_zeros(1, unet.add_embedding.linear_1.in_features)
    rows[:, : text.pooled.shape[1]] = text.pooled
    return rows


def embedder_input(denoiser: Module, text: PromptEncoding, places: Sequence[int]) -> Tensor:
    """What the `context_embedder` of SD 3 and FLUX reads at some positions, (positions, width)."""
    return text.states[0, list(places)]


def normed_input(denoiser: Module, text: PromptEncoding, places: Sequence[int]) -> Tensor:
    """What Qwen-Image's `txt_in` reads at some positions: normed states, (positions, width)."""
    import torch

    with torch.no_grad():
        return denoiser.txt_norm(text.states[0, list(places)])


def fused_input(denoiser: Module, text: PromptEncoding, places: Sequence[int]) -> Tensor:
    """What Krea 2's `txt_in.linear_1` reads at some positions, (positions, width).

    That is what its fusion makes of the tapped states of all encoder layers and tokens.
    """
    import torch

    with torch.no_grad():
        place = stands_on(denoiser)
        mask = None if text.mask is None else text.mask.to(place).bool()[:, None, None]
        states = text.states.to(place, denoiser.dtype)  # (1, tokens, encoder layers, width)
        fused = denoiser.text_fusion(states, attention_mask=mask)  # (1, tokens, width)
        return denoiser.txt_in.norm(fused)[0, list(places)]


# --- names in files of other tools ---------------------------------------------------------------


def kohya_name_plain(denoiser: Module, module: str) -> str:
    """A module's name for kohya's tools and ComfyUI where it is diffusers': SD 1 and 2, Qwen."""
    return "lora_unet_" + module.replace(".", "_")


def kohya_name_wan(denoiser: Module, module: str) -> str:
    """A module's name in kohya's musubi-tuner and in ComfyUI, for Wan: that of Wan's own code.

    Of two denoisers that take turns each has a file of its own, in which both are named alike.
    """
    block = module[module.index("blocks.") :]
    layer = block.replace(".attn2.to_", ".cross_attn.")
    return kohya_name_plain(denoiser, layer)


def kohya_name_sdxl(unet: Module, module: str) -> str:
    """A module's name in kohya's sd-scripts, for SD-XL: that of the LDM code.

    That code counts residual layers and what changes the resolution through all blocks of a side:
    the input's first is `conv_in`, and each level ends with a downsampler. The attention stands
    behind the residual layer, at 1.
    """
    parts = module.split(".")
    per_level = unet.config.layers_per_block
    levels = len(unet.config.down_block_types)
    counts = [per_level] * levels if isinstance(per_level, int) else list(per_level)
    if parts[0] == "down_blocks" and parts[2] == "attentions":
        earlier = sum(count + 1 for count in counts[: int(parts[1])])  # with their downsamplers
        parts[:4] = ["input_blocks", str(1 + earlier + int(parts[3])), "1"]
    elif parts[0] == "up_blocks" and parts[2] == "attentions":
        # A level up has one residual layer more than a level down, and no downsampler.
        earlier = sum(count + 1 for count in counts[::-1][: int(parts[1])])
        parts[:4] = ["output_blocks", str(earlier + int(parts[3])), "1"]
    elif parts[:3] == ["mid_block", "attentions", "0"]:
        parts[:3] = ["middle_block", "1"]
    elif module == "add_embedding.linear_1":
        parts = ["label_emb", "0", "0"]
    return kohya_name_plain(unet, ".".join(parts))
