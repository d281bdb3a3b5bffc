"""The plan alone, beside POT's and geomloss's."""

import importlib.util
from collections.abc import Callable

import torch

from sinkformer_pl.benchmark.timing import interleaved
from sinkformer_pl.ops import sinkhorn_attention


def compare_plans(*, points: int, n_iters: int, repeats: int) -> dict[str, float]:
    """Time a plan of n x n points without gradient, at the same number of half-steps, by library; milliseconds.

    Libraries that aren't installed are left out.
    """
    q, k = (torch.randn(points, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    functions: dict[str, Callable[[], object]] = {
        "sinkformer_pl": lambda: sinkhorn_attention(q, k, k, n_iters=n_iters),
    }
    if importlib.util.find_spec("ot"):
        import ot

        weights = torch.full((points,), 1 / points)

        def pot() -> object:
            cost = -(q @ k.T) / 8
            return (
                ot.sinkhorn(weights, weights, cost, 1.0, "sinkhorn_log", (n_iters + 1) // 2, stopThr=0, warn=False) @ k
            )

        functions["POT (sinkhorn_log)"] = pot
    if importlib.util.find_spec("geomloss"):
        from geomloss import SamplesLoss

        # It chooses the number of iterations by itself, from the diameter of the data.
        loss = SamplesLoss("sinkhorn", blur=8**0.5, potentials=True, debias=False, backend="tensorized")
        functions["geomloss (its own schedule)"] = lambda: loss(q, k)
    with torch.no_grad():
        times = interleaved(functions, repeats=repeats, device="cpu")
    return {name: 1e3 * values.median for name, values in times.items()}
