"""Losses: of each sample in evaluation, and their mean in training."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor, nn
from typing_extensions import override

from sinkformer_pl.errors import UserError


class Loss(nn.Module, ABC):
    """The loss of each sample: a subclass writes `forward`, from which the mean in training follows.

    Targets are (B,) int64 class indices, or of multi-label data (B, C) float, 1 where a class holds, else 0.

    Attributes:
        takes_label_smoothing: whether there is label smoothing; a task refuses it otherwise. Such a class overrides
            `smoothed` for class indices.
    """

    takes_label_smoothing: ClassVar[bool] = False

    @abstractmethod
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the losses, of the shape of the target: of each sample, or of each sample and class.

        Args:
            logits: (B, C).
            target: (B,) or (B, C).
        """

    def mean(
        self, logits: Tensor, target: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        """Return what a training step descends, the mean of the losses.

        Args:
            logits: (B, C).
            target: (B,) or (B, C).
            class_weights: (C,). Of class indices the mean is weighted: divided by the weights of the batch, as PyTorch
                does, and 0 where these are all 0. Of multi-label targets a class's losses are times its weight where it
                holds, as under PyTorch's `pos_weight`.
            label_smoothing: share of a target that goes to all classes, or, of multi-label ones, to both answers alike.
        """
        losses = self.smoothed(logits, target, label_smoothing) if label_smoothing else self(logits, target)
        if class_weights is None:
            return losses.mean()
        if target.ndim == 2:
            return (losses * (1 + (class_weights - 1) * target)).mean()
        weights = class_weights[target]
        return (losses * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)

    def smoothed(self, logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
        """Return the losses under label smoothing; those of class indices are up to classes that take it."""
        return self(logits, target * (1 - label_smoothing) + label_smoothing / 2)


class CrossEntropy(Loss):
    """The negative log-likelihood: of the class under softmax; of multi-label targets of each class under sigmoid."""

    takes_label_smoothing = True

    @override
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.ndim == 2:
            return F.binary_cross_entropy_with_logits(_precise(logits), target, reduction="none")
        return F.cross_entropy(logits, target, reduction="none")

    @override
    def mean(
        self, logits: Tensor, target: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0
    ) -> Tensor:
        if target.ndim == 2:
            return super().mean(logits, target, class_weights=class_weights, label_smoothing=label_smoothing)
        if class_weights is None:
            return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
        # PyTorch's mean is 0 / 0 where all samples weigh nothing.
        nothing = class_weights[target].sum() == 0
        return ~nothing * F.cross_entropy(
            logits, target, weight=class_weights + nothing, label_smoothing=label_smoothing
        )


class FocalLoss(Loss):
    """Cross-entropy in which a sample weighs less the likelier its class is held: times (1 - p) ** gamma.

    Of multi-label targets each class is a question of its own. Lin et al., Focal Loss for Dense Object Detection, ICCV
    2017; in the place of its alpha are class weights.

    Args:
        gamma: 0 or more; 0 is cross-entropy.
    """

    takes_label_smoothing = True

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        if not gamma >= 0:
            raise UserError(f"model.loss.gamma is {gamma}: give 0 or more")
        self.gamma = gamma

    @override
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = _precise(logits)
        if target.ndim == 2:
            losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            others = logits.sigmoid() * (1 - target) + (-logits).sigmoid() * target
            return self._focused(losses, others)
        losses = F.cross_entropy(logits, target, reduction="none")
        return self._focused(losses, -torch.expm1(-losses))

    @override
    def smoothed(self, logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
        if target.ndim == 2:
            return super().smoothed(logits, target, label_smoothing)
        logits = _precise(logits)
        losses = F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing)
        return self._focused(losses, -torch.expm1(-F.cross_entropy(logits, target, reduction="none")))

    def _focused(self, losses: Tensor, others: Tensor) -> Tensor:
        # Of powers below 1 the slope at 0 is infinite.
        return others.clamp_min(torch.finfo(losses.dtype).tiny) ** self.gamma * losses


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


LossFactory = Callable[[], Loss]
