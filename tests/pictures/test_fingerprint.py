"""The key knows all that moves a picture: whatever is changed, a store gives back no picture of before."""

import hashlib
import time
import types

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from support import tiny

from locogen.errors import LocogenError
from locogen.models.layers import find_layers
from locogen.pictures import fingerprint as fingerprints
from locogen.pictures.description import describe_scheduler, replaced_methods, torch_settings
from locogen.pictures.fingerprint import checksum, fingerprint
from locogen.pictures.runs import generate

FAST = {"num_inference_steps": 1, "guidance_scale": 3.0, "batch_size": 1, "progress": False}


class Loud:
    """A processor with a setting: what attention puts out is multiplied."""

    def __init__(self, scale):
        self.settings = {"scales": [scale]}

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return AttnProcessor()(attn, hidden_states, *args, **kwargs) * self.settings["scales"][0]


class Louder(torch.nn.Module):
    """The same with a tensor that is no weight of the model."""

    def __init__(self, scale):
        super().__init__()
        self.inner = types.SimpleNamespace(scale=torch.tensor(scale))

    def forward(self, attn, hidden_states, *args, **kwargs):
        return AttnProcessor()(attn, hidden_states, *args, **kwargs) * self.inner.scale


def same_name(scale):
    """Two classes of one name, as when a notebook's cell is changed and run again."""

    class Cell:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return AttnProcessor()(attn, hidden_states, *args, **kwargs) * self.scale

    Cell.scale = scale
    return Cell()


def closure(scale):
    def processor(attn, hidden_states, *args, **kwargs):
        return AttnProcessor()(attn, hidden_states, *args, **kwargs) * scale

    return processor


def processor(make, scale):
    def change(pipe):
        for layer in find_layers(pipe):
            layer.module.processor = make(scale)

    return change


def dotted(path, value):
    """Set an attribute of the pipeline's parts."""
    owner_path, _, name = path.rpartition(".")

    def change(pipe):
        owner = pipe
        for part in owner_path.split("."):
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        setattr(owner, name, value)

    return change


def add_lora(pipe):
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"], init_lora_weights=False), "one")


def scaled_lora(pipe):
    add_lora(pipe)
    pipe.unet.set_adapters(["one"], [0.3])


def disabled_lora(pipe):
    add_lora(pipe)
    pipe.unet.disable_adapters()


def fused_lora(pipe):
    add_lora(pipe)
    pipe.unet.fuse_lora()


def dropping(pipe):
    pipe.unet.mid_block.resnets[0].dropout.p = 0.5
    pipe.unet.train()


def typed(pipe):
    pipe.tokenizer = tiny.CLIPTokenizer.from_pretrained
    raise AssertionError


def another_word(pipe):
    import copy

    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.add_tokens("<new>")


def other_rules(pipe):
    import copy

    from tokenizers import normalizers

    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("cat", "dog")


def padded_left(pipe):
    import copy

    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.padding_side = "left"


def other_position_ids(pipe):
    pipe.text_encoder.embeddings.position_ids[0, 1] = 7


def first_noise_rate(pipe):
    pipe.scheduler.alphas_cumprod[900:] *= 0.5


MOVES = {  # each moves the picture
    "a processor's scale": (processor(Loud, 1.0), processor(Loud, 3.0)),
    "a processor's tensor": (processor(Louder, 1.0), processor(Louder, 3.0)),
    "a class of the same name": (processor(same_name, 1.0), processor(same_name, 3.0)),
    "what a function encloses": (processor(closure, 1.0), processor(closure, 3.0)),
    "FreeU": (lambda pipe: None, lambda pipe: pipe.unet.enable_freeu(0.9, 0.2, 3.0, 3.0)),
    "a LoRA's scale": (add_lora, scaled_lora),
    "a LoRA switched off": (add_lora, disabled_lora),
    "a buffer that is not saved": (lambda pipe: None, other_position_ids),
    "a tokenizer's rules": (lambda pipe: None, other_rules),
    "a tokenizer's side": (lambda pipe: None, padded_left),
    "an attribute of the scheduler": (lambda pipe: None, first_noise_rate),
    "an attribute of a layer": (lambda pipe: None, dotted("unet.mid_block.attentions.0.transformer_blocks.0.attn1.scale", 9.0)),
    "a norm's epsilon": (lambda pipe: None, dotted("unet.conv_norm_out.eps", 1.0)),
    "the image processor": (lambda pipe: None, lambda pipe: pipe.image_processor.register_to_config(do_normalize=False)),
    "the VAE's tiles": (lambda pipe: None, lambda pipe: (pipe.vae.enable_tiling(), setattr(pipe.vae, "tile_latent_min_size", 2))),
    "a VAE's scale": (lambda pipe: None, lambda pipe: pipe.vae.register_to_config(scaling_factor=0.05)),
}
STILL = {  # these move the last bits, or nothing in this model, but may move a picture of another
    "attention slices": lambda pipe: pipe.unet.set_attention_slice("max"),
    "chunked feed-forward": lambda pipe: pipe.unet.enable_forward_chunking(1, 1),
    "VAE slices": lambda pipe: pipe.vae.enable_slicing(),
    "upcast": lambda pipe: pipe.vae.register_to_config(force_upcast=False),
    "a processor's class": lambda pipe: pipe.unet.set_attn_processor(SlicedAttnProcessor(1)),
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(),
    "an attention backend": lambda pipe: setattr(pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor, "_attention_backend", "native"),
    "training mode": lambda pipe: pipe.text_encoder.train(),
    "eager attention": lambda pipe: pipe.text_encoder.set_attn_implementation("eager"),
    "an added token": another_word,
    "a merged LoRA": fused_lora,
}
IN_THE_PIPELINE = {
    "its config": lambda pipe: pipe.register_to_config(requires_safety_checker=True),
    "an attribute": lambda pipe: setattr(pipe, "vae_scale_factor", 4),
    "compilation": lambda pipe: pipe.unet.mid_block.compile(),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
}


def key(pipe):
    run = generate(pipe, ["cat in a"], **FAST)
    return run.table["image"][0], np.asarray(run.pictures[0]).astype(int)


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_the_picture_is_in_its_key(name):
    """The twin: the picture does move, so the store would have given back a wrong one."""
    before, after = MOVES[name]
    pipe = tiny.pipeline()
    before(pipe)
    plain, picture = key(pipe)
    pipe = tiny.pipeline()
    after(pipe)
    other, moved = key(pipe)
    assert plain != other
    assert np.abs(picture - moved).max() > 1


@pytest.mark.parametrize("name", STILL)
def test_what_could_move_a_picture_is_in_its_key(name):
    pipe = tiny.pipeline()
    plain = fingerprint(pipe)
    assert plain == fingerprint(tiny.pipeline()), "the twin: the same model has the same"
    STILL[name](pipe)
    assert fingerprint(pipe) != plain
