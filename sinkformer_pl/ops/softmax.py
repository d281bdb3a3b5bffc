"""Row softmax under a mask, attention with it through PyTorch's fused operator, and its relatives."""

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor

from sinkformer_pl.ops.forbidden import forbid_pairs
from sinkformer_pl.ops.mask import AttentionMask, Mask, is_forbidden
from sinkformer_pl.ops.precision import at_least_float32, no_autocast, per_head

EPSILON = 1e-6
"""Added to the denominator of `softpick`, as its authors do."""


def softmax(scores: Tensor, *, mask: Mask = None, sink: bool = False) -> Tensor:
    """Apply softmax over the keys that a query may meet.

    Args:
        scores: (..., Q, K), any float dtype; computed in at least float32.
        mask: real queries and keys, permitted pairs; entries of any finite value outside of it change nothing. Scores
            of -inf, or at or below -1e9, forbid their pair.
        sink: let every query also meet one more key of score 0 and leave its weight out, so that the weights are
            exp(x) / (1 + sum exp(x)): the "softmax1" of Miller 2023 (miller2023attention).

    Returns:
        Weights (..., Q, K) in the dtype of the scores: rows sum to 1, with a sink to at most 1; masked entries are
        exactly 0, and a query without a key has a row of zeros (and zero gradients).
    """
    mask = mask or AttentionMask()
    with no_autocast(scores):
        forbidden = is_forbidden(scores)
        allowed = mask.allowed(scores) & ~forbidden
        # A row without a single key is left unmasked and zeroed afterwards: -inf throughout would give NaN.
        reachable = allowed if sink else allowed | ~allowed.any(-1, keepdim=True)
        logits = at_least_float32(scores).masked_fill(forbidden, 0.0).masked_fill(~reachable, float("-inf"))
        weights = F.pad(logits, (0, 1)).softmax(-1)[..., :-1] if sink else logits.softmax(-1)
        return weights.where(allowed, 0.0).to(scores.dtype)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = None,
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    sink: bool = False,
) -> Tensor:
    """Multiply weights of `softmax` and values, by `torch.nn.functional.scaled_dot_product_attention`.

    Args:
        q: (B, H, Q, D), of any float dtype.
        k: (B, H, K, D), likewise.
        v: (B, H, K, Dv), likewise.
        mask: real queries and keys, permitted pairs; what is outside of it changes nothing while it is finite.
        scale: of the scores q·k, a number or a tensor (H,); None is 1 / sqrt(D).
        bias: added to the scaled scores, broadcastable to (B, H, Q, K); may forbid pairs, as in `forbid`.
        sink: as in `softmax`: one more key and value of zeros.

    Returns:
        (B, H, Q, Dv) in the dtype of q; 0 for a query without a key.
    """
    dtype, like_scores = q.dtype, q.new_empty(()).expand(*q.shape[:-1], k.shape[-2])
    bias, mask = forbid_pairs(bias, mask, like_scores)
    with no_autocast(q):
        if isinstance(scale, Tensor) or (bias is not None and bias.dtype != dtype):
            # The operator takes a number for scale and a bias of the dtype of q: half precision would round both.
            q, k, v = (at_least_float32(tensor) for tensor in (q, k, v))
        q, k, v = mask.without_padding(q, k, v)
        if isinstance(scale, Tensor):
            q, scale = q * per_head(scale.to(q.dtype)), 1.0
        if bias is not None:
            bias = bias.to(q.dtype).expand(*bias.shape[:-1], k.shape[-2])
        # Padded queries are zeroed afterwards instead of masked: a mask of the keys alone is Q times smaller.
        answered, reachable = mask.query_column(like_scores), mask.keys_met(like_scores)
        if reachable is not None and not sink:
            some_key = reachable.any(-1, keepdim=True)
            answered, reachable = answered & some_key, reachable | ~some_key
        if sink:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            bias = None if bias is None else F.pad(bias, (0, 1))
            reachable = None if reachable is None else F.pad(reachable, (0, 1), value=True)
        if bias is not None and reachable is not None:
            bias = bias.where(reachable, -torch.inf)
        output = F.scaled_dot_product_attention(q, k, v, reachable if bias is None else bias, scale=scale)
        if mask.query is not None or reachable is not None:
            output = output.where(answered, 0.0)
        return output.to(dtype)


def scalable_softmax(scores: Tensor, s: float | Tensor, *, mask: Mask = None) -> Tensor:
    """Apply softmax to s · log n · scores, with n the number of keys that the query may meet.

    Args:
        scores: (..., Q, K), any float dtype; computed in at least float32.
        s: a number, or a tensor (H,) of one a head.
        mask: as in `softmax`. Padding doesn't count in n; under `pairs` every query has its own n.

    Returns:
        Weights as those of `softmax`; a query with a single key gives it 1.

    References:
        Nakanishi 2025 (nakanishi2025scalable).
    """
    mask = mask or AttentionMask()
    with no_autocast(scores):
        return softmax(at_least_float32(scores) * _sharpness(scores, s, mask), mask=mask).to(scores.dtype)


def scalable_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: float | Tensor,
    *,
    mask: Mask = None,
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Multiply weights of `scalable_softmax` and values: `softmax_attention` of queries, and bias, times s · log n.

    Args:
        q: (B, H, Q, D), of any float dtype; half precision is computed in float32.
        k: (B, H, K, D), likewise.
        v: (B, H, K, Dv), likewise.
        s: a number, or a tensor (H,) of one a head.
        mask: as in `scalable_softmax`.
        scale: of q·k, a number or a tensor (H,); None is 1 / sqrt(D).
        bias: added to the scaled scores before they are multiplied by s · log n; broadcastable to (B, H, Q, K); may
            forbid pairs, as in `forbid`.

    Returns:
        (B, H, Q, Dv) in the dtype of q; 0 for a query without a key.
    """
    dtype, like_scores = q.dtype, q.new_empty(()).expand(*q.shape[:-1], k.shape[-2])
    bias, mask = forbid_pairs(bias, mask, like_scores)
    q, k, v = (at_least_float32(tensor) for tensor in (q, k, v))
    sharpness = _sharpness(like_scores, s, mask)
    bias = None if bias is None else bias * sharpness
    return softmax_attention(q * sharpness, k, v, mask=mask, scale=scale, bias=bias).to(dtype)


def softpick(scores: Tensor, *, mask: Mask = None) -> Tensor:
    """Apply rectified softmax, relu(e^x - 1) / (sum |e^x - 1| + 1e-6) over the keys that a query may meet.

    Args:
        scores: (..., Q, K), any float dtype; computed in at least float32.
        mask: as in `softmax`.

    Returns:
        Weights (..., Q, K) in the dtype of the scores: exactly 0 where a score is at most 0 and outside of the mask;
        rows sum to at most 1, and to 0 where no score is positive.

    References:
        Zuhri et al. 2025 (zuhri2025softpick).
    """
    mask = mask or AttentionMask()
    if not scores.shape[-1]:
        return scores
    with no_autocast(scores):
        # A score of 0 adds nothing to numerator and denominator, so it stands for a masked one.
        x = at_least_float32(scores).where(mask.allowed(scores), 0.0)
        positive = x.relu()
        # Both are divided by e^m, m = max(0, x), which drops out of the result and of its gradient: then no exponential
        # overflows, and the denominator is at least that of the largest score. In expm1, scores near 0 don't cancel.
        m = positive.detach().amax(-1, keepdim=True)
        minus_gain = (positive - m).exp() * (-positive).expm1()  # e^-m - e^(x-m) where x > 0, else 0
        minus_loss = (-m).exp() * ((x - positive).expm1().sum(-1, keepdim=True) - EPSILON)
        return (minus_gain / (minus_gain.sum(-1, keepdim=True) + minus_loss)).to(scores.dtype)


def _sharpness(scores: Tensor, s: float | Tensor, mask: AttentionMask) -> Tensor:
    """Compute the factor s · log n, broadcastable to (..., Q, 1); 0 for a query with a single key or none."""
    log_n = mask.num_keys(scores).log()
    return log_n * (per_head(s.to(log_n.dtype)) if isinstance(s, Tensor) else s)
