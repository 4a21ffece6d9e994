"""The store's promises: same rows, same pictures; nothing stale; nothing lost; nothing damaged is used."""

import itertools
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny

from locogen.errors import LocogenError
from locogen.interventions.prompts import intervene
from locogen.pictures.fingerprint import fingerprint
from locogen.pictures.runs import Run, generate
from locogen.plan import Concept, Intervention, PromptPair, sweep

FAST = {"num_inference_steps": 2, "guidance_scale": 3.0, "batch_size": 4, "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return tiny.small()


@pytest.fixture
def rows():
    return [
        Intervention("cat in a", "dog", (start,), seed) for start in range(3) for seed in range(2)
    ]


def calls(pipe, monkeypatch):
    """Rows that the denoiser is called with."""
    seen = []
    forward = pipe.unet.forward
    tiny.stand_in(
        monkeypatch, pipe.unet, lambda x, *a, **k: (seen.append(len(x)), forward(x, *a, **k))[1]
    )
    return seen


def pixels(run: Run):
    return np.stack([np.asarray(picture) for picture in run.pictures])


def test_rows_and_pictures_correspond(pipe, rows):
    run = generate(pipe, rows, **FAST)
    assert len(run) == len(run.pictures) == len(run.table) == 6
    assert list(run.table["seed"]) == [row.seed for row in rows]
    alone = generate(pipe, rows[3:4], **FAST)
    assert np.abs(pixels(run)[3].astype(int) - pixels(alone)[0]).max() <= 1
    assert np.abs(pixels(run)[2].astype(int) - pixels(alone)[0]).max() > 1


def test_generate_equals_the_plain_pipeline(pipe):
    run = generate(pipe, ["cat in a", "dog"], seeds=(3,), **FAST)
    noise = [torch.Generator().manual_seed(3) for _ in range(2)]
    plain = pipe(
        ["cat in a", "dog"],
        generator=noise,
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="np",
    ).images
    assert np.abs(pixels(run).astype(int) - (plain * 255).round()).max() <= 1


def test_a_second_call_makes_nothing(pipe, rows, tmp_path, monkeypatch):
    first = generate(pipe, rows, store=tmp_path, **FAST)
    seen = calls(pipe, monkeypatch)
    again = generate(pipe, rows, store=tmp_path, **FAST)
    assert seen == []
    assert np.array_equal(pixels(first), pixels(again))
    generate(pipe, [Intervention("cat", "dog", (0,), 9)], store=tmp_path, **FAST)
    assert seen == [2, 2]  # the twin: a new row is made, twice for guidance


def test_resumed_equals_fresh(pipe, rows, tmp_path):
    fresh = generate(pipe, rows, store=tmp_path / "fresh", **FAST)
    generate(pipe, rows[:3], store=tmp_path / "resumed", **FAST)
    resumed = generate(pipe, rows, store=tmp_path / "resumed", **FAST)
    assert np.abs(pixels(fresh).astype(int) - pixels(resumed)).max() <= 1


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a picture"]
)
def test_a_damaged_file_is_made_again(pipe, rows, tmp_path, damage):
    run = generate(pipe, rows, store=tmp_path, **FAST)
    good = pixels(run)
    victim = tmp_path / run.table["image"][2]
    victim.write_bytes(damage(victim.read_bytes()))
    with pytest.raises(LocogenError, match="missing or damaged"):
        run.pictures[2]
    assert (
        np.abs(good.astype(int) - pixels(generate(pipe, rows, store=tmp_path, **FAST))).max() <= 1
    )


def test_a_valid_picture_of_something_else_is_not_used(pipe, rows, tmp_path):
    """A file that opens but whose pixels are not those that were written."""
    from PIL import Image

    run = generate(pipe, rows, store=tmp_path, **FAST)
    victim = tmp_path / run.table["image"][0]
    Image.new("RGB", run.pictures[0].size, "red").save(victim)
    assert np.asarray(generate(pipe, rows, store=tmp_path, **FAST).pictures[0])[0, 0].tolist() != [
        255,
        0,
        0,
    ]


def test_one_store_through_an_edit_and_back(pipe, rows, tmp_path):
    before = pixels(generate(pipe, rows, store=tmp_path, **FAST))
    weight = pipe.unet.conv_in.weight
    kept, mark = weight.detach().clone(), fingerprint(pipe)
    with torch.no_grad():
        weight.add_(0.3)
    edited = pixels(generate(pipe, rows, store=tmp_path, **FAST))
    with torch.no_grad():
        weight.copy_(kept)
    assert fingerprint(pipe) == mark
    assert not np.array_equal(before, edited)
    assert np.array_equal(before, pixels(generate(pipe, rows, store=tmp_path, **FAST)))


def test_one_store_under_an_outer_context(pipe, tmp_path):
    plain = [Intervention("cat in a", "cat in a", (), 0, "baseline")]
    options = FAST | {"batch_size": 1}
    before = pixels(generate(pipe, plain, store=tmp_path, **options))
    with intervene(pipe, [Intervention("cat in a", "dog", tuple(range(4)))]):
        inside = pixels(generate(pipe, plain, store=tmp_path, **options))
    assert not np.array_equal(before, inside)
    assert np.array_equal(before, pixels(generate(pipe, plain, store=tmp_path, **options)))


def test_settings_are_part_of_the_key(pipe, rows, tmp_path, monkeypatch):
    generate(pipe, rows, store=tmp_path, **FAST)
    seen = calls(pipe, monkeypatch)
    for change in ({"num_inference_steps": 3}, {"guidance_scale": 2.0}, {"batch_size": 2}):
        generate(pipe, rows[:1], store=tmp_path, **(FAST | change))
        assert seen, change
        seen.clear()


def test_foreign_hooks_make_pictures_afresh(pipe, rows, tmp_path):
    before = pixels(generate(pipe, rows[:1], store=tmp_path, **FAST))
    handle = pipe.unet.conv_in.register_forward_hook(lambda m, a, out: 2 * out)
    try:
        with pytest.warns(UserWarning, match="conv_in"):
            inside = pixels(generate(pipe, rows[:1], store=tmp_path, **FAST))
    finally:
        handle.remove()
    assert not np.array_equal(before, inside)


def test_whatever_makes_the_picture_is_in_the_mark():
    """Size, scale, processors, FreeU, scheduler: each changes what a store may give back."""
    from diffusers.models.attention_processor import AttnProcessor

    changes = (
        lambda pipe: pipe.unet.register_to_config(sample_size=4),
        lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5),
        lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
        lambda pipe: pipe.unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
        lambda pipe: pipe.to(torch.float64),
    )
    plain = fingerprint(tiny.small())
    assert plain == fingerprint(tiny.small())
    for change in changes:
        pipe = tiny.small()
        change(pipe)
        assert fingerprint(pipe) != plain


def test_a_full_disk_loses_nothing(pipe, rows, tmp_path, monkeypatch):
    written = []
    write = Path.write_bytes

    def fill(path, content):
        if path.name.endswith(".png.partial") or ".png." in path.name:
            if len(written) == 5:
                raise OSError(28, "No space left on device")
            written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(LocogenError, match=r"No space left.*free some space"):
        generate(pipe, rows, store=tmp_path, **FAST)
    assert len(list(tmp_path.glob("*.png"))) == 5
    assert not list(tmp_path.glob(".*.partial"))
    monkeypatch.undo()
    seen = calls(pipe, monkeypatch)
    generate(pipe, rows, store=tmp_path, **FAST)
    assert seen == [2, 2]  # for the one picture that was missing


def test_a_store_that_cannot_be_written(pipe, rows, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    seen = calls(pipe, monkeypatch)
    with pytest.raises(LocogenError, match=r"cannot be written.*store="):
        generate(pipe, rows, store=tmp_path / "file", **FAST)
    assert seen == [], "that is told before the first picture"


def test_a_complete_store_may_be_read_only(pipe, rows, tmp_path, monkeypatch):
    made = generate(pipe, rows, store=tmp_path, **FAST)

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    for place, name in ((Path, "mkdir"), (Path, "touch"), (Path, "write_bytes"), (os, "replace")):
        monkeypatch.setattr(place, name, refuse)
    again = generate(pipe, rows[1:], store=tmp_path, **FAST)
    assert np.array_equal(pixels(made)[1:], pixels(again))
    with pytest.raises(
        LocogenError, match=r"Read-only file system.*store="
    ):  # the twin: one picture is missing
        generate(pipe, [*rows, Intervention("cat", "dog", (0,), 9)], store=tmp_path, **FAST)


def test_each_run_of_a_store_keeps_its_settings(pipe, rows, tmp_path):
    one = generate(pipe, rows[:2], store=tmp_path, **FAST)
    other = generate(pipe, rows[:2], store=tmp_path, **(FAST | {"guidance_scale": 2.0}))
    generate(pipe, rows[:2], store=tmp_path, **FAST)  # made before: nothing new to tell
    told = [json.loads(path.read_text()) for path in tmp_path.glob("run-*.json")]
    told.sort(key=lambda each: -each["guidance_scale"])
    assert [each.pop("images") for each in told] == [
        list(run.table["image"]) for run in (one, other)
    ]
    assert [each.pop("batch") for each in told] == [2, 2]
    assert told == [json.loads(json.dumps(run.settings, default=str)) for run in (one, other)]


def test_a_resumed_run_goes_on_with_the_batch_size_it_had(pipe, rows, tmp_path, monkeypatch):
    """Which may not be the one that it would choose now: another size adds up in another order."""
    whole = generate(pipe, rows, store=tmp_path, **(FAST | {"batch_size": 3}))
    (kept,) = tmp_path.glob("run-*.json")
    kept.write_text(kept.read_text().replace('"batch": 3', '"batch": 2'))
    for name in list(whole.table["image"])[1:]:
        (tmp_path / name).unlink()
    seen = calls(pipe, monkeypatch)
    generate(pipe, rows, store=tmp_path, **(FAST | {"batch_size": 3}))
    assert set(seen) == {4} and json.loads(kept.read_text())["batch"] == 2, (
        "guidance doubles the rows"
    )
    kept.write_text("{")  # a damaged one is as good as none
    (tmp_path / whole.table["image"][0]).unlink()
    generate(pipe, rows, store=tmp_path, **(FAST | {"batch_size": 3}))
    assert json.loads(kept.read_text())["batch"] == 1


def test_a_picture_that_is_too_large_is_told(pipe, rows, tmp_path, monkeypatch):
    generate(pipe, rows[:2], store=tmp_path, **FAST)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    tiny.stand_in(monkeypatch, pipe.unet, full)
    with (
        pytest.warns(UserWarning, match="does not fit"),
        pytest.raises(LocogenError, match=r"batch of 1 does not fit.*offload="),
    ):
        generate(pipe, rows, store=tmp_path, **FAST)
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory: 9 bytes")]
)
def test_a_batch_that_is_too_large_is_halved(pipe, rows, monkeypatch, error):
    """Saying so once, and going on with the half; pictures are those that the half makes anyway."""
    forward, seen = pipe.unet.forward, []

    def small(sample, *args, **kwargs):
        seen.append(len(sample))
        if len(sample) > 6:
            raise error
        return forward(sample, *args, **kwargs)

    wanted = generate(pipe, rows, **(FAST | {"batch_size": 3}))
    tiny.stand_in(monkeypatch, pipe.unet, small)
    with pytest.warns(
        UserWarning, match="a batch of 6 does not fit the memory: going on with 3"
    ) as told:
        run = generate(pipe, rows, **(FAST | {"batch_size": 6}))
    assert len(told) == 1
    assert seen[0] == 12 and set(seen[1:]) == {6}
    for i in range(len(rows)):
        assert np.array_equal(np.asarray(run.pictures[i]), np.asarray(wanted.pictures[i]))


def test_another_error_is_not_taken_for_too_little_memory(pipe, rows, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("shape mismatch")

    tiny.stand_in(monkeypatch, pipe.unet, broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        generate(pipe, rows, **FAST)


@pytest.mark.parametrize(("free", "size"), [(1000, 3), (500, 3), (250, 2), (100, 1), (10, 1)])
def test_the_batch_is_chosen_from_the_free_memory(pipe, monkeypatch, free, size):
    """As on a GPU: a first batch of one, which takes 100 bytes here, then what fits 90 % of the free memory, evenly."""
    from locogen.pictures.batches import RESERVE, GpuMemory, pictures_of
    from locogen.plan import Settings

    class Gpu(GpuMemory):
        def __init__(self, pipe):
            self.device = pipe._execution_device
            self.is_to_be_measured = True
            self.before = 7

        def fitting(self, size):
            self.is_to_be_measured = False
            return int(RESERVE * free / (100 / size))

    monkeypatch.setattr("locogen.pictures.batches.GpuMemory", Gpu)
    plan = [Intervention(prompt, "cat", (), 0) for prompt in "abcdefghi"]
    made = [(len(rows), told) for rows, _, told in pictures_of(pipe, plan, Settings(1, 1.0, 4))]
    sizes = [count for count, _ in made]
    assert (
        sizes[0] == 1
        and sizes[1] == size
        and sum(sizes) == 9
        and {told for _, told in made} == {size}
    )
    again = [
        len(rows)
        for rows, *_ in pictures_of(pipe, plan, Settings(1, 1.0, 4), known_batch_size=size)
    ]
    assert again[0] == size, "the first batch too, whatever is free by now"


@pytest.mark.parametrize(
    ("count", "most", "sizes"), [(33, 32, [34, 34]), (5, 32, [10]), (12, 4, [8, 8, 8])]
)
def test_batches_are_even(pipe, monkeypatch, count, most, sizes):
    """Not one of 32 and one of 1 filled up to 32; guidance doubles the rows."""
    seen = calls(pipe, monkeypatch)
    plan = [Intervention("cat", "dog", (), seed) for seed in range(count)]
    generate(pipe, plan, **(FAST | {"num_inference_steps": 1, "batch_size": most}))
    assert seen == sizes


def test_pictures_are_written_in_the_background_and_none_is_lost(pipe, rows, tmp_path, monkeypatch):
    """While the next batch is made, and before an error leaves `generate`."""
    import threading

    from locogen.pictures.store import PictureStore

    put, forward, threads, count = PictureStore.put, pipe.unet.forward, [], itertools.count()

    def slow(self, key, pixels):
        threads.append(threading.current_thread())
        time.sleep(0.05)
        put(self, key, pixels)

    def broken(*args, **kwargs):
        if next(count) == 4:
            raise RuntimeError("the third batch")
        return forward(*args, **kwargs)

    monkeypatch.setattr(PictureStore, "put", slow)
    tiny.stand_in(monkeypatch, pipe.unet, broken)
    with pytest.raises(RuntimeError, match="the third batch"):
        generate(pipe, rows, store=tmp_path, **(FAST | {"batch_size": 2}))
    assert len(list(tmp_path.glob("*.png"))) == 4 and threading.main_thread() not in threads


def test_patched_families_make_room_for_the_targets_own_runs(tmp_path, monkeypatch):
    """In any batch size; the table has the plan's rows only, and a full intervention is the target's own picture."""
    pipe = tiny.sd3()
    every = tuple(range(3))
    plan = [
        Intervention("cat in a", t, every, seed, pooled="target")
        for t in ("dog", "b c d")
        for seed in (0, 1)
    ]
    options = FAST | {"num_inference_steps": 1, "store": tmp_path}
    forward, seen = pipe.transformer.forward, []

    def counting(hidden_states, **kwargs):
        seen.append(len(hidden_states))
        return forward(hidden_states=hidden_states, **kwargs)

    tiny.stand_in(monkeypatch, pipe.transformer, counting)
    runs = [generate(pipe, plan, **(options | {"batch_size": size})) for size in (1, 3, 8)]
    assert set(seen[1:]) == {4, 6, 16}  # after a dry run of one; guidance doubles 2, 3 and 8
    own = generate(pipe, [row.target for row in plan[::2]], seeds=(0, 1), **options)
    for run in runs:
        assert len(run) == len(run.table) == 4 and set(run.table["pooled"]) == {"target"}
        for i in range(4):
            gap = np.abs(np.asarray(run.pictures[i], int) - np.asarray(own.pictures[i], int))
            assert gap.max() <= 1
    kept = generate(pipe, [replace(row, pooled="keep") for row in plan], **options)
    assert not set(kept.table["image"]) & set(
        runs[0].table["image"]
    )  # another key: another picture


def test_the_key_knows_pooled_and_timesteps_where_they_matter(pipe, tmp_path):
    def key(**changes):
        row = Intervention("cat", "dog", (1,), 0)
        return generate(pipe, [replace(row, **changes)], store=tmp_path, **FAST).table["image"][0]

    assert key() == key() != key(timesteps=(0, 0)) != key(timesteps=(1, 1))
    assert key(layers=()) == key(layers=(), timesteps=(0, 1)) == key(layers=(), target="a")
    with pytest.raises(LocogenError, match="there is no step 2"):
        key(timesteps=(0, 2))


def test_non_finite_pictures_are_refused(rows, tmp_path):
    broken = tiny.small()
    with torch.no_grad():
        broken.vae.post_quant_conv.bias.fill_(float("nan"))
    with pytest.raises(LocogenError, match=r"non-finite pixels.*float32"):
        generate(broken, rows, store=tmp_path, **FAST)
    assert not list(tmp_path.glob("*.png"))


def test_bad_input_is_named(pipe, rows):
    for given, said in (([], "nothing to generate"), ([" "], "empty")):
        with pytest.raises(LocogenError, match=said):
            generate(pipe, given, **FAST)
    with pytest.raises(LocogenError, match="batch_size"):
        generate(pipe, rows, **(FAST | {"batch_size": 0}))
    with pytest.raises(LocogenError, match="own seeds"):
        generate(pipe, rows, seeds=(1,), **FAST)
    with pytest.warns(UserWarning, match="does not read 'z z'"):
        generate(
            pipe,
            "a b c d e f g h i j k l m n o p q r s t u v w x y 0 1 2 3 4 5 6 7 8 9 a b c z z",
            **FAST,
        )


def test_the_empty_prompt_has_a_picture_and_a_key_of_its_own(pipe, tmp_path):
    run = generate(pipe, ["", "a cat"], store=tmp_path, **FAST)
    empty, cat = (np.asarray(picture) for picture in run.pictures)
    assert not np.array_equal(empty, cat)
    rows = [Intervention("a cat", target, tuple(range(4)), 0) for target in ("", "a cat")]
    ceiling = np.asarray(generate(pipe, rows, store=tmp_path, **FAST).pictures[0])
    assert np.abs(ceiling.astype(int) - empty).max() <= 1


def test_a_run_shows_itself_and_escapes(pipe):
    with pytest.warns(UserWarning, match="does not know '<'"):
        page = generate(pipe, ["<b>cat</b>"], **(FAST | {"batch_size": 1}))._repr_html_()
    assert "<b>cat" not in page
    assert "&lt;b&gt;cat" in page
    assert "data:image/png" in page


def test_kept_rows_of_a_plan_share_their_baseline(pipe, tmp_path):
    concept = Concept("x", "style", (PromptPair("cat in a", "cat"),))
    run = generate(pipe, sweep(concept, n_layers=4, seeds=(0,)), store=tmp_path, **FAST)
    assert len(run) == 9
    (ceiling,) = (run.pictures[i] for i, row in enumerate(run.plan) if row.role == "ceiling")
    own = generate(pipe, ["cat"], store=tmp_path, **FAST).pictures[0]
    assert np.abs(np.asarray(ceiling, int) - np.asarray(own)).max() <= 1
