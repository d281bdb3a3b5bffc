"""The passes of the streaming kernels, in their order."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.gpu import streaming_backward, streaming_forward
from sinkformer_pl.ops.sinkhorn_attention.gpu.problem import NONE, Problem, options_of, strides
from sinkformer_pl.ops.sinkhorn_attention.gpu.replay import Launches, run
from sinkformer_pl.ops.sinkhorn_attention.inputs import OperatorInputs

UNROLLED = 10
"""Column steps up to which the kernels of dQ and dK have no loop over them."""


class Cotangents(NamedTuple):
    """Hold the terms whose sums are the gradients of marginals, scale and lam.

    Attributes:
        delta: of the last row step, (N, Q).
        row_steps: of all row steps before it, (row steps, N, Q), or None.
        column_steps: of all column steps, (column steps, N, K), or None.
        scale: parts of the gradient of the scale, N of them or a multiple, or None.
    """

    delta: Tensor
    row_steps: Tensor | None
    column_steps: Tensor | None
    scale: Tensor | None


def forward(p: Problem, output: Tensor) -> None:
    """Fill the output and the state."""
    f, g, nu = p.state.f, p.state.g, p.state.nu
    for t in range(p.pairs):
        # Undamped sums after the first are bounded by those before: they need no maximum.
        maximum = t == 0 or p.damped
        _half_step(p, f[t], None if t == 0 else g[t], None if maximum else f[t - 1], None)
        _half_step(p, g[t + 1], f[t], None if maximum else g[t], nu[t])
    if p.x.log_column is None:
        p.call(Tensor.zero_, g[0])
    else:
        p.call(_free_potential, g[0], p.x.log_column)
    x, tile = p.x, p.tiles.forward
    blocks = -(-p.queries // tile.rows)
    p.start(
        streaming_forward.forward, p.n * blocks,
        (*x.tensors[:7], output, f[p.pairs - 1], f[-1], g[-1]),
        (*p.q, *p.k, *p.v, *strides(output), *p.bias, *p.row, *p.column, *p.scales,
         p.number, p.heads, p.queries, p.keys, blocks),
        **p.widths, BQ=tile.rows, BK=tile.columns, FREE=p.pairs == 0, EVEN=p.even,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _half_step(p: Problem, potential: Tensor, other: Tensor | None, before: Tensor | None, nu: Tensor | None) -> None:
    """A row step, or with `nu` a column step, into `potential` from that of the other side, None for 0."""
    x, tile, bias = p.x, p.tiles.half_step, p.bias
    sides = (x.q, p.q, x.log_row, p.row, p.queries), (x.k, p.k, x.log_column, p.column, p.keys)
    column = nu is not None
    (a, sa, la, sla, na), (b, sb, lb, slb, nb) = reversed(sides) if column else sides
    blocks = -(-na // tile.rows)
    p.start(
        streaming_forward.half_step, p.n * blocks,
        (a, b, x.bias, la, lb, x.scale, x.lam, other, before, potential, nu),
        (*sa, *sb, *(bias[:2] + (bias[3:] + bias[2:3] if column else bias[2:])), *sla, *slb, *p.scales, *p.lams,
         p.number, p.uniform if column else 0.0, p.heads, na, nb, blocks),
        **p.key_width, BA=tile.rows, BB=tile.columns, FREE=other is None, MAXIMUM=before is None, COLUMN=column,
        DAMPED=p.damped, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _free_potential(g: Tensor, log_column: Tensor) -> None:
    g.view(log_column.shape).copy_(torch.where(log_column > NONE, 0.0, NONE))


def matvec(x: OperatorInputs, f: Tensor, g: Tensor, vector: Tensor | None, *, transposed: bool = False) -> Tensor:
    """Compute P x, or its transpose times x, for the plan of these potentials (N, Q) and (N, K); x None is all ones."""
    options = transposed, *options_of(x)
    (y,) = run("matvec", (*x.tensors, f, g, vector), options, _matvec, x, transposed)
    return y


def _matvec(launches: Launches, x: OperatorInputs, transposed: bool) -> tuple[Tensor]:
    p = Problem(x, launches)
    (f, g, vector), x, tile, bias = launches.given[len(x.tensors) :], p.x, p.tiles.half_step, p.bias
    sides = (x.q, p.q, f, p.queries), (x.k, p.k, g, p.keys)
    (a, sa, fa, na), (b, sb, fb, nb) = reversed(sides) if transposed else sides
    blocks, y = -(-na // tile.rows), launches.new(f.new_empty(p.n, na))
    p.start(
        streaming_forward.matvec, p.n * blocks,
        (a, b, x.bias, x.scale, fa, fb, vector, y),
        (*sa, *sb, *(bias[:2] + (bias[3:] + bias[2:3] if transposed else bias[2:])), *p.scales,
         p.number, p.heads, na, nb, blocks),
        **p.key_width, BA=tile.rows, BB=tile.columns, MASKED=p.masked, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return (y,)


class Begun(NamedTuple):
    """Hold the state of a backward after dV.

    Attributes:
        delta: cotangent of the last row step, (N, Q).
        row_steps: see `Cotangents`.
        column_steps: see `Cotangents`.
        lam_gb: lam times the cotangent of the last column step, (N, K), None without steps.
        inverse_fb: memory for that of a row step over its marginal, (N, Q), likewise.
        terms: factors of the terms of dQ and dK, of the queries two and of the keys two, (steps, N, tokens).
    """

    delta: Tensor
    row_steps: Tensor | None
    column_steps: Tensor | None
    lam_gb: Tensor | None
    inverse_fb: Tensor | None
    terms: tuple[Tensor, ...]


def backward(p: Problem, output: Any, grad: Any, gradients: tuple[Any, ...], wanted: Sequence[str]) -> Cotangents:
    """Fill the gradients of q, k, v and bias, and return what the others are sums of."""
    dq, dk, dv, dbias = gradients
    begun = value_gradients(p, output, grad, dv, wanted)
    delta, fb, gb, lam_gb, inverse_fb, terms = begun
    if lam_gb is not None:
        ce, cf, xe, we = terms
        for t in range(p.pairs - 1, 0, -1):
            _row_cotangents(p, t, lam_gb, delta, fb, inverse_fb, ce[t], cf[t])
            _column_cotangents(p, t, inverse_fb, gb, lam_gb, xe, we)
    else:
        _last_row_term(p, delta, *terms)
        gb = None
    dscale = query_and_key_gradients(p, grad, (dq, dk, dbias), delta, terms, fb, "scale" in wanted)
    return Cotangents(delta, fb, gb, dscale)


def value_gradients(p: Problem, output: Any, grad: Any, dv: Tensor, wanted: Sequence[str]) -> Begun:
    """Fill dV, and begin with all others."""
    x, (f, g, nu, *_) = p.x, p.state
    unrolled = x.gradient == "unrolled" and p.pairs > 0
    terms = p.pairs if unrolled else 1
    delta = p.steps(1, p.queries)[0]
    ce, cf, xe, we = (p.steps(terms, size) for size in (p.queries, p.queries, p.keys, p.keys))
    tile = p.tiles.values
    blocks = -(-p.queries // 64)
    p.start(
        streaming_backward.output_cotangents, p.n * blocks,
        (output, grad, f[0] if unrolled else None, f[-1], delta, ce[0]),
        (*strides(output), *strides(grad), p.heads, p.queries, blocks),
        DV=p.widths["DV"], DVB=p.widths["DVB"], BQ=64, DAMPED=p.damped, warps=4, stages=3,
    )  # fmt: skip
    gb = p.steps(p.pairs if unrolled else 1, p.keys) if not unrolled or {"log_column", "lam"} & set(wanted) else None
    fb = p.steps(p.pairs, p.queries) if unrolled and "log_row" in wanted else None
    lam_gb, inverse_fb = (p.steps(1, p.keys)[0], p.steps(1, p.queries)[0]) if unrolled else (None, None)
    last = p.pairs - 1
    blocks = -(-p.keys // tile.columns)
    p.start(
        streaming_backward.value_gradients, p.n * blocks,
        (x.q, x.k, x.v, x.bias, x.log_row, x.scale, x.lam, grad, f[-1], g[-1], g[last] if unrolled else None,
         nu[last] if unrolled else None, delta, dv, gb[-1] if gb is not None else None, lam_gb, xe[-1], we[-1]),
        (*p.q, *p.k, *p.v, *strides(grad), *p.bias, *p.row, *p.scales, *p.lams, *strides(dv),
         p.number, p.heads, p.queries, p.keys, blocks),
        **p.widths, BQ=tile.rows, BK=tile.columns, DAMPED=p.damped, MASKED=p.masked, STEPS=unrolled,
        EVEN=p.even and x.gradient != "implicit",
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return Begun(delta, fb, gb, lam_gb, inverse_fb, (ce, cf, xe, we))


def _row_cotangents(
    p: Problem,
    t: int,
    lam_gb: Any,
    delta: Tensor,
    fb: Tensor | None,
    inverse_fb: Any,
    ce: Tensor,
    cf: Tensor,
) -> None:
    x, tile, f, nu = p.x, p.tiles.half_step, p.state.f, p.state.nu
    blocks = -(-p.queries // tile.rows)
    p.start(
        streaming_backward.row_cotangents, p.n * blocks,
        (x.q, x.k, x.bias, x.scale, x.log_row, f[t], f[-1], nu[t], lam_gb, delta,
         fb[t] if fb is not None else None, inverse_fb, ce, cf),
        (*p.q, *p.k, *p.bias, *p.scales, *p.row, p.number, p.heads, p.queries, p.keys, blocks),
        **p.key_width, BA=tile.rows, BB=tile.columns, DAMPED=p.damped, MASKED=p.masked,
        FROM_OUTPUT=p.even and t == p.pairs - 1, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _column_cotangents(
    p: Problem, t: int, inverse_fb: Any, gb: Tensor | None, lam_gb: Any, xe: Tensor, we: Tensor
) -> None:
    x, tile, (f, g, nu, *_) = p.x, p.tiles.half_step, p.state
    blocks = -(-p.keys // tile.rows)
    p.start(
        streaming_backward.column_cotangents, p.n * blocks,
        (x.q, x.k, x.bias, x.scale, x.lam, f[t], g[t], nu[t], inverse_fb, g[-1], g[t - 1], nu[t - 1],
         gb[t - 1] if gb is not None else None, lam_gb, xe[t - 1], we[t - 1]),
        (*p.q, *p.k, *p.bias, *p.scales, *p.lams, p.number, p.heads, p.queries, p.keys, blocks),
        **p.key_width, BA=tile.rows, BB=tile.columns, DAMPED=p.damped, MASKED=p.masked,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _last_row_term(p: Problem, delta: Tensor, *terms: Tensor) -> None:
    """The term of a last row step before a column step that is held constant."""
    for term in terms:
        p.call(Tensor.zero_, term)
    if p.even:
        _, cf, _, we = terms
        g = p.state.g
        p.call(_fill_last_row_term, cf[0], we[0], delta, g[-2], g[-1], *([] if p.x.log_row is None else [p.x.log_row]))


def _fill_last_row_term(
    cf: Tensor, we: Tensor, delta: Tensor, before: Tensor, last: Tensor, log_row: Tensor | None = None
) -> None:
    cf.copy_(delta * inverse_rows(log_row, delta))
    there = (before > NONE / 10) & (last > NONE / 10)
    we.copy_(torch.where(there, (before - last).exp2(), 0.0))


def query_and_key_gradients(
    p: Problem,
    grad: Tensor,
    gradients: tuple[Any, ...],
    delta: Tensor,
    terms: tuple[Tensor, ...],
    fb: Tensor | None,
    with_scale: bool,
) -> Tensor | None:
    """Fill dQ, dK and the gradient of the bias; return the parts of that of the scale."""
    x, unrolled, (dq, dk, dbias) = p.x, p.x.gradient == "unrolled" and p.pairs > 0, gradients
    nu = p.state.nu if p.damped else None
    number = terms[0].shape[0]
    flags: dict[str, Any] = {
        "DAMPED": p.damped and unrolled,
        "MASKED": p.masked,
        "LAST_ROW": not p.even and x.gradient != "implicit",
        "TERMS": number if number <= UNROLLED else 0,
    }
    common = x.q, x.k, x.v, x.bias, x.log_row, x.scale, grad, p.state.f[-1], p.state.g[-1], nu, delta, *terms
    numbers = p.number, p.heads, p.queries, p.keys, p.n, number
    places = *p.q, *p.k, *p.v, *strides(grad), *p.bias, *p.row, *p.scales
    tile = p.tiles.queries
    blocks = -(-p.queries // tile.rows)
    dscale = p.steps(blocks, 1) if with_scale else None
    p.start(
        streaming_backward.query_gradients, p.n * blocks,
        (*common, fb[0] if fb is not None else None, dq, dscale), (*places, *strides(dq), *numbers, blocks),
        **p.widths, BQ=tile.rows, BK=tile.columns, **flags, OPEN=unrolled, FROM_OUTPUT=p.even and p.pairs == 1,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    tile = p.tiles.keys
    blocks = -(-p.keys // tile.columns)
    p.start(
        streaming_backward.key_gradients, p.n * blocks,
        (*common, dk, dbias), (*places, *strides(dk), *numbers, blocks),
        **p.widths, BQ=tile.rows, BK=tile.columns, **flags, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return dscale


def inverse_rows(log_row: Tensor | None, like: Tensor) -> Tensor:
    """Return 1 / row marginals, (N, Q) or broadcastable to it, 0 without mass."""
    if log_row is None:
        return like.new_ones(1, 1)
    return torch.where(log_row > NONE, (-log_row).exp(), 0.0).reshape(like.shape)
