"""Times of alternatives, taken in turn so that a drift of the machine's speed falls on all of them alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

LEAST_SECONDS = 0.02
"""What a repeat takes on a GPU at least: many short calls in a row, so that starting the first one hardly counts."""


class Times(NamedTuple):
    """Seconds of each repeat, in order.

    Attributes:
        seconds: one number a repeat.
    """

    seconds: list[float]

    @property
    def median(self) -> float:
        """Return the median over repeats, in seconds."""
        return statistics.median(self.seconds)

    def ratio_to(self, base: "Times") -> tuple[float, float, float]:
        """Divide by another's times in the same repeats: median, lower and upper quartile."""
        ratios = sorted(a / b for a, b in zip(self.seconds, base.seconds, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        return middle, low, high


def interleaved(functions: Mapping[str, Callable[[], object]], *, repeats: int, device: str) -> dict[str, Times]:
    """Run each function once a repeat, after one run that doesn't count.

    Args:
        functions: what is timed, by name.
        repeats: how often.
        device: "cpu", where a repeat is one call, timed by the clock; or "cuda", where it is as many calls as fill
            `LEAST_SECONDS`, queued one behind the other between two events of the device.
    """
    timed, least = (_by_events, LEAST_SECONDS) if device == "cuda" else (_by_clock, 0.0)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    calls = {name: _calls(timed, function, least) for name, function in functions.items()}
    for _ in range(repeats):
        for name, function in functions.items():
            seconds[name].append(timed(function, calls[name]))
    return {name: Times(values) for name, values in seconds.items()}


def _calls(timed: Callable[[Callable[[], object], int], float], function: Callable[[], object], least: float) -> int:
    """Count the calls that fill the least time, after a first call, which may compile."""
    function()
    return max(1, math.ceil(least / timed(function, 1))) if least else 1


def _by_clock(function: Callable[[], object], calls: int) -> float:
    """Measure the seconds of a call by the clock of the host."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _by_events(function: Callable[[], object], calls: int) -> float:
    """Measure the seconds of a call on the GPU by its own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls
