"""Sinkhorn's algorithm on attention scores, and how far a plan is from doubly stochastic."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast, per_head


class _Marginals(NamedTuple):
    """Log marginals, and where they are positive: rows (..., Q, 1), columns (..., 1, K); None is everywhere."""

    log_row: Tensor
    log_column: Tensor
    rows: Tensor | None
    columns: Tensor | None


def sinkhorn(
    scores: Tensor,
    n_iters: int = 3,
    *,
    mask: AttentionMask | None = None,
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
            unpadded scores give, and changes with no finite value of the padding. `pairs` is refused.
        lam: damping of the column step, in [0, 1], a number or a tensor (H,) of one value a head; 1 is Sinkhorn,
            0 is softmax, between them the column marginal is relaxed with strength rho = lam / (1 - lam).
        row_marginal: (..., Q) sums of the rows, at least 0, 0 at padding; differentiable. Default: 1 at each real query.
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
    if isinstance(n_iters, bool) or not isinstance(n_iters, int) or n_iters < 1:
        raise ValueError(f"n_iters must be an integer of at least 1 (1 is softmax), got {n_iters!r}")
    if not isinstance(lam, Tensor) and not 0 <= lam <= 1:
        raise ValueError(f"lam must be in [0, 1] (1 is Sinkhorn, 0 softmax), got {lam}")
    mask = mask or AttentionMask()
    _refuse_pairs(mask)
    with no_autocast(scores):
        log_row, log_column, rows, columns = _marginals(scores, mask, row_marginal, column_marginal)
        logits = row_logits = column_logits = at_least_float32(scores)
        if rows is not None and columns is not None:
            logits = logits.where(rows & columns, 0.0)
            # A row or column without mass keeps finite logits, for the sake of its gradient; its result is unused.
            row_logits = logits.masked_fill(rows & ~columns, float("-inf"))
            column_logits = logits.masked_fill(columns & ~rows, float("-inf"))
        damping = per_head(lam)
        f, g = torch.zeros_like(log_row), torch.zeros_like(log_column)
        for step in range(n_iters - n_iters % 2):
            if step % 2 == 0:
                f = _only(log_row - (row_logits + g).logsumexp(-1, keepdim=True), rows)
            else:
                g = _only(damping * (log_column - (column_logits + f).logsumexp(-2, keepdim=True)), columns)
        if n_iters % 2:
            # The last row step and the exponential in one, which makes rows exact to the last bit.
            plan = (row_logits + g).softmax(-1)
            plan = plan if row_marginal is None else plan * log_row.exp()
        else:
            plan = (logits + f + g).exp()
        if rows is not None and columns is not None:
            plan = plan.where(rows & columns, 0.0)
        return plan.to(scores.dtype)


def marginal_error(weights: Tensor, mask: AttentionMask | None = None) -> Tensor:
    """The residual of a plan: its largest distance from unit rows and from columns of Q/K, over real tokens.

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
    _refuse_pairs(mask)
    with no_autocast(weights):
        _, log_column, rows, columns = _marginals(weights, mask, None, None)
        plan = at_least_float32(weights)
        if rows is not None and columns is not None:
            plan = plan.where(rows & columns, 0.0)
        row_error = _only((plan.sum(-1, keepdim=True) - 1).abs(), rows)
        column_error = _only((plan.sum(-2, keepdim=True) / log_column.exp() - 1).abs(), columns)
        if not weights.shape[-1] or not weights.shape[-2]:
            return plan.new_zeros(weights.shape[:-2])
        return torch.maximum(row_error.amax((-2, -1)), column_error.amax((-2, -1)))


def _only(values: Tensor, places: Tensor | None) -> Tensor:
    return values if places is None else values.where(places, 0.0)


def _refuse_pairs(mask: AttentionMask) -> None:
    if mask.pairs is not None:
        raise NotImplementedError(
            "Sinkhorn can't honour forbidden pairs: a doubly stochastic matrix with that pattern may not exist (the "
            "only causal one is the identity); use Softmax, or a mask of queries and keys alone"
        )


def _marginals(scores: Tensor, mask: AttentionMask, row: Tensor | None, column: Tensor | None) -> _Marginals:
    if scores.ndim < 2:
        raise ValueError(f"scores need at least the two axes (Q, K), got shape {tuple(scores.shape)}")
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if (row is None) != (column is None):
        raise ValueError("give both row_marginal and column_marginal, or neither: their totals must be equal")
    if row is None and mask.query is None and mask.key is None:
        leading = (1,) * (scores.ndim - 2)
        log_ratio = math.log(max(scores.shape[-2], 1) / max(scores.shape[-1], 1))
        zeros = scores.new_zeros((*leading, scores.shape[-2], 1), dtype=dtype)
        return _Marginals(zeros, zeros.new_full((*leading, 1, scores.shape[-1]), log_ratio), None, None)
    queries, keys = mask.query_column(scores), mask.key_row(scores)
    if row is None or column is None:
        num_queries = queries.sum(-2, keepdim=True).to(dtype)
        num_keys = keys.sum(-1, keepdim=True).to(dtype)
        # A sample without queries or without keys has no mass at all.
        rows, columns = queries & (num_keys > 0), keys & (num_queries > 0)
        log_column = (num_queries.clamp(min=1) / num_keys.clamp(min=1)).log().expand(columns.shape)
        return _Marginals(torch.zeros_like(rows, dtype=dtype), log_column, rows, columns)
    wanted = (*scores.shape[:-2], scores.shape[-2]), (*scores.shape[:-2], scores.shape[-1])
    if (row.shape, column.shape) != wanted:
        raise ValueError(
            f"marginals {tuple(row.shape)} and {tuple(column.shape)} don't fit scores {tuple(scores.shape)}: they need "
            f"{wanted[0]} and {wanted[1]}"
        )
    row, column = row[..., None].to(dtype), column[..., None, :].to(dtype)
    _require_equal_totals(row.where(queries, 0.0), column.where(keys, 0.0))
    rows, columns = queries & (row > 0), keys & (column > 0)
    return _Marginals(row.where(rows, 1.0).log(), column.where(columns, 1.0).log(), rows, columns)


def _require_equal_totals(row: Tensor, column: Tensor) -> None:
    # Reading the totals would wait for a GPU and cut a compiled graph in two, so only eager CPU calls are checked.
    if row.device.type != "cpu" or torch.compiler.is_compiling():
        return
    totals = row.detach().sum((-2, -1)), column.detach().sum((-2, -1))
    if not torch.allclose(*totals, rtol=1e-3):
        raise ValueError(
            f"row_marginal and column_marginal must have equal totals in every sample, got {totals[0].tolist()} and "
            f"{totals[1].tolist()}"
        )
