"""The hook contexts: change or record what each layer hears, then leave the model as found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import MARK, Call, before, following, hooked
from locogen.interventions.indices import index_on
from locogen.models.families import Family, denoiser_of, encode, family_of
from locogen.models.layers import Layer, find_layers
from locogen.plan import Intervention, riders

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from locogen.models.text import Text

_ACTIVE: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()


@contextmanager
def intervene(pipe: Any, plan: Sequence[Intervention], *, targets: Text | None = None) -> Iterator[None]:
    """Within the context, row `i` of a pipeline call follows `plan[i]`: its layers hear its target.

    The call itself stays the user's: `pipe([row.prompt for row in plan], ...)` with as many prompts as the plan has
    rows, any guidance, and any `num_images_per_prompt`. The negative half of guidance, or the separate negative call,
    is never touched (Basu et al. 2024, section 4: the conditional part only). A plan without layers leaves the call
    bit for bit as it was. `targets`: the targets' text, where it is encoded already.

    Where text changes from block to block (SD 3, FLUX), a layer hears a target by the keys and values that the
    target's own run has there and then (patching, arXiv 2502.09935). That run rides along in the batch: the plan must
    hold it, as `with_riders(plan)` does.

    Raises `LocogenError` for a layer that the model has not, for a call with another number of prompts, for targets
    that do not ride along where they must, for pooled="target" where there is no pooled path, and where text reaches
    the layers in a form that cannot be exchanged; `UnsupportedModel` for an unknown family.
    """
    rows = list(plan)
    family = family_of(pipe)
    layers = find_layers(pipe)
    _check_plan(rows, len(layers), family)
    exchange = _Patched if family.evolves else _Told
    texts = encode(pipe, [row.target for row in rows]) if targets is None and not family.evolves else targets
    denoiser = denoiser_of(pipe, family)
    told = repr([(r.target, r.layers, r.timesteps, r.pooled) for r in rows] + [_digest(texts)])
    with following(pipe, family) as call:
        means = exchange(call, rows, texts)
        hooks = [(before(denoiser), means.check)]
        if any(row.pooled == "target" for row in rows) and family.pooled is not None:
            hooks += family.pooled(denoiser, means.pooled)
        for layer in layers:
            if any(layer.index in row.layers for row in rows):
                hooks += means.at(layer)
        with hooked(hooks), _announced(pipe, family, f"intervene {told}"):
            yield


def _digest(texts: Text | None) -> list[str]:
    if texts is None:
        return []
    return [hashlib.sha256(state.detach().float().cpu().numpy().tobytes()).hexdigest()[:16] for state in texts.states]


def _check_plan(rows: Sequence[Intervention], count: int, family: Family) -> None:
    if not rows:
        raise LocogenError("the plan is empty: give intervene at least one row")
    for row in rows:
        beyond = [i for i in row.layers if not 0 <= i < count]
        if beyond:
            raise LocogenError(f"layers {beyond} of {row.prompt!r} are not there: the model has 0 to {count - 1}")
        if row.pooled == "target" and family.pooled is None:
            raise LocogenError(f"{family.name} hears text by its layers alone: leave out pooled='target'")
    missing = riders(rows) if family.evolves else ()
    if missing:
        raise LocogenError(
            f"{family.name} hears a target from the target's own run, and that of {missing[0].target!r} with seed "
            f"{missing[0].seed} is not in the plan: take plan = with_riders(plan), its prompts and its generators"
        )


@dataclass(eq=False)
class _Exchange:
    """What the rows of a plan hear in place of their own text, in the denoiser's call in progress."""

    call: Call
    plan: Sequence[Intervention]
    texts: Any

    def check(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A pre-hook for the denoiser: the call must hold the plan's prompts, each as often as pictures are made."""
        rows, count = self.call.rows, len(self.plan)
        if not rows:
            return
        if len(rows) % count:
            raise LocogenError(
                f"the denoiser is called with {len(rows)} conditional rows, the plan has {count}: call the pipeline "
                "with exactly the plan's prompts, [row.prompt for row in plan]"
            )
        groups = self.call.states[rows.start :].unflatten(0, (count, -1))
        if groups.shape[1] > 1 and not bool((groups == groups[:, :1]).all()):
            raise LocogenError(
                f"the call has {len(rows)} different prompts, the plan has {count} rows: call the pipeline with "
                "exactly the plan's prompts, [row.prompt for row in plan]"
            )

    def now(self, layer: int | None) -> list[int]:
        """Which rows of the plan hear their target now, at a layer; None: by the pooled path."""
        if not self.call.rows:
            return []
        chosen = [
            i for i, r in enumerate(self.plan) if (layer in r.layers if layer is not None else r.pooled == "target")
        ]
        return [i for i in chosen if self._in_time(self.plan[i])]

    def _in_time(self, row: Intervention) -> bool:
        if row.timesteps is None:
            return True
        first, last = row.timesteps
        if last >= len(self.call.timesteps()):
            raise LocogenError(f"step {last} is not there: the call has 0 to {len(self.call.timesteps()) - 1}")
        return first <= self.call.step() <= last

    def places(self, chosen: Sequence[int]) -> Tensor:
        """Where rows of the plan stand in the call, all pictures of each."""
        rows = self.call.rows
        each = len(rows) // len(self.plan)
        found = [rows.start + i * each + k for i in chosen for k in range(each)]
        return index_on(self.call.states.device, found)


class _Told(_Exchange):
    """The targets' encoding takes the place of the prompts', as the layers hear it."""

    def at(self, layer: Layer) -> list[Any]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            import torch

            chosen = self.now(layer.index)
            if not chosen:
                return None
            heard = kwargs.get("encoder_hidden_states")
            if not isinstance(heard, torch.Tensor):
                raise LocogenError(f"layer {layer.index} ({layer.name}) hears {type(heard).__name__}, not one tensor")
            places = self.places(chosen).to(heard.device)
            kwargs = {**kwargs, "encoder_hidden_states": _moved(heard, self._heard(), places)}
            if self.texts.mask is not None and kwargs.get("attention_mask") is not None:
                kwargs["attention_mask"] = _moved(kwargs["attention_mask"], self._unheard(heard), places)
            return args, kwargs

        return [(before(layer.module), hook)]

    def pooled(self, own: Tensor) -> Tensor:
        chosen = self.now(None)
        if not chosen:
            return own
        other = self._states() if self.texts.pooled is None else self._all(own, self.texts.pooled)
        return _moved(own, other, self.places(chosen))

    def _all(self, own: Tensor, targets: Tensor) -> Tensor:
        """The denoiser's argument with the targets' text in every conditional row."""
        if own.shape[1:] != targets.shape[1:]:
            raise LocogenError(
                f"the model hears text of shape {tuple(own.shape[1:])}, the targets have {tuple(targets.shape[1:])}: "
                "encode prompts and targets with the same tokenizer length"
            )
        each = len(self.call.rows) // len(self.plan)
        return own.index_copy(0, self.places(range(len(self.plan))), targets.to(own).repeat_interleave(each, dim=0))

    def _once(self, name: str, make: Any) -> Tensor:
        """Made at its first use in a call: then the denoiser is where it computes, offloaded or not."""
        made = self.call.made
        if name not in made:
            made[name] = make()
        return made[name]

    def _states(self) -> Tensor:
        return self._once("states", lambda: self._all(self.call.states, self.texts.states))

    def _heard(self) -> Tensor:
        family, denoiser = self.call.family, denoiser_of(self.call.pipe, self.call.family)
        return self._once("heard", lambda: family.heard(denoiser, self._states()))

    def _unheard(self, heard: Tensor) -> Tensor:
        """The bias of attention for the tokens that the targets' mask leaves out, as diffusers makes it of a mask."""
        own = self.call.given["encoder_attention_mask"]
        return self._once("bias", lambda: (1 - self._all(own, self.texts.mask).to(heard)).unsqueeze(1) * -10000.0)


class _Patched(_Exchange):
    """The keys and values of the targets' own runs, in the same call, take the place of the rows' own."""

    def at(self, layer: Layer) -> list[Any]:
        matrices = self.call.family.matrices(layer.module)
        if getattr(layer.module, "fused_projections", False):
            raise LocogenError("the model's projections are fused: call its unfuse_qkv_projections() first")
        return [(module.register_forward_hook, self._after(layer)) for module in matrices.values()]

    def _after(self, layer: Layer) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
            chosen = self.now(layer.index)
            if not chosen:
                return None
            tokens = self.call.states.shape[1] if layer.joined else output.shape[1]
            changed = output.clone()
            changed[self.places(chosen), :tokens] = output[self.places(self._riding(chosen)), :tokens]
            return changed

        return hook

    def pooled(self, own: Tensor) -> Tensor:
        chosen = self.now(None)
        return own.index_copy(0, self.places(chosen), own[self.places(self._riding(chosen))]) if chosen else own

    def _riding(self, chosen: Sequence[int]) -> list[int]:
        """The rows of the plan that are the targets' own runs."""
        own = {(row.prompt, row.seed): i for i, row in enumerate(self.plan) if row.is_plain}
        return [own[self.plan[i].target, self.plan[i].seed] for i in chosen]


def _moved(own: Tensor, other: Tensor, places: Tensor) -> Tensor:
    """Some rows of one tensor from another."""
    return own.index_copy(0, places, other[places].to(own))


@contextmanager
def record(pipe: Any) -> Iterator[dict[int, list[Tensor]]]:
    """Within the context, collect what each layer hears: {layer index: [(rows, tokens, width) at each call]}.

    Opened inside `intervene`, it hears the exchanged text, except where keys and values are patched (SD 3, FLUX); the
    tensors are detached, on their own device.
    """
    layers = find_layers(pipe)
    heard: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in layers}
    tokens: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        tokens[:] = [kwargs["encoder_hidden_states"].shape[1]]

    def listener(layer: Layer) -> Any:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            found = kwargs["hidden_states"][:, : tokens[0]] if layer.joined else kwargs["encoder_hidden_states"]
            heard[layer.index].append(found.detach())

        return hook

    counter = (before(denoiser_of(pipe)), count)
    with hooked([counter, *((before(layer.module), listener(layer)) for layer in layers)]):
        yield heard


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
    """Names of the pipeline's modules that carry somebody else's forward hooks, whose effect nobody can key.

    Those of transformers are the pipeline's own: left behind to collect hidden states (SD-XL, SD 3), changing nothing.
    """
    found = []
    for part, component in pipe.components.items():
        for name, module in component.named_modules() if hasattr(component, "named_modules") else ():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if any(not hasattr(hook, MARK) and not _of_transformers(hook) for hook in hooks):
                found.append(f"{part}.{name}")
    return tuple(found)


def _of_transformers(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("transformers.")


def generators(plan: Sequence[Intervention]) -> list[torch.Generator]:
    """One CPU generator a row, seeded with the row's seed: the same noise on every device and in every batch."""
    import torch

    return [torch.Generator("cpu").manual_seed(row.seed) for row in plan]
