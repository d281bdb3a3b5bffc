"""The passes of the streaming kernels, in their order."""

from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.gpu import streaming_backward, streaming_forward
from sinkformer_pl.ops.sinkhorn_attention.gpu.inputs import NONE, Gradients, Problem, State, strides
from sinkformer_pl.ops.sinkhorn_attention.gpu.start import start
from sinkformer_pl.ops.sinkhorn_attention.implicit import key_cotangent

UNROLLED = 10
"""Column steps up to which the kernels of dQ and dK have no loop over them."""


def forward(p: Problem, output: Tensor, state: State) -> None:
    """Fill the output and the state."""
    f, g, nu = state.f, state.g, state.nu
    for t in range(p.pairs):
        # Undamped sums after the first are bounded by those before: they need no maximum.
        maximum = t == 0 or p.damped
        _half_step(p, f[t], None if t == 0 else g[t], None if maximum else f[t - 1], None)
        _half_step(p, g[t + 1], f[t], None if maximum else g[t], nu[t])
    g[0].zero_() if p.x.log_column is None else _free_potential(p, g[0])
    x, tile = p.x, p.tiles.forward
    blocks = -(-p.queries // tile.rows)
    start(
        streaming_forward.forward, p.n * blocks,
        x.q, x.k, x.v, x.bias, x.log_row, x.log_column, p.scale, output, f[p.pairs - 1], f[-1], g[-1],
        *p.q, *p.k, *p.v, *strides(output), *p.bias, *p.row, *p.column, *p.scales,
        p.number, p.heads, p.queries, p.keys, blocks,
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
    start(
        streaming_forward.half_step, p.n * blocks,
        a, b, x.bias, la, lb, p.scale, x.lam, other, before, potential, nu,
        *sa, *sb, *(bias[:2] + (bias[3:] + bias[2:3] if column else bias[2:])), *sla, *slb, *p.scales, *p.lams,
        p.number, p.uniform if column else 0.0, p.heads, na, nb, blocks,
        **p.key_width, BA=tile.rows, BB=tile.columns, FREE=other is None, MAXIMUM=before is None, COLUMN=column,
        DAMPED=p.damped, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _free_potential(p: Problem, g: Tensor) -> None:
    column = p.x.log_column
    assert column is not None
    shape = p.n // p.heads, p.heads, p.keys
    g.view(shape).copy_(torch.where(column > NONE, 0.0, NONE).expand(shape))


def matvec(p: Problem, f: Tensor, g: Tensor, vector: Tensor | None, *, transposed: bool = False) -> Tensor:
    """P x, or its transpose times x, for the plan of these potentials (N, Q) and (N, K); x None is all ones."""
    x, tile, bias = p.x, p.tiles.half_step, p.bias
    sides = (x.q, p.q, f, p.queries), (x.k, p.k, g, p.keys)
    (a, sa, fa, na), (b, sb, fb, nb) = reversed(sides) if transposed else sides
    blocks, y = -(-na // tile.rows), p.steps(1, na)[0]
    start(
        streaming_forward.matvec, p.n * blocks,
        a, b, x.bias, p.scale, fa, fb, vector, y,
        *sa, *sb, *(bias[:2] + (bias[3:] + bias[2:3] if transposed else bias[2:])), *p.scales,
        p.number, p.heads, na, nb, blocks,
        **p.key_width, BA=tile.rows, BB=tile.columns, MASKED=p.masked, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return y


def backward(
    p: Problem, output: Tensor, state: State, grad: Tensor, found: Gradients, wanted: frozenset[str]
) -> tuple[State, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Fill the gradients of q, k, v and bias; return the cotangents and parts that the other gradients are sums of.

    These are: the state of the steps that they belong to, the cotangents of the last row step (N, Q), of all row steps
    before it (row steps, N, Q) and of all column steps (column steps, N, K), and the parts of that of the scale.
    """
    x = p.x
    f, g, nu = state.f, state.g, state.nu
    unrolled = x.gradient == "unrolled" and p.pairs > 0
    terms = p.pairs if unrolled else 1
    delta = p.steps(1, p.queries)[0]
    ce, cf, xe, we = (p.steps(terms, size) for size in (p.queries, p.queries, p.keys, p.keys))
    tile = p.tiles.values
    blocks = -(-p.queries // 64)
    start(
        streaming_backward.output_cotangents, p.n * blocks,
        output, grad, f[0] if unrolled else None, f[-1], delta, ce[0], *strides(output), *strides(grad),
        p.heads, p.queries, blocks, DV=p.widths["DV"], DVB=p.widths["DVB"], BQ=64, DAMPED=p.damped, warps=4, stages=3,
    )  # fmt: skip
    gb = p.steps(p.pairs if unrolled else 1, p.keys) if not unrolled or wanted & {"log_column", "lam"} else None
    fb = p.steps(p.pairs, p.queries) if unrolled and "log_row" in wanted else None
    lam_gb, inverse_fb = (p.steps(1, p.keys)[0], p.steps(1, p.queries)[0]) if unrolled else (None, None)
    last = p.pairs - 1
    blocks = -(-p.keys // tile.columns)
    start(
        streaming_backward.value_gradients, p.n * blocks,
        x.q, x.k, x.v, x.bias, x.log_row, p.scale, x.lam, grad, f[-1], g[-1], g[last] if unrolled else None,
        nu[last] if unrolled else None, delta, found.v, gb[-1] if gb is not None else None, lam_gb, xe[-1], we[-1],
        *p.q, *p.k, *p.v, *strides(grad), *p.bias, *p.row, *p.scales, *p.lams, *strides(found.v),
        p.number, p.heads, p.queries, p.keys, blocks,
        **p.widths, BQ=tile.rows, BK=tile.columns, DAMPED=p.damped, MASKED=p.masked, STEPS=unrolled,
        EVEN=p.even and x.gradient != "implicit",
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    if unrolled:
        for t in range(last, 0, -1):
            _row_cotangents(p, state, t, lam_gb, delta, fb, inverse_fb, ce[t], cf[t])
            _column_cotangents(p, state, t, inverse_fb, gb, lam_gb, xe, we)
    elif x.gradient == "implicit":
        delta, gb = _implicit_terms(p, f[-1], g[-1], gb, delta, ce, cf, xe, we)
        state = state._replace(nu=state.nu[-1:])
    else:
        _last_row_term(p, g, delta, (ce, cf, xe, we))
        gb = None
    dscale = _query_and_key_gradients(p, state, grad, found, delta, (ce, cf, xe, we), fb, "scale" in wanted)
    return state, delta, fb, gb, dscale


def _row_cotangents(
    p: Problem,
    state: State,
    t: int,
    lam_gb: Any,
    delta: Tensor,
    fb: Tensor | None,
    inverse_fb: Any,
    ce: Tensor,
    cf: Tensor,
) -> None:
    x, tile = p.x, p.tiles.half_step
    blocks = -(-p.queries // tile.rows)
    start(
        streaming_backward.row_cotangents, p.n * blocks,
        x.q, x.k, x.bias, p.scale, x.log_row, state.f[t], state.f[-1], state.nu[t], lam_gb, delta,
        fb[t] if fb is not None else None, inverse_fb, ce, cf,
        *p.q, *p.k, *p.bias, *p.scales, *p.row, p.number, p.heads, p.queries, p.keys, blocks,
        **p.key_width, BA=tile.rows, BB=tile.columns, DAMPED=p.damped, MASKED=p.masked,
        FROM_OUTPUT=p.even and t == p.pairs - 1, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _column_cotangents(
    p: Problem, state: State, t: int, inverse_fb: Any, gb: Tensor | None, lam_gb: Any, xe: Tensor, we: Tensor
) -> None:
    x, tile, g = p.x, p.tiles.half_step, state.g
    blocks = -(-p.keys // tile.rows)
    start(
        streaming_backward.column_cotangents, p.n * blocks,
        x.q, x.k, x.bias, p.scale, x.lam, state.f[t], g[t], state.nu[t], inverse_fb, g[-1], g[t - 1], state.nu[t - 1],
        gb[t - 1] if gb is not None else None, lam_gb, xe[t - 1], we[t - 1],
        *p.q, *p.k, *p.bias, *p.scales, *p.lams, p.number, p.heads, p.queries, p.keys, blocks,
        **p.key_width, BA=tile.rows, BB=tile.columns, DAMPED=p.damped, MASKED=p.masked,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip


def _implicit_terms(
    p: Problem, f: Tensor, g: Tensor, gb: Any, delta: Tensor, ce: Tensor, cf: Tensor, xe: Tensor, we: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill the terms of the converged plan; return the cotangents of f (N, Q) and g (1, N, K) at the fixed point."""
    inverse = _inverse_rows(p)
    column_sums = matvec(p, f, g, None, transposed=True)
    there = column_sums > 0
    safe = torch.where(there, column_sums, 1.0)
    lam = 1.0 if p.x.lam is None else p.x.lam.reshape(p.n, 1, 1)

    def gram(vector: Tensor) -> Tensor:
        rows = matvec(p, f, g, vector[:, 0].contiguous()) * inverse
        return matvec(p, f, g, rows, transposed=True)[:, None]

    cotangent = key_cotangent(gram, gb[0][:, None], safe[:, None], lam, there[:, None])[:, 0]
    x = cotangent / safe * (lam if isinstance(lam, float) else lam[..., 0])
    delta = delta - matvec(p, f, g, x.contiguous())
    ce.fill_(1.0), we.fill_(1.0)
    xe[0], cf[0] = x, delta * inverse
    return delta, cotangent[None]


def _last_row_term(p: Problem, g: Tensor, delta: Tensor, terms: tuple[Tensor, ...]) -> None:
    """The term of a last row step before a column step that is held constant."""
    for term in terms:
        term.zero_()
    if p.even:
        terms[1][0] = delta * _inverse_rows(p)
        there = (g[-2] > NONE / 10) & (g[-1] > NONE / 10)
        terms[3][0] = torch.where(there, (g[-2] - g[-1]).exp2(), 0.0)


def _query_and_key_gradients(
    p: Problem,
    state: State,
    grad: Tensor,
    found: Gradients,
    delta: Tensor,
    terms: tuple[Tensor, ...],
    fb: Tensor | None,
    with_scale: bool,
) -> Tensor | None:
    """Fill dQ, dK and the gradient of the bias; return the parts of that of the scale."""
    x, unrolled = p.x, p.x.gradient == "unrolled" and p.pairs > 0
    nu = state.nu if p.damped else None
    number = terms[0].shape[0]
    flags: dict[str, Any] = {
        "DAMPED": p.damped and unrolled,
        "MASKED": p.masked,
        "LAST_ROW": not p.even and x.gradient != "implicit",
        "TERMS": number if number <= UNROLLED else 0,
    }
    common = x.q, x.k, x.v, x.bias, x.log_row, p.scale, grad, state.f[-1], state.g[-1], nu, delta, *terms
    numbers = p.number, p.heads, p.queries, p.keys, p.n, number
    places = *p.q, *p.k, *p.v, *strides(grad), *p.bias, *p.row, *p.scales
    tile = p.tiles.queries
    blocks = -(-p.queries // tile.rows)
    dscale = p.steps(blocks, 1) if with_scale else None
    start(
        streaming_backward.query_gradients, p.n * blocks,
        *common, fb[0] if fb is not None else None, found.q, dscale, *places, *strides(found.q), *numbers, blocks,
        **p.widths, BQ=tile.rows, BK=tile.columns, **flags, OPEN=unrolled, FROM_OUTPUT=p.even and p.pairs == 1,
        warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    tile = p.tiles.keys
    blocks = -(-p.keys // tile.columns)
    start(
        streaming_backward.key_gradients, p.n * blocks,
        *common, found.k, found.bias, *places, *strides(found.k), *numbers, blocks,
        **p.widths, BQ=tile.rows, BK=tile.columns, **flags, warps=tile.warps, stages=tile.stages,
    )  # fmt: skip
    return dscale


def _inverse_rows(p: Problem) -> Tensor:
    """1 / row marginals, (N, Q) or broadcastable to it."""
    row = p.x.log_row
    if row is None:
        return p.x.q.new_ones(1, 1, dtype=torch.float32)
    row = row.expand(p.n // p.heads, p.heads, p.queries).reshape(p.n, p.queries)
    return torch.where(row > NONE, (-row).exp(), 0.0)
