"""Attention contribution: rank layers by what the concept's tokens write into the picture.

The idea: each layer is run a second time, with the values of all tokens but one set to zero. What
it then puts out beyond its output for no values at all is that token's part, whichever way the
layer computes attention. One run of the pipeline measures all layers, and nothing is scored.

Norms of layers of other width or resolution cannot be compared: a layer of one query, or of many
channels, would win whatever it does. So a token's part is taken as a share of all that the same
layer writes of the text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from locogen import stats
from locogen.console import open_bar
from locogen.errors import LocogenError
from locogen.interventions.denoiser_calls import Call, on_denoiser
from locogen.interventions.indices import index_on
from locogen.interventions.states import check_apart
from locogen.localization.effects import effects_table, estimates
from locogen.models.defaults import settings_for
from locogen.models.families import family_of, subject_occurrences, warn_unread
from locogen.models.hooks import Hook, after
from locogen.models.layers import Layer, find_layers
from locogen.phrasings import subject_in
from locogen.pictures.batches import Texts, call_pipeline, halved_batch_size
from locogen.plan import Concept, Intervention, Settings, Window, distinct_seeds, windows
from locogen.types import Module, Pipeline

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

Array = np.ndarray[Any, Any]
METHOD = "attention contribution"


class _Row(NamedTuple):
    """One prompt under one seed, and the positions of the concept's tokens in it."""

    prompt: str
    tokens: tuple[int, ...]
    seed: int


def attention_contribution(
    pipe: Pipeline,
    concept: Concept,
    *,
    subject: str | None = None,
    seeds: Iterable[int] = range(4),
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure what the concept's tokens write in each layer.

    The contribution is the norm of W_o(A[:, token] V[token]), averaged over queries and over the
    subject's tokens, as a share of the mean norm of what the layer writes of all tokens together,
    W_o(A V); averaged over all denoising steps, in the conditional rows. Zarei et al. (2025, arXiv
    2505.18832) take the norm itself, for transformers of equal blocks; in a U-Net, layers differ in
    width and resolution, and only shares can be compared. Heads are summed by W_o, as the layer
    itself does it. No picture is decoded or scored.

    Args:
        pipe: A diffusers pipeline, as from `load`.
        concept: What to look for.
        subject: The words whose tokens are measured; None: the concept's name, or the words that
            the target exchanges.
        seeds: Random seeds; every prompt is run with each of them.
        num_inference_steps: Denoising steps; None: the catalog's number for this model.
        guidance_scale: Classifier-free guidance; None: the catalog's value for this model.
        batch_size: Prompts run at once.
        progress: Whether to show a progress bar.

    Returns:
        A table, one row for each prompt, seed and layer, with the columns concept, kind, prompt,
        seed, layer and contribution.

    Raises:
        LocogenError: For a prompt without its subject, for fused projections, and for weights of
            8 bits or offloaded layer by layer.

    Example:
        >>> pipe = load("mini")
        >>> cat = Concept("cat", "object", (PromptPair("a picture of a cat", "a picture"),))
        >>> few = {"seeds": [0], "num_inference_steps": 1, "guidance_scale": 1.0}
        >>> table = attention_contribution(pipe, cat, progress=False, **few)
        >>> len(table), table["layer"].nunique(), set(table["prompt"])
        (16, 16, {'a picture of a cat'})
    """
    check_apart(pipe, "attention contribution")
    settings = settings_for(
        pipe,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
    )
    rows = _rows_of(pipe, concept, subject, distinct_seeds(seeds))
    warn_unread(pipe, (pair.prompt for pair in concept.pairs))

    parts: list[Array] = []
    start = 0
    size = batch_size
    with open_bar(progress) as bar, bar.counting("run", len(rows)):
        while start < len(rows):
            batch = rows[start : start + size]
            try:
                parts.append(measure_batch(pipe, batch, settings))
            except Exception as error:
                size = halved_batch_size(pipe, error, size, stacklevel=3)
                continue
            start += len(batch)
            bar.add(len(batch))
    return _long_table(concept, rows, np.concatenate(parts))


def _rows_of(
    pipe: Pipeline, concept: Concept, subject: str | None, seeds: Sequence[int]
) -> list[_Row]:
    """Each prompt under each seed, with the tokens of every occurrence of the subject."""
    rows = []
    for pair in concept.pairs:
        words = subject or subject_in(concept, pair)
        occurrences = subject_occurrences(pipe, pair.prompt, words)
        tokens = tuple(token for occurrence in occurrences for token in occurrence)
        rows += [_Row(pair.prompt, tokens, seed) for seed in seeds]
    return rows


def measure_batch(pipe: Pipeline, rows: Sequence[_Row], settings: Settings) -> Array:
    """Contributions of one batch, (rows, layers)."""
    import torch

    plan = [Intervention(row.prompt, row.prompt, (), row.seed) for row in rows]
    arguments = Texts(pipe, plan).arguments([row.prompt for row in rows])
    with measuring_contributions(pipe, [row.tokens for row in rows]) as by_layer:
        call_pipeline(pipe, plan, arguments, settings, output_type="latent")
    means = []
    for calls in by_layer.values():
        values = torch.stack(calls).cpu().numpy()  # (calls, rows)
        means.append(values.mean(axis=0))
    return np.stack(means, axis=1)  # (rows, layers)


def _long_table(concept: Concept, rows: Sequence[_Row], values: Array) -> pd.DataFrame:
    """`values`: (rows, layers)."""
    import pandas as pd

    lines = []
    for row, by_layer in zip(rows, values, strict=True):
        for layer, value in enumerate(by_layer):
            line = (concept.name, concept.kind, row.prompt, row.seed, layer, float(value))
            lines.append(line)
    columns = ["concept", "kind", "prompt", "seed", "layer", "contribution"]
    return pd.DataFrame(lines, columns=columns)


# --- the second run of each layer ----------------------------------------------------------------


@contextmanager
def measuring_contributions(
    pipe: Pipeline, tokens: Sequence[tuple[int, ...]]
) -> Iterator[dict[int, list[Tensor]]]:
    """Within the context, collect what some tokens write; the pictures stay as they are.

    Args:
        pipe: The pipeline; its call has one picture a prompt.
        tokens: For each row of that call, the positions of the tokens that are measured.

    Yields:
        By layer, the contributions at each call of the denoiser, (rows,) each. They are in float64,
        on the device that the layer computes on: to fetch a number from a device is to wait for it.
    """
    family = family_of(pipe)
    layers = find_layers(pipe)
    contributions: dict[int, list[Tensor]] = {layer.index: [] for layer in layers}

    def hooks_for(call: Call) -> list[Hook]:
        hooks = []
        for layer in layers:
            second_run = _SecondRun(layer, tokens, contributions[layer.index], call)
            label = f"layer {layer.index} ({layer.name})"
            values = family.matrices(layer.module)["v"]
            hooks.append(after(values, second_run.keep_some_values, f"to_v of {label}"))
            hooks.append(after(layer.module, second_run.measure, label))
        return hooks

    with on_denoiser(pipe, hooks_for, "attention contribution"):
        yield contributions


class _SecondRun:
    """Runs one layer again, with one row for each token that is measured.

    The rows of the second run are, first, each row of the call with all values zero, then each with
    all its values, and then, for each (row, token), that row with the values of that token alone.
    """

    def __init__(
        self,
        layer: Layer,
        tokens: Sequence[tuple[int, ...]],
        contributions: list[Tensor],
        call: Call,
    ) -> None:
        self.layer = layer
        self.tokens = tokens
        self.contributions = contributions
        self.call = call
        self.cells = [(row, token) for row, places in enumerate(tokens) for token in places]
        # For each row of the second run the tokens whose values stay; None: the run is not on.
        self.remaining: list[slice] | None = None
        self.has_changed_values = False

    def keep_some_values(
        self, module: Module, args: Any, kwargs: Any, output: Tensor
    ) -> Tensor | None:
        """Hook of the value matrix: within the second run, all other values are zero."""
        if self.remaining is None:
            return None
        self.has_changed_values = True
        values = output * 0  # (2 * rows + cells, tokens, width)
        for row, tokens in enumerate(self.remaining):
            values[row, tokens] = output[row, tokens]
        return values

    def measure(
        self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        """Hook of the layer: after its own run, run it again and note what the tokens write."""
        # The second run calls this hook too; and a call of negative prompts alone has no rows.
        if self.remaining is not None or not self.call.rows:
            return
        count = len(self.tokens)
        if len(self.call.rows) != count or len(output) != self.call.rows.stop:
            raise LocogenError(
                f"layer {self.layer.index} puts out {len(output)} rows for {count} prompts: "
                "call the pipeline with one prompt for each entry of tokens, one picture each"
            )
        outputs = self._run_again(module, args, kwargs)  # (2 * rows + cells, queries, width)
        self.contributions.append(self._means(outputs))

    def _run_again(self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """What the layer puts out in the second run, (2 * rows + cells, queries, width)."""
        count = len(self.tokens)
        first = self.call.rows.start  # the negative rows come before
        owners = [*range(count), *range(count), *(row for row, _ in self.cells)]
        rows = [first + row for row in owners]
        picked_args = [_select_rows(value, rows, first + count) for value in args]
        picked_kwargs = {}
        for name, value in kwargs.items():
            picked_kwargs[name] = _select_rows(value, rows, first + count)

        no_values = slice(0, 0)
        all_values = slice(None)
        single = [slice(token, token + 1) for _, token in self.cells]
        self.remaining = [no_values] * count + [all_values] * count + single
        self.has_changed_values = False
        try:
            output = _in_float32(module, self.layer.name, picked_args, picked_kwargs)
        finally:
            self.remaining = None
        if not self.has_changed_values:
            raise LocogenError(
                f"to_v of layer {self.layer.index} ({self.layer.name}) is not called: "
                "unfuse the projections first, pipe.unfuse_qkv_projections()"
            )
        # IF's layers put out a picture, (2 * rows + cells, width, height, width of the picture).
        return output.flatten(2).transpose(1, 2) if output.ndim == 4 else output

    def _means(self, outputs: Tensor) -> Tensor:
        """Mean norm over queries and tokens, as a share of all tokens' together, (rows,)."""
        import torch

        if not outputs.is_cuda:
            outputs = outputs.cpu()  # Apple's MPS has no float64
        count = len(self.tokens)
        owners = index_on(outputs.device, [row for row, _ in self.cells])  # (cells,)
        # W_o has a bias, and some layers add their input: the run without values has both too.
        without_values = outputs[:count]  # (rows, queries, width)
        whole = _mean_norm(outputs[count : 2 * count] - without_values)  # (rows,)
        norms = _mean_norm(outputs[2 * count :] - without_values[owners])  # (cells,)
        total = torch.zeros(count, dtype=torch.float64, device=outputs.device)
        total = total.index_add(0, owners, norms)
        mean = total / index_on(outputs.device, [len(places) for places in self.tokens])  # (rows,)
        # A layer that writes nothing of the text writes nothing of the concept.
        return torch.where(whole > 0, mean / whole, 0.0)


def _mean_norm(written: Tensor) -> Tensor:
    """Mean over queries of the norm of what is written, (..., queries, width) -> (...)."""
    return written.double().norm(dim=-1).mean(-1)


def _select_rows(value: Any, rows: Sequence[int], count: int) -> Any:
    """These rows of an argument that has one for each of the call's `count` rows."""
    has_rows = hasattr(value, "shape") and value.ndim > 1 and len(value) == count
    return value[index_on(value.device, rows)] if has_rows else value


def _in_float32(
    module: Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """What a layer puts out, computed in float32 if its weights have 16 bits.

    A token's part is a small difference of two outputs that share the bias, and in some families
    the layer's input. In 16 bits whatever is smaller than their last digit (bfloat16: 1/256 of
    them) is rounded away: the difference of the rounded outputs is zero, and taking it in float32
    afterwards cannot bring it back. So the layer itself is run with its weights and inputs in
    float32; the module keeps its own.
    """
    import torch

    narrow = dict(_narrow_tensors(module))
    if not narrow:
        return module(*args, **kwargs)
    for weight in narrow.values():
        if weight.itemsize < 2 or weight.is_meta:
            raise LocogenError(
                f"layer {name} keeps its weights in 8 bits or offloaded one by one: what a token "
                "writes is too small for them. Load the model in float32, or without layerwise "
                "casting and with another offload"
            )
    wide = {path: weight.float() for path, weight in narrow.items()}
    wide_args = tuple(_widened(value) for value in args)
    wide_kwargs = {key: _widened(value) for key, value in kwargs.items()}
    return torch.func.functional_call(module, wide, wide_args, wide_kwargs)


def _narrow_tensors(module: Module) -> Iterator[tuple[str, Tensor]]:
    """The weights and buffers of a module that have less than 32 bits."""
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        if _is_narrow(tensor):
            yield path, tensor


def _is_narrow(value: Any) -> bool:
    """Whether a value is a tensor of floating point numbers of less than 32 bits."""
    return hasattr(value, "is_floating_point") and value.is_floating_point() and value.itemsize < 4


def _widened(value: Any) -> Any:
    """A narrow tensor in float32; anything else unchanged."""
    return value.float() if _is_narrow(value) else value


# --- effects -------------------------------------------------------------------------------------


def contributions(table: pd.DataFrame) -> Array:
    """The table of one concept's `attention_contribution` as (layers, prompts, seeds)."""
    if len(set(table["concept"])) != 1:
        raise LocogenError(
            "this is not the table of one concept's attention_contribution: select one concept"
        )
    levels = {
        "layer": sorted(table["layer"].unique()),
        "prompt": list(dict.fromkeys(table["prompt"])),
        "seed": sorted(table["seed"].unique()),
    }
    return stats.cube(table, "contribution", levels)


def contribution_effect(table: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Compute the effects table of an attention contribution.

    Estimates are shares of what each layer writes of the text, all of them positive: only their
    order says something, and it says what is written, not what that does to the picture.

    Args:
        table: The table of one concept, from `attention_contribution`.
        level: Coverage of the intervals.

    Returns:
        One row a layer, with the axis "layer" and the columns of `effect`; estimates are
        shares of the layer's own.

    Raises:
        LocogenError: For a table of several concepts.

    Example:
        >>> import pandas as pd
        >>> table = pd.DataFrame({"layer": [0, 0, 1, 1], "seed": [0, 1, 0, 1]})
        >>> table = table.assign(concept="cat", kind="object", prompt="a cat")
        >>> table["contribution"] = [1.0, 3.0, 5.0, 7.0]
        >>> contribution_effect(table)[["position", "estimate"]]
           position  estimate
        0         0       2.0
        1         1       6.0
    """
    values = contributions(table)
    return effects_table(
        estimates("layer", range(len(values)), values, level),
        method=METHOD,
        concept=table["concept"].iloc[0],
        kind=table["kind"].iloc[0],
        width=1,
    )


def contribution_window(table: pd.DataFrame, *, window: int = 2) -> Window:
    """The window of layers whose writing is most of all about the concept's tokens.

    It is a ranking, and always names one. No test says whether its lead is established: layers
    share no unit but their own output, so a lead in shares is no effect.
    """
    values = contributions(table)
    places = windows(len(values), window)
    means = [values[list(place)].mean() for place in places]
    return Window(int(np.argmax(means)), window, "a ranking always names one")
