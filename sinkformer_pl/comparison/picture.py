"""Learning curves with their quartiles, and the runs seed by seed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sinkformer_pl.comparison.results import Result


def draw(results: Sequence[Result], metric: str, path: Path) -> None:
    """Draw training loss and validation accuracy over epochs, and the metric of each run.

    Curves are medians over runs, in a band between the quartiles. Runs of one seed are joined by a line.

    Args:
        results: all runs.
        metric: name of a metric of the test.
        path: the PNG file.
    """
    labels = list(dict.fromkeys(run.trial.arm.label for run in results))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, accuracies, tests = figure.subplots(1, 3)
    for axes, name in ((losses, "train/loss"), (accuracies, "val/accuracy")):
        for number, label in enumerate(labels):
            runs = [run.curves.get(name, {}) for run in results if run.trial.arm.label == label]
            _band(axes, [run for run in runs if run], f"C{number}", label)
        axes.set(xlabel="epochs trained", title=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    if accuracies.lines:
        accuracies.legend(frameon=False, fontsize="small")
    _pairs(tests, results, labels, metric)
    figure.savefig(path, dpi=150)


def _band(axes: Axes, curves: Sequence[Mapping[int, float]], colour: str, label: str) -> None:
    epochs = sorted({epoch for curve in curves for epoch in curve})
    if not epochs:
        return
    values = [[curve[epoch] for curve in curves if epoch in curve] for epoch in epochs]
    low, median, high = np.array([np.percentile(column, (25, 50, 75)) for column in values]).T
    shown = np.array(epochs) + 1
    axes.plot(shown, median, color=colour, label=f"{label}, {len(curves)} runs")
    axes.fill_between(shown, low, high, color=colour, alpha=0.2, linewidth=0)


def _pairs(axes: Axes, results: Sequence[Result], labels: Sequence[str], metric: str) -> None:
    place = {label: number for number, label in enumerate(labels)}
    for seed in sorted({run.trial.seed for run in results}):
        points = [
            (place[run.trial.arm.label], run.metrics[metric])
            for run in results
            if run.trial.seed == seed and run.metrics
        ]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), color="0.7", linewidth=1, zorder=1)
    for run in results:
        if run.metrics:
            number = place[run.trial.arm.label]
            axes.scatter(number, run.metrics[metric], color=f"C{number}", zorder=2, s=25)
    axes.set(title=f"{metric}, a line for each seed", xlim=(-0.5, len(labels) - 0.5))
    axes.set_xticks(range(len(labels)), labels, fontsize="small", rotation=15 if len(labels) > 2 else 0)
    axes.grid(alpha=0.3, axis="y")
