"""The hook contexts: change or record what each layer hears, then leave the model as found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError
from locogen.families import Family, denoiser_of, family_of
from locogen.layers import Layer, find_layers
from locogen.plan import Intervention

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ACTIVE: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()
_MARK = "_locogen_hook"


@contextmanager
def intervene(pipe: Any, plan: Sequence[Intervention], *, targets: Tensor | None = None) -> Iterator[None]:
    """Within the context, row `i` of a pipeline call follows `plan[i]`: its layers hear its target.

    The call itself stays the user's: `pipe([row.prompt for row in plan], ...)` with as many prompts as the plan has
    rows, any guidance, and any `num_images_per_prompt`. The negative half of guidance is never touched
    (Basu et al. 2024, section 4: the conditional part only). A plan without layers leaves the call bit for bit as
    it was. `targets`: the targets' text states, (rows, tokens, width), where they are encoded already.

    Raises `LocogenError` for a layer that the model has not, for a call with another number of prompts, and where
    text reaches the layers in a form that cannot be exchanged; `UnsupportedModel` for an unknown family.
    """
    rows = list(plan)
    family = family_of(pipe)
    layers = find_layers(pipe)
    _check_layers(rows, len(layers))
    if not rows:
        raise LocogenError("the plan is empty: give intervene at least one row")
    states = family.encode(pipe, [row.target for row in rows]) if targets is None else targets
    hooks = []
    for layer in layers:
        chosen = [i for i, row in enumerate(rows) if layer.index in row.layers]
        if chosen:
            hooks.append((_before(layer.module), _exchange(pipe, family, layer, len(rows), chosen, states)))
    told = repr([(row.target, row.layers, _digest(state)) for row, state in zip(rows, states, strict=True)])
    with _hooked(hooks), _announced(pipe, family, f"intervene {told}"):
        yield


def _digest(state: Tensor) -> str:
    return hashlib.sha256(state.detach().float().cpu().numpy().tobytes()).hexdigest()[:16]


def _check_layers(rows: Sequence[Intervention], count: int) -> None:
    for row in rows:
        beyond = [i for i in row.layers if not 0 <= i < count]
        if beyond:
            raise LocogenError(f"layers {beyond} of {row.prompt!r} are not there: the model has 0 to {count - 1}")


def _exchange(pipe: Any, family: Family, layer: Layer, count: int, chosen: Sequence[int], states: Tensor) -> Any:
    """A pre-hook that puts the targets' states in the chosen conditional rows of one layer."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        import torch

        heard = kwargs.get("encoder_hidden_states")
        if not isinstance(heard, torch.Tensor):
            raise LocogenError(f"layer {layer.index} ({layer.name}) hears {type(heard).__name__}, not one tensor")
        copies, first = _rows_a_prompt(len(heard), count, family.guided(pipe))
        if heard.shape[1:] != states.shape[1:]:
            raise LocogenError(
                f"layer {layer.index} hears text of shape {tuple(heard.shape[1:])}, the targets have "
                f"{tuple(states.shape[1:])}: encode prompts and targets with the same tokenizer length"
            )
        _check_copies(heard, first, count, copies)
        index = torch.tensor([first + i * copies + k for i in chosen for k in range(copies)], device=heard.device)
        fill = states[list(chosen)].to(heard).repeat_interleave(copies, dim=0)
        return args, {**kwargs, "encoder_hidden_states": heard.index_copy(0, index, fill)}

    return hook


def _rows_a_prompt(heard: int, count: int, guided: bool) -> tuple[int, int]:
    """Pictures a prompt, and the first conditional row: under guidance rows are cat([negative, positive])."""
    positive = heard // 2 if guided else heard
    if positive % count or (guided and heard % 2) or positive == 0:
        raise LocogenError(
            f"the denoiser is called with {positive} conditional rows, the plan has {count}: call the pipeline with "
            "exactly the plan's prompts, [row.prompt for row in plan]"
        )
    return positive // count, positive if guided else 0


def _check_copies(heard: Tensor, first: int, count: int, copies: int) -> None:
    """Rows taken for several pictures of one prompt must hear the same text: else they are other prompts."""
    groups = heard[first:].unflatten(0, (count, copies))
    if copies > 1 and not bool((groups == groups[:, :1]).all()):
        raise LocogenError(
            f"the call has {count * copies} different prompts, the plan has {count} rows: call the pipeline with "
            "exactly the plan's prompts, [row.prompt for row in plan]"
        )


@contextmanager
def record(pipe: Any) -> Iterator[dict[int, list[Tensor]]]:
    """Within the context, collect what each layer hears: {layer index: [(rows, tokens, width) at each call]}.

    Opened inside `intervene`, it hears the exchanged text; the tensors are detached, on their own device.
    """
    layers = find_layers(pipe)
    heard: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}

    def listener(index: int) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            heard[index].append(kwargs["encoder_hidden_states"].detach())

        return hook

    with _hooked([(_before(layer.module), listener(layer.index)) for layer in layers]):
        yield heard


def _before(module: Any) -> Any:
    """What registers a hook that runs before the module, with its keyword arguments."""
    return partial(module.register_forward_pre_hook, with_kwargs=True)


@contextmanager
def _hooked(hooks: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Within the context, hooks are in force, each given with what registers it; marked as locogen's."""
    handles = []
    try:
        for register, hook in hooks:
            setattr(hook, _MARK, True)
            handles.append(register(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _announced(pipe: Any, family: Family, told: str) -> Iterator[None]:
    """Remember an active context beside its denoiser, so that the picture store can tell it from the plain model."""
    active = _ACTIVE.setdefault(denoiser_of(pipe, family), [])
    active.append(told)
    try:
        yield
    finally:
        active.remove(told)


def active_contexts(pipe: Any) -> tuple[str, ...]:
    """What is in force on the pipeline's denoiser now, outermost first: part of what makes a picture."""
    return tuple(_ACTIVE.get(denoiser_of(pipe), ()))


def foreign_hooks(pipe: Any) -> tuple[str, ...]:
    """Names of the pipeline's modules that carry somebody else's forward hooks, whose effect nobody can key."""
    found = []
    for part, component in pipe.components.items():
        for name, module in component.named_modules() if hasattr(component, "named_modules") else ():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if any(not hasattr(hook, _MARK) for hook in hooks):
                found.append(f"{part}.{name}")
    return tuple(found)


def generators(plan: Sequence[Intervention]) -> list[torch.Generator]:
    """One CPU generator a row, seeded with the row's seed: the same noise on every device and in every batch."""
    import torch

    return [torch.Generator("cpu").manual_seed(row.seed) for row in plan]
