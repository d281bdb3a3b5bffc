"""Draw docs/theory/marginal_error.png: how far attention is from doubly stochastic after some half-steps.

python docs/draw_marginal_error.py

"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from sinkformer_pl.ops import marginal_error, sinkhorn

DRAWS, TOKENS = 64, 65
N_ITERS = range(1, 42, 2)
STDS = (0.5, 1.0, 2.0, 4.0)


def main() -> None:
    """Mean over draws of random scores, in a band from the smallest to the largest."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(DRAWS, 1, TOKENS, TOKENS, dtype=torch.float64, generator=generator)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, std in enumerate(STDS):
        errors = torch.stack([marginal_error(sinkhorn(std * draws, n_iters))[:, 0] for n_iters in N_ITERS])
        errors = errors.clamp(min=1e-16)
        colour = plt.get_cmap("viridis_r")(0.15 + 0.8 * number / (len(STDS) - 1))
        axes.plot(N_ITERS, errors.mean(1), ".-", color=colour, label=f"{std:g}")
        axes.fill_between(N_ITERS, errors.amin(1), errors.amax(1), color=colour, alpha=0.2, linewidth=0)
    axes.set(
        yscale="log",
        ylim=(1e-8, 10),
        xlabel="n_iters (half-steps; 1 is softmax)",
        ylabel="marginal error (0 is doubly stochastic)",
        title=f"{TOKENS} x {TOKENS} normal scores: mean and range of {DRAWS} draws",
    )
    axes.set_xticks([1, 3, 5, 7, 9, 21, 31, 41])
    axes.grid(alpha=0.3)
    figure.legend(title="std of scores", frameon=False, loc="outside right center", reverse=True)
    figure.savefig(Path(__file__).parent / "theory/marginal_error.png", dpi=100)


if __name__ == "__main__":
    main()
