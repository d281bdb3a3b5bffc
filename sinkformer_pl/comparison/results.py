"""Read what a run left in its files."""

import csv
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sinkformer_pl.comparison.trial import Trial, read_fit, read_test
from sinkformer_pl.errors import UserError
from sinkformer_pl.training.csv_file import CSVFile
from sinkformer_pl.training.curves import read_curves

Status = Literal["done", "resumed", "failed", "unfinished"]

COSTS = ("seconds_per_step", "waiting", "peak_mb")


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        trial: which run.
        status: "done"; "resumed", done, but cut off at least once on the way; "failed"; "unfinished".
        metrics: the metrics of the test, by name; nothing before the run is done.
        best: the validation metrics of the checkpoint that was tested.
        curves: for each of `CURVES` its value at the end of each epoch, by epoch.
        seconds_per_step: median over epochs; None before the first is over.
        waiting: share of that time spent waiting for data, median over epochs.
        peak_mb: largest memory, in MiB.
    """

    trial: Trial
    status: Status
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    seconds_per_step: float | None = None
    waiting: float | None = None
    peak_mb: float | None = None


def read_result(trial: Trial, *, failed: bool = False) -> Result:
    """Read what there is of a run.

    Args:
        trial: the run.
        failed: whether it was tried and failed.

    Raises:
        UserError: a table of the run is damaged.
    """
    folder = trial.folder
    if folder is None:
        return Result(trial, "failed" if failed else "unfinished")
    status: Status = "failed" if failed else "unfinished"
    metrics: Mapping[str, float] = {}
    best: Mapping[str, float] = {}
    if (fit := read_fit(folder)) and (test := read_test(folder)):
        status = "resumed" if fit["resumed"] else "done"
        metrics, best = test["metrics"], fit["best"]
    costs = _costs(folder / "costs.csv")
    return Result(
        trial,
        status,
        metrics,
        best,
        read_curves(folder / "metrics.csv"),
        seconds_per_step=_median(costs, "seconds_per_step"),
        waiting=_median(costs, "waiting"),
        peak_mb=max((row["peak_mb"] for row in costs), default=None),
    )


def _costs(path: Path) -> list[dict[str, float]]:
    try:
        return [{name: float(row[name]) for name in COSTS} for row in CSVFile(path).read()[1]]
    except (csv.Error, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: it is damaged ({error}); delete it, and its figures are left out") from None


def _median(rows: list[dict[str, float]], column: str) -> float | None:
    return statistics.median(row[column] for row in rows) if rows else None
