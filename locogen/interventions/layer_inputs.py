"""What the matrices of a layer read of a prompt, and which positions of it hold a subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, on_denoiser
from locogen.models.denoisers import unchanged
from locogen.models.families import (
    Family,
    denoiser_of,
    encode,
    encode_guided,
    family_of,
    subject_occurrences,
    token_spans,
)
from locogen.models.hooks import Hook, before, part_of, parts_of
from locogen.models.layers import Layer
from locogen.models.offload import stands_on
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    from torch import Tensor

    from locogen.models.text import PromptEncoding

Tokens = Literal["last_subject", "subject", "end", "all"]
TOKENS: tuple[Tokens, ...] = ("last_subject", "subject", "end", "all")
STEPS = 4  # of the short run from which joint attention's text is read


@dataclass(eq=False)
class LayerInputs:
    """What a model's layers read of prompts, computed once for each prompt.

    With joint attention (SD 3, FLUX) text changes from block to block, and what a layer reads also
    depends on the step and the picture: it is taken from a short run of the prompt (`STEPS` steps,
    seed 0), on average over its steps.
    """

    pipe: Pipeline
    layers: Sequence[Layer]
    _encodings: dict[str, PromptEncoding] = field(default_factory=dict)
    _states: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # by prompt and `key`

    @property
    def family(self) -> Family:
        """The pipeline's."""
        return family_of(self.pipe)

    def key(self, layer: Layer | None) -> int:
        """The same for layers that read the same; -1 for the map outside of the layers (None)."""
        if layer is None:
            return -1
        # Layers read the same encoding, unless text changes between them or each norms it in its
        # own way.
        differ = self.family.joint_attention or self.family.norm_states is not unchanged
        if differ:
            return layer.index
        # Denoisers that take turns project the encoding each in its own way.
        denoiser = denoiser_of(self.pipe, self.family)
        return parts_of(denoiser).index(part_of(denoiser, layer.name))

    def encoding(self, prompt: str) -> PromptEncoding:
        """The encoded prompt, one row."""
        if prompt not in self._encodings:
            self._encodings[prompt] = encode(self.pipe, [prompt])
        return self._encodings[prompt]

    def states(self, prompt: str, layer: Layer) -> Tensor:
        """What the layer's matrices read of the prompt, (tokens, width), in float64."""
        key = self.key(layer)
        if (prompt, key) not in self._states:
            read = self._from_run if self.family.joint_attention else self._from_encoding
            for other_key, states in read(prompt).items():
                self._states[prompt, other_key] = states
        return self._states[prompt, key].double()

    def _from_encoding(self, prompt: str) -> dict[int, Tensor]:
        """By key, in the model's own type: (tokens, width)."""
        import torch

        denoiser = denoiser_of(self.pipe, self.family)
        layers = {self.key(layer): layer for layer in self.layers}
        encoded = self.encoding(prompt).states  # (1, tokens, width)
        by_key: dict[int, Tensor] = {}
        projected: dict[Any, Tensor] = {}  # by denoiser
        with torch.no_grad():
            for key, layer in layers.items():
                part = part_of(denoiser, layer.name)
                if part not in projected:
                    states = encoded.to(stands_on(part), part.dtype)
                    projected[part] = self.family.project_states(part, states)
                by_key[key] = self.family.norm_states(layer.module, projected[part])[0].cpu()
        return by_key

    def _from_run(self, prompt: str) -> dict[int, Tensor]:
        """By key, in float64: (tokens, width)."""
        import torch

        prompts, negative = encode_guided(self.pipe, [prompt])
        by_layer: dict[int, list[Tensor]] = {layer.index: [] for layer in self.layers}

        def noting(call: Call, layer: Layer) -> Hook:
            def note(module: Module, args: Any, kwargs: dict[str, Any]) -> None:
                rows = slice(call.rows.start, call.rows.stop)
                states = args[0][rows, call.text_tokens(layer)]  # (1, tokens, width)
                by_layer[layer.index].extend(states.detach().clone())

            # Before the matrix: there the block's own norm, which depends on the step, is done.
            matrix = self.family.matrices(layer.module)["k"]
            return before(matrix, note, f"to_k of {layer.label}")

        arguments = prompts.arguments()
        if negative is not None:
            arguments |= negative.arguments("negative_")
        with on_denoiser(self.pipe, lambda call: [noting(call, layer) for layer in self.layers]):
            self.pipe(
                **self.family.options(self.pipe),
                **arguments,
                generator=torch.Generator("cpu").manual_seed(0),
                num_inference_steps=STEPS,
                output_type="latent",
            )
        return {
            index: torch.stack(states).cpu().double().mean(0)  # (steps, tokens, width) → mean
            for index, states in by_layer.items()
        }

    def text_projection_input(self, prompt: str, places: Sequence[int]) -> Tensor:
        """What the map outside of the layers reads of the prompt, (rows, width), in float64."""
        input_of = self.family.text_projection_input
        if input_of is None:
            raise LocogenError(
                f"{self.family.name} reads text in its layers only: leave out entry=True"
            )
        denoiser = denoiser_of(self.pipe, self.family)
        return input_of(denoiser, self.encoding(prompt), places).cpu().double()

    def places(self, prompt: str, tokens: Tokens, subject: str | None = None) -> tuple[int, ...]:
        """The positions that `tokens` means in a prompt.

        Args:
            prompt: Any prompt.
            tokens: Which positions, in every encoder.
            subject: Words of the prompt, at every occurrence; None: the prompt as a whole is the
                subject, as one that should stay.
        """
        if tokens == "all":
            return self._every_place(prompt)
        places: list[int] = []
        for number, span in enumerate(token_spans(self.pipe, prompt)):
            if tokens == "end":
                places.append(span.end)
            elif subject is not None:
                for words in subject_occurrences(self.pipe, prompt, subject, encoder=number):
                    places += _meant(words, tokens)
            elif tokens == "subject" and span.ids:
                places += range(span.start, span.start + len(span.ids))
            else:
                places.append(span.last)
        return tuple(places)

    def _every_place(self, prompt: str) -> tuple[int, ...]:
        """All positions but the start mark; with a mask, those that attention reads."""
        # The start mark reads nothing of the prompt, and is the same in every one.
        start = token_spans(self.pipe, prompt)[0].start
        encoding = self.encoding(prompt)
        if encoding.mask is None:
            return tuple(range(start, encoding.places))
        read = encoding.mask[0].nonzero()[:, 0].tolist()
        return tuple(at for at in read if at >= start)

    def exchange(
        self, source: str, target: str, subject: str, tokens: Tokens, instead: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Positions in the source, and those in the target that should take their place.

        Args:
            source: A prompt that holds the subject.
            target: The prompt that it should become.
            subject: Words of the source.
            tokens: Which positions: "all" and "end" correspond one to one; of the others see
                `instead`.
            instead: Words that the target has in place of the subject: the last token of each
                occurrence corresponds to that occurrence of the subject, or the last one of all if
                their numbers differ. None: the target's last word.
        """
        if tokens in ("all", "end"):
            old = self.places(source, tokens)
            new = self.places(target, tokens)
            if tokens == "all" and self.encoding(source).mask is not None:
                # In Krea 2 padding stands between the prompt and the end of the chat.
                old = new = tuple(sorted({*old} & {*new}))
            count = min(len(old), len(new))
            return list(old[:count]), list(new[:count])

        old_places: list[int] = []
        new_places: list[int] = []
        for number, span in enumerate(token_spans(self.pipe, target)):
            subjects = subject_occurrences(self.pipe, source, subject, encoder=number)
            others: Sequence[tuple[int, ...]] = [(span.last,)]
            if instead:
                others = subject_occurrences(self.pipe, target, instead, encoder=number)
            # Occurrences correspond one to one, or not at all.
            if len(others) != len(subjects):
                others = [others[-1]] * len(subjects)
            for words, other in zip(subjects, others, strict=True):
                edited = _meant(words, tokens)
                old_places += edited
                new_places += [other[-1]] * len(edited)
        return old_places, new_places


def _meant(words: Sequence[int], tokens: Tokens) -> Sequence[int]:
    """Those of a subject's positions that `tokens` means: all of them, or the last one."""
    return words if tokens == "subject" else words[-1:]
