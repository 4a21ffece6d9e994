"""A Stable Diffusion pipeline as the single file that most people have: the original names, all parts in one."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def write_single_file(pipe: Any, file: Path) -> None:
    """All weights of the pipeline, half as diffusers would find them in a checkpoint of the first authors."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_unet_name(name)}"] = weight
    for name, weight in pipe.vae.state_dict().items():
        old = _vae_name(name, len(pipe.vae.config.block_out_channels))
        if ".mid.attn_1." in old and weight.dim() == 2:
            weight = weight[:, :, None, None]  # (out, in) → the 1 × 1 convolutions that they were
        tensors[f"first_stage_model.{old}"] = weight
    for name, weight in pipe.text_encoder.state_dict().items():
        bare = name.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{bare}"] = weight
    save_file({name: weight.contiguous() for name, weight in tensors.items()}, file)


def _unet_name(name: str) -> str:
    """The U-Net's first authors count blocks through, two layers and a change of size a level."""
    for new, old in OUTSIDE.items():
        if name.startswith(f"{new}."):
            return name.replace(new, old, 1)
    match = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d)\.)?(\w+)\.(\d)\.(.*)", name)
    assert match is not None, name
    side, level, kind, place, rest = match.groups()
    level, place = int(level or 0), int(place)
    if kind == "resnets":
        part, _, tail = rest.partition(".")
        rest = f"{RESNET[part]}.{tail}"
    if side == "mid":
        return f"middle_block.{2 * place if kind == 'resnets' else 1}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * (level + 1)}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"
    blocks = (
        f"input_blocks.{3 * level + place + 1}"
        if side == "down"
        else f"output_blocks.{3 * level + place}"
    )
    return f"{blocks}.{0 if kind == 'resnets' else 1}.{rest}"


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(
        r"decoder\.up_blocks\.(\d)\.resnets\.(\d)",
        lambda m: f"decoder.up.{levels - 1 - int(m[1])}.block.{m[2]}",
        name,
    )
    name = re.sub(
        r"decoder\.up_blocks\.(\d)\.upsamplers\.0",
        lambda m: f"decoder.up.{levels - 1 - int(m[1])}.upsample",
        name,
    )
    name = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    for new, old in attention.items():
        name = name.replace(f"mid_block.attentions.0.{new}.", f"mid.attn_1.{old}.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
