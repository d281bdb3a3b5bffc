"""Metrics that add up a batch without waiting for its device.

torchmetrics' own, where they are told of samples that aren't counted, look for these at each update; those of single
classes count by `torch.bincount`. Both wait for a GPU at each step.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.utilities import dim_zero_cat

from sinkformer_pl.batch import UNCOUNTED, Batch


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
        return dim_zero_cat(self.values)[dim_zero_cat(self.counted)].sort().values.mean()


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


class StageMetrics(MetricCollection):
    """Count what a stage logs at the end of its epochs.

    Attributes:
        confusion_matrix: (C, C) int64 on the CPU, of the last epoch of validation or test; None before its end, and of
            the training.
    """

    def __init__(self, stage: str, num_classes: int) -> None:
        """Start at nothing.

        Args:
            stage: "train", "val" or "test", the first part of the names.
            num_classes: C.
        """
        metrics: dict[str, Metric | MetricCollection]
        if stage == "train":
            # Nothing is uncounted there, and without a look at the values torchmetrics' own don't wait for the device.
            # The steps of a training are too many to keep, and another number of processes is another training.
            share = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            metrics = {"loss": MeanMetric(nan_strategy="disable"), "accuracy": share}
        else:
            metrics = {"loss": ExactMean(), "confusion": Confusion(num_classes)}
        # Groups would share states between metrics by comparing their values at the first batch, a device sync.
        super().__init__(metrics, prefix=f"{stage}/", compute_groups=False)
        self.stage = stage
        self.confusion_matrix: Tensor | None = None

    def count(self, losses: Tensor, logits: Tensor, batch: Batch) -> None:
        """Add a batch.

        Args:
            losses: (B,) of the samples; of a training the mean, ().
            logits: (B, num_classes).
            batch: targets, some of which may be uncounted outside of a training.
        """
        if self.stage == "train":
            self["loss"].update(losses.expand(len(logits)))
            self["accuracy"].update(logits, batch.target)
        else:
            self["loss"].update(losses, batch.counted)
            self["confusion"].update(logits, batch.target)

    def figures(self, classes: Sequence[str]) -> dict[str, Tensor]:
        """Return what was counted, by name without the stage, and start at nothing again.

        Counted over all samples of all processes, so that no batch or rank weighs more than its samples. A class
        without samples has no figure of its own.

        Args:
            classes: names, for the figures of single classes in the test.
        """
        found = {name.removeprefix(f"{self.stage}/"): value for name, value in self.compute().items()}
        with torch.inference_mode(False):
            # States that are made in inference mode could not be added to by a later training in the same process.
            self.reset()
        if self.stage == "train":
            return found
        confusion = found.pop("confusion")
        self.confusion_matrix = confusion.cpu()
        found |= {"accuracy": accuracy(confusion), "accuracy_macro": mean_accuracy(confusion)}
        if self.stage == "test":
            each = zip(classes, accuracies(confusion), strict=True)
            found |= {f"accuracy_class/{label}": value for label, value in each if not value.isnan()}
        return found
