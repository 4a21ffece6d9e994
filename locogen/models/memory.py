"""Tell an error that means "the memory is full" from any other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from locogen.errors import LocogenError

# What PyTorch and the libraries underneath write if an allocation fails. Only CUDA's own allocator
# has an exception class for it; cuBLAS and cuDNN allocate workspaces past it, with a status code.
ALLOCATION_FAILURES = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",  # the CPU's allocator on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # its workspace did not fit
    "CUBLASLT_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    # cuDNN: each engine needs more workspace than is left.
    "unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm",  # the same, in older versions
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or in main memory.

    Args:
        error: what was raised.

    Returns:
        True for PyTorch's and Python's own classes, and for a `RuntimeError` that reports a failed
        allocation, also one of cuBLAS or cuDNN.
    """
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and any(
        words in message for words in ALLOCATION_FAILURES
    )


@contextmanager
def memory_named(remedy: str) -> Iterator[None]:
    """Within the context, an error that means a full memory becomes a `LocogenError`.

    Args:
        remedy: what did not fit, where, and what helps.

    Raises:
        LocogenError: the memory ran out; any other error passes by.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise LocogenError(remedy) from error
