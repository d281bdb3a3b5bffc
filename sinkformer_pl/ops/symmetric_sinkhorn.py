"""Sinkhorn's algorithm on symmetric scores, with one potential for queries and keys."""

import torch
from torch import Tensor

from sinkformer_pl.ops.marginals import only, uniform_marginals
from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast
from sinkformer_pl.ops.sinkhorn import require_half_steps


def symmetric_sinkhorn(scores: Tensor, n_iters: int = 3, *, mask: Mask = None) -> Tensor:
    """Compute the plan of `sinkhorn` for scores that equal their transpose, whose two potentials are one.

    With S(f)_i = -logsumexp_j(scores_ij + f_j) and f = 0 to begin with, all steps but the last are f <- (f + S(f)) / 2;
    the weights are exp(scores_ij + S(f)_i + f_j). Near the limit P, whose eigenvalues are 1 = p_1 > p_2 >= ..., a step
    multiplies the error by at most max_m (1 - p_m) / 2, m from 2 on, and a half-step of `sinkhorn` by p_2. So where
    exp(scores) is positive definite, as for scores q·q, each step halves the error or better, however sharp the
    scores: faster than `sinkhorn` where p_2 > 1/2, slower where scores are nearly flat.

    Args:
        scores: (..., N, N), any float dtype, equal to their transpose (not checked); computed in at least float32. The
            first of the leading axes is the sample; a 2-D input is one sample.
        n_iters: number of steps, the last included, at least 1. 1 is softmax.
        mask: real tokens, as one tensor for both `query` and `key`; entries of any finite value outside of it change
            nothing. `pairs` is refused.

    Returns:
        Weights (..., N, N) in the dtype of the scores: rows sum to 1 exactly, columns to 1 and the weights are
        symmetric in the limit. Masked entries are exactly 0 with a gradient of exactly 0.

    Raises:
        ValueError: `n_iters` below 1, scores that aren't square, a mask whose queries and keys are two tensors.
        TypeError: scores of no float dtype.
        NotImplementedError: a mask with `pairs`.

    References:
        Knight et al. 2014 (knight2014symmetry), in the log domain; Feydy et al. 2019 (feydy2019interpolating).
    """
    require_half_steps(n_iters)
    if scores.ndim < 2 or scores.shape[-2] != scores.shape[-1]:
        raise ValueError(f"symmetric scores need the shape (..., N, N), got {tuple(scores.shape)}")
    mask = mask or AttentionMask()
    if mask.query is not mask.key:
        raise ValueError("symmetric scores need one mask: give the same tensor as query and key of AttentionMask")
    with no_autocast(scores):
        log_row, _, rows, columns = uniform_marginals(scores, mask)
        logits = at_least_float32(scores)
        if rows is not None and columns is not None:
            # A row without mass keeps finite logits, for the sake of its gradient; its result is unused.
            logits = logits.where(rows & columns, 0.0).masked_fill(rows & ~columns, float("-inf"))
        f = torch.zeros_like(log_row)
        for _ in range(n_iters - 1):
            f = only((f - (logits + f.mT).logsumexp(-1, keepdim=True)) / 2, rows)
        # The last step and the exponential in one make rows exact to the last bit.
        weights = (logits + f.mT).softmax(-1)
        if rows is not None and columns is not None:
            weights = weights.where(rows & columns, 0.0)
        return weights.to(scores.dtype)
