"""Dividing samples into training and validation."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 4


def stratified_split(
    targets: Tensor, *, val_fraction: float, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[Tensor, Tensor]:
    """Divide samples into training and validation, each class in proportion.

    Args:
        targets: (n,) int64 class indices, or of multi-label data (n, classes) bool.
        val_fraction: share of validation samples, in (0, 1).
        seed: non-negative; the division depends on it, `targets` and `groups` alone.
        groups: the n samples' groups, none of which is divided; None where each sample is one of its own.

    Returns:
        Sorted indices of the training and of the validation samples, disjoint and complete: `val_fraction * n`,
        rounded, for validation, but for the rule that a class with two samples or more has one in each part (and a
        class with a single one has it in training). With groups, each class is about as near to its share as
        whole groups allow, and those with two groups or more are in both parts where possible. The classes of multi-
        label data are as near as whole samples allow.
    """
    rng = np.random.default_rng(seed)
    labels = targets.numpy()
    if groups is not None or targets.ndim == 2:
        groups = [str(place) for place in range(len(labels))] if groups is None else groups
        taken = _choose_groups(labels, groups, val_fraction, rng)
        return torch.from_numpy(np.flatnonzero(~taken)), torch.from_numpy(np.flatnonzero(taken))
    classes, counts = np.unique(labels, return_counts=True)
    shares = val_fraction * counts
    sizes = np.floor(shares).astype(int)
    # Largest remainders first, so that the total comes out as asked for.
    missing = round(val_fraction * len(labels)) - int(sizes.sum())
    sizes[np.argsort(sizes - shares, kind="stable")[:missing]] += 1
    sizes = np.where(counts >= 2, np.clip(sizes, 1, counts - 1), 0)
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:size] for label, size in zip(classes, sizes, strict=True)
    ]
    val = np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
    train = np.setdiff1d(np.arange(len(labels)), val)
    return torch.from_numpy(train), torch.from_numpy(val)


def _choose_groups(
    labels: np.ndarray, groups: Sequence[Hashable], val_fraction: float, rng: np.random.Generator
) -> np.ndarray:
    """Return which samples are for validation; labels are (n,) or (n, classes)."""
    numbers: dict[Hashable, int] = {}
    members = np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64)
    if labels.ndim == 2:
        # The last column is of all samples, some of which have no class.
        rows = np.column_stack([labels > 0.5, np.ones(len(labels))])
        counts = np.zeros((len(numbers), rows.shape[1]))
        np.add.at(counts, members, rows)
    else:
        counts = np.zeros((len(numbers), int(labels.max(initial=-1)) + 1))
        np.add.at(counts, (members, labels), 1)
    missing = val_fraction * counts.sum(axis=0)
    taken = np.zeros(len(numbers), dtype=bool)
    # Later rounds give back and exchange what the first took by chance.
    for group in np.concatenate([rng.permutation(len(numbers)) for _ in range(_ROUNDS)]):
        left = missing + counts[group] if taken[group] else missing - counts[group]
        if (left**2).sum() < (missing**2).sum() and (taken[group] or taken.sum() < len(numbers) - 1):
            taken[group] = ~taken[group]
            missing = left
    # A class that is all in training gives up its smallest group, one that is all in validation takes it back.
    for label in range(counts.shape[1]):
        having = np.flatnonzero(counts[:, label])
        if len(having) >= 2 and (taken[having].all() or not taken[having].any()):
            smallest = having[counts[having].sum(axis=1).argmin()]
            taken[smallest] = ~taken[smallest]
    return taken[members]
