"""Write `last.ckpt`, the checkpoint to resume from."""

import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from typing_extensions import override

from sinkformer_pl.errors import UserError
from sinkformer_pl.training import lightning_state
from sinkformer_pl.training.checkpoint_content import Checkpoint
from sinkformer_pl.training.delayed import DELAY, Delayed
from sinkformer_pl.training.metrics_csv import MetricsCSV
from sinkformer_pl.training.signals import Stopped, StopSignals


class LastCheckpoint(pl.Callback):
    """Write the checkpoint from which a training resumes exactly, and end the training when a signal asks for it.

    It is written between two batches, when all of the first is done, its logs and its validation too: after each
    epoch and each validation, every so many steps or seconds, when a signal came, and at the end. A signal that comes
    during a validation ends it, and it is done anew; with several processes, which may have unequal shares of it, or
    with averaged weights in the place of the trained ones, it is finished first. All processes stop at the same step,
    whichever got the signal; on several GPUs at most `delay` steps later, since none is waited for.

    Behind `ResumeState` it comes before other callbacks, so that what these do at the start of a batch is done once.

    Args:
        path: the file.
        signals: tell when to end.
        every: how often also within an epoch: a number of optimizer steps, or a time such as "90s", "10min" or "2h".
        delay: optimizer steps after which several processes heed what one of them has received; None is `DELAY` on
            GPUs and 0 elsewhere.

    Raises:
        UserError: `every` is neither.
    """

    def __init__(
        self,
        path: Path,
        signals: StopSignals,
        *,
        every: int | str | None = None,
        delay: int | None = None,
    ) -> None:
        self.path = path
        self.signals = signals
        self.every_n_steps, self.every_seconds = _interval(every)
        self.delay = delay
        self._received: Delayed[None] = Delayed()
        self._due = False
        self._validating = False
        self._writing = False
        self._saved_step = 0
        self._saved_at = 0.0
        self._rows: int | None = None
        self._rows_before_end: int | None = None

    @property
    def last_model_path(self) -> str:
        """Return the file if there is one, else ""."""
        return str(self.path) if self.path.is_file() else ""

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"rows": self._rows} if self._writing else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]

    @override
    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Checkpoint) -> None:
        if self._writing and self._validating:
            lightning_state.save_validation_as_begun(checkpoint)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is not None:
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV) and trainer.is_global_zero:
                    logger.rewind(step=trainer.global_step, rows=self._rows)
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()
        self.signals.deferred = True
        self.signals.install()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches:
            return  # Gradients aren't in a checkpoint.
        now, step = time.monotonic(), trainer.global_step
        late = self.every_seconds is not None and now - self._saved_at >= self.every_seconds
        received, late = self._agreed(trainer, self.signals.received, late)
        steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        if self._due or received or ((late or steps) and step != self._saved_step):
            self._write(trainer)
        if received:
            self._stop(trainer, received)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating = self.signals.deferred
        # Several processes may be late with what they have received, and a validation is long.
        received, _ = _most(self._received.take())
        if self._validating and received:
            self._stop_in_validation(trainer, received)

    @override
    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._validating and self.signals.received and trainer.world_size == 1:
            self._stop_in_validation(trainer, self.signals.received)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._due = self._due or self._validating
        self._validating = False

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._due = True
        # One that was cut short is resumed, and is logged as a whole then.
        self._rows_before_end = self._logged(trainer) if lightning_state.ends_within_epoch(trainer) else None

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)
        self.signals.deferred = False

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.signals.deferred = False

    def _write(self, trainer: pl.Trainer) -> None:
        self._rows = self._logged(trainer) if self._rows_before_end is None else self._rows_before_end
        self._writing = True
        try:
            trainer.save_checkpoint(self.path, weights_only=False)
        finally:
            self._writing = False
        self._due = False
        self._saved_step = trainer.global_step
        self._saved_at = time.monotonic()

    def _stop_in_validation(self, trainer: pl.Trainer, received: int) -> None:
        """Stop where a validation can be done anew: not with other weights in their place, or within a step."""
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            return
        done = lightning_state.batches_done(trainer)
        if done % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self._write(trainer)
            self._stop(trainer, received)

    def _agreed(self, trainer: pl.Trainer, received: int, late: bool) -> tuple[int, bool]:
        """Return the signal that any process has received, and whether the first finds it late."""
        if trainer.world_size == 1:
            return received, late
        device = trainer.strategy.root_device
        on_gpu = device.type == "cuda"
        found = torch.tensor([received, late and trainer.is_global_zero], pin_memory=on_gpu)
        found = found.to(device, non_blocking=True)
        # Not the strategy's own reduction, which also makes the processes wait for each other.
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        self._received.put(found, None)
        delay = (DELAY if on_gpu else 0) if self.delay is None else self.delay
        return _most(self._received.take(delay))

    def _logged(self, trainer: pl.Trainer) -> int | None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
        return loggers[0].file.length if loggers and trainer.is_global_zero else None

    def _stop(self, trainer: pl.Trainer, received: int) -> None:
        name = signal.Signals(received).name
        stopped = Stopped(received, f"stopped by {name} at step {trainer.global_step}; resume with --ckpt_path last")
        if not trainer.is_global_zero:
            # Whoever started the processes would kill the first on another's failure, before it has ended.
            stopped.code = 0
        raise stopped


def _most(found: Iterable[tuple[Tensor, None]]) -> tuple[int, bool]:
    """Return the signal, and whether it is late, of what was found at some steps."""
    pairs = [value.tolist() for value, _ in found] or [[0, 0]]
    return max(number for number, _ in pairs), any(late for _, late in pairs)


def _interval(every: int | str | None) -> tuple[int | None, float | None]:
    """Return steps and seconds, of which one at most isn't None."""
    if every is None:
        return None, None
    found = re.fullmatch(r"(\d+) ?(s|min|h)?", str(every))
    if found is None or int(found[1]) == 0:
        raise UserError(
            f"checkpoint_every {every}: give a number of steps, 1 or more, or a time such as 90s, 10min or 2h"
        )
    number = int(found[1])
    return (number, None) if found[2] is None else (None, number * {"s": 1.0, "min": 60.0, "h": 3600.0}[found[2]])
