"""What acts while pictures are made and changes no weight: no file of weights can hold it."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from locogen.errors import LocogenError
from locogen.types import Pipeline

if TYPE_CHECKING:
    from torch import Tensor


class AtInference(ABC):
    """Holds within its `applied` alone: there is nothing to merge, to export, or to learn again."""

    @abstractmethod
    def applied(self, pipe: Pipeline, strength: float = 1.0) -> AbstractContextManager[Any]:
        """Within the context, it holds."""

    @abstractmethod
    def placebo(
        self, pipe: Pipeline, seed: int = 0, avoid: Iterable[str] | None = None
    ) -> AtInference:
        """The same about something random: what it does in itself."""

    def to_lora(self, path: str | Path, **options: Any) -> NoReturn:
        """Refuse: a LoRA is a change of weights, and no weight changes.

        Args:
            path: Not written.
            options: Not used.

        Raises:
            LocogenError: Always.
        """
        raise LocogenError(
            f"{type(self).__name__} changes no weight, so {Path(path).name} cannot be written as a "
            "LoRA: ship it with the code that makes pictures (applied), or fit an edit (fit_edit)"
        )


def digest_of_vectors(vectors: Mapping[int, Tensor]) -> str:
    """A hash of vectors by layer, for the keys of pictures."""
    digest = hashlib.sha256()
    for index, values in vectors.items():
        digest.update(f"{index} {tuple(values.shape)}".encode())
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def finite(name: str, value: Any) -> float:
    """The number, of an argument of this name. Raises `LocogenError` for any other value."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise LocogenError(f"{name} is {value!r}: give a finite number")
    return float(value)
