"""Metrics that add up a batch without waiting for its device.

torchmetrics' own, where they are told of samples that aren't counted, look for these at each update; those of single
classes count by `torch.bincount`. Both wait for a GPU at each step.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from sinkformer_pl.batch import UNCOUNTED


class ExactMean(Metric):
    """The mean of values of samples, the same to the last bit for any batches and any number of processes.

    A sum of floats depends on the order of its terms; here they are kept, and added in the order of their size.
    """

    full_state_update = False
    values: list[Tensor]
    counted: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        """Take what every Metric takes."""
        super().__init__(**kwargs)
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("counted", [], dist_reduce_fx="cat")

    def update(self, values: Tensor, counted: Tensor | None = None) -> None:
        """Add the values (B,) of some samples, any float type; B may be 0.

        Args:
            values: (B,), of any float type.
            counted: (B,) bool, which of them the mean is of; None for all.
        """
        self.values.append(values.float())
        self.counted.append(torch.ones_like(values, dtype=torch.bool) if counted is None else counted)

    def compute(self) -> Tensor:
        """The mean, a float32 scalar; NaN without values, or before any update."""
        if isinstance(self.values, list) and not self.values:
            return torch.tensor(torch.nan, device=self.device)
        # Of several processes of which none had a sample, torchmetrics makes both of them empty floats.
        return dim_zero_cat(self.values)[dim_zero_cat(self.counted).bool()].sort().values.mean()


class Confusion(Metric):
    """Count how often samples of each class were taken for each.

    Args:
        num_classes: C.
        kwargs: what every Metric takes.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # The last row is of the samples that aren't counted.
        self.add_state("counts", torch.zeros(num_classes + 1, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Add some samples: scores (B, C), and their classes (B,) int64, or `UNCOUNTED`."""
        rows, columns = self.counts.shape
        places = target.where(target != UNCOUNTED, rows - 1) * columns + scores.argmax(-1)
        self.counts.view(-1).index_add_(0, places, torch.ones_like(places))

    def compute(self) -> Tensor:
        """(C, C) int64: rows are the classes, columns what they were taken for."""
        return self.counts[:-1]


class Decisions(NamedTuple):
    """Decisions about the classes of samples: how often each class was found where it holds, and so on.

    Attributes:
        true_positive: (C,) int64.
        false_positive: (C,) int64.
        false_negative: (C,) int64.
        true_negative: (C,) int64.
        exact: () int64, samples all of whose decisions are right.
    """

    true_positive: Tensor
    false_positive: Tensor
    false_negative: Tensor
    true_negative: Tensor
    exact: Tensor


class LabelCounts(Metric):
    """Count the decisions about the classes of multi-label samples: a class holds where its score is above 0.

    Args:
        num_classes: C.
        kwargs: what every Metric takes.
    """

    full_state_update = False
    counts: Tensor
    exact: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(4, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("exact", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Add some samples: logits (B, C), and what holds (B, C): 1 or 0, or `UNCOUNTED` throughout."""
        counted = (target != UNCOUNTED)[:, :1]
        guessed, holds = scores > 0, target > 0.5
        each = [guessed & holds, guessed & ~holds, ~guessed & holds, ~guessed & ~holds]
        self.counts += torch.stack([(kind & counted).sum(0) for kind in each])
        self.exact += ((guessed == holds).all(1, keepdim=True) & counted).sum()

    def compute(self) -> "Decisions":
        """Return the counts."""
        hits, false, missed, clear = self.counts
        return Decisions(hits, false, missed, clear, self.exact)


class Outcomes(Metric):
    """Keep probabilities and targets of all samples.

    Args:
        kwargs: what every Metric takes.
    """

    full_state_update = False
    probabilities: list[Tensor]
    targets: list[Tensor]
    places: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("probabilities", "targets", "places"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, target: Tensor, index: Tensor) -> None:
        """Add probabilities (B, C), targets (B,) or (B, C), and the place of each sample in its split (B,)."""
        self.probabilities.append(probabilities)
        self.targets.append(target)
        self.places.append(index)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return probabilities and targets of those that are counted, in the order of their places."""
        targets, places = dim_zero_cat(self.targets), dim_zero_cat(self.places)
        order = places.argsort(stable=True)
        order = order[(targets if targets.ndim == 1 else targets[:, 0])[order] != UNCOUNTED]
        return dim_zero_cat(self.probabilities)[order], targets[order]


def accuracy(confusion: Tensor) -> Tensor:
    """The share of all samples that are taken for what they are, float32; NaN without samples.

    Args:
        confusion: (C, C), as of `Confusion`.
    """
    return confusion.diag().sum() / confusion.sum()


def accuracies(confusion: Tensor) -> Tensor:
    """(C,) float32: the share of each class's samples that are taken for what they are; NaN for a class without any."""
    return confusion.diag() / confusion.sum(1)


def mean_accuracy(confusion: Tensor) -> Tensor:
    """The mean of `accuracies` over the classes that have samples, float32: balanced accuracy; NaN without samples."""
    return accuracies(confusion).nanmean()


def label_figures(counts: Decisions) -> dict[str, Tensor]:
    """Return the figures of multi-label samples, float32.

    Args:
        counts: as of `LabelCounts`.

    Returns:
        "accuracy", the share of right decisions over all samples and classes, as torchmetrics' MultilabelAccuracy;
        "exact_match", the share of samples all of whose decisions are right; "f1_class", (C,), NaN for a class that
        holds nowhere; "f1_macro", the mean of the others.
    """
    hits, false, missed, clear, exact = counts
    total = hits + false + missed + clear
    f1 = (2 * hits / (2 * hits + false + missed)).where(hits + missed > 0, math.nan)
    return {
        "accuracy": (hits + clear).sum() / total.sum(),
        "exact_match": exact / total[0],
        "f1_macro": f1.nanmean(),
        "f1_class": f1,
    }
