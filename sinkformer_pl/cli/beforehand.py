"""What would fail in the course of a run, or be ignored, refused before anything is written."""

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.seed import isolate_rng

from sinkformer_pl.batch import collate
from sinkformer_pl.data import ClassificationData, Split
from sinkformer_pl.diagnostics.capture import evaluating
from sinkformer_pl.errors import UserError
from sinkformer_pl.tasks import Classifier

LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
}
"""The least value of arguments whose range nobody else checks."""


def require_sensible(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of the Trainer without a meaning.

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


def require_reachable_validation(trainer: pl.Trainer, batches: int) -> None:
    """Refuse a validation after more batches than an epoch has.

    Args:
        trainer: the trainer.
        batches: what the training loader has.

    Raises:
        UserError: names both numbers.
    """
    interval, limit = trainer.val_check_interval, trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    within_epoch = trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches != 0
    if within_epoch and isinstance(interval, int) and batches < interval:
        raise UserError(
            f"trainer.val_check_interval {interval}: an epoch has {batches} batches; give at most as many, or count "
            "over epochs with trainer.check_val_every_n_epoch null"
        )


def try_samples(model: Classifier, data: ClassificationData, command: str) -> None:
    """Pass a few samples through the network, for what it says of data that it wasn't built for.

    Args:
        model: the task.
        data: set up.
        command: whose splits the samples are from.
    """
    used: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",)}
    with isolate_rng(), evaluating(model):
        for dataset in (data.datasets[split] for split in used.get(command, ("test",))):
            for place in dataset.extremes:
                batch = collate([dataset[place]])
                model(batch.inputs, batch.mask)
