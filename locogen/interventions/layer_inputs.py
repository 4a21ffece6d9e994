"""What the matrices of a layer read of a prompt, and which of its states tell of a subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, on_denoiser
from locogen.models.denoisers import same
from locogen.models.families import (
    Family,
    denoiser_of,
    encode,
    encode_guided,
    family_of,
    spoken,
    subject_occurrences,
)
from locogen.models.hooks import Hook, before
from locogen.models.layers import Layer
from locogen.models.offload import stands_on

if TYPE_CHECKING:
    from torch import Tensor

    from locogen.models.text import Text

Tokens = Literal["last_subject", "subject", "end", "all"]
TOKENS: tuple[Tokens, ...] = ("last_subject", "subject", "end", "all")
STEPS = 4  # of a run from which evolving text is read


@dataclass(eq=False)
class Reader:
    """Reads prompts as a model's layers do, each prompt once.

    Where text evolves from block to block (SD 3, FLUX), what a layer reads also depends on the step and the picture:
    it is taken from a short run of the prompt (`STEPS` steps, seed 0), on average over its steps.
    """

    pipe: Any
    layers: Sequence[Layer]
    _texts: dict[str, Text] = field(default_factory=dict)
    _read: dict[tuple[str, int], Tensor] = field(
        default_factory=dict
    )  # by prompt and key, as exact as it was made

    @property
    def family(self) -> Family:
        """The pipeline's."""
        return family_of(self.pipe)

    def key(self, layer: Layer | None) -> int:
        """The same for layers that read the same: all, unless text evolves or each layer norms it in its own way."""
        if layer is None:
            return -1
        return layer.index if self.family.evolves or self.family.read is not same else 0

    def text(self, prompt: str) -> Text:
        """The encoded prompt, one row."""
        if prompt not in self._texts:
            self._texts[prompt] = encode(self.pipe, [prompt])
        return self._texts[prompt]

    def states(self, prompt: str, layer: Layer) -> Tensor:
        """What the layer's matrices read of the prompt, (tokens, width), in float64."""
        if (prompt, self.key(layer)) not in self._read:
            made = self._from_a_run(prompt) if self.family.evolves else self._from_text(prompt)
            self._read |= {(prompt, key): states for key, states in made.items()}
        return self._read[prompt, self.key(layer)].double()

    def _from_text(self, prompt: str) -> dict[int, Tensor]:
        import torch

        denoiser, distinct = (
            denoiser_of(self.pipe, self.family),
            {self.key(layer): layer for layer in self.layers},
        )
        with torch.no_grad():
            heard = self.family.heard(
                denoiser, self.text(prompt).states.to(stands_on(denoiser), denoiser.dtype)
            )
            return {
                key: self.family.read(layer.module, heard)[0].cpu()
                for key, layer in distinct.items()
            }

    def _from_a_run(self, prompt: str) -> dict[int, Tensor]:
        import torch

        text, negative = encode_guided(self.pipe, [prompt])
        found: dict[int, list[Tensor]] = {layer.index: [] for layer in self.layers}

        def noting(call: Call, layer: Layer) -> Hook:
            def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
                rows = args[0][call.rows.start : call.rows.stop, : call.states.shape[1]]
                found[layer.index].extend(rows.detach().clone())

            keys = self.family.matrices(layer.module)["k"]
            return before(keys, note, f"to_k of layer {layer.index} ({layer.name})")

        with on_denoiser(self.pipe, lambda call: [noting(call, one) for one in self.layers]):
            self.pipe(
                **self.family.options(self.pipe),
                **text.arguments(),
                **({} if negative is None else negative.arguments("negative_")),
                generator=torch.Generator("cpu").manual_seed(0),
                num_inference_steps=STEPS,
                output_type="latent",
            )
        return {
            index: torch.stack(states).cpu().double().mean(0) for index, states in found.items()
        }

    def places(self, prompt: str, tokens: Tokens, subject: str | None = None) -> tuple[int, ...]:
        """Which states are meant, in every encoder and at every occurrence of the subject.

        Without a subject, those of a prompt that should stay.
        """
        if tokens == "all":
            return self._every(prompt)
        places: list[int] = []
        for number, encoder in enumerate(spoken(self.pipe, prompt)):
            if tokens == "end":
                places.append(encoder.end)
            elif subject is not None:
                for words in subject_occurrences(self.pipe, prompt, subject, encoder=number):
                    places += _picked(words, tokens)
            elif tokens == "subject" and encoder.ids:
                places += range(encoder.start, encoder.start + len(encoder.ids))
            else:
                places.append(encoder.last)
        return tuple(places)

    def _every(self, prompt: str) -> tuple[int, ...]:
        """All positions but the start mark; of masked text those that are heard."""
        text, start = self.text(prompt), spoken(self.pipe, prompt)[0].start
        count = text.states.shape[1] if text.mask is None else int(text.mask[0].sum())
        return tuple(range(start, count))

    def exchange(
        self, source: str, target: str, subject: str, tokens: Tokens, instead: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Positions in the source, and for each the position in the target that it should be heard as.

        "all": the same one; "end": the end; else, encoder by encoder and occurrence by occurrence, the last of the
        words that the target has `instead` of the subject (its last ones, where it has them another number of times),
        or of all its words where it has none.
        """
        if tokens in ("all", "end"):
            old, new = self.places(source, tokens), self.places(target, tokens)
            return list(old[: len(new)]), list(new[: len(old)])
        places: list[int] = []
        heard_as: list[int] = []
        for number, encoder in enumerate(spoken(self.pipe, target)):
            subjects = subject_occurrences(self.pipe, source, subject, encoder=number)
            others = [(encoder.last,)]
            if instead:
                others = subject_occurrences(self.pipe, target, instead, encoder=number)
            if len(others) != len(subjects):
                others = [others[-1]] * len(subjects)
            for words, other in zip(subjects, others, strict=True):
                edited = _picked(words, tokens)
                places += edited
                heard_as += [other[-1]] * len(edited)
        return places, heard_as

    def entry(self, prompt: str, places: Sequence[int]) -> Tensor:
        """What the map beside the layers reads of the prompt, (rows, width), in float64."""
        read, denoiser = self.family.entry_reads, denoiser_of(self.pipe, self.family)
        if read is None:
            raise LocogenError(
                f"{self.family.name} hears text by its layers alone: leave out entry=True"
            )
        return read(denoiser, self.text(prompt), places).cpu().double()


def _picked(words: Sequence[int], tokens: Tokens) -> Sequence[int]:
    """Those of a subject's positions that `tokens` means: all of them, or the last one."""
    return words if tokens == "subject" else words[-1:]
