"""Editing and neurons for every family: what is fitted is what the layers read, and it shares as LoRA."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny

from locogen.editing.edit import fit_edit
from locogen.editing.evaluation import evaluate
from locogen.editing.neurons import find_neurons
from locogen.editing.probes import Probe
from locogen.errors import LocogenError
from locogen.interventions.clamping import clamp
from locogen.interventions.layer_inputs import LayerInputs
from locogen.localization.localize import localize
from locogen.models.families import denoiser_of, family_of, subject_positions, token_spans
from locogen.models.layers import find_layers
from locogen.phrasings import Phrasing
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import generate
from locogen.plan import Concept, PromptPair

STYLE = Concept("cat", "style", (PromptPair("a dog in cat", "a dog"), PromptPair("b in cat", "b")))
PAIRS = [("a cat in b", "a dog in b"), ("cat", "dog")]
FAST = {"num_inference_steps": 2, "guidance_scale": 3.0, "batch_size": 2, "progress": False}
FLUXES = ["flux", "flux-2", "flux-2-klein", "chroma"]  # with single blocks behind two double ones
ENTRIES = {"sd-xl", "sd-3", "qwen-image", "kolors", *FLUXES, "krea-2"}
LORA = ["sd-xl", "if", "sd-3", "sana", "qwen-image", "kolors", "wan", "hidream", *FLUXES, "krea-2"]
OWN_READINGS = ("if", "sd-3", "qwen-image", "hidream", *FLUXES)  # each layer reads something else
JOINED = ("z-image", "lumina-2", "krea-2")  # in every layer
EDITED = [name for name in tiny.FAMILIES if name not in ("sd", "lcm", "pixart-sigma", *JOINED)]


@pytest.fixture(params=tiny.fast(*tiny.FAST, of=EDITED))
def name(request):
    return request.param


@pytest.fixture
def pipe(name):
    return tiny.FAMILIES[name]()


def fit(pipe, layers=(0, 1), **options):
    return fit_edit(pipe, STYLE, layers=layers, phrasings=PAIRS, **options)


def test_a_small_ridge_sends_what_a_layer_reads_where_its_target_goes(pipe):
    """Per layer, by its own readings (after IF's norm, after a projection, inside joint blocks), biases included."""
    edit, reader = fit(pipe, ridge=1e-10), LayerInputs(pipe, find_layers(pipe)[:2])
    denoiser, family = denoiser_of(pipe), family_of(pipe)
    paths = {module: path for path, module in denoiser.named_modules()}
    assert len(edit.changes) == 4
    for layer in reader.layers:
        for matrix in family.matrices(layer.module).values():
            change = edit.changes[f"{paths[matrix]}.weight"].change
            for source, target in PAIRS:
                old, new = reader.exchange(
                    source, target, "cat", family.tokens, Phrasing(source, target, "cat").instead
                )
                x, y = reader.states(source, layer)[old], reader.states(target, layer)[new]
                w = matrix.weight.detach().double()
                gap, before = (x @ (w + change).T - y @ w.T).norm(), ((x - y) @ w.T).norm()
                assert gap < 1e-3 * before


def test_applied_edits_show_and_leave_every_bit_as_found(pipe, tmp_path):
    denoiser = denoiser_of(pipe)
    before = {n: p.clone() for n, p in denoiser.named_parameters()}
    plain = generate(pipe, ["a cat in b"], store=tmp_path, **FAST)
    with fit(pipe, ridge=1e-3).applied(pipe):
        edited = generate(pipe, ["a cat in b"], store=tmp_path, **FAST)
    assert not np.array_equal(np.asarray(plain.pictures[0]), np.asarray(edited.pictures[0]))
    assert all(torch.equal(p, before[n]) for n, p in denoiser.named_parameters())


@pytest.mark.parametrize("name", tiny.fast("sd", "if", of=["sd", "if", "sd-3", "sana"]))
def test_weights_that_are_kept_off_the_device_are_edited_where_they_are_kept(name):
    """As sequential offload keeps them; here the device is the CPU as well."""
    from accelerate import cpu_offload

    plain, kept = tiny.FAMILIES[name](), tiny.FAMILIES[name]()
    for part in kept.components.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, torch.device("cpu"))
    one, other = fit(plain, ridge=1e-3), fit(kept, ridge=1e-3)
    assert one.digest == other.digest
    assert all(
        torch.equal(change.change, other.changes[n].change) for n, change in one.changes.items()
    )
    before = fingerprint(kept)
    with one.applied(plain), other.applied(kept):
        seen = [
            np.asarray(generate(pipe, ["a cat in b"], **FAST).pictures[0]) for pipe in (plain, kept)
        ]
        assert fingerprint(kept) == fingerprint(plain) != before
    assert np.array_equal(*seen) and fingerprint(kept) == before
    zs = [
        find_neurons(pipe, STYLE, layers=[1], phrasings=PAIRS).table["z"] for pipe in (plain, kept)
    ]
    assert np.array_equal(*zs)


def test_layers_that_read_the_same_share_what_is_kept_of_a_prompt(pipe, name):
    """Or a thousand concepts would not fit in the memory."""
    reader = LayerInputs(pipe, find_layers(pipe)[:2])
    assert all(reader.states("a cat", layer).dtype == torch.float64 for layer in reader.layers)
    assert len(reader._states) == (2 if name in OWN_READINGS else 1)


def test_each_is_swept_edited_and_evaluated(pipe, tmp_path):
    """The whole way with a scorer whose answers are known: the sweep's table, then an edit beside none at all."""
    options = FAST | {"scorer": tiny.FakeScorer(), "store": tmp_path}
    pair = Concept("cat", "style", (PromptPair("a cat in b", "a dog in b"),))
    count = len(find_layers(pipe))
    run = localize(pipe, pair, window=count - 1, seeds=(0,), **(options | {"batch_size": 7}))
    roles = run.table["role"].value_counts()
    assert dict(roles) == {"window": 2, "insert": 2, "baseline": 1, "ceiling": 1, "placebo": 1}
    assert set(run.table.loc[run.table["role"] != "baseline", "pooled"]) == {"keep"}
    seen = dict(zip(run.table["role"], run.pictures, strict=True))
    assert not np.array_equal(np.asarray(seen["baseline"]), np.asarray(seen["ceiling"]))
    probe = Probe("efficacy", "a cat in b", "red", ("red", "blue"))
    table = evaluate(
        pipe, {"edit": fit(pipe, ridge=1e-3), "none": ()}, [probe], seeds=(0,), **options
    )
    ssim = table.set_index("arm")["ssim"]
    assert ssim["edit"] < ssim["none"] == 1
    assert table["before"].nunique() == 1 and np.isfinite(table["after"]).all()


def test_every_encoder_has_its_own_subject_tokens():
    pipe = tiny.sd3()
    reader = LayerInputs(pipe, find_layers(pipe)[:1])
    first, second = (
        subject_positions(pipe, "a cat in b", "cat", encoder=number) for number in (0, 1)
    )
    assert second[0] >= pipe.tokenizer_max_length > first[-1]
    assert reader.places("a cat in b", "subject", "cat") == first + second
    assert reader.exchange("a cat", "a dog", "cat", "last_subject")[1] == [
        told.last for told in token_spans(pipe, "a dog")
    ]


def test_what_t5_tells_of_a_subject_elsewhere():
    """Why an edit of the subject's tokens cannot suffice in IF: other words tell of it too; before it in CLIP, none."""
    shares = {}
    for name in ("sd", "if"):
        pipe = tiny.FAMILIES[name]()
        layer = find_layers(pipe)[0]
        reader = LayerInputs(pipe, [layer])
        places = reader.places("a b cat", "subject", "cat")
        change = (reader.states("a b cat", layer) - reader.states("a b dog", layer)).norm(dim=1)
        shares[name] = float(change[: places[0]].norm() / change.norm())
    assert shares["sd"] < 1e-6 < 1e-3 < shares["if"]


def test_the_map_beside_the_layers_is_edited_on_demand(pipe, name):
    layers = (0,)
    if name not in ENTRIES:
        with pytest.raises(LocogenError, match="leave out entry"):
            fit(pipe, layers, entry=True)
        return
    plain, entry = fit(pipe, layers, ridge=1e-10), fit(pipe, layers, ridge=1e-10, entry=True)
    added = set(entry.changes) - set(plain.changes)
    assert added == {f"{family_of(pipe).text_projection}.weight"}  # off by default
    weight = denoiser_of(pipe).get_parameter(*added).detach().double()
    reader = LayerInputs(pipe, find_layers(pipe)[:1])
    source, target = PAIRS[0]
    old, new = reader.exchange(
        source, target, "cat", family_of(pipe).tokens, Phrasing(source, target, "cat").instead
    )
    x, y = reader.text_projection_input(source, old), reader.text_projection_input(target, new)
    gap = (x @ (weight + entry.changes[next(iter(added))].change).T - y @ weight.T).norm()
    assert gap < 1e-3 * ((x - y) @ weight.T).norm()
    if name in ("sd-xl", "kolors"):  # what the map is told of the picture's size stays as it was
        assert not entry.changes[next(iter(added))].change[:, tiny.WIDTH :].any()


def test_blocks_that_read_text_and_picture_alike_are_not_edited():
    pipe = tiny.flux()
    with pytest.raises(LocogenError, match="use layers below 2"):
        fit(pipe, (1, 2))


def test_neurons_are_found_and_clamped(pipe, name, tmp_path):
    layers = (0, 2) if name in (*FLUXES, "hidream") else (0, 1)  # a single block of FLUX too
    neurons = find_neurons(pipe, STYLE, layers=layers, phrasings=PAIRS)
    assert set(neurons.table["matrix"]) == {"k", "v"} and set(neurons.table["layer"]) == set(layers)
    assert np.isfinite(neurons.table["z"]).all()
    plain = generate(pipe, ["a cat in b"], store=tmp_path, **FAST)
    with clamp(pipe, neurons.top(0)):
        none = generate(pipe, ["a cat in b"], store=tmp_path, **FAST)
    with clamp(pipe, neurons.top(8)):
        some = generate(pipe, ["a cat in b"], store=tmp_path, **FAST)
    pictures = [np.asarray(run.pictures[0]) for run in (plain, none, some)]
    assert np.array_equal(*pictures[:2]) and not np.array_equal(pictures[0], pictures[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", JOINED)
def test_what_joins_in_every_layer_is_swept_and_clamped_and_cannot_be_edited(name, tmp_path):
    """All layers of Z-Image, Lumina 2 and Krea 2 read text and picture with the same matrices."""
    pipe = tiny.FAMILIES[name]()
    with pytest.raises(LocogenError, match="no layer can be edited"):
        fit(pipe)
    placebo = "b cat in b"  # as long as the prompt, which Lumina 2 asks for
    pair = Concept("cat", "style", (PromptPair("a cat in b", "a dog in b", placebo=placebo),))
    options = FAST | {"scorer": tiny.FakeScorer(), "store": tmp_path, "batch_size": 7}
    run = localize(pipe, pair, window=2, seeds=(0,), **options)
    if name == "lumina-2":
        too_long = Concept("cat", "style", (PromptPair("a cat in b", "a dog in b"),))
        with pytest.raises(LocogenError, match=r"'an image of a cat in b'.*placebo="):
            localize(pipe, too_long, window=2, seeds=(0,), **options)
    seen = dict(zip(run.table["role"], run.pictures, strict=True))
    assert not np.array_equal(np.asarray(seen["baseline"]), np.asarray(seen["ceiling"]))
    pairs = PAIRS if name != "lumina-2" else [PAIRS[0], ("b cat in a", "b dog in a")]
    neurons = find_neurons(pipe, STYLE, layers=(0, 1), phrasings=pairs)
    plain = generate(pipe, ["a cat in b"], **FAST)
    with clamp(pipe, neurons.top(8)):
        some = generate(pipe, ["a cat in b"], **FAST)
        if name == "lumina-2":
            with pytest.raises(LocogenError, match="its means are of 24"):
                generate(pipe, ["cat"], **FAST)
    assert not np.array_equal(*(np.asarray(run.pictures[0]) for run in (plain, some)))
    if name == "lumina-2":
        with pytest.raises(LocogenError, match="of as many tokens each"):
            find_neurons(pipe, STYLE, layers=(0, 1), phrasings=PAIRS)
        with clamp(pipe, neurons.top(8), to="zero"):
            generate(pipe, ["cat"], **FAST)


@pytest.mark.slow
def test_krea_2_is_edited_where_its_text_enters(tmp_path):
    """`txt_in.linear_1` reads text alone: what the fusion made of all encoder layers."""
    pipe = tiny.krea2()
    with pytest.raises(LocogenError, match=r"but the map .*: layers=\(\), entry=True"):
        fit(pipe, (0,), entry=True)
    with pytest.raises(LocogenError, match="layers is empty"):
        fit(pipe, ())
    edit = fit(pipe, (), ridge=1e-10, entry=True)
    assert set(edit.changes) == {"txt_in.linear_1.weight"} and edit.layers == ()
    read, reader = [], LayerInputs(pipe, [])
    handle = pipe.transformer.txt_in.linear_1.register_forward_pre_hook(
        lambda _module, args: read.append(args[0].double())
    )
    for source, target in PAIRS:
        read.clear()
        for text in (source, target):
            pipe(
                text,
                num_inference_steps=1,
                guidance_scale=0.0,
                output_type="latent",
                height=16,
                width=16,
            )
        (old,), (new,) = (subject_positions(pipe, *at) for at in ((source, "cat"), (target, "dog")))
        x, y = read[0][0, [old]], read[1][0, [new]]  # what the map reads in the pipeline's own run
        assert torch.allclose(reader.text_projection_input(source, [old]), x, atol=1e-5)
        weight = pipe.transformer.txt_in.linear_1.weight.detach().double()
        change = edit.changes["txt_in.linear_1.weight"].change
        gap = (x @ (weight + change).T - y @ weight.T).norm()
        assert gap < 1e-3 * ((x - y) @ weight.T).norm()
    handle.remove()
    plain = generate(pipe, ["a cat in b"], store=tmp_path, **FAST)
    with edit.applied(pipe):
        edited = generate(pipe, ["a cat in b"], store=tmp_path, **FAST)
    assert not np.array_equal(np.asarray(plain.pictures[0]), np.asarray(edited.pictures[0]))


@pytest.mark.slow
def test_all_of_krea_2s_positions_are_those_that_attention_reads():
    """The prompt's, and the end of the chat behind the padding; each goes to the target's same one."""
    pipe = tiny.krea2()
    reader = LayerInputs(pipe, [])
    suffix = pipe.prompt_template_encode_num_suffix_tokens
    behind = range(512 - suffix, 512)
    assert reader.places("cat", "all") == (0, *behind)
    assert reader.places("a cat", "all") == (0, 1, *behind)
    old, new = reader.exchange("a cat", "dog", "cat", "all")
    assert old == new == [0, *behind]
    assert reader.places("a cat", "end") == (512 - suffix,)


@pytest.mark.slow
@pytest.mark.parametrize("name", LORA)
def test_lora_in_a_fresh_process_is_the_edit(name, tmp_path):
    """Loaded by the pipeline's own loader, where locogen is not imported; pictures differ by roundings alone."""
    pipe = tiny.FAMILIES[name]()
    layers = () if name in JOINED else (0, 1)
    edit = fit(pipe, layers, ridge=1e-2, entry=name in ENTRIES)
    edit.to_lora(tmp_path / "edit.safetensors")
    plain = generate(pipe, ["a cat in b"], **FAST)
    with edit.applied(pipe):
        wanted = generate(pipe, ["a cat in b"], **FAST)
        states = {
            n: p.detach().clone()
            for n, p in denoiser_of(pipe).named_parameters()
            if n in edit.changes
        }
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import torch
from support import tiny
from safetensors.torch import load_file, save_file
pipe = tiny.FAMILIES[{name!r}]()
pipe.load_lora_weights({str(tmp_path / "edit.safetensors")!r})
pipe.fuse_lora()
pipe.unload_lora_weights()
part = getattr(pipe, {family_of(pipe).denoiser!r})
names = {sorted(edit.changes)!r}
save_file({{n: part.get_parameter(n).detach().contiguous() for n in names}}, {str(tmp_path / "fused.safetensors")!r})
assert "locogen" not in sys.modules
"""
    subprocess.run(
        [sys.executable, "-W", "error::UserWarning:locogen", "-c", program],
        check=True,
        cwd=tmp_path,
    )
    from safetensors.torch import load_file

    fused = load_file(tmp_path / "fused.safetensors")
    for n, weight in states.items():
        moved = (weight - denoiser_of(pipe).get_parameter(n)).norm()
        assert moved > 0 and (fused[n] - weight).norm() < 1e-5 * weight.norm() + 1e-3 * moved
    assert not np.array_equal(np.asarray(plain.pictures[0]), np.asarray(wanted.pictures[0]))


@pytest.mark.slow
def test_lora_of_one_of_two_denoisers_in_a_fresh_process_is_the_edit(tmp_path):
    """Wan 2.2's loader takes a file into one of them; an edit of both is refused."""
    pipe = tiny.wan22()
    with pytest.raises(LocogenError, match="fit an edit for the layers of each"):
        fit(pipe, (2, 3)).to_lora(tmp_path / "both.safetensors")
    for layers, options in [((0, 1), ""), ((3, 4), ", load_into_transformer_2=True")]:
        edit = fit(pipe, layers, ridge=1e-2)
        edit.to_lora(tmp_path / "edit.safetensors")
        program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from support import tiny
from safetensors.torch import save_file
pipe = tiny.wan22()
pipe.load_lora_weights({str(tmp_path / "edit.safetensors")!r}{options})
pipe.fuse_lora(components=["transformer", "transformer_2"])
pipe.unload_lora_weights()
parts = {{"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}}
fused = {{}}
for name in {sorted(edit.changes)!r}:
    part, _, path = name.partition(".")
    fused[name] = parts[part].get_parameter(path).detach().contiguous()
save_file(fused, {str(tmp_path / "fused.safetensors")!r})
assert "locogen" not in sys.modules
"""
        subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)
        from safetensors.torch import load_file

        fused = load_file(tmp_path / "fused.safetensors")
        plain = dict(denoiser_of(pipe).named_parameters())
        with edit.applied(pipe):
            for name in edit.changes:
                assert torch.allclose(fused[name], plain[name], atol=1e-5)
        assert not any(torch.allclose(fused[name], plain[name], atol=1e-5) for name in fused)


@pytest.mark.slow
def test_each_of_two_denoisers_reads_its_own_projection_of_a_prompt():
    pipe = tiny.wan22()
    layers = find_layers(pipe)
    reader = LayerInputs(pipe, layers)
    states = [reader.states("a cat", layer) for layer in layers]
    assert len(reader._states) == 2  # kept once for each denoiser
    assert torch.equal(states[0], states[2]) and torch.equal(states[3], states[5])
    assert not torch.allclose(states[2], states[3])


def test_lora_is_written_only_where_it_can_be_loaded(tmp_path):
    with pytest.raises(LocogenError, match="cannot load LoRA"):
        fit(tiny.pixart()).to_lora(tmp_path / "edit.safetensors")
    with pytest.raises(LocogenError, match="no names for these matrices"):
        fit(tiny.sana()).to_lora(tmp_path / "edit.safetensors", style="kohya")
    with pytest.raises(LocogenError, match="style='diffusers', the default"):
        fit(tiny.deepfloyd()).to_lora(tmp_path / "edit.safetensors", style="kohya")
    assert not list(tmp_path.iterdir())


def test_kohyas_names_carry_the_map_beside_the_layers(tmp_path):
    """As diffusers loads them: it drops names that it does not know, and says nothing."""
    pipe = tiny.sdxl()
    edit = fit(pipe, entry=True)
    with pytest.warns(
        UserWarning, match=r"sd-scripts has no LoRA for add_embedding.linear_1.weight"
    ):
        edit.to_lora(tmp_path / "edit.safetensors", style="kohya")
    with edit.applied(pipe):
        wanted = {n: pipe.unet.get_parameter(n).detach().clone() for n in edit.changes}
    pipe.load_lora_weights(str(tmp_path / "edit.safetensors"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert "add_embedding.linear_1.weight" in wanted
    assert all(
        torch.allclose(pipe.unet.get_parameter(n), weight, atol=1e-5)
        for n, weight in wanted.items()
    )
