"""A short training that goes on where it was stopped, its whole state in one safetensors file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from locogen.errors import LocogenError
from locogen.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

KEEP_EVERY = 25  # steps after which the state is written

Values = Mapping[str, "Tensor"]


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
    from tqdm import tqdm

    wanted = sorted(set(stops))
    values = {name: value.detach().clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.AdamW(list(values.values()), lr=rate)
    kept: dict[int, dict[str, Tensor]] = {}
    step = _resume(path, values, optimizer, kept)
    with tqdm(total=wanted[-1], initial=step, desc=label, disable=not progress) as bar:
        while True:
            if step in wanted and step not in kept:
                kept[step] = {name: value.detach().clone() for name, value in values.items()}
            is_last = step >= wanted[-1]
            if path is not None and step and (is_last or step % KEEP_EVERY == 0):
                _write(path, step, values, optimizer, kept)
            if is_last:
                return {stop: kept[stop] for stop in wanted}
            with torch.enable_grad():
                loss = loss_at(step, values)
                gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
            if not torch.isfinite(loss):
                raise LocogenError(f"{label}: the loss is {loss.item()} at step {step}: lower rate")
            for value, gradient in zip(values.values(), gradients, strict=True):
                value.grad = gradient
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()


def _write(
    path: Path, step: int, values: Values, optimizer: object, kept: Mapping[int, Values]
) -> None:
    """Write the state; a kill at any moment leaves the one before."""
    import torch
    from safetensors.torch import save_file

    tensors = {"step": torch.tensor(step)}
    for name, value in values.items():
        tensors[f"value/{name}"] = value.detach()
        for part, moment in optimizer.state.get(value, {}).items():  # pyright: ignore
            tensors[f"{part}/{name}"] = moment
    for stop, old in kept.items():
        tensors |= {f"after {stop}/{name}": value for name, value in old.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        save_file({name: value.contiguous().clone() for name, value in tensors.items()}, part)


def _resume(
    path: Path | None, values: Values, optimizer: object, kept: dict[int, dict[str, Tensor]]
) -> int:
    """Take values, moments and kept values from the file, if there is one; the step reached."""
    import torch
    from safetensors.torch import load_file

    if path is None or not path.exists():
        return 0
    tensors = load_file(path)
    step = int(tensors.pop("step"))
    with torch.no_grad():
        for key, tensor in tensors.items():
            what, _, name = key.partition("/")
            value = values[name]
            if what == "value":
                value.copy_(tensor)
            elif what.startswith("after "):
                kept.setdefault(int(what.removeprefix("after ")), {})[name] = tensor.to(value)
            else:
                # AdamW counts its steps on the CPU.
                moment = tensor if what == "step" else tensor.to(value)
                optimizer.state[value][what] = moment  # pyright: ignore
    return step
