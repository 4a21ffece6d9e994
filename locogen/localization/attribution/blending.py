"""Let each layer hear something between a prompt and its target, so that gradients can be taken.

A layer's keys and values are moved along the straight line from the prompt's to the target's:
`alpha` 0 is the prompt, 1 the target, for each row, layer, token and head by itself. The derivative
by an alpha is that token's share at that layer, so one backward pass gives all of them, whatever
the width of the text. Where the target's keys and values come from is as in `intervene`: from its
encoding, or with joint attention from its own run in the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import active_contexts
from locogen.models.compilation import running_uncompiled
from locogen.models.denoisers import text_first
from locogen.models.families import denoiser_of, family_of, held_denoisers
from locogen.models.hooks import (
    Hook,
    after,
    before,
    hooked,
    named_arguments,
    part_of,
    parts_of,
    with_arguments,
)
from locogen.models.layers import Layer, find_layers
from locogen.models.offload import taken_back
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from locogen.models.text import PromptEncoding

POOLED = -1  # stands for the pooled text among the indices of layers
JOINED_MASK = 1.0  # what the picture's True becomes where Qwen-Image joins it to a mask of numbers
NEVER_READ = -10000.0  # what diffusers adds to the attention of a token that the mask leaves out


@dataclass(frozen=True, eq=False)
class Moment:
    """What rows of one call of the denoiser hear.

    Attributes:
        rows: The rows of the call that hear something between prompt and target.
        alphas: By layer, (rows, tokens, heads), where a 1 stands for all; `POOLED` for the pooled
            text. A layer that is not there hears the prompt.
        tokens: How many tokens of text the denoiser is called with.
        targets: The targets, encoded, one for each of `rows`; not looked at with joint attention.
        sources: With joint attention, the rows of the targets' own runs, one for each of `rows`.
    """

    rows: range
    alphas: Mapping[int, Tensor]
    tokens: int
    targets: PromptEncoding
    sources: Tensor | None = None
    cache: dict[str, Tensor] = field(default_factory=dict)

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Made at its first use in a call: then the denoiser is where it computes, if offloaded."""
        if name not in self.cache:
            self.cache[name] = make()
        return self.cache[name]


@dataclass(eq=False)
class Blend:
    """Hooks on a denoiser that blend what its layers hear, as `now` says.

    Attributes:
        now: What the call in progress hears; None: the hooks change nothing.
    """

    pipe: Pipeline
    now: Moment | None = None

    def __post_init__(self) -> None:
        self.family = family_of(self.pipe)
        self.denoiser = denoiser_of(self.pipe, self.family)
        self.layers = find_layers(self.pipe)

    @property
    def is_joint(self) -> bool:
        """Whether targets run along in the batch: see `Moment.sources`."""
        return self.family.joint_attention

    @property
    def has_pooled(self) -> bool:
        """Whether text also enters outside of the layers."""
        return self.family.pooled is not None

    def heads(self, layer: int) -> int:
        """How many heads a layer's keys and values have: with grouped queries, fewer than these."""
        module = self.layers[layer].module
        if hasattr(module, "num_kv_heads"):  # Krea 2's
            return int(module.num_kv_heads)
        width = getattr(module, "inner_dim", None)
        of_keys = getattr(module, "inner_kv_dim", width)
        return int(module.heads) if width is None else int(module.heads * of_keys // width)

    @contextmanager
    def hearing(self, moment: Moment | None) -> Iterator[None]:
        """Within the context, the denoiser's layers hear what `now` says, at first `moment`."""
        self.now = moment
        try:
            with hooked(self.hooks()):
                yield
        finally:
            self.now = None

    def hooks(self) -> list[Hook]:
        """The hooks of all layers, and of the pooled text."""
        hooks: list[Hook] = []
        if self.family.pooled is not None:
            hooks += self.family.pooled(self.denoiser, self._blend_pooled)
        for layer in self.layers:
            if not self.is_joint:
                hooks.append(before(layer.module, self._mask_hook(layer), layer.label))
            elif self.family.layer_mask is not None:
                mask = self._joint_mask_hook(layer, self.family.layer_mask)
                hooks.append(before(layer.module, mask, layer.label))
            columns = self.family.columns(layer.module)
            for name, matrix in self.family.matrices(layer.module).items():
                blend = self._matrix_hook(layer, columns[name])
                hooks.append(after(matrix, blend, f"to_{name} {layer.label}"))
        return hooks

    def _matrix_hook(self, layer: Layer, columns: slice) -> Callable[..., Tensor | None]:
        def hook(module: Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            moment = self.now
            if moment is None or layer.index not in moment.alphas:
                return None
            # Where text and picture are one sequence, the text is first.
            tokens = moment.tokens if layer.joined else output.shape[1]
            alpha = moment.alphas[layer.index]  # (rows, tokens, heads)
            is_text = self._joined_mask(layer, moment)  # (rows, tokens)
            if is_text is not None:
                tokens = is_text.shape[1]
                alpha = alpha.expand(-1, moment.tokens, -1)[:, :tokens]
            in_batch = slice(moment.rows.start, moment.rows.stop)
            of_prompt = output[in_batch, :tokens, columns]  # (rows, tokens, channels)
            if moment.sources is None:
                other = self._read_targets(module, layer, moment)
            else:
                other = output.detach()[moment.sources, :tokens, columns]
            between = _between(of_prompt, other, alpha)
            if is_text is not None:
                between = between.where(is_text[..., None], of_prompt)
            changed = output.clone()
            changed[in_batch, :tokens, columns] = between
            return changed  # (call rows, tokens, channels)

        return hook

    def _joined_mask(self, layer: Layer, moment: Moment) -> Tensor | None:
        """Where the picture follows each row's own text: which tokens are text, (rows, tokens)."""
        if not layer.joined or self.family.joined_mask is None:
            return None
        mask = moment.targets.mask  # (rows, tokens); prompts are as long as their targets

        def up_to_the_longest() -> Tensor:
            assert mask is not None
            return mask[:, : int(mask.sum(1).max())].bool()

        return moment.once("is_text", up_to_the_longest)

    def _read_targets(self, matrix: Module, layer: Layer, moment: Moment) -> Tensor:
        """What a layer's matrix makes of the targets, (rows, tokens, channels)."""
        import torch

        denoiser = part_of(self.denoiser, layer.name)

        def projected() -> Tensor:
            return self.family.project_states(denoiser, moment.targets.states)

        with torch.no_grad():
            # A call is one denoiser's, also of several that take turns.
            states = moment.once("projected", projected)
            states = self.family.norm_states(layer.module, states)
            # Not the module itself: its hook is this one.
            return matrix.forward(states)

    def _mask_hook(self, layer: Layer) -> Callable[..., Any]:
        """Before a layer: tokens that only one of the two texts has come and go with alpha."""

        def hook(module: Module, args: Any, kwargs: dict[str, Any]) -> Any:
            moment = self.now
            if moment is None or layer.index not in moment.alphas:
                return None
            mask = moment.targets.mask
            bias = kwargs.get("attention_mask")  # (call rows, 1, tokens)
            if mask is None or bias is None:
                return None
            in_batch = slice(moment.rows.start, moment.rows.stop)
            is_read = (bias[in_batch, 0] > NEVER_READ / 2).float()  # (rows, tokens)
            alpha = moment.alphas[layer.index].mean(-1)  # (rows, tokens): all heads have one mask
            changed = bias.clone()
            changed[in_batch, 0] = bias_between(is_read, mask.to(is_read), alpha).to(bias.dtype)
            return args, {**kwargs, "attention_mask": changed}

        return hook

    def _joint_mask_hook(self, layer: Layer, name: str) -> Callable[..., Any]:
        """The same with joint attention, whose masks are Qwen-Image's, Krea 2's or Chroma's."""

        def hook(module: Module, args: Any, kwargs: dict[str, Any]) -> Any:
            moment = self.now
            mask = named_arguments(module, args, kwargs).get(name)  # (call rows, ...)
            if moment is None or layer.index not in moment.alphas or mask is None:
                return None
            import torch

            in_batch = slice(moment.rows.start, moment.rows.stop)
            alpha = moment.alphas[layer.index].mean(-1)  # (rows, tokens): all heads have one mask
            of_prompt, of_target = mask[in_batch], mask[moment.sources]
            tokens = slice(moment.tokens)
            if mask.dtype == torch.bool and mask.ndim == 4:  # Krea 2's, which the picture is in
                states = named_arguments(module, args, kwargs)["hidden_states"]
                changed = states.new_zeros(mask.shape).masked_fill(~mask, NEVER_READ)
                ends = (of_prompt[:, 0, 0, tokens].float(), of_target[:, 0, 0, tokens].float())
                between = bias_between(*ends, alpha)  # (rows, tokens)
                changed[in_batch, 0, 0, tokens] = between.to(states.dtype)
            elif mask.dtype == torch.bool:
                between = JOINED_MASK + bias_between(of_prompt.float(), of_target.float(), alpha)
                states = named_arguments(module, args, kwargs)["hidden_states"]
                read = torch.full_like(mask, JOINED_MASK, dtype=states.dtype)
                changed = read.masked_fill(~mask, NEVER_READ)  # (call rows, tokens)
                changed[in_batch] = between.to(states.dtype)
            else:  # Chroma adds its mask of 0 and 1 to the attention, and leaves nothing out
                changed = mask.clone()  # (call rows, 1, tokens of text and picture, the same)
                change = (of_target - of_prompt)[..., tokens] * alpha[:, None, None]
                changed[in_batch, ..., tokens] = (of_prompt[..., tokens] + change).to(mask.dtype)
            return with_arguments(module, args, kwargs, {name: changed})

        return hook

    def _blend_pooled(self, vectors: Tensor) -> Tensor:
        """The pooled text of the call, (call rows, ...)."""
        moment = self.now
        if moment is None or POOLED not in moment.alphas:
            return vectors
        in_batch = slice(moment.rows.start, moment.rows.stop)
        if moment.sources is not None:
            other = vectors.detach()[moment.sources]
        elif moment.targets.pooled is not None:
            other = moment.targets.pooled
        else:
            other = moment.targets.states  # DeepFloyd's U-Net pools the states themselves
        alpha = moment.alphas[POOLED]  # (rows, 1, 1)
        alpha = alpha.reshape(len(alpha), *[1] * (vectors.ndim - 1))
        of_prompt = vectors[in_batch]
        wide = in_float32(of_prompt)
        mixed = wide.lerp(other.to(wide), alpha.to(wide))
        changed = vectors.clone()
        changed[in_batch] = mixed.to(vectors.dtype)
        return changed


def _between(of_prompt: Tensor, other: Tensor, alpha: Tensor) -> Tensor:
    """Keys or values between a prompt's and a target's, (rows, tokens, channels)."""
    # In float32: the derivative by alpha is a sum over all channels of products.
    wide = in_float32(of_prompt)
    by_head = (alpha.shape[2], -1) if alpha.shape[2] > 1 else (1, -1)
    mixed = wide.unflatten(2, by_head).lerp(
        other.to(wide).unflatten(2, by_head), alpha.to(wide).unsqueeze(3)
    )  # (rows, tokens, heads, channels of a head)
    return mixed.flatten(2).to(of_prompt.dtype)


def bias_between(prompt: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """What attention adds, for masks between a prompt's and a target's, (rows, tokens)."""
    # A token is weighed by exp(bias): its logarithm lets the weight itself move along the line. The
    # bias moved along the line would take a token away at the first step from the prompt.
    weight = prompt.lerp(target, alpha.float().expand_as(prompt))
    is_read = weight > 0
    return weight.where(is_read, 1.0).log().where(is_read, NEVER_READ)


def in_float32(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values.float() if values.itemsize < 4 else values


@contextmanager
def blending(pipe: Pipeline, kind: type[Blend] = Blend) -> Iterator[Blend]:
    """Within the context, a denoiser is ready for `Blend.hearing` and for gradients.

    No weight takes part in gradients, and afterwards each that did does so again.

    Args:
        pipe: A pipeline of a known family.
        kind: What is blended: what layers hear, or `EncodedBlend`.

    Raises:
        LocogenError: A locogen context other than `speed` is open on the pipeline, or `speed` has
            compiled parts of it, or projections are fused.
        UnsupportedModel: The family is unknown.
    """
    import torch

    blend = kind(pipe)
    _check_contexts(active_contexts(pipe))
    if blend.family.joined_text is not text_first and blend.family.joined_mask is None:
        raise LocogenError(
            f"{blend.family.name} holds its text behind the picture, where attribution does not "
            "know it: use loco.localize"
        )
    for layer in blend.layers:
        if getattr(layer.module, "fused_projections", False):
            raise LocogenError(
                "the model's projections are fused: call its unfuse_qkv_projections() first"
            )
    modules = [*parts_of(blend.denoiser), *(hook.module for hook in blend.hooks())]
    with ExitStack() as stack:
        # What is computed in inference mode can take no part in gradients.
        stack.enter_context(torch.inference_mode(mode=False))
        for held in held_denoisers(pipe, blend.family).values():
            stack.enter_context(running_uncompiled(held, modules))
        stack.enter_context(taken_back(blend.denoiser))
        stack.enter_context(_without_weight_gradients(blend.denoiser))
        yield blend


def _check_contexts(contexts: Iterable[str]) -> None:
    for context in contexts:
        if not context.startswith("speed "):
            raise LocogenError(
                f"{context} is open on this pipeline: attribution calls the denoiser by itself, so "
                "leave the context first"
            )
        # Other threads, layouts and precisions have gradients; what was compiled has none yet.
        if "compiled" in context:
            raise LocogenError(
                f"{context} is open on this pipeline, and attribution would compile its parts anew "
                "for gradients: use speed(pipe, 'auto'), or leave the context first"
            )


@contextmanager
def _without_weight_gradients(model: Module) -> Iterator[None]:
    """Within the context no weight asks for a gradient, so that less is kept for it."""
    # By name: offload puts other parameters in the place of these in between.
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    try:
        for name in names:
            model.get_parameter(name).requires_grad_(False)
        yield
    finally:
        for name in names:
            model.get_parameter(name).requires_grad_(True)


def new_alphas(
    blend: Blend,
    values: Sequence[float],
    tokens: int,
    *,
    heads: bool,
    pooled: bool,
    device: Any,
    denoiser: Module,
) -> dict[int, Tensor]:
    """Alphas that ask for gradients, one value a row: by layer (rows, tokens, heads).

    Only those of the layers of `denoiser`, the one that is called: of denoisers that take turns the
    others run no layer.
    """
    import torch

    column = torch.tensor(values, device=device, dtype=torch.float32).reshape(-1, 1, 1)
    alphas = {}
    for layer in blend.layers:
        if part_of(blend.denoiser, layer.name) is not denoiser:
            continue
        count = blend.heads(layer.index) if heads else 1
        alphas[layer.index] = column.repeat(1, tokens, count).requires_grad_()
    if pooled and blend.has_pooled:
        alphas[POOLED] = column.clone().requires_grad_()
    return alphas
