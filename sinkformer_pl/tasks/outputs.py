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
