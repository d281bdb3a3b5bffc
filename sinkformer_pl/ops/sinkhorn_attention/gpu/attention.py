"""Start the kernels for whole heads, or the passes of the streaming ones."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.gpu import (
    implicit,
    keys_on_chip,
    laid_out_like,
    on_chip,
    passes,
    queries_on_chip,
)
from sinkformer_pl.ops.sinkhorn_attention.gpu.problem import (
    NONE,
    Problem,
    choice,
    new_bias_gradient,
    options_of,
    strides,
    uniform,
)
from sinkformer_pl.ops.sinkhorn_attention.gpu.replay import Launches, run
from sinkformer_pl.ops.sinkhorn_attention.gpu.state import State, numbers, parts
from sinkformer_pl.ops.sinkhorn_attention.inputs import OperatorInputs

LOG_2 = math.log(2)

KERNELS: dict[str, Any] = {"keys on chip": keys_on_chip, "queries on chip": queries_on_chip, "on chip": on_chip}


def forward(x: OperatorInputs) -> tuple[Tensor, Tensor]:
    """Compute the output (B, H, Q, Dv), and the memory that the backward needs.

    Args:
        x: float32, bfloat16 or float16, of any strides.
    """
    x = _ready(x)
    output, memory = run("forward", x.tensors, options_of(x), _forward, x)
    return output, memory


def backward(x: OperatorInputs, output: Tensor, memory: Tensor, grad: Tensor, wanted: Sequence[str]) -> list[Tensor]:
    """Compute the gradients of q, k, v, and of bias, log_row, log_column, scale and lam those that are wanted by name.

    They have the dtypes of q, k, v, and float32.
    """
    x, grad = _ready(x), _with_last_stride_1(grad)
    if x.gradient == "implicit":
        found = implicit.backward(x, memory, output, grad, *_potentials(x, memory), wanted)
    else:
        given = *x.tensors, memory, output, grad
        found = run("backward", given, (*options_of(x), *wanted), _backward, x, wanted)
    dq, dk, dv, dbias, *cotangents = found
    if not wanted:
        return [dq, dk, dv]
    others = _others(x, parts(x, memory), passes.Cotangents(*cotangents), wanted) | {"bias": dbias}
    return [dq, dk, dv, *(others[name] for name in wanted)]


def info(x: OperatorInputs, memory: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute potentials f (N, Q) and g (N, K), natural logarithms, and the sums of rows and columns of the plan."""
    x = _ready(x)
    f, g = _potentials(x, memory)
    return f * LOG_2, g * LOG_2, passes.matvec(x, f, g, None), passes.matvec(x, f, g, None, transposed=True)


def _potentials(x: OperatorInputs, memory: Tensor) -> tuple[Tensor, Tensor]:
    state = parts(x, memory)
    f, g = state.f[-1], state.g[-1]
    if choice(x).kind == "on chip":
        return (f.log2() - state.m).clamp(min=NONE), (g.log2() - state.c).clamp(min=NONE)
    return f, g


def _ready(x: OperatorInputs) -> OperatorInputs:
    q, k, v, *_, lam = x.tensors
    if lam is None and x.lam_number != 1:
        lam = q.new_full((1, 1), x.lam_number, dtype=torch.float32).expand(q.shape[:2])
        x = x._replace(lam=lam, lam_number=1.0)
    if q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return x
    return x._replace(q=_with_last_stride_1(q), k=_with_last_stride_1(k), v=_with_last_stride_1(v))


def _with_last_stride_1(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _forward(launches: Launches, x: OperatorInputs) -> tuple[Tensor, Tensor]:
    memory = launches.new(x.q.new_empty(numbers(x), dtype=torch.float32))
    output = launches.new(laid_out_like(x.q, x.v.shape[3]))
    p = Problem(x, launches, memory)
    x = p.x
    if p.choice.kind == "streaming":
        passes.forward(p, output)
        return output, memory
    on_chip_form = p.choice.kind == "on chip"
    tile = p.choice.forward
    softmax = {} if on_chip_form else {"SOFTMAX": x.n_iters == 1}
    p.start(
        KERNELS[p.choice.kind].forward, p.n,
        (*x.tensors, output, *p.state[: 5 if on_chip_form else 3]),
        (*p.q, *p.k, *p.v, *strides(output), *p.bias, *p.row, *p.column, *p.scales, *p.lams,
         p.number, p.uniform, p.heads, p.queries, p.keys, p.n, p.pairs),
        **p.widths, BQ=tile.rows, BK=tile.columns, DAMPED=p.damped, EVEN=p.even, **softmax,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return output, memory


def _backward(launches: Launches, x: OperatorInputs, wanted: Sequence[str]) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and bias, and where they are wanted what the others are sums of."""
    memory, output, grad = launches.given[len(x.tensors) :]
    dq, dk, dv = (launches.new(laid_out_like(tensor, tensor.shape[3])) for tensor in x.tensors[:3])
    dbias = new_bias_gradient(launches, x, wanted)
    p = Problem(x, launches, memory)
    x, gradients = p.x, (dq, dk, dv, dbias)
    if p.choice.kind == "streaming":
        cotangents = passes.backward(p, output, grad, gradients, wanted)
        return *gradients, *(cotangents if wanted else [None] * 4)
    unrolled = x.gradient == "unrolled" and p.pairs > 0
    delta, steps = p.steps(1, p.queries), p.pairs if unrolled else 0
    fb = p.steps(steps, p.queries) if "log_row" in wanted and steps else None
    gb = p.steps(steps, p.keys) if {"log_column", "lam"} & set(wanted) and steps else None
    terms = p.steps(steps, p.queries), p.steps(steps, p.keys), p.steps(steps, p.keys)
    on_chip_form = p.choice.kind == "on chip"
    scratch = (delta, fb, gb) if on_chip_form else (delta, fb, terms[0], gb, *terms[1:])
    dscale = p.steps(1, 1) if "scale" in wanted else None
    tile = p.choice.backward
    p.start(
        KERNELS[p.choice.kind].backward, p.n,
        (*x.tensors, output, grad, *p.state[: 5 if on_chip_form else 3], *scratch, dq, dk, dv, dbias, dscale),
        (*p.q, *p.k, *p.v, *strides(output), *strides(grad), *p.bias, *p.row, *p.column, *p.scales, *p.lams,
         *strides(dq), *strides(dk), *strides(dv), p.number, p.uniform, p.heads, p.queries, p.keys, p.n, p.pairs),
        **p.widths, BQ=tile.rows, BK=tile.columns, DAMPED=p.damped, STEPS=unrolled, EVEN=p.even,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return *gradients, *((delta[0], fb, gb, dscale) if wanted else [None] * 4)


def _others(x: OperatorInputs, state: State, found: passes.Cotangents, wanted: Sequence[str]) -> dict[str, Any]:
    """The gradients that are sums over the half-steps."""
    (b, heads), (delta, fb, gb, dscale) = x.q.shape[:2], found
    others = {}
    if "scale" in wanted and dscale is not None:
        others["scale"] = dscale.view(b * heads, -1).sum(-1).view(b, heads)
    if "log_row" in wanted:
        through_steps = x.gradient != "unrolled" or x.n_iters < 2 or x.n_iters % 2 == 1
        total = delta if through_steps else torch.zeros_like(delta)
        others["log_row"] = (total if fb is None else total + fb.sum(0)).view(b, heads, -1)
    if "log_column" in wanted:
        total = (torch.zeros_like(state.g[0]) if gb is None else gb.sum(0)).view(b, heads, -1)
        others["log_column"] = total if x.lam is None else total * x.lam[..., None]
    if "lam" in wanted:
        distance = torch.zeros_like(state.g[0, :, 0]) if gb is None else (gb * _distances(x, state)).sum((0, -1))
        others["lam"] = distance.view(b, heads)
    return others


def _distances(x: OperatorInputs, state: State) -> Tensor:
    """Log c - logsumexp of the columns in each column step, natural logarithms; 0 without mass."""
    (b, heads, keys), column = x.k.shape[:3], x.log_column
    log_column = uniform(x) * LOG_2 if column is None else column.expand(b, heads, keys).reshape(b * heads, keys)
    nu = state.nu.log2() - state.c if choice(x).kind == "on chip" else state.nu
    # The implicit gradient is that of the last column step.
    nu = nu[-1:] if x.gradient == "implicit" else nu
    return torch.where(nu > NONE / 10, nu * LOG_2 + log_column, 0.0)
