"""A seeded stand-in for every family: the real classes at the smallest size, random weights, no download."""

import copy
import functools
import io
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    IFPipeline,
    KolorsPipeline,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 16
_FOLDER = tempfile.TemporaryDirectory()  # until the tests end
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
                "to_k_t",
                "to_v_t",
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


@functools.cache
def qwen_tokenizer(padding_side: str = "right") -> Qwen2Tokenizer:
    """A Qwen tokenizer of bytes, with two words that are one token each behind a space."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g"), ("Ġ", "cat"), ("Ġ", "dog")]
    words = [*marks, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    return Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)},
        merges=merges,
        model_max_length=4096,
        extra_special_tokens=marks[1:],
        padding_side=padding_side,
    )


def qwen_shape(**changes: Any) -> dict[str, Any]:
    """What all language models of Qwen are told of their size."""
    return {
        "vocab_size": len(qwen_tokenizer()),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    } | changes


def qwen_image_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def qwen_image(**changes: Any) -> QwenImagePipeline:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    tokens = dict.fromkeys(
        ["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"], 0
    )
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=WIDTH)
    config = Qwen2_5_VLConfig(
        text_config=qwen_shape(rope_parameters=rope), vision_config=vision, **tokens
    )
    torch.manual_seed(5)
    text = Qwen2_5_VLForConditionalGeneration(config).eval()
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    denoiser = QwenImageTransformer2DModel(**(shape | changes)).eval()
    loud(denoiser)
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=qwen_image_vae(),
        text_encoder=text,
        tokenizer=qwen_tokenizer(),
        transformer=denoiser,
    )
    pipe.default_sample_size = 8
    # A tokenizer of bytes makes more tokens of the template's beginning than the real one's 34.
    beginning = pipe.prompt_template_encode.split("{}")[0]
    pipe.prompt_template_encode_start_idx = len(qwen_tokenizer()(beginning).input_ids)
    return quiet(pipe)


@functools.cache
def chatglm_tokenizer() -> ChatGLMTokenizer:
    """A ChatGLM tokenizer of letters, with two words that are one token each."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(LETTERS)] * 20),
        model_writer=model,
        model_type="char",
        vocab_size=60,
        hard_vocab_limit=False,
        user_defined_symbols=["▁cat", "▁dog"],
        minloglevel=2,
    )
    file = Path(_FOLDER.name) / "tokenizer.model"  # read again when the tokenizer is saved
    file.write_bytes(model.getvalue())
    return ChatGLMTokenizer(str(file))


def chatglm() -> ChatGLMModel:
    torch.manual_seed(6)
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=chatglm_tokenizer().vocab_size,
        hidden_size=WIDTH,
        ffn_hidden_size=2 * WIDTH,
        kv_channels=8,
        num_attention_heads=2,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
        original_rope=True,
    )
    text = ChatGLMModel(config, empty_init=False)
    for name, weight in text.named_parameters():
        if "layernorm" in name:  # they are made without values
            torch.nn.init.ones_(weight)
    torch.nn.init.normal_(text.embedding.word_embeddings.weight, std=1.0)
    return text.eval()


def kolors(**unet_changes: Any) -> KolorsPipeline:
    two_encoders = sdxl(encoder_hid_dim=WIDTH, encoder_hid_dim_type="text_proj", **unet_changes)
    return quiet(
        KolorsPipeline(
            vae=two_encoders.vae,
            text_encoder=chatglm(),
            tokenizer=chatglm_tokenizer(),
            unet=two_encoders.unet,
            scheduler=two_encoders.scheduler,
        )
    )


def umt5() -> UMT5EncoderModel:
    torch.manual_seed(7)
    config = UMT5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=WIDTH,
        d_kv=4,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    text = UMT5EncoderModel(config)
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    return text.eval()


def wan(**changes: Any) -> WanPipeline:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=2 * WIDTH,
        num_layers=3,
        rope_max_seq_len=32,
    )
    denoiser = WanTransformer3DModel(**(shape | changes)).eval()
    loud(denoiser)
    pipe = WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=umt5(),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_spatial=2,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=denoiser,
    )
    pipe.default_sample_size = 8
    return quiet(pipe)


def wan22(**changes: Any) -> WanPipeline:
    """Two denoisers: of several steps the first one takes the first, the second one the others."""
    one = wan(**changes)
    torch.manual_seed(1)
    second = WanTransformer3DModel.from_config(one.transformer.config).eval()
    loud(second)
    # A last step that is as large as the first: the second denoiser is heard.
    scheduler = FlowMatchEulerDiscreteScheduler(shift_terminal=0.5)
    parts = {**one.components, "transformer_2": second, "scheduler": scheduler}
    pipe = WanPipeline(**parts, boundary_ratio=0.875)
    pipe.default_sample_size = 8
    return quiet(pipe)


_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _flux2(kind: type, text: Any, tokenizer: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    denoiser = Flux2Transformer2DModel(**(shape | changes)).eval()
    loud(denoiser)
    pipe = kind(
        vae=AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 4),
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=4,
            sample_size=16,
        ).eval(),
        text_encoder=text,
        tokenizer=tokenizer,
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipe.default_sample_size = 8
    pipe.tokenizer_max_length = 64
    return quiet(pipe)


def flux2(**changes: Any) -> Flux2Pipeline:
    words = copy.deepcopy(qwen_tokenizer("left"))  # as Mistral's
    words.chat_template = _CHAT  # of a tokenizer, since PixtralProcessor needs torchvision
    config = Mistral3Config(
        text_config=qwen_shape(
            model_type="mistral", vocab_size=len(words), num_hidden_layers=30, head_dim=8
        ),
        vision_config=dict(
            model_type="pixtral",
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=16,
            patch_size=16,
        ),
    )
    torch.manual_seed(8)
    text = Mistral3ForConditionalGeneration(config).eval()
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    pipe = _flux2(Flux2Pipeline, text, words, **changes)
    pipe.system_message = "a"
    return pipe


def klein(**changes: Any) -> Flux2KleinPipeline:
    words = copy.deepcopy(qwen_tokenizer())
    words.chat_template = _CHAT
    torch.manual_seed(9)
    config = Qwen3Config(**qwen_shape(num_hidden_layers=27, head_dim=8))
    text = Qwen3ForCausalLM(config).eval()
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    return _flux2(Flux2KleinPipeline, text, words, **({"guidance_embeds": False} | changes))


def chroma(**changes: Any) -> ChromaPipeline:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    denoiser = ChromaTransformer2DModel(**(shape | changes)).eval()
    loud(denoiser)
    pipe = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl(shift_factor=0.0),
        text_encoder=t5(),
        tokenizer=t5_tokenizer(),
        transformer=denoiser,
    )
    pipe.default_sample_size = 8
    return quiet(pipe)


def z_image(**changes: Any) -> ZImagePipeline:
    words = copy.deepcopy(qwen_tokenizer())
    words.chat_template = "<|im_start|>{{ messages[0].content }}<|im_end|>"  # of few tokens
    torch.manual_seed(10)
    text = Qwen3Model(Qwen3Config(**qwen_shape(num_hidden_layers=2, head_dim=8))).eval()
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        in_channels=4,
        dim=32,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 32, 32],
    )
    denoiser = ZImageTransformer2DModel(**(shape | changes)).eval()
    torch.nn.init.normal_(denoiser.cap_pad_token)
    torch.nn.init.normal_(denoiser.x_pad_token)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl(shift_factor=0.0),
        text_encoder=text,
        tokenizer=words,
        transformer=denoiser,
    )
    pipe.default_sample_size = 8
    return quiet(pipe)


def krea2(**changes: Any) -> Krea2Pipeline:
    """Its prompts have 512 tokens, as those of the real one."""
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=WIDTH)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    config = Qwen3VLConfig(
        text_config=qwen_shape(num_hidden_layers=4, head_dim=8, rope_parameters=rope),
        vision_config=vision | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    )
    torch.manual_seed(11)
    text = Qwen3VLModel(config).eval()
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        in_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    denoiser = Krea2Transformer2DModel(**(shape | changes)).eval()
    # Gates and norms begin at 0 and 1: then no block would change anything.
    for name, value in denoiser.named_parameters():
        if "scale_shift_table" in name:
            torch.nn.init.normal_(value, std=0.5)
    pipe = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=qwen_image_vae(),
        text_encoder=text,
        tokenizer=qwen_tokenizer(),
        transformer=denoiser,
        text_encoder_select_layers=(1, 2, 3),
    )
    pipe.default_sample_size = 8
    # A tokenizer of bytes makes more tokens of the template than the real one's 34 and 5.
    words = qwen_tokenizer()
    pipe.prompt_template_encode_start_idx = len(words(pipe.prompt_template_encode_prefix).input_ids)
    suffix = words(pipe.prompt_template_encode_suffix).input_ids
    pipe.prompt_template_encode_num_suffix_tokens = len(suffix)
    return quiet(pipe)


def lumina2(**changes: Any) -> Lumina2Pipeline:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 16, 16),
        cap_feat_dim=WIDTH,
    )
    denoiser = Lumina2Transformer2DModel(**(shape | changes)).eval()
    pipe = Lumina2Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl(shift_factor=0.0),
        text_encoder=gemma(),
        tokenizer=copy.deepcopy(gemma_tokenizer()),  # whose padding side the pipeline sets
    )
    pipe.system_prompt = "a"
    return quiet(pipe)


@functools.cache
def llama_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of bytes with a start mark and no end mark, as Llama's."""
    words = copy.deepcopy(qwen_tokenizer())
    start = "<|im_start|>"
    words.bos_token = start
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, words.convert_tokens_to_ids(start))]
    )
    return words


def llama() -> LlamaForCausalLM:
    torch.manual_seed(11)
    # The pipeline asks for attention's weights, which other kinds of attention do not give.
    config = LlamaConfig(**qwen_shape(num_hidden_layers=3), attn_implementation="eager")
    text = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    return text


def hidream(**changes: Any) -> HiDreamImagePipeline:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(8, 8),
        llama_layers=[0, 1, 2, 2],
    )
    denoiser = HiDreamImageTransformer2DModel(**(shape | changes)).eval()
    loud(denoiser)
    kind: dict[str, Any] = dict(kind=CLIPTextModelWithProjection, projection_dim=WIDTH)
    kind |= dict(hidden_act="gelu", max_position_embeddings=218)
    pipe = HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=kl(shift_factor=0.0),
        text_encoder=clip(**kind),
        tokenizer=tokenizer(),
        text_encoder_2=clip(**kind, seed=4),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=llama(),
        tokenizer_4=llama_tokenizer(),
        transformer=denoiser,
    )
    pipe.default_sample_size = 8
    return quiet(pipe)


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


def like(pipe: Any, other: Any) -> Any:
    """The pipeline with what was set on another one and no file holds: sizes, the template."""
    names = (
        "default_sample_size",
        "prompt_template_encode_start_idx",
        "system_message",
        "system_prompt",
        "prompt_template_encode_num_suffix_tokens",
    )
    for name in (*names, "tokenizer_max_length"):
        if name in vars(other):
            setattr(pipe, name, vars(other)[name])
    return pipe


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
    "qwen-image": qwen_image,
    "kolors": kolors,
    "wan": wan,
    "flux-2": flux2,
    "flux-2-klein": klein,
    "chroma": chroma,
    "z-image": z_image,
    "krea-2": krea2,
    "lumina-2": lumina2,
    "wan-2.2": wan22,
    "hidream": hidream,
}


RECENT = (
    "kolors",
    "wan",
    "flux-2",
    "flux-2-klein",
    "chroma",
    "z-image",
    "krea-2",
    "lumina-2",
    "wan-2.2",
    "hidream",
)  # qwen-image stands for them
ALIKE = ("lcm", "pixart-alpha", "sana")  # sd and pixart-sigma read text in the same way
# One of each way in which layers get text; the slow tests have all.
FAST = tuple(name for name in FAMILIES if name not in (*RECENT, *ALIKE))


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
