"""The marginals of a transport plan between the real queries and keys of each sample."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.mask import AttentionMask, Mask


class Marginals(NamedTuple):
    """Log marginals, and where there is mass.

    Attributes:
        log_row: broadcastable to (..., Q, 1), 0 where there is no mass.
        log_column: broadcastable to (..., 1, K), likewise.
        rows: bool, likewise, the queries with mass; None is all.
        columns: bool, the keys with mass; None is all. Both are None or neither.
    """

    log_row: Tensor
    log_column: Tensor
    rows: Tensor | None
    columns: Tensor | None


def uniform_marginals(scores: Tensor, mask: AttentionMask) -> Marginals:
    """Put 1 at each real query and Q/K at each real key, Q and K their numbers in the sample.

    A sample without queries or without keys has no mass at all.

    Args:
        scores: (..., Q, K); only shape, device and dtype matter.
        mask: real queries and keys.

    Raises:
        NotImplementedError: a mask with `pairs`.
    """
    _require_no_pairs(mask)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    if mask.query is None and mask.key is None:
        leading = (1,) * (scores.ndim - 2)
        log_ratio = math.log(max(scores.shape[-2], 1) / max(scores.shape[-1], 1))
        zeros = torch.zeros((*leading, scores.shape[-2], 1), dtype=dtype, device=scores.device)
        return Marginals(zeros, zeros.new_full((*leading, 1, scores.shape[-1]), log_ratio), None, None)
    log_row, log_column = uniform_log_marginals(scores, mask)
    rows, columns = log_row > -torch.inf, log_column > -torch.inf
    return Marginals(only(log_row, rows), only(log_column, columns), rows, columns)


def uniform_log_marginals(scores: Tensor, mask: AttentionMask) -> tuple[Tensor, Tensor]:
    """Take the logarithms of uniform marginals: (..., Q, 1) and (..., 1, K) or broadcastable to it, -inf without mass.

    Arguments and errors as of `uniform_marginals`, in fewer operations: small ones, but a GPU waits for each.
    """
    _require_no_pairs(mask)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    queries, keys = mask.query_column(scores), mask.key_row(scores)
    num_queries, num_keys = queries.sum(-2, keepdim=True, dtype=dtype), keys.sum(-1, keepdim=True, dtype=dtype)
    # A sample without queries has no mass at its keys, one without keys none at its queries.
    column = torch.where(keys, num_queries / num_keys, 0.0)
    return (queries & (num_keys > 0)).to(dtype).log(), column.log()


def _require_no_pairs(mask: AttentionMask) -> None:
    if mask.pairs is not None:
        raise NotImplementedError(
            "Sinkhorn can't honour forbidden pairs: a doubly stochastic matrix with that pattern may not exist (the "
            "only causal one is the identity); use Softmax, or a mask of queries and keys alone, which "
            "AttentionMask.from_padding makes of padding"
        )


def given_marginals(scores: Tensor, mask: AttentionMask, row: Tensor, column: Tensor) -> Marginals:
    """Take the sums that a caller wants, at the real queries and keys.

    Args:
        scores: (..., Q, K); only shape, device and dtype matter.
        mask: real queries and keys, no pairs.
        row: (..., Q) sums of the rows, at least 0.
        column: (..., K) sums of the columns, at least 0.

    Raises:
        ValueError: shapes that don't fit, totals that differ.
    """
    wanted = (*scores.shape[:-2], scores.shape[-2]), (*scores.shape[:-2], scores.shape[-1])
    if (row.shape, column.shape) != wanted:
        raise ValueError(
            f"marginals {tuple(row.shape)} and {tuple(column.shape)} don't fit scores {tuple(scores.shape)}: they need "
            f"{wanted[0]} and {wanted[1]}"
        )
    dtype = torch.promote_types(scores.dtype, torch.float32)
    row, column = row[..., None].to(dtype), column[..., None, :].to(dtype)
    queries, keys = mask.query_column(scores), mask.key_row(scores)
    _require_equal_totals(row.where(queries, 0.0), column.where(keys, 0.0))
    rows, columns = queries & (row > 0), keys & (column > 0)
    return Marginals(row.where(rows, 1.0).log(), column.where(columns, 1.0).log(), rows, columns)


def unit_rows(query: Tensor, column: Tensor, mask: Mask) -> Tensor:
    """Make the sums of rows that go with those of columns: 1 at each real query, 0 where the columns have no mass.

    Args:
        query: (..., Q, D); only its shape matters.
        column: (..., K) sums of the columns.
        mask: real queries.

    Returns:
        (..., Q) in the dtype of the columns.
    """
    real = (mask or AttentionMask()).query_column(query)[..., 0] & (column > 0).any(-1, keepdim=True)
    return real.to(column.dtype).expand(query.shape[:-1])


def only(values: Tensor, places: Tensor | None) -> Tensor:
    """Keep values where there is mass, 0 elsewhere."""
    return values if places is None else values.where(places, 0.0)


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
