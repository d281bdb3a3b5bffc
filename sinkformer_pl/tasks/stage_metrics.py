"""Count what a stage logs: loss, accuracies, and metrics that a user names."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from sinkformer_pl.batch import Batch
from sinkformer_pl.tasks.metrics import (
    Confusion,
    ExactMean,
    LabelCounts,
    Outcomes,
    accuracies,
    accuracy,
    label_figures,
    mean_accuracy,
)
from sinkformer_pl.tasks.named_metrics import NamedMetric
from sinkformer_pl.tasks.outputs import probabilities_of


class StageMetrics(MetricCollection):
    """Count what a stage logs at the end of its epochs.

    Attributes:
        confusion_matrix: (C, C) int64 on the CPU, of the last epoch of validation or test; None before its end, of the
            training and of multi-label data.
    """

    def __init__(
        self, stage: str, num_classes: int, *, multi_label: bool = False, named: Sequence[NamedMetric] = ()
    ) -> None:
        """Start at nothing.

        Args:
            stage: "train", "val" or "test", the first part of the names.
            num_classes: C.
            multi_label: whether targets are (B, C).
            named: further metrics; none of a training.
        """
        metrics: dict[str, Metric | MetricCollection]
        if stage == "train":
            # Nothing is uncounted there. The steps of a training are too many to keep, and another number of processes
            # is another training. Without a look at the values torchmetrics' own don't wait for the device.
            share = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            metrics = {"loss": MeanMetric(nan_strategy="disable"), "accuracy": share}
        else:
            metrics = {"loss": ExactMean(), "confusion": Confusion(num_classes)}
        if multi_label:
            metrics = {"loss": metrics["loss"], "labels": LabelCounts(num_classes)}
        if named:
            metrics["outcomes"] = Outcomes()
        # Groups would share states between metrics by comparing their values at the first batch, a device sync.
        super().__init__(metrics, prefix=f"{stage}/", compute_groups=False)
        self.stage, self.multi_label, self.named = stage, multi_label, tuple(named)
        self.confusion_matrix: Tensor | None = None

    def count(self, losses: Tensor, logits: Tensor, batch: Batch) -> None:
        """Add a batch.

        Args:
            losses: of the samples, (B,) or (B, C); of a training their mean, ().
            logits: (B, C).
            batch: targets, some of which may be uncounted outside of a training.
        """
        if self.stage == "train":
            self["loss"].update(losses.expand(len(logits)))
        else:
            self["loss"].update(losses if losses.ndim == 1 else losses.mean(1), batch.counted)
        for name in ("accuracy", "confusion", "labels"):
            if name in self:
                self[name].update(logits, batch.target)
        if self.named:
            probabilities = probabilities_of(logits, multi_label=self.multi_label)
            self["outcomes"].update(probabilities, batch.target, batch.index)

    def figures(self, classes: Sequence[str]) -> dict[str, Tensor]:
        """Return what was counted, by name without the stage, and start at nothing again.

        Counted over all samples of all processes, so that no batch or rank weighs more than its samples. A class
        without samples has no figure of its own.

        Args:
            classes: names, for the figures of single classes.
        """
        found = {name.removeprefix(f"{self.stage}/"): value for name, value in self.compute().items()}
        with torch.inference_mode(False):
            # States that are made in inference mode could not be added to by a later training in the same process.
            self.reset()
        if "labels" in found:
            found |= label_figures(found.pop("labels"))
            if self.stage == "train":
                return {name: found[name] for name in ("loss", "accuracy")}
            each = {"f1_class": found.pop("f1_class")}
        elif self.stage == "train":
            return found
        else:
            confusion = found.pop("confusion")
            self.confusion_matrix = confusion.cpu()
            found |= {"accuracy": accuracy(confusion), "accuracy_macro": mean_accuracy(confusion)}
            each = {"accuracy_class": accuracies(confusion)}
        if self.stage != "test":
            each = {}
        if self.named:
            probabilities, target = found.pop("outcomes")
            for metric in self.named:
                value = metric(probabilities, target)
                (each if value.ndim else found)[metric.name if not value.ndim else f"{metric.name}_class"] = value
        return found | _of_classes(each, classes)


def _of_classes(figures: Mapping[str, Tensor], classes: Sequence[str]) -> dict[str, Tensor]:
    """Return (C,) figures one by one, but for NaN."""
    return {
        f"{name}/{label}": value
        for name, values in figures.items()
        for label, value in zip(classes, values, strict=True)
        if not value.isnan()
    }
