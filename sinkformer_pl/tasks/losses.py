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

    Attributes:
        takes_label_smoothing: whether `mean` heeds label smoothing; a task refuses it otherwise.
    """

    takes_label_smoothing: ClassVar[bool] = False

    @abstractmethod
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each sample, (B,), of the dtype of the logits or a wider one.

        Args:
            logits: (B, C).
            target: (B,) int64 class indices.
        """

    def mean(self, logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Return what a training step descends, the mean over its samples.

        Args:
            logits: (B, C).
            target: (B,) int64 class indices.
            label_smoothing: share of the target spread over all classes; 0 unless the class takes it.
        """
        return self(logits, target).mean()


class CrossEntropy(Loss):
    """The negative log-likelihood of the classes."""

    takes_label_smoothing = True

    @override
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="none")

    @override
    def mean(self, logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(logits, target, label_smoothing=label_smoothing)


class FocalLoss(Loss):
    """Cross-entropy in which samples weigh less the likelier their class is held: times (1 - p) ** gamma.

    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017; their alpha is a class weight.

    Args:
        gamma: 0 or more; 0 is cross-entropy.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        if not gamma >= 0:
            raise UserError(f"model.loss.gamma is {gamma}: give 0 or more")
        self.gamma = gamma

    @override
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, target, reduction="none")
        # Of powers below 1 the slope at 0 is infinite.
        others = (-torch.expm1(-losses)).clamp_min(torch.finfo(losses.dtype).tiny)
        return others**self.gamma * losses


LossFactory = Callable[[], Loss]
