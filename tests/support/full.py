"""The parts of every family at full size, configured as the checkpoints are: on the meta device, or random weights."""

import copy
import functools
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    Krea2Transformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

from support import tiny


def sd() -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sd2() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    )


def sdxl(**changes: Any) -> UNet2DConditionModel:
    shape: dict[str, Any] = dict(
        sample_size=128,
        cross_attention_dim=2048,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    return UNet2DConditionModel(**(shape | changes))


def deepfloyd() -> UNet2DConditionModel:
    """IF-I-XL."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=6,
        block_out_channels=(704, 1408, 2112, 2816),
        layers_per_block=3,
        down_block_types=("ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=(*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
        attention_head_dim=64,
        cross_attention_dim=2816,
        encoder_hid_dim=4096,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=64,
        act_fn="gelu",
    )


def sd3() -> SD3Transformer2DModel:
    """SD 3 medium."""
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=192,
    )


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(guidance_embeds=True)


def pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(sample_size=128, caption_channels=4096)


def sana() -> SanaTransformer2DModel:
    return SanaTransformer2DModel()


def sd35_medium() -> SD3Transformer2DModel:
    """SD 3.5 medium, whose first 13 blocks have a second attention over the picture alone."""
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=24,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
        qk_norm="rms_norm",
    )


def sd35_large() -> SD3Transformer2DModel:
    """SD 3.5 large."""
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=38,
        attention_head_dim=64,
        num_attention_heads=38,
        caption_projection_dim=2432,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        out_channels=16,
        pos_embed_max_size=192,
        qk_norm="rms_norm",
    )


def kolors() -> UNet2DConditionModel:
    """SD-XL's U-Net behind a projection of ChatGLM's states."""
    return sdxl(
        encoder_hid_dim=4096,
        encoder_hid_dim_type="text_proj",
        projection_class_embeddings_input_dim=5632,
    )


def wan_small() -> WanTransformer3DModel:
    """Wan 2.1 of 1.3 billion parameters; the class' own shape is that of 14 billion."""
    return WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)


def klein() -> Flux2Transformer2DModel:
    """FLUX.2 klein of 4 billion parameters."""
    return Flux2Transformer2DModel(
        num_layers=5,
        num_single_layers=20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )


def lumina2() -> Lumina2Transformer2DModel:
    """Lumina-Image 2.0 at its depth, but narrow: its forward pass counts tokens, which meta cannot."""
    with torch.device("cpu"):
        return Lumina2Transformer2DModel(
            hidden_size=24,
            cap_feat_dim=8,
            axes_dim_rope=(4, 4, 4),
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
        )


def hidream() -> HiDreamImageTransformer2DModel:
    """HiDream-I1 at its depth, but narrow: its experts count tokens, which meta cannot."""
    with torch.device("cpu"):
        return HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            attention_head_dim=8,
            num_attention_heads=1,
            caption_channels=[8, 8],
            text_emb_dim=8,
            num_routed_experts=1,
            num_activated_experts=1,
            axes_dims_rope=(4, 2, 2),
            llama_layers=[*range(32), *[31] * 16],
        )


# Denoisers of families whose other parts are not put together here, with their layers.
DENOISERS: dict[str, tuple[Any, int]] = {
    "sd-3.5-medium": (sd35_medium, 24),
    "sd-3.5-large": (sd35_large, 38),
    "kolors": (kolors, 70),
    "qwen-image": (QwenImageTransformer2DModel, 60),
    "wan-2.1-1.3b": (wan_small, 30),
    "wan-2.1-14b": (WanTransformer3DModel, 40),
    "flux-2-dev": (Flux2Transformer2DModel, 8 + 48),
    "flux-2-klein-4b": (klein, 5 + 20),
    "chroma": (ChromaTransformer2DModel, 19 + 38),
    "z-image-turbo": (ZImageTransformer2DModel, 30),
    "krea-2": (Krea2Transformer2DModel, 28),
    "lumina-2": (lumina2, 26),
    "hidream-i1": (hidream, 16 + 32),
}


def tokenizer() -> CLIPTokenizer:
    """Few words, but as many of them as the real one lets through."""
    made = copy.copy(tiny.tokenizer())
    made.model_max_length = 77
    return made


def clip(kind: type = CLIPTextModel, **shape: Any) -> Any:
    return tiny.clip(kind, vocab_size=49408, max_position_embeddings=77, **shape)


def clip_l(kind: type = CLIPTextModel) -> Any:
    """CLIP ViT-L/14's text encoder."""
    return clip(
        kind, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )


def clip_h() -> Any:
    """OpenCLIP ViT-H/14's, whose last layer SD 2 leaves out."""
    return clip(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16
    )


def clip_g() -> Any:
    """OpenCLIP ViT-bigG/14's."""
    shape = dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20
    )
    return clip(CLIPTextModelWithProjection, hidden_act="gelu", projection_dim=1280, **shape)


def t5() -> T5EncoderModel:
    """T5 1.1 XXL, the encoder."""
    shape = dict(
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(T5Config(vocab_size=32128, **shape))


def gemma() -> Gemma2Model:
    """Gemma 2 of 2 billion parameters."""
    shape = dict(
        hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8
    )
    return Gemma2Model(
        Gemma2Config(vocab_size=256000, num_key_value_heads=4, head_dim=256, **shape)
    )


def kl(size: int = 512, channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        sample_size=size,
    )


PARTS: dict[str, tuple[Any, ...]] = {
    "sd": (sd, clip_l, kl),
    "sd-2": (sd2, clip_h, kl),
    "sd-xl": (sdxl, clip_l, clip_g, kl),
    "if": (deepfloyd, t5),
    "sd-3": (sd3, clip_l, clip_g, t5, kl),
    "flux": (flux, clip_l, t5, kl),
    "pixart": (pixart, t5, kl),
    "sana": (sana, gemma, AutoencoderDC),
}


@functools.cache
def weights(name: str) -> list[int]:
    """How many weights each part of a family's checkpoint has, its denoiser first."""
    with torch.device("meta"):
        return [sum(weight.numel() for weight in part().parameters()) for part in PARTS[name]]


@functools.cache
def in_float32(name: str) -> list[int]:
    """How many weights of each part transformers keeps in float32 where the rest is float16: T5's `wo`."""
    with torch.device("meta"):
        return [
            sum(
                weight.numel()
                for key, weight in part().named_parameters()
                if part is t5 and ".wo." in key
            )
            for part in PARTS[name]
        ]
