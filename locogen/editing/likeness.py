"""How alike two pictures of one prompt and seed are: SSIM, distance of features, LPIPS."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from locogen.stats import Array

if TYPE_CHECKING:
    from PIL.Image import Image

# torchvision's file of the network that LPIPS is trained on.
LPIPS_NET = "alexnet-owt-7be5be79.pth"
LPIPS_BATCH = 32  # pairs of pictures at once


def likeness(
    before: Sequence[Image],
    after: Sequence[Image],
    features_before: Array | None,
    features_after: Array | None,
) -> dict[str, Array]:
    """How alike the pictures stayed, one value a pair, (pairs,) each.

    Args:
        before: Pictures.
        after: The same prompts and seeds, with an edit.
        features_before: Their features as rows of length 1, (pairs, width); None: without.
        features_after: Features of the others.

    Returns:
        "ssim" (1: the same picture); "distance" (1 - cosine of the features, 0 to 2) if there are
        features; "lpips" (0: the same) if that package and its network are installed.
    """
    from skimage.metrics import structural_similarity

    old = np.stack([np.asarray(picture) for picture in before])  # (pairs, height, width, 3)
    new = np.stack([np.asarray(picture) for picture in after])
    # The usual window of 7 pixels, or the largest odd one that fits a tiny picture.
    window = min(7, *(side - 1 + side % 2 for side in old.shape[1:3]))
    similarities = []
    for one, other in zip(old, new, strict=True):
        similarities.append(structural_similarity(one, other, channel_axis=-1, win_size=window))

    columns = {"ssim": np.array(similarities)}
    if features_before is not None and features_after is not None:
        columns["distance"] = 1 - np.einsum("id,id->i", features_before, features_after)
    perceptual = _lpips(old, new)
    if perceptual is not None:
        columns["lpips"] = perceptual
    return columns


def _lpips(old: Array, new: Array) -> Array | None:
    """LPIPS (Zhang et al. 2018), (pairs, height, width, 3) -> (pairs,); None if not installed."""
    try:
        lpips = import_module("lpips")
    except ImportError:
        return None
    import torch

    # The package would download a network that is not there: nobody has asked for that.
    if not (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_NET).exists():
        return None
    net = lpips.LPIPS(net="alex", verbose=False)
    # LPIPS reads (pairs, 3, height, width) in [-1, 1].
    one = torch.from_numpy(old).permute(0, 3, 1, 2) / 127.5 - 1
    other = torch.from_numpy(new).permute(0, 3, 1, 2) / 127.5 - 1
    distances = []
    with torch.no_grad():
        for a, b in zip(one.split(LPIPS_BATCH), other.split(LPIPS_BATCH), strict=True):
            distances.append(net(a, b).reshape(-1).numpy())
    return np.concatenate(distances)
