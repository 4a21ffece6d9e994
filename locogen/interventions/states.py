"""The states that causal tracing restores: what parts of the denoiser and of the text encoder put out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, before, following, hooked
from locogen.interventions.indices import index_on
from locogen.interventions.prompts import _announced
from locogen.models.families import denoiser_of, encode, family_of

if TYPE_CHECKING:
    from torch import Tensor

DENOISER_PARTS = ("self-attention", "cross-attention", "resnet", "feed-forward")
TEXT_PARTS = ("text self-attention", "text MLP")
_BLOCKS = {"ResnetBlock2D": "resnet", "FeedForward": "feed-forward"}  # diffusers' classes
_TEXT_BLOCKS = {  # what CLIP and T5 call them in transformers
    "self_attn": "text self-attention",
    "SelfAttention": "text self-attention",
    "mlp": "text MLP",
    "DenseReluDense": "text MLP",
}


_FOUND: WeakKeyDictionary[Any, tuple[State, ...]] = WeakKeyDictionary()  # by denoiser, or first text encoder


@dataclass(frozen=True)
class State:
    """What one module puts out: the `index`-th of its `part` in execution order, `name` its path."""

    part: str
    index: int
    name: str
    module: Any = field(repr=False, compare=False)


def find_states(pipe: Any) -> tuple[State, ...]:
    """The denoiser's states, all parts in one observed execution order; `index` counts within the part.

    The index of a cross-attention state is that of `find_layers`. Parts: `DENOISER_PARTS`, as in Basu et al. 2024's
    baseline. Raises `UnsupportedModel` for an unknown family, `LocogenError` where the denoiser has none of them.
    """
    family = family_of(pipe)
    denoiser = denoiser_of(pipe, family)
    if denoiser in _FOUND:
        return _FOUND[denoiser]
    modules = {module: name for name, module in denoiser.named_modules() if _is_part(module)}
    found = _observed(modules, lambda: denoiser(**family.dummy_inputs(denoiser)), _denoiser_part)
    if not found:
        raise LocogenError(f"{type(denoiser).__name__} has no part that causal tracing knows: {DENOISER_PARTS}")
    _FOUND[denoiser] = found
    return found


def find_text_states(pipe: Any) -> tuple[State, ...]:
    """The text encoders' states, in observed execution order; `index` is the encoder's layer.

    Raises `LocogenError` for an encoder whose parts are not known.
    """
    encoders = text_encoders(pipe)
    first = next(iter(encoders.values()))
    if first in _FOUND:
        return _FOUND[first]
    modules = {
        module: f"{part}.{name}"
        for part, encoder in encoders.items()
        for name, module in encoder.named_modules()
        if name.rpartition(".")[2] in _TEXT_BLOCKS
    }
    found = _observed(modules, lambda: encode(pipe, [""]), lambda name, *_: _TEXT_BLOCKS[name.rpartition(".")[2]])
    if not found:
        raise LocogenError("the text encoder has no self-attention and MLP that causal tracing knows (CLIP, T5)")
    _FOUND[first] = found
    return found


def text_encoders(pipe: Any) -> dict[str, Any]:
    """The pipeline's text encoders by their attribute."""
    return {name: part for name, part in pipe.components.items() if name.startswith("text_encoder") and part}


def check_apart(pipe: Any, what: str) -> None:
    """Raise `LocogenError` for a family whose text evolves along with the picture: there is no layer that reads it."""
    family = family_of(pipe)
    if family.evolves:
        raise LocogenError(
            f"{family.name} has no cross-attention apart from the picture's own, so {what} says nothing of it: "
            "take loco.localize"
        )


def _is_part(module: Any) -> bool:
    return type(module).__name__ in _BLOCKS or (hasattr(module, "to_k") and hasattr(module, "to_v"))


def _denoiser_part(name: str, module: Any, kwargs: dict[str, Any]) -> str:
    attention = "self-attention" if kwargs.get("encoder_hidden_states") is None else "cross-attention"
    return _BLOCKS.get(type(module).__name__, attention)


def _observed(modules: dict[Any, str], call: Any, part_of: Any) -> tuple[State, ...]:
    """States of the modules in the order in which `call` runs them."""
    import torch

    called: dict[Any, str] = {}

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        called.setdefault(module, part_of(modules[module], module, kwargs))

    with hooked([(before(module), note) for module in modules]), torch.no_grad():
        call()
    counts: Counter[str] = Counter()
    states = []
    for module, part in called.items():
        states.append(State(part, counts[part], modules[module], module))
        counts[part] += 1
    return tuple(states)


@contextmanager
def restoring(pipe: Any, rows: Sequence[tuple[int, tuple[int, ...]]]) -> Iterator[None]:
    """Within the context, row `i` of a pipeline call has some states of another row of the same call.

    `rows[i]` is (the row that it takes them from, which of `find_states` it takes); `(i, ())` leaves it as it is. The
    clean run rides along in the batch, so that its states are those of the same step, and none is kept. Call the
    pipeline with exactly as many prompts, one picture each. Conditional rows only.

    Raises `LocogenError` for states or rows that are not there, and for a call with another number of rows.
    """
    family, states, count = family_of(pipe), find_states(pipe), len(rows)
    for source, chosen in rows:
        if not 0 <= source < count or any(not 0 <= s < len(states) for s in chosen):
            raise LocogenError(f"row {source} or states {chosen} are not there: {count} rows, {len(states)} states")
    with following(pipe, family) as call:
        hooks: list[tuple[Any, Any]] = []
        for place, state in enumerate(states):
            pairs = [(i, source) for i, (source, chosen) in enumerate(rows) if place in chosen]
            if pairs:
                hooks.append((state.module.register_forward_hook, _copying(state, pairs, count, call)))
        with hooked(hooks), _announced(pipe, family, f"restoring {list(rows)}"):
            yield


def _copying(state: State, pairs: Sequence[tuple[int, int]], count: int, call: Call) -> Any:
    """A hook that puts one row's output in the place of another's, among the conditional rows."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor | None:
        if not call.rows:
            return None
        if len(call.rows) != count or len(output) != call.rows.stop:
            raise LocogenError(
                f"{state.name} puts out {len(output)} rows for {count} planned: call the pipeline with one prompt a row"
            )
        first = call.rows.start
        into = index_on(output.device, [first + row for row, _ in pairs])
        sources = index_on(output.device, [first + row for _, row in pairs])
        return output.index_copy(0, into, output[sources])

    return hook
