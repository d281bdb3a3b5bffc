"""Count the optimizer steps that a training has before it, and what a batch is of a step."""

import math
import re
from collections.abc import Sequence
from typing import Literal

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from sinkformer_pl.errors import UserError
from sinkformer_pl.training.lightning_state import batches_done


def steps_left(trainer: pl.Trainer) -> int | None:
    """Return how many optimizer steps will follow, by what is known now, once the training data are set up.

    `max_epochs` and `max_steps`, the number of batches and how many of them make a step are those of the moment, which
    callbacks may change in its course; of what a GradientAccumulationScheduler will change the epochs are known.

    Args:
        trainer: at its start, or between two batches.

    Returns:
        None where neither `max_steps` nor, with data of known length, `max_epochs` ends it.
    """
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    by_steps = None if trainer.max_steps == -1 else max(trainer.max_steps - trainer.global_step, 0)
    if epochs in (None, -1) or math.isinf(batches):
        return by_steps
    this, later = trainer.current_epoch, range(trainer.current_epoch + 1, epochs)
    steps = _ceil(batches - batches_done(trainer), _parts(trainer, this))
    steps += sum(_ceil(batches, _parts(trainer, epoch)) for epoch in later)
    return steps if by_steps is None else min(steps, by_steps)


def steps_in_epochs(trainer: pl.Trainer, epochs: float) -> int | None:
    """Return how many optimizer steps the first epochs have, once the training data are set up.

    Args:
        trainer: the trainer.
        epochs: their number; of a part of one, at least one step.

    Returns:
        None for data of unknown length.
    """
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return None
    whole = sum(_ceil(batches, _parts(trainer, epoch)) for epoch in range(int(epochs)))
    part = (epochs - int(epochs)) * _ceil(batches, _parts(trainer, int(epochs)))
    return max(whole + round(part), 1)


Length = tuple[float, Literal["steps", "epochs"]]
"""A number of optimizer steps or of epochs."""


def read_length(text: int | str, key: str) -> Length:
    """Read a number of optimizer steps, or a text such as "2 epochs".

    Args:
        text: what was given.
        key: of the argument, for the message.

    Raises:
        UserError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(steps?|epochs?)?", str(text))
    by_epoch = found is not None and (found[2] or "").startswith("epoch")
    if found is None or isinstance(text, bool) or not (by_epoch or float(found[1]).is_integer()):
        raise UserError(f"{key} {text}: give a number of optimizer steps, such as 500, or '2 epochs'")
    return float(found[1]), "epochs" if by_epoch else "steps"


def steps_of(trainer: pl.Trainer, length: Length, key: str) -> int:
    """Return a length in optimizer steps, once the training data are set up.

    Raises:
        UserError: it is given in epochs, and their length isn't known.
    """
    number, unit = length
    if unit == "steps" or not number:
        return int(number)
    steps = steps_in_epochs(trainer, number)
    if steps is None:
        raise UserError(f"{key} {number:g} epochs: the number of batches isn't known; give it in steps")
    return steps


def _parts(trainer: pl.Trainer, epoch: int) -> int:
    """Return how many batches make a step in an epoch."""
    callbacks: Sequence[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    schedules = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    return schedules[-1].get_accumulate_grad_batches(epoch) if schedules else trainer.accumulate_grad_batches


def share_of_step(trainer: pl.Trainer, size: int, batch_idx: int) -> float:
    """Return the factor on the loss of a batch that makes a step over several of them the mean over its samples.

    Lightning takes a plain sum / number.

    Args:
        trainer: in training.
        size: samples of the batch.
        batch_idx: its place in the epoch.
    """
    parts, loader = trainer.accumulate_grad_batches, trainer.train_dataloader
    if parts == 1 or not isinstance(loader, DataLoader) or loader.batch_size is None:
        return 1.0
    if isinstance(loader.dataset, IterableDataset):  # Of unknown length.
        return 1.0
    first = batch_idx // parts * parts
    after = min(first + parts, int(trainer.num_training_batches))
    samples = min(after * loader.batch_size, len(loader.sampler)) - first * loader.batch_size  # type: ignore[arg-type]
    return size * parts / samples


def _ceil(batches: float, parts: int) -> int:
    return math.ceil(batches / parts)
