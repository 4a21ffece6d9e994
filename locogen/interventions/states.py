"""The states that causal tracing restores: outputs of parts of denoiser and text encoder.

The parts are those of Basu et al. 2023 (arXiv 2310.13730), and of Meng et al. 2022 (arXiv
2202.05262) before.
"""

from __future__ import annotations

from collections import Counter, defaultdict
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
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

DENOISER_PARTS = ("self-attention", "cross-attention", "resnet", "feed-forward")
TEXT_PARTS = ("text self-attention", "text MLP")
_BLOCKS = {"ResnetBlock2D": "resnet", "FeedForward": "feed-forward"}  # diffusers' classes
_TEXT_BLOCKS = {  # what CLIP, T5, Qwen and ChatGLM call them
    "self_attn": "text self-attention",
    "self_attention": "text self-attention",
    "SelfAttention": "text self-attention",
    "mlp": "text MLP",
    "DenseReluDense": "text MLP",
}


@dataclass(frozen=True)
class State:
    """The output of a module: the `index`-th of its `part` in execution order."""

    part: str
    index: int
    name: str
    module: Module = field(repr=False, compare=False)

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.part} {self.index} ({self.name})"


@dataclass(frozen=True, eq=False)
class _Remembered:
    """The states of a model, and the modules among which they were looked for, with their names."""

    candidates: Mapping[Any, str]
    states: tuple[State, ...]


# By denoiser, or by first text encoder.
_REMEMBERED: WeakKeyDictionary[Any, _Remembered] = WeakKeyDictionary()


def find_states(pipe: Pipeline) -> tuple[State, ...]:
    """Find the states of the denoiser that `causal_trace` can restore.

    Args:
        pipe: The pipeline.

    Returns:
        The states in observed execution order. `part` is one of `DENOISER_PARTS`, `index` counts
        within the part, and that of a cross-attention state is the index of `find_layers`.

    Raises:
        UnsupportedModel: The family is unknown.
        LocogenError: The denoiser has none of the parts.

    Example:
        >>> states = find_states(load("mini"))
        >>> len(states), states[0].label
        (70, 'resnet 0 (down_blocks.0.resnets.0)')
        >>> sum(state.part == "cross-attention" for state in states)
        16
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
            f"{type(denoiser).__name__} has none of the parts that causal tracing restores "
            f"({', '.join(DENOISER_PARTS)}): use loco.localize"
        )
    _REMEMBERED[denoiser] = _Remembered(candidates, states)
    return states


def _is_part(module: Module) -> bool:
    return type(module).__name__ in _BLOCKS or (hasattr(module, "to_k") and hasattr(module, "to_v"))


def _denoiser_part(module: Module, kwargs: Mapping[str, Any]) -> str:
    if type(module).__name__ in _BLOCKS:
        return _BLOCKS[type(module).__name__]
    # The modules of self- and cross-attention are of one class: what they are called with tells
    # them apart.
    has_text = kwargs.get("encoder_hidden_states") is not None
    return "cross-attention" if has_text else "self-attention"


def find_text_states(pipe: Pipeline) -> tuple[State, ...]:
    """Find the states of the text encoders that `causal_trace` can restore.

    Args:
        pipe: The pipeline.

    Returns:
        The states in observed execution order. `part` is one of `TEXT_PARTS`, and `index` counts
        within the part: with one encoder, it is the encoder's layer.

    Raises:
        LocogenError: The parts of the encoder are unknown.

    Example:
        >>> states = find_text_states(load("mini"))
        >>> [(state.part, state.index) for state in states[:3]]
        [('text self-attention', 0), ('text MLP', 0), ('text self-attention', 1)]
    """
    encoders = text_encoders(pipe)
    first = next(iter(encoders.values()))
    candidates = {}
    for part, encoder in encoders.items():
        for name, module in encoder.named_modules():
            if name.rpartition(".")[2] in _TEXT_BLOCKS:
                candidates[module] = f"{part}.{name}"
    states = _remembered(first, candidates)
    if states is None:
        calls = _observed_in_encoders(list(encoders.values()), candidates, pipe)
        parts = {module: _TEXT_BLOCKS[candidates[module].rpartition(".")[2]] for module in calls}
        states = _numbered(parts, candidates)
    if not states:
        raise LocogenError(
            "causal tracing knows the self-attention and MLP of CLIP, T5, Qwen, Mistral, Gemma and "
            "ChatGLM, and this text encoder "
            "has neither: leave its parts out of parts="
        )
    _REMEMBERED[first] = _Remembered(candidates, states)
    return states


def _observed_in_encoders(
    encoders: Sequence[Any], candidates: Iterable[Any], pipe: Pipeline
) -> list[Any]:
    """The modules of all encoders in the order in which encoding a prompt calls them."""
    import torch

    together = torch.nn.ModuleList(encoders)  # so that one call encodes a prompt, and is observed
    return list(observed_calls(together, candidates, lambda: encode(pipe, [""])))


def _remembered(model: Any, candidates: Mapping[Any, str]) -> tuple[State, ...] | None:
    """States that were observed before, unless a module was exchanged since."""
    remembered = _REMEMBERED.get(model)
    if remembered is None or remembered.candidates != candidates:
        return None
    return remembered.states


def _numbered(parts: Mapping[Any, str], names: Mapping[Any, str]) -> tuple[State, ...]:
    """States of modules in the order of their calls, each with its place in its part."""
    counts: Counter[str] = Counter()
    states = []
    for module, part in parts.items():
        states.append(State(part, counts[part], names[module], module))
        counts[part] += 1
    return tuple(states)


def check_apart(pipe: Pipeline, what: str) -> None:
    """Refuse joint attention, where no layer reads the text without changing it."""
    family = family_of(pipe)
    if family.joint_attention:
        raise LocogenError(
            f"in {family.name} text and picture share their attention, so {what} cannot be used "
            "for it: use loco.localize"
        )


@contextmanager
def restoring(pipe: Pipeline, rows: Sequence[tuple[int, tuple[int, ...]]]) -> Iterator[None]:
    """Within the context, row `i` of a call has some states of another row of the same call.

    Args:
        pipe: The pipeline, to be called with one prompt for each of `rows`, one picture each.
        rows: For each row, the row that it takes states from, and which ones, as places in
            `find_states`; `(i, ())` leaves it unchanged. Conditional rows alone are changed.

    Raises:
        LocogenError: The states or rows are not there, or the call has another number of rows.
    """
    states = find_states(pipe)
    count = len(rows)
    all_places = set(range(len(states)))
    for source, restored in rows:
        if not all_places.issuperset(restored) or not 0 <= source < count:
            raise LocogenError(
                f"there is no row {source}, or not all of the states {restored}: use rows from 0 "
                f"to {count - 1} and states from 0 to {len(states) - 1}"
            )

    # One hook a state, for all rows that restore it.
    pairs: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
    for row, (source, restored) in enumerate(rows):
        for place in set(restored):
            pairs[place].append((row, source))

    # The clean run is in the same batch as the corrupted ones: so its states are those of the same
    # step, and none has to be stored.
    def hooks_for(call: Call) -> list[Hook]:
        hooks = []
        for place in sorted(pairs):
            state = states[place]
            change = _copying(state, pairs[place], count, call)
            hooks.append(after(state.module, change, state.label))
        return hooks

    with on_denoiser(pipe, hooks_for, f"restoring {list(rows)}"):
        yield


def _copying(state: State, pairs: Sequence[tuple[int, int]], count: int, call: Call) -> Any:
    """A hook that puts one row's output in the place of another's, among the conditional rows."""

    # After the module: what later modules read of it, the residual stream included, is then
    # restored.
    def hook(module: Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        if not call.rows:
            return None
        if len(call.rows) != count or len(output) != call.rows.stop:
            raise LocogenError(
                f"{state.name} puts out {len(output)} rows, and {count} were planned: call the "
                "pipeline with one prompt for each row"
            )
        first = call.rows.start
        changed = index_on(output.device, [first + row for row, _ in pairs])  # (pairs,)
        sources = index_on(output.device, [first + source for _, source in pairs])  # (pairs,)
        return output.index_copy(0, changed, output[sources])  # (call rows, ...)

    return hook
