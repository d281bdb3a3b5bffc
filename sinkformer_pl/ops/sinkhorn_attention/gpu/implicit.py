"""The gradient of the converged plan: kernels before and after, and products with the plan between them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.gpu import laid_out_like
from sinkformer_pl.ops.sinkhorn_attention.gpu.passes import (
    Cotangents,
    inverse_rows,
    matvec,
    query_and_key_gradients,
    value_gradients,
)
from sinkformer_pl.ops.sinkhorn_attention.gpu.problem import Problem, new_bias_gradient, options_of
from sinkformer_pl.ops.sinkhorn_attention.gpu.replay import Launches, run
from sinkformer_pl.ops.sinkhorn_attention.implicit import key_cotangent
from sinkformer_pl.ops.sinkhorn_attention.inputs import OperatorInputs


def backward(
    x: OperatorInputs, memory: Tensor, output: Tensor, grad: Tensor, f: Tensor, g: Tensor, wanted: Sequence[str]
) -> list[Any]:
    """Compute the gradients of q, k, v and bias, then the `Cotangents` of the others, for the plan of f and g."""
    options = options_of(x)
    dv, delta, column = run("implicit dV", (*x.tensors, memory, output, grad), options, _first, x)
    delta, column, terms = _terms(x, f, g, delta, column)
    given = *x.tensors, memory, grad, delta, *terms
    dq, dk, dbias, dscale = run("implicit dQ, dK", given, (*options, *wanted), _last, x, wanted)
    return [dq, dk, dv, dbias, *Cotangents(delta, None, column, dscale)]


def _first(launches: Launches, x: OperatorInputs) -> tuple[Tensor | None, ...]:
    memory, output, grad = launches.given[len(x.tensors) :]
    dv = launches.new(laid_out_like(x.v, x.v.shape[3]))
    begun = value_gradients(Problem(x, launches, memory), output, grad, dv, ())
    return dv, begun.delta, begun.column_steps


def _terms(
    x: OperatorInputs, f: Tensor, g: Tensor, delta: Tensor, column: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The cotangents of f (N, Q) and g (1, N, K) at the fixed point, and the factors of the terms of dQ and dK."""
    inverse = inverse_rows(x.log_row, delta)
    column_sums = matvec(x, f, g, None, transposed=True)
    there = column_sums > 0
    safe = torch.where(there, column_sums, 1.0)
    lam = 1.0 if x.lam is None else x.lam.reshape(-1, 1, 1)

    def gram(vector: Tensor) -> Tensor:
        rows = matvec(x, f, g, vector[:, 0].contiguous()) * inverse
        return matvec(x, f, g, rows, transposed=True)[:, None]

    cotangent = key_cotangent(gram, column[0][:, None], safe[:, None], lam, there[:, None])[:, 0]
    xe = cotangent / safe * (lam if isinstance(lam, float) else lam[..., 0])
    delta = delta - matvec(x, f, g, xe.contiguous())
    cf = delta * inverse
    return delta, cotangent[None], (torch.ones_like(delta)[None], cf[None], xe[None], torch.ones_like(xe)[None])


def _last(launches: Launches, x: OperatorInputs, wanted: Sequence[str]) -> tuple[Tensor | None, ...]:
    memory, grad, delta, *terms = launches.given[len(x.tensors) :]
    dq, dk = (launches.new(laid_out_like(tensor, tensor.shape[3])) for tensor in (x.q, x.k))
    dbias = new_bias_gradient(launches, x, wanted)
    gradients = dq, dk, dbias
    p = Problem(x, launches, memory)
    return *gradients, query_and_key_gradients(p, grad, gradients, delta, tuple(terms), None, "scale" in wanted)
