"""Keep the checkpoint with the best metric."""

from pathlib import Path

from pytorch_lightning.callbacks import ModelCheckpoint
from typing_extensions import override


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, so set that `best.ckpt` is the best so far; a user's own stands beside it.

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
