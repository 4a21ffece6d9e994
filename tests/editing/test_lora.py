"""An edit as LoRA: in the names that other tools build, and as near to the edit as the model's type allows."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from support import full, tiny

from locogen.editing.edit import Edit, fit_edit
from locogen.errors import LocogenError
from locogen.models.denoisers import kohya_name_sdxl
from locogen.models.families import denoiser_of, family_of
from locogen.models.layers import find_layers
from locogen.plan import Concept, PromptPair

STYLE = Concept("cat", "style", (PromptPair("a dog in cat", "a dog"),))
PAIRS = [("a cat", "a do"), ("the cat", "the do")]

# How many transformer blocks stand where. SD-XL: the numbers of the LDM code, by which kohya's sd-scripts name the
# modules of their SD-XL U-Net, and which ComfyUI and diffusers read. Stable Diffusion 1 and 2: diffusers' own names.
SDXL_BLOCKS = {
    "input_blocks_4_1": 2,
    "input_blocks_5_1": 2,
    "input_blocks_7_1": 10,
    "input_blocks_8_1": 10,
    "middle_block_1": 10,
    "output_blocks_0_1": 10,
    "output_blocks_1_1": 10,
    "output_blocks_2_1": 10,
    "output_blocks_3_1": 2,
    "output_blocks_4_1": 2,
    "output_blocks_5_1": 2,
}
SD_BLOCKS = {
    "down_blocks_0_attentions_0": 1,
    "down_blocks_0_attentions_1": 1,
    "down_blocks_1_attentions_0": 1,
    "down_blocks_1_attentions_1": 1,
    "down_blocks_2_attentions_0": 1,
    "down_blocks_2_attentions_1": 1,
    "mid_block_attentions_0": 1,
    "up_blocks_1_attentions_0": 1,
    "up_blocks_1_attentions_1": 1,
    "up_blocks_1_attentions_2": 1,
    "up_blocks_2_attentions_0": 1,
    "up_blocks_2_attentions_1": 1,
    "up_blocks_2_attentions_2": 1,
    "up_blocks_3_attentions_0": 1,
    "up_blocks_3_attentions_1": 1,
    "up_blocks_3_attentions_2": 1,
}


def kohya_names(blocks: dict[str, int]) -> set[str]:
    return {
        f"lora_unet_{place}_transformer_blocks_{number}_attn2_to_{matrix}"
        for place, count in blocks.items()
        for number in range(count)
        for matrix in "kv"
    }


def fit(pipe, layers=(0, 1), **options) -> Edit:
    return fit_edit(pipe, STYLE, layers=layers, phrasings=PAIRS, **options)


def modules_in(path) -> set[str]:
    with safe_open(path, "pt") as file:
        return {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "blocks", "count"), [(full.sdxl, SDXL_BLOCKS, 140), (full.sd, SD_BLOCKS, 32)]
)
def test_every_module_has_the_name_that_kohyas_tools_build(
    make, blocks: dict[str, int], count: int
) -> None:
    with torch.device("meta"):
        unet = make()
    family = family_of(unet)
    assert family.kohya_name is not None
    names: set[str] = set()
    for layer in find_layers(unet):
        for matrix in family.matrices(layer.module):
            names.add(family.kohya_name(unet, f"{layer.name}.to_{matrix}"))
    assert len(names) == count
    assert names == kohya_names(blocks)


def test_two_layers_of_sd_xl_by_their_names_in_full() -> None:
    unet = SimpleNamespace(
        config=SimpleNamespace(layers_per_block=2, down_block_types=("", "", ""))
    )
    first = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert (
        kohya_name_sdxl(unet, first) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    )
    last = "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_v"
    assert (
        kohya_name_sdxl(unet, last) == "lora_unet_output_blocks_5_1_transformer_blocks_1_attn2_to_v"
    )


@pytest.mark.parametrize("options", [{}, dict(layers_per_block=2)])
def test_diffusers_loads_kohyas_names_of_sd_xl_as_the_edit(tmp_path, options) -> None:
    """All layers, so that every place of the U-Net is named; what diffusers does not know it would drop in silence."""
    pipe = tiny.sdxl(**options)
    edit = fit(pipe, layers=range(len(find_layers(pipe))))
    path = tmp_path / "edit.safetensors"
    edit.to_lora(path, style="kohya")
    assert len(modules_in(path)) == len(edit.changes)
    assert all(
        name.startswith(("lora_unet_input", "lora_unet_middle", "lora_unet_output"))
        for name in modules_in(path)
    )
    plain = {name: pipe.unet.get_parameter(name).detach().clone() for name in edit.changes}
    with edit.applied(pipe):
        edited = {name: pipe.unet.get_parameter(name).detach().clone() for name in edit.changes}
    pipe.load_lora_weights(path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, weight in edited.items():
        assert torch.allclose(pipe.unet.get_parameter(name), weight, atol=1e-5)
        assert not torch.allclose(plain[name], weight, atol=1e-3)


def test_an_edit_that_is_loaded_keeps_its_names_for_kohyas_tools(tmp_path) -> None:
    edit = fit(tiny.sdxl())
    edit.save(tmp_path / "edit.safetensors")
    Edit.load(tmp_path / "edit.safetensors").to_lora(tmp_path / "lora.safetensors", style="kohya")
    edit.to_lora(tmp_path / "twin.safetensors", style="kohya")
    assert modules_in(tmp_path / "lora.safetensors") == modules_in(tmp_path / "twin.safetensors")


def test_a_file_without_kohyas_names_is_refused(tmp_path) -> None:
    """Those that older versions have written: for SD-XL, the names that they would give are wrong."""
    edit = fit(tiny.sdxl())
    recipe = {
        key: value
        for key, value in json.loads(json.dumps(dict(edit.recipe))).items()
        if key != "kohya_names"
    }
    older = Edit(edit.name, edit.layers, edit.changes, edit.digest, recipe)
    with pytest.raises(LocogenError, match=r"older locogen.*edit.refit\(pipe\)"):
        older.to_lora(tmp_path / "lora.safetensors", style="kohya")
    assert not list(tmp_path.iterdir())


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "least", "most"),
    [(torch.float32, 0.0, 2e-6), (torch.float16, 1e-4, 2e-3), (torch.bfloat16, 1e-3, 2e-2)],
)
def test_lora_is_the_edit_in_float32_and_near_it_in_half_precision(
    tmp_path, dtype, least, most
) -> None:
    """The bounds that `Edit.to_lora` names, of the layers' outputs, relative to what the edit changes in them."""
    pipe = tiny.pipeline().to(dtype)
    edit = fit(pipe, layers=(2, 5))
    edit.to_lora(tmp_path / "lora.safetensors")
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(50, tiny.WIDTH, generator=generator).to(dtype)  # (rows, width)

    def outputs() -> torch.Tensor:
        denoiser = denoiser_of(pipe)
        modules = [denoiser.get_submodule(name.removesuffix(".weight")) for name in edit.changes]
        with torch.no_grad():
            return torch.cat(
                [module(states).double() for module in modules], dim=1
            )  # (rows, channels)

    plain = outputs()
    with edit.applied(pipe):
        dense = outputs()
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    lora = outputs()
    distance = float((lora - dense).norm() / (dense - plain).norm())
    assert least <= distance <= most
