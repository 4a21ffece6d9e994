"""Attention contribution: rank layers by what the concept's tokens write into the picture, in one run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from locogen import stats
from locogen.catalog import usual_settings
from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, on_denoiser
from locogen.interventions.indices import index_on
from locogen.interventions.states import check_apart
from locogen.localization.effects import estimates
from locogen.localization.localize import source_of
from locogen.models.families import family_of, subject_occurrences, warn_unread
from locogen.models.hooks import Hook, after
from locogen.models.layers import Layer, find_layers
from locogen.phrasings import subject_in
from locogen.pictures.batches import Texts, called, halved
from locogen.plan import Concept, Intervention, Settings, Window, distinct_seeds, windows

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

METHOD = "attention contribution"
ALPHA = 0.05


def attention_contribution(
    pipe: Any,
    concept: Concept,
    *,
    subject: str | None = None,
    seeds: Iterable[int] = range(4),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> pd.DataFrame:
    """What the concept's tokens write in each layer: a table, one row a prompt, seed and layer.

    `contribution`: the norm of W_o(A[:, token] V[token]), averaged over queries, over the subject's tokens and over all
    denoising steps, in the conditional rows (after Zarei et al. 2025, arXiv 2505.18832); the heads are summed by W_o,
    as the layer itself does it. In units of the layer's output, which layers of other width or resolution do not share
    (it was made for transformers of equal blocks); nothing is scored, and no picture is decoded.
    `subject`: as in `causal_trace`; other arguments as in `localize`. Columns: concept kind prompt seed layer
    contribution. Raises `LocogenError` for a prompt without its subject and for fused projections.
    """
    from tqdm import tqdm

    check_apart(pipe, "attention contribution")
    usual = usual_settings(source_of(pipe))
    steps = usual["num_inference_steps"] if num_inference_steps is None else num_inference_steps
    guidance = usual["guidance_scale"] if guidance_scale is None else guidance_scale
    chosen = Settings(steps, float(guidance), batch_size)
    drawn = distinct_seeds(seeds)
    warn_unread(pipe, (pair.prompt for pair in concept.pairs))
    rows = []
    for pair in concept.pairs:
        occurrences = subject_occurrences(pipe, pair.prompt, subject or subject_in(concept, pair))
        every = tuple(place for words in occurrences for place in words)
        rows += [(pair.prompt, every, seed) for seed in drawn]
    found: list[Any] = []
    start, size = 0, batch_size
    with tqdm(
        total=len(rows), unit=" runs", desc="listening", disable=not progress, mininterval=0.5
    ) as bar:
        while start < len(rows):
            batch = rows[start : start + size]
            try:
                found.append(_measured(pipe, batch, chosen))
            except Exception as error:
                size = halved(pipe, error, size)
                continue
            start += len(batch)
            bar.update(len(batch))
    return _long(concept, rows, np.concatenate(found))


def _measured(pipe: Any, rows: Sequence[tuple[str, tuple[int, ...], int]], chosen: Settings) -> Any:
    """Contributions of one batch, (rows, layers)."""
    import torch

    plan = [Intervention(prompt, prompt, (), seed) for prompt, _, seed in rows]
    told = Texts(pipe, plan).arguments([row.prompt for row in plan])
    with listening(pipe, [at for _, at, _ in rows]) as said:
        called(pipe, plan, told, chosen, output_type="latent")
    by_layer = []
    for steps in said.values():
        on_device = torch.stack(steps)  # (calls, rows)
        by_layer.append(np.mean(on_device.cpu().numpy(), axis=0))
    return np.stack(by_layer, axis=1)


@contextmanager
def listening(pipe: Any, tokens: Sequence[tuple[int, ...]]) -> Iterator[dict[int, list[Any]]]:
    """Within the context, collect what some tokens write: {layer: [(rows,) at each call of the denoiser]}.

    In float64, where the layer computes: to fetch a number from a device is to wait for it.
    `tokens[i]`: the positions listened to in row `i` of the pipeline call, which has one picture a prompt. The layer is
    run again with the values of all tokens but one set to zero: what it then puts out beyond its output for no values
    at all is that token's part, whatever the attention's processor. The pictures stay as they are.
    """
    family = family_of(pipe)
    layers = find_layers(pipe)
    contributions: dict[int, list[Any]] = {layer.index: [] for layer in layers}

    def hooks_for(call: Call) -> list[Hook]:
        hooks = []
        for layer in layers:
            ear = _Ear(layer, tokens, contributions[layer.index], call)
            named = f"layer {layer.index} ({layer.name})"
            hooks.append(
                after(family.matrices(layer.module)["v"], ear.silence(), f"to_v of {named}")
            )
            hooks.append(after(layer.module, ear.listen(), named))
        return hooks

    with on_denoiser(pipe, hooks_for, "listening"):
        yield contributions


class _Ear:
    """At one layer: runs it again with all values but one token's silenced."""

    def __init__(
        self, layer: Layer, tokens: Sequence[tuple[int, ...]], said: list[Any], call: Call
    ) -> None:
        self.layer, self.tokens, self.said, self.call = layer, tokens, said, call
        self.cells = [(row, at) for row, places in enumerate(tokens) for at in places]
        self.kept: list[int | None] | None = (
            None  # per row of the second run, the token that is heard
        )
        self.called = False

    def silence(self) -> Any:
        """A hook for the value matrix."""

        def hook(module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            if self.kept is None:
                return None
            self.called = True
            changed = output * 0
            for row, at in enumerate(self.kept):
                if at is not None:
                    changed[row, at] = output[row, at]
            return changed

        return hook

    def listen(self) -> Any:
        """A hook for the layer."""

        def hook(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            if self.kept is not None or not self.call.rows:  # its own second run
                return
            count = len(self.tokens)
            if len(self.call.rows) != count or len(output) != self.call.rows.stop:
                raise LocogenError(
                    f"layer {self.layer.index} puts out {len(output)} rows for {count} prompts"
                )
            self.said.append(self._parts(module, args, kwargs, self.call.rows.start))

        return hook

    def _parts(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], first: int) -> Any:
        """Each row's mean norm over queries and its tokens, (rows,); conditional rows begin at `first`."""
        import torch

        count = len(self.tokens)
        rows = [first + row for row in range(count)] + [first + row for row, _ in self.cells]
        picked_args = [_rows_of(value, rows, first + count) for value in args]
        picked_kwargs = {
            name: _rows_of(value, rows, first + count) for name, value in kwargs.items()
        }
        self.kept, self.called = [None] * count + [at for _, at in self.cells], False
        try:
            out = _in_float32(
                module, self.layer.name, picked_args, picked_kwargs
            )  # (rows + cells, queries, width)
        finally:
            self.kept = None
        if not self.called:
            raise LocogenError(
                f"to_v of layer {self.layer.index} ({self.layer.name}) is not called: unfuse the projections first, "
                "pipe.unfuse_qkv_projections()"
            )
        if out.ndim == 4:  # IF's layers put out a picture, (rows + cells, width, high, wide)
            out = out.flatten(2).transpose(1, 2)
        out = out if out.is_cuda else out.cpu()  # Apple's MPS has no float64
        owner = index_on(out.device, [row for row, _ in self.cells])
        norms = (out[count:] - out[:count][owner]).double().norm(dim=-1).mean(-1)  # (cells,)
        total = torch.zeros(count, dtype=torch.float64, device=out.device).index_add(
            0, owner, norms
        )
        return total / index_on(out.device, [len(places) for places in self.tokens])  # (rows,)


def _rows_of(value: Any, rows: Sequence[int], count: int) -> Any:
    """These rows of an argument that has one for each of the call's `count` rows; any other argument as it is."""
    return value[index_on(value.device, rows)] if _by_row(value, count) else value


def _in_float32(module: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """What a layer puts out, computed in float32 where its weights have 16 bits.

    A token's part is a small difference of two outputs that share the bias, and in some families the layer's input.
    In 16 bits whatever is smaller than their last digit (bfloat16: 1/256 of them) is rounded away: the difference of
    the rounded outputs is zero, and taking it in float32 afterwards cannot bring it back. So the layer itself is run
    with its weights and inputs in float32; the module keeps its own.
    """
    import torch

    narrow = {
        path: weight
        for path, weight in _tensors(module)
        if weight.is_floating_point() and weight.itemsize < 4
    }
    if not narrow:
        return module(*args, **kwargs)
    if any(weight.itemsize < 2 or weight.is_meta for weight in narrow.values()):
        raise LocogenError(
            f"layer {name} keeps its weights in 8 bits or offloaded one by one: what a token writes is too small for "
            "them. Load the model in float32, or without layerwise casting and with another offload"
        )
    wide = {path: weight.float() for path, weight in narrow.items()}
    wide_kwargs = {name: _widened(value) for name, value in kwargs.items()}
    return torch.func.functional_call(
        module, wide, tuple(_widened(value) for value in args), wide_kwargs
    )


def _tensors(module: Any) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _widened(value: Any) -> Any:
    """A tensor of 16 bits in float32; anything else as it is."""
    is_narrow = (
        hasattr(value, "is_floating_point") and value.is_floating_point() and value.itemsize < 4
    )
    return value.float() if is_narrow else value


def _by_row(value: Any, count: int) -> bool:
    return hasattr(value, "shape") and value.ndim > 1 and len(value) == count


def _long(
    concept: Concept, rows: Sequence[tuple[str, tuple[int, ...], int]], values: Any
) -> pd.DataFrame:
    import pandas as pd

    lines = [
        (concept.name, concept.kind, prompt, seed, layer, float(value))
        for (prompt, _, seed), found in zip(rows, values, strict=True)
        for layer, value in enumerate(found)
    ]
    return pd.DataFrame(
        lines, columns=["concept", "kind", "prompt", "seed", "layer", "contribution"]
    )


# --- effects -------------------------------------------------------------------------------------


def contributions(table: pd.DataFrame) -> Any:
    """The table of one concept's `attention_contribution` as (layers, prompts, seeds)."""
    import pandas as pd

    if len(set(table["concept"])) != 1:
        raise LocogenError(
            "this is not the table of one concept's attention_contribution: select one concept"
        )
    levels = [
        sorted(table["layer"].unique()),
        list(dict.fromkeys(table["prompt"])),
        sorted(table["seed"].unique()),
    ]
    rows: Any = table.set_index(["layer", "prompt", "seed"])["contribution"]
    return (
        rows.reindex(pd.MultiIndex.from_product(levels))
        .to_numpy()
        .reshape([len(level) for level in levels])
    )


def contribution_effect(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """The effects table of an attention contribution: axis "layer", estimates in units of the layers' output.

    They are norms, all of them positive: only their order says something, and it says what is written, not what it
    does to the picture. Intervals: `stats.crossed_bootstrap`.
    """
    import pandas as pd

    values = contributions(table)
    known = {
        "method": METHOD,
        "concept": table["concept"].iloc[0],
        "kind": table["kind"].iloc[0],
        "width": 1,
    }
    frame = pd.DataFrame(
        [{**known, **line} for line in estimates("layer", range(len(values)), values, level)]
    )
    first = ["method", "concept", "axis", "position", "estimate", "low", "high", "n"]
    return frame.reindex(columns=[*first, *(c for c in frame.columns if c not in first)]).astype(
        {"position": "Int64"}
    )


def contribution_window(table: pd.DataFrame, *, window: int = 2) -> Window:
    """The window of layers in which the concept's tokens write most. A ranking: it always names one."""
    values = contributions(table)
    places = windows(len(values), window)
    sums = np.stack([values[list(place)].mean(0) for place in places])  # (windows, prompts, seeds)
    start = int(sums.mean((1, 2)).argmax())
    rivals = any(abs(place - start) >= window for place in range(len(places)))
    ahead = (
        rivals and stats.simultaneous_lead(sums, start, apart=window, alpha=ALPHA).p_value <= ALPHA
    )
    told = "ahead of every other place" if ahead else "its lead is not established"
    return Window(start, window, f"a ranking always names one; {told}")
