"""The states that causal tracing restores: what parts of the denoiser and of the text encoder put out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, on_denoiser
from locogen.interventions.indices import index_on
from locogen.models.families import denoiser_of, encode, family_of, text_encoders
from locogen.models.hooks import Hook, after, observed_calls
from locogen.models.offload import taken_back

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


@dataclass(frozen=True)
class State:
    """What one module puts out: the `index`-th of its `part` in execution order, `name` its path."""

    part: str
    index: int
    name: str
    module: Any = field(repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class _Remembered:
    """The states of a model, and the modules among which they were looked for, with their names."""

    candidates: Mapping[Any, str]
    states: tuple[State, ...]


_REMEMBERED: WeakKeyDictionary[Any, _Remembered] = (
    WeakKeyDictionary()
)  # by denoiser, or first text encoder


def find_states(pipe: Any) -> tuple[State, ...]:
    """The denoiser's states, all parts in one observed execution order; `index` counts within the part.

    The index of a cross-attention state is that of `find_layers`. Parts: `DENOISER_PARTS`, as in Basu et al. 2024's
    baseline. Raises `UnsupportedModel` for an unknown family, `LocogenError` where the denoiser has none of them.
    """
    family = family_of(pipe)
    denoiser = denoiser_of(pipe, family)
    candidates = {module: name for name, module in denoiser.named_modules() if _is_part(module)}
    states = _remembered(denoiser, candidates)
    if states is None:
        with taken_back(denoiser):
            calls = observed_calls(
                denoiser, candidates, lambda: denoiser(**family.dummy_inputs(denoiser))
            )
        parts = {module: _denoiser_part(module, kwargs) for module, kwargs in calls.items()}
        states = _numbered(parts, candidates)
    if not states:
        raise LocogenError(
            f"{type(denoiser).__name__} has no part that causal tracing knows: {DENOISER_PARTS}"
        )
    _REMEMBERED[denoiser] = _Remembered(candidates, states)
    return states


def find_text_states(pipe: Any) -> tuple[State, ...]:
    """The text encoders' states, in observed execution order; `index` is the encoder's layer.

    Raises `LocogenError` for an encoder whose parts are not known.
    """
    encoders = text_encoders(pipe)
    first = next(iter(encoders.values()))
    candidates = {
        module: f"{part}.{name}"
        for part, encoder in encoders.items()
        for name, module in encoder.named_modules()
        if name.rpartition(".")[2] in _TEXT_BLOCKS
    }
    states = _remembered(first, candidates)
    if states is None:
        calls = _observed_in_encoders(list(encoders.values()), candidates, pipe)
        parts = {module: _TEXT_BLOCKS[candidates[module].rpartition(".")[2]] for module in calls}
        states = _numbered(parts, candidates)
    if not states:
        raise LocogenError(
            "the text encoder has no self-attention and MLP that causal tracing knows (CLIP, T5)"
        )
    _REMEMBERED[first] = _Remembered(candidates, states)
    return states


def _observed_in_encoders(
    encoders: Sequence[Any], candidates: Iterable[Any], pipe: Any
) -> list[Any]:
    """The modules of all encoders in the order in which encoding a prompt calls them."""
    import torch

    together = torch.nn.ModuleList(encoders)
    return list(observed_calls(together, candidates, lambda: encode(pipe, [""])))


def _remembered(model: Any, candidates: Mapping[Any, str]) -> tuple[State, ...] | None:
    """States that were observed before, unless a module was exchanged since."""
    remembered = _REMEMBERED.get(model)
    if remembered is None or remembered.candidates != candidates:
        return None
    return remembered.states


def _numbered(parts: Mapping[Any, str], names: Mapping[Any, str]) -> tuple[State, ...]:
    """States of modules in the order in which they were called, each with its place among its part's."""
    counts: Counter[str] = Counter()
    states = []
    for module, part in parts.items():
        states.append(State(part, counts[part], names[module], module))
        counts[part] += 1
    return tuple(states)


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


def _denoiser_part(module: Any, kwargs: Mapping[str, Any]) -> str:
    hears_itself = kwargs.get("encoder_hidden_states") is None
    attention = "self-attention" if hears_itself else "cross-attention"
    return _BLOCKS.get(type(module).__name__, attention)


@contextmanager
def restoring(pipe: Any, rows: Sequence[tuple[int, tuple[int, ...]]]) -> Iterator[None]:
    """Within the context, row `i` of a pipeline call has some states of another row of the same call.

    `rows[i]` is (the row that it takes them from, which of `find_states` it takes); `(i, ())` leaves it as it is. The
    clean run rides along in the batch, so that its states are those of the same step, and none is kept. Call the
    pipeline with exactly as many prompts, one picture each. Conditional rows only.

    Raises `LocogenError` for states or rows that are not there, and for a call with another number of rows.
    """
    states = find_states(pipe)
    count = len(rows)
    for source, restored in rows:
        beyond = [place for place in restored if not 0 <= place < len(states)]
        if beyond or not 0 <= source < count:
            raise LocogenError(
                f"row {source} or states {restored} are not there: {count} rows, {len(states)} states"
            )

    def hooks_for(call: Call) -> list[Hook]:
        hooks = []
        for place, state in enumerate(states):
            pairs = [(i, source) for i, (source, restored) in enumerate(rows) if place in restored]
            if pairs:
                label = f"{state.part} {state.index} ({state.name})"
                hooks.append(after(state.module, _copying(state, pairs, count, call), label))
        return hooks

    with on_denoiser(pipe, hooks_for, f"restoring {list(rows)}"):
        yield


def _copying(state: State, pairs: Sequence[tuple[int, int]], count: int, call: Call) -> Any:
    """A hook that puts one row's output in the place of another's, among the conditional rows."""

    def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
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
