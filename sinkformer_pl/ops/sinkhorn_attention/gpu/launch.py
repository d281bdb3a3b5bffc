"""Start the kernels for whole heads, or the passes of the streaming ones."""

import math
from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.gpu import keys_on_chip, laid_out_like, on_chip, passes, queries_on_chip
from sinkformer_pl.ops.sinkhorn_attention.gpu.inputs import NONE, Gradients, Inputs, Problem, State, strides
from sinkformer_pl.ops.sinkhorn_attention.gpu.start import start

LOG_2 = math.log(2)

KERNELS: dict[str, Any] = {"keys on chip": keys_on_chip, "queries on chip": queries_on_chip, "on chip": on_chip}


def forward(x: Inputs) -> tuple[Tensor, State]:
    """Output (B, H, Q, Dv) and what the backward needs."""
    p = Problem(x)
    output = laid_out_like(x.q, x.v.shape[3])
    state = State(
        p.steps((x.n_iters + 1) // 2, p.queries),
        p.steps(1 + p.pairs, p.keys),
        p.steps(p.pairs, p.keys),
        p.steps(1, p.queries)[0],
        p.steps(1, p.keys)[0],
    )
    on_chip_form = p.choice.kind == "on chip"
    if p.choice.kind == "streaming":
        passes.forward(p, output, state)
        return output, state
    tile = p.choice.forward
    softmax = {} if on_chip_form else {"SOFTMAX": x.n_iters == 1}
    start(
        KERNELS[p.choice.kind].forward, p.n,
        x.q, x.k, x.v, x.bias, x.log_row, x.log_column, p.scale, x.lam, output, *state[: 5 if on_chip_form else 3],
        *p.q, *p.k, *p.v, *strides(output), *p.bias, *p.row, *p.column, *p.scales, *p.lams,
        p.number, p.uniform, p.heads, p.queries, p.keys, p.n, p.pairs,
        **p.widths, BQ=tile.rows, BK=tile.columns, DAMPED=p.damped, EVEN=p.even, **softmax,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return output, state


def backward(x: Inputs, output: Tensor, state: State, grad: Tensor, wanted: frozenset[str]) -> Gradients:
    """Gradients of the inputs; of bias, log_row, log_column, scale and lam those that are wanted by name."""
    p = Problem(x)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv = (laid_out_like(tensor, tensor.shape[3]) for tensor in (x.q, x.k, x.v))
    dbias = x.q.new_empty(x.bias.shape, dtype=torch.float32) if "bias" in wanted and x.bias is not None else None
    found = Gradients(dq, dk, dv, dbias, None, None, None, None)
    if p.choice.kind == "streaming" or x.gradient == "implicit":
        return _finish(p, found, *passes.backward(p, output, state, grad, found, wanted), wanted)
    unrolled = x.gradient == "unrolled" and p.pairs > 0
    delta, steps = p.steps(1, p.queries), p.pairs if unrolled else 0
    fb = p.steps(steps, p.queries) if "log_row" in wanted and steps else None
    gb = p.steps(steps, p.keys) if wanted & {"log_column", "lam"} and steps else None
    terms: tuple[Tensor | None, ...] = (p.steps(steps, p.queries), p.steps(steps, p.keys), p.steps(steps, p.keys))
    on_chip_form = p.choice.kind == "on chip"
    scratch = (delta, fb, gb) if on_chip_form else (delta, fb, terms[0], gb, *terms[1:])
    dscale = p.steps(1, 1) if "scale" in wanted else None
    tile = p.choice.backward
    start(
        KERNELS[p.choice.kind].backward, p.n,
        x.q, x.k, x.v, x.bias, x.log_row, x.log_column, p.scale, x.lam, output, grad,
        *state[: 5 if on_chip_form else 3], *scratch, dq, dk, dv, dbias, dscale,
        *p.q, *p.k, *p.v, *strides(output), *strides(grad), *p.bias, *p.row, *p.column, *p.scales, *p.lams,
        *strides(dq), *strides(dk), *strides(dv), p.number, p.uniform, p.heads, p.queries, p.keys, p.n, p.pairs,
        **p.widths, BQ=tile.rows, BK=tile.columns, DAMPED=p.damped, STEPS=unrolled, EVEN=p.even,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return _finish(p, found, state, delta[0], fb, gb, dscale, wanted)


def _finish(
    p: Problem,
    found: Gradients,
    state: State,
    delta: Tensor,
    fb: Tensor | None,
    gb: Tensor | None,
    dscale: Tensor | None,
    wanted: frozenset[str],
) -> Gradients:
    """Add the gradients that are sums over the half-steps, whose cotangents are fb and gb."""
    b, x = p.n // p.heads, p.x
    if "scale" in wanted and dscale is not None:
        found = found._replace(scale=dscale.view(p.n, -1).sum(-1).view(b, p.heads))
    if "log_row" in wanted:
        through_steps = p.x.gradient != "unrolled" or not p.pairs or not p.even
        total = delta if through_steps else torch.zeros_like(delta)
        if fb is not None:
            total = total + fb.sum(0)
        found = found._replace(log_row=total.view(b, p.heads, -1))
    if "log_column" in wanted:
        total = torch.zeros_like(state.g[0]) if gb is None else gb.sum(0)
        total = total.view(b, p.heads, -1)
        found = found._replace(log_column=total if x.lam is None else total * x.lam[..., None])
    if "lam" in wanted:
        distance = torch.zeros_like(state.g[0, :, 0]) if gb is None else (gb * _distances(p, state)).sum((0, -1))
        found = found._replace(lam=distance.view(b, p.heads))
    return found


def _distances(p: Problem, state: State) -> Tensor:
    """Log c - logsumexp of the columns in each column step, natural logarithms; 0 without mass."""
    b, column = p.n // p.heads, p.x.log_column
    log_column = p.uniform * LOG_2 if column is None else column.expand(b, p.heads, p.keys).reshape(p.n, p.keys)
    nu = state.nu.log2() - state.c if p.choice.kind == "on chip" else state.nu
    return torch.where(nu > NONE / 10, nu * LOG_2 + log_column, 0.0)


def info(x: Inputs, state: State) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Potentials f (N, Q) and g (N, K), natural logarithms, and the sums of rows and columns of the plan."""
    p = Problem(x)
    f, g = state.f[-1], state.g[-1]
    if p.choice.kind == "on chip":
        f, g = (f.log2() - state.m).clamp(min=NONE), (g.log2() - state.c).clamp(min=NONE)
    return f * LOG_2, g * LOG_2, passes.matvec(p, f, g, None), passes.matvec(p, f, g, None, transposed=True)
