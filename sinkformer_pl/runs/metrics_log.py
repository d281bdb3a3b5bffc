"""A CSV log that a resumed run goes on with."""

import csv
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment

from sinkformer_pl.errors import UserError
from sinkformer_pl.runs.writing import replacing

CURVES = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")
"""What is logged once an epoch."""


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """What `metrics.csv` has of each of `CURVES`, by epoch; of an epoch that was begun twice the later row counts.

    Raises:
        UserError: it is damaged.
    """
    rows: list[dict[str, str]] = []
    try:
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        return {
            name: {int(row["epoch"]): float(row[name]) for row in rows if row.get(name) and row.get("epoch")}
            for name in CURVES
        }
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}: it is damaged ({error}); delete it, and its figures are left out") from None


class _Appender(ExperimentWriter):
    """Lightning's own writer deletes an earlier `metrics.csv`; this one adds to it.

    Attributes:
        rows: number of rows in the file.
    """

    rows: int

    def _check_log_dir_exists(self) -> None:
        columns, rows = self._read()
        self.metrics_keys = columns
        self.rows = len(rows)

    def rewind(self, step: int, rows: int | None) -> None:
        """Drop later rows, and columns that only they have."""
        columns, kept = self._read()
        kept = [row for row in kept[:rows] if (row["step"] or "").isdecimal() and int(row["step"]) < step]
        self.metrics_keys = [column for column in columns if any(row[column] for row in kept)]
        self.rows = len(kept)
        if kept:
            self._replace(kept)
        else:
            Path(self.metrics_file_path).unlink(missing_ok=True)

    def save(self) -> None:
        """Write what was recorded."""
        self.rows += len(self.metrics)
        super().save()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._replace(self._read()[1])

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return [], []
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)

    def _replace(self, rows: list[dict[str, str]]) -> None:
        with replacing(Path(self.metrics_file_path)) as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


class AppendingCSVLogger(CSVLogger):
    """`metrics.csv` in the given folder; rows of an earlier part of the same run stay.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, made at the first use."""
        if self._experiment is None:
            self._experiment = _Appender(log_dir=self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @property
    def rows(self) -> int:
        """Number of rows in the file."""
        return self.experiment.rows  # type: ignore[attr-defined]

    def rewind(self, *, step: int, rows: int | None) -> None:
        """Drop what was logged after a checkpoint, so that a training that goes on from it logs it again.

        Args:
            step: steps below this one stay.
            rows: at most this many rows stay, None for any number.
        """
        self.experiment.rewind(step, rows)  # type: ignore[attr-defined]
