"""An edit as LoRA: in the names that other tools build, and as near to the edit as the model's type allows."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from support import full, tiny

from locogen.editing.edit import Edit, fit_edit
from locogen.errors import LocogenError
from locogen.models.denoisers import kohya_name_plain, kohya_name_sdxl, kohya_name_wan
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


# --- names of newer families ----------------------------------------------------------------------


def numbered(names: list[str]) -> dict[str, torch.Tensor]:
    """A file of LoRA in kohya's names, each module with numbers of its own."""
    tensors: dict[str, torch.Tensor] = {}
    for number, name in enumerate(names):
        tensors[f"{name}.lora_down.weight"] = torch.full((1, 1), float(number))
        tensors[f"{name}.lora_up.weight"] = torch.full((1, 1), -float(number))
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


def check_turned_back(converted, names: list[str], modules: list[str]) -> None:
    """What diffusers makes of the names: each module gets the numbers that were written for it."""
    for number, (name, module) in enumerate(zip(names, modules, strict=True)):
        assert converted[f"transformer.{module}.lora_A.weight"].item() == number, name
        assert converted[f"transformer.{module}.lora_B.weight"].item() == -number, name


def test_diffusers_turns_every_name_of_qwen_image_back() -> None:
    """By its own converter of the files of musubi-tuner, all 60 blocks and the map before them."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_qwen_lora_to_diffusers,
    )

    blocks = [f"transformer_blocks.{i}.attn.add_{m}_proj" for i in range(60) for m in "kv"]
    modules = [*blocks, "txt_in"]
    names = [kohya_name_plain(None, module) for module in modules]
    assert names[0] == "lora_unet_transformer_blocks_0_attn_add_k_proj"
    converted = _convert_non_diffusers_qwen_lora_to_diffusers(numbered(names))
    assert len(converted) == 2 * len(names)
    check_turned_back(converted, names, modules)


def test_diffusers_turns_every_name_of_wan_back() -> None:
    """By its own converter, which wants all matrices of a block: an edit's few it refuses."""
    from diffusers.loaders.lora_conversion_utils import _convert_musubi_wan_lora_to_diffusers

    modules = [f"blocks.{i}.attn2.to_{m}" for i in range(40) for m in "kv"]
    names = [kohya_name_wan(None, module) for module in modules]
    assert names[0] == "lora_unet_blocks_0_cross_attn_k"
    of_second = kohya_name_wan(None, "transformer_2.blocks.0.attn2.to_k")
    assert of_second == names[0]  # a file is loaded into one denoiser
    others = ["self_attn_q", "self_attn_k", "self_attn_v", "self_attn_o"]
    others += ["cross_attn_q", "cross_attn_o", "ffn_0", "ffn_2"]
    rest = [f"lora_unet_blocks_{i}_{name}" for i in range(40) for name in others]
    converted = _convert_musubi_wan_lora_to_diffusers(numbered([*names, *rest]))
    check_turned_back(converted, names, modules)
    with pytest.raises(KeyError):
        _convert_musubi_wan_lora_to_diffusers(numbered(names))


@pytest.mark.slow
def test_diffusers_loads_kohyas_names_of_qwen_image_as_the_edit(tmp_path) -> None:
    pipe = tiny.qwen_image()
    edit = fit(pipe, layers=range(3), entry=True)
    path = tmp_path / "edit.safetensors"
    edit.to_lora(path, style="kohya")
    assert len(modules_in(path)) == len(edit.changes) == 7
    plain = {n: pipe.transformer.get_parameter(n).detach().clone() for n in edit.changes}
    with edit.applied(pipe):
        edited = {n: pipe.transformer.get_parameter(n).detach().clone() for n in edit.changes}
    pipe.load_lora_weights(path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for name, weight in edited.items():
        assert torch.allclose(pipe.transformer.get_parameter(name), weight, atol=1e-5)
        assert not torch.allclose(plain[name], weight, atol=1e-3)


# What ComfyUI patches by the modules that diffusers names, in files whose names begin with "transformer.":
# `model_lora_keys_unet` in comfy/lora.py (commit 17358c8f) with the maps of comfy/utils.py (commit 09708eae).
# In SD 3 and FLUX (.1, .2, Chroma) that are rows of one matrix for queries, keys and values; in Qwen-Image
# matrices of the same names (comfy/ldm/qwen_image/model.py, commit 01f4512b); in Krea 2 `txtmlp.1`.
BY_BLOCK = ("attn.add_k_proj", "attn.add_v_proj")
COMFY = {
    "sd-3": (BY_BLOCK, "context_embedder"),
    "flux": (BY_BLOCK, "context_embedder"),
    "flux-2": (BY_BLOCK, "context_embedder"),
    "flux-2-klein": (BY_BLOCK, "context_embedder"),
    "chroma": (BY_BLOCK, "context_embedder"),
    "qwen-image": (BY_BLOCK, "txt_in"),
    "krea-2": ((), "txt_in.linear_1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMFY)
def test_the_default_names_are_those_that_comfyui_reads_too(name, tmp_path) -> None:
    """Every key of the file, none besides; `lora_A` and `lora_B` as in comfy/weight_adapter/lora.py."""
    in_blocks, entry = COMFY[name]
    layers = (0, 1) if in_blocks else ()
    fit(tiny.FAMILIES[name](), layers=layers, entry=True).to_lora(tmp_path / "edit.safetensors")
    expected = {entry, *(f"transformer_blocks.{i}.{m}" for i in layers for m in in_blocks)}
    with safe_open(tmp_path / "edit.safetensors", "pt") as file:
        keys = set(file.keys())
    assert keys == {
        f"transformer.{module}.lora_{factor}.weight" for module in expected for factor in "AB"
    }


@pytest.mark.slow
def test_wans_file_has_the_names_of_its_own_code(tmp_path) -> None:
    """Which ComfyUI's model has (comfy/ldm/wan/model.py, commit 0c9a69ae), behind "lora_unet_" (comfy/lora.py)."""
    fit(tiny.wan(), layers=(0, 2)).to_lora(tmp_path / "edit.safetensors", style="kohya")
    names = {f"lora_unet_blocks_{i}_cross_attn_{m}" for i in (0, 2) for m in "kv"}
    assert modules_in(tmp_path / "edit.safetensors") == names


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
