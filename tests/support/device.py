"""A device that is not there: CUDA's faults found on a machine without CUDA.

Within `pretended("cuda:0")`, tensors that are moved or made there lie in main memory as ever and are
*tagged*. To Python they say that they stand on the device, and what a real device refuses is refused:

- tensors of two devices in one operation (0-dimensional ones of the CPU may mix in arithmetic, as in torch;
  so may indices of the CPU into a tensor of the device, and `copy_`, `to` and writes to slices move);
- `numpy()` and `np.asarray` of a tensor that stands on the device;
- a generator of the CPU for numbers that are drawn on the device;
- float64, where the device is Apple's ("mps").

Everything that makes the processor wait for the device is counted in `waits`: reading a number, copies in
either direction, and operations whose shape depends on values.

It is a mode of `__torch_function__` and so sees each call of torch that Python makes, in the thread that
entered it. Not seen: what torch's own C++ code does within one call, kernels' own limits, other threads,
gradients, and memory that runs out. Values are those of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TAG = "_pretended_device"

# A method of torch that takes tensors of two devices, and does not compute with both.
_MOVES_OR_ONLY_LOOKS = {
    Tensor.to,
    Tensor.copy_,
    Tensor.type_as,
    Tensor.expand_as,
    Tensor.view_as,
    Tensor.reshape_as,
    Tensor.new_tensor,
    Tensor.data.__set__,
    Tensor.grad.__set__,
    torch.as_tensor,
    torch.tensor,
    torch.result_type,
    torch.broadcast_tensors,
    torch._has_compatible_shallow_copy_type,
}
_INDEXED = {Tensor.__getitem__, Tensor.__setitem__}
# Operations that take no 0-dimensional tensor of the CPU beside tensors of the device.
_ALL_ALIKE = {torch.cat, torch.stack, torch.hstack, torch.vstack, torch.equal, Tensor.equal}
_READS_A_NUMBER = {
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.__complex__,
    Tensor.__contains__,
    Tensor.equal,
    torch.equal,
    torch.allclose,
    Tensor.allclose,
    Tensor.nonzero,
    torch.nonzero,
    Tensor.unique,
    torch.unique,
    torch.masked_select,
    Tensor.masked_select,
}
_FROM_VALUES = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


@dataclass(frozen=True)
class Wait:
    """One wait of the processor for the device: the function of torch, and who called it."""

    function: str
    caller: str


class PretendedDevice(TorchFunctionMode):
    """The mode itself; `pretended` enters it together with the answers of `torch.cuda`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.waits: list[Wait] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        answer = self._asked(func, args)
        if answer is not None:
            return answer
        tensors = list(_tensors_in((args, kwargs)))
        tagged = [tensor for tensor in tensors if is_tagged(tensor)]
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        self._check_alike(func, args, tensors, tagged)
        if tagged and func in (Tensor.numpy, Tensor.__array__):
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")
        named = kwargs.get("device")
        if named is not None and self._is_here(named):
            kwargs["device"] = "cpu"  # where the values really lie
        self._check_generator(func, args, kwargs, tagged, named)
        self._count(func, args, tensors, tagged, named)
        result = func(*args, **kwargs)
        self._tag_result(func, args, kwargs, result, tagged, named)
        return result

    def _asked(self, func: Any, args: Any) -> Any:
        """The answer to where a tensor stands; None where the call asks something else."""
        if func not in _QUESTIONS or not is_tagged(args[0]):
            return None
        return _QUESTIONS[func](self.device)

    def _is_here(self, device: Any) -> bool:
        """Whether a device as torch takes it (its name, its number, or itself) is the pretended one."""
        if isinstance(device, bool) or not isinstance(device, (str, int, torch.device)):
            return False
        if isinstance(device, int):
            return self.device.type == "cuda"
        return torch.device(device).type == self.device.type

    def _moved(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """`to`, `cpu` and `cuda`: a copy where the device changes, tagged where it goes to this one."""
        tensor = args[0]
        if func == Tensor.to:
            device, options = _options_of_to(args[1:], kwargs)
        else:
            device = "cpu" if func == Tensor.cpu else self.device
            options = {"non_blocking": kwargs.get("non_blocking", False)}
        was_here = is_tagged(tensor)
        here = was_here
        if isinstance(device, Tensor):
            here = is_tagged(device)
        elif device is not None:
            here = self._is_here(device)
            if not here and torch.device(device).type != "cpu":
                return func(*args, **kwargs)  # the meta device
        if tensor.is_meta:
            return func(*args, **kwargs)
        if here == was_here:
            result = tensor.to("cpu", **options)
        else:
            result = tensor.to("cpu", **{**options, "copy": True})
            if was_here or not options.get("non_blocking"):
                self._wait(func)
        self._set_tag(result, here)
        return result

    def _check_alike(self, func: Any, args: Any, tensors: list[Tensor], tagged: list[Tensor]) -> None:
        """What torch says where one operation is handed tensors of two devices."""
        if not tagged or len(tagged) == len(tensors) or func in _MOVES_OR_ONLY_LOOKS:
            return
        if func in _INDEXED:
            self._check_index(func, args)
            return
        others = [tensor for tensor in tensors if not is_tagged(tensor) and not tensor.is_meta]
        if func not in _ALL_ALIKE:
            others = [tensor for tensor in others if tensor.dim() > 0]
        if others:
            raise self._mixed(func)

    def _check_index(self, func: Any, args: Any) -> None:
        """Indices of the CPU reach into the device, not the other way round.

        What is written behind an index of tensors must stand where it is written to; to a slice it is copied.
        """
        target, index = args[0], _parts(args[1])
        scattered = [p for p in index if isinstance(p, (Tensor, list)) and not _is_number(p)]
        if not is_tagged(target) and any(is_tagged(part) for part in scattered):
            raise self._mixed(func)
        value = args[2] if func == Tensor.__setitem__ else None
        if scattered and isinstance(value, Tensor) and value.dim() > 0:
            if is_tagged(value) != is_tagged(target):
                raise self._mixed(func)

    def _mixed(self, func: Any) -> RuntimeError:
        name = getattr(func, "__name__", str(func))
        return RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{self.device} and cpu! (when calling {name})"
        )

    def _check_generator(self, func: Any, args: Any, kwargs: Any, tagged: list[Tensor], named: Any) -> None:
        drawn_here = bool(tagged) or (named is not None and self._is_here(named))
        drawing = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Generator)]
        if drawn_here and drawing:
            raise RuntimeError(f"Expected a '{self.device.type}' device type for generator but found 'cpu'")

    def _count(self, func: Any, args: Any, tensors: list[Tensor], tagged: list[Tensor], named: Any) -> None:
        """Whatever makes the processor wait until the device has come so far."""
        if tagged and func in _READS_A_NUMBER:
            self._wait(func)
        if func in _FROM_VALUES and named is not None and self._is_here(named):
            if not args or not isinstance(args[0], Tensor) or not is_tagged(args[0]):
                self._wait(func)
        if func == Tensor.copy_ and is_tagged(args[0]) != is_tagged(args[1]):
            self._wait(func)
        if func in _INDEXED:
            for part in _parts(args[1]):
                if self._index_waits(args[0], part):
                    self._wait(func)

    def _index_waits(self, target: Tensor, part: Any) -> bool:
        """A number that stands on the device is read; a mask is counted; a list, or a tensor of the CPU, is copied."""
        if is_tagged(part):
            return _is_number(part) or part.dtype == torch.bool
        return is_tagged(target) and isinstance(part, (list, Tensor)) and not _is_number(part)

    def _wait(self, func: Any) -> None:
        self.waits.append(Wait(getattr(func, "__name__", str(func)), _caller()))

    def _tag_result(
        self, func: Any, args: Any, kwargs: Any, result: Any, tagged: list[Tensor], named: Any
    ) -> None:
        if func == Tensor.data.__set__:
            self._set_tag(args[0], is_tagged(args[1]))
            return
        if named is not None:
            here = self._is_here(named)
        elif func in _INDEXED or func in (Tensor.copy_, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as):
            here = is_tagged(args[0])
        elif func == Tensor.type_as:
            here = is_tagged(args[1])
        elif func == Tensor.grad.__set__:
            return
        else:
            here = bool(tagged)
        for tensor in _tensors_in(result):
            if not tensor.is_meta:
                self._set_tag(tensor, here)

    def _set_tag(self, tensor: Tensor, here: bool) -> None:
        if here and self.device.type == "mps" and tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        tensor.__dict__[TAG] = here


_QUESTIONS = {
    Tensor.device.__get__: lambda device: device,
    Tensor.is_cuda.__get__: lambda device: device.type == "cuda",
    Tensor.is_mps.__get__: lambda device: device.type == "mps",
    Tensor.is_cpu.__get__: lambda device: False,
    Tensor.get_device: lambda device: device.index or 0,
}


def is_tagged(value: Any) -> bool:
    """Whether a tensor stands on the pretended device."""
    return isinstance(value, Tensor) and value.__dict__.get(TAG, False)


def _is_number(part: Any) -> bool:
    """Whether torch takes a part of an index for a whole number, and reads it."""
    return isinstance(part, Tensor) and part.dim() == 0 and part.dtype != torch.bool


def _options_of_to(args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Where `Tensor.to` is asked to go (None: it stays; a tensor: where that is), and its other options."""
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


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


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
    """The nearest line of Python outside torch and this file."""
    import sys

    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if "/torch/" not in path and path != __file__:
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


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
    }
    with ExitStack() as stack:
        if mode.device.type == "cuda":
            for question, answer in answers.items():
                stack.enter_context(mock.patch.object(torch.cuda, question, answer))
        stack.enter_context(mock.patch.object(torch, "autocast", _autocast_of(mode.device.type)))
        yield stack.enter_context(mode)


def _autocast_of(kind: str) -> Any:
    """Autocast that computes on the CPU what it is asked to compute on the pretended kind of device."""
    real = torch.autocast

    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        return real("cpu" if device_type == kind else device_type, *args, **options)

    return autocast
