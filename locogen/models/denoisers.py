"""What is particular to each kind of denoiser: its smallest inputs, its matrices, and where text enters it.

Small functions that `families.FAMILIES` puts together; none asks which pipeline it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError, UnsupportedModel
from locogen.models.hooks import Hook, before
from locogen.models.offload import computes_on

if TYPE_CHECKING:
    from torch import Tensor

    from locogen.models.text import Text

Change = Callable[["Tensor"], "Tensor"]  # of some rows of a tensor that the denoiser is called with
POOLED = "the pooled text"  # what messages call the path by which text enters beside the layers


def same(denoiser: Any, states: Tensor) -> Tensor:
    """Nothing stands between the states and who reads them."""
    return states


def _zeros(denoiser: Any, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Zeros where the denoiser computes, the meta device included; under offload, where it will be computed."""
    import torch

    device, dtype = computes_on(denoiser) or denoiser.device, denoiser.dtype
    return {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in shapes.items()}


def unet_inputs(unet: Any) -> dict[str, Any]:
    """One 8 x 8 latent (64 x 64 pixels) and two text tokens, and what SD-XL is told of the picture's size."""
    config = unet.config
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    given: dict[str, Any] = _zeros(
        unet, sample=(1, config.in_channels, 8, 8), encoder_hidden_states=(1, 2, width)
    )
    given["timestep"] = given["sample"].new_zeros(1).long()
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = _zeros(unet, text_embeds=(1, pooled), time_ids=(1, 6))
    return given


def joint_inputs(denoiser: Any) -> dict[str, Any]:
    """One patch of picture and two text tokens. SD 3 takes latents; FLUX takes packed ones with their positions."""
    config = denoiser.config
    given: dict[str, Any] = _zeros(
        denoiser,
        encoder_hidden_states=(1, 2, config.joint_attention_dim),
        pooled_projections=(1, config.pooled_projection_dim),
        timestep=(1,),
    )
    if "sample_size" in config:
        side = config.patch_size
        return given | _zeros(denoiser, hidden_states=(1, config.in_channels, side, side))
    given |= _zeros(
        denoiser, hidden_states=(1, 1, config.in_channels), txt_ids=(2, 3), img_ids=(1, 3)
    )
    return given | (_zeros(denoiser, guidance=(1,)) if config.guidance_embeds else {})


def caption_inputs(denoiser: Any) -> dict[str, Any]:
    """One patch of picture and two text tokens, all of it heard, and what PixArt-α is told of the picture's size."""
    config, side = denoiser.config, denoiser.config.patch_size
    given: dict[str, Any] = _zeros(
        denoiser,
        hidden_states=(1, config.in_channels, side, side),
        encoder_hidden_states=(1, 2, config.caption_channels),
        encoder_attention_mask=(1, 2),
        timestep=(1,),
    )
    if getattr(denoiser, "use_additional_conditions", False):
        given["added_cond_kwargs"] = _zeros(denoiser, resolution=(1, 2), aspect_ratio=(1, 1))
    return given


def check_seen_through(denoiser: Any) -> None:
    """Refuse what the interventions cannot see through."""
    name, kind = type(denoiser).__name__, getattr(denoiser.config, "encoder_hid_dim_type", None)
    if kind != "text_proj" and (kind or getattr(denoiser, "encoder_hid_proj", None) is not None):
        raise UnsupportedModel(
            f"this {name} hears pictures too (an IP-Adapter): pipe.unload_ip_adapter() first"
        )
    if getattr(denoiser, "is_cache_enabled", False):
        raise LocogenError(
            f"the {name} skips blocks through a feature cache: call its disable_cache() first"
        )


def keys_and_values(attention: Any) -> dict[str, Any]:
    """Of a cross-attention layer: text is all that they read."""
    return {"k": attention.to_k, "v": attention.to_v}


def added_keys_and_values(attention: Any) -> dict[str, Any]:
    """Of an attention that joins text to the picture's own; FLUX's single blocks have one pair for both."""
    if getattr(attention, "add_k_proj", None) is None:
        return keys_and_values(attention)
    return {"k": attention.add_k_proj, "v": attention.add_v_proj}


def added_text(denoiser: Any, change: Change) -> list[Hook]:
    """SD-XL is told the pooled vector beside the size."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        conditions = kwargs["added_cond_kwargs"]
        changed = {**conditions, "text_embeds": change(conditions["text_embeds"])}
        return args, {**kwargs, "added_cond_kwargs": changed}

    return [before(denoiser, hook, POOLED)]


def pooled_projections(denoiser: Any, change: Change) -> list[Hook]:
    """SD 3 and FLUX are told the pooled vector as an argument of its own."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "pooled_projections": change(kwargs["pooled_projections"])}

    return [before(denoiser, hook, POOLED)]


def pooled_inside(unet: Any, change: Change) -> list[Hook]:
    """DeepFloyd's U-Net pools the text by itself, in its `add_embedding`."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (change(args[0]), *args[1:]), kwargs

    return [before(unet.add_embedding, hook, POOLED)]


def skipped_blocks(call: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the blocks that a call of the denoiser leaves out by itself: SD 3's guidance by skipped layers.

    Args:
        call: The keyword arguments of the call.
    """
    return tuple(f"transformer_blocks.{index}." for index in call.get("skip_layers") or ())


def projected(unet: Any, states: Tensor) -> Tensor:
    """What DeepFloyd makes of T5 before the blocks."""
    return unet.encoder_hid_proj(states)


def captioned(denoiser: Any, states: Tensor) -> Tensor:
    """What PixArt and Sana make of a caption before the blocks."""
    found = (
        denoiser.caption_projection(states) if denoiser.caption_projection is not None else states
    )
    return denoiser.caption_norm(found) if hasattr(denoiser, "caption_norm") else found


def normed(attention: Any, heard: Tensor) -> Tensor:
    """DeepFloyd's layers norm all tokens of a prompt together before their matrices read them."""
    return attention.norm_encoder_hidden_states(heard) if attention.norm_cross else heard


def pooled_entry(unet: Any, text: Text, places: Sequence[int]) -> Tensor:
    """What SD-XL's `add_embedding.linear_1` reads of a text, (1, width): the pooled vector, and nothing of the size."""
    assert text.pooled is not None
    rows = text.pooled.new_zeros(1, unet.add_embedding.linear_1.in_features)
    rows[:, : text.pooled.shape[1]] = text.pooled
    return rows


def embedder_entry(denoiser: Any, text: Text, places: Sequence[int]) -> Tensor:
    """What the `context_embedder` of SD 3 and FLUX reads of a text at some positions, (positions, width)."""
    return text.states[0, list(places)]


def kohya_name_sd(unet: Any, module: str) -> str:
    """What kohya's sd-scripts call a module of Stable Diffusion 1 and 2, whose U-Net has diffusers' names there."""
    return "lora_unet_" + module.replace(".", "_")


def kohya_name_sdxl(unet: Any, module: str) -> str:
    """What kohya's sd-scripts call a module of SD-XL: there the U-Net has the names of the LDM code.

    That code counts residual layers and what changes the resolution through all blocks of a side: the input's first
    is `conv_in`, and each level ends with a downsampler. The attention stands behind the residual layer, at 1.
    """
    parts = module.split(".")
    per_level = unet.config.layers_per_block
    levels = len(unet.config.down_block_types)
    counts = [per_level] * levels if isinstance(per_level, int) else list(per_level)
    if parts[0] == "down_blocks" and parts[2] == "attentions":
        earlier = sum(count + 1 for count in counts[: int(parts[1])])  # their downsamplers included
        parts[:4] = ["input_blocks", str(1 + earlier + int(parts[3])), "1"]
    elif parts[0] == "up_blocks" and parts[2] == "attentions":
        earlier = sum(
            count + 1 for count in counts[::-1][: int(parts[1])]
        )  # a level up has one layer more
        parts[:4] = ["output_blocks", str(earlier + int(parts[3])), "1"]
    elif parts[:3] == ["mid_block", "attentions", "0"]:
        parts[:3] = ["middle_block", "1"]
    elif module == "add_embedding.linear_1":
        parts = ["label_emb", "0", "0"]
    return kohya_name_sd(unet, ".".join(parts))


def unet_with(addition: str | None) -> Callable[[Any], bool]:
    """Tells U-Nets by what else they are told; the class is one for all."""
    return lambda model: (
        type(model).__name__ == "UNet2DConditionModel"
        and model.config.addition_embed_type == addition
    )


def built_as(name: str) -> Callable[[Any], bool]:
    """Tells a denoiser by the name of its class."""
    return lambda model: type(model).__name__ == name
