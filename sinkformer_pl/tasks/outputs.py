"""Outputs of a classifier."""

from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """Output of `predict` for a batch.

    Attributes:
        index: (B,) int64, the place of each sample in its split.
        probabilities: (B, num_classes) float32; rows sum to 1, but for multi-label data.
    """

    index: Tensor  # type: ignore[assignment]
    probabilities: Tensor


class NetworkOutputs(NamedTuple):
    """Outputs of a network for a batch.

    Attributes:
        features: (B, D).
        logits: (B, num_classes).
    """

    features: Tensor
    logits: Tensor


def probabilities_of(logits: Tensor, *, multi_label: bool) -> Tensor:
    """Return the probabilities of the classes, (B, num_classes) float32: rows sum to 1, or each class stands alone.

    Args:
        logits: (B, num_classes).
        multi_label: whether a sample has any number of classes.
    """
    return logits.float().sigmoid() if multi_label else logits.float().softmax(-1)
