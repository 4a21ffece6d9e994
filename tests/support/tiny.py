"""A seeded stand-in for every family: the real classes at the smallest size, random weights, no download."""

import functools
import tempfile
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    IFPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.'-"


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is letters: 40 tokens a prompt at most."""
    vocab = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    vocab += ["".join(pair) for pair in merges]
    with tempfile.TemporaryDirectory() as folder:
        made = CLIPTokenizer(
            vocab={word: i for i, word in enumerate(vocab)},
            merges=merges,
            bos_token="<|startoftext|>",
            eos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            model_max_length=40,
        )
        made.save_pretrained(folder)
        return CLIPTokenizer.from_pretrained(folder)


def unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8, 16, 16),
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
        norm_num_groups=4,
    )
    made = UNet2DConditionModel(**(shape | changes))
    loud(made)
    return made


@torch.no_grad()
def loud(module: torch.nn.Module) -> None:
    """Random weights hardly hear text: turn the text's matrices up, so that a change of prompt shows."""
    for name, value in module.named_parameters():
        if any(
            part in name
            for part in (
                "attn2.to_k",
                "attn2.to_v",
                "attn2.to_out.0.weight",
                "add_k_proj",
                "add_v_proj",
            )
        ):
            value.mul_(4)


def clip(kind: type = CLIPTextModel, *, seed: int = 1, **changes: Any) -> Any:
    """A CLIP text encoder whose words differ enough to be heard."""
    words = tokenizer()
    torch.manual_seed(seed)
    shape: dict[str, Any] = dict(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=40,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    text = kind(CLIPTextConfig(**(shape | changes)))
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    return text.eval()


def kl(**changes: Any) -> AutoencoderKL:
    """An autoencoder that makes two pixels a side of one latent."""
    shape: dict[str, Any] = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
    )
    return AutoencoderKL(**(shape | changes))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(**unet_changes: Any) -> StableDiffusionPipeline:
    text = clip()
    return quiet(
        StableDiffusionPipeline(
            vae=kl(),
            text_encoder=text,
            tokenizer=tokenizer(),
            unet=unet(**unet_changes),
            scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def small() -> StableDiffusionPipeline:
    """The same with 4 layers in place of 16: for what does not depend on their number."""
    return pipeline(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def lcm() -> LatentConsistencyModelPipeline:
    plain = pipeline(time_cond_proj_dim=8)
    parts = {**plain.components, "scheduler": LCMScheduler()}
    parts.pop("image_encoder")
    return quiet(LatentConsistencyModelPipeline(**parts, requires_safety_checker=False))


@functools.cache
def t5_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer of letters, with two words that are one token each."""
    words = ["▁", *LETTERS, "▁cat", "▁dog", *(f"▁{c}" for c in LETTERS)]
    scores = {"▁cat": -1.0, "▁dog": -1.0}
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((word, scores.get(word, -3.0)) for word in words),
    ]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=77)


def t5(*, width: int = WIDTH, seed: int = 2) -> T5EncoderModel:
    torch.manual_seed(seed)
    shape = dict(
        d_model=width,
        d_kv=4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    text = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), **shape))
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    return text.eval()


@functools.cache
def gemma_tokenizer() -> GemmaTokenizer:
    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *LETTERS]
    merges = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g")]
    vocab = {word: i for i, word in enumerate([*marks, *("".join(pair) for pair in merges)])}
    return GemmaTokenizer(vocab=vocab, merges=merges, model_max_length=2000)


def gemma() -> Gemma2Model:
    """Layers of one head: in letters, Sana's instruction is more than a thousand tokens to attend to."""
    torch.manual_seed(3)
    shape: dict[str, Any] = dict(
        vocab_size=len(gemma_tokenizer()),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    text = Gemma2Model(Gemma2Config(**shape, pad_token_id=0, eos_token_id=1, bos_token_id=2))
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    return text.eval()


def sdxl(**unet_changes: Any) -> StableDiffusionXLPipeline:
    shape: dict[str, Any] = dict(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        layers_per_block=1,
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    )
    text = dict(hidden_act="gelu", projection_dim=WIDTH)
    return quiet(
        StableDiffusionXLPipeline(
            vae=kl(),
            text_encoder=clip(),
            text_encoder_2=clip(CLIPTextModelWithProjection, seed=4, **text),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            unet=unet(**(shape | unet_changes)),
            scheduler=EulerDiscreteScheduler(),
            add_watermarker=False,
        )
    )


def deepfloyd(**unet_changes: Any) -> IFPipeline:
    shape: dict[str, Any] = dict(
        in_channels=3,
        out_channels=6,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        attention_head_dim=4,
        encoder_hid_dim=WIDTH,
        cross_attention_norm="group_norm",
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=2,
        act_fn="gelu",
    )
    return quiet(
        IFPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=t5(),
            unet=unet(**(shape | {"cross_attention_dim": 8 * 4} | unet_changes)),
            scheduler=DDPMScheduler(
                variance_type="learned_range", thresholding=True, clip_sample=False
            ),
            safety_checker=None,
            feature_extractor=None,
            watermarker=None,
            requires_safety_checker=False,
        )
    )


def sd3(**changes: Any) -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=WIDTH,
        joint_attention_dim=2 * WIDTH,
        pooled_projection_dim=2 * WIDTH,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    denoiser = SD3Transformer2DModel(**(shape | changes)).eval()
    loud(denoiser)
    kind = dict(kind=CLIPTextModelWithProjection, hidden_act="gelu", projection_dim=WIDTH)
    return quiet(
        StableDiffusion3Pipeline(
            vae=kl(shift_factor=0.0),
            text_encoder=clip(**kind),
            text_encoder_2=clip(**kind, seed=4),
            text_encoder_3=t5(width=2 * WIDTH),
            tokenizer=tokenizer(),
            tokenizer_2=tokenizer(),
            tokenizer_3=t5_tokenizer(),
            transformer=denoiser,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


def flux(**changes: Any) -> FluxPipeline:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    denoiser = FluxTransformer2DModel(**(shape | changes)).eval()
    loud(denoiser)
    pipe = FluxPipeline(
        vae=kl(shift_factor=0.0),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=tokenizer(),
        tokenizer_2=t5_tokenizer(),
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.default_sample_size = (
        8  # latents a side: the pipeline's own number is that of the real model
    )
    return quiet(pipe)


def pixart(kind: type = PixArtAlphaPipeline, **changes: Any) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=WIDTH,
        sample_size=8,
        patch_size=2,
        caption_channels=WIDTH,
    )
    denoiser = PixArtTransformer2DModel(**(shape | changes)).eval()
    loud(denoiser)
    return quiet(
        kind(
            tokenizer=t5_tokenizer(),
            text_encoder=t5(),
            vae=kl(),
            transformer=denoiser,
            scheduler=DPMSolverMultistepScheduler(),
        )
    )


def sana(**changes: Any) -> SanaPipeline:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=3,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=16,
        patch_size=2,
    )
    denoiser = SanaTransformer2DModel(**(shape | changes)).eval()
    loud(denoiser)
    # Sana makes pictures of 512 pixels a side and shrinks them: eight pixels a side of one latent, so
    # that the denoiser has few of these.
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 4,
        decoder_block_types=("ResBlock",) * 4,
        encoder_block_out_channels=(4, 4, 8, 8),
        decoder_block_out_channels=(4, 4, 8, 8),
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    return quiet(
        SanaPipeline(
            tokenizer=gemma_tokenizer(),
            text_encoder=gemma(),
            vae=vae,
            transformer=denoiser,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    )


class _StandIn:
    """A function that counts as locogen's own: its class says that it comes from there."""

    __module__ = "locogen.stand_in"

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def stand_in(monkeypatch: Any, module: Any, forward: Any) -> None:
    """Put a function in the place of a module's `forward`, marked so that it is not taken for a stranger's."""
    # Not `setattr`: pytest before 9.2 would leave the method of the class on the module.
    monkeypatch.setitem(vars(module), "forward", _StandIn(forward))


FAMILIES: dict[str, Any] = {
    "sd": pipeline,
    "lcm": lcm,
    "sd-xl": sdxl,
    "if": deepfloyd,
    "sd-3": sd3,
    "flux": flux,
    "pixart-alpha": pixart,
    "pixart-sigma": functools.partial(pixart, PixArtSigmaPipeline),
    "sana": sana,
}


def fast(*names: str, of: Iterable[str] = FAMILIES) -> list[Any]:
    """Parameters of a test: those named run in the fast tests, the others in the slow ones too."""
    slow = pytest.mark.slow
    return [name if name in names else pytest.param(name, marks=slow) for name in of]


class FakeScorer:
    """A scorer without a model: how red the picture is, whatever the text; the second text scores its blue."""

    settings: ClassVar = {"scorer": "fake", "preprocessing": "none", "scale": 1.0}

    def __call__(self, pictures: Any, *texts: Any) -> list[np.ndarray]:
        means = np.stack([np.asarray(p, float).mean((0, 1)) / 255 for p in pictures])
        return [means[:, channel] for channel, _ in zip((0, 2), texts, strict=False)]
