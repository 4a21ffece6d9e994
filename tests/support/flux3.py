"""A seeded stand-in for FLUX.3: its denoiser, its blocks and its encoder, which are no classic pipeline."""

import copy
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux3Transformer2DModel
from diffusers.modular_pipelines.flux3 import Flux3AutoBlocks, Flux3DistilledAutoBlocks
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from support import tiny

LAYERS_OF_TEXT = (1, 2)  # of the encoder, side by side in width


def denoiser(**changes: Any) -> Flux3Transformer2DModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        in_channels=16,
        cond_in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=len(LAYERS_OF_TEXT) * tiny.WIDTH,
        timestep_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return Flux3Transformer2DModel(**(shape | changes)).eval()


def vae() -> AutoencoderKLFlux2:
    torch.manual_seed(2)
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=16,
    ).eval()


class Processor:
    """In the place of Qwen3-VL's own, which needs torchvision: a chat template, and the tokenizer."""

    def __init__(self) -> None:
        self.tokenizer = copy.deepcopy(tiny.qwen_tokenizer())
        self.tokenizer.chat_template = tiny._CHAT

    def apply_chat_template(self, *messages: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(*messages, **options)


def text_encoder() -> Qwen3VLForConditionalGeneration:
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=1)
    vision |= dict(out_hidden_size=tiny.WIDTH, deepstack_visual_indexes=[0])
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
    config = Qwen3VLConfig(
        text_config=tiny.qwen_shape(head_dim=8, rope_parameters=rope),
        vision_config=vision | {"num_position_embeddings": 16},
    )
    torch.manual_seed(11)
    text = Qwen3VLForConditionalGeneration(config).eval()
    torch.nn.init.normal_(text.get_input_embeddings().weight, std=1.0)
    return text


def reader() -> Any:
    """The block that encodes, as a pipeline of its own."""
    made = Flux3TextEncoderStep().init_pipeline()
    made.update_components(text_encoder=text_encoder(), tokenizer=Processor())
    return made


def read(reader: Any, prompts: Any) -> torch.Tensor:
    """Prompts one by one, as the block takes them, stacked: (prompts, tokens, width)."""
    states = [
        reader(prompt=prompt, text_encoder_out_layers=LAYERS_OF_TEXT, output="prompt_embeds")
        for prompt in prompts
    ]
    return torch.cat(states)


def pipeline(*, distilled: bool = False, reader: Any = None) -> Any:
    """The modular pipeline; without a reader from encoded prompts on: its encoder takes one prompt a call."""
    blocks = (Flux3DistilledAutoBlocks if distilled else Flux3AutoBlocks)()
    blocks.sub_blocks.pop("prompt_upsampler")
    if reader is None:
        blocks.sub_blocks.pop("text_encoder")
    made = blocks.init_pipeline()
    if reader is not None:
        made.update_components(text_encoder=reader.text_encoder, tokenizer=reader.tokenizer)
    made.update_components(transformer=denoiser(flow_map=distilled), vae=vae())
    made.set_progress_bar_config(disable=True)
    return made
