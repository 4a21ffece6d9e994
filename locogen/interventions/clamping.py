"""Clamp neurons, single channels of the matrices that read text, while pictures are made."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, on_denoiser
from locogen.interventions.indices import index_on
from locogen.models.families import Family, denoiser_of, family_of
from locogen.models.hooks import Hook, after, before
from locogen.models.layers import Layer, find_layers

if TYPE_CHECKING:
    from torch import Tensor

Place = tuple[int, str]  # a layer's index and the matrix' name, "k" or "v"


class Overlap(NamedTuple):
    """How many neurons two selections share, and how many two random selections of their sizes would on average.

    `jaccard`: shared / all that either has, 0 to 1; `jaccard_expected`: the same of the expected number.
    """

    shared: int
    expected: float
    jaccard: float
    jaccard_expected: float


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen neurons: output channels, counted from 0, by (layer, matrix), as `{(8, "v"): (3, 17)}`.

    `without`: what each matrix puts out at each token position on prompts without the concept, on average,
    (tokens, channels of the matrix); `find_neurons` measures it, `clamp(to="mean")` and `overlap` need it.
    Raises `LocogenError` for channels that are no whole numbers from 0 up, or come twice.
    """

    channels: Mapping[Place, tuple[int, ...]]
    without: Mapping[Place, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        channels = {}
        for place, given in self.channels.items():
            chosen = tuple(int(channel) for channel in given)
            if len(set(chosen)) < len(chosen) or min(chosen, default=0) < 0:
                raise LocogenError(f"channels {chosen} of {place}: give each once, counted from 0")
            channels[place] = tuple(sorted(chosen))
        object.__setattr__(self, "channels", channels)

    def __len__(self) -> int:
        return sum(map(len, self.channels.values()))

    def overlap(self, other: Selection) -> Overlap:
        """What this selection shares with another of the same model, beside what chance would give.

        Two random sets of a and b of a matrix' c channels share a b / c on average. Raises `LocogenError` where the
        matrices' widths are unknown or differ.
        """
        shared, expected = 0, 0.0
        for place in set(self.channels) & set(other.channels):
            mine, theirs = self.channels[place], other.channels[place]
            widths = {s.without[place].shape[1] for s in (self, other) if place in s.without}
            if len(widths) != 1:
                raise LocogenError(
                    f"{place} has {sorted(widths) or 'unknown'} channels: compare neurons of one model"
                )
            shared += len(set(mine) & set(theirs))
            expected += len(mine) * len(theirs) / widths.pop()
        every = len(self) + len(other)
        if not every:
            raise LocogenError("both selections are empty: there is nothing to compare")
        return Overlap(shared, expected, shared / (every - shared), expected / (every - expected))

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{i}</th><td>{m}</td><td>{len(c)}</td></tr>"
            for (i, m), c in self.channels.items()
        )
        head = "<tr><th>layer</th><th>matrix</th><th>neurons</th></tr>"
        return f"<p><b>Selection</b> of {len(self)} neurons</p><table>{head}{rows}</table>"


@contextmanager
def clamp(
    pipe: Any,
    selection: Selection,
    *,
    to: Literal["mean", "zero"] | float = "mean",
    steps: Iterable[int] | None = None,
) -> Iterator[None]:
    """Within the context, the selected neurons do not say what they would, in every call of the pipeline.

    `to`: "mean", what the channel puts out at the same token position on prompts without the concept, on average
    (`Selection.without`; Basu et al. 2024, section 6); "zero"; or a number that their output is multiplied with.
    The mean is taken position by position, because one value for all would also overwrite the start mark, which says
    the same in every prompt and is attended to most. `steps`: the denoising steps, counted from 0, at which it holds;
    None: all. Only the conditional rows are changed; an empty selection leaves the call bit for bit as it was.

    Raises `LocogenError` for neurons or steps that the model or the call has not, for fused projections, and for a
    call whose text has another number of tokens than the means.
    """
    family, layers = family_of(pipe), find_layers(pipe)
    scale, moments = _scale(to), _steps(steps)
    chosen = {place: channels for place, channels in selection.channels.items() if channels}
    modules = {
        place: _matrix(family, layers, place, channels) for place, channels in chosen.items()
    }
    fills = {place: _fill(selection, place, scale) for place in chosen}
    if not chosen:
        yield
        return

    def hooks_for(call: Call) -> list[Hook]:
        clock = _Clock(call, moments)
        hooks = [before(denoiser_of(pipe, family), clock.note_step, "the denoiser")]
        for place, module in modules.items():
            layer = layers[place[0]]
            change = _clamped(layer, place, chosen[place], scale, fills[place], clock)
            label = f"to_{place[1]} of layer {layer.index} ({layer.name})"
            hooks.append(after(module, change, label))
        return hooks

    means = [fill.cpu().double().numpy().tobytes() for fill in fills.values() if fill is not None]
    digest = hashlib.sha256(b"".join(means)).hexdigest()[:16]
    with on_denoiser(
        pipe, hooks_for, f"clamp {(scale, moments, sorted(chosen.items()), digest)!r}"
    ):
        yield


def _scale(to: Any) -> float | None:
    """What outputs are multiplied with; None: the mean takes their place."""
    if to == "mean":
        return None
    if to == "zero":
        return 0.0
    if isinstance(to, bool) or not isinstance(to, (int, float)) or not math.isfinite(to):
        raise LocogenError(f"to is {to!r}: take 'mean', 'zero', or a number to multiply with")
    return float(to)


def _steps(steps: Any) -> tuple[int, ...] | None:
    if steps is None:
        return None
    try:
        chosen = tuple(sorted({int(step) for step in steps}))
    except (TypeError, ValueError):
        raise LocogenError(
            f"steps is {steps!r}: give several whole numbers, such as range(5)"
        ) from None
    if chosen and chosen[0] < 0:
        raise LocogenError(f"steps {chosen} are counted from 0, the first one")
    return chosen


def _matrix(
    family: Family, layers: tuple[Layer, ...], place: Place, channels: tuple[int, ...]
) -> Any:
    """The module whose channels these are. Raises `LocogenError` where the model has it not, or never calls it."""
    index, name = place
    if not 0 <= index < len(layers):
        raise LocogenError(
            f"layer {index} of the selection is not there: the model has 0 to {len(layers) - 1}"
        )
    matrices = family.matrices(layers[index].module)
    if name not in matrices:
        raise LocogenError(
            f"layer {index} has no matrix {name!r}: take one of {', '.join(matrices)}"
        )
    width = matrices[name].out_features
    if channels[-1] >= width:
        raise LocogenError(
            f"channel {channels[-1]} of {name!r} in layer {index} is not there: it has 0 to {width - 1}"
        )
    return matrices[name]


def _fill(selection: Selection, place: Place, scale: float | None) -> Tensor | None:
    """What takes the place of the channels' output, (tokens, channels); None where it is scaled."""
    if scale is not None:
        return None
    if place not in selection.without:
        raise LocogenError(
            f"the selection has no means for {place}: take it from find_neurons, or clamp to='zero'"
        )
    return selection.without[place][:, list(selection.channels[place])]


@dataclass(eq=False)
class _Clock:
    """Knows at each call of the denoiser whether its step is among the chosen ones."""

    call: Call
    steps: tuple[int, ...] | None
    holds: bool = True

    def note_step(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A pre-hook for the denoiser."""
        if self.steps is None:
            return
        last = len(self.call.timesteps()) - 1
        if self.steps and self.steps[-1] > last:
            raise LocogenError(
                f"step {self.steps[-1]} is not there: the call has the steps 0 to {last}"
            )
        self.holds = self.call.step() in self.steps


def _clamped(
    layer: Layer,
    place: Place,
    channels: tuple[int, ...],
    scale: float | None,
    fill: Tensor | None,
    clock: _Clock,
) -> Any:
    """A hook that changes some channels, in the conditional rows and text tokens of one matrix' output."""

    def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        nonlocal fill
        call = clock.call
        tokens = call.states.shape[1]
        if not clock.holds or not call.rows:
            return None
        if fill is not None and len(fill) != tokens:
            raise LocogenError(
                f"{place} hears {tokens} tokens, its means were taken at {len(fill)}: encode the prompts with "
                "the same tokenizer length"
            )
        changed = output.clone()
        rows = changed[call.rows.start :, : tokens if layer.joined else None]
        chosen = index_on(output.device, channels)
        if fill is not None:
            fill = fill.to(rows.device)  # kept there for the steps to come
            rows[..., chosen] = fill.to(rows.dtype)
        else:
            rows[..., chosen] = rows[..., chosen] * scale if scale else 0.0
        return changed

    return hook
