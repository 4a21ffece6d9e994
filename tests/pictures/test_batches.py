"""Memory: what counts as full, what is said of it, and a decoder that does not limit the batch."""

import numpy as np
import pytest
import torch
from support import tiny

from locogen.errors import LocogenError
from locogen.interventions.prompts import generators
from locogen.models.memory import memory_named, out_of_memory
from locogen.pictures import batches
from locogen.pictures.batches import call_pipeline, pictures_of
from locogen.pictures.runs import generate
from locogen.plan import Intervention, Settings

FAST = {"num_inference_steps": 1, "guidance_scale": 3.0, "batch_size": 4, "progress": False}
FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.04 GB)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    MemoryError("Unable to allocate 9.0 GiB for an array"),
)
OTHER = (
    RuntimeError("shape mismatch"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    RuntimeError("CUDA error: device-side assert triggered"),
    ValueError("out of memory of a language model"),
)


@pytest.mark.parametrize("error", FULL, ids=str)
def test_an_allocation_that_fails_means_that_the_memory_is_full(error):
    assert out_of_memory(error)
    with pytest.raises(LocogenError, match="take less"), memory_named("take less"):
        raise error


@pytest.mark.parametrize("error", OTHER, ids=str)
def test_other_errors_do_not(error):
    assert not out_of_memory(error)
    with pytest.raises(type(error)) as caught, memory_named("take less"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", FULL[1:5], ids=str)
def test_a_batch_is_halved_whichever_library_could_not_allocate(monkeypatch, error):
    pipe = tiny.small()
    forward = pipe.unet.forward

    def small(sample, *args, **kwargs):
        if len(sample) > 4:
            raise error
        return forward(sample, *args, **kwargs)

    tiny.stand_in(monkeypatch, pipe.unet, small)
    with pytest.warns(UserWarning, match="a batch of 4 does not fit the memory: going on with 2"):
        assert len(generate(pipe, ["cat"], seeds=range(4), **FAST)) == 4


@pytest.mark.parametrize("error", FULL[:3], ids=str)
def test_memory_that_is_full_before_the_first_batch_is_named(monkeypatch, error):
    """The text encoder is the first that computes: no smaller batch would help it."""
    pipe = tiny.small()

    def full(*args, **kwargs):
        raise error

    tiny.stand_in(monkeypatch, pipe.text_encoder, full)
    with pytest.raises(
        LocogenError, match=r"text encoders do not fit the memory of cpu.*offload='model'"
    ):
        generate(pipe, ["cat"], **FAST)


# --- decoding ------------------------------------------------------------------------------------


def decoded_sizes(pipe, monkeypatch):
    """How many pictures each call of the decoder is given."""
    forward, sizes = pipe.vae.decoder.forward, []

    def counting(latents, *args, **kwargs):
        sizes.append(len(latents))
        return forward(latents, *args, **kwargs)

    tiny.stand_in(monkeypatch, pipe.vae.decoder, counting)
    return sizes


def large(pipe):
    """Large by its config, which says from what size on pictures are decoded one by one."""
    pipe.vae.register_to_config(sample_size=1024)
    return pipe


@pytest.mark.parametrize("name", ["sd", "sd-xl", "sd-3", "flux", "sana"])
def test_large_pictures_are_decoded_one_by_one(name, monkeypatch):
    pipe = large(tiny.FAMILIES[name]())
    sizes = decoded_sizes(pipe, monkeypatch)
    generate(pipe, ["cat"], seeds=range(3), **FAST)
    assert sizes == [1, 1, 1]
    assert not pipe.vae.use_slicing, "the pipeline is left as it was"


def test_small_pictures_are_decoded_together(monkeypatch):
    """As the pipeline does it, to the bit."""
    pipe = tiny.small()
    sizes = decoded_sizes(pipe, monkeypatch)
    generate(pipe, ["cat"], seeds=range(3), **FAST)
    assert sizes == [3]


def test_a_choice_of_the_user_is_left_alone(monkeypatch):
    pipe = large(tiny.small())
    pipe.vae.enable_slicing()
    generate(pipe, ["cat"], seeds=range(2), **FAST)
    assert pipe.vae.use_slicing


def test_a_picture_decoded_alone_is_the_same_but_for_the_order_of_sums():
    pipe = tiny.small()
    rows = [Intervention("cat", "cat", (), seed) for seed in range(3)]
    chosen = Settings(1, 3.0, 3)
    together = call_pipeline(pipe, rows, {"prompt": ["cat"] * 3}, chosen)
    apart = call_pipeline(large(pipe), rows, {"prompt": ["cat"] * 3}, chosen)
    alone = pipe(
        "cat",
        generator=generators(rows[:1]),
        num_inference_steps=1,
        guidance_scale=3.0,
        output_type="np",
    )
    assert np.abs(together - apart).max() < 1e-5
    assert np.abs(apart[0] - alone.images[0]).max() < 1e-5
    assert np.abs(together[0] - together[1]).max() > 1e-2, (
        "the twin: another seed is another picture"
    )


class Card:
    """A GPU that only counts: the peak is 100 bytes a row of the denoiser, 400 a picture of the decoder."""

    def __init__(self, pipe, monkeypatch, free):
        self.peak = 0
        pipe.unet.register_forward_pre_hook(self.denoising, with_kwargs=True)
        pipe.vae.decoder.register_forward_hook(self.decoding)
        for name in ("reset_peak_memory_stats", "empty_cache"):
            monkeypatch.setattr(
                torch.cuda, name, self.reset if name.startswith("reset") else lambda *_: None
            )
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: self.peak)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))

    def reset(self, *_):
        self.peak = 0

    def denoising(self, module, args, kwargs):
        sample = args[0] if args else kwargs["sample"]
        self.peak = max(self.peak, 100 * len(sample))

    def decoding(self, module, args, pictures):
        self.peak = max(self.peak, 400 * len(args[0]))


@pytest.mark.parametrize(("is_large", "size"), [(True, 5), (False, 2)])
def test_the_decoder_does_not_limit_the_batch(monkeypatch, is_large, size):
    """One picture needs 200 bytes of the denoiser, guided, and 400 of the decoder: 90 % of 1112 hold five, or two."""
    pipe = tiny.small()
    if is_large:
        large(pipe)

    class OnCard(batches.GpuMemory):
        def __init__(self, pipe):
            super().__init__(pipe)
            self.is_to_be_measured = True

    Card(pipe, monkeypatch, 1112)
    monkeypatch.setattr(batches, "GpuMemory", OnCard)
    plan = [Intervention("cat", "cat", (), seed) for seed in range(10)]
    sizes = [(len(rows), after) for rows, _, after in pictures_of(pipe, plan, Settings(1, 3.0, 32))]
    assert sizes[0] == (1, size) and {after for _, after in sizes} == {size}
