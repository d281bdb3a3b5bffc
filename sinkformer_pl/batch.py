"""Define what flows from the data to a task: samples, and the batch that padding makes of some of unequal length."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from sinkformer_pl.errors import UserError

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


def as_batch(batch: Any, num_classes: int | None = None, *, multi_label: bool = False, labelled: bool = True) -> Batch:
    """Return a batch of any loader as a `Batch`; one that is a `Batch` stays as it is.

    Args:
        batch: a `Batch`; or a tuple or list of inputs (B, ...), target (B,) int64 and, optionally, the mask (B, N) bool
            of real tokens, or None; of multi-label data the target is (B, num_classes) of 0 and 1, float or bool.
        num_classes: targets are below; None for no look at them.
        multi_label: whether a sample may have several classes.
        labelled: whether targets are needed; otherwise inputs alone will do, and all targets are 0.

    Returns:
        The batch; the index of a sample is its place in the batch.

    Raises:
        UserError: something else; a target or mask of another dtype or shape; on the CPU, a target that is no class.
    """
    if isinstance(batch, Batch):
        return batch
    parts = [batch] if isinstance(batch, Tensor) else [*batch] if isinstance(batch, tuple | list) else []
    if len(parts) not in ((2, 3) if labelled else (1, 2, 3)) or not isinstance(parts[0], Tensor) or not parts[0].ndim:
        raise UserError(
            f"a batch is {_described(batch)}; give (inputs, target) or (inputs, target, mask), tensors, or a "
            "sinkformer_pl.batch.Batch"
        )
    inputs = parts[0]
    index = torch.arange(len(inputs), device=inputs.device)
    mask = parts[2] if len(parts) > 2 else None
    target = torch.zeros_like(index)
    if labelled:
        target = (_multi_label if multi_label else _class_indices)(parts[1], len(inputs), num_classes)
    shape = inputs.shape[:2]
    if mask is not None and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == shape):
        raise UserError(
            f"the mask of a batch is {_described(mask)}; give bool of shape {tuple(shape)}, True where a token is real"
        )
    return Batch(inputs, mask, target, index)


def _class_indices(target: Any, size: int, num_classes: int | None) -> Tensor:
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != (size,):
        raise UserError(
            f"the target of a batch is {_described(target)}; give the numbers of the classes, int64 of shape ({size},)"
        )
    # Elsewhere a look would wait for the device, whose own assertion is what stops the run.
    if num_classes is not None and target.device.type == "cpu":
        wrong = target[((target < 0) | (target >= num_classes)) & (target != UNCOUNTED)]
        if len(wrong):
            raise UserError(f"a target is {int(wrong[0])}; give the numbers of the classes, 0 to {num_classes - 1}")
    return target


def _multi_label(target: Any, size: int, num_classes: int | None) -> Tensor:
    fits = isinstance(target, Tensor) and target.ndim == 2 and len(target) == size
    if not (fits and (target.is_floating_point() or target.dtype == torch.bool)) or (
        num_classes is not None and target.shape[1] != num_classes
    ):
        raise UserError(
            f"the target of a batch is {_described(target)}; of multi-label data give 1 where a class holds and 0 "
            f"elsewhere, float or bool of shape ({size}, {'num_classes' if num_classes is None else num_classes})"
        )
    return target.float()


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {', '.join(type(part).__name__ for part in value) or 'nothing'}"
    return "None" if value is None else f"a {type(value).__name__}"
