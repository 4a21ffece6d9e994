"""Checkpoints as they lie on people's disks: what diffusers loads is loaded, what is refused is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.single_file import write_single_file

from locogen.errors import LocogenError, UnsupportedModel
from locogen.models.families import encode
from locogen.models.load import load

WEIGHTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    place = tmp_path_factory.mktemp("original")
    tiny.pipeline().save_pretrained(place)
    return place


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


def weights_of(folder, part):
    return folder / part / f"{WEIGHTS[part]}.safetensors"


def add_variant(folder, part, variant="fp16", *, only=True):
    """The half-precision weights of a part, as `save_pretrained(variant="fp16")` names them."""
    plain = weights_of(folder, part)
    halves = {name: tensor.half() for name, tensor in load_file(plain).items()}
    save_file(halves, plain.with_name(f"{WEIGHTS[part]}.{variant}.safetensors"), {"format": "pt"})
    if only:
        plain.unlink()


def index_with(folder, **entries):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def conv_in(pipe):
    return pipe.unet.conv_in.weight


def test_a_variant_is_loaded_by_itself_where_it_is_the_only_one(original, folder):
    for part in WEIGHTS:
        add_variant(folder, part)
    pipe, full = load(folder), load(original)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert torch.equal(conv_in(pipe), conv_in(full).half().float())
    assert not torch.equal(conv_in(pipe), conv_in(full)), (
        "the twin: these weights are not halves already"
    )
    assert load(folder, dtype="float16").unet.dtype == torch.float16


def test_parts_are_looked_at_one_by_one_and_full_precision_is_preferred(original, folder):
    add_variant(folder, "unet")
    add_variant(folder, "vae", only=False)
    pipe, full = load(folder), load(original)
    assert torch.equal(conv_in(pipe), conv_in(full).half().float())
    assert torch.equal(pipe.vae.encoder.conv_in.weight, full.vae.encoder.conv_in.weight)


def test_several_variants_without_plain_weights_are_refused(folder):
    add_variant(folder, "unet", only=False)
    add_variant(folder, "unet", "non_ema")
    with pytest.raises(LocogenError, match=r"'unet'.*several variants \(fp16, non_ema\)"):
        load(folder)


def test_a_sharded_variant_loads(original, folder):
    pipe = load(original)
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", variant="fp16", max_shard_size="40KB")
    assert len(list((folder / "unet").glob("*.fp16-0*.safetensors"))) > 1
    assert torch.equal(conv_in(load(folder)), conv_in(pipe))


def test_a_shard_that_is_missing_is_named(original, folder):
    pipe = load(original)
    shutil.rmtree(folder / "unet")
    pipe.unet.save_pretrained(folder / "unet", max_shard_size="40KB")
    victim = sorted((folder / "unet").glob("*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(LocogenError, match=rf"'unet'.*lacks {victim.name}.*fetch it again"):
        load(folder)


@pytest.mark.parametrize("part", WEIGHTS)
def test_one_pickled_part_is_refused_by_its_name(folder, part):
    plain = weights_of(folder, part)
    plain.with_suffix(".bin").write_bytes(b"not even a pickle: it is never opened")
    plain.unlink()
    with pytest.raises(
        LocogenError, match=rf"'{part}'.*{plain.stem}\.bin.*pickled weights are refused.*convert"
    ):
        load(folder)


def test_a_pickled_checkpoint_is_refused(tmp_path):
    file = tmp_path / "v1-5.ckpt"
    file.write_bytes(b"not even a pickle")
    for place in (file, tmp_path):
        with pytest.raises(LocogenError, match=r"v1-5\.ckpt.*pickled weights are refused"):
            load(place)


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0, "cut short"),
        (6, "cut short"),
        (200, "cut short"),
        (-1, "cut short"),
        (None, "Git LFS pointer"),
    ],
)
def test_a_file_that_was_cut_short_is_named(folder, part, keep, words):
    file = weights_of(folder, part)
    content = (
        file.read_bytes()[:keep]
        if keep is not None
        else b"version https://git-lfs.github.com/spec/v1\noid sha256"
    )
    file.write_bytes(content)
    with pytest.raises(
        LocogenError, match=rf"'{part}'.*{words}.*{file.name}|'{part}'.*{words}.*fetch it again"
    ):
        load(folder)


def test_parts_that_are_not_needed_may_have_been_deleted(folder):
    """The index still names them, as after `rm -r safety_checker` to save 1.2 GB."""
    index_with(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    pipe = load(folder)
    assert pipe.safety_checker is None and pipe.feature_extractor is None
    shutil.rmtree(folder / "vae")  # the twin: without this part there are no pictures
    with pytest.raises(LocogenError, match=r"'vae'.*is missing: fetch its folder again"):
        load(folder)


def test_a_home_folder_is_expanded(original, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(original.parent))
    place = f"~/{original.name}"
    assert type(load(place)).__name__ == "StableDiffusionPipeline"
    entries = tmp_path / "own.toml"
    entries.write_text(f'[models.mine]\nid = "{place}"\nfamily = "StableDiffusionPipeline"\n')
    assert type(load("mine", file=entries)).__name__ == "StableDiffusionPipeline"
    with pytest.raises(LocogenError, match=rf"there is no folder {original.parent}/nowhere"):
        load("~/nowhere")


def test_one_part_alone_is_no_pipeline(folder):
    with pytest.raises(LocogenError, match="one part of a pipeline"):
        load(folder / "unet")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(LocogenError, match=r"model_index\.json is damaged"):
        load(folder)


# --- the local cache of the hub ------------------------------------------------------------------


def test_a_hub_id_whose_half_precision_variant_alone_was_fetched(folder, tmp_path, monkeypatch):
    """As `hf download --include "*.fp16.*"` leaves it; the pipeline remembers its hub id, not the cache."""
    for part in WEIGHTS:
        add_variant(folder, part)
    cached = tmp_path / "hub" / "models--somebody--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("1a2b")
    shutil.copytree(folder, cached / "snapshots" / "1a2b")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False
    )
    pipe = load("somebody/model", local_files_only=True)
    assert pipe.config._name_or_path == "somebody/model"
    victim = cached / "snapshots" / "1a2b" / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    victim.write_bytes(victim.read_bytes()[:-8])
    with pytest.raises(LocogenError, match=r"somebody/model.*'unet'.*cut short"):
        load("somebody/model", local_files_only=True)


def test_a_checkpoint_that_left_the_hub_is_named_by_its_copy():
    from locogen.catalog import model_entries

    for entry in model_entries():
        if not entry.mirrors:
            continue
        with pytest.raises(LocogenError) as caught:
            load(entry.name, local_files_only=True)
        assert f"hf download {entry.mirrors[0]}" in str(caught.value)
        assert f"hf download {entry.id}" not in str(caught.value)


# --- single files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A pipeline whose CLIP is as wide as diffusers expects of the first one, and its single file."""
    place = tmp_path_factory.mktemp("single")
    words = tiny.clip(
        hidden_size=768, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    pipe = tiny.pipeline(cross_attention_dim=768)
    pipe.register_modules(text_encoder=words)
    pipe.save_pretrained(place / "diffusers")
    write_single_file(pipe, place / "model.safetensors")
    return pipe, place / "model.safetensors", place / "diffusers"


def test_a_single_file_is_the_pipeline_that_it_was_made_of(single, tmp_path):
    """Where it lies in a folder with the configuration, as in the repositories of the checkpoints."""
    pipe, file, folder = single
    place = Path(
        shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    )
    again = load(shutil.copy(file, place / "model.safetensors"))
    for part in WEIGHTS:
        before, after = getattr(pipe, part).state_dict(), getattr(again, part).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), part
    assert torch.equal(encode(pipe, ["cat"]).states, encode(again, ["cat"]).states)
    assert load(place / "model.safetensors", dtype="bfloat16").unet.dtype == torch.bfloat16


def test_a_single_file_without_a_configuration_names_where_to_get_one(single, tmp_path):
    file = shutil.copy(single[1], tmp_path / "model.safetensors")
    fetch = r"hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include '\*\.json'"
    with pytest.raises(LocogenError, match=fetch):
        load(file, local_files_only=True)
    with pytest.raises(
        LocogenError, match=r"no model_index\.json but the single file model\.safetensors"
    ):
        load(tmp_path)


def test_a_file_of_something_else_is_named(tmp_path):
    file = tmp_path / "lora.safetensors"
    save_file({"lora_unet_down.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(LocogenError, match="not a checkpoint of a whole pipeline"):
        load(file)
    save_file({"cap_embedder.0.weight": torch.zeros(1, 2)}, file)
    with pytest.raises(UnsupportedModel, match="is a lumina2 checkpoint: supported are"):
        load(file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(LocogenError, match=r"lora\.safetensors has a file that was cut short"):
        load(file)
    with pytest.raises(LocogenError, match="there is no file"):
        load(tmp_path / "typo.safetensors")


# --- T5 ------------------------------------------------------------------------------------------


def test_t5_keeps_the_weights_that_overflow_in_half_precision_in_float32(tmp_path):
    """What transformers keeps is kept: states beyond float16's range stay finite, as in diffusers."""
    from diffusers import DiffusionPipeline

    pipe = tiny.FAMILIES["if"]()
    with torch.no_grad():
        for block in pipe.text_encoder.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(1e8)
    pipe.save_pretrained(tmp_path)
    ours = load(tmp_path, dtype="float16").text_encoder
    theirs = DiffusionPipeline.from_pretrained(
        tmp_path, dtype=torch.float16, use_safetensors=True
    ).text_encoder
    kinds = {name: weight.dtype for name, weight in ours.named_parameters()}
    assert kinds == {name: weight.dtype for name, weight in theirs.named_parameters()}
    assert {kind for name, kind in kinds.items() if name.endswith("wo.weight")} == {torch.float32}
    tokens = pipe.tokenizer(["cat in a"], return_tensors="pt").input_ids
    with torch.no_grad():
        states = ours(tokens).last_hidden_state
        assert torch.equal(states, theirs(tokens).last_hidden_state)
        assert torch.isfinite(states).all()
        assert not torch.isfinite(ours.half()(tokens).last_hidden_state).all(), (
            "the twin: all of it in float16"
        )


def test_a_t5_tokenizer_shipped_as_a_sentencepiece_model_alone_loads(tmp_path):
    """As older checkpoints (DeepFloyd IF, PixArt) have it: no tokenizer.json."""
    import io

    import sentencepiece

    pipe = tiny.FAMILIES["if"]()
    pipe.save_pretrained(tmp_path)
    place = tmp_path / "tokenizer"
    shutil.rmtree(place)
    place.mkdir()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a cat in a hat", "a dog on a log", "the cat and the dog"] * 20),
        model_writer=model,
        vocab_size=19,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=9,
    )
    (place / "spiece.model").write_bytes(model.getvalue())
    (place / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T5Tokenizer", "extra_ids": 0}'
    )
    ids = load(tmp_path).tokenizer("a cat").input_ids
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert ids == [*pieces.encode("a cat"), pieces.eos_id()]


# --- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "offload", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            None,
            r"weights \(0\.0 GB\) do not fit.*offload='model' or",
        ),
        (
            RuntimeError("CUDA error: out of memory"),
            "model",
            r"do not fit the memory of 'cuda'.*offload='sequential'",
        ),
        (
            AssertionError("Torch not compiled with CUDA enabled"),
            None,
            "'cuda' is not available.*use 'cpu'",
        ),
    ],
)
def test_weights_that_are_too_large_are_not_a_device_that_is_missing(
    original, monkeypatch, error, offload, words
):
    def full(*args):
        raise error

    monkeypatch.setattr("locogen.models.load._place", full)
    with pytest.raises(LocogenError, match=words):
        load(original, device="cuda", offload=offload)


def test_float32_on_a_card_is_hinted_at_once(original, monkeypatch):
    """On the CPU, in half precision, and for the small embedded model there is no hint."""
    from locogen.models import load as module

    monkeypatch.setattr(module, "_place", lambda *_: None)
    module._hint_at_half_precision.cache_clear()
    load(original)
    load(original, device="cuda", dtype="float16")
    load("mini", device="cuda")
    with pytest.warns(
        UserWarning, match=r"float32 on 'cuda' takes twice the memory.*dtype='float16'"
    ) as hints:
        load(original, device="cuda")
        load(original, device="cuda")
    assert len(hints) == 1 and hints[0].filename == __file__


# --- incomplete checkpoints ----------------------------------------------------------------------

PARTS_OF = {
    "sd": ("scheduler", "text_encoder", "tokenizer", "unet", "vae"),
    "sd-xl": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet"),
    "flux": ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer"),
}
FAMILY_PARTS = [(family, part) for family, parts in PARTS_OF.items() for part in parts]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved pipeline of each family: its folder."""
    places = {}
    for family in PARTS_OF:
        places[family] = tmp_path_factory.mktemp(family)
        tiny.FAMILIES[family]().save_pretrained(places[family])
    return places


def load_and_encode(folder):
    return encode(load(folder), ["cat"]).states


@pytest.mark.parametrize("emptied", [False, True], ids=["deleted", "empty"])
@pytest.mark.parametrize(("family", "part"), FAMILY_PARTS)
def test_a_part_that_is_not_there_is_named(saved, tmp_path, family, part, emptied):
    """A tokenizer without files would be one without words. SD-XL may do without an encoder."""
    folder = Path(shutil.copytree(saved[family], tmp_path / "model"))
    shutil.rmtree(folder / part)
    if emptied:
        (folder / part).mkdir()
    words = rf"the part '{part}' of .* is (missing|an empty folder): fetch|has no {part}, so it"
    with pytest.raises(LocogenError, match=words):
        load_and_encode(folder)


@pytest.mark.parametrize("family", PARTS_OF)
def test_a_file_that_is_not_there_is_named_or_not_needed(saved, tmp_path, family):
    """The twin is the folder as it was saved, which loads."""
    whole = load_and_encode(saved[family])
    tokenizer = Path(shutil.copytree(saved[family], tmp_path / "model")) / "tokenizer"
    for name, words in {
        "tokenizer.json": r"'tokenizer'.*has no vocabulary",
        "tokenizer_config.json": r"'tokenizer'.*has no tokenizer_config\.json",
    }.items():
        content = (tokenizer / name).read_bytes()
        (tokenizer / name).unlink()
        with pytest.raises(LocogenError, match=words):
            load(tokenizer.parent)
        (tokenizer / name).write_bytes(content)
    assert torch.equal(load_and_encode(tokenizer.parent), whole)
    (tokenizer.parent / "text_encoder" / "config.json").unlink()
    with pytest.raises(LocogenError, match=r"'text_encoder'.*has weights but no config\.json"):
        load(tokenizer.parent)


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_weight_that_no_file_holds_is_named(folder, part):
    """In transformers it would have random values, in diffusers none, which would blame the device."""
    file = weights_of(folder, part)
    tensors = load_file(file)
    first, second = sorted(name for name in tensors if name.endswith(".weight"))[:2]
    del tensors[first]
    save_file(tensors, file, {"format": "pt"})
    tail = first.removeprefix("text_model.")
    with pytest.raises(
        LocogenError, match=rf"'{part}'.* lacks the weight \S*{tail}: .*fetch the part"
    ):
        load(folder)
    del tensors[second]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(LocogenError, match=rf"'{part}'.* lacks .* and 1 more: the checkpoint"):
        load(folder)


def test_weights_and_configuration_of_two_text_encoders_are_named(folder):
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 41}))
    with pytest.raises(LocogenError, match=r"'text_encoder'.*\(40, 16\).*asks for \(41, 16\)"):
        load(folder)


def test_a_single_file_that_lacks_a_weight_is_named(single, tmp_path):
    _, file, folder = single
    place = Path(
        shutil.copytree(folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    )
    tensors = load_file(file)
    del tensors["model.diffusion_model.out.0.weight"]
    save_file(tensors, place / "model.safetensors")
    with pytest.raises(
        LocogenError, match=r"model\.safetensors lacks weights that.*fetch it again"
    ):
        load(place / "model.safetensors")
    shutil.rmtree(place / "tokenizer")
    with pytest.raises(LocogenError, match=r"configured by .*'tokenizer'.*is missing"):
        load(place / "model.safetensors")


# --- text files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"]
)
@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("utf-8-sig", "begins with a byte-order mark.*save the file as UTF-8 without byte-order"),
        ("utf-16", "is not UTF-8 text: save the file as UTF-8 without byte-order mark"),
        (None, "is damaged: fetch it again"),
    ],
)
def test_an_encoding_that_diffusers_does_not_read_is_named(folder, file, encoding, words):
    """Editors on Windows write both. Nothing is damaged then, and fetching again is no remedy."""
    place = folder / file
    text = place.read_text(encoding="utf-8")
    if encoding is None:
        place.write_text(text[:-4])
    else:
        place.write_text(text, encoding=encoding)
    with pytest.raises(LocogenError, match=f"{place.name} {words}"):
        load(folder)
    place.write_text(text, encoding="utf-8")
    load(folder)  # the twin
