"""Sinkhorn's algorithm on attention scores, and how far a plan is from doubly stochastic."""

from typing import NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.forbidden import forbid
from sinkformer_pl.ops.marginals import Marginals, given_marginals, only, uniform_marginals
from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast, per_head


class Plan(NamedTuple):
    """The result of the half-steps.

    Attributes:
        weights: (..., Q, K), exp(scores + f + g) where there is mass, else 0.
        f: (..., Q, 1), potential of the queries; 0 without mass.
        g: (..., 1, K), potential of the keys; 0 without mass.
    """

    weights: Tensor
    f: Tensor
    g: Tensor


def sinkhorn(
    scores: Tensor,
    n_iters: int = 3,
    *,
    mask: Mask = None,
    lam: float | Tensor = 1.0,
    row_marginal: Tensor | None = None,
    column_marginal: Tensor | None = None,
) -> Tensor:
    """Alternate row and column normalization of exp(scores), rows first, in the log domain.

    With potentials f, g starting at 0, row marginal r and column marginal c, the half-steps are in turn
    f <- log r - logsumexp_j(scores + g) and g <- lam (log c - logsumexp_i(scores + f)); the weights are
    exp(scores + f + g). `n_iters` counts half-steps, as every published result does: 1 is softmax, odd counts end on
    rows, so that rows are exact and columns hold in the limit.

    This is the plain form, differentiated by autograd through every half-step; it keeps a few Q x K tensors for each.

    Args:
        scores: (..., Q, K), any float dtype; computed in at least float32. The first of the leading axes is the
            sample; a 2-D input is one sample.
        n_iters: number of half-steps, at least 1.
        mask: real queries and keys. Padding leaves the marginals too: the real block of a padded batch is what the
            unpadded scores give, and changes with no finite value of the padding. `pairs` is refused. Scores of -inf,
            or at or below -1e9, forbid their pair (`forbid`): a key that no real query may meet in any head leaves the
            marginals, too; elsewhere the weight is 0, and `marginal_error` shows what can't be reached.
        lam: damping of the column step, in [0, 1], a number or a tensor (H,) of one value a head; 1 is Sinkhorn,
            0 is softmax, between them the column marginal is relaxed with strength rho = lam / (1 - lam).
        row_marginal: (..., Q) sums of the rows, at least 0, 0 at padding; differentiable. Default: 1 at each real
            query.
        column_marginal: (..., K) sums of the columns, likewise. Default: Q/K at each real key, Q and K the numbers
            of real queries and keys of the sample. Both marginals or neither, with equal totals.

    Returns:
        Weights (..., Q, K) in the dtype of the scores. Masked entries, and rows and columns whose marginal is 0, are
        exactly 0 with a gradient of exactly 0.

    Raises:
        ValueError: `n_iters` below 1, `lam` out of range, one marginal without the other, totals that differ, shapes
            that don't fit.
        TypeError: scores of no float dtype.
        NotImplementedError: a mask with `pairs`.

    References:
        Sander et al. 2022 (sander2022sinkformers), section 3; Cuturi 2013 (cuturi2013sinkhorn). The damped step is
        that of unbalanced transport, Chizat et al. 2018 (chizat2018scaling).
    """
    require_half_steps(n_iters)
    require_lam(lam)
    if scores.ndim < 2:
        raise ValueError(f"scores need at least the two axes (Q, K), got shape {tuple(scores.shape)}")
    scores, mask = _forbid(scores, mask)
    with no_autocast(scores):
        marginals = uniform_marginals(scores, mask)
        if row_marginal is not None and column_marginal is not None:
            marginals = given_marginals(scores, mask, row_marginal, column_marginal)
        elif row_marginal is not None or column_marginal is not None:
            raise ValueError("give both row_marginal and column_marginal, or neither: their totals must be equal")
        plan = half_steps(at_least_float32(scores), marginals, per_head(lam), n_iters)
        return plan.weights.to(scores.dtype)


def marginal_error(weights: Tensor, mask: Mask = None) -> Tensor:
    """Compute the residual of a plan: its largest distance from unit rows and columns of Q/K, over real tokens.

    Args:
        weights: (..., Q, K), in practice (B, H, Q, K).
        mask: real queries and keys; Q and K below are their counts. `pairs` is refused.

    Returns:
        (...), in practice (B, H), in at least float32: the larger of max_i |sum_j P_ij - 1| and
        max_j |(K/Q) sum_i P_ij - 1|; 0 for a sample without queries or without keys.

    Raises:
        NotImplementedError: a mask with `pairs`.
    """
    mask = mask or AttentionMask()
    with no_autocast(weights):
        _, log_column, rows, columns = uniform_marginals(weights, mask)
        plan = at_least_float32(weights)
        if rows is not None and columns is not None:
            plan = plan.where(rows & columns, 0.0)
        row_error = only((plan.sum(-1, keepdim=True) - 1).abs(), rows)
        column_error = only((plan.sum(-2, keepdim=True) / log_column.exp() - 1).abs(), columns)
        if not weights.shape[-1] or not weights.shape[-2]:
            return plan.new_zeros(weights.shape[:-2])
        return torch.maximum(row_error.amax((-2, -1)), column_error.amax((-2, -1)))


def half_steps(
    scores: Tensor,
    marginals: Marginals,
    lam: float | Tensor,
    n_iters: int,
    *,
    detach_columns: bool = False,
) -> Plan:
    """Run the half-steps in the log domain, in the dtype of the scores, which is at least float32.

    Args:
        scores: (..., Q, K); under marginals with places, -inf forbids a pair.
        marginals: of the plan.
        lam: damping of the column step, a number or broadcastable to (..., 1, 1).
        n_iters: number of half-steps.
        detach_columns: hold the potential of the keys constant in the gradient.
    """
    log_row, log_column, rows, columns = marginals
    logits = row_logits = column_logits = scores
    allowed: Tensor | None = None
    if rows is not None and columns is not None:
        allowed = rows & columns & ~scores.isneginf()
        # Under forbidden pairs some have no entry left in their head.
        rows, columns = allowed.any(-1, keepdim=True), allowed.any(-2, keepdim=True)
        logits = logits.where(allowed, 0.0)
        # A row or column without mass keeps finite logits, for the sake of its gradient; its result is unused.
        row_logits = logits.masked_fill(rows & ~allowed, float("-inf"))
        column_logits = logits.masked_fill(columns & ~allowed, float("-inf"))
    f, g = torch.zeros_like(log_row), torch.zeros_like(log_column)
    for step in range(n_iters):
        if step % 2 == 0:
            f = only(log_row - (row_logits + g).logsumexp(-1, keepdim=True), rows)
        else:
            g = only(lam * (log_column - (column_logits + f).logsumexp(-2, keepdim=True)), columns)
            g = g.detach() if detach_columns else g
    # The last row step and the exponential in one make rows exact to the last bit.
    weights = (row_logits + g).softmax(-1) * log_row.exp() if n_iters % 2 else (logits + f + g).exp()
    if allowed is not None:
        weights = weights.where(allowed, 0.0)
    return Plan(weights, f, g)


def _forbid(scores: Tensor, mask: Mask) -> tuple[Tensor, AttentionMask]:
    cleaned, mask = forbid(scores, mask, scores)
    assert cleaned is not None
    return cleaned, mask


def require_half_steps(n_iters: int) -> None:
    """Raise a ValueError unless `n_iters` is an integer of at least 1."""
    if isinstance(n_iters, bool) or not isinstance(n_iters, int) or n_iters < 1:
        raise ValueError(f"n_iters must be an integer of at least 1 (1 is softmax), got {n_iters!r}")


def require_odd_half_steps(n_iters: int, *, least: int = 1, of: str = "") -> None:
    """Raise a ValueError, with the name `of` what they belong to, unless `n_iters` is odd and at least `least`."""
    if isinstance(n_iters, bool) or not isinstance(n_iters, int) or n_iters < least or n_iters % 2 == 0:
        whose, at_least = f"{of}: " * bool(of), f" of at least {least}" * (least > 1)
        raise ValueError(
            f"{whose}n_iters counts half-steps and must end on rows: use an odd number{at_least}, got {n_iters!r}"
        )


def require_lam(lam: float | Tensor) -> None:
    """Raise a ValueError if `lam` is a number outside of [0, 1]."""
    if not isinstance(lam, Tensor) and not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1] (1 is Sinkhorn, 0 softmax), got {lam}")
