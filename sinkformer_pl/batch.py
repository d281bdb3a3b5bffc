"""Define what flows from the data to a task: samples, and the batch that padding makes of some of unequal length."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

UNCOUNTED = -100
"""Target of a sample that metrics and predictions leave out, see `Draw.counted`."""

LARGEST_MESSAGE = 2**20
"""Bytes of inputs above which a batch leaves a loader's process through shared memory, not as a message.

On two cores of a CPU a batch of 50 kB came in 0.5 ms as a message and in 2.2 ms by shared memory, one of 1 MB in 2.0
and 2.3 ms, one of 4 MB in 6 and 2.8 ms.
"""


class Sample(NamedTuple):
    """One item of a dataset.

    Attributes:
        inputs: (N, C) float or (N,) int64; N may differ from sample to sample.
        target: class index, or UNCOUNTED; of multi-label data (num_classes,) float, 1 where a class holds.
        index: place of the sample in its split.
    """

    inputs: Tensor
    target: int | Tensor
    index: int  # type: ignore[assignment]


class Batch(NamedTuple):
    """One batch of samples; a tuple, so that Lightning moves, pins and splits it like any other.

    Attributes:
        inputs: (B, N, C) float for sets, (B, N) int64 token numbers for texts, whatever the backbone takes otherwise.
        mask: (B, N) bool, True where a token is real; None when every token is.
        target: (B,) int64 class indices, or UNCOUNTED; of multi-label data (B, num_classes) float, 1 where a class
            holds, else 0, or UNCOUNTED throughout.
        index: (B,) int64, the place of each sample in its split (names and order survive batching and sharding).
    """

    inputs: Tensor
    mask: Tensor | None
    target: Tensor
    index: Tensor  # type: ignore[assignment]

    @property
    def counted(self) -> Tensor:
        """(B,) bool: the samples that metrics and predictions are of."""
        return (self.target if self.target.ndim == 1 else self.target[:, 0]) != UNCOUNTED


def class_names(targets: Tensor, classes: Sequence[str], *, none: str = "") -> list[str]:
    """Return the class of each sample, or of multi-label data its classes with "|" between them.

    Args:
        targets: (n,) int64, or (n, C) of 0 and 1, or probabilities.
        classes: C names.
        none: stands for no class.
    """
    if targets.ndim == 1:
        return [classes[target] for target in targets.tolist()]
    held = [[name for name, holds in zip(classes, row, strict=True) if holds] for row in (targets > 0.5).tolist()]
    return ["|".join(names) or none for names in held]


def pad(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stack sequences of unequal length into one tensor, zeros after the end.

    Args:
        sequences: B tensors (N_b, ...), equal but for their first size.

    Returns:
        (B, max N_b, ...) and the (B, max N_b) bool mask of real tokens, None when all lengths are equal.
    """
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    if bool((lengths == lengths[0]).all()):
        return _stacked(sequences), None
    padded = torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def _stacked(sequences: Sequence[Tensor]) -> Tensor:
    if get_worker_info() is not None and sum(sequence.nbytes for sequence in sequences) > LARGEST_MESSAGE:
        # In a loader's process this stacks in shared memory, where the batch would be copied to otherwise.
        return default_collate(list(sequences))
    return torch.stack(list(sequences))


def collate(samples: Sequence[Sample]) -> Batch:
    """Make a batch, padding inputs of unequal length."""
    inputs, targets, indices = zip(*samples, strict=True)
    padded, mask = pad(inputs)
    target = torch.stack(targets) if isinstance(targets[0], Tensor) else torch.tensor(targets)
    return Batch(padded, mask, target, torch.tensor(indices))
