"""The streaming backend: memory O(Q + K) and one tile of scores, in passes over tiles of queries.

A pass makes the scores of a tile anew and takes their exponential once. It does a row step and the column step after it
together: the rows of a tile are complete within it, and its part of the column sums follows from them. The way back is
the same, a column step and the row step before it in one pass. Potentials stay logarithms throughout, so that no
pass depends on how far they go.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.implicit import key_cotangent
from sinkformer_pl.ops.marginals import only
from sinkformer_pl.ops.problem import Problem, Solution

TILE_BYTES = 2**20
"""Size of a tile of scores, which should stay in the cache."""

MIN_ROWS = 64
"""Queries of a tile at the least: products of fewer rows are slow."""

SEGMENT = 22
"""Half-steps whose terms of the gradient are gathered over one kernel, an even number."""


class _Run(NamedTuple):
    """What the half-steps leave behind, of one problem; steps are the first axis.

    The potential of the queries is log(u) - m. Kept apart, the shift and what remains are rounded to nothing that a
    large potential would swallow, and exp(S + g - m) is the same to the last bit in each pass.

    Attributes:
        m: (row steps, Q), maxima of S + g over the keys; infinite in rows without mass.
        u: (row steps, Q), 1 over the sums of exp(S + g - m); 0 in rows without mass.
        g: (1 + column steps, K), the start first; -inf in columns without mass.
        log_normalizer: (column steps, K), g before damping and without the marginal; -inf likewise.
    """

    m: Tensor
    u: Tensor
    g: Tensor
    log_normalizer: Tensor


def streaming_attention(problem: Problem) -> Solution:
    """Solve a problem without ever holding its Q x K scores.

    Raises:
        NotImplementedError: a bias, which is Q x K itself.
    """
    if problem.bias is not None:
        raise NotImplementedError("the streaming backend takes no bias, which is as large as the scores; use 'dense'")
    p = problem
    lam = p.lam if isinstance(p.lam, Tensor) else None
    return Solution(*_StreamingAttention.apply(p.q, p.k, p.v, lam, problem))


class _StreamingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lam: Tensor | None, p: Problem) -> Any:
        n, queries, keys = q.shape[0], q.shape[1], k.shape[1]
        m, u = q.new_empty(2, n, (p.n_iters + 1) // 2, queries)
        g = q.new_empty(n, 1 + p.n_iters // 2, keys)
        log_normalizer = q.new_empty(n, p.n_iters // 2, keys)
        output = q.new_empty(n, queries, v.shape[2])
        residual = q.new_empty(n) if p.with_info else None
        for i in range(n):
            run = _Run(m[i], u[i], g[i], log_normalizer[i])
            head = _Head(p.block(slice(i, i + 1)))
            head.solve(run, output[i])
            if residual is not None:
                residual[i] = head.residual(run)
        ctx.save_for_backward(q, k, v, lam, output, m, u, g, log_normalizer)
        # Tensors of a graph belong to save_for_backward alone.
        none: Any = None
        ctx.problem = p._replace(q=none, k=none, v=none, lam=None if lam is not None else p.lam)
        last_f = last_g = None
        if p.with_info:
            last_f = only((u[:, -1].log() - m[:, -1])[..., None], p.rows)
            last_g = only(g[:, -1, :, None], p.columns)
            ctx.mark_non_differentiable(last_f, last_g, residual)
        return output, last_f, last_g, residual

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("sinkhorn_attention has no second derivative; use backend='reference' for one")
        q, k, v, lam, output, *run = ctx.saved_tensors
        p: Problem = ctx.problem._replace(q=q, k=k, v=v)
        p = p if lam is None else p._replace(lam=lam)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.empty_like(v)
        dlam = torch.zeros_like(lam) if lam is not None else None
        for i in range(len(q)):
            adjoint = _Adjoint(_Head(p.block(slice(i, i + 1))), _Run(*(tensor[i] for tensor in run)))
            dv[i] = adjoint.run_back(output[i], grad[i], dq[i], dk[i])
            if dlam is not None:
                dlam[i] = adjoint.dlam
        return dq, dk, dv, dlam, None


class _Head:
    """One problem, 2-D, and its tiles."""

    def __init__(self, p: Problem) -> None:
        self.n_iters, self.gradient = p.n_iters, p.gradient
        self.q, self.k, self.v = p.q[0], p.k[0], p.v[0]
        self.rows = None if p.rows is None else p.rows[0, :, 0]
        self.columns = None if p.columns is None else p.columns[0, :, 0]
        self.log_ratio = p.log_ratio[0, 0, 0] if isinstance(p.log_ratio, Tensor) else p.log_ratio
        self.lam = p.lam[0, 0, 0] if isinstance(p.lam, Tensor) else p.lam
        size = max(MIN_ROWS, TILE_BYTES // (max(1, len(self.k)) * self.q.element_size()))
        self.tiles = [slice(start, min(start + size, len(self.q))) for start in range(0, len(self.q), size)]
        self.buffer = self.q.new_empty(min(size, len(self.q)), len(self.k))

    def logits(self, g: Tensor, m: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Tiles of S + g, or of S + g - m, one after the other in the same memory."""
        for rows in self.tiles:
            # As features of the product, potentials would have the scores rounded otherwise in each pass.
            tile = torch.mm(self.q[rows], self.k.mT, out=self.buffer[: rows.stop - rows.start]).add_(g)
            yield rows, tile if m is None else tile.sub_(m[rows, None])

    def plan(self, run: _Run) -> Iterator[tuple[slice, Tensor]]:
        """Tiles of the plan without its factors u: exp(S + g - m)."""
        for rows, tile in self.logits(run.g[-1], run.m[-1]):
            yield rows, tile.exp_()

    def solve(self, run: _Run, output: Tensor) -> None:
        """All half-steps, which fill the run and the output."""
        run.g[0] = 0.0
        if self.columns is not None:
            run.g[0].masked_fill_(~self.columns, -math.inf)
        for at in range(self.n_iters // 2):
            log_normalizer = self._first_pair(run) if at == 0 else self._pair(run, at)
            g = self.log_ratio + log_normalizer
            g = g if self.lam is None else self.lam * g
            run.log_normalizer[at], run.g[at + 1] = log_normalizer, g
            if self.columns is not None:
                run.log_normalizer[at].masked_fill_(~self.columns, -math.inf)
                run.g[at + 1].masked_fill_(~self.columns, -math.inf)
        if self.n_iters % 2 == 0:
            for rows, tile in self.plan(run):
                torch.mm(tile, self.v, out=output[rows])
            output.mul_(run.u[-1, :, None])
            return
        values = torch.cat([self.v, torch.ones_like(self.v[:, :1])], -1)
        for rows, tile in self.logits(run.g[-1]):
            products = self._shift(rows, tile, run.m[-1]).exp_() @ values
            torch.mul(products[:, :-1], self._invert(rows, products[:, -1], run.u[-1])[:, None], out=output[rows])

    def residual(self, run: _Run) -> Tensor:
        """The larger of the row and the column error."""
        sums = torch.zeros_like(run.g[-1])
        row_error = torch.zeros_like(run.u[-1])
        for rows, tile in self.plan(run):
            sums.addmv_(tile.mT, run.u[-1, rows])
            row_error[rows] = (run.u[-1, rows] * tile.sum(-1) - 1).abs()
        ratio = torch.as_tensor(self.log_ratio, dtype=sums.dtype, device=sums.device).exp()
        return torch.maximum(only(row_error, self.rows).max(), only((sums / ratio - 1).abs(), self.columns).max())

    def _pair(self, run: _Run, at: int) -> Tensor:
        """Row step `at` and the column step after it; returns minus the logarithms of the sums of exp(S + f)."""
        sums = torch.zeros_like(run.g[at])
        for rows, tile in self.logits(run.g[at]):
            totals = self._shift(rows, tile, run.m[at]).exp_().sum(-1)
            sums.addmv_(tile.mT, self._invert(rows, totals, run.u[at]))
        return only(run.g[at], self.columns) - sums.clamp_(min=torch.finfo(sums.dtype).tiny).log_()

    def _first_pair(self, run: _Run) -> Tensor:
        """The same for g = 0, where a column may lie so far below the row maxima that its sum would underflow."""
        lowest = torch.finfo(run.g.dtype).min
        shift = torch.full_like(run.g[0], lowest)
        sums = torch.zeros_like(shift)
        for rows, tile in self.logits(run.g[0]):
            c = self._shift(rows, tile, run.m[0]).amax(0).clamp_(min=lowest)
            totals = tile.sub_(c).exp_() @ c.exp()
            part = tile.mT @ self._invert(rows, totals, run.u[0])
            highest = torch.maximum(shift, c)
            sums = sums * (shift - highest).exp() + part * (c - highest).exp()
            shift = highest
        return -(sums.clamp_(min=torch.finfo(sums.dtype).tiny).log_() + shift)

    def _shift(self, rows: slice, tile: Tensor, m: Tensor) -> Tensor:
        """Subtract the row maxima in place, and keep them in m."""
        torch.amax(tile, -1, out=m[rows])
        if self.rows is not None:
            m[rows].masked_fill_(~self.rows[rows], math.inf)
        return tile.sub_(m[rows, None])

    def _invert(self, rows: slice, sums: Tensor, u: Tensor) -> Tensor:
        """Set u to the inverse of the sums, 0 without mass."""
        torch.reciprocal(sums, out=u[rows])
        return u[rows] if self.rows is None else u[rows].masked_fill_(~self.rows[rows], 0.0)


class _Adjoint:
    """The way back through the half-steps of one problem.

    `f` and `g` are the cotangents of the potentials, (Q,) and (K,). What the half-steps of a segment add to the
    gradient of the scores is a kernel times, entry by entry, left @ right^T; the columns are gathered on the way.
    """

    def __init__(self, head: _Head, run: _Run) -> None:
        self.head, self.run = head, run
        self.lam: float | Tensor = 1.0 if head.lam is None else head.lam
        self.dlam: Tensor | float = 0.0
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []

    def run_back(self, output: Tensor, grad: Tensor, dq: Tensor, dk: Tensor) -> Tensor:
        """Return the gradient of the values; add those of queries and keys to dq and dk."""
        run, head = self.run, self.head
        self.f = (grad * output).sum(-1)
        self._new_segment(head.n_iters // 2)
        factors = run.u[-1, :, None] * torch.cat([grad, self.f[:, None]], -1)
        products = head.v.new_zeros(len(head.k), factors.shape[1])
        for rows, tile in head.plan(run):
            products.addmm_(tile.mT, factors[rows])
        dv, passed_on = products[:, :-1], products[:, -1]
        self.g = (head.v * dv).sum(-1)
        self._add(-1, grad, run.g[-1], head.v)
        {"unrolled": self._unrolled, "implicit": self._implicit, "detached": self._detached}[head.gradient](
            passed_on, dq, dk
        )
        self._flush(dq, dk)
        return dv

    def _unrolled(self, passed_on: Tensor, dq: Tensor, dk: Tensor) -> None:
        pairs = self.head.n_iters // 2
        f = self.f
        if self.head.n_iters % 2:
            self._row_step(pairs)
            self.g = self.g - passed_on
            f = torch.zeros_like(f)
        for at in range(pairs - 1, -1, -1):
            if (pairs - at) % (SEGMENT // 2) == 0:
                self._flush(dq, dk)
                self._new_segment(at + 1)
            self._column_step(at)
            self.f, self.g = self._pair(at, f)
            self._row_step(at)
            f = torch.zeros_like(f)

    def _detached(self, passed_on: Tensor, dq: Tensor, dk: Tensor) -> None:
        self._row_step((self.head.n_iters - 1) // 2)

    def _implicit(self, passed_on: Tensor, dq: Tensor, dk: Tensor) -> None:
        head, run, u = self.head, self.run, self.run.u[-1]
        sums = torch.zeros_like(run.g[-1])
        for rows, tile in head.plan(run):
            sums.addmv_(tile.mT, u[rows])

        def gram(vector: Tensor) -> Tensor:
            total = torch.zeros_like(vector)
            for rows, tile in head.plan(run):
                total.addmv_(tile.mT, u[rows].square() * (tile @ vector))
            return total

        self.g = key_cotangent(gram, self.g - passed_on, sums, self.lam, head.columns, dim=-1)
        normalized = self.lam * only(self.g / sums, head.columns)
        for rows, tile in head.plan(run):
            self.f[rows] -= u[rows] * (tile @ normalized)
        self._row_step(-1)
        self._column_step(-1)

    def _pair(self, at: int, f: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents of f behind column step `at` (those at hand added) and of g behind the row step before it."""
        run, weighted = self.run, self.lam * self.g
        f = f.clone()
        sums = torch.zeros_like(self.g)
        for rows, tile in self.head.logits(run.log_normalizer[at], run.m[at]):
            u = run.u[at, rows]
            f[rows] -= u * (tile.exp_() @ weighted)
            if at:
                sums.addmv_(tile.mT, u * f[rows])
        return f, -sums * self._ratio(run.g[at], run.log_normalizer[at])

    def _row_step(self, at: int) -> None:
        self._add(at, -self.f[:, None], self.run.g[at], None)

    def _column_step(self, at: int) -> None:
        log_normalizer = self.run.log_normalizer[at]
        if self.head.lam is not None:
            distance = only(self.head.log_ratio + log_normalizer, self.head.columns)
            self.dlam = self.dlam + (self.g * distance).sum()
        self._add(at, None, log_normalizer, (-self.lam * self.g)[:, None])

    def _new_segment(self, columns_done: int) -> None:
        """Choose the kernel exp(S + g - m): of the last step, g undamped, which no column is far below."""
        self.m = self.run.m[max(columns_done - 1, 0)]
        self.g_kernel = self.run.log_normalizer[columns_done - 1] if columns_done else self.run.g[0]

    def _add(self, at: int, left: Tensor | None, g: Tensor, right: Tensor | None) -> None:
        """Add the columns of exp(S + f + g) * (left @ right^T), f from row step `at`; None for ones."""
        row = only(self.run.u[at] * (self.m - self.run.m[at]).exp(), self.head.rows)[:, None]
        column = self._ratio(g, self.g_kernel)[:, None]
        self.left.append(row if left is None else row * left)
        self.right.append(column if right is None else column * right)

    def _ratio(self, potential: Tensor, other: Tensor) -> Tensor:
        return only((potential - other).exp(), self.head.columns)

    def _flush(self, dq: Tensor, dk: Tensor) -> None:
        """Turn the gathered columns into gradients of queries and keys."""
        left, right = torch.cat(self.left, -1), torch.cat(self.right, -1).mT
        self.left, self.right = [], []
        for rows, tile in self.head.logits(self.g_kernel, self.m):
            tile.exp_().mul_(left[rows] @ right)
            dq[rows] += tile @ self.head.k
            dk.addmm_(tile.mT, self.head.q[rows])
