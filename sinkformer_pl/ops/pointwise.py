"""Weights that depend on one score each and on how many keys there are: sigmoid and ReLU attention."""

from torch import Tensor

from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast


def sigmoid(scores: Tensor, *, bias: float | None = None, mask: Mask = None) -> Tensor:
    """Apply the sigmoid to scores + bias.

    Args:
        scores: (..., Q, K), any float dtype; computed in at least float32.
        bias: a number; None is -log n, with n the number of keys that the query may meet: zero scores then have weights
            of 1 / (n + 1).
        mask: real queries and keys, permitted pairs; entries of any finite value outside of it change nothing. Padding
            doesn't count in n; under `pairs` every query has its own n.

    Returns:
        Weights (..., Q, K) in the dtype of the scores, between 0 and 1, exactly 0 outside of the mask; the sums of rows
        are free.

    References:
        Ramapuram et al. 2024 (ramapuram2024sigmoid).
    """
    mask = mask or AttentionMask()
    with no_autocast(scores):
        shift = -mask.num_keys(scores).log() if bias is None else bias
        weights = (at_least_float32(scores) + shift).sigmoid()
        return weights.where(mask.allowed(scores), 0.0).to(scores.dtype)


def relu(scores: Tensor, *, mask: Mask = None) -> Tensor:
    """Divide the positive part of the scores by the number of keys that the query may meet.

    Args:
        scores: (..., Q, K), any float dtype; computed in at least float32.
        mask: as in `sigmoid`.

    Returns:
        Weights (..., Q, K) in the dtype of the scores, exactly 0 where a score is at most 0 and outside of the mask;
        the sums of rows are free.

    References:
        Wortsman et al. 2023 (wortsman2023relu).
    """
    mask = mask or AttentionMask()
    with no_autocast(scores):
        weights = at_least_float32(scores).where(mask.allowed(scores), 0.0).relu() / mask.num_keys(scores)
        return weights.to(scores.dtype)
