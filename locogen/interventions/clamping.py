"""Clamp neurons, single channels of the matrices that read text, while pictures are made."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from locogen import markup
from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, Rows, on_denoiser
from locogen.interventions.indices import index_on
from locogen.models.families import Family, denoiser_of, family_of
from locogen.models.hooks import Hook, after, before
from locogen.models.layers import Layer, find_layers, select
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

Place = tuple[int, str]  # a layer's index and the matrix' name, "k" or "v"


class Overlap(NamedTuple):
    """How many neurons two selections share, and how many two random ones would on average.

    `jaccard`: shared / all that either has, 0 to 1; `jaccard_expected`: the same of the expected
    number.
    """

    shared: int
    expected: float
    jaccard: float
    jaccard_expected: float


@dataclass(frozen=True, eq=False)
class Selection:
    """Some neurons of a model: output channels of the matrices that read text.

    Attributes:
        channels: Channels, counted from 0, by (layer, matrix).
        without: The mean output of each matrix at each token position over prompts without the
            concept, (tokens, channels of the matrix). `find_neurons` measures it;
            `clamp(to="mean")` and `overlap` need it.

    Raises:
        LocogenError: Channels are no whole numbers from 0 up, or come twice.

    Example:
        >>> selection = Selection({(8, "v"): (17, 3), (9, "k"): (0,)})
        >>> len(selection)
        3
        >>> selection.channels[8, "v"]
        (3, 17)
    """

    channels: Mapping[Place, tuple[int, ...]]
    without: Mapping[Place, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        in_order = {}
        for place, channels in self.channels.items():
            numbers = tuple(int(channel) for channel in channels)
            if len(set(numbers)) < len(numbers) or min(numbers, default=0) < 0:
                raise LocogenError(f"channels {numbers} of {place}: give each once, counted from 0")
            in_order[place] = tuple(sorted(numbers))
        object.__setattr__(self, "channels", in_order)  # the class is frozen

    def __len__(self) -> int:
        return sum(map(len, self.channels.values()))

    def overlap(self, other: Selection) -> Overlap:
        """How many neurons it shares with another selection of the model, and what chance gives.

        Raises:
            LocogenError: The widths of the matrices are unknown or differ.
        """
        shared = 0
        expected = 0.0
        for place in set(self.channels) & set(other.channels):
            these = self.channels[place]
            others = other.channels[place]
            width = self._common_width(other, place)
            shared += len(set(these) & set(others))
            # Two random sets of a and b of c channels share a b / c on average (hypergeometric
            # mean).
            expected += len(these) * len(others) / width
        total = len(self) + len(other)
        if not total:
            raise LocogenError("both selections are empty: there is nothing to compare")
        return Overlap(shared, expected, shared / (total - shared), expected / (total - expected))

    def _common_width(self, other: Selection, place: Place) -> int:
        widths = {one.without[place].shape[1] for one in (self, other) if place in one.without}
        if len(widths) != 1:
            raise LocogenError(
                f"{place} has {sorted(widths) or 'unknown'} channels: compare neurons of one model"
            )
        return widths.pop()

    def _repr_html_(self) -> str:
        places = []
        for (layer, matrix), channels in self.channels.items():
            places.append({"layer": layer, "matrix": matrix, "count": len(channels)})
        return markup.shown("selection", count=len(self), places=places)


@contextmanager
def clamp(
    pipe: Pipeline,
    selection: Selection,
    *,
    to: Literal["mean", "zero"] | float = "mean",
    steps: Iterable[int] | None = None,
    rows: Rows | None = None,
) -> Iterator[None]:
    """Set the output of the selected neurons in every call of the pipeline.

    Only the conditional rows are changed. An empty selection leaves the pictures bit for bit as
    they were.

    Args:
        pipe: The pipeline.
        selection: The neurons; `find_neurons(...).top(k)` selects some that a concept activates.
        to: "mean", the mean output at the same token position over prompts without the concept
            (`Selection.without`); "zero"; or a number that the output is multiplied with.
        steps: The denoising steps, counted from 0, in which it holds; left out: all.
        rows: As for `intervene`: which rows of anybody's calls of the denoiser are changed.

    Returns:
        A context manager.

    Raises:
        LocogenError: The model or the call does not have a neuron or step, projections are fused,
            or the call's text has another number of tokens than the means.

    Example:
        >>> pipe = load("mini")
        >>> with clamp(pipe, Selection({(8, "v"): (3, 17)}), to="zero", steps=[0]):
        ...     output = pipe("a house", num_inference_steps=2, guidance_scale=1.0)
        >>> output.images[0].size
        (64, 64)
    """
    family = family_of(pipe)
    layers = find_layers(pipe)
    scale = _scale(to)
    moments = _steps(steps)
    neurons = {place: channels for place, channels in selection.channels.items() if channels}
    modules = {
        place: _matrix(family, layers, place, channels) for place, channels in neurons.items()
    }
    means: dict[Place, Tensor] = {}
    if scale is None:
        means = {place: _means(selection, place) for place in neurons}
    if not neurons:
        yield
        return

    def hooks_for(call: Call) -> list[Hook]:
        clock = _Clock(call, moments)
        # The step is looked up once a call, before the first matrix.
        hooks = [before(denoiser_of(pipe, family), clock.note_step, "the denoiser")]
        for place, module in modules.items():
            index, matrix = place
            layer = layers[index]
            columns = family.columns(layer.module)[matrix]
            change = _Clamp(
                layer,
                place,
                neurons[place],
                scale,
                means.get(place),
                clock,
                columns,
                masks_padding=family.layer_mask is not None,
            )
            # After the matrix: a neuron is one of its output channels (Basu et al. 2024, section
            # 6).
            hooks.append(after(module, change, f"to_{matrix} of {layer.label}"))
        return hooks

    label = f"clamp {(scale, moments, sorted(neurons.items()), _digest(means))!r}"
    with on_denoiser(pipe, hooks_for, label, rows):
        yield


def _scale(to: Any) -> float | None:
    """What outputs are multiplied with; None: the mean takes their place."""
    if to == "mean":
        return None
    if to == "zero":
        return 0.0
    if isinstance(to, bool) or not isinstance(to, (int, float)) or not math.isfinite(to):
        raise LocogenError(f"to is {to!r}: use 'mean', 'zero', or a number to multiply by")
    return float(to)


def _steps(steps: Any) -> tuple[int, ...] | None:
    if steps is None:
        return None
    try:
        numbers = tuple(sorted({int(step) for step in steps}))
    except (TypeError, ValueError):
        raise LocogenError(
            f"steps is {steps!r}: give several whole numbers, such as range(5)"
        ) from None
    if numbers and numbers[0] < 0:
        raise LocogenError(f"steps is {list(numbers)}: give whole numbers from 0, the first step")
    return numbers


def _matrix(
    family: Family, layers: tuple[Layer, ...], place: Place, channels: tuple[int, ...]
) -> Any:
    """The module whose channels these are. Raises `LocogenError` if the model does not have it."""
    index, name = place
    (layer,) = select(layers, [index])
    matrices = family.matrices(layer.module)
    if name not in matrices:
        raise LocogenError(
            f"layer {index} has no matrix {name!r}: use one of {', '.join(matrices)}"
        )
    first, stop, _ = family.columns(layer.module)[name].indices(matrices[name].out_features)
    width = stop - first
    if channels[-1] >= width:
        raise LocogenError(
            f"there is no channel {channels[-1]} of {name!r} in layer {index}: use channels from 0 "
            f"to {width - 1}"
        )
    return matrices[name]


def _means(selection: Selection, place: Place) -> Tensor:
    """What takes the place of the selected channels' output, (tokens, selected channels)."""
    # The mean is taken position by position: one value for all would also overwrite the start mark,
    # whose output is the same in every prompt and gets most of the attention.
    if place not in selection.without:
        raise LocogenError(
            f"the selection has no means for {place}: use one from find_neurons, or clamp to='zero'"
        )
    return selection.without[place][:, list(selection.channels[place])]


def _digest(means: Mapping[Place, Tensor]) -> str:
    parts = [values.cpu().double().numpy().tobytes() for values in means.values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


@dataclass(eq=False)
class _Clock:
    """Knows in each call of the denoiser whether its step is among the selected ones."""

    call: Call
    steps: tuple[int, ...] | None  # None: all
    holds: bool = True

    def note_step(self, module: Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A hook that runs before the denoiser."""
        if self.steps is None or not self.call.rows:  # nothing is clamped for a negative prompt
            return
        last = len(self.call.timesteps()) - 1
        if self.steps and self.steps[-1] > last:
            raise LocogenError(f"there is no step {self.steps[-1]}: the call has steps 0 to {last}")
        self.holds = self.call.step() in self.steps


@dataclass(eq=False)
class _Clamp:
    """A hook after a matrix: it sets some channels, in conditional rows and text tokens."""

    layer: Layer
    place: Place
    channels: Sequence[int]
    scale: float | None  # None: the means take the place of the output
    means: Tensor | None  # (tokens, selected channels)
    clock: _Clock
    columns: slice  # those of the matrix' output that are keys or values
    masks_padding: bool  # whether layers do not read the padding, which stands behind the text

    def __call__(self, module: Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        call = self.clock.call
        if not self.clock.holds or not call.rows:
            return None
        changed = output.clone()  # (call rows, tokens of text and, if joined, picture, channels)
        conditional = slice(call.rows.start, call.rows.stop)
        rows = changed[conditional, call.text_tokens(self.layer), self.columns]  # a view
        channels = index_on(output.device, self.channels)
        as_it_is = rows[..., channels]  # (rows, tokens, selected channels)
        if self.means is not None:
            clamped = self._means_on(rows.device, rows.shape[1]).to(rows.dtype)
        else:
            # 0 in place of a product with 0, which would keep what is not finite.
            clamped = as_it_is * self.scale if self.scale else as_it_is.new_zeros(())
        is_text = call.is_text(self.layer)  # (call rows, tokens, 1)
        if is_text is not None:
            clamped = clamped.where(is_text[conditional], as_it_is)
        rows[..., channels] = clamped
        return changed

    def _means_on(self, device: Any, tokens: int) -> Tensor:
        assert self.means is not None
        self.means = self.means.to(device)  # stays there for the steps to come
        if self.masks_padding and len(self.means) > tokens:
            # Qwen-Image's own call pads no further than to its longest prompt: what it lacks is
            # padding, and the positions before are the same.
            return self.means[:tokens]
        if len(self.means) != tokens:
            raise LocogenError(
                f"{self.place} reads {tokens} tokens, and its means are of {len(self.means)}: "
                "encode the prompts with the same tokenizer length, or clamp to='zero'"
            )
        return self.means
