"""All that depends on a model's family: its denoiser, dummy inputs, prompt encoding, and conditional rows.

To add a family: one `Family` entry in `FAMILIES`, keyed by the pipeline's class name. Nothing else in locogen asks
what kind of model it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError, UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Family:
    """What locogen must know of a family of pipelines.

    `denoiser`: attribute of the pipeline; `dummy_inputs(denoiser)`: keyword arguments of the smallest forward pass;
    `encode(pipe, prompts)`: text states, (prompts, tokens, width); `guided(pipe)`: whether the call in progress
    doubles its rows, negative ones first; `check(pipe or denoiser)` raises where an intervention would be wrong;
    `spoken(pipe, prompt)`: the token ids that are heard, start and end marks included, without padding;
    `matrices(layer.module)`: the linear maps that read text, "k" and "v".
    """

    name: str
    denoiser: str
    dummy_inputs: Callable[[Any], Mapping[str, Any]]
    encode: Callable[[Any, Sequence[str]], Tensor]
    guided: Callable[[Any], bool]
    check: Callable[[Any], None]
    spoken: Callable[[Any, str], list[int]]
    matrices: Callable[[Any], Mapping[str, Any]]


def _unet_inputs(unet: Any) -> dict[str, Any]:
    """One 8 x 8 latent (64 x 64 pixels) and one text token, on the denoiser's device (meta included)."""
    import torch

    config = unet.config
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    place = {"device": unet.device, "dtype": unet.dtype}
    return {
        "sample": torch.zeros(1, config.in_channels, 8, 8, **place),
        "timestep": torch.zeros(1, dtype=torch.long, device=unet.device),
        "encoder_hidden_states": torch.zeros(1, 1, width, **place),
    }


def _clip_encode(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """CLIP's last hidden states after its final norm, (prompts, tokens, width), as the pipeline itself makes them."""
    import torch

    with torch.no_grad():
        device = pipe._execution_device
        return pipe.encode_prompt(list(prompts), device, 1, False)[0]


def _sd_guided(pipe: Any) -> bool:
    """Stable Diffusion doubles its rows under guidance above 1, but never a checkpoint with an embedded scale."""
    return bool(pipe.do_classifier_free_guidance)


def _sd_check(unet: Any) -> None:
    """Refuse what the interventions cannot see through."""
    config = unet.config
    if getattr(config, "encoder_hid_dim_type", None) is not None or getattr(config, "addition_embed_type", None):
        raise UnsupportedModel(
            "this U-Net hears text by more than cross-attention (SD-XL, DeepFloyd IF or an IP-Adapter); "
            f"supported pipelines are: {', '.join(FAMILIES)}. Unload an IP-Adapter with pipe.unload_ip_adapter()"
        )
    if getattr(unet, "is_cache_enabled", False):
        raise LocogenError("the denoiser skips blocks through a feature cache: call unet.disable_cache() first")


def _clip_spoken(pipe: Any, prompt: str) -> list[int]:
    """`<start> words <end>`, cut at the tokenizer's limit."""
    return pipe.tokenizer(prompt, truncation=True, verbose=False).input_ids


def _keys_and_values(attention: Any) -> dict[str, Any]:
    return {"k": attention.to_k, "v": attention.to_v}


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family(
        name="Stable Diffusion 1 and 2",
        denoiser="unet",
        dummy_inputs=_unet_inputs,
        encode=_clip_encode,
        guided=_sd_guided,
        check=_sd_check,
        spoken=_clip_spoken,
        matrices=_keys_and_values,
    ),
}


def family_of(model: Any) -> Family:
    """The family of a pipeline, or of a bare denoiser.

    Raises `UnsupportedModel` with the supported pipelines for any other, `LocogenError` for a model whose current
    state (feature cache, IP-Adapter) an intervention cannot see through.
    """
    family = FAMILIES.get(type(model).__name__)
    if family is None and type(model).__name__ == "UNet2DConditionModel":
        family = FAMILIES["StableDiffusionPipeline"]
    if family is None:
        raise UnsupportedModel(
            f"{type(model).__name__} is not supported: locogen knows {', '.join(FAMILIES)} and their U-Nets"
        )
    family.check(denoiser_of(model, family))
    return family


def denoiser_of(model: Any, family: Family | None = None) -> Any:
    """The denoiser of a pipeline; a bare denoiser is its own."""
    return getattr(model, (family or family_of(model)).denoiser, model)


def cut_words(pipe: Any, prompt: str) -> str:
    """The end of the prompt that the tokenizer's limit cuts off; empty where all of it is heard."""
    tokenizer = pipe.tokenizer
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    limit = tokenizer.model_max_length
    return tokenizer.decode(ids[limit - 1 : -1]).strip() if len(ids) > limit else ""


def subject_positions(pipe: Any, prompt: str, subject: str) -> tuple[int, ...]:
    """Where the subject's tokens stand in the encoded prompt, counted from 0, at its last occurrence.

    Raises `LocogenError` where the prompt does not hold the subject, or is cut before its end.
    """
    spoken = family_of(pipe).spoken
    ids, wanted = spoken(pipe, prompt), spoken(pipe, subject)[1:-1]
    for start in range(len(ids) - 1 - len(wanted), 0, -1):
        if ids[start : start + len(wanted)] == wanted:
            return tuple(range(start, start + len(wanted)))
    raise LocogenError(
        f"the prompt {prompt!r} does not hold the subject {subject!r} as words of its own: give subject="
    )


def end_position(pipe: Any, prompt: str) -> int:
    """Where the encoded prompt ends: the position of its (first) end mark."""
    return len(family_of(pipe).spoken(pipe, prompt)) - 1
