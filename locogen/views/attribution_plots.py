"""The map of an attribution: layers × denoising steps, and layers × tokens, on one scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from locogen.errors import LocogenError, unknown
from locogen.views.plots import axes_for, draw_heatmap, draw_star, figure_size, plain_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

By = Literal["step", "token"]
LABEL = "share of what all layers do"
PADDING = "(pad)"


def attribution_matrix(
    table: pd.DataFrame, by: By = "step", *, prompt: str | None = None
) -> pd.DataFrame:
    """Shares of one concept as (steps or tokens, layers), on average over prompts and seeds.

    Tokens are those of one prompt, by place and word; padding is one row. Pooled text, which is in
    no layer, is left out.

    Raises `LocogenError` for several concepts, an unknown prompt, or shares without tokens.
    """
    rows: Any = table
    if rows["concept"].nunique() != 1:
        raise LocogenError("give the table of one attribution: attribute(...).table")
    if by not in ("step", "token"):
        raise unknown("axis", by, ("step", "token"))
    if by == "token" or prompt is not None:
        rows = _of_prompt(table, prompt)
    runs = len(rows[["prompt", "seed"]].drop_duplicates())
    rows = rows[rows["layer"].notna()]
    keys = _token_labels(rows) if by == "token" else rows["step"]
    sums = rows.groupby([keys.rename(by), rows["layer"].astype(int)], sort=False)["share"].sum()
    matrix = sums.unstack("layer") / runs
    order = list(dict.fromkeys(keys)) if by == "token" else sorted(matrix.index)
    return matrix.reindex(index=order, columns=sorted(matrix.columns))


def attribution_shares(*tables: pd.DataFrame) -> pd.DataFrame:
    """Put the maps of attributions into one table: what a run's page draws.

    Args:
        tables: `attribute(...).table` of each concept.

    Returns:
        One row a cell: concept, by ("step", on average over prompts and seeds, or "token", of the
        first prompt), label (of the step or word), layer, share. Without tokens, no such rows.

    Raises:
        LocogenError: A table of several concepts, or of encoder layers, which no page draws.

    Example:
        >>> import pandas as pd
        >>> cells = [{"layer": 3, "token": 1, "share": 0.2}, {"layer": 8, "token": 1, "share": 0.8}]
        >>> table = pd.DataFrame(cells).assign(concept="neon", prompt="a neon cat", seed=0, step=0)
        >>> attribution_shares(table.assign(word="neon"))[["by", "label", "layer", "share"]]
              by   label  layer  share
        0   step       0      3    0.2
        1   step       0      8    0.8
        2  token  1 neon      3    0.2
        3  token  1 neon      8    0.8
    """
    import pandas as pd

    parts = []
    for table in tables:
        if "axis" in table:
            raise LocogenError(
                "a run's page draws layers of the denoiser, and these are encoder layers: draw "
                "them by plot_attribution"
            )
        tokens: Any = table["token"].notna()
        axes: list[By] = ["step", "token"] if tokens.any() else ["step"]
        for by in axes:
            matrix = attribution_matrix(table, by)
            cells = matrix.rename_axis("label").reset_index()
            cells = cells.melt("label", var_name="layer", value_name="share", ignore_index=False)
            # Row by row, as the map is read.
            cells = cells.sort_index(kind="stable")
            parts.append(cells.assign(concept=table["concept"].iloc[0], by=by))
    whole: Any = pd.concat(parts, ignore_index=True)
    return whole.astype({"label": str})[["concept", "by", "label", "layer", "share"]]


def _of_prompt(table: Any, prompt: str | None) -> Any:
    """The rows of one prompt; None: the first."""
    prompts = list(dict.fromkeys(table["prompt"]))
    if prompt is not None and prompt not in prompts:
        raise unknown("prompt", prompt, prompts)
    return table[table["prompt"] == (prompts[0] if prompt is None else prompt)]


def _token_labels(rows: Any) -> Any:
    """What stands on the axis for each row's token, in the order of places."""
    if rows["token"].isna().any():
        raise LocogenError(
            "these shares are not told apart by token: take attribute(..., how='gradient')"
        )
    words = rows["word"].astype(str)
    places = rows["token"].astype(int).astype(str)
    return (places + " " + words).where(words != PADDING, PADDING)


def completeness(table: pd.DataFrame) -> str:
    """What the shares of each prompt and seed sum to, in words."""
    sums: Any = table.groupby(["prompt", "seed"])["share"].sum()
    low, high = sums.min(), sums.max()
    if high - low < 0.005:
        return f"shares sum to {low:.2f}"
    return f"shares sum to {low:.2f} to {high:.2f}"


def plot_attribution(
    table: pd.DataFrame,
    *,
    by: By = "step",
    prompt: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the map of an attribution: steps × layers, or tokens × layers, on one scale for both.

    Args:
        table: The table of an attribution, `attribute(...).table`.
        by: "step": denoising steps, on average over prompts and seeds. "token": the words of one
            prompt; marks and padding are in brackets, and all padding is one row.
        prompt: The prompt whose shares are drawn. None: all of them by step, the first by token.
        ax: Where to draw; None: a new figure.

    Returns:
        The axes that were drawn on; the largest share is starred, and the title says what the
        shares sum to, which is 1 where they may be trusted.

    Raises:
        LocogenError: For several concepts, an unknown prompt, or tokens of an attribution by rows.

    Example:
        >>> import pandas as pd
        >>> cells = [{"layer": 3, "token": 1, "share": 0.2}, {"layer": 8, "token": 2, "share": 0.8}]
        >>> table = pd.DataFrame(cells).assign(concept="neon", prompt="a neon cat", seed=0, step=0)
        >>> ax = plot_attribution(table.assign(word=["neon", "cat"]), by="token")
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['1 neon', '2 cat']
    """
    matrix = attribution_matrix(table, by, prompt=prompt)
    ax = axes_for(ax, figure_size(matrix))
    low, high = _scale(table, prompt)
    draw_heatmap(matrix, LABEL, ax, cmap="vlag", center=0, vmin=low, vmax=high)
    columns = [str(column) for column in matrix.columns]
    every = max(1, len(columns) // 24)  # numbers of many layers would run into one another
    ticks = range(0, len(columns), every)
    ax.set_xticks([place + 0.5 for place in ticks], [columns[i] for i in ticks], rotation=0)
    names = [plain_label(name) for name in matrix.index]
    ax.set_yticks([place + 0.5 for place in range(len(names))], names, rotation=0)
    ylabel = "denoising step" if by == "step" else ""
    of_encoder = "axis" in table  # a column that only shares of encoder layers have
    ax.set(xlabel="encoder layer" if of_encoder else "layer (execution order)", ylabel=ylabel)
    ax.tick_params(length=0)
    ax.set_title(f"{plain_label(table['concept'].iloc[0])}: {completeness(table)}", loc="left")
    values = matrix.to_numpy()
    row, column = divmod(int(values.argmax()), values.shape[1])
    draw_star(ax, row, column)
    return ax


def _scale(table: Any, prompt: str | None) -> tuple[float, float]:
    """The ends of a scale that holds zero and both maps of an attribution."""
    matrices = [attribution_matrix(table, "step", prompt=prompt)]
    if table["token"].notna().any():
        matrices.append(attribution_matrix(table, "token", prompt=prompt))
    low = min(0.0, *(float(matrix.to_numpy().min()) for matrix in matrices))
    high = max(1e-9, *(float(matrix.to_numpy().max()) for matrix in matrices))
    return low, high
