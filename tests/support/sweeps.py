"""Pictures tables of sweeps whose truth is known: no pictures, and no torch."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from locogen.plan import Concept, Kind, PromptPair, sweep


def planted(
    carried: Mapping[int, float],
    *,
    prompts: int = 6,
    seeds: int = 4,
    kind: Kind = "style",
    noise: float = 0.02,
    ceiling: float = 0.5,
    layers: int = 16,
    seed: int = 0,
    restored: Mapping[int, float] | None = None,
) -> pd.DataFrame:
    """A pictures table in which `carried[start]` of the score is lost (style) or gained (fact) at each window.

    `restored`: what each window alone brings back; None: as much as it carries.
    """
    restored = carried if restored is None else restored
    dice = np.random.default_rng(seed)
    pairs = tuple(PromptPair(f"prompt {i}", f"target {i}") for i in range(prompts))
    concept = Concept("planted", kind, pairs)
    sign = concept.sign
    rows = []
    for row in sweep(concept, n_layers=layers, seeds=range(seeds)):
        start = -1 if row.start is None else row.start
        lost = {"window": carried.get(start, 0.0), "ceiling": ceiling}.get(row.role, 0.0)
        if row.role == "insert":
            lost = ceiling - restored.get(start, 0.0)
        score = 0.6 + sign * lost + noise * dice.standard_normal()
        rows.append([row.role, row.prompt, row.start, row.width, row.seed, score, 0.4])
    table = pd.DataFrame(
        rows, columns=["role", "prompt", "start", "width", "seed", "clip_score", "content_score"]
    )
    return table.astype({"start": "Int64", "width": "Int64"}).assign(concept="planted", kind=kind)
