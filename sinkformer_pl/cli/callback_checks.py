"""Checks of the callbacks that a user has chosen, before a run writes anything."""

from collections.abc import Iterable

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    Timer,
)

from sinkformer_pl.errors import UserError, did_you_mean
from sinkformer_pl.tasks.protocol import lowest_is_best, monitors_of
from sinkformer_pl.training import lightning_state


def require_sensible_callbacks(callbacks: Iterable[pl.Callback], model: pl.LightningModule) -> None:
    """Refuse callbacks that can't work here, or that wait for a metric that there won't be.

    Args:
        callbacks: the user's.
        model: the task.

    Raises:
        UserError: names the callback.
    """
    callbacks = list(callbacks)
    # One of the user's own may log what it likes.
    known = ("pytorch_lightning", "sinkformer_pl")
    foreign = any(type(callback).__module__.partition(".")[0] not in known for callback in callbacks)
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, LearningRateFinder | BatchSizeFinder):
            raise UserError(f"trainer.callbacks {name}: it can't set what is found; try values by hand instead")
        if isinstance(callback, Timer):
            raise UserError(f"trainer.callbacks {name}: give trainer.max_time instead")
        for argument in ("update_starting_at_step", "update_starting_at_epoch"):
            if isinstance(callback, EMAWeightAveraging) and getattr(callback, argument):
                raise UserError(
                    f"trainer.callbacks {name}.{argument}: until then it validates and keeps the weights from before "
                    "the training; leave it out, or give EMA, whose average begins gently"
                )
        if isinstance(callback, ModelCheckpoint) and callback.save_last and callback.dirpath is None:
            raise UserError(
                f"trainer.callbacks {name}.save_last: last.ckpt is written without it; leave it out, or give a dirpath"
            )
        if isinstance(callback, BackboneFinetuning) and model.hparams.get("layer_decay") is not None:
            raise UserError(
                f"trainer.callbacks {name}: it trains the backbone as one group, out of reach of model.layer_decay; "
                "leave one of them out"
            )
        monitor = getattr(callback, "monitor", None)
        other = foreign or monitor in ("step", "epoch") or str(monitor).startswith("lr-")
        if isinstance(monitor, str) and not other and getattr(callback, "strict", True):
            require_metric(f"trainer.callbacks {name}.monitor", monitor, model)
        if isinstance(callback, EarlyStopping):
            _require_direction(callback, model)


def require_metric(key: str, monitor: str, model: pl.LightningModule) -> None:
    """Refuse the name of a metric that a task doesn't log; one that doesn't say what it logs may log any.

    Raises:
        UserError: names those that are.
    """
    known = monitors_of(model)
    if known and monitor not in known:
        raise UserError(
            f"{key} {monitor}: no such metric{did_you_mean(monitor, known)}; give one of {', '.join(known)}"
        )


def _require_direction(callback: EarlyStopping, model: pl.LightningModule) -> None:
    """Refuse to wait for a metric to get worse."""
    monitor, mode = callback.monitor, "min" if lowest_is_best(model, callback.monitor) else "max"
    if monitor in monitors_of(model) and monitor not in getattr(model, "undirected", ()) and callback.mode != mode:
        raise UserError(
            f"trainer.callbacks EarlyStopping.mode {callback.mode}: {monitor} is best when "
            f"{'lowest' if mode == 'min' else 'highest'}; set its mode to {mode}"
        )


def require_place(trainer: pl.Trainer, callbacks: Iterable[pl.Callback], model: pl.LightningModule) -> None:
    """Refuse callbacks that can't work under a trainer.

    Args:
        trainer: the trainer.
        callbacks: the user's.
        model: the task.

    Raises:
        UserError: names the callback.
    """
    callbacks = list(callbacks)
    for callback in callbacks:
        key = f"trainer.callbacks {type(callback).__name__}"
        if isinstance(callback, BaseFinetuning) and trainer.world_size > 1:
            raise UserError(
                f"{key}: {trainer.world_size} processes don't share the gradients of parameters that are unfrozen "
                "in the course of a training; give --trainer.devices 1, or leave it out"
            )
        if isinstance(callback, GradientAccumulationScheduler) and trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"{key}: it sets trainer.accumulate_grad_batches, which is {trainer.accumulate_grad_batches}; leave "
                "one of them out"
            )
        if isinstance(callback, LearningRateMonitor | DeviceStatsMonitor) and not trainer.loggers:
            raise UserError(f"{key}: it writes to a logger, and trainer.logger is false; leave one of them out")
    _require_in_time(trainer, callbacks, model)


def _require_in_time(trainer: pl.Trainer, callbacks: Iterable[pl.Callback], model: pl.LightningModule) -> None:
    """Refuse callbacks that look at a metric before it is first logged, or where it never is.

    Args:
        trainer: the trainer.
        callbacks: the user's.
        model: the task, which logs those of its `monitors` that begin with `train/` at the end of an epoch.

    Raises:
        UserError: names the callback and its argument.
    """
    # The first validation comes within the first epoch, or at its end before the metrics of the training.
    validates, every = trainer.limit_val_batches != 0, trainer.check_val_every_n_epoch
    for callback in callbacks:
        if not isinstance(callback, EarlyStopping | ModelCheckpoint) or callback.monitor not in monitors_of(model):
            continue
        if isinstance(callback, EarlyStopping) and not callback.strict:
            continue
        key, monitor = f"trainer.callbacks {type(callback).__name__}", str(callback.monitor)
        argument = f"{'check' if isinstance(callback, EarlyStopping) else 'save'}_on_train_epoch_end"
        late = lightning_state.looks_at_epoch_end(callback, trainer)
        if monitor.startswith("val/") and not validates:
            raise UserError(
                f"{key}.monitor {monitor}: nothing is validated, since trainer.limit_val_batches is 0; give a "
                "metric of the training, such as train/loss"
            )
        if monitor.startswith("train/") and validates and not late and every == 1:
            raise UserError(
                f"{key}.monitor {monitor}: it is logged at the end of an epoch, and looked at after a validation, "
                f"which is earlier; set its {argument} to true"
            )
        if monitor.startswith("val/") and late and every not in (1, None):
            raise UserError(
                f"{key}.{argument} true: {monitor} isn't there at the end of the first epoch, in which nothing is "
                "validated; leave it out"
            )
