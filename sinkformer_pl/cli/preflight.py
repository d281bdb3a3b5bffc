"""Checks before a run writes anything: what would fail in its course, or be ignored, is refused."""

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, Timer
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn

from sinkformer_pl.batch import collate
from sinkformer_pl.cli.callback_checks import require_metric
from sinkformer_pl.data import ClassificationData, Split
from sinkformer_pl.diagnostics.capture import evaluating
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import AttentionCore
from sinkformer_pl.tasks.rate_plan import RatePlan
from sinkformer_pl.testing import rehearse
from sinkformer_pl.training import lightning_state
from sinkformer_pl.training.checkpoint_content import METRICS_KEY
from sinkformer_pl.training.resume import RESUME_KEY

LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}
"""Least values of arguments whose range nobody else checks."""

LIMITS = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}
"""Names of what limits the batches of a command: `trainer.limit_WORD_batches`, of the loader `WORD_dataloader`."""

SPLITS: dict[str, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
}
"""Splits that a command uses."""


def require_sensible(arguments: Mapping[str, Any], command: str) -> None:
    """Refuse arguments of the Trainer without a meaning.

    Args:
        arguments: of the Trainer.
        command: what they are for.

    Raises:
        UserError: names the argument and its range.
    """
    for name, least in LEAST.items():
        if (value := arguments[name]) is not None and value < least:
            raise UserError(f"trainer.{name} {value}: give {least} or more")
    if arguments["val_check_interval"] in (0, "0"):
        raise UserError(
            "trainer.val_check_interval 0: give a number of batches, 1 or more, or a share of the epoch; for no "
            "validation at all, set trainer.limit_val_batches to 0"
        )
    if arguments["barebones"]:
        raise UserError(
            "trainer.barebones true: it forbids the logs and checkpoints that a run here keeps; leave it out, and "
            "measure speed with the command benchmark"
        )
    for name in ("max_epochs", "max_steps"):
        if command == "fit" and arguments[name] == 0:
            raise UserError(f"trainer.{name} 0: nothing would be trained; give 1 or more")


def require_launched(trainer: pl.Trainer) -> None:
    """Refuse processes that are copies of this one, and to wait for machines on which nobody has started anything.

    Raises:
        UserError: names the argument.
    """
    if method := lightning_state.copies_by(trainer):
        raise UserError(
            f"trainer.strategy: it copies this process ({method}), after which nobody handles signals; give "
            "--trainer.strategy ddp, which starts the command anew for each device"
        )
    unaided = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
    if trainer.num_nodes > 1 and unaided and not {"NODE_RANK", "GROUP_RANK"} & os.environ.keys():
        raise UserError(
            f"trainer.num_nodes {trainer.num_nodes}: this is one machine; start it by torchrun or srun on all of them "
            "(docs/scaling.md)"
        )


def require_batches(trainer: pl.Trainer, data: pl.LightningDataModule, command: str) -> None:
    """Refuse limits under which a command does nothing, and a validation after more batches than an epoch has.

    Args:
        trainer: the trainer.
        data: set up.
        command: what runs.

    Raises:
        UserError: names the argument and the number of batches.
    """
    used = _used(trainer, data, LIMITS[command])
    # None of validation is a choice, a share of less than one batch is not.
    if command == "fit" and trainer.limit_val_batches != 0:
        _used(trainer, data, "val")
    interval = getattr(trainer, "val_check_interval", None)
    within_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches != 0
    if command == "fit" and within_epoch and isinstance(interval, int) and used < interval:
        raise UserError(
            f"trainer.val_check_interval {interval}: an epoch has {used} batches; give at most as many, or count "
            "over epochs with trainer.check_val_every_n_epoch null"
        )


def _used(trainer: pl.Trainer, data: pl.LightningDataModule, split: str) -> float:
    """Return how many batches are used of a loader, of unknown length maybe."""
    name = f"limit_{split}_batches"
    limit, loader = getattr(trainer, name), getattr(data, f"{split}_dataloader")()
    try:
        batches: float = len(loader)
    except TypeError:
        batches = math.inf
    used = (
        min(batches, limit)
        if isinstance(limit, int)
        else math.floor(batches * limit)
        if math.isfinite(batches)
        else batches
    )
    if used == 0:
        overfitting = split in ("train", "val") and trainer.overfit_batches  # type: ignore[attr-defined]
        name, kind = ("overfit_batches", f" for {split}") if overfitting else (name, "")
        raise UserError(f"trainer.{name} {limit}: of {batches} batches{kind} none would be used; give more")
    return used


def require_end(trainer: pl.Trainer, model: Any) -> None:
    """Refuse a schedule over a training whose number of steps isn't known, or that waits for a metric that won't be.

    Raises:
        UserError: names the schedule, or the metric.
    """
    rates: RatePlan | None = getattr(model, "rates", None)
    # Where neither is given, Lightning takes a number of epochs of its own, unless there is a limit of time.
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    endless = trainer.max_steps == -1 and (trainer.max_epochs == -1 or (trainer.max_epochs is None and timed))
    if endless and rates is not None:
        rates.require_endless()
    if (monitor := getattr(rates, "monitor", None)) is not None:
        require_metric("model.schedule_monitor", monitor, model)
        if monitor.startswith("val/") and trainer.limit_val_batches == 0:
            raise UserError(
                f"model.schedule_monitor {monitor}: nothing is validated, since trainer.limit_val_batches is 0; give "
                "train/loss"
            )


@contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Turn an error in making a folder, or files in it, into a line for the user.

    Raises:
        UserError: names the folder and the cause.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"trainer.default_root_dir: can't write in the folder {folder} ({error.strerror}); give another, or make "
            "this one writable"
        ) from None


def require_room(folder: Path) -> None:
    """Try to write where the folder of a run is or will be.

    Raises:
        OSError: there is no permission, or no room.
    """
    place = next(place for place in (folder, *folder.parents) if place.is_dir())
    with tempfile.TemporaryFile(dir=place) as file:
        file.write(bytes(2**16))


def stopped_early(trainer: pl.Trainer, checkpoint: Mapping[str, Any]) -> bool:
    """Tell whether an EarlyStopping has ended a checkpoint's training, as it would after one epoch more.

    By patience, or since what it monitors is beyond a threshold of now, or isn't finite.

    Args:
        trainer: with the callbacks of now.
        checkpoint: what `read_checkpoint` gives.
    """
    epochs = lightning_state.epochs_of(checkpoint)
    if epochs < (trainer.min_epochs or 0) or checkpoint["global_step"] < (trainer.min_steps or 0):
        return False
    values = {**(checkpoint.get(METRICS_KEY) or {}), **(checkpoint.get(RESUME_KEY) or {}).get("monitored", {})}
    stoppers = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
    for callback in stoppers:
        state = checkpoint["callbacks"].get(callback.state_key, {})
        stopped = state.get("stopping_reason_message") is not None
        if state.get("wait_count", 0) >= state.get("patience", math.inf) or (
            stopped and callback.monitor in values and _beyond(callback, torch.tensor(values[callback.monitor]))
        ):
            return True
    return False


def _beyond(callback: EarlyStopping, value: Tensor) -> bool:
    """Tell whether a value ends a training at once, as Lightning does."""
    stop, diverged = callback.stopping_threshold, callback.divergence_threshold
    return bool(
        (callback.check_finite and not value.isfinite())
        or (stop is not None and callback.monitor_op(value, stop))
        or (diverged is not None and callback.monitor_op(-value, -diverged))
    )


def rehearse_normalizations(model: nn.Module) -> None:
    """Rehearse each class of normalization in a network, on the first layer that has it.

    Raises:
        UserError: one breaks a rule of its contract.
    """
    cores: dict[type, AttentionCore] = {}
    for module in model.modules():
        if isinstance(module, AttentionCore):
            cores.setdefault(type(module.normalization), module)
    for core in cores.values():
        rehearse(core.normalization, core.num_heads, core.head_dim)


def try_samples(model: pl.LightningModule, data: ClassificationData, command: str) -> None:
    """Pass a few samples through the network, which says what data it isn't built for; compare class weights with it.

    Args:
        model: the task.
        data: set up.
        command: whose splits the samples are from.
    """
    if command == "fit":
        getattr(model, "weigh_classes", lambda data: None)(data)
    with isolate_rng(), evaluating(model):
        for dataset in (data.datasets[split] for split in SPLITS[command]):
            for place in dataset.extremes:
                batch = collate([dataset[place]])
                model(batch.inputs, batch.mask)
