"""`metrics.csv`, which a resumed run continues."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.core.saving import save_hparams_to_yaml
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from typing_extensions import override

from sinkformer_pl.training.csv_file import CSVFile


class MetricsCSV(Logger):
    """Log to `metrics.csv` in a folder, a row at a time; rows of an earlier part of the same run stay.

    What is logged again at the same step is one row: Lightning logs a rate at each of the batches that make a step.
    Columns are sorted by name, `step` and `epoch` among them. Hyper-parameters go to `hparams.yaml`.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._file: CSVFile | None = None
        self._of_step: list[dict[str, Any]] = []

    @property
    @override
    def name(self) -> str:
        return ""

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def file(self) -> CSVFile:
        """Return the file, looked into at the first use: only the first process has one."""
        self._file = self._file or CSVFile(self.folder / "metrics.csv", sort=True)
        return self._file

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        values = {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}
        row = {**values, "step": self.file.length if step is None else step}
        self._of_step = [before for before in self._of_step if before["step"] == row["step"]]
        if row not in self._of_step:
            self._of_step.append(row)
            self.file.append([row])

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        save_hparams_to_yaml(str(self.folder / "hparams.yaml"), params)  # type: ignore[arg-type]

    def rewind(self, *, step: int, rows: int | None) -> None:
        """Drop what was logged after a checkpoint, so that a training resumed from it logs it again.

        Args:
            step: steps below this one stay.
            rows: at most this many rows stay, None for any number.
        """
        self.file.keep(lambda row: row["step"].isdecimal() and int(row["step"]) < step, rows)
