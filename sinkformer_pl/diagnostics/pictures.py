"""Pictures of attention, drawn with matplotlib; no window is opened and no global state touched."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator
from torch import Tensor

from sinkformer_pl.diagnostics.capture import LayerAttention
from sinkformer_pl.models.tokens import Tokens

HEADS = 8
SAMPLES = 3
COLUMNS = 4
CHARACTERS = 80
LINES = 12
RED = (0.85, 0.1, 0.1)
COLOURS = {
    "points": colormaps["viridis"],
    "patches": LinearSegmentedColormap.from_list("red", [(*RED, 0.0), (*RED, 0.85)]),
    "words": ListedColormap(colormaps["Blues"](np.linspace(0, 0.75, 256))),  # type: ignore[arg-type]
}
PALE = 0.35
"""Contrast of a picture under colours, which would be darkened by the picture's own."""
EVEN = (0.9, 1.1)
"""Least range of an axis of column sums, so that rounding errors don't look like attention."""


def save(figure: Figure, path: Path) -> np.ndarray:
    """Write a PNG file; returns the same picture, (height, width, 3) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_maps(layers: Sequence[LayerAttention], sample: int, title: str) -> Figure:
    """Draw the weights of one sample: a row for each layer, a column for each head, at most eight."""
    most = max(layer.weights.shape[1] for layer in layers)
    heads = min(most, HEADS)
    title += "; from 0 (dark) to the greatest of each (yellow)"
    title += f"; {heads} of {most} heads" if most > heads else ""
    figure = _figure(max(1.9 * heads + 1.2, 4.6), 1.9 * len(layers) + 0.6, title)
    grid = figure.subplots(len(layers), heads, squeeze=False)
    for row, layer in zip(grid, layers, strict=True):
        weights = layer.of_sample(sample).float().cpu().numpy()
        for head, axes in enumerate(row):
            if head >= len(weights):
                axes.set_axis_off()
                continue
            shown = axes.imshow(weights[head], aspect="auto", cmap="viridis", vmin=min(0.0, weights[head].min()))
            axes.set_title(f"head {head}, up to {weights[head].max():.2g}", fontsize=7)
            axes.tick_params(labelsize=6)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
            shown.set_interpolation("nearest")
        row[0].set_ylabel(f"{_short(layer.name)}\nquery", fontsize=7)
    for axes in grid[-1]:
        axes.set_xlabel("key", fontsize=7)
    return figure


def draw_inputs(
    layers: Sequence[LayerAttention],
    tokens: Sequence[Tokens],
    classes: Sequence[str],
    title: str,
) -> Figure | None:
    """Colour samples by the attention that each token receives: from the class token, or else from all queries.

    In units of even attention, mean over the heads; a row for each sample, a column with a colour bar for each layer.
    Layers whose keys aren't tokens are left out.

    Args:
        layers: their attention on a batch.
        tokens: of each sample of the batch.
        classes: the class of each sample.
        title: above all.

    Returns:
        None where no layer attends to tokens that can be drawn.
    """
    layers = [layer for layer in layers if layer.core.sides[1] == "token" and tokens[0].kind != "tokens"]
    layers = [layer for layer in layers if layer.of_sample(0).shape[-1] == tokens[0].size][-COLUMNS:]
    if not layers:
        return None
    samples = min(len(tokens), SAMPLES)
    wide = 4.0 if tokens[0].kind == "words" else 2.5
    figure = _figure(wide * len(layers) + 0.8, 2.4 * samples + 1.2, title)
    three = tokens[0].points is not None and tokens[0].points.shape[1] == 3
    grid = figure.subplots(samples, len(layers), squeeze=False, subplot_kw={"projection": "3d"} if three else {})
    for column, layer in zip(grid.T, layers, strict=True):
        own = layer.core.sides[0] == "token" and bool(tokens[0].leading)
        seen = [
            received(layer.of_sample(sample), first_only=own)[tokens[sample].leading :].numpy()
            for sample in range(samples)
        ]
        # Even attention is in the middle of the scale, or below it.
        high = max(2.0, *(float(values.max(initial=0)) for values in seen))
        colours = ScalarMappable(Normalize(0, high), COLOURS[tokens[0].kind])
        for sample, (axes, values) in enumerate(zip(column, seen, strict=True)):
            _draw_tokens(axes, tokens[sample], values, colours)
            axes.set_title(f"class {classes[sample]}: {values.min():.3g} to {values.max():.3g}", fontsize=7)
        column[0].set_title(f"{_short(layer.name)}\n{column[0].get_title()}", fontsize=7)
        whose = "the class token" if own else "all queries"
        bar = figure.colorbar(colours, ax=list(column), location="bottom", shrink=0.8, aspect=30)
        bar.set_label(f"attention received from {whose}\n(1 = even; mean over heads)", fontsize=7)
        bar.ax.tick_params(labelsize=7)
    return figure


def draw_column_sums(history: Mapping[str, Mapping[int, Sequence[float]]], title: str) -> Figure:
    """Draw the sorted column sums of each layer, a line for each epoch, on a logarithmic axis.

    Args:
        history: by layer and epoch, the quantiles of the column sums at even steps from 0 to 1.
        title: above all.
    """
    columns = min(len(history), COLUMNS)
    rows = -(-len(history) // columns)
    figure = _figure(2.9 * columns + 1, 2.5 * rows + 0.4, title)
    grid = figure.subplots(rows, columns, squeeze=False)
    epochs = sorted({epoch for lines in history.values() for epoch in lines})
    colours = ScalarMappable(Normalize(epochs[0] - 0.5, epochs[-1] + 0.5), colormaps["viridis_r"])
    for axes in grid.flat[len(history) :]:
        axes.set_axis_off()
    for axes, (layer, lines) in zip(grid.flat, history.items(), strict=False):
        axes.set_yscale("log")
        for epoch, sums in sorted(lines.items()):
            axes.plot(np.linspace(0, 1, len(sums)), sums, color=colours.to_rgba(epoch), linewidth=1)  # type: ignore[arg-type]
        seen = [*EVEN, *(value for sums in lines.values() for value in sums if value > 0)]
        low, high = min(seen), max(seen)
        axes.set_ylim(low * (low / high) ** 0.04, high * (high / low) ** 0.04)
        axes.yaxis.set_major_locator(_log_locator(low, high))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.axhline(1, color="grey", linewidth=0.6, linestyle="--")
        axes.set_title(_short(layer), fontsize=8)
        axes.tick_params(labelsize=7, which="both")
        axes.set_xlabel("share of the keys, sorted", fontsize=7)
    for row in grid:
        row[0].set_ylabel("attention received (1 = even)", fontsize=7)
    bar = figure.colorbar(colours, ax=grid)
    bar.set_label("epoch", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    return figure


def _log_locator(low: float, high: float) -> Locator:
    """Choose few enough ticks to read, and more than one."""
    if high < 10 * low:
        return MaxNLocator(6, steps=(1, 2, 5, 10))
    return LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,))


def received(weights: Tensor, *, first_only: bool = False) -> Tensor:
    """Average what each key receives over queries and heads, (K,), times K: from (H, Q, K); 1 is even."""
    rows = weights[:, :1] if first_only else weights
    return rows.float().mean((0, 1)).cpu() * weights.shape[-1]


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    return figure


def _draw_tokens(axes: Axes, tokens: Tokens, values: np.ndarray, colours: ScalarMappable) -> None:
    if tokens.kind == "points":
        assert tokens.points is not None
        _draw_points(axes, tokens.points.numpy(), colours.to_rgba(values))
    elif tokens.kind == "patches":
        assert tokens.image is not None
        height, width = tokens.image.shape[:2]
        axes.imshow(1 - PALE + PALE * tokens.image.numpy(), cmap="gray", vmin=0, vmax=1)
        over = colours.to_rgba(values.reshape(tokens.grid))
        axes.imshow(over, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    else:
        _draw_words(axes, tokens.words, colours.to_rgba(values))
    axes.set_axis_off()


def _draw_points(axes: Any, points: np.ndarray, colours: np.ndarray) -> None:
    if points.shape[1] < 3:
        axes.scatter(*points.T, c=colours, s=8)
        axes.set_aspect("equal")
        return
    # Depth would be shown by paler colours, which mean something here.
    axes.scatter(*points.T, c=colours, s=8, depthshade=False)
    centre = (points.min(0) + points.max(0)) / 2
    radius = np.linalg.norm(points - centre, axis=1).max() or 1.0
    limits = np.stack([centre - radius, centre + radius], axis=1)
    axes.set(xlim3d=limits[0], ylim3d=limits[1], zlim3d=limits[2])
    axes.set_box_aspect((1, 1, 1), zoom=1.5)


def _draw_words(axes: Axes, words: Sequence[str], colours: np.ndarray) -> None:
    """Write words in lines, and how many are beyond the last line."""
    axes.set(xlim=(0, CHARACTERS), ylim=(LINES + 1, 0))
    column = line = 0
    for number, (word, colour) in enumerate(zip(words, colours, strict=True)):
        text = word.replace("\n", " ").replace("$", r"\$") or "·"
        if column and column + len(text) > CHARACTERS:
            column, line = 0, line + 1
        if line >= LINES:
            axes.text(0, line + 0.5, f"and {len(words) - number} more", fontsize=6, style="italic", va="center")
            return
        box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
        axes.text(column, line + 0.5, text, fontsize=6, family="monospace", bbox=box, va="center")
        column += len(text) + 1


def _short(name: str) -> str:
    return name.removeprefix("backbone.").removesuffix(".attention")
