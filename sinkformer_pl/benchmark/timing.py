"""Times of alternatives, taken in turn so that a drift of the machine's speed falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Times(NamedTuple):
    """Seconds of each repeat, in order.

    Attributes:
        seconds: one number a repeat.
    """

    seconds: list[float]

    @property
    def median(self) -> float:
        """Median over repeats, in seconds."""
        return statistics.median(self.seconds)

    def ratio_to(self, base: "Times") -> tuple[float, float, float]:
        """Median, lower and upper quartile over repeats of this time divided by the other's in the same repeat."""
        ratios = sorted(a / b for a, b in zip(self.seconds, base.seconds, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return middle, low, high


def interleaved(functions: Mapping[str, Callable[[], object]], *, repeats: int, device: str) -> dict[str, Times]:
    """Run each function once a repeat, after one run that doesn't count.

    Args:
        functions: what is timed, by name.
        repeats: how often.
        device: "cpu" or "cuda"; on a GPU each run is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(values) for name, values in seconds.items()}
