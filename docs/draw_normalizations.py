"""Draw docs/normalizations.png: the attention of every normalization on the same scores.

python docs/draw_normalizations.py

"""

from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from sinkformer_pl.normalizations import registered

TOKENS, WIDTH = 24, 16
ARGUMENTS = {"Sinkhorn": {"n_iters": 21}, "SymmetricSinkhorn": {"n_iters": 21}, "GumbelSinkhorn": {"n_iters": 21}}
COLUMNS = 5


def main() -> None:
    """One panel for each, over its column sums."""
    torch.manual_seed(0)
    # Three clusters along a curve, whose third members are longer: keys of different popularity.
    place = torch.linspace(0, 3, TOKENS)
    x = torch.stack(
        [
            (place + phase).sin() * size
            for phase, size in zip(torch.rand(WIDTH) * 6, torch.rand(WIDTH) + 0.3, strict=True)
        ],
        -1,
    )
    x = (x + 0.25 * torch.randn(TOKENS, WIDTH)) * torch.where(torch.arange(TOKENS) % 8 == 2, 1.6, 1.0)[:, None]
    q = x[None, None]
    names = sorted(registered().keys() - {"Blend"})  # A mix of two others.
    lines = -(-len(names) // COLUMNS)
    figure, panels = plt.subplots(lines, COLUMNS, figsize=(2.5 * COLUMNS, 3.7 * lines))
    for panel in panels.flat:
        panel.set_axis_off()
    for panel, name in zip(panels.flat, names, strict=False):
        module = partial(registered()[name], **ARGUMENTS.get(name, {}))().eval()
        module.build(1, WIDTH)
        with torch.no_grad():
            weights = module.weights(q, q, None, scale=1 / WIDTH**0.5)[0, 0]
        panel.set_axis_on()
        panel.imshow(weights, cmap="magma_r", vmin=0, vmax=float(weights.quantile(0.99)) or 1)
        panel.set(xticks=[], yticks=[])
        given = ", ".join(f"{key}={value}" for key, value in ARGUMENTS.get(name, {}).items())
        panel.set_title(f"{name}\n{given}" if given else name, fontsize=9)
        rows, columns = weights.sum(1), weights.sum(0)
        panel.set_xlabel(
            f"rows {rows.min():.2f} to {rows.max():.2f}\ncolumns {columns.min():.2f} to {columns.max():.2f}\n"
            f"zeros {100 * (weights == 0).float().mean():.0f}%",
            fontsize=8,
        )
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "normalizations.png", dpi=90)


if __name__ == "__main__":
    main()
