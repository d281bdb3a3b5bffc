"""Batches of any loader as those of the package."""

from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from sinkformer_pl.batch import Batch, as_batch
from sinkformer_pl.training.lightning_state import is_attached


def labelled(task: Any, batch: Any) -> Batch:
    """Return a batch to train or evaluate a classifier on; arguments and errors are those of `as_batch`."""
    return as_batch(batch, task.head.out_features, multi_label=task.multi_label)


def unlabelled(task: pl.LightningModule, batch: Any, batch_idx: int) -> Batch:
    """Return a batch to predict on, whose `index` is the place of each sample in the order of its loader.

    Args:
        task: whose step it is for; without a Trainer the places are those in the batch.
        batch: as of `as_batch`; targets don't matter.
        batch_idx: number of the batch.

    Raises:
        UserError: as `as_batch`.
    """
    if isinstance(batch, Batch) or not is_attached(task):
        return as_batch(batch, labelled=False)
    batch, loader = as_batch(batch, labelled=False), task.trainer.predict_dataloaders
    # Lightning puts a sampler of batches of its own in the place of `batch_size`.
    size = getattr(loader.batch_sampler, "batch_size", None) if isinstance(loader, DataLoader) else None
    places = batch.index + batch_idx * (len(batch.index) if size is None else size)
    # As PyTorch's sampler of several processes deals samples.
    return batch._replace(index=places * task.trainer.world_size + task.trainer.global_rank)
