"""Scorers: pictures and texts in, cosines out. The one kept here is CLIP; anything with the same call will do."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from locogen.catalog import entry_of, mini_folder, scorer_entry
from locogen.errors import LocogenError
from locogen.models.memory import memory_named, out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray[Any, Any]
REAL = "clip-vit-b-16"  # the backbone of the published scores


class Scorer(Protocol):
    """What `localize` needs of a scorer: raw cosines, and what to record of how they were made."""

    @property
    def settings(self) -> dict[str, Any]:
        """Backbone, preprocessing and scale: columns of `Run.settings`."""
        ...

    def __call__(self, pictures: Sequence[Image], *texts: Sequence[str]) -> list[Array]:
        """For each list of texts, the cosine of picture `i` and text `i`: (pictures,) each."""
        ...


@dataclass(frozen=True, eq=False)
class Clip:
    """CLIP-score: the raw cosine of picture and text embedding (scale 1, Hessel et al. 2021 without the 2.5).

    Pictures are read as stored, in 8-bit color; the processor's backend is PIL, so that scores do not depend on
    whether torchvision is installed.
    """

    model: Any
    processor: Any
    tokenizer: Any
    settings: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64

    def pictures(self, pictures: Sequence[Image]) -> Array:
        """Unit embeddings, (pictures, width)."""
        size = self.batch_size
        start = 0
        embeddings = []
        while start < len(pictures):
            try:
                embeddings.append(self._pictures(pictures[start : start + size]))
            except Exception as error:
                # The pictures are made by now: a full memory should not cost them.
                if size == 1 or not out_of_memory(error):
                    raise
                size = size // 2
                continue
            start += size
        return np.concatenate(embeddings)

    def texts(self, texts: Iterable[str]) -> dict[str, Array]:
        """The unit embedding of each distinct text, each read alone."""
        return {text: self._text(text) for text in dict.fromkeys(texts)}

    def __call__(self, pictures: Sequence[Image], *texts: Sequence[str]) -> list[Array]:
        """For each list of texts, the cosine of picture `i` and text `i`: (pictures,) each.

        Raises `LocogenError` if a list has another length than the pictures.
        """
        for line in texts:
            if len(line) != len(pictures):
                raise LocogenError(
                    f"{len(pictures)} pictures and {len(line)} texts: give one text a picture"
                )
        seen = self.pictures(pictures)
        read = self.texts(text for line in texts for text in line)
        return [
            np.einsum("id,id->i", seen, np.stack([read[text] for text in line])) for line in texts
        ]

    def _pictures(self, pictures: Sequence[Image]) -> Array:
        import torch

        values = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return _unit(self.model.get_image_features(pixel_values=values.to(self.model.device)))

    def _text(self, text: str) -> Array:
        import torch

        limit = self.tokenizer.model_max_length
        if len(self.tokenizer(text, verbose=False).input_ids) > limit:
            warnings.warn(
                f"the scorer reads {limit} tokens: the end of {text!r} is not scored", stacklevel=4
            )
        tokens = self.tokenizer([text], padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            return _unit(self.model.get_text_features(**tokens.to(self.model.device)))[0]


def _unit(features: Any) -> Array:
    import torch

    rows = getattr(features, "pooler_output", features)  # transformers 5 wraps them
    return torch.nn.functional.normalize(rows.cpu().double(), dim=-1).numpy()


def scorer(name: str = "mini", *, device: str = "cpu", local_files_only: bool = False) -> Clip:
    """A CLIP scorer: a name of the catalog, a folder, or a hub id.

    `mini` is the mini model's own scoring CLIP, which shares nothing with its generator but the tokenizer.
    Raises `LocogenError` when there is no such scorer, or its files cannot be had.
    """
    from safetensors import SafetensorError
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    where, revision = _source(name)
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    try:
        model = CLIPModel.from_pretrained(where, dtype="float32", use_safetensors=True, **options)
        processor = CLIPImageProcessorPil.from_pretrained(where, **options)
        tokenizer = CLIPTokenizer.from_pretrained(where, **options)
    except (OSError, SafetensorError) as error:
        if revision:
            remedy = f"fetch it with: hf download {where} --revision {revision}"
        else:
            remedy = "check that the folder holds a CLIP with safetensors weights and its processor"
        raise LocogenError(f"could not load the scorer {name!r} from {where}: {remedy}") from error
    told = {
        "scorer": name,
        "scorer_backbone": where if revision else "",
        "scorer_revision": revision,
        "preprocessing": "PIL",
        "scale": 1.0,
    }
    with memory_named(
        f"the scorer {name!r} does not fit the memory of {device!r}: load it with device='cpu'"
    ):
        model.to(device)  # pyright: ignore[reportArgumentType]
    return Clip(model.eval(), processor, tokenizer, told)


def default_scorer(model: str) -> str:
    """The scorer for a model, given the folder or hub id that it was loaded from.

    The catalog's; for another folder its own `scorer/`, as `locogen.mini.train` makes it; else the published one.
    """
    if entry := entry_of(model):
        return entry.scorer
    own = Path(model) / "scorer"
    return str(own) if model and own.is_dir() else REAL


def _source(name: str) -> tuple[str, str | None]:
    if name == "mini":
        return str(mini_folder() / "scorer"), None
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser()), None
    if "/" in name:
        return name, "main"
    entry = scorer_entry(name)
    return entry.id, entry.revision
