"""What else happens to the weights of an edited model: it is noticed, and nothing is restored over it in silence."""

import copy
import warnings

import pytest
import torch
from support import tiny

from locogen.editing import weights as editing_weights
from locogen.editing.edit import Edit, fit_edit, undo_all
from locogen.editing.files import write_edit
from locogen.errors import LocogenError
from locogen.localization.causal_tracing import causal_trace
from locogen.models.families import denoiser_of
from locogen.models.offload import weight_of
from locogen.pictures.checks import oddities
from locogen.pictures.runs import generate
from locogen.plan import Concept, PromptPair

STYLE = Concept("cat", "style", (PromptPair("a dog in cat", "a dog"),))
CAT = Concept("cat", "object", (PromptPair("a cat", "a dog"),))
PAIRS = [("a cat", "a do"), ("the cat", "the do")]
LAYERS = (2, 3)


def fit(pipe, layers=LAYERS, pairs=PAIRS, **options) -> Edit:
    return fit_edit(pipe, STYLE, layers=layers, phrasings=pairs, **options)


def bits(denoiser) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in denoiser.state_dict().items()}


def same(one, two) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture
def pipe():
    return tiny.small()


@pytest.fixture(scope="module")
def edit() -> Edit:
    """Fitted on the weights that every `pipe` has."""
    return fit(tiny.small())


def edited_module(pipe, edit):
    return pipe.unet.get_submodule(next(iter(edit.changes)).removesuffix(".weight"))


# --- changes from outside while an edit is applied -----------------------------------------------


def write_data(pipe, edit) -> None:
    edited_module(pipe, edit).weight.data[0, 0] += 1.0


def train(pipe, edit) -> None:
    weight = edited_module(pipe, edit).weight
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    weight.square().sum().backward()
    optimizer.step()


def convert(pipe, edit) -> None:
    pipe.to(torch.bfloat16)


def convert_and_back(pipe, edit) -> None:
    pipe.to(torch.bfloat16).to(torch.float32)


def load_other_weights(pipe, edit) -> None:
    pipe.unet.load_state_dict({name: value * 1.01 for name, value in bits(pipe.unet).items()})


def exchange_module(pipe, edit) -> None:
    path = next(iter(edit.changes)).removesuffix(".weight")
    parent, _, name = path.rpartition(".")
    old = pipe.unet.get_submodule(path)
    setattr(
        pipe.unet.get_submodule(parent),
        name,
        torch.nn.Linear(old.in_features, old.out_features, bias=False),
    )


def exchange_for_another_shape(pipe, edit) -> None:
    path = next(iter(edit.changes)).removesuffix(".weight")
    parent, _, name = path.rpartition(".")
    setattr(pipe.unet.get_submodule(parent), name, torch.nn.Linear(3, 5, bias=False))


def fuse_lora(pipe, edit) -> None:
    """Another LoRA than the edit's own."""
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    pipe.fuse_lora()
    pipe.unload_lora_weights()


CHANGES = [
    *(write_data, train, convert, convert_and_back, load_other_weights),
    *(exchange_module, exchange_for_another_shape, fuse_lora),
]


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_changed_while_an_edit_was_applied_are_not_overwritten(
    pipe, edit, change
) -> None:
    left: dict[str, torch.Tensor] = {}

    def work() -> None:
        with edit.applied(pipe):
            change(pipe, edit)
            left.update(bits(pipe.unet))

    with pytest.raises(
        LocogenError, match=r"changed while the edit of 'cat' was applied.*overwrite=True"
    ):
        work()
    assert same(bits(pipe.unet), left)  # nothing was restored
    with pytest.raises(LocogenError, match="changed while the edit"):
        edit.undo_(pipe)
    with pytest.raises(LocogenError, match="changed while the edit"):
        undo_all(pipe)


@pytest.mark.parametrize(
    "change", [write_data, train, load_other_weights, exchange_module, fuse_lora]
)
def test_overwrite_puts_the_originals_back_over_the_change(pipe, edit, change) -> None:
    originals = bits(pipe.unet)
    edit.apply_(pipe)
    change(pipe, edit)
    undo_all(pipe, overwrite=True)
    now = bits(pipe.unet)
    assert all(torch.equal(now[name], originals[name]) for name in edit.changes)


def test_undo_goes_on_once_the_change_is_taken_back(pipe, edit) -> None:
    originals = bits(pipe.unet)
    edit.apply_(pipe)
    with_edit = bits(pipe.unet)
    load_other_weights(pipe, edit)
    with pytest.raises(LocogenError, match="changed while"):
        edit.undo_(pipe)
    pipe.unet.load_state_dict(with_edit)
    edit.undo_(pipe)
    assert same(bits(pipe.unet), originals)


def test_changes_of_other_weights_are_no_matter(pipe, edit) -> None:
    """The twin: what the edit does not touch may change, and the change stays."""
    originals = bits(pipe.unet)
    with edit.applied(pipe):
        pipe.unet.conv_in.weight.data += 1.0
    now = bits(pipe.unet)
    assert torch.equal(now.pop("conv_in.weight"), originals.pop("conv_in.weight") + 1.0)
    assert same(now, originals)


# --- what is said before pictures are made -------------------------------------------------------


FEW = {"num_inference_steps": 1, "guidance_scale": 1.0, "progress": False}


def warnings_of(pipe) -> list[str]:
    """What is said of edits when a picture is made; all of it points at the call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(pipe, ["a cat"], **FEW)
    messages = [warning for warning in caught if "the edit of" in str(warning.message)]
    assert all(warning.filename == __file__ for warning in messages)
    return [str(warning.message) for warning in messages]


def add_lora(pipe, edit) -> None:
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))


def test_an_edit_and_its_own_lora_are_noticed_before_pictures_are_made(pipe, edit, tmp_path):
    edit.to_lora(tmp_path / "lora.safetensors")
    edit.apply_(pipe)
    assert warnings_of(pipe) == []
    pipe.load_lora_weights(tmp_path / "lora.safetensors")
    (message,) = warnings_of(pipe)
    assert "its own LoRA is loaded as well: the change counts twice" in message
    assert "pipe.unload_lora_weights()" in message

    with pytest.warns(UserWarning, match="the change counts twice"):
        causal_trace(pipe, CAT, parts=["text MLP"], seeds=[0], scorer=tiny.FakeScorer(), **FEW)
    pipe.disable_lora()
    assert warnings_of(pipe) == []
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert warnings_of(pipe) == []


def test_an_edit_and_another_lora_on_the_same_matrices_are_noticed(pipe, edit) -> None:
    add_lora(pipe, edit)
    assert warnings_of(pipe) == []  # the twin: without an edit it is the user's own matter
    pipe.unload_lora_weights()
    edit.apply_(pipe)
    add_lora(pipe, edit)
    (message,) = warnings_of(pipe)
    assert f"LoRA on {len(edit.changes)} of the same matrices too" in message


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_changed_are_noticed_before_pictures_are_made(pipe, edit, change) -> None:
    edit.apply_(pipe)
    pipe.unet.conv_in.weight.data += 0.01  # the twin: this one is not edited
    assert warnings_of(pipe) == []
    change(pipe, edit)
    if change is exchange_for_another_shape:  # such a model makes no pictures
        assert any("changed while the edit of 'cat'" in message for message in oddities(pipe))
        return
    (message,) = warnings_of(pipe)
    assert "changed while the edit of 'cat' was applied" in message
    assert "overwrite=True" in message


def test_weights_are_compared_where_offload_keeps_them(pipe, edit) -> None:
    from accelerate import cpu_offload

    edit.apply_(pipe)
    cpu_offload(pipe.unet, torch.device("cpu"))
    module = edited_module(pipe, edit)
    assert module.weight.is_meta
    assert list(oddities(pipe)) == []
    weight_of(module, "").data[0, 0] += 1.0
    assert any("changed while the edit of 'cat'" in message for message in oddities(pipe))


def test_a_second_edit_is_not_added_to_changed_weights(pipe, edit) -> None:
    """It would be added to the originals, and the change would be lost."""
    other = fit(pipe, pairs=[("a cat", "a dog")])
    edit.apply_(pipe)
    write_data(pipe, edit)
    left = bits(pipe.unet)
    with pytest.raises(LocogenError, match=r"changed while the edit of 'cat'"):
        other.apply_(pipe)
    assert same(bits(pipe.unet), left)


@pytest.mark.parametrize("make", [tiny.pipeline, tiny.sd3, tiny.flux])
def test_projections_fused_while_an_edit_is_applied(make) -> None:
    """The fused copy holds the edit: restoring the matrices alone would leave it in the pictures."""
    pipe = make()
    edit = fit(pipe, layers=(0, 1))
    denoiser = denoiser_of(pipe)
    originals = bits(denoiser)

    def work() -> None:
        with edit.applied(pipe):
            denoiser.fuse_qkv_projections()

    with pytest.raises(
        LocogenError,
        match=r"fused copy holds the edit, so nothing was undone: call pipe.unfuse_qkv_projections\(\)",
    ):
        work()
    with pytest.raises(LocogenError, match="fused with its neighbors"):
        fit(pipe, layers=(0, 1), pairs=[("a cat", "a dog")]).apply_(pipe)
    denoiser.unfuse_qkv_projections()
    edit.undo_(pipe)
    now = bits(denoiser)
    assert all(torch.equal(now[name], value) for name, value in originals.items())


def test_a_denoiser_that_is_exchanged_within_the_context_loses_the_edit(pipe, edit) -> None:
    first = pipe.unet
    originals = bits(first)
    with edit.applied(pipe):
        assert not same(bits(first), originals)
        pipe.unet = tiny.small().unet
    assert same(bits(first), originals)


# --- nothing to undo -----------------------------------------------------------------------------


def test_undo_all_says_when_there_is_nothing_to_undo(pipe, edit) -> None:
    with pytest.warns(
        UserWarning, match=r"no edit is applied to this UNet2DConditionModel, so nothing was undone"
    ):
        undo_all(pipe)
    edit.apply_(pipe)
    undo_all(pipe)  # a warning would be an error


def test_a_copy_of_an_edited_model_is_told_from_it(pipe, edit) -> None:
    with edit.applied(pipe):
        twin = copy.deepcopy(pipe)
    with pytest.warns(UserWarning, match="A copy of an edited model keeps the edit"):
        undo_all(twin)
    with pytest.raises(LocogenError, match="A copy of an edited model keeps the edit"):
        edit.undo_(twin)


# --- compiled denoisers --------------------------------------------------------------------------


def test_an_edit_is_the_same_before_and_after_compilation(pipe, edit, tmp_path) -> None:
    """`torch.compile` wraps the module, and puts its own name into that of every weight."""
    from safetensors import safe_open

    inner = pipe.unet
    originals = bits(inner)
    pipe.unet = torch.compile(inner, backend="eager")
    assert all(name.startswith("_orig_mod.") for name, _ in pipe.unet.named_parameters())
    with torch.compiler.set_stance("force_eager"):  # only the names matter here
        compiled = fit(pipe)
    assert compiled.digest == edit.digest and list(compiled.changes) == list(edit.changes)
    compiled.to_lora(tmp_path / "lora.safetensors")
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert not any("_orig_mod" in key for key in file.keys())  # noqa: SIM118
    compiled.apply_(pipe)
    pipe.unet = inner
    compiled.undo_(pipe)
    edit.apply_(pipe)
    pipe.unet = torch.compile(inner, backend="eager")
    edit.undo_(pipe)
    assert same(bits(inner), originals)


def test_a_compiled_block_leaves_no_trace_in_the_names(pipe, edit) -> None:
    pipe.unet.down_blocks[1] = torch.compile(pipe.unet.down_blocks[1], backend="eager")
    assert any("down_blocks.1._orig_mod." in name for name, _ in pipe.unet.named_parameters())
    with torch.compiler.set_stance("force_eager"):
        compiled = fit(pipe)
    assert compiled.digest == edit.digest and list(compiled.changes) == list(edit.changes)
    originals = bits(pipe.unet)
    with edit.applied(pipe):
        assert not same(bits(pipe.unet), originals)
    assert same(bits(pipe.unet), originals)


@pytest.mark.parametrize(
    ("plain", "compiled"),
    [("down_blocks", "_orig_mod.down_blocks"), ("blocks.1.", "blocks.1._orig_mod.")],
)
def test_files_with_the_names_of_a_compiled_model_still_fit(
    pipe, edit, tmp_path, plain: str, compiled: str
) -> None:
    """Edits were saved so: the digest was taken with those names too."""

    def old(name: str) -> str:
        return name.replace(plain, compiled, 1)

    weights = {old(name): pipe.unet.get_parameter(name) for name in edit.changes}
    recipe = {
        **edit.recipe,
        "relative_change": {old(n): size for n, size in edit.recipe["relative_change"].items()},
    }
    record = {
        "format": 1,
        "name": "cat",
        "layers": LAYERS,
        "digest": editing_weights.digest_of(weights),
    }
    changes = {old(name): change for name, change in edit.changes.items()}
    write_edit(tmp_path / "old.safetensors", record | {"recipe": recipe}, changes)
    loaded = Edit.load(tmp_path / "old.safetensors")
    assert list(loaded.changes) == list(loaded.recipe["relative_change"]) == list(edit.changes)
    loaded.save(tmp_path / "new.safetensors")
    originals = bits(pipe.unet)
    for again in (loaded, Edit.load(tmp_path / "new.safetensors")):
        with again.applied(pipe):
            assert not same(bits(pipe.unet), originals)
        assert same(bits(pipe.unet), originals)
    with torch.no_grad():
        edited_module(pipe, edit).weight[0, 0] += 1e-3
    with pytest.raises(LocogenError, match="made for other weights"):
        loaded.apply_(pipe)


# --- what cannot be edited -----------------------------------------------------------------------


def test_float8_storage_is_refused(pipe, edit) -> None:
    pipe.unet.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    for attempt in (lambda: fit(pipe), lambda: edit.apply_(pipe)):
        with pytest.raises(
            LocogenError, match=r"stored as float8_e4m3fn.*without enable_layerwise_casting"
        ):
            attempt()


@pytest.mark.parametrize("make", [tiny.pipeline, tiny.sdxl, tiny.flux, tiny.pixart])
def test_a_pipeline_without_its_text_encoder_says_so(make) -> None:
    pipe = make()
    pipe.text_encoder = None
    with pytest.raises(
        LocogenError, match=r"has no text_encoder, so it cannot read prompts.*targets=…"
    ):
        fit(pipe)


def test_stable_diffusion_3_needs_no_t5() -> None:
    pipe = tiny.sd3()
    pipe.text_encoder_3 = None
    assert fit(pipe, layers=(0,)).changes


def test_a_tree_that_is_not_installed_knows_its_version(pipe, monkeypatch) -> None:
    from importlib import metadata

    import locogen
    from locogen.editing import fit as fit_module

    def installed(name: str) -> str:
        if name == "locogen":
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr(fit_module, "version", installed)
    assert fit(pipe).recipe["versions"]["locogen"] == locogen.__version__
