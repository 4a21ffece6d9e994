"""A short training that goes on where it was stopped, its whole state in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from locogen.console import open_bar
from locogen.errors import LocogenError
from locogen.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

KEEP_EVERY = 25  # steps after which the state is written

Values = Mapping[str, "Tensor"]


def folder_of(folder: Any) -> Path:
    """The folder that was given for pictures and states, made where it is missing.

    Raises:
        LocogenError: It is none, or nothing can be written there.
    """
    if not isinstance(folder, str | os.PathLike):
        raise LocogenError(f"folder is {folder!r}: give the path of a folder, or None")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LocogenError(
            f"folder is {str(path)!r}, which is no folder and cannot be made one "
            f"({error.strerror}): give another place"
        ) from None
    if not os.access(path, os.W_OK):
        raise LocogenError(f"nothing can be written into folder={str(path)!r}: give another one")
    return path


def state_name(kind: str, facts: Mapping[str, Any]) -> str:
    """The name of the file of a state: another one for each fact that makes a difference."""
    text = json.dumps(facts, sort_keys=True, default=str)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def write_state(path: Path, tensors: Values) -> None:
    """Write the state of a training or a search; a kill at any moment leaves the one before.

    Raises:
        LocogenError: The file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Each writer has a suffix of its own: two processes may make the same attack in one folder.
    suffix = f"{os.getpid()}-{threading.get_ident()}.part"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, suffix) as part:
            save_file({name: value.contiguous().clone() for name, value in tensors.items()}, part)
    except (OSError, SafetensorError) as error:
        raise LocogenError(
            f"{path} cannot be written ({error}): free some space there, or give another folder="
        ) from None


def read_state(path: Path | None, take: Callable[[dict[str, Tensor]], None]) -> None:
    """Give what `write_state` wrote to `take`, if it wrote any.

    Raises:
        LocogenError: The file is damaged, or `take` does not find in it what it needs.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path is None or not path.exists():
        return
    try:
        take(load_file(path))
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        raise LocogenError(
            f"{path} is no state of this training or search, or a damaged one "
            f"({type(error).__name__}: {error}): delete it, and it begins anew"
        ) from None


def optimize(
    start: Values,
    loss_at: Callable[[int, Values], Tensor],
    *,
    stops: Iterable[int],
    rate: float,
    path: Path | None,
    label: str,
    progress: bool,
) -> dict[int, dict[str, Tensor]]:
    """Follow the loss from some values by AdamW, and keep the values of some steps.

    Gradients are asked for by name: nothing but the values has any, and no module is touched.

    Args:
        start: The values to begin with, by name.
        loss_at: The loss of values at a step. It draws its batch from the step alone, so that a
            resumed training sees what an unbroken one sees.
        stops: Numbers of steps after which the values are kept.
        rate: AdamW's.
        path: Where the state is kept; None: nowhere.
        label: Of the progress bar.
        progress: Whether to show one.

    Returns:
        The values by the number of steps; after 0 steps they are `start`, to the bit.

    Raises:
        LocogenError: The loss is no number.
    """
    import torch

    ends = sorted(set(stops))
    values = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.AdamW(list(values.values()), lr=rate)
    training = _Training(values, optimizer, path)
    training.resume()
    with (
        open_bar(progress) as bar,
        bar.counting(f"{label}: step", ends[-1], training.step),
    ):
        for end in ends:
            while training.step < end:
                training.follow(loss_at, label)
                bar.add(1)
                if training.step % KEEP_EVERY == 0:
                    training.write()
            training.snapshot()
    training.write()
    missing = [end for end in ends if end not in training.snapshots]
    if missing:
        raise LocogenError(
            f"{path} lacks the values after {missing[0]} steps: delete it, and the training begins "
            "anew"
        )
    return {end: training.snapshots[end] for end in ends}


class _Training:
    """Values, AdamW's state of them, and the values of some steps."""

    def __init__(self, values: dict[str, Tensor], optimizer: Any, path: Path | None) -> None:
        self.values = values
        self.optimizer = optimizer
        self.path = path
        self.snapshots: dict[int, dict[str, Tensor]] = {}
        self.step = 0

    def follow(self, loss_at: Callable[[int, Values], Tensor], label: str) -> None:
        """One step down the loss."""
        import torch

        with torch.enable_grad():
            loss = loss_at(self.step, self.values)
            parameters = list(self.values.values())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if not torch.isfinite(loss):
            raise LocogenError(
                f"{label}: the loss is {loss.item()} at step {self.step}: give a lower rate="
            )
        for value, gradient in zip(parameters, gradients, strict=True):
            value.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def snapshot(self) -> None:
        """Remember the values as they are after this step; those of a resumed training stay."""
        if self.step not in self.snapshots:
            copies = {name: value.detach().clone() for name, value in self.values.items()}
            self.snapshots[self.step] = copies

    def write(self) -> None:
        """Write the state, if it is kept."""
        import torch

        if self.path is None:
            return
        tensors = {"step": torch.tensor(self.step)}
        for name, value in self.values.items():
            tensors[f"value/{name}"] = value.detach()
            for part, moment in self.optimizer.state.get(value, {}).items():
                tensors[f"{part}/{name}"] = moment
        for step, values in self.snapshots.items():
            tensors |= {f"after {step}/{name}": value for name, value in values.items()}
        write_state(self.path, tensors)

    def resume(self) -> None:
        """Take values, moments and snapshots from the file, if there is one."""
        read_state(self.path, self._take)

    def _take(self, tensors: dict[str, Tensor]) -> None:
        import torch

        missing = [name for name in self.values if f"value/{name}" not in tensors]
        if missing:
            raise KeyError(f"no values of {missing[0]}")
        self.step = int(tensors.pop("step"))
        with torch.no_grad():
            for key, tensor in tensors.items():
                what, _, name = key.partition("/")
                value = self.values[name]
                if what == "value":
                    value.copy_(tensor)
                elif what.startswith("after "):
                    step = int(what.removeprefix("after "))
                    self.snapshots.setdefault(step, {})[name] = tensor.to(value)
                else:
                    # AdamW counts its steps on the CPU.
                    moment = tensor if what == "step" else tensor.to(value)
                    self.optimizer.state[value][what] = moment
