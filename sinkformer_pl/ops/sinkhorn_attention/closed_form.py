"""Sinkhorn attention by matrix-vector products, with its backward in closed form, some heads at a time.

u = 2^(f + m) and w = 2^(g + c) are the potentials behind the shifts of the kernel matrix Z, and the plan is
diag(u) Z diag(w). Where the potentials go far in many half-steps, the shifts are chosen anew around them: a segment is
the half-steps of one Z. docs/fast_attention.md derives the backward: all of it is Z times, entry by entry, a matrix of
rank Dv + n_iters.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.marginals import only
from sinkformer_pl.ops.sinkhorn_attention.implicit import key_cotangent
from sinkformer_pl.ops.sinkhorn_attention.kernel import LOG_2, TILE_BYTES, Kernel
from sinkformer_pl.ops.sinkhorn_attention.problem import Problem, laned
from sinkformer_pl.ops.sinkhorn_attention.workspace import workspace

BLOCK_BYTES = 2**20
"""Size of the kernel matrices that one thread works on together: they should stay in its cache between half-steps."""

GPU_BLOCK_BYTES = 2**28
"""Size of the kernel matrices that a GPU works on together."""

LANE_ROWS = 128
"""Queries that a thread should have at the least where threads divide the queries of one head."""

SEGMENT = 22
"""Half-steps of one Z, an even number; few enough for the potentials to stay in range at scores of 1e4."""


class Run(NamedTuple):
    """What the half-steps leave behind; row steps, column steps or segments are the first axis.

    Attributes:
        u: (row steps, N, Q, 1), after each row step.
        w: (1 + column steps, N, K, 1), before each row step, and in the end.
        normalizer: (column steps, N, K, 1), what makes the columns of diag(u) Z sum to 1.
        m: (segments, N, Q, 1), the shift of the rows.
        c: (segments, N, K, 1), the shift of the columns.
    """

    u: Tensor
    w: Tensor
    normalizer: Tensor
    m: Tensor
    c: Tensor

    def block(self, heads: slice, lanes: int) -> "Run":
        """Take some of the problems, what belongs to queries divided into lanes."""
        u, w, normalizer, m, c = (tensor[:, heads] for tensor in self)
        return Run(laned(u, lanes, 1), w, normalizer, laned(m, lanes, 1), c)


class Gradients(NamedTuple):
    """Of the tensors of a problem with the same name; None where there is none.

    Attributes:
        q: (N, Q, D).
        k: (N, K, D).
        v: (N, K, Dv).
        bias: (N, Q, K).
        log_row: (N, Q, 1).
        log_column: (N, K, 1).
        lam: (N, 1, 1).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    log_row: Tensor | None
    log_column: Tensor | None
    lam: Tensor | None


def forward(p: Problem) -> tuple[Tensor, Run]:
    """Compute the output (N, Q, Dv), in the memory of one block of heads beside inputs and results, or of one tile."""
    q, k = p.q, p.k
    n, queries, keys, row_steps = q.shape[0], q.shape[1], k.shape[1], (p.n_iters + 1) // 2
    number = segments(p.n_iters)
    run = Run(
        u=q.new_empty(row_steps, n, queries, 1),
        w=q.new_empty(1 + p.n_iters // 2, n, keys, 1),
        normalizer=q.new_empty(p.n_iters // 2, n, keys, 1),
        m=q.new_empty(number, n, queries, 1),
        c=q.new_empty(number, n, keys, 1),
    )
    output = q.new_empty(n, queries, p.v.shape[2])
    for heads, lanes in _blocks(q, k):
        part = p.block(heads, lanes)
        _solve(part, Kernel(part), run.block(heads, lanes), laned(output[heads], lanes))
    return output, run


def backward(p: Problem, output: Tensor, run: Run, grad: Tensor, *, marginals: bool) -> Gradients:
    """Gradients of all that are tensors, of the marginals where they are wanted."""
    q, k = p.q, p.k
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(p.v)
    dbias = torch.empty_like(p.bias) if p.bias is not None else None
    dlam = torch.zeros_like(p.lam) if isinstance(p.lam, Tensor) else None
    drow, dcolumn = (q.new_zeros(*x.shape[:2], 1) if marginals else None for x in (q, k))
    for heads, lanes in _blocks(q, k):
        part = p.block(heads, lanes)
        adjoint = _Adjoint(part, Kernel(part), run.block(heads, lanes))
        adjoint.drow = laned(drow[heads], lanes) if drow is not None else None
        adjoint.dcolumn = dcolumn[heads] if dcolumn is not None else None
        adjoint.run_back(
            laned(output[heads], lanes),
            laned(grad[heads], lanes),
            laned(dq[heads], lanes),
            dk[heads],
            dv[heads],
            laned(dbias[heads], lanes) if dbias is not None else None,
        )
        if dlam is not None:
            dlam[heads] = adjoint.dlam
    return Gradients(dq, dk, dv, dbias, drow, dcolumn, dlam)


def segments(n_iters: int) -> int:
    """Count the kernel matrices that this many half-steps take."""
    return len(_segments(n_iters))


def potentials(p: Problem, run: Run) -> tuple[Tensor, Tensor]:
    """F (N, Q, 1) of the queries and g (N, K, 1) of the keys, -inf or NaN without mass."""
    return LOG_2 * (run.u[-1].log2() - run.m[-1]), LOG_2 * (run.w[-1].log2() - run.c[-1])


def sums(p: Problem, run: Run) -> tuple[Tensor, Tensor]:
    """Row sums (N, Q, 1) and column sums (N, K, 1) of the plan."""
    rows, columns = torch.empty_like(run.u[-1]), torch.empty_like(run.w[-1])
    for heads, lanes in _blocks(p.q, p.k):
        part = p.block(heads, lanes)
        kernel, own = Kernel(part), run.block(heads, lanes)
        kernel.use(own.m[-1], own.c[-1])
        u, w = own.u[-1], own.w[-1]
        laned(rows[heads], lanes).copy_(u * kernel.matvec(w))
        columns[heads] = w * kernel.rmatvec(u)
    return rows, columns


def _solve(p: Problem, kernel: Kernel, run: Run, output: Tensor) -> None:
    """All half-steps of a block, which fill the run and the output."""
    column = p.log_column.exp() if isinstance(p.log_column, Tensor) else math.exp(p.log_column)
    last = p.n_iters - 1
    g: Tensor | None = None
    for segment, steps in enumerate(_segments(p.n_iters)):
        c = run.c[segment]
        if segment:
            g = only(run.w[steps.start // 2].log2() - run.c[segment - 1], p.columns)
        for step in range(steps.start, steps.stop, 2):
            at = step // 2
            if step == steps.start:
                sums = kernel.start(g, run.m[segment], c, run.w[at], run.u[at])
            elif step < last:
                sums = kernel.row_and_column_step(run.w[at], run.u[at])
            if step == last:
                continue
            normalizer, w = run.normalizer[at], run.w[at + 1]
            normalizer.copy_(kernel.column_step(sums))
            if p.lam is None:
                torch.mul(normalizer, column, out=w)
            else:
                damped = p.lam * (p.log_column / LOG_2 + normalizer.log2() - c) + c
                w.copy_(only(damped.exp2(), normalizer > 0))
    kernel.times_values(run.w[-1], run.u[-1], output, row_step=last > 0 and last % 2 == 0)


class _Adjoint:
    """The way back through the half-steps of a block.

    `f` and `g` are the cotangents of the potentials, of the shape of the queries and keys of the block. What the
    half-steps of a segment add to the gradient of the scores is Z * (left @ right^T); the columns of these are filled
    on the way.
    """

    def __init__(self, p: Problem, kernel: Kernel, run: Run) -> None:
        self.p, self.kernel, self.run = p, kernel, run
        self.lam: float | Tensor = 1.0 if p.lam is None else p.lam
        self.dlam: Tensor | float = 0.0
        self.drow: Tensor | None = None
        self.dcolumn: Tensor | None = None
        self.inverse_row = None if p.row is None else only(1 / p.row, p.row > 0)

    def run_back(self, output: Tensor, grad: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, dbias: Tensor | None) -> None:
        """Fill the gradients, and set `dlam`."""
        segments = list(enumerate(_segments(self.p.n_iters)))
        segments = segments if self.p.gradient == "unrolled" else segments[-1:]
        for segment, steps in reversed(segments):
            self.c = self.run.c[segment]
            self.kernel.use(self.run.m[segment], self.c)
            last = steps is segments[-1][1]
            steps_with_columns = {"unrolled": len(steps), "implicit": 2, "detached": 1}[self.p.gradient]
            self._take_columns(steps_with_columns + (grad.shape[-1] if last else 0))
            if last:
                self._product_with_values(output, grad, dv)
            {"unrolled": self._unrolled, "implicit": self._implicit, "detached": self._detached}[self.p.gradient](steps)
            self.kernel.add_gradients(self.left, self.right, dq, dk, dbias, first=last)

    def _take_columns(self, number: int) -> None:
        rows, keys = self.run.u.shape[1:3], self.run.w.shape[1:3]
        self.left = workspace("left", math.prod(rows) * number, self.run.u).view(*rows, number)
        self.right = workspace("right", math.prod(keys) * number, self.run.u).view(*keys, number)
        self.taken = 0

    def _product_with_values(self, output: Tensor, grad: Tensor, dv: Tensor) -> None:
        u, w, self.taken = self.run.u[-1], self.run.w[-1], grad.shape[-1]
        left, right = self.left[..., : self.taken], self.right[..., : self.taken]
        # What the columns will hold is written last; before that they are memory for two products.
        self.f = _product(grad, output, left).sum(-1, keepdim=True)
        _product(u, grad, left)
        self.passed_on = w * self.kernel.rmatvec_and_product(self._normalized(u * self.f), left, dv)
        dv *= w
        self.g = _product(self.p.v, dv, right).sum(-1, keepdim=True)
        _product(w, self.p.v, right)

    def _unrolled(self, steps: range) -> None:
        last = self.p.n_iters - 1
        if steps[-1] == last and last % 2 == 0:
            self._row_step(last // 2, self.run.u[-1], self.f)
            self.f, self.g = torch.zeros_like(self.f), self.g - self.passed_on
        for at in range(steps.stop // 2 - 1, steps.start // 2 - 1, -1):
            self._pair(at)

    def _pair(self, at: int) -> None:
        """Column step `at` and the row step before it."""
        weighted, f, u = self._column_step(at), self.f, self.run.u[at]
        if at == 0:
            self._row_step(at, u, f - u * self.kernel.matvec(weighted))
            return
        cotangent = torch.empty_like(u)

        def both(rows: slice, product: Tensor) -> Tensor:
            torch.sub(f[:, rows], u[:, rows] * product, out=cotangent[:, rows])
            return self._normalized(u[:, rows] * cotangent[:, rows], rows)

        self.g = -self.run.w[at] * self.kernel.rmatvec_of_matvec(weighted, both)
        self._row_step(at, u, cotangent)
        self.f = torch.zeros_like(f)

    def _detached(self, steps: range) -> None:
        self._row_step((self.p.n_iters - 1) // 2, self.run.u[-1], self.f)

    def _implicit(self, steps: range) -> None:
        u, w, kernel = self.run.u[-1], self.run.w[-1], self.kernel
        sums, squared = w * kernel.rmatvec(u), self._normalized(u.square())

        def gram(vector: Tensor) -> Tensor:
            return w * kernel.rmatvec_of_matvec(w * vector, lambda rows, product: squared[:, rows] * product)

        there = sums > 0 if self.p.bias is not None else self.p.columns
        self.g = key_cotangent(gram, self.g - self.passed_on, sums, self.lam, there)
        f = self.f - self.lam * u * kernel.matvec(w * only(self.g / sums, there))
        self._row_step(-1, u, f)
        self._column_step(-1)

    def _row_step(self, at: int, u: Tensor, cotangent: Tensor) -> None:
        """Add the columns of row step `at` with this cotangent of its potential."""
        if self.drow is not None:
            self.drow += cotangent
        self._add_columns(self._normalized(u * cotangent), self.run.w[at])

    def _normalized(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Divide what belongs to queries by the sums of their rows: a row step's softmax is its plan over these."""
        return x if self.inverse_row is None else x * self.inverse_row[:, rows]

    def _column_step(self, at: int) -> Tensor:
        """Add the columns of column step `at`, whose cotangent is g; return lam * g * normalizer."""
        normalizer = self.run.normalizer[at]
        if self.p.lam is not None:
            distance = only(self.p.log_column + LOG_2 * (normalizer.log2() - self.c), normalizer > 0)
            self.dlam = self.dlam + (self.g * distance).sum(-2, keepdim=True)
        if self.dcolumn is not None:
            self.dcolumn += self.lam * self.g
        weighted = self.lam * self.g * normalizer
        self._add_columns(self.run.u[at], weighted)
        return weighted

    def _add_columns(self, left: Tensor, right: Tensor) -> None:
        """Those of a half-step, which are subtracted."""
        self.left[..., self.taken] = -left[..., 0]
        self.right[..., self.taken] = right[..., 0]
        self.taken += 1


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Multiply entry by entry."""
    return torch.mul(a, b, out=out)


def _segments(n_iters: int) -> list[range]:
    # A last row step alone belongs to the segment before it.
    starts = range(0, max(1, n_iters - 1), SEGMENT)
    return [range(start, n_iters if start == starts[-1] else start + SEGMENT) for start in starts]


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[slice, int]]:
    """Heads that are worked on together, and into how many lanes the queries of one are divided.

    Threads divide a batch among themselves, which is much faster than dividing each product.
    """
    heads, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    on_cpu = q.device.type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    matrix = max(1, queries * keys * q.element_size())
    alone = matrix > TILE_BYTES or heads < threads
    lanes = threads if alone and queries % threads == 0 and queries // threads >= LANE_ROWS else 1
    size = 1 if lanes > 1 else threads * max(1, (BLOCK_BYTES if on_cpu else GPU_BLOCK_BYTES) // matrix)
    for start in range(0, heads, size):
        yield slice(start, min(start + size, heads)), lanes
