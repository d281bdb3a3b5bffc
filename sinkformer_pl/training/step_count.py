"""Count the optimizer steps that a training has before it, and what a batch is of a step."""

import math
from collections.abc import Sequence

import pytorch_lightning as pl
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

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
    later = range(trainer.current_epoch + 1, epochs)
    parts = trainer.accumulate_grad_batches
    steps = _ceil(batches - batches_done(trainer), parts)
    callbacks: Sequence[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    schedules = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    if schedules:
        steps += sum(_ceil(batches, schedules[-1].get_accumulate_grad_batches(epoch)) for epoch in later)
    else:
        steps += len(later) * _ceil(batches, parts)
    return steps if by_steps is None else min(steps, by_steps)


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
