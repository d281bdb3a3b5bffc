"""Start the kernels: memory, strides, and the order of the passes."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.gpu import keys_on_chip, on_chip, queries_on_chip, streaming
from sinkformer_pl.ops.sinkhorn_attention.gpu.choice import (
    Choice,
    Tile,
    choose,
    power_of_2,
    shared_memory,
    streaming_tiles,
)
from sinkformer_pl.ops.sinkhorn_attention.implicit import key_cotangent

LOG_2 = math.log(2)
NONE = -1e30
"""The potential of a token without mass."""

KERNELS = {"keys on chip": keys_on_chip, "queries on chip": queries_on_chip, "on chip": on_chip}


class Inputs(NamedTuple):
    """B samples of H heads, with any strides whose last is 1.

    Attributes:
        q: (B, H, Q, D), float32, bfloat16 or float16.
        k: (B, H, K, D).
        v: (B, H, K, Dv).
        bias: (B, H, Q, K), added to the scores, or None.
        log_row: (B, H, Q) float32, natural logarithms of the row marginals, -inf without mass; None is 0 everywhere.
        log_column: (B, H, K) float32, likewise; None is log(Q/K), and both are None or neither.
        scale: of the scores, a number or (B, H).
        lam: damping of the column step, (B, H); None is exactly 1.
        n_iters: half-steps.
        gradient: of what the gradient is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    log_row: Tensor | None
    log_column: Tensor | None
    scale: float | Tensor
    lam: Tensor | None
    n_iters: int
    gradient: str


class State(NamedTuple):
    """What the backward needs of the forward, in base 2.

    For `on_chip`: the scalings u (row steps, N, Q), w (1 + column steps, N, K), normalizers (column steps, N, K), shifts
    m (N, Q) and c (N, K). For the others: potentials f of the queries and g of the keys, likewise, minus the log-sum-exp
    of the columns in each column step, and two empty tensors.
    """

    f: Tensor
    g: Tensor
    nu: Tensor
    m: Tensor
    c: Tensor


class Gradients(NamedTuple):
    """Of the inputs of the same name, of the last five those that are wanted; float32 but q, k, v."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    log_row: Tensor | None
    log_column: Tensor | None
    scale: Tensor | None
    lam: Tensor | None


class Problem:
    """One problem on its way to the kernels."""

    def __init__(self, x: Inputs) -> None:
        self.x = x
        b, self.heads, self.queries, width = x.q.shape
        self.keys, value_width = x.v.shape[2:]
        self.n, self.pairs, self.even = b * self.heads, x.n_iters // 2, x.n_iters % 2 == 0
        self.limit = shared_memory(x.q.device)
        self.choice: Choice = choose(
            self.queries, self.keys, width, value_width, x.q.dtype, x.n_iters, x.gradient, self.limit
        )
        self.tiles = streaming_tiles(width, value_width, x.q.dtype, self.limit)
        self.scale = x.scale if isinstance(x.scale, Tensor) else None
        self.number = 1.0 if isinstance(x.scale, Tensor) else x.scale
        self.uniform = math.log2(max(self.queries, 1) / max(self.keys, 1))
        self.key_width: dict[str, Any] = {"D": width, "DB": power_of_2(width), "PRECISION": _precision(x.q)}
        self.widths = self.key_width | {"DV": value_width, "DVB": power_of_2(value_width)}
        # A kernel is compiled for the types of its arguments: a new one where a scale is there.
        self.q, self.k, self.v = (_strides(tensor) for tensor in (x.q, x.k, x.v))
        self.bias = (0,) * 4 if x.bias is None else x.bias.stride()
        self.row, self.column = _strides(x.log_row, 2), _strides(x.log_column, 2)
        self.scales, self.lams = _strides(self.scale, 2), _strides(x.lam, 2)

    @property
    def damped(self) -> bool:
        """Whether lam may differ from 1."""
        return self.x.lam is not None

    def steps(self, number: int, tokens: int) -> Tensor:
        """(number, N, tokens) float32, uninitialized."""
        return self.x.q.new_empty(number, self.n, tokens, dtype=torch.float32)

    def tokens(self, tensor: Tensor, width: int) -> Tensor:
        """(B, H, N, width) uninitialized, laid out (B, N, H, width), as the projections around attention want it."""
        b, h, n, _ = tensor.shape
        return tensor.new_empty(b, n, h, width).transpose(1, 2)


def forward(x: Inputs) -> tuple[Tensor, State]:
    """Output (B, H, Q, Dv) and what the backward needs."""
    p = Problem(x)
    output = p.tokens(x.q, x.v.shape[3])
    empty = x.q.new_empty(0, dtype=torch.float32)
    rows, columns = p.steps((x.n_iters + 1) // 2, p.queries), p.steps(1 + p.pairs, p.keys)
    if not p.n or not p.queries or not p.keys:
        return output.zero_(), State(rows.fill_(NONE), columns.fill_(NONE), empty, empty, empty)
    on_chip_form = p.choice.kind == "on chip"
    nu = p.steps(p.pairs, p.keys) if p.damped or p.choice.kind == "streaming" else empty
    m, c = (p.steps(1, p.queries)[0], p.steps(1, p.keys)[0]) if on_chip_form else (empty, empty)
    state = State(rows, columns, nu, m, c)
    if p.choice.kind == "streaming":
        _forward_by_passes(p, output, state)
        return output, state
    tile = p.choice.forward
    softmax = {} if on_chip_form else {"SOFTMAX": x.n_iters == 1}
    KERNELS[p.choice.kind].forward[(p.n,)](
        x.q, x.k, x.v, x.bias, x.log_row, x.log_column, p.scale, x.lam, output, *state[: 5 if on_chip_form else 3],
        *p.q, *p.k, *p.v, *_strides(output), *p.bias, *p.row, *p.column, *p.scales, *p.lams,
        p.number, p.uniform, p.heads, p.queries, p.keys, p.n, p.pairs,
        **p.widths, BQ=tile.rows, BK=tile.columns, DAMPED=p.damped, EVEN=p.even, **softmax,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return output, state


def backward(x: Inputs, output: Tensor, state: State, grad: Tensor, wanted: frozenset[str]) -> Gradients:
    """Gradients of the inputs; of bias, log_row, log_column, scale and lam those that are wanted by name."""
    p = Problem(x)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dq, dk, dv = (p.tokens(tensor, tensor.shape[3]) for tensor in (x.q, x.k, x.v))
    dbias = x.q.new_empty(x.bias.shape, dtype=torch.float32) if "bias" in wanted and x.bias is not None else None
    found = Gradients(dq, dk, dv, dbias, None, None, None, None)
    if not p.n or not p.queries or not p.keys:
        return _nothing(p, found, wanted)
    if p.choice.kind == "streaming" or x.gradient == "implicit":
        return _backward_by_passes(p, output, state, grad, found, wanted)
    unrolled = x.gradient == "unrolled" and p.pairs > 0
    delta, steps = p.steps(1, p.queries), p.pairs if unrolled else 0
    fb = p.steps(steps, p.queries) if "log_row" in wanted and steps else None
    gb = p.steps(steps, p.keys) if wanted & {"log_column", "lam"} and steps else None
    terms: tuple[Tensor | None, ...] = (p.steps(steps, p.queries), p.steps(steps, p.keys), p.steps(steps, p.keys))
    on_chip_form = p.choice.kind == "on chip"
    scratch = (delta, fb, gb) if on_chip_form else (delta, fb, terms[0], gb, *terms[1:])
    dscale = p.steps(1, 1) if "scale" in wanted else None
    tile = p.choice.backward
    KERNELS[p.choice.kind].backward[(p.n,)](
        x.q, x.k, x.v, x.bias, x.log_row, x.log_column, p.scale, x.lam, output, grad, *state[: 5 if on_chip_form else 3],
        *scratch, dq, dk, dv, dbias, dscale,
        *p.q, *p.k, *p.v, *_strides(output), *_strides(grad), *p.bias, *p.row, *p.column, *p.scales, *p.lams,
        *_strides(dq), *_strides(dk), *_strides(dv), p.number, p.uniform, p.heads, p.queries, p.keys, p.n, p.pairs,
        **p.widths, BQ=tile.rows, BK=tile.columns, DAMPED=p.damped, STEPS=unrolled, EVEN=p.even,
        num_warps=tile.warps, num_stages=tile.stages,
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
    """log c - logsumexp of the columns in each column step, natural logarithms; 0 without mass."""
    b, column = p.n // p.heads, p.x.log_column
    log_column = p.uniform * LOG_2 if column is None else column.expand(b, p.heads, p.keys).reshape(p.n, p.keys)
    nu = state.nu.log2() - state.c if p.choice.kind == "on chip" else state.nu
    return torch.where(nu > NONE / 10, nu * LOG_2 + log_column, 0.0)


def _nothing(p: Problem, found: Gradients, wanted: frozenset[str]) -> Gradients:
    x, b = p.x, p.n // p.heads if p.heads else 0
    shapes = {
        "log_row": (b, p.heads, p.queries),
        "log_column": (b, p.heads, p.keys),
        "scale": (b, p.heads),
        "lam": (b, p.heads),
    }
    zeros = {name: x.q.new_zeros(shape, dtype=torch.float32) for name, shape in shapes.items() if name in wanted}
    zeros |= {name: tensor.zero_() for name, tensor in found._asdict().items() if tensor is not None}
    return found._replace(**zeros)


def _forward_by_passes(p: Problem, output: Tensor, state: State) -> None:
    f, g, nu = state.f, state.g, state.nu
    for t in range(p.pairs):
        # Undamped sums after the first are bounded by those before: they need no maximum.
        maximum = t == 0 or p.damped
        _half_step(p, f[t], None if t == 0 else g[t], None if maximum else f[t - 1], None)
        _half_step(p, g[t + 1], f[t], None if maximum else g[t], nu[t])
    g[0].zero_() if p.x.log_column is None else _free_potential(p, g[0])
    x, tile = p.x, p.tiles.forward
    blocks = -(-p.queries // tile.rows)
    streaming.forward[(p.n * blocks,)](
        x.q, x.k, x.v, x.bias, x.log_row, x.log_column, p.scale, output, f[p.pairs - 1], f[-1], g[-1],
        *p.q, *p.k, *p.v, *_strides(output), *p.bias, *p.row, *p.column, *p.scales,
        p.number, p.heads, p.queries, p.keys, blocks,
        **p.widths, BQ=tile.rows, BK=tile.columns, FREE=p.pairs == 0, EVEN=p.even,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _free_potential(p: Problem, g: Tensor) -> None:
    column = p.x.log_column
    assert column is not None
    shape = p.n // p.heads, p.heads, p.keys
    g.view(shape).copy_(torch.where(column > NONE, 0.0, NONE).expand(shape))


def _half_step(p: Problem, potential: Tensor, other: Tensor | None, before: Tensor | None, nu: Tensor | None) -> None:
    """A row step, or with `nu` a column step, into `potential` from that of the other side, None for 0."""
    x, tile, bias = p.x, p.tiles.half_step, p.bias
    sides = (x.q, p.q, x.log_row, p.row, p.queries), (x.k, p.k, x.log_column, p.column, p.keys)
    column = nu is not None
    (a, sa, la, sla, na), (b, sb, lb, slb, nb) = reversed(sides) if column else sides
    blocks = -(-na // tile.rows)
    streaming.half_step[(p.n * blocks,)](
        a, b, x.bias, la, lb, p.scale, x.lam, other, before, potential, nu,
        *sa, *sb, *(bias[:2] + (bias[3:] + bias[2:3] if column else bias[2:])), *sla, *slb, *p.scales, *p.lams,
        p.number, p.uniform if column else 0.0, p.heads, na, nb, blocks,
        **p.key_width, BA=tile.rows, BB=tile.columns, FREE=other is None, MAXIMUM=before is None, COLUMN=column,
        DAMPED=p.damped, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def matvec(p: Problem, f: Tensor, g: Tensor, vector: Tensor | None, *, transposed: bool = False) -> Tensor:
    """P x, or its transpose times x, for the plan of these potentials (N, Q) and (N, K); x None is all ones."""
    x, tile, bias = p.x, p.tiles.half_step, p.bias
    sides = (x.q, p.q, f, p.queries), (x.k, p.k, g, p.keys)
    (a, sa, fa, na), (b, sb, fb, nb) = reversed(sides) if transposed else sides
    blocks, y = -(-na // tile.rows), p.steps(1, na)[0]
    streaming.matvec[(p.n * blocks,)](
        a, b, x.bias, p.scale, fa, fb, vector, y,
        *sa, *sb, *(bias[:2] + (bias[3:] + bias[2:3] if transposed else bias[2:])), *p.scales,
        p.number, p.heads, na, nb, blocks,
        **p.key_width, BA=tile.rows, BB=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def potentials(x: Inputs, state: State) -> tuple[Tensor, Tensor]:
    """f (N, Q) and g (N, K) of the plan, in base 2, NONE without mass."""
    if state.m.numel():
        f, g = state.f[-1].log2() - state.m, state.g[-1].log2() - state.c
        return f.clamp(min=NONE), g.clamp(min=NONE)
    return state.f[-1], state.g[-1]


def sums(x: Inputs, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Row sums (N, Q) and column sums (N, K) of the plan."""
    p = Problem(x)
    return matvec(p, f, g, None), matvec(p, f, g, None, transposed=True)


def _backward_by_passes(
    p: Problem, output: Tensor, state: State, grad: Tensor, found: Gradients, wanted: frozenset[str]
) -> Gradients:
    x = p.x
    f, g, nu = state.f, state.g, state.nu
    unrolled = x.gradient == "unrolled" and p.pairs > 0
    terms = p.pairs if unrolled else 1
    delta = p.steps(1, p.queries)[0]
    ce, cf, xe, we = (p.steps(terms, size) for size in (p.queries, p.queries, p.keys, p.keys))
    tile = p.tiles.values
    blocks = -(-p.queries // 64)
    streaming.output_cotangents[(p.n * blocks,)](
        output, grad, f[0] if unrolled else None, f[-1], delta, ce[0], *_strides(output), *_strides(grad),
        p.heads, p.queries, blocks, DV=p.widths["DV"], DVB=p.widths["DVB"], BQ=64, DAMPED=p.damped,
    )  # fmt: skip
    gb = p.steps(p.pairs if unrolled else 1, p.keys) if not unrolled or wanted & {"log_column", "lam"} else None
    fb = p.steps(p.pairs, p.queries) if unrolled and "log_row" in wanted else None
    lam_gb, inverse_fb = (p.steps(1, p.keys)[0], p.steps(1, p.queries)[0]) if unrolled else (None, None)
    last = p.pairs - 1
    blocks = -(-p.keys // tile.columns)
    streaming.value_gradients[(p.n * blocks,)](
        x.q, x.k, x.v, x.bias, x.log_row, p.scale, x.lam, grad, f[-1], g[-1], g[last] if unrolled else None,
        nu[last] if unrolled else None, delta, found.v, gb[-1] if gb is not None else None, lam_gb, xe[-1], we[-1],
        *p.q, *p.k, *p.v, *_strides(grad), *p.bias, *p.row, *p.scales, *p.lams, *_strides(found.v),
        p.number, p.heads, p.queries, p.keys, blocks,
        **p.widths, BQ=tile.rows, BK=tile.columns, DAMPED=p.damped, STEPS=unrolled, EVEN=p.even and x.gradient != "implicit",
        num_warps=tile.warps, num_stages=tile.stages,
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
    return _finish(p, found, state, delta, fb, gb, dscale, wanted)


def _row_cotangents(
    p: Problem, state: State, t: int, lam_gb: Any, delta: Tensor, fb: Tensor | None, inverse_fb: Any, ce: Tensor, cf: Tensor
) -> None:
    x, tile = p.x, p.tiles.half_step
    blocks = -(-p.queries // tile.rows)
    streaming.row_cotangents[(p.n * blocks,)](
        x.q, x.k, x.bias, p.scale, x.log_row, state.f[t], state.f[-1], state.nu[t], lam_gb, delta,
        fb[t] if fb is not None else None, inverse_fb, ce, cf,
        *p.q, *p.k, *p.bias, *p.scales, *p.row, p.number, p.heads, p.queries, p.keys, blocks,
        **p.key_width, BA=tile.rows, BB=tile.columns, DAMPED=p.damped, FROM_OUTPUT=p.even and t == p.pairs - 1,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _column_cotangents(
    p: Problem, state: State, t: int, inverse_fb: Any, gb: Tensor | None, lam_gb: Any, xe: Tensor, we: Tensor
) -> None:
    x, tile, g = p.x, p.tiles.half_step, state.g
    blocks = -(-p.keys // tile.rows)
    streaming.column_cotangents[(p.n * blocks,)](
        x.q, x.k, x.bias, p.scale, x.lam, state.f[t], g[t], state.nu[t], inverse_fb, g[-1], g[t - 1], state.nu[t - 1],
        gb[t - 1] if gb is not None else None, lam_gb, xe[t - 1], we[t - 1],
        *p.q, *p.k, *p.bias, *p.scales, *p.lams, p.number, p.heads, p.queries, p.keys, blocks,
        **p.key_width, BA=tile.rows, BB=tile.columns, DAMPED=p.damped, num_warps=tile.warps, num_stages=tile.stages,
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
        rows = matvec(p, f, g, vector[..., 0].contiguous()) * inverse
        return matvec(p, f, g, rows, transposed=True)[..., None]

    cotangent = key_cotangent(gram, gb[0][..., None], safe[..., None], lam, there[..., None])[..., 0]
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
    flags = {"DAMPED": p.damped and unrolled, "LAST_ROW": not p.even and x.gradient != "implicit"}
    common = x.q, x.k, x.v, x.bias, x.log_row, p.scale, grad, state.f[-1], state.g[-1], nu, delta, *terms
    numbers = p.number, p.heads, p.queries, p.keys, p.n, terms[0].shape[0]
    places = *p.q, *p.k, *p.v, *_strides(grad), *p.bias, *p.row, *p.scales
    tile = p.tiles.queries
    blocks = -(-p.queries // tile.rows)
    dscale = p.steps(blocks, 1) if with_scale else None
    streaming.query_gradients[(p.n * blocks,)](
        *common, fb[0] if fb is not None else None, found.q, dscale, *places, *_strides(found.q), *numbers, blocks,
        **p.widths, BQ=tile.rows, BK=tile.columns, **flags, OPEN=unrolled, FROM_OUTPUT=p.even and p.pairs == 1,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tile = p.tiles.keys
    blocks = -(-p.keys // tile.columns)
    streaming.key_gradients[(p.n * blocks,)](
        *common, found.k, found.bias, *places, *_strides(found.k), *numbers, blocks,
        **p.widths, BQ=tile.rows, BK=tile.columns, **flags, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dscale


def _inverse_rows(p: Problem) -> Tensor:
    """1 / row marginals, (N, Q) or broadcastable to it."""
    row = p.x.log_row
    if row is None:
        return p.x.q.new_ones(1, 1, dtype=torch.float32)
    row = row.expand(p.n // p.heads, p.heads, p.queries).reshape(p.n, p.queries)
    return torch.where(row > NONE, (-row).exp(), 0.0)


def _strides(x: Tensor | None, axes: int = 3) -> tuple[int, ...]:
    """Of the leading axes; 0 for no tensor."""
    return (0,) * axes if x is None else x.stride()[:axes]


def _precision(x: Tensor) -> str:
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"
