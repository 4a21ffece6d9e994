"""Encoder layers as places: which of the layers that a text is taken from tells of the concept.

Some families take each token from several layers of their encoder: FLUX.2 from three, side by side
in width, Krea 2 from twelve. What the denoiser is called with is moved along the straight line from
the prompt's states to the target's, with an `alpha` for each row, encoder layer and token. The
target's end is its own encoding, whatever the denoiser's layers make of it: no run of the target
rides along. A mask, which belongs to no layer of the encoder, moves by an alpha of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.localization.attribution.blending import (
    JOINED_MASK,
    NEVER_READ,
    POOLED,
    Blend,
    Moment,
    bias_between,
    in_float32,
)
from locogen.models.hooks import Hook, before, named_arguments, with_arguments
from locogen.models.layers import Layer
from locogen.types import Module

if TYPE_CHECKING:
    from torch import Tensor

MASK = "encoder_attention_mask"  # the denoiser's argument for it, in families with several layers


@dataclass(eq=False)
class EncodedBlend(Blend):
    """One hook on a denoiser that blends the encoded text which it is called with.

    Attributes:
        numbers: Which layers of the encoder the text is taken from, counted as its hidden states
            are: 0 is the embedding of words.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.family.tapped_layers is None:
            raise LocogenError(
                f"{self.family.name} takes its text from one layer of each encoder, which has all "
                "of it: take axis='layer', the layers of the denoiser"
            )
        self.numbers = self.family.tapped_layers(self.pipe)
        names = [f"encoder layer {number}" for number in self.numbers]
        self.layers = tuple(Layer(i, name, self.denoiser) for i, name in enumerate(names))

    @property
    def is_joint(self) -> bool:
        """Whether targets run along: never, since their encoding is at hand."""
        return False

    @property
    def has_pooled(self) -> bool:
        """Whether anything of the text is in no layer of the encoder: its mask."""
        return self.family.layer_mask is not None

    def heads(self, layer: int) -> int:
        """A state of the encoder has no heads."""
        return 1

    def hooks(self) -> list[Hook]:
        """The hook before the denoiser."""
        return [before(self.denoiser, self._blend_encoded, "the denoiser")]

    def _blend_encoded(self, module: Module, args: Any, kwargs: dict[str, Any]) -> Any:
        moment = self.now
        if moment is None:
            return None
        arguments = named_arguments(module, args, kwargs)
        in_batch = slice(moment.rows.start, moment.rows.stop)
        states = arguments[self.family.text_argument]  # (call rows, tokens, ...)
        changed = states.clone()
        changed[in_batch] = self._states_between(states[in_batch], moment)
        changes = {self.family.text_argument: changed}
        mask = arguments.get(MASK)  # (call rows, tokens)
        if mask is not None and POOLED in moment.alphas:
            changes[MASK] = _mask_between(mask, moment, in_batch, states)
        return with_arguments(module, args, kwargs, changes)

    def _states_between(self, of_prompt: Tensor, moment: Moment) -> Tensor:
        """Encoded text between a prompt's and a target's, shaped as it comes."""
        import torch

        count = len(self.layers)
        one = _by_layer(in_float32(of_prompt), count)  # (rows, tokens, encoder layers, width)
        other = _by_layer(moment.targets.states.to(of_prompt.device), count).to(one)
        still = torch.zeros(1, 1, 1, device=one.device)
        alphas = [moment.alphas.get(place, still) for place in range(count)]
        columns = [alpha.expand(*one.shape[:2], 1) for alpha in alphas]
        alpha = torch.stack(columns, dim=2)  # (rows, tokens, encoder layers, 1)
        mixed = one.lerp(other, alpha.to(one))
        return mixed.reshape(of_prompt.shape).to(of_prompt.dtype)


def _by_layer(states: Tensor, count: int) -> Tensor:
    """Encoded text with its encoder layers apart, (rows, tokens, encoder layers, width)."""
    return states if states.ndim == 4 else states.unflatten(2, (count, -1))


def _mask_between(mask: Tensor, moment: Moment, in_batch: slice, states: Tensor) -> Tensor:
    """What attention adds for the text, to which the denoiser joins the picture's `True`."""
    import torch

    of_target = moment.targets.mask
    assert of_target is not None  # a family that is called with a mask encodes one
    alpha = moment.alphas[POOLED].reshape(-1, 1)  # (rows, 1)
    read = torch.full_like(mask, JOINED_MASK, dtype=states.dtype)
    changed = read.masked_fill(~mask.bool(), NEVER_READ)
    ends = (mask[in_batch].float(), of_target.to(mask.device).float())  # (rows, tokens) each
    changed[in_batch] = (JOINED_MASK + bias_between(*ends, alpha)).to(states.dtype)
    return changed  # (call rows, tokens)
