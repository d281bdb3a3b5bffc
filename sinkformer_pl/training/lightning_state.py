"""Lightning's own state, as far as exact resume, signals and logs depend on it.

No other module touches a private name of Lightning or its loops. Each function has a test that states what it assumes.
A checkpoint's loops are `checkpoint["loops"]["fit_loop"]`, counters of {"ready", "started", "processed", "completed"}.
"""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
from torch.optim.swa_utils import AveragedModel
from torchmetrics import Metric

EPOCHS = ("loops", "fit_loop", "epoch_progress", "current", "processed")
"""Path, in a checkpoint, of the number of epochs that are over."""

_VALIDATION = "epoch_loop.val_loop.batch_progress"


def ignore_signals(trainer: pl.Trainer) -> None:
    """Keep Lightning from handling signals.

    Its handler of SIGTERM talks to the other processes, and waits forever for those that don't listen. What it would
    have caught is broadcast at each step, for which every process waits for its device.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def is_attached(module: pl.LightningModule) -> bool:
    """Tell whether a module is run by a Trainer; without one, `module.trainer` raises."""
    return module._trainer is not None


def epochs_of(checkpoint: Mapping[str, Any]) -> Any:
    """Return the number of epochs that are over in a checkpoint, None where it has no such number."""
    value: Any = checkpoint
    for key in EPOCHS:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def end_after(trainer: pl.Trainer, epochs: int) -> None:
    """Let a training end after so many epochs: Lightning refuses a checkpoint with more than `max_epochs`."""
    trainer.fit_loop.max_epochs = epochs


def batches_done(trainer: pl.Trainer) -> int:
    """Return how many batches of its epoch a training has had, the one under way among them."""
    return trainer.fit_loop.batch_idx + 1


def ends_within_epoch(trainer: pl.Trainer) -> bool:
    """Tell whether a training, at the end of its last epoch, has had a part of that: its steps or time were up."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return batches.processed < trainer.num_training_batches


def ends_epoch(trainer: pl.Trainer) -> bool:
    """Tell, behind a training batch, whether it was the last of its epoch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def save_validation_as_begun(checkpoint: dict[str, Any]) -> None:
    """Let Lightning restart a validation that a checkpoint was written in.

    As if its first batch had been begun: the state in which Lightning goes back to a validation.
    """
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    checkpoint["loops"]["fit_loop"][_VALIDATION] = {"total": begun, "current": dict(begun), "is_last_batch": False}


def save_position(checkpoint: dict[str, Any], trainer: pl.Trainer) -> int:
    """Let the loops of a new checkpoint say where the training is, between two batches.

    Returns:
        The number of batches of its epoch that the training has had.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epoch, batches = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    # Lightning takes a validation that was begun once more for one that is under way.
    validated = loop[_VALIDATION]["total"]
    validated.update(dict.fromkeys(validated, validated["completed"]))
    over = epoch["current"]["processed"] == epoch["current"]["started"]
    if over and ends_within_epoch(trainer):
        # As at the start of the batch that would have come.
        for progress in epoch.values():
            progress["processed"] = progress["completed"] = progress["started"] - 1
        for progress in (batches["current"], batches["total"]):
            progress["ready"] = progress["completed"] + 1
    elif over:
        # Under `max_steps` Lightning would take this for the middle of an epoch.
        for progress in epoch.values():
            progress["completed"] = progress["processed"]
        batches["current"] = dict.fromkeys(batches["current"], 0)
    return batches["current"]["processed"]


def correct_counts_at_batch(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Correct, at the first batch after a resume, what Lightning counts twice or forgets.

    The checkpoint was written at the start of this batch. From its count of steps the loggers have theirs.
    """
    epoch_loop = trainer.fit_loop.epoch_loop
    epoch_loop.batch_progress.total.ready = epoch_loop.batch_progress.total.completed + 1
    if module.automatic_optimization:
        epoch_loop._batches_that_stepped = trainer.global_step


def correct_counts_at_validation(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Correct the count of steps if a resumed training starts with a validation: a step before it is counted after."""
    epoch_loop = trainer.fit_loop.epoch_loop
    if module.automatic_optimization:
        epoch_loop._batches_that_stepped = trainer.global_step - (not epoch_loop._should_accumulate())


def copies_by(trainer: pl.Trainer) -> str | None:
    """Return how a strategy makes its processes of this one, such as "spawn" or "fork"; None if it doesn't."""
    launcher = trainer.strategy.launcher
    return launcher._start_method if isinstance(launcher, _MultiProcessingLauncher) else None


def looks_at_epoch_end(callback: EarlyStopping | ModelCheckpoint, trainer: pl.Trainer) -> bool:
    """Tell whether a callback looks at its metric when a training epoch ends, rather than when a validation does."""
    if isinstance(callback, ModelCheckpoint):
        chosen = callback._save_on_train_epoch_end
    else:
        chosen = callback._check_on_train_epoch_end
    each_epoch = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
    return each_epoch if chosen is None else chosen


def set_metric_state(metric: Metric, state: Mapping[str, Any], updates: int) -> None:
    """Set the state of a torchmetrics metric and the number of updates that made it, on the metric's device."""
    for name, value in state.items():
        setattr(metric, name, value)
    metric._update_count = updates


def begin_average(callback: WeightAveraging, trainer: pl.Trainer) -> None:
    """Let the average of weights that a training will have lie on its device, and begin anew.

    Lightning takes the device of the module, which is still that of its making, and counts on from where a training
    before in the same process ended.
    """
    callback._device = trainer.strategy.root_device
    callback._latest_update_step = 0


def average_of(callback: WeightAveraging) -> AveragedModel:
    """Return the average of weights, in a training."""
    assert callback._average_model is not None
    return callback._average_model
