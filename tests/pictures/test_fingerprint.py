"""The key knows all that moves a picture: whatever is changed, a store gives back no picture of before."""

import collections
import copy
import decimal
import fractions
import functools
import types

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
)
from support import tiny
from tokenizers import normalizers

from locogen.models.layers import find_layers
from locogen.pictures import fingerprint as fingerprints
from locogen.pictures.description import (
    describe_component,
    describe_pipeline,
    describe_scheduler,
    replaced_methods,
    torch_settings,
)
from locogen.pictures.fingerprint import checksum, digest_of, fingerprint, undescribed
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


def unchanged(pipe):
    pass


def chunked(pipe):
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].set_chunk_feed_forward(1, 1)


def another_backend(pipe):
    pipe.unet.mid_block.attentions[0].transformer_blocks[
        0
    ].attn2.processor._attention_backend = "native"


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


def another_word(pipe):
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.add_tokens("<new>")


def other_rules(pipe):
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("cat", "dog")


def padded_left(pipe):
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)
    pipe.tokenizer.padding_side = "left"


def other_position_ids(pipe):
    ids = pipe.text_encoder.embeddings.position_ids  # (1, positions)
    ids.copy_(ids.flip(1))


def first_noise_rate(pipe):
    pipe.scheduler.alphas_cumprod[1] *= 0.5  # at the one step of these tests


MOVES = {  # each moves the picture
    "a processor's scale": (processor(Loud, 1.0), processor(Loud, 3.0)),
    "a processor's tensor": (processor(Louder, 1.0), processor(Louder, 3.0)),
    "a class of the same name": (processor(same_name, 1.0), processor(same_name, 3.0)),
    "what a function encloses": (processor(closure, 1.0), processor(closure, 3.0)),
    "FreeU": (unchanged, lambda pipe: pipe.unet.enable_freeu(0.9, 0.2, 3.0, 3.0)),
    "a LoRA's scale": (add_lora, scaled_lora),
    "a LoRA switched off": (add_lora, disabled_lora),
    "a buffer that is not saved": (unchanged, other_position_ids),
    "a tokenizer's rules": (unchanged, other_rules),
    "a tokenizer's side": (unchanged, padded_left),
    "an attribute of the scheduler": (unchanged, first_noise_rate),
    "a norm's epsilon": (unchanged, lambda pipe: setattr(pipe.unet.conv_norm_out, "eps", 1.0)),
    "a VAE's scale": (unchanged, lambda pipe: pipe.vae.register_to_config(scaling_factor=0.05)),
}
STILL = {  # these move the last bits, or nothing in this model, but may move a picture of another
    "attention slices": lambda pipe: pipe.unet.set_attention_slice("max"),
    "chunked feed-forward": chunked,
    "VAE tiles": lambda pipe: pipe.vae.enable_tiling(),
    "VAE slices": lambda pipe: pipe.vae.enable_slicing(),
    "upcast": lambda pipe: pipe.vae.register_to_config(force_upcast=False),
    "a processor's class": lambda pipe: pipe.unet.set_attn_processor(SlicedAttnProcessor(1)),
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(),
    "an attention backend": another_backend,
    "training mode": lambda pipe: pipe.text_encoder.train(),
    "eager attention": lambda pipe: pipe.text_encoder.set_attn_implementation("eager"),
    "an added token": another_word,
    "a merged LoRA": fused_lora,
}
IN_THE_PIPELINE = {
    "its config": lambda pipe: pipe.register_to_config(requires_safety_checker=True),
    "an attribute": lambda pipe: setattr(pipe, "vae_scale_factor", 4),
    "compilation": lambda pipe: setattr(
        pipe.unet.mid_block, "_compiled_call_impl", pipe.unet.mid_block._call_impl
    ),
    "its image processor": lambda pipe: pipe.image_processor.register_to_config(do_normalize=False),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
}


def key(pipe):
    run = generate(pipe, ["cat in a"], **FAST)
    return run.table["image"][0], np.asarray(run.pictures[0]).astype(int)


def test_the_same_model_has_the_same_key():
    """The twin of the tests that follow."""
    one, two = tiny.small(), tiny.small()
    assert fingerprint(one) == fingerprint(two)
    assert digest_of(describe_pipeline(one)) == digest_of(describe_pipeline(two))


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_the_picture_is_in_its_key(name):
    """The twin: the picture does move, so the store would have given back a wrong one."""
    before, after = MOVES[name]
    pipe = tiny.small()
    before(pipe)
    plain, picture = key(pipe)
    pipe = tiny.small()
    after(pipe)
    other, moved = key(pipe)
    assert plain != other
    assert (picture != moved).any()


@pytest.mark.parametrize("name", STILL)
def test_what_could_move_a_picture_is_in_its_key(name):
    pipe = tiny.small()
    plain = fingerprint(pipe)
    STILL[name](pipe)
    assert fingerprint(pipe) != plain


@pytest.mark.parametrize("name", IN_THE_PIPELINE)
def test_the_pipelines_own_settings_are_in_the_key(name):
    pipe = tiny.small()
    plain = digest_of(describe_pipeline(pipe))
    IN_THE_PIPELINE[name](pipe)
    assert digest_of(describe_pipeline(pipe)) != plain


def test_what_an_empty_prompt_is_for_sd_xl_is_in_the_key(tmp_path):
    """The negative is all zeros or the encoding of nothing: other pictures, and the store keeps both."""
    pipe = tiny.sdxl()
    run = generate(pipe, ["cat in a"], store=tmp_path, **FAST)
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    other = generate(pipe, ["cat in a"], store=tmp_path, **FAST)
    assert not np.array_equal(np.asarray(run.pictures[0]), np.asarray(other.pictures[0]))


TORCH = {
    "matrix products": lambda monkeypatch: monkeypatch.setattr(
        torch, "get_float32_matmul_precision", lambda: "medium"
    ),
    "attention": lambda monkeypatch: monkeypatch.setattr(
        torch.backends.cuda, "flash_sdp_enabled", lambda: False
    ),
    "TF32": lambda monkeypatch: monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False),
    "algorithms": lambda monkeypatch: monkeypatch.setattr(torch.backends.cudnn, "benchmark", True),
    "the default type": lambda monkeypatch: monkeypatch.setattr(
        torch, "get_default_dtype", lambda: torch.float64
    ),
    "the environment": lambda monkeypatch: monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0"),
}


@pytest.mark.parametrize("name", TORCH)
def test_what_torch_computes_with_is_in_the_key(name, monkeypatch):
    plain = torch_settings("cpu")
    TORCH[name](monkeypatch)
    assert torch_settings("cpu") != plain


def test_autocast_and_the_attention_backend_are_in_the_key():
    from diffusers.models.attention_dispatch import attention_backend

    plain = torch_settings("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch_settings("cpu") != plain
    with attention_backend("_native_math"):
        assert torch_settings("cpu") != plain
    assert torch_settings("cpu") == plain


@pytest.mark.parametrize("family", ["sd", "sd-xl", "if", "sd-3", "flux", "sana"])
def test_a_call_changes_nothing_in_the_key(family):
    """What a call leaves behind in the modules, the scheduler and the pipeline is none of its settings."""
    pipe = tiny.FAMILIES[family]()
    before = (
        fingerprint(pipe),
        describe_pipeline(pipe).lines,
        describe_scheduler(pipe.scheduler).lines,
    )
    run = generate(pipe, ["cat"], **FAST)
    assert before == (
        fingerprint(pipe),
        describe_pipeline(pipe).lines,
        describe_scheduler(pipe.scheduler).lines,
    )
    assert run.settings["foreign"] == []


def test_a_lora_that_is_gone_leaves_the_key_as_it_was():
    pipe = tiny.small()
    plain = fingerprint(pipe)
    add_lora(pipe)
    assert fingerprint(pipe) != plain
    pipe.unload_lora_weights()
    assert fingerprint(pipe) == plain


# --- what nobody can key -------------------------------------------------------------------------


def patched(function):
    """As packages for speed do: a function put in the place of a method."""
    return lambda *args, **kwargs: function(*args, **kwargs)


REPLACED = {
    "unet.conv_in.forward": lambda pipe: (pipe.unet.conv_in, "forward"),
    "UNet2DConditionModel.forward": lambda pipe: (type(pipe.unet), "forward"),
    "AutoencoderKL.decode": lambda pipe: (type(pipe.vae), "decode"),
    "DDIMScheduler.step": lambda pipe: (type(pipe.scheduler), "step"),
    "StableDiffusionPipeline.encode_prompt": lambda pipe: (type(pipe), "encode_prompt"),
    "AttnProcessor2_0.__call__": lambda pipe: (AttnProcessor2_0, "__call__"),
    "VaeImageProcessor.postprocess": lambda pipe: (type(pipe.image_processor), "postprocess"),
    "vae.decode": lambda pipe: (pipe.vae, "decode"),
    "scheduler.step": lambda pipe: (pipe.scheduler, "step"),
    "pipe.prepare_latents": lambda pipe: (pipe, "prepare_latents"),
    "torch.nn.functional.scaled_dot_product_attention": lambda pipe: (
        torch.nn.functional,
        "scaled_dot_product_attention",
    ),
}


@pytest.mark.parametrize("name", REPLACED)
def test_replaced_methods_are_named(name, monkeypatch):
    pipe = tiny.small()
    assert replaced_methods(pipe) == ()
    owner, method = REPLACED[name](pipe)
    monkeypatch.setattr(owner, method, patched(getattr(owner, method)))
    assert name in replaced_methods(pipe)


def test_replaced_methods_make_pictures_afresh(tmp_path, monkeypatch):
    pipe = tiny.small()
    plain = generate(pipe, ["cat"], store=tmp_path, **FAST)
    forward = pipe.unet.conv_in.forward
    monkeypatch.setattr(pipe.unet.conv_in, "forward", lambda *args: 2 * forward(*args))
    with pytest.warns(UserWarning, match=r"unet\.conv_in\.forward: pictures are made afresh"):
        moved = generate(pipe, ["cat"], store=tmp_path, **FAST)
    assert not np.array_equal(np.asarray(plain.pictures[0]), np.asarray(moved.pictures[0]))


def test_hooks_on_all_modules_are_named():
    pipe = tiny.small()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert replaced_methods(pipe) == ("every module (a global hook of torch)",)
    finally:
        handle.remove()


# --- settings of any type, and code of the user's ------------------------------------------------


@pytest.fixture(scope="module")
def shared():
    """One pipeline for tests that put a processor into one layer, and take it out again."""
    return tiny.small()


def layer_of(pipe):
    return pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2


@torch.no_grad()
def look(pipe, attention=None):
    """The key of the denoiser, and what it puts out: this moves the picture."""
    layer = layer_of(pipe)
    before = layer.processor
    layer.processor = before if attention is None else attention
    text = torch.linspace(-1, 1, 5 * tiny.WIDTH).view(1, 5, tiny.WIDTH)
    latents = torch.linspace(-1, 1, 4 * 64).view(1, 4, 8, 8)
    try:
        description = describe_component(pipe.unet)
        output = pipe.unet(latents, 1, text).sample
    finally:
        layer.processor = before
    assert description.undescribed == []
    return digest_of(description, pipe.unet), output


class Set:
    """A processor with a setting, and what it does with it."""

    def __init__(self, value, change):
        self.value = value
        self.change = change

    def __call__(self, attn, hidden_states, *args, **kwargs):
        out = AttnProcessor()(attn, hidden_states, *args, **kwargs)
        return self.change(self.value, out)


class Factor:
    def __init__(self, by):
        self.by = by

    def times(self, out):
        return out * self.by


class Slotted:
    __slots__ = ("by",)

    def __init__(self, by):
        self.by = by


class Counted(collections.deque):
    pass


class Twelve(float):
    pass


def nested(value):
    for _ in range(12):
        value = {"a": [value]}
    return value


def innermost(value):
    while not isinstance(value, float):
        value = value["a"][0]
    return value


def multiplied(value, out):
    return out * float(value)


def called(value, out):
    return value(out)


def summed(value, out):
    return out * sum(value)


VALUES = {  # two values, and what a processor does with them
    "np.float32": (np.float32(1), np.float32(3), multiplied),
    "np.int64": (np.int64(1), np.int64(3), multiplied),
    "np.float64": (np.float64(1), np.float64(3), multiplied),
    "range": (range(1), range(3), lambda value, out: out * len(value)),
    "slice": (slice(0, 1), slice(0, 3), lambda value, out: out * value.stop),
    "deque": (collections.deque([1]), collections.deque([3]), summed),
    "a class of a deque": (Counted([1]), Counted([3]), summed),
    "a class of float": (Twelve(1), Twelve(3), multiplied),
    "Fraction": (fractions.Fraction(1), fractions.Fraction(3), multiplied),
    "Decimal": (decimal.Decimal(1), decimal.Decimal(3), multiplied),
    "bytearray": (bytearray([1]), bytearray([3]), summed),
    "slots": (Slotted(1.0), Slotted(3.0), lambda value, out: out * value.by),
    "a function of torch": (torch.tanh, torch.exp, called),
    "a method of a tensor": (torch.Tensor.tanh, torch.Tensor.exp, called),
    "a function of numpy": (np.tanh, np.exp, lambda value, out: out * float(value(1.0))),
    "a bound method": (Factor(1.0).times, Factor(3.0).times, called),
    "a partial": (
        functools.partial(torch.mul, other=1.0),
        functools.partial(torch.mul, other=3.0),
        lambda value, out: value(out),
    ),
    "a remembered function": (
        functools.lru_cache(lambda: 1.0),
        functools.lru_cache(lambda: 3.0),
        lambda value, out: out * value(),
    ),
    "deep down": (nested(1.0), nested(3.0), lambda value, out: out * innermost(value)),
    "a key's type": ({1: 1.0}, {"1": 1.0}, lambda value, out: out * value.get(1, 3.0)),
    "a private key": ({"_by": 1.0}, {"_by": 3.0}, lambda value, out: out * value["_by"]),
    "a set": ({1}, {"1"}, lambda value, out: out * (1 if 1 in value else 3)),
    "random numbers": (
        np.random.default_rng(0),
        np.random.default_rng(1),
        lambda value, out: out * copy.deepcopy(value).normal(),
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_settings_of_every_type_are_in_the_key(name, shared):
    one, two, change = VALUES[name]
    key, output = look(shared, Set(one, change))
    again, _ = look(shared, Set(one, change))
    other, moved = look(shared, Set(two, change))
    assert key == again, "the twin: the same setting has the same key"
    assert not torch.equal(output, moved)
    assert key != other


SCALE = 1.0
TABLE = {"scales": [1.0]}


def helper(out):
    return out * SCALE


def through_a_helper(out, by=helper):
    return next(helper(part) for part in (out,))


class InTheClass:
    table = {"scale": 1.0}  # noqa: RUF012
    tensor = torch.tensor(1.0)

    @staticmethod
    def still():
        return 1.0

    @property
    def factor(self):
        return 1.0

    def __call__(self, attn, hidden_states, *args, **kwargs):
        out = AttnProcessor()(attn, hidden_states, *args, **kwargs)
        return out * self.table["scale"] * self.tensor * self.still() * self.factor


CHANGES = {  # a processor, what is exchanged, and for what
    "a global": (lambda: Set(None, lambda _, out: out * SCALE), "SCALE", 3.0),
    "a global that a helper reads": (
        lambda: Set(None, lambda _, out: through_a_helper(out)),
        "SCALE",
        3.0,
    ),
    "a global in a global": (
        lambda: Set(None, lambda _, out: out * TABLE["scales"][0]),
        "TABLE",
        {"scales": [3.0]},
    ),
    "a helper": (lambda: Set(None, lambda _, out: helper(out)), "helper", lambda out: out * 3.0),
    "a dict of a class": (InTheClass, "InTheClass.table", {"scale": 3.0}),
    "a tensor of a class": (InTheClass, "InTheClass.tensor", torch.tensor(3.0)),
    "a static method": (InTheClass, "InTheClass.still", staticmethod(lambda: 3.0)),
    "a property": (InTheClass, "InTheClass.factor", property(lambda self: 3.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_users_code_reads_is_in_the_key(name, shared, monkeypatch):
    make, place, value = CHANGES[name]
    key, output = look(shared, make())
    assert key == look(shared, make())[0]
    monkeypatch.setattr(f"{__name__}.{place}", value)
    other, moved = look(shared, make())
    assert not torch.equal(output, moved)
    assert key != other


def test_what_holds_itself_or_the_model_is_described(shared):
    """Objects that hold their owner, a layer, or the whole pipeline: no endless paths."""
    around = Set(1.0, multiplied)
    around.itself = around
    around.layer = layer_of(shared)
    around.forward = layer_of(shared).to_q.forward
    around.everything = shared
    levels = [1.0]
    for _ in range(40):
        levels = [levels, levels]
    around.shared = levels
    assert look(shared, around)[0] == look(shared, around)[0]


def test_what_cannot_be_described_makes_pictures_afresh(tmp_path):
    pipe = tiny.small()
    layer_of(pipe).processor = Set(iter(()), lambda value, out: out)
    assert undescribed(pipe) == ()
    layer_of(pipe).processor = Set((part for part in ()), lambda value, out: out)
    fingerprint(pipe)
    assert "attn2.processor.value (builtins.generator)" in undescribed(pipe)[0]
    with pytest.warns(UserWarning, match=r"attn2\.processor\.value .*: pictures are made afresh"):
        run = generate(pipe, ["cat"], store=tmp_path, **FAST)
    with pytest.warns(UserWarning, match="made afresh"):
        again = generate(pipe, ["cat"], store=tmp_path, **FAST)
    assert run.table["image"][0] != again.table["image"][0]


def compiled(owner, name):
    setattr(owner, name, torch.compile(getattr(owner, name), backend="eager"))


COMPILED = {
    "the denoiser": lambda pipe: compiled(pipe, "unet"),
    "a block": lambda pipe: compiled(pipe.unet, "mid_block"),
    "a layer's forward": lambda pipe: compiled(layer_of(pipe), "forward"),
    "the text encoder": lambda pipe: compiled(pipe, "text_encoder"),
    "the decoder": lambda pipe: compiled(pipe.vae, "decode"),
    "in place": lambda pipe: pipe.unet.mid_block.compile(backend="eager"),
    "every layer's class": lambda pipe: compiled(type(layer_of(pipe)), "forward"),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_parts_are_in_the_key_and_are_nobodys_methods(name, monkeypatch):
    pipe = tiny.small()
    kind = type(layer_of(pipe))
    monkeypatch.setattr(kind, "forward", kind.forward)  # put back afterwards

    def key():
        return fingerprint(pipe), digest_of(describe_pipeline(pipe))

    plain = key()
    COMPILED[name](pipe)
    assert key() == key() != plain
    assert (*replaced_methods(pipe), *undescribed(pipe)) == ()


def test_pictures_of_a_compiled_model_are_kept(tmp_path, recwarn):
    pipe = tiny.small()
    compiled(pipe, "unet")
    run = generate(pipe, ["cat"], store=tmp_path, **FAST)
    again = generate(pipe, ["cat"], store=tmp_path, **FAST)
    assert run.table["image"][0] == again.table["image"][0]
    assert not [warning for warning in recwarn if "afresh" in str(warning.message)]


def test_somebodys_own_function_stays_foreign_when_compiled():
    pipe = tiny.small()
    layer = layer_of(pipe)
    layer.forward = torch.compile(patched(layer.forward), backend="eager")
    assert any(name.endswith("attn2.forward") for name in replaced_methods(pipe))


# --- checksums -----------------------------------------------------------------------------------


def one_element(tensor):
    tensor.data[-1, 3] += 1e-30


def all_signs(tensor):
    tensor.data.neg_()


def two_signs(tensor):
    tensor.data[0, 1:4:2].neg_()


def rows_exchanged(tensor):
    tensor.data[:2] = tensor.data[:2].flip(0).clone()


def elements_exchanged(tensor):
    tensor.data[5, :2] = tensor.data[5, :2].flip(0).clone()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8]
)
@pytest.mark.parametrize(
    "change", [one_element, all_signs, two_signs, rows_exchanged, elements_exchanged]
)
def test_a_checksum_notices_each_change(change, dtype):
    torch.manual_seed(0)
    values = torch.randn(300, 301)  # rows that are no multiple of 4 bytes
    values[-1, 3] = 0
    stored = values.to(dtype) if dtype.is_floating_point else (values * 30).to(dtype)
    before, version = checksum(stored).item(), stored._version
    assert checksum(stored.clone()).item() == before
    changed = stored.to(torch.float64)
    change(changed)
    if change is one_element:
        changed[-1, 3] = 1
    stored.data.copy_(changed.to(dtype))
    assert checksum(stored).item() != before
    assert stored._version == version, "the twin: torch's own count does not notice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_change_of_signs_goes_unseen(dtype):
    """In 64 bits the highest bit of a word is lost to every even weight: signs are where a sum is weakest."""
    torch.manual_seed(0)
    values = torch.randn(40000).to(dtype)
    seen = {checksum(values).item()}
    for _ in range(200):
        seen.add(checksum(torch.where(torch.rand(40000) < 0.5, values, -values)).item())
    assert len(seen) == 201


def test_weights_are_hashed_again_only_where_they_changed(monkeypatch):
    pipe = tiny.small()
    torch.manual_seed(0)
    pipe.unet.register_buffer("large", torch.randn(100, 100), persistent=False)
    pipe.unet.larger = torch.nn.Parameter(torch.randn(200, 100))
    plain = fingerprint(pipe)
    hashed, sha256 = [], fingerprints._sha256
    monkeypatch.setattr(
        fingerprints,
        "_sha256",
        lambda tensor: (hashed.append(tuple(tensor.shape)), sha256(tensor))[1],
    )
    monkeypatch.setattr(fingerprints, "_is_quick_to_hash", lambda tensor: tensor.numel() < 10000)
    assert fingerprint(pipe) == plain
    assert {(100, 100), (200, 100)}.isdisjoint(hashed)
    for tensor in (pipe.unet.large, pipe.unet.larger):
        fingerprint(pipe)
        hashed.clear()
        tensor.data[7, 7] += 1e-6
        assert fingerprint(pipe) != plain
        assert [shape for shape in hashed if np.prod(shape) >= 10000] == [tuple(tensor.shape)]
        tensor.data[7, 7] -= 1e-6


def test_the_fingerprint_is_that_of_the_tensors_not_of_the_checksums():
    """Remembered or not, in whatever order: one model, one fingerprint."""
    pipe = tiny.small()
    plain = fingerprint(pipe)
    pipe.unet.conv_in.weight.data.add_(1)
    edited = fingerprint(pipe)
    fingerprints._digests.clear()
    assert fingerprint(pipe) == edited != plain
