"""Scorers: pictures and texts in, cosines out. CLIP, or any object with the same call."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from locogen.catalog import entry_of, mini_folder, scorer_entry
from locogen.errors import LocogenError
from locogen.models.checkpoint import missing_weights
from locogen.models.defaults import source_of
from locogen.models.load import without_library_bars
from locogen.models.memory import memory_named, out_of_memory
from locogen.models.offload import resting_device
from locogen.models.text import token_ids
from locogen.types import Pipeline

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Array = np.ndarray[Any, Any]
PUBLISHED = "clip-vit-b-16"  # the scorer of the published scores


class Scorer(Protocol):
    """What `localize` needs of a scorer: raw cosines, and how they are computed, for the records.

    Example:
        >>> import numpy as np
        >>> class Brightness:
        ...     settings = {"scorer": "brightness"}
        ...
        ...     def __call__(self, pictures, *texts):
        ...         means = np.array([np.asarray(picture).mean() for picture in pictures])
        ...         return [means / 255 for _ in texts]
        >>> pipe = load("mini")
        >>> cat = Concept("cat", "object", (PromptPair("a picture of a cat", "a picture"),))
        >>> few = {"seeds": [0], "num_inference_steps": 1, "controls": False, "progress": False}
        >>> run = localize(pipe, cat, window=16, scorer=Brightness(), **few)
        >>> bool(run.table["clip_score"].between(0, 1).all()), run.settings["scorer"]
        (True, 'brightness')
    """

    @property
    def settings(self) -> dict[str, Any]:
        """Backbone, preprocessing and scale: columns of `Run.settings`.

        With `logit_scale` (100 for CLIP), cosines also become probabilities among neighbors.
        """
        ...

    def __call__(self, pictures: Sequence[Image], *texts: Sequence[str]) -> list[Array]:
        """For each list of texts, the cosine of picture `i` and text `i`: (pictures,) each."""
        ...


@dataclass(frozen=True, eq=False)
class Clip:
    """CLIP score: the raw cosine of picture and text embedding.

    Hessel et al. 2021 (arXiv 2104.08718) with scale 1 in place of their 2.5. Pictures are read as
    stored, in 8-bit color; the processor's backend is PIL, so that scores do not depend on whether
    torchvision is installed.
    """

    model: Any
    processor: Any
    tokenizer: Any
    settings: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    # A sweep asks for the same few texts at every part of its pictures.
    _known_texts: dict[str, Array] = field(default_factory=dict, repr=False)

    def pictures(self, pictures: Sequence[Image]) -> Array:
        """Unit embeddings, (pictures, width)."""
        size = self.batch_size
        start = 0
        embeddings = []
        while start < len(pictures):
            try:
                embeddings.append(self._pictures(pictures[start : start + size]))
            except Exception as error:
                # The pictures of the run are there by now: a full memory should not cost them.
                if size == 1 or not out_of_memory(error):
                    raise
                size = size // 2
                continue
            start += size
        return np.concatenate(embeddings)

    def texts(self, texts: Iterable[str]) -> dict[str, Array]:
        """The unit embedding of each distinct text, (width,)."""
        distinct_texts = list(dict.fromkeys(texts))
        for text in distinct_texts:
            # One by one: in a batch, its neighbors could move the last bits.
            if text not in self._known_texts:
                self._known_texts[text] = self._text(text)
        return {text: self._known_texts[text] for text in distinct_texts}

    def __call__(self, pictures: Sequence[Image], *texts: Sequence[str]) -> list[Array]:
        """For each list of texts, the cosine of picture `i` and text `i`: (pictures,) each.

        Raises `LocogenError` if a list has another length than the pictures.
        """
        for line in texts:
            if len(line) != len(pictures):
                raise LocogenError(
                    f"{len(pictures)} pictures and {len(line)} texts: give each picture a text"
                )
        picture_embeddings = self.pictures(pictures)  # (pictures, width)
        by_text = self.texts(text for line in texts for text in line)
        cosines = []
        for line in texts:
            text_embeddings = np.stack([by_text[text] for text in line])  # (pictures, width)
            cosines.append(np.einsum("id,id->i", picture_embeddings, text_embeddings))
        return cosines

    def of_pixels(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """The cosine of pixels and text, as numbers that can be differentiated by the pixels.

        Pixels are not rounded to 8 bits, and resized by torch: cosines differ by little from those
        of pictures.

        Args:
            pixels: Pictures in 0..1, (pictures, 3, height, width).
            texts: One text a picture.

        Returns:
            (pictures,)
        """
        import torch

        device = self.model.device
        by_text = self.texts(texts)
        embeddings = torch.from_numpy(np.stack([by_text[text] for text in texts])).float()
        prepared = _prepared(pixels.to(device).float(), self.processor)
        features = self.model.get_image_features(pixel_values=prepared)
        rows = getattr(features, "pooler_output", features)  # transformers 5 wraps them
        unit = torch.nn.functional.normalize(rows.float(), dim=-1)  # (pictures, width)
        return (unit * embeddings.to(device)).sum(-1)

    def _pictures(self, pictures: Sequence[Image]) -> Array:
        import torch

        values = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return _unit(self.model.get_image_features(pixel_values=values.to(self.model.device)))

    def _text(self, text: str) -> Array:
        import torch

        limit = self.tokenizer.model_max_length
        if len(token_ids(self.tokenizer, text)) > limit:
            warnings.warn(
                f"the scorer reads {limit} tokens: the end of {text!r} is not scored", stacklevel=4
            )
        tokens = self.tokenizer([text], padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            return _unit(self.model.get_text_features(**tokens.to(self.model.device)))[0]


def _prepared(pixels: Tensor, processor: Any) -> Tensor:
    """Pixels as a processor of pictures would give them to the model, differentiably."""
    import torch

    values = pixels  # (pictures, 3, height, width)
    if processor.do_resize:
        height, width = values.shape[-2:]
        size = processor.size
        short = size.get("shortest_edge")
        shape = (size.get("height"), size.get("width"))
        if short is not None:
            shape = (height * short // min(height, width), width * short // min(height, width))
        values = torch.nn.functional.interpolate(values, shape, mode="bicubic", antialias=True)
        values = values.clamp(0, 1)  # as pictures are, where the curve overshoots
    if processor.do_center_crop:
        high, wide = processor.crop_size["height"], processor.crop_size["width"]
        top, left = (values.shape[-2] - high) // 2, (values.shape[-1] - wide) // 2
        values = values[..., top : top + high, left : left + wide]
    if processor.do_normalize:
        mean = values.new_tensor(processor.image_mean).reshape(3, 1, 1)
        spread = values.new_tensor(processor.image_std).reshape(3, 1, 1)
        values = (values - mean) / spread
    return values


def _unit(features: Any) -> Array:
    import torch

    rows = getattr(features, "pooler_output", features)  # transformers 5 wraps them
    return torch.nn.functional.normalize(rows.cpu().double(), dim=-1).numpy()


def scorer(name: str = "mini", *, device: str = "cpu", local_files_only: bool = False) -> Clip:
    """Load a CLIP scorer.

    Args:
        name: A scorer of the catalog, a folder, or a hub id. "mini" is the mini model's own CLIP,
            which shares nothing with the generator but the tokenizer.
        device: Where it computes.
        local_files_only: Never use the network.

    Returns:
        The scorer: called with pictures and texts, it gives their cosines.

    Raises:
        LocogenError: For an unknown name, for files that cannot be loaded, and for a model too
            large for the memory of the device.

    Example:
        >>> from PIL import Image
        >>> judge = scorer("mini")
        >>> [cosines] = judge([Image.new("RGB", (64, 64))] * 2, ["a black picture", "a cat"])
        >>> cosines.shape, bool(cosines[0] > cosines[1])
        ((2,), True)
    """
    from safetensors import SafetensorError
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    source, revision = _source_of_scorer(name)
    options: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    try:
        with without_library_bars():
            loaded: Any = CLIPModel.from_pretrained(
                source, dtype="float32", use_safetensors=True, output_loading_info=True, **options
            )
        processor = CLIPImageProcessorPil.from_pretrained(source, **options)
        tokenizer = CLIPTokenizer.from_pretrained(source, **options)
    except (OSError, SafetensorError) as error:
        if revision:
            remedy = f"fetch it with: hf download {source} --revision {revision}"
        else:
            remedy = "check that the folder holds a CLIP with safetensors weights and its processor"
        raise LocogenError(f"could not load the scorer {name!r} from {source}: {remedy}") from error
    model, report = loaded
    # transformers fills missing weights with random numbers, and only logs it.
    parameters = {parameter for parameter, _ in model.named_parameters()}
    missing = sorted(parameters & set(report["missing_keys"]))
    if missing:
        raise LocogenError(f"the scorer {name!r} of {source} {missing_weights(missing)}")
    settings = {
        "scorer": name,
        "scorer_backbone": source if revision else "",
        "scorer_revision": revision,
        "preprocessing": "PIL",
        "scale": 1.0,
        "logit_scale": _logit_scale(name, model),
    }
    with memory_named(
        f"the scorer {name!r} does not fit the memory of {device!r}: load it with device='cpu'"
    ):
        model.to(device)
    return Clip(model.eval(), processor, tokenizer, settings)


def _logit_scale(name: str, model: Any) -> float:
    """What cosines are multiplied with before a softmax: the catalog's number, or the model's."""
    try:
        scale = scorer_entry(name).logit_scale
    except LocogenError:  # a folder or a hub id
        scale = None
    return float(model.logit_scale.detach().exp()) if scale is None else scale


def probabilities(cosines: Array, scale: float) -> Array:
    """Softmax of cosines among the texts of each picture, (texts, pictures), column by column.

    NaN stands for a text that a picture does not have, and has probability 0.

    >>> probabilities(np.array([[0.5], [0.4], [np.nan]]), 10).round(2)
    array([[0.73],
           [0.27],
           [0.  ]])
    """
    logits = scale * cosines  # (texts, pictures)
    sizes = np.exp(logits - np.nanmax(logits, axis=0))
    sizes = np.nan_to_num(sizes)
    return sizes / sizes.sum(0)


def scorer_for(pipe: Pipeline, choice: Scorer | str | None) -> Scorer:
    """The scorer of a run: loaded next to the pipeline if it is a name; None: the model's own."""
    if choice is None:
        choice = default_scorer(source_of(pipe))
    if isinstance(choice, str):
        # Not onto the card of an offloaded pipeline: that has no room for more.
        return scorer(choice, device=resting_device(pipe))
    return choice


def default_scorer(model: str) -> str:
    """Choose the scorer for a model.

    Args:
        model: The folder or hub id that the model was loaded from (`pipe.config._name_or_path`).

    Returns:
        A name for `scorer`: the catalog's choice; for a folder that the catalog does not know, its
        own `scorer/`, as `locogen.mini.train` writes it; else the published one.

    Example:
        >>> default_scorer("mini"), default_scorer("my/model")
        ('mini', 'clip-vit-b-16')
    """
    entry = entry_of(model)
    if entry is not None:
        return entry.scorer
    folder = Path(model) / "scorer"
    if model and folder.is_dir():
        return str(folder)
    return PUBLISHED


def _source_of_scorer(name: str) -> tuple[str, str | None]:
    """The folder or hub id of a scorer, and the revision on the hub."""
    if name == "mini":
        return str(mini_folder() / "scorer"), None
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser()), None
    if "/" in name:
        return name, "main"
    entry = scorer_entry(name)
    return entry.id, entry.revision
