"""The total effect: gradients through the whole sampling chain.

Every layer has an alpha at every step, and what is explained are the final latents along x(target)
- x(prompt), or what a scorer says of the picture. Gradients go through the scheduler's own steps
and guidance, so that a step counts with all that later steps make of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from locogen.interventions.denoiser_calls import Call, on_denoiser
from locogen.localization.attribution.blending import Blend, Moment, new_alphas
from locogen.localization.attribution.direct import stacked
from locogen.localization.attribution.paths import BACKWARD, Paths, run
from locogen.localization.attribution.quadrature import Shares, gradients_along
from locogen.models.hooks import Hook, before, parts_of
from locogen.types import Module

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 50_000_000  # weights of a denoiser whose activations are kept rather than computed again


class PixelScorer(Protocol):
    """A scorer through which gradients go, as `pictures.score.Clip`."""

    def of_pixels(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Cosines of pixels in 0..1, (pictures, 3, height, width), and texts, (pictures,)."""
        ...


@dataclass(frozen=True, eq=False)
class Scored:
    """The score as what is explained.

    Attributes:
        scorer: What scores.
        texts: What pictures are scored against, by prompt.
    """

    scorer: PixelScorer
    texts: Mapping[str, str]


@dataclass(eq=False)
class ChainLine:
    """The line from prompt to target, through all steps: see `quadrature.Line`.

    `scored`: explain the score; None: the final latents.
    """

    paths: Paths
    steps: Sequence[int]
    heads: bool
    pooled: bool
    checkpointing: bool
    scored: Scored | None = None

    def output(self, rows: Sequence[int], alphas: Sequence[float]) -> Tensor:
        """What is explained, with every layer of a row at its alpha, (rows, numbers)."""
        import torch

        paths = self._only(rows)
        chain = _Chain(paths, alphas, self, is_differentiated=False)
        with chain.following(), torch.no_grad():
            explained = self._explained(paths, gradients=False)
        return explained.cpu().double()

    def shares(self, rows: Sequence[int], alphas: Sequence[float], direction: Tensor) -> Shares:
        """The derivatives by each step's and layer's alpha: see `quadrature.Line`."""
        import torch

        paths = self._only(rows)
        chain = _Chain(paths, alphas, self, is_differentiated=True)
        is_half = paths.blend.denoiser.dtype.itemsize < 4
        with chain.following(), torch.enable_grad():
            explained = self._explained(paths, gradients=True)
            leaves = [leaf for step in self.steps for leaf in chain.alphas[step].values()]
            gradients = iter(gradients_along(explained, leaves, direction, is_half=is_half))
        by_step = []
        for step in self.steps:
            by_step.append({place: next(gradients) for place in chain.alphas[step]})
        blend = paths.blend
        return stacked(by_step, len(blend.layers), self.heads, blend)

    def _explained(self, paths: Paths, *, gradients: bool) -> Tensor:
        """The final latents, or the score of each picture as its one number, (rows, numbers)."""
        # Behind them are targets' own runs, with joint attention.
        output = run(paths, gradients=gradients, decoded=self.scored is not None)[: paths.count]
        if self.scored is None:
            return output.flatten(1)
        texts = [self.scored.texts[picture.prompt] for picture in paths.pictures]
        return self.scored.scorer.of_pixels(output, texts)[:, None]

    def _only(self, rows: Sequence[int]) -> Paths:
        pictures = [self.paths.pictures[row] for row in rows]
        paths = self.paths
        return Paths(paths.blend, pictures, paths.texts, paths.settings, paths.cost)


@dataclass(eq=False)
class _Chain:
    """One call of the pipeline in which layers hear alpha at some steps."""

    paths: Paths
    values: Sequence[float]  # the alpha of each picture
    line: ChainLine
    is_differentiated: bool
    alphas: dict[int, dict[int, Any]] = field(default_factory=dict)  # by step and layer

    @contextmanager
    def following(self) -> Iterator[None]:
        """Within the context, the pipeline's calls of its denoiser hear alpha."""
        blend = self.paths.blend

        def hooks_for(call: Call) -> list[Hook]:
            def begin(module: Module, args: Any, kwargs: dict[str, Any]) -> None:
                blend.now = self._moment(call)

            return [before(blend.denoiser, begin, "the denoiser")]

        # Hooks of one module fire in the order in which they were registered: the pooled text's
        # comes after the one that begins a call.
        checkpointing = self.is_differentiated and self.line.checkpointing
        with (
            on_denoiser(self.paths.pipe, hooks_for),
            blend.hearing(None),
            _checkpointed(blend, enabled=checkpointing),
        ):
            yield

    def _moment(self, call: Call) -> Moment | None:
        self._count(call)
        if not call.rows:
            return None
        step = call.step()
        if step not in self.line.steps:
            return None
        if step not in self.alphas:
            self.alphas[step] = new_alphas(
                self.paths.blend,
                self.values,
                self.paths.tokens,
                heads=self.line.heads and self.is_differentiated,
                pooled=self.line.pooled,
                device=call.states.device,
                denoiser=call.denoiser,
            )
        first = call.rows.start
        rows = range(first, first + self.paths.count)
        return self.paths.moment(rows, range(self.paths.count), self.alphas[step])

    def _count(self, call: Call) -> None:
        passes = 1
        if self.is_differentiated:
            passes += BACKWARD + self.line.checkpointing
        self.paths.cost.call(call, passes=passes)


@contextmanager
def _checkpointed(blend: Blend, *, enabled: bool) -> Iterator[None]:
    """Within the context the denoiser keeps its inputs alone, and runs again for gradients.

    Without it, the activations of all steps would be in memory at once.
    """
    if not enabled:
        yield
        return
    with ExitStack() as stack:
        for denoiser in parts_of(blend.denoiser):
            stack.enter_context(_running_again(blend, denoiser))
        yield


@contextmanager
def _running_again(blend: Blend, denoiser: Module) -> Iterator[None]:
    """Within the context, one denoiser runs again where its gradients are asked for."""
    from torch.utils.checkpoint import checkpoint

    forward = denoiser.forward
    is_instance_attribute = "forward" in vars(denoiser)  # as accelerate's offload makes it

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        moment = blend.now

        def run(*run_args: Any, **run_kwargs: Any) -> Any:
            blend.now = moment  # when it runs again, another step's is there
            return forward(*run_args, **run_kwargs)

        # Nothing is drawn at random in a denoiser that is not in training.
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    denoiser.forward = checkpointed
    try:
        yield
    finally:
        if is_instance_attribute:
            denoiser.forward = forward
        else:
            del denoiser.forward
