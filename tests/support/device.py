"""A device that is not there: faults of CUDA, found on a machine without it.

Within `pretended("cuda:0")`, what is moved or made there lies in main memory as ever, and its storage is
marked. To Python its tensors say that they stand on the device, and what a real one refuses is refused:

- tensors of two devices in one operation (0-dimensional ones of the CPU may mix in arithmetic, as in torch;
  so may indices of the CPU into a tensor of the device, and `copy_`, `to` and writes to slices move);
- `numpy()` and `np.asarray` of a tensor that stands on the device;
- a generator of the CPU for numbers that are drawn on the device;
- float64, where the device is Apple's ("mps").

Whatever makes the processor wait for the device is counted in `waits`: reading a number, copies in either
direction, and indices that have to be copied or counted first.

It is a mode of `__torch_function__`, and so sees each call of torch that Python makes in its own thread. Not
seen: what torch's C++ code does within one such call, limits of kernels, other threads, gradients, and memory
that runs out. Values are those of the CPU, to the bit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

MARK = "_pretended_device"
REAL_AUTOCAST = torch.autocast

MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.type_as}
# They take tensors of two devices, since they copy from one to the other, or only look at shapes and types.
MAY_MIX = {
    Tensor.copy_,
    Tensor.expand_as,
    Tensor.view_as,
    Tensor.reshape_as,
    Tensor.new_tensor,
    Tensor.data.__set__,
    Tensor.grad.__set__,
    torch.tensor,
    torch.result_type,
    torch._has_compatible_shallow_copy_type,
}
INDEXED = {Tensor.__getitem__, Tensor.__setitem__}
# They take no 0-dimensional tensor of the CPU beside tensors of the device.
ALL_ALIKE = {torch.cat, torch.stack, torch.hstack, torch.vstack, torch.equal, Tensor.equal}
TO_NUMPY = {Tensor.numpy, Tensor.__array__}
READ_A_NUMBER = {
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__contains__,
    Tensor.equal,
    torch.equal,
    Tensor.allclose,
    torch.allclose,
    Tensor.nonzero,
    torch.nonzero,
    Tensor.unique,
    torch.unique,
    Tensor.masked_select,
    torch.masked_select,
}
FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
ANSWERS = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",
    Tensor.is_mps.__get__: lambda device: device.type == "mps",
    Tensor.is_cpu.__get__: lambda device: False,
    Tensor.get_device: lambda device: device.index or 0,
}


@dataclass(frozen=True)
class Wait:
    """One wait of the processor for the device: the function of torch, and the line that called it."""

    function: str
    caller: str


@contextmanager
def pretended(name: str = "cuda:0", *, free: int = 8 << 30) -> Iterator[PretendedDevice]:
    """Within the context there is such a device, with so many bytes `free`: `pipe.to(name)` moves there."""
    mode = PretendedDevice(name)
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": lambda device=None: (free, free),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 1 << 20,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
    }

    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        computed_on = "cpu" if device_type == mode.device.type else device_type
        return REAL_AUTOCAST(computed_on, *args, **options)

    with ExitStack() as stack:
        if mode.device.type == "cuda":
            for question, answer in answers.items():
                stack.enter_context(mock.patch.object(torch.cuda, question, answer))
        if mode.device.type == "mps":
            state = answers["get_rng_state"]
            stack.enter_context(mock.patch.object(torch.mps, "get_rng_state", state))
        stack.enter_context(mock.patch.object(torch, "autocast", autocast))
        yield stack.enter_context(mode)


def is_there(value: Any) -> bool:
    """Whether a tensor stands on the pretended device."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return getattr(value.untyped_storage(), MARK, False)


class PretendedDevice(TorchFunctionMode):
    """The mode itself; `pretended` enters it together with the answers of `torch.cuda`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.waits: list[Wait] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in ANSWERS and is_there(args[0]):
            return ANSWERS[func](self.device)
        if func in MOVES:
            return self._moved(func, args[0], args[1:], kwargs)
        named = kwargs.get("device")
        if func in FROM_VALUES and named is not None and isinstance(args[0], Tensor):
            return self._moved(Tensor.to, args[0], (named,), {})
        tensors = list(_tensors_in((args, kwargs)))
        there = [tensor for tensor in tensors if is_there(tensor)]
        self._check(func, args, kwargs, tensors, there)
        self._count(func, args, named, there)
        if named is not None and self._is_this(named):
            kwargs["device"] = "cpu"  # where the values really lie
        result = func(*args, **kwargs)
        if self._result_is_there(args, func, named, there):
            self._mark(result)
        return result

    def _is_this(self, device: Any) -> bool:
        """Whether a device as torch takes it (its name, its number, or itself) is the pretended one."""
        if isinstance(device, int):
            return self.device.type == "cuda"
        return torch.device(device).type == self.device.type

    def _result_is_there(self, args: Any, func: Any, named: Any, there: list[Tensor]) -> bool:
        if named is not None:
            return self._is_this(named)
        if func in MAY_MIX or func in INDEXED:  # the first tensor is what is computed with
            return bool(args) and is_there(args[0])
        return bool(there)

    def _mark(self, result: Any) -> None:
        for tensor in _tensors_in(result):
            if self.device.type == "mps" and tensor.dtype == torch.float64:
                raise TypeError(
                    "Cannot convert a MPS Tensor to float64 dtype: MPS doesn't support float64"
                )
            if not tensor.is_meta and tensor.layout == torch.strided:
                setattr(tensor.untyped_storage(), MARK, True)

    def _moved(self, func: Any, tensor: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """`to` and its kin: a copy where the device changes, marked where it goes to the pretended one."""
        device, options = self._destination(func, args, kwargs)
        was_there = is_there(tensor)
        if isinstance(device, Tensor):
            goes_there, goes_to_cpu = is_there(device), not device.is_meta
        elif device is None:
            goes_there, goes_to_cpu = was_there, not tensor.is_meta
        else:
            goes_there = self._is_this(device)
            goes_to_cpu = not goes_there and torch.device(device).type == "cpu"
        if tensor.is_meta or not (goes_there or goes_to_cpu):
            return func(tensor, *args, **kwargs)
        if goes_there != was_there:
            options["copy"] = True
            if was_there or not options.get("non_blocking"):
                self._wait(func)
        result = tensor.to("cpu", **options)
        if goes_there:
            self._mark(result)
        return result

    def _destination(
        self, func: Any, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Where it goes (None: it stays; a tensor: where that stands), and the other options of `Tensor.to`."""
        if func is Tensor.cpu:
            return "cpu", {}
        if func is Tensor.cuda:
            return self.device, {"non_blocking": kwargs.get("non_blocking", False)}
        options = dict(kwargs)
        values = list(args)
        device = options.pop("device", options.pop("other", None))
        if values and not isinstance(values[0], (torch.dtype, bool)):
            device = values.pop(0)
        if isinstance(device, Tensor):
            options["dtype"] = device.dtype
        if values and (values[0] is None or isinstance(values[0], torch.dtype)):
            options["dtype"] = values.pop(0)
        options.update(zip(("non_blocking", "copy"), values, strict=False))
        return device, options

    def _check(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        tensors: list[Tensor],
        there: list[Tensor],
    ) -> None:
        """Raise what torch raises, where a device would refuse the call."""
        if there and func in TO_NUMPY:
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first"
            )
        named = kwargs.get("device")
        drawn_there = bool(there) or (named is not None and self._is_this(named))
        if drawn_there and any(
            isinstance(one, torch.Generator) for one in (*args, *kwargs.values())
        ):
            raise RuntimeError(
                f"Expected a '{self.device.type}' device type for generator but found 'cpu'"
            )
        if func in INDEXED:
            self._check_index(func, args)
        elif there and func not in MAY_MIX:
            others = [tensor for tensor in tensors if not is_there(tensor) and not tensor.is_meta]
            if func not in ALL_ALIKE:
                others = [tensor for tensor in others if tensor.dim() > 0]
            if others:
                raise self._mixed(func)

    def _check_index(self, func: Any, args: Any) -> None:
        """Indices of the CPU reach into the device, not the other way round.

        What is written behind an index of tensors must stand where it is written to; to a slice it is copied.
        """
        target = args[0]
        scattered = [
            part
            for part in _parts(args[1])
            if isinstance(part, (Tensor, list)) and not _is_number(part)
        ]
        if not is_there(target) and any(is_there(part) for part in scattered):
            raise self._mixed(func)
        value = args[2] if func is Tensor.__setitem__ else None
        is_array = isinstance(value, Tensor) and value.dim() > 0
        if scattered and is_array and is_there(value) != is_there(target):
            raise self._mixed(func)

    def _mixed(self, func: Any) -> RuntimeError:
        return RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{self.device} and cpu! (when calling {_name(func)})"
        )

    def _count(self, func: Any, args: Any, named: Any, there: list[Tensor]) -> None:
        """Note the waits of the processor for the device."""
        if there and func in READ_A_NUMBER:
            self._wait(func)
        if func in FROM_VALUES and self._result_is_there(args, func, named, there):
            self._wait(func)
        if func is Tensor.copy_ and is_there(args[0]) != is_there(args[1]):
            self._wait(func)
        if func in INDEXED:
            for part in _parts(args[1]):
                if self._index_waits(args[0], part):
                    self._wait(func)

    def _index_waits(self, target: Tensor, part: Any) -> bool:
        """A number that stands there is read, a mask is counted; a list, or a tensor of the CPU, is copied."""
        if is_there(part):
            return _is_number(part) or part.dtype == torch.bool
        return is_there(target) and isinstance(part, (list, Tensor)) and not _is_number(part)

    def _wait(self, func: Any) -> None:
        self.waits.append(Wait(_name(func), _caller()))


def _name(func: Any) -> str:
    return getattr(func, "__name__", str(func))


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _is_number(part: Any) -> bool:
    """Whether torch takes a part of an index for a whole number, and reads it."""
    return isinstance(part, Tensor) and part.dim() == 0 and part.dtype != torch.bool


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors_in(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors_in(part)


def _caller() -> str:
    """The nearest line of Python outside of torch and of this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
