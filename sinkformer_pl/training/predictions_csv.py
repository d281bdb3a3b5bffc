"""Predictions as a file."""

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import BasePredictionWriter
from typing_extensions import override

from sinkformer_pl.errors import RunError
from sinkformer_pl.training.atomic_file import replacing


class PredictionWriter(BasePredictionWriter):
    """Write `predictions.csv`: for each sample its name, the predicted class and the probability of every class.

    Of a multi-label task the column `classes` has all that are likelier than not, with "|" between them.

    Rows are in the order of the split, whatever the batches and the number of processes.

    Args:
        folder: where the file goes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(write_interval="batch")
        self.path = folder / "predictions.csv"
        self._rows: dict[int, list[float]] = {}

    @override
    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Keep the rows of a batch.

        Raises:
            RunError: the task predicts something else than probabilities.
        """
        if not (hasattr(prediction, "index") and hasattr(prediction, "probabilities")):
            raise RunError(
                f"{type(pl_module).__name__}.predict_step: gave a {type(prediction).__name__}; give a "
                "sinkformer_pl.tasks.Prediction, or use the task's predictions in Python"
            )
        self._rows.update(zip(prediction.index.tolist(), prediction.probabilities.tolist(), strict=True))

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        rows = self._rows
        if dist.is_available() and dist.is_initialized():
            parts: list[dict[int, list[float]]] = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(parts, rows)
            rows = {index: row for part in parts for index, row in part.items()}
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        classes = getattr(data, "classes", None) or [str(n) for n in range(len(next(iter(rows.values()), [])))]
        # Data of one's own may know neither.
        names = data.names("test") if hasattr(data, "names") else range(max(rows, default=-1) + 1)
        several = getattr(pl_module, "multi_label", False)
        with replacing(self.path) as file:
            writer = csv.writer(file)
            writer.writerow(["sample", "classes" if several else "class", *classes])
            for index, row in sorted(rows.items()):
                if several:
                    found = "|".join(name for name, probability in zip(classes, row, strict=True) if probability > 0.5)
                else:
                    found = classes[int(torch.tensor(row).argmax())]
                writer.writerow([names[index], found, *(f"{probability:.6g}" for probability in row)])
