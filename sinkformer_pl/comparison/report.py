"""Write the tables and the picture of a comparison. Every run is in them."""

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from sinkformer_pl.comparison.picture import draw
from sinkformer_pl.comparison.results import Result
from sinkformer_pl.tables import markdown_table, write_csv
from sinkformer_pl.training.curves import CURVES

CONFIDENCE = 0.95

FAIRNESS = "The same seed has the same data, order and initial weights under every normalization."


@dataclass(frozen=True)
class Summary:
    """One normalization over its seeds.

    Attributes:
        label: the normalization.
        values: of the metric, one for each run that is done.
        missing: runs that failed or aren't finished.
        resumed: runs among the done ones that were cut off on the way.
        seconds_per_step: median over runs.
        peak_mb: median over runs, MiB.
    """

    label: str
    values: tuple[float, ...]
    missing: int
    resumed: int
    seconds_per_step: float | None
    peak_mb: float | None


@dataclass(frozen=True)
class Difference:
    """One normalization against the first, seed by seed.

    Attributes:
        label: the normalization.
        baseline: the first one.
        values: its metric minus the baseline's, for each seed that both have done.
        mean: of the values.
        interval: Student's interval of the mean at 95%, over the seeds; None below two pairs.
    """

    label: str
    baseline: str
    values: tuple[float, ...]
    mean: float
    interval: tuple[float, float] | None


def summaries(results: Sequence[Result], metric: str) -> list[Summary]:
    """Summarize each normalization over its seeds, in the order of the results.

    Args:
        results: all runs.
        metric: name of a metric of the test.
    """
    return [
        Summary(
            label,
            values=tuple(run.metrics[metric] for run in runs if run.metrics),
            missing=sum(not run.metrics for run in runs),
            resumed=sum(run.status == "resumed" for run in runs),
            seconds_per_step=_median([run.seconds_per_step for run in runs]),
            peak_mb=_median([run.peak_mb for run in runs]),
        )
        for label, runs in _by_arm(results).items()
    ]


def differences(results: Sequence[Result], metric: str) -> list[Difference]:
    """Subtract the first normalization from each other one, seed by seed.

    The interval takes the seeds as a sample of all seeds; that the test set is a sample too isn't in it.

    Args:
        results: all runs.
        metric: name of a metric of the test.
    """
    values = {
        label: {run.trial.seed: run.metrics[metric] for run in runs if run.metrics}
        for label, runs in _by_arm(results).items()
    }
    baseline, *others = values
    found = []
    for label in others:
        seeds = sorted(values[label].keys() & values[baseline].keys())
        if not seeds:
            continue
        pairs = [values[label][seed] - values[baseline][seed] for seed in seeds]
        mean = statistics.fmean(pairs)
        interval = None
        if len(pairs) > 1:
            with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of equal differences
                low, high = stats.ttest_1samp(pairs, 0).confidence_interval(CONFIDENCE)
            interval = (float(low), float(high))
        found.append(Difference(label, baseline, tuple(pairs), mean, interval))
    return found


def write_report(
    results: Sequence[Result], *, metric: str, root: Path, command: str, machine: str, lowest: bool | None = None
) -> str:
    """Write `runs.csv`, `curves.csv`, `summary.md` and `comparison.png` into the folder.

    Args:
        results: all runs.
        metric: name of a metric of the test.
        root: the folder of the comparison.
        command: what makes it.
        machine: where it was made.
        lowest: whether the lowest figure is best; None for that of a loss.

    Returns:
        The content of `summary.md`.
    """
    _write_runs(results, root / "runs.csv")
    _write_curves(results, root / "curves.csv")
    draw(results, metric, root / "comparison.png")
    text = _markdown(results, metric, command, machine, metric.endswith("loss") if lowest is None else lowest)
    (root / "summary.md").write_text(text, encoding="utf-8")
    return text


def _by_arm(results: Sequence[Result]) -> dict[str, list[Result]]:
    arms: dict[str, list[Result]] = {}
    for result in results:
        arms.setdefault(result.trial.arm.label, []).append(result)
    return arms


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _write_runs(results: Sequence[Result], path: Path) -> None:
    metrics = sorted({name for run in results for name in run.metrics})
    best = sorted({name for run in results for name in run.best})
    columns = ["normalization", "seed", "status", *metrics, *(f"best {name}" for name in best)]
    rows: list[list[Any]] = []
    for run in results:
        measured = [*map(run.metrics.get, metrics), *map(run.best.get, best)]
        costs = [run.seconds_per_step, run.waiting, run.peak_mb]
        rows.append([run.trial.arm.label, run.trial.seed, run.status, *measured, *costs, run.trial.folder])
    write_csv(path, [*columns, "seconds_per_step", "waiting", "peak_mb", "folder"], rows)


def _write_curves(results: Sequence[Result], path: Path) -> None:
    rows: list[list[Any]] = []
    for run in results:
        for epoch in sorted({epoch for curve in run.curves.values() for epoch in curve}):
            values = [run.curves.get(name, {}).get(epoch) for name in CURVES]
            rows.append([run.trial.arm.label, run.trial.seed, epoch, *values])
    write_csv(path, ["normalization", "seed", "epoch", *CURVES], rows)


def _markdown(results: Sequence[Result], metric: str, command: str, machine: str, lowest: bool) -> str:
    unit = "" if lowest else ", %"
    lines = [f"    {command}", "", machine, "", f"{metric}{unit}, of the checkpoint that is best on validation:", ""]
    lines += markdown_table(
        ("normalization", "runs", "best", "median", "mean", "worst", "std", "ms/step", "peak MiB"),
        [
            (
                summary.label,
                _count(summary),
                *_figures(summary.values, lowest),
                _number(summary.seconds_per_step and 1000 * summary.seconds_per_step, 1),
                _number(summary.peak_mb, 0),
            )
            for summary in summaries(results, metric)
        ],
    )
    if pairs := differences(results, metric):
        lines += ["", f"{FAIRNESS} Seed by seed:", ""]
        lines += markdown_table(
            ("difference", "pairs", "mean", "95% interval of the mean", "higher / equal / lower"),
            [_difference(pair, lowest) for pair in pairs],
        )
    lines += ["", "Every run:", ""]
    lines += markdown_table(
        ("normalization", "seed", "status", metric, "best val/accuracy", "ms/step", "waiting for data", "peak MiB"),
        [
            (
                run.trial.arm.label,
                str(run.trial.seed),
                run.status,
                _shown(run.metrics[metric], lowest) if run.metrics else "-",
                _shown(run.best["val/accuracy"], False) if "val/accuracy" in run.best else "-",
                _number(run.seconds_per_step and 1000 * run.seconds_per_step, 1),
                "-" if run.waiting is None else f"{run.waiting:.1%}",
                _number(run.peak_mb, 0),
            )
            for run in results
        ],
    )
    return "\n".join(lines) + "\n"


def _difference(pair: Difference, lowest: bool) -> tuple[str, ...]:
    ends = [_shown(end, lowest, signed=True) for end in pair.interval or ()]
    signs = [sum(test) for test in zip(*((v > 0, v == 0, v < 0) for v in pair.values), strict=True)]
    return (
        f"{pair.label} - {pair.baseline}",
        str(len(pair.values)),
        _shown(pair.mean, lowest, signed=True),
        " to ".join(ends) or "-",
        " / ".join(map(str, signs)),
    )


def _count(summary: Summary) -> str:
    parts = [str(len(summary.values))]
    parts += [f"{summary.resumed} of them resumed"] * bool(summary.resumed)
    parts += [f"{summary.missing} missing"] * bool(summary.missing)
    return ", ".join(parts)


def _figures(values: Sequence[float], lowest: bool) -> list[str]:
    if not values:
        return ["-"] * 5
    best, worst = (min(values), max(values)) if lowest else (max(values), min(values))
    spread = _shown(statistics.stdev(values), lowest) if len(values) > 1 else "-"
    centre = (statistics.median(values), statistics.fmean(values))
    return [*(_shown(value, lowest) for value in (best, *centre, worst)), spread]


def _shown(value: float, lowest: bool, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{value:{sign}.4f}" if lowest else f"{100 * value:{sign}.2f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
