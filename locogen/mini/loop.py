"""A training loop that survives a kill.

It has one checkpoint file, which is replaced atomically, and draws its data by the step number.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from locogen.files import replacing
from locogen.mini.muon import Muon

CHECKPOINT_SECONDS = 120.0


def rate_at(step: int, steps: int, *, warmup: int = 50, decay: float = 0.35) -> float:
    """Share of the peak rate: warm-up, plateau, a linear fall to zero over the last `decay`."""
    rise = min(1.0, (step + 1) / warmup)
    fall = min(1.0, (steps - step) / (decay * steps))
    return min(rise, fall)


def is_matrix(name: str, value: Tensor) -> bool:
    """Whether Muon trains the parameter: hidden matrices and kernels."""
    # Not embeddings, and not the first and last convolutions.
    ends = ("conv_in.weight", "conv_out.weight", "patch_embedding.weight")
    return value.ndim > 1 and "embedding" not in name and not name.endswith(ends)


class Training:
    """Parameters, their exponential moving average and both optimizers' state, kept in one file.

    Hidden matrices are trained by Muon at the rate `matrices`, everything else by AdamW at the rate
    `others`.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        folder: Path,
        *,
        matrices: float = 0.02,
        others: float = 2e-3,
        averaging: float = 0.999,
    ) -> None:
        self.parameters = {
            f"{name}.{key}": value
            for name, module in modules.items()
            for key, value in module.named_parameters()
            if value.requires_grad
        }
        hidden = [v for k, v in self.parameters.items() if is_matrix(k, v)]
        # Muon orthogonalizes matrices; embeddings, norms and biases are for Adam.
        hidden_ids = {id(v) for v in hidden}
        rest = [v for v in self.parameters.values() if id(v) not in hidden_ids]
        adam = torch.optim.AdamW(rest, lr=others, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
        self.optimizers = ((Muon(hidden, lr=matrices), matrices), (adam, others))
        self.average = {key: value.detach().clone() for key, value in self.parameters.items()}
        self.averaging = averaging
        self.path = folder / "checkpoint.safetensors"
        self.step = 0

    def save(self) -> None:
        """Write the checkpoint; a kill at any moment leaves the previous one."""
        tensors = {f"weight/{k}": v.detach() for k, v in self.parameters.items()}
        tensors |= {f"average/{k}": v for k, v in self.average.items()}
        # An optimizer keeps its state by parameter: in the file it goes by the parameter's name.
        for key, value in self.parameters.items():
            for optimizer, _ in self.optimizers:
                for part, moment in optimizer.state.get(value, {}).items():
                    tensors[f"state/{key}/{part}"] = moment
        tensors["step"] = torch.tensor(self.step)
        tensors = {k: v.contiguous().clone() for k, v in tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as part:
            save_file(tensors, part)

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if not self.path.exists():
            return
        tensors = load_file(self.path)
        self.step = int(tensors.pop("step"))
        # Parameter → the optimizer that trains it, to put each state where it belongs.
        owners = {
            v: optimizer
            for optimizer, _ in self.optimizers
            for g in optimizer.param_groups
            for v in g["params"]
        }
        with torch.no_grad():
            for name, tensor in tensors.items():
                what, _, key = name.partition("/")
                if what == "state":
                    key, _, part = key.rpartition("/")
                    value = self.parameters[key]
                    owners[value].state[value][part] = tensor.to(value.device)
                else:
                    ({"weight": self.parameters, "average": self.average}[what])[key].copy_(tensor)

    @torch.no_grad()
    def update(self, loss: Tensor, rate: float) -> None:
        """One step of both optimizers on `loss`, at `rate` times their rate, and of the average."""
        with torch.enable_grad():
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * peak
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        # A short memory at first: the average would keep the initial weights for long otherwise.
        weight = 1 - min(self.averaging, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), weight)

    @torch.no_grad()
    def use_average(self) -> None:
        """Exchange weights and average (call twice to come back)."""
        for key, value in self.parameters.items():
            weights = value.clone()
            value.copy_(self.average[key])
            self.average[key].copy_(weights)


def fit(
    training: Training,
    loss_at: Callable[[int], tuple[Tensor, dict[str, float]]],
    steps: int,
    *,
    label: str,
    look: Callable[[int], None] | None = None,
    look_every: int = 500,
    warmup: int = 50,
) -> None:
    """Train from wherever `training` stands to `steps`, then leave the average in the modules.

    `loss_at(step)` draws its batch from `step` alone, so a resumed run sees the same data as an
    unbroken one. `look(step)` writes a sample sheet with the averaged weights in place.
    """
    training.resume()
    saved = time.monotonic()
    seen: dict[str, float] = {}
    with tqdm(total=steps, initial=training.step, desc=label, mininterval=5.0) as bar:
        while training.step < steps:
            step = training.step
            loss, figures = loss_at(step)
            # A checkpoint of weights that are no numbers would make a resumed run useless too.
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{label}: the loss is {loss.item()} at step {step}")
            training.update(loss, rate_at(step, steps, warmup=warmup))
            seen = {k: 0.98 * seen.get(k, v) + 0.02 * v for k, v in figures.items()}
            bar.set_postfix({k: f"{v:.3f}" for k, v in seen.items()}, refresh=False)
            bar.update()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                training.save()
                saved = time.monotonic()
            if look and training.step % look_every == 0:
                training.use_average()
                look(training.step)
                training.use_average()
    training.save()
    training.use_average()
    if look:
        look(training.step)
