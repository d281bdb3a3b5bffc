"""A CSV log that a resumed run goes on with."""

import csv
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.loggers.logger import rank_zero_experiment


class _Appender(ExperimentWriter):
    """Lightning's own writer deletes an earlier `metrics.csv`; this one adds to it."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


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
