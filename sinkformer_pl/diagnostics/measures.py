"""Measures of attention weights (B, H, Q, K) under an AttentionMask, in at least float32.

What isn't there is NaN: a padded query or key, the entropy of a query without mass. Q and K are the numbers of real
queries and keys of a sample, so that a padded sample measures as it does alone.
"""

import torch
from torch import Tensor

from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.precision import at_least_float32
from sinkformer_pl.ops.sinkhorn import marginal_error

QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
"""Quantiles of the row and column sums in a summary."""

MEASURES = (
    *(f"row_sum_{name}" for name in QUANTILES),
    *(f"column_sum_{name}" for name in QUANTILES),
    "marginal_error",
    "entropy",
    "relative_entropy",
    "effective_rank",
    "sink_share",
    "zero_share",
)
"""The keys of a summary."""


def row_sums(weights: Tensor, mask: Mask = None) -> Tensor:
    """Sum over the keys, (B, H, Q): how much each query attends; 1 under most normalizations."""
    mask = mask or AttentionMask()
    sums = _real(weights, mask).sum(-1)
    return sums.where(mask.query_column(weights)[..., 0], torch.nan)


def column_sums(weights: Tensor, mask: Mask = None) -> Tensor:
    """Sum over the queries, times K/Q, (B, H, K): how much attention each key receives; 1 everywhere is even."""
    mask = mask or AttentionMask()
    queries, keys = mask.query_column(weights), mask.key_row(weights)
    sums = _real(weights, mask).sum(-2) * keys.sum(-1) / queries.sum(-2)
    return sums.where(keys[..., 0, :], torch.nan)


def entropy(weights: Tensor, mask: Mask = None) -> Tensor:
    """Compute the entropy of each query's weights in nats, (B, H, Q): 0 for a single key, log K for all keys alike.

    Of the absolute weights divided by their sum, where a normalization doesn't make rows of non-negative weights that
    sum to 1.
    """
    return _entropy(_real(weights, mask or AttentionMask()))


def relative_entropy(weights: Tensor, mask: Mask = None) -> Tensor:
    """Compute the entropy over log K, (B, H, Q), K the number of keys that the query may meet; NaN where that is 1."""
    keys = (mask or AttentionMask()).num_keys(weights)[..., 0]
    return entropy(weights, mask) / keys.log().where(keys > 1, torch.nan)


def effective_rank(weights: Tensor, mask: Mask = None) -> Tensor:
    """Compute the exponential of the entropy of the singular values divided by their sum, (B, H), from 1 to min(Q, K).

    1 where all queries attend alike, the size for a permutation; NaN without mass.

    References:
        Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    return _entropy(torch.linalg.svdvals(_real(weights, mask or AttentionMask()))).exp()


def sink_share(weights: Tensor, mask: Mask = None) -> Tensor:
    """Compute the share of all mass on the heaviest key of the sample and head, (B, H); 1/K when even, NaN without."""
    received = _real(weights, mask or AttentionMask()).abs().sum(-2)
    return received.amax(-1) / received.sum(-1)


def zero_share(weights: Tensor, mask: Mask = None) -> Tensor:
    """Compute the share of exact zeros among the pairs that may meet, (B, H); NaN without pairs."""
    allowed = (mask or AttentionMask()).allowed(weights).expand(weights.shape)
    return ((weights == 0) & allowed).sum((-2, -1)) / allowed.sum((-2, -1))


def summary(weights: Tensor, mask: Mask = None) -> dict[str, Tensor]:
    """Compute all measures of each head over a batch, each (H,), by the names in `MEASURES`.

    Quantiles are over the queries or keys of all samples, `marginal_error` is the largest of them (NaN under a mask
    with pairs, which leave no marginals to keep), the others are means over queries or samples.
    """
    rows, columns = (_by_head(sums(weights, mask)) for sums in (row_sums, column_sums))
    error = torch.full((weights.shape[1],), torch.nan, device=weights.device)
    if mask is None or mask.pairs is None:
        error = marginal_error(weights, mask).amax(0)
    values = [*_quantiles(rows), *_quantiles(columns), error]
    for measure in (entropy, relative_entropy, effective_rank, sink_share, zero_share):
        values.append(_by_head(measure(weights, mask)).nanmean(-1))
    return dict(zip(MEASURES, values, strict=True))


def _real(weights: Tensor, mask: AttentionMask) -> Tensor:
    weights = at_least_float32(weights)
    return weights.where(mask.allowed(weights), 0.0)


def _entropy(masses: Tensor) -> Tensor:
    """Compute the entropy over the last axis; NaN without mass."""
    masses = masses.abs()
    shares = masses / masses.sum(-1, keepdim=True)
    return -torch.special.xlogy(shares, shares).sum(-1)


def _by_head(values: Tensor) -> Tensor:
    """Rearrange (B, H) or (B, H, N) to (H, all)."""
    return values.transpose(0, 1).flatten(1)


def _quantiles(values: Tensor) -> Tensor:
    wanted = torch.tensor(list(QUANTILES.values()), dtype=values.dtype, device=values.device)
    return values.nanquantile(wanted, dim=-1)
