"""Sparse relatives of the row softmax under a mask: sparsemax, 1.5-entmax and alpha-entmax.

With t = score - threshold, a weight is p = [1 + (alpha - 1) t]_+ ^ (1 / (alpha - 1)), the threshold such that rows sum
to 1; alpha = 1 is the limit p = exp(t), softmax. The derivative of all of them is a function of p and alpha alone.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.ops.mask import AttentionMask, Mask, is_forbidden
from sinkformer_pl.ops.precision import at_least_float32, no_autocast, per_head


def sparsemax(scores: Tensor, *, mask: Mask = None) -> Tensor:
    """Find the point of the simplex nearest to the scores, over the keys that a query may meet: alpha-entmax at 2.

    Exact, by sorting each row: O(K log K) a query.

    Args:
        scores: (..., Q, K), any float dtype; computed in at least float32.
        mask: real queries and keys, permitted pairs; entries of any finite value outside of it change nothing. Scores
            of -inf, or at or below -1e9, forbid their pair.

    Returns:
        Weights (..., Q, K) in the dtype of the scores: rows sum to 1, keys 1 or more below the best one get exactly
        0. Masked entries are exactly 0, and a query without a key has a row of zeros (and zero gradients). A row with
        NaN or inf has NaN.

    Raises:
        TypeError: scores of no float dtype.

    References:
        Martins and Astudillo 2016 (martins2016sparsemax), algorithm 1.
    """
    return _weights(scores, 2.0, mask, _by_sorting_2)


def entmax15(scores: Tensor, *, mask: Mask = None) -> Tensor:
    """Apply alpha-entmax at alpha = 1.5, halfway from softmax to sparsemax.

    Exact, by sorting each row: O(K log K) a query.

    Args:
        scores: (..., Q, K), any float dtype; computed in at least float32.
        mask: as for `sparsemax`.

    Returns:
        Weights (..., Q, K) as those of `sparsemax`, except that keys get exactly 0 at 2 or more below the best one.

    Raises:
        TypeError: scores of no float dtype.

    References:
        Peters et al. 2019 (peters2019entmax).
    """
    return _weights(scores, 1.5, mask, _by_sorting_15)


def entmax(scores: Tensor, alpha: float | Tensor, *, mask: Mask = None) -> Tensor:
    """Find argmax_p p·scores + H(p) over the simplex, with H(p) = sum_j (p_j - p_j^alpha) / (alpha (alpha - 1)).

    The larger alpha, the sparser; 1 is softmax, 2 sparsemax. By bisection of the threshold to the last bit of the
    dtype: O(K) a query, but some 25 passes over the scores in float32 and twice as many in float64, so at 1.5 and 2
    `entmax15` and `sparsemax` are faster.

    It is sound down to softmax: powers 1 / (alpha - 1) are written with log1p, and the derivative in alpha, whose
    published form is a difference of terms in 1 / (alpha - 1)^2, with the entire function (e^w - 1 - w) / w^2. At
    alpha = 1 both are those of the limit.

    Args:
        scores: (..., Q, K), any float dtype; computed in at least float32.
        alpha: a finite number of at least 1, or a tensor: () or (H,) of one value a head, for scores (..., H, Q, K).
            Differentiable. Values of a tensor are checked on the CPU only; elsewhere those below 1 are undefined.
            Above 2 slopes are unbounded where a weight leaves 0, and float32 is good for 3 digits instead of 6.
        mask: as for `sparsemax`.

    Returns:
        Weights (..., Q, K) as those of `sparsemax`, except that keys get exactly 0 at 1 / (alpha - 1) or more below
        the best one.

    Raises:
        ValueError: alpha below 1 or not finite, or of a shape that doesn't fit.
        TypeError: scores of no float dtype.

    References:
        Peters et al. 2019 (peters2019entmax); the derivative in alpha is that of Correia et al. 2019
        (correia2019adaptively).
    """
    _require_alpha(alpha, scores)
    return _weights(scores, alpha, mask, _by_bisection)


Solver = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Weights of finite or -inf scores whose row maximum is 0, given alpha and the number of keys of each row."""


def _weights(scores: Tensor, alpha: float | Tensor, mask: Mask, solve: Solver) -> Tensor:
    mask = mask or AttentionMask()
    with no_autocast(scores):
        x = at_least_float32(scores)
        allowed = mask.allowed(x) & ~is_forbidden(x)
        if not scores.shape[-1]:
            return scores.where(allowed, 0.0)
        if not isinstance(alpha, Tensor):
            alpha = torch.full((), alpha, dtype=x.dtype, device=x.device)
        return _Entmax.apply(x, per_head(alpha.to(x)), allowed, solve).to(scores.dtype)


class _Entmax(torch.autograd.Function):
    """Weights by a solver, and their derivative in closed form.

    Backward is made of differentiable operations on the weights, so second derivatives are right too.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, alpha: Tensor, allowed: Tensor, solve: Solver) -> Tensor:
        # Not -inf: a row without a key must stay free of NaN until it is zeroed.
        scores = scores.where(allowed, torch.finfo(scores.dtype).min)
        p = solve(scores - scores.amax(-1, keepdim=True), alpha, allowed.sum(-1, keepdim=True))
        p = (p / p.sum(-1, keepdim=True)).where(allowed, 0.0)
        ctx.save_for_backward(p, alpha)
        return p

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (p, alpha), (g,) = ctx.saved_tensors, upstream
        support = p > 0
        inside = p.where(support, 1.0)
        s = inside.pow(2 - alpha).where(support, 0.0)
        centred = g - (s * g).sum(-1, keepdim=True) / s.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)
        dalpha = None
        if ctx.needs_input_grad[1]:
            log_p = inside.log()
            at_fixed_threshold = -p * log_p.square() * _second_remainder((1 - alpha) * log_p)
            dalpha = (at_fixed_threshold * centred).sum_to_size(alpha.shape)
        return s * centred, dalpha, None, None


def _by_sorting_2(x: Tensor, alpha: Tensor, num_keys: Tensor) -> Tensor:
    ordered, counts = _descending(x)
    excess = ordered.cumsum(-1) - 1
    size = _of_support(counts * ordered > excess)
    return (x - excess.gather(-1, size - 1) / size).relu()


def _by_sorting_15(x: Tensor, alpha: Tensor, num_keys: Tensor) -> Tensor:
    x = x / 2
    ordered, counts = _descending(x)
    mean = ordered.cumsum(-1) / counts
    variance = ordered.square().cumsum(-1) / counts - mean.square()
    thresholds = mean - (1 / counts - variance).clamp(min=0).sqrt()
    size = _of_support(thresholds <= ordered)
    threshold = thresholds.gather(-1, size - 1)
    # The variance is a difference that loses digits; a step of Newton's method gets them back.
    root = (x - threshold).relu()
    error = root.square().sum(-1, keepdim=True) - 1
    return (x - threshold - error / (2 * root.sum(-1, keepdim=True))).relu().square()


def _of_support(inside: Tensor) -> Tensor:
    """Count the keys with weight; at least 1, for a row with NaN or inf to give NaN instead of an index below 0."""
    return inside.sum(-1, keepdim=True).clamp(min=1)


def _descending(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sort each row in descending order, and count 1, ..., K; nothing below -1, where no threshold is."""
    counts = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
    return x.clamp(min=-1).sort(-1, descending=True).values, counts


def _by_bisection(x: Tensor, alpha: Tensor, num_keys: Tensor) -> Tensor:
    """Search the logarithm of the largest weight, in [-log(num_keys), 0], from which the others follow."""
    resolution = torch.finfo(x.dtype).eps
    excess = (alpha - 1).clamp(min=resolution)

    def ratios(log_largest: Tensor) -> Tensor:
        slope = excess * (-excess * log_largest).exp()
        return (x * slope).clamp_(min=-1).log1p_().div_(excess).exp_()

    width = num_keys.clamp(min=1).to(x.dtype).log() * torch.ones_like(excess)
    low = -width
    for _ in range(3 - round(math.log2(resolution))):
        width = width / 2
        middle = low + width
        low = middle.where(ratios(middle).sum(-1, keepdim=True) * middle.exp() <= 1, low)
    return ratios(low)


def _second_remainder(w: Tensor) -> Tensor:
    """Compute (e^w - 1 - w) / w^2, for w of at least 0."""
    small = w < 0.3
    near, far = w.where(small, 0.0), w.where(~small, 1.0)
    series = torch.zeros_like(w)
    for n in range(13, 1, -1):
        series = series * near + 1 / math.factorial(n)
    return series.where(small, (far.expm1() - far) / far.square())


def _require_alpha(alpha: float | Tensor, scores: Tensor) -> None:
    if not isinstance(alpha, Tensor):
        if not 1 <= alpha < math.inf:
            raise ValueError(f"alpha must be finite and at least 1 (1 is softmax, 2 sparsemax), got {alpha}")
        return
    heads = scores.shape[-3] if scores.ndim > 2 else None
    if alpha.ndim and tuple(alpha.shape) != (heads,):
        raise ValueError(
            f"alpha must be a number or a tensor () or (H,), one value a head, got shape {tuple(alpha.shape)} for "
            f"scores (..., H, Q, K) of shape {tuple(scores.shape)}"
        )
    # Reading values would wait for a GPU and cut a compiled graph in two, so only eager CPU calls are checked.
    if alpha.device.type == "cpu" and not torch.compiler.is_compiling() and not ((alpha >= 1) & alpha.isfinite()).all():
        raise ValueError(f"alpha must be finite and at least 1 (1 is softmax, 2 sparsemax), got {alpha.tolist()}")
