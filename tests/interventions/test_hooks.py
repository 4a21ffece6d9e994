"""Theorems of the intervention: what is replaced is exact, what is not replaced is untouched to the bit."""

import numpy as np
import pytest
import torch
from support import tiny

from locogen.errors import LocogenError, UnsupportedModel
from locogen.interventions.prompts import (
    active_contexts,
    foreign_hooks,
    generators,
    intervene,
    record,
)
from locogen.models.layers import find_layers
from locogen.plan import Intervention

ALL = tuple(range(16))


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def pictures(pipe, rows, *, prompts=None, embeds=None, guidance=5.0, each=1, **options):
    text = (
        {"prompt_embeds": embeds}
        if embeds is not None
        else {"prompt": prompts or [r.prompt for r in rows]}
    )
    noise = generators([row for row in rows for _ in range(each)])
    return pipe(
        **text,
        generator=noise,
        num_inference_steps=3,
        guidance_scale=guidance,
        num_images_per_prompt=each,
        output_type="np",
        **options,
    ).images


def plan(layers, *, count=2):
    texts = [("cat in a", "dog on b"), ("dog in c", "cat"), ("a b c d", "cat dog")][:count]
    return [
        Intervention(prompt, target, layers, seed) for seed, (prompt, target) in enumerate(texts)
    ]


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_an_empty_plan_is_the_plain_pipeline_to_the_bit(pipe, guidance):
    rows = plan(())
    plain = pictures(pipe, rows, guidance=guidance)
    with intervene(pipe, rows):
        assert np.array_equal(pictures(pipe, rows, guidance=guidance), plain)
    with intervene(pipe, plan((3, 4))):  # the twin: a real intervention does change the pictures
        assert not np.array_equal(pictures(pipe, rows, guidance=guidance), plain)


@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_all_layers_replaced_is_the_targets_own_run_to_the_bit(pipe, guidance):
    rows = plan(ALL)
    own = pictures(pipe, rows, prompts=[row.target for row in rows], guidance=guidance)
    with intervene(pipe, rows):
        assert np.array_equal(pictures(pipe, rows, guidance=guidance), own)
    with intervene(pipe, plan(ALL[:-1])):  # one layer short is another picture
        assert not np.array_equal(pictures(pipe, rows, guidance=guidance), own)


def test_negative_rows_and_other_layers_are_untouched(pipe):
    rows = plan((2, 9))
    with record(pipe) as before:
        pictures(pipe, rows)
    with intervene(pipe, rows), record(pipe) as after:
        pictures(pipe, rows)
    targets = pipe.encode_prompt([row.target for row in rows], "cpu", 1, False)[0]
    for index in ALL:
        for was, now in zip(before[index], after[index], strict=True):
            assert torch.equal(was[:2], now[:2])  # negative half
            assert torch.equal(now[2:], targets if index in (2, 9) else was[2:])
            assert not torch.equal(was[2:], targets)


def test_several_pictures_a_prompt(pipe):
    rows = plan(ALL)
    own = pictures(pipe, rows, prompts=[row.target for row in rows], each=3)
    with intervene(pipe, rows):
        assert np.array_equal(pictures(pipe, rows, each=3), own)
    mixed = [rows[0], Intervention(rows[1].prompt, rows[1].target, (), 1)]
    plain = pictures(pipe, rows, each=3)
    with intervene(pipe, mixed):
        made = pictures(pipe, rows, each=3)
    assert np.array_equal(made[:3], own[:3])
    assert np.array_equal(made[3:], plain[3:])


def test_windows_in_one_batch_equal_separate_runs(pipe):
    """Float32 sums in another order: about 3 steps x 16 layers x a few roundings of 6e-8, so 1e-5 is ample."""
    rows = [
        Intervention("cat in a", "dog on b", (start, start + 1), 7) for start in range(0, 15, 3)
    ]
    with intervene(pipe, rows):
        together = pictures(pipe, rows)
    apart = []
    for row in rows:
        with intervene(pipe, [row]):
            apart.append(pictures(pipe, [row])[0])
    assert np.abs(together - np.stack(apart)).max() < 1e-5
    assert (
        min(np.abs(apart[i] - apart[i + 1]).max() for i in range(4)) > 1e-3
    )  # the twin: windows differ


def test_layers_come_in_execution_order(pipe):
    names = [layer.name for layer in find_layers(pipe)]
    assert len(names) == 16
    assert names[6].startswith("mid_block")
    assert names[8].startswith("up_blocks.1.attentions.1")
    assert names[9].startswith("up_blocks.1.attentions.2")
    called, modules = [], dict(pipe.unet.named_modules())
    handles = [
        modules[name].register_forward_hook(lambda *_, name=name: called.append(name))
        for name in sorted(names)
    ]
    try:
        pictures(pipe, plan(()))
    finally:
        for handle in handles:
            handle.remove()
    assert called == names * 3  # three steps of a real call
    registered = [name for name, _ in pipe.unet.named_modules() if name.endswith("attn2")]
    assert registered != names  # why it is observed: the order of registration is another


def hook_count(pipe):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.unet.modules())


def test_nothing_is_left_after_an_exception(pipe):
    assert hook_count(pipe) == 0
    with pytest.raises(RuntimeError, match="stop"), intervene(pipe, plan((1,))):
        assert hook_count(pipe) > 0
        assert "encode_prompt" in vars(pipe)
        assert active_contexts(pipe)
        raise RuntimeError("stop")
    assert hook_count(pipe) == 0
    assert "encode_prompt" not in vars(pipe)
    assert active_contexts(pipe) == ()


def test_a_failing_hook_leaves_nothing(pipe):
    with (
        pytest.raises(LocogenError, match="3 conditional rows, and the plan has 2"),
        intervene(pipe, plan((1,))),
    ):
        pictures(pipe, plan((1,), count=3))
    assert hook_count(pipe) == 0


def test_other_prompts_are_not_taken_for_copies(pipe):
    rows = plan((1,), count=1)
    with (
        pytest.raises(
            LocogenError, match=r"prompt 0 of the call is 'dog'.*exactly the plan's prompts"
        ),
        intervene(pipe, rows),
    ):
        pipe(["cat in a", "dog", "a"], num_inference_steps=1, output_type="np")
    with intervene(pipe, rows):  # the twin: three pictures of one prompt are fine
        pipe(["cat in a"] * 3, num_inference_steps=1, output_type="np")


def test_models_that_cannot_be_seen_through_are_refused():
    pipe = tiny.pipeline()
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    with pytest.raises(UnsupportedModel, match="unload_ip_adapter"):
        find_layers(pipe)


def test_a_feature_cache_is_refused():
    from diffusers import PyramidAttentionBroadcastConfig

    pipe = tiny.pipeline()
    if not hasattr(
        pipe.unet, "enable_cache"
    ):  # a U-Net without caches: say so as one with them would
        pipe.unet.is_cache_enabled = True
    else:
        pipe.unet.enable_cache(PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 0))
    with pytest.raises(LocogenError, match="disable_cache"):
        find_layers(pipe)


def test_bad_plans_are_refused(pipe):
    with pytest.raises(LocogenError, match=r"layers \[16\].*0 to 15"), intervene(pipe, plan((16,))):
        pass
    with pytest.raises(LocogenError, match="empty"), intervene(pipe, []):
        pass


def test_foreign_hooks_are_seen(pipe):
    assert foreign_hooks(pipe) == ()
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: None)
    try:
        assert foreign_hooks(pipe) == ("unet.conv_in",)
    finally:
        handle.remove()
    with intervene(pipe, plan((1,))):
        assert foreign_hooks(pipe) == ()


def test_other_families_are_refused_by_name():
    with pytest.raises(UnsupportedModel, match="StableDiffusionPipeline"):
        find_layers(torch.nn.Linear(2, 2))
    other = tiny.unet(
        addition_embed_type="image", encoder_hid_dim_type="image_proj", encoder_hid_dim=4
    )  # Kandinsky
    with pytest.raises(UnsupportedModel, match="SanaPipeline"):
        find_layers(other)


def test_a_denoiser_called_by_itself_is_refused(pipe):
    """Whose rows these are is known from the pipeline only."""
    with (
        pytest.raises(LocogenError, match="called without its pipeline"),
        intervene(pipe, plan((1,), count=1)),
    ):
        pipe.unet(torch.zeros(1, 4, 8, 8), 0, encoder_hidden_states=torch.zeros(1, 40, tiny.WIDTH))
