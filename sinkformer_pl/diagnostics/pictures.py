"""Pictures of attention, drawn with matplotlib; no window is opened and no global state touched."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from sinkformer_pl.diagnostics.capture import LayerAttention
from sinkformer_pl.diagnostics.tokens import Tokens

HEADS = 8
SAMPLES = 3
COLUMNS = 4
CHARACTERS = 60
LINES = 13
RED = (0.85, 0.1, 0.1)


def save(figure: Figure, path: Path) -> np.ndarray:
    """Write a PNG file; returns the same picture, (height, width, 3) uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def draw_maps(layers: Sequence[LayerAttention], sample: int, title: str) -> Figure:
    """The weights of one sample: a row for each layer, a column for each head, at most eight."""
    heads = min(max(layer.weights.shape[1] for layer in layers), HEADS)
    figure = _figure(1.9 * heads + 1.2, 1.9 * len(layers) + 0.5, title)
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
    layers: Sequence[LayerAttention], sides: Mapping[str, tuple[str, str]], tokens: Sequence[Tokens], title: str
) -> Figure | None:
    """Samples, coloured by the attention that each token receives: from the class token, or else from all queries.

    In units of even attention, mean over the heads. Layers whose keys aren't tokens are left out.

    Returns:
        None where no layer attends to tokens that can be drawn.
    """
    layers = [layer for layer in layers if sides[layer.name][1] == "token" and tokens[0].kind != "tokens"]
    layers = [layer for layer in layers if layer.of_sample(0).shape[-1] == tokens[0].size][-COLUMNS:]
    if not layers:
        return None
    samples = min(len(tokens), SAMPLES)
    wide = 3.4 if tokens[0].kind == "words" else 2.5
    figure = _figure(wide * len(layers) + 0.8, 2.4 * samples + 0.5, title)
    three = tokens[0].points is not None and tokens[0].points.shape[1] == 3
    grid = figure.subplots(samples, len(layers), squeeze=False, subplot_kw={"projection": "3d"} if three else {})
    for sample, row in enumerate(grid):
        for axes, layer in zip(row, layers, strict=True):
            own = sides[layer.name][0] == "token" and tokens[sample].leading
            seen = received(layer.of_sample(sample), first_only=bool(own))[tokens[sample].leading :]
            _draw_tokens(axes, tokens[sample], seen.numpy())
            whose = "class token" if own else "all queries"
            axes.set_title(f"{_short(layer.name)}\n{whose}, {seen.min():.2g} to {seen.max():.2g}", fontsize=7)
    return figure


def draw_column_sums(history: Mapping[str, Mapping[int, Sequence[float]]], title: str) -> Figure:
    """Sorted column sums of each layer, a line for each epoch, on a logarithmic axis.

    Args:
        history: by layer and epoch, the quantiles of the column sums at even steps from 0 to 1.
        title: above all.
    """
    columns = min(len(history), COLUMNS)
    rows = -(-len(history) // columns)
    figure = _figure(2.9 * columns + 1, 2.5 * rows + 0.4, title)
    grid = figure.subplots(rows, columns, squeeze=False)
    epochs = sorted({epoch for lines in history.values() for epoch in lines})
    colours = ScalarMappable(Normalize(epochs[0], max(epochs[-1], epochs[0] + 1)), colormaps["viridis_r"])
    for axes in grid.flat[len(history) :]:
        axes.set_axis_off()
    for axes, (layer, lines) in zip(grid.flat, history.items(), strict=False):
        for epoch, sums in sorted(lines.items()):
            axes.plot(np.linspace(0, 1, len(sums)), sums, color=colours.to_rgba(epoch), linewidth=1)  # type: ignore[arg-type]
        axes.set_yscale("log")
        axes.axhline(1, color="grey", linewidth=0.6, linestyle="--")
        axes.set_title(_short(layer), fontsize=8)
        axes.tick_params(labelsize=7, which="both")
        axes.set_xlabel("share of the keys, sorted", fontsize=7)
    for row in grid:
        row[0].set_ylabel("attention received (1 = even)", fontsize=7)
    bar = figure.colorbar(colours, ax=grid, label="epoch")
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def received(weights: Tensor, *, first_only: bool = False) -> Tensor:
    """What each key receives on average over queries and heads, (K,), times K: from (H, Q, K); 1 is even."""
    rows = weights[:, :1] if first_only else weights
    return rows.float().mean((0, 1)).cpu() * weights.shape[-1]


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    return figure


def _draw_tokens(axes: Axes, tokens: Tokens, values: np.ndarray) -> None:
    # Even attention is in the middle of the scale, or below it.
    high = max(float(values.max(initial=0)), 2.0)
    if tokens.kind == "points":
        assert tokens.points is not None
        axes.scatter(*tokens.points.T.numpy(), c=values, s=8, cmap="viridis", vmin=0, vmax=high)  # type: ignore[misc]
        axes.set_aspect("equal")
    elif tokens.kind == "patches":
        assert tokens.image is not None
        height, width = tokens.image.shape[:2]
        axes.imshow(tokens.image.numpy(), cmap="gray", vmin=0, vmax=1)
        over = np.zeros((*tokens.grid, 4))
        over[..., :3] = RED
        over[..., 3] = 0.85 * values.reshape(tokens.grid).clip(0) / high
        axes.imshow(over, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    else:
        _draw_words(axes, tokens.words, values / high)
    axes.set_axis_off()


def _draw_words(axes: Axes, words: Sequence[str], shares: np.ndarray) -> None:
    """Words in lines, the darker the more attention they receive; what is beyond the last line is left out."""
    axes.set(xlim=(0, CHARACTERS), ylim=(LINES, 0))
    column = line = 0
    for word, share in zip(words, shares, strict=True):
        text = word.replace("\n", " ").replace("$", r"\$") or "·"
        if column and column + len(text) > CHARACTERS:
            column, line = 0, line + 1
        if line >= LINES:
            return
        box = {"facecolor": colormaps["Blues"](0.75 * float(share)), "edgecolor": "none", "pad": 0.8}
        axes.text(column, line + 0.5, text, fontsize=6, family="monospace", bbox=box, va="center")
        column += len(text) + 1


def _short(name: str) -> str:
    return name.removeprefix("backbone.").removesuffix(".attention")
