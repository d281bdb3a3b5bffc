"""The operator in plain operations of PyTorch, for exported programs: they run where this package isn't installed."""

from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.ops.marginals import Marginals
from sinkformer_pl.ops.precision import at_least_float32
from sinkformer_pl.ops.sinkhorn_attention.inputs import OperatorInputs
from sinkformer_pl.ops.sinkhorn_attention.reference import reference_attention


def plain_sinkhorn_attention(*inputs: Any) -> tuple[Tensor, ...]:
    """Compute the output of the operator, with half-steps unrolled; the state, for its backward alone, is empty."""
    x = OperatorInputs(*inputs)
    marginals = _marginals(x)
    q, k, v = (at_least_float32(tensor) for tensor in x[:3])
    if marginals.rows is not None and marginals.columns is not None:
        q, k, v = q.where(marginals.rows, 0.0), k.where(marginals.columns.mT, 0.0), v.where(marginals.columns.mT, 0.0)
    scale = x.scale_number if x.scale is None else x.scale[..., None, None]
    lam = x.lam_number if x.lam is None else x.lam[..., None, None]
    output, _ = reference_attention(q * scale, k, v, x.bias, marginals, lam, x.n_iters, "unrolled")
    output = output.to(x.q.dtype)
    return output, *(output.new_empty(0) for _ in range(6))


def _marginals(x: OperatorInputs) -> Marginals:
    if x.log_row is None or x.log_column is None:
        # Counted by tensors: sizes of a program may be dynamic.
        queries, keys = (torch.ones_like(at_least_float32(tensor[..., :1])) for tensor in (x.q, x.k))
        ratio = queries.sum(-2, keepdim=True) / keys.sum(-2, keepdim=True)
        return Marginals(torch.zeros_like(queries), ratio.log().expand(keys.mT.shape), None, None)
    log_row, log_column = x.log_row[..., None], x.log_column[..., None, :]
    rows, columns = log_row > -torch.inf, log_column > -torch.inf
    return Marginals(log_row.where(rows, 0.0), log_column.where(columns, 0.0), rows, columns)
