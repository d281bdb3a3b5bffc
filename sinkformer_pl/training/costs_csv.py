"""Measure what training steps cost."""

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from typing_extensions import override

from sinkformer_pl.training.csv_file import CSVFile, before_epoch


class StepCosts(pl.Callback):
    """Write a row for each training epoch to `costs.csv`, from the first process.

    Columns: `epoch`; `steps`, batches; `seconds_per_step`, the median time from the end of a batch to the end of the
    next, validation left out; `waiting`, the share of all that time that went by before a batch was there;
    `peak_mb`, the largest memory so far in MiB: PyTorch's own on a GPU, resident memory of the process elsewhere. In
    an epoch that was cut off they are of the batches since then. Where no batch follows another, as in an epoch of one,
    the times are from the start of the epoch, or the end of a validation.

    No device is waited for: on a GPU the times are those of a queue that is kept full, `waiting` what the queue could
    still hide.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "costs.csv"
        # Of each batch, the time that it took and the part of it that was waited for: of those behind another, and of
        # those that come first.
        self._next: list[tuple[float, float]] = []
        self._first: list[tuple[float, float]] = []
        self._since = self._ready = 0.0
        self._behind = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is not None and trainer.is_global_zero:
            CSVFile(self.path).keep(before_epoch(trainer.current_epoch))
        self._begin()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._next, self._first = [], []
        self._begin()

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        self._ready = time.perf_counter()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any) -> None:
        now = time.perf_counter()
        (self._next if self._behind else self._first).append((now - self._since, self._ready - self._since))
        self._since, self._behind = now, True

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = self._next or self._first
        if not (trainer.is_global_zero and batches):
            return
        row = {
            "epoch": trainer.current_epoch,
            "steps": trainer.num_training_batches,
            "seconds_per_step": f"{statistics.median(seconds for seconds, _ in batches):.6g}",
            "waiting": f"{sum(wait for _, wait in batches) / sum(seconds for seconds, _ in batches):.4f}",
            "peak_mb": f"{_peak_mb(pl_module.device):.0f}",
        }
        CSVFile(self.path).append([row])

    def _begin(self) -> None:
        self._since, self._behind = time.perf_counter(), False


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Not on Windows.
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
