"""Low-rank transport plans: queries to a few pivots, pivots to keys."""

from typing import NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast, per_head
from sinkformer_pl.ops.sinkhorn import require_odd_half_steps, sinkhorn
from sinkformer_pl.ops.sinkhorn_attention.api import sinkhorn_attention


class LowRankPlan(NamedTuple):
    """The factors of low-rank attention weights, `to_pivots @ to_keys`.

    Attributes:
        to_pivots: (B, H, Q, r), each row sums to 1.
        to_keys: (B, H, r, K), each row sums to 1.
    """

    to_pivots: Tensor
    to_keys: Tensor


def low_rank_sinkhorn(
    q: Tensor,
    k: Tensor,
    pivots: Tensor,
    masses: Tensor,
    n_iters: int = 5,
    *,
    scale: float | Tensor = 1.0,
    mask: Mask = None,
) -> LowRankPlan:
    """Glue two entropic couplings at r pivots: P1 of queries and pivots, P2 of pivots and keys.

    With z the masses, P1 has the marginals 1/Q and z and ends on its query step, P2 has z and 1/K and ends on its pivot
    step, Q and K the numbers of real queries and keys of the sample. The weights are Q P1 diag(1/z) P2, given as two
    factors, Q P1 and diag(1/z) P2. Multiply the values by the second factor first: no Q x K matrix is formed then, and
    time and memory are linear in Q + K.

    Args:
        q: queries (B, H, Q, D), any float dtype; computed in at least float32.
        k: keys (B, H, K, D).
        pivots: (H, r, D).
        masses: z, (H, r), at least 0, of sum 1 in each head.
        n_iters: number of half-steps of either coupling, odd.
        scale: multiplies the scores of queries with pivots and of pivots with keys, a number or a tensor (H,).
        mask: real queries and keys; padding leaves the marginals. `pairs` is refused.

    Returns:
        The factors, in float32 or float64. Padded queries have rows of 0 in the first, padded keys columns of 0 in the
        second, with gradients of exactly 0; where a sample has no key, the second is 0. Rows of the weights sum to 1
        exactly; columns sum to Q/K in the limit of many half-steps.

    Raises:
        ValueError: `n_iters` even or below 1, shapes that don't fit.
        NotImplementedError: a mask with `pairs`.

    References:
        Shahbazi et al. 2025 (shahbazi2025lotformer).
    """
    mask = _check(q, pivots, masses, n_iters, mask)
    q, k, _ = mask.without_padding(q, k, k)
    with no_autocast(q):
        q, k = at_least_float32(q), at_least_float32(k)
        pivots = pivots.to(q.dtype) * per_head(scale.to(q.dtype) if isinstance(scale, Tensor) else scale)
        to_pivots, to_keys = _marginals(q, k, masses.to(q.dtype), mask)
        coupling = sinkhorn(pivots @ k.mT, n_iters, row_marginal=to_keys[0], column_marginal=to_keys[1])
        return LowRankPlan(
            sinkhorn(q @ pivots.mT, n_iters, row_marginal=to_pivots[0], column_marginal=to_pivots[1]),
            coupling * _inverse(masses.to(q.dtype)),
        )


def low_rank_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pivots: Tensor,
    masses: Tensor,
    n_iters: int = 5,
    *,
    scale: float | Tensor = 1.0,
    mask: Mask = None,
) -> Tensor:
    """Multiply the weights of `low_rank_sinkhorn` and the values, by two calls of `sinkhorn_attention`.

    Arguments and errors as of `low_rank_sinkhorn`; v is (B, H, K, Dv). On a GPU half precision stays half precision
    between the two.

    Returns:
        (B, H, Q, Dv) in the dtype of v.
    """
    mask = _check(q, pivots, masses, n_iters, mask)
    dtype = v.dtype
    with no_autocast(q):
        if not q.is_cuda:
            q, k, v = at_least_float32(q), at_least_float32(k), at_least_float32(v)
        exact = torch.promote_types(q.dtype, torch.float32)
        to_pivots, to_keys = _marginals(q, k, masses.to(exact), mask)
        here = pivots.to(q.dtype).expand(q.shape[0], -1, -1, -1)
        all_pivots = None if mask.key is None else mask.key.new_ones(q.shape[0], pivots.shape[1])
        values = sinkhorn_attention(
            here, k, v, n_iters=n_iters, scale=scale, mask=AttentionMask(all_pivots, mask.key),
            row_marginal=to_keys[0], column_marginal=to_keys[1],
        )  # fmt: skip
        values = (values * _inverse(masses.to(exact))).to(q.dtype)
        all_pivots = None if mask.query is None else mask.query.new_ones(q.shape[0], pivots.shape[1])
        output = sinkhorn_attention(
            q, here, values, n_iters=n_iters, scale=scale, mask=AttentionMask(mask.query, all_pivots),
            row_marginal=to_pivots[0], column_marginal=to_pivots[1],
        )  # fmt: skip
        return output.to(dtype)


def _check(q: Tensor, pivots: Tensor, masses: Tensor, n_iters: int, mask: Mask) -> AttentionMask:
    require_odd_half_steps(n_iters)
    heads, width = q.shape[1], q.shape[-1]
    if pivots.ndim != 3 or pivots.shape[::2] != (heads, width) or masses.shape != pivots.shape[:2]:
        raise ValueError(
            f"pivots {tuple(pivots.shape)} and masses {tuple(masses.shape)} don't fit q {tuple(q.shape)}: they need "
            f"({heads}, r, {width}) and ({heads}, r)"
        )
    mask = mask or AttentionMask()
    if mask.pairs is not None:
        raise NotImplementedError(
            "LowRankSinkhorn never forms the pairs of queries and keys, so it can't forbid some; use Softmax, or a "
            "mask of queries and keys alone (AttentionMask.from_padding)"
        )
    return mask


def _marginals(
    q: Tensor, k: Tensor, masses: Tensor, mask: AttentionMask
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compute the sums of rows and columns of the coupling of queries and pivots, and of pivots and keys.

    A marginal of 0 takes padding out of a coupling. Marginals 1 and Q z, not 1/Q and z, give Q P1 at once.
    """
    real_queries = mask.query_column(q)[..., 0].expand(q.shape[:-1]).to(masses.dtype)
    real_keys = mask.key_row(k.mT)[..., 0, :].expand(k.shape[:-1]).to(masses.dtype)
    num_queries, num_keys = real_queries.sum(-1, keepdim=True), real_keys.sum(-1, keepdim=True)
    of_pivots = masses.where(num_keys > 0, 0.0)
    return (real_queries, num_queries * masses), (of_pivots, real_keys / num_keys.clamp(min=1))


def _inverse(masses: Tensor) -> Tensor:
    """Compute 1/z, (H, r, 1). A mass that underflowed to 0 leaves 0 in the coupling, not 0/0."""
    return 1 / masses.clamp(min=torch.finfo(masses.dtype).tiny)[..., None]
