"""Targets of many samples: (n,) int64 class indices, or of multi-label data (n, num_classes) bool."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.class_weights import ClassWeights, balanced_weights, resolve
from sinkformer_pl.data.dataset import LabelledDataset
from sinkformer_pl.errors import UserError


def require_targets(targets: Tensor, num_classes: int, *, multi_label: bool, owner: str, split: str) -> None:
    """Check the targets of a split that isn't empty.

    Args:
        targets: of its samples.
        num_classes: C.
        multi_label: whether they are to be (n, C).
        owner: class of the data, for messages.
        split: name of the split.

    Raises:
        UserError: another shape, an index that is no class, a value that isn't 0 to 1.
    """
    shape = f"{owner}: targets of the {split} split are {targets.dtype} {tuple(targets.shape)}"
    if not multi_label and targets.ndim == 1:
        for target in {int(targets.min()), int(targets.max())} - {*range(num_classes)}:
            raise UserError(
                f"{owner}: a target of the {split} split is {target}; give places in its classes, 0 to "
                f"{num_classes - 1}"
            )
    elif not multi_label:
        raise UserError(f"{shape}; give (n,) class indices, or set self.multi_label = True in {owner}.__init__")
    elif targets.ndim != 2 or targets.shape[1] != num_classes or not bool(((targets >= 0) & (targets <= 1)).all()):
        raise UserError(f"{shape}; of multi-label data give (n, {num_classes}) of 0 and 1")


def counts_of(targets: Tensor, num_classes: int) -> Tensor:
    """Return how many samples each class has, (C,) int64."""
    if targets.ndim == 2:
        return (targets > 0.5).sum(0)
    return torch.bincount(targets, minlength=num_classes)


def renumbered(targets: Tensor, before: Sequence[str], now: Sequence[str]) -> Tensor:
    """Return targets by the places of their classes in `now`, which has those of all samples."""
    numbers = {name: place for place, name in enumerate(now)}
    # A checkpoint that was taken before may have had classes that no sample is of.
    kept = [place for place, name in enumerate(before) if name in numbers]
    if targets.ndim == 1:
        places = torch.tensor([numbers.get(name, -1) for name in before])
        return places[targets]
    places = torch.tensor([numbers[before[place]] for place in kept], dtype=torch.int64)
    return targets.new_zeros(len(targets), len(now)).index_copy(1, places, targets[:, kept])


def renumber(datasets: Mapping[Any, LabelledDataset], before: Sequence[str], now: Sequence[str]) -> None:
    """Give the data sets of all splits targets by the places of their classes in `now`, as `renumbered` does."""
    if tuple(before) != tuple(now):
        # Two splits may be one data set.
        for dataset in {id(dataset): dataset for dataset in datasets.values()}.values():
            dataset.targets = renumbered(dataset.targets, before, now)


def sample_weights(sampling: ClassWeights, targets: Tensor, classes: Sequence[str]) -> Tensor:
    """Return the weight of each sample, (n,) float64: that of its class.

    Of several classes it is the highest, as in the repeat factors of LVIS (Gupta et al. 2019); a sample without any
    has the lowest that there is.

    Args:
        sampling: weights of the classes.
        targets: of the samples.
        classes: names.

    Raises:
        UserError: weights that don't fit the classes, or leave no sample to draw.
    """
    balanced = balanced_weights(counts_of(targets, len(classes)), len(targets))
    by_class = resolve(sampling, classes, balanced, "data.sampling")
    if targets.ndim == 1:
        weights = by_class[targets]
    else:
        holds = targets > 0.5
        weights = torch.where(holds, by_class, 0.0).amax(1).where(holds.any(1), by_class.min())
    if not weights.any():
        raise UserError("data.sampling: no training sample has a class with a weight above 0; give others")
    return weights
