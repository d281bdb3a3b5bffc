"""Keep the checkpoint with the best metric."""

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint
from typing_extensions import override


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, so set that `best.ckpt` is the best so far; a user's own stands beside it.

    While a callback says that the network is `unfinished`, as `Gradual` does, its metrics are no candidates: they are
    those of another network than the one that is wanted.

    Args:
        folder: where to.
        monitor: the metric; None for the newest.
        mode: "min" if the lowest is best, else "max".
    """

    def __init__(self, folder: Path, monitor: str | None, mode: str = "max") -> None:
        super().__init__(
            folder,
            filename="best",
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            # A validation within an epoch comes before the metrics of its training.
            save_on_train_epoch_end=True if monitor and monitor.startswith("train/") else None,
        )

    @property
    @override
    def state_key(self) -> str:
        return type(self).__name__

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _unfinished(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _unfinished(trainer):
            super().on_validation_end(trainer, pl_module)


def _unfinished(trainer: pl.Trainer) -> bool:
    return any(getattr(callback, "unfinished", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
