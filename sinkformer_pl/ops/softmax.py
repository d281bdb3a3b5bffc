"""Row softmax under a mask."""

from torch import Tensor

from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast


def softmax(scores: Tensor, *, mask: AttentionMask | None = None) -> Tensor:
    """Softmax over the keys that a query may meet.

    Args:
        scores: (..., Q, K), any float dtype; computed in at least float32.
        mask: real queries and keys, permitted pairs; entries of any finite value outside of it change nothing.

    Returns:
        Weights (..., Q, K) in the dtype of the scores: rows sum to 1, masked entries are exactly 0, and a query
        without a key has a row of zeros (and zero gradients).
    """
    mask = mask or AttentionMask()
    with no_autocast(scores):
        allowed = mask.allowed(scores)
        # A row without a single key is left unmasked and zeroed afterwards: -inf throughout would give NaN.
        reachable = allowed | ~allowed.any(-1, keepdim=True)
        weights = at_least_float32(scores).masked_fill(~reachable, float("-inf")).softmax(-1)
        return weights.where(allowed, 0.0).to(scores.dtype)
