"""Learning curves, read from a run's `metrics.csv`."""

import csv
from collections.abc import Sequence
from pathlib import Path

from sinkformer_pl.errors import UserError
from sinkformer_pl.training.csv_file import CSVFile

CURVES = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")
"""Metrics that are logged once an epoch."""


def read_curves(path: Path, names: Sequence[str] = CURVES) -> dict[str, dict[int, float]]:
    """Read metrics from `metrics.csv`, by epoch; of an epoch that was begun twice the later row counts.

    Args:
        path: of the file; without one all curves are empty.
        names: of the metrics, logged once an epoch.

    Raises:
        UserError: the file is damaged.
    """
    try:
        _, rows = CSVFile(path).read()
        return {
            name: {int(row["epoch"]): float(row[name]) for row in rows if row.get(name) and row.get("epoch")}
            for name in names
        }
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}: it is damaged ({error}); delete it, and its figures are left out") from None
