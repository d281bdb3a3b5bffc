"""Sinkhorn attention by matrix-vector products, with its backward in closed form, some heads at a time.

u = 2^(f + m) and w = 2^(g + c) are the potentials behind the shifts of the kernel matrix Z, and the plan is
diag(u) Z diag(w). Where the potentials go far in many half-steps, the shifts are chosen anew around them: a segment is
the half-steps of one Z. docs/fast_attention.md derives the backward: all of it is Z times, entry by entry, a matrix of
rank Dv + n_iters.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.marginals import only
from sinkformer_pl.ops.sinkhorn_attention.implicit import key_cotangent
from sinkformer_pl.ops.sinkhorn_attention.kernel import LOG_2, TILE_BYTES, Kernel, invert
from sinkformer_pl.ops.sinkhorn_attention.problem import Problem, Solution, laned
from sinkformer_pl.ops.sinkhorn_attention.workspace import workspace

BLOCK_BYTES = 2**20
"""Size of the kernel matrices that one thread works on together: they should stay in its cache between half-steps."""

GPU_BLOCK_BYTES = 2**28
"""Size of the kernel matrices that a GPU works on together."""

LANE_ROWS = 128
"""Queries that a thread should have at the least where threads divide the queries of one head."""

SEGMENT = 22
"""Half-steps of one Z, an even number; few enough for the potentials to stay in range at scores of 1e4."""


class _Run(NamedTuple):
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

    def block(self, heads: slice, lanes: int) -> "_Run":
        u, w, normalizer, m, c = (tensor[:, heads] for tensor in self)
        return _Run(laned(u, lanes, 1), w, normalizer, laned(m, lanes, 1), c)


def closed_form_attention(problem: Problem) -> Solution:
    """Solve a problem; beside inputs and outputs it takes the memory of one block of heads, or of one tile of that."""
    p = problem
    lam = p.lam if isinstance(p.lam, Tensor) else None
    return Solution(*_ClosedForm.apply(p.q, p.k, p.v, p.bias, lam, problem))


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lam: Tensor | None, p: Problem) -> Any:
        n, queries, keys, row_steps = q.shape[0], q.shape[1], k.shape[1], (p.n_iters + 1) // 2
        segments = len(_segments(p.n_iters))
        run = _Run(
            u=q.new_empty(row_steps, n, queries, 1),
            w=q.new_empty(1 + p.n_iters // 2, n, keys, 1),
            normalizer=q.new_empty(p.n_iters // 2, n, keys, 1),
            m=q.new_empty(segments, n, queries, 1),
            c=q.new_empty(segments, n, keys, 1),
        )
        output = q.new_empty(n, queries, v.shape[2])
        residual = q.new_empty(n) if p.with_info else None
        for heads, lanes in _blocks(q, k):
            part = p.block(heads, lanes)
            kernel = Kernel(part)
            _solve(part, kernel, run.block(heads, lanes), laned(output[heads], lanes))
            if residual is not None:
                residual[heads] = _residual(part, kernel, run.block(heads, lanes))
        ctx.save_for_backward(q, k, v, bias, lam, output, *run)
        # Tensors of a graph belong to save_for_backward alone.
        none: Any = None
        ctx.problem = p._replace(q=none, k=none, v=none, bias=None, lam=None if lam is not None else p.lam)
        f = g = None
        if p.with_info:
            f = LOG_2 * only(run.u[-1].log2() - run.m[-1], p.rows)
            g = LOG_2 * only(run.w[-1].log2() - run.c[-1], p.columns)
            ctx.mark_non_differentiable(f, g, residual)
        return output, f, g, residual

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("sinkhorn_attention has no second derivative; use backend='reference' for one")
        q, k, v, bias, lam, output, *run = ctx.saved_tensors
        p: Problem = ctx.problem._replace(q=q, k=k, v=v, bias=bias)
        p = p if lam is None else p._replace(lam=lam)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dbias = torch.empty_like(bias) if bias is not None else None
        dlam = torch.zeros_like(lam) if lam is not None else None
        for heads, lanes in _blocks(q, k):
            part = p.block(heads, lanes)
            adjoint = _Adjoint(part, Kernel(part), _Run(*run).block(heads, lanes))
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
        return dq, dk, dv, dbias, dlam, None


def _solve(p: Problem, kernel: Kernel, run: _Run, output: Tensor) -> None:
    """All half-steps of a block, which fill the run and the output."""
    ratio = p.log_ratio.exp() if isinstance(p.log_ratio, Tensor) else math.exp(p.log_ratio)
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
                sums = kernel.row_and_column(run.w[at], run.u[at])
            if step == last:
                continue
            normalizer, w = run.normalizer[at], run.w[at + 1]
            normalizer.copy_(invert(sums, p.columns))
            if p.lam is None:
                torch.mul(normalizer, ratio, out=w)
            else:
                w.copy_(only((p.lam * (p.log_ratio / LOG_2 + normalizer.log2() - c) + c).exp2(), p.columns))
    kernel.times_values(run.w[-1], run.u[-1], output, row_step=last > 0 and last % 2 == 0)


class _Adjoint:
    """The way back through the half-steps of a block.

    `f` and `g` are the cotangents of the potentials, of the shape of the queries and keys of the block. What the
    half-steps of a segment add to the gradient of the scores is Z * (left @ right^T); the columns of these are filled
    on the way.
    """

    def __init__(self, p: Problem, kernel: Kernel, run: _Run) -> None:
        self.p, self.kernel, self.run = p, kernel, run
        self.lam: float | Tensor = 1.0 if p.lam is None else p.lam
        self.dlam: Tensor | float = 0.0

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
        self.passed_on = w * self.kernel.back_with_factors(u * self.f, left, dv)
        dv *= w
        self.g = _product(self.p.v, dv, right).sum(-1, keepdim=True)
        _product(w, self.p.v, right)

    def _unrolled(self, steps: range) -> None:
        last = self.p.n_iters - 1
        if steps[-1] == last and last % 2 == 0:
            self._row_step(last // 2, self.run.u[-1] * self.f)
            self.f, self.g = torch.zeros_like(self.f), self.g - self.passed_on
        for at in range(steps.stop // 2 - 1, steps.start // 2 - 1, -1):
            self._pair(at)

    def _pair(self, at: int) -> None:
        """Column step `at` and the row step before it."""
        weighted, f, u = self._column_step(at), self.f, self.run.u[at]
        if at == 0:
            self._row_step(at, u * (f - u * self.kernel.there(weighted)))
            return
        left = torch.empty_like(u)

        def both(rows: slice, product: Tensor) -> Tensor:
            torch.mul(u[:, rows], f[:, rows] - u[:, rows] * product, out=left[:, rows])
            return left[:, rows]

        self.g = -self.run.w[at] * self.kernel.there_and_back(weighted, both)
        self._row_step(at, left)
        self.f = torch.zeros_like(f)

    def _detached(self, steps: range) -> None:
        self._row_step((self.p.n_iters - 1) // 2, self.run.u[-1] * self.f)

    def _implicit(self, steps: range) -> None:
        u, w, kernel = self.run.u[-1], self.run.w[-1], self.kernel
        sums, squared = w * kernel.back(u), u.square()

        def gram(vector: Tensor) -> Tensor:
            return w * kernel.there_and_back(w * vector, lambda rows, product: squared[:, rows] * product)

        self.g = key_cotangent(gram, self.g - self.passed_on, sums, self.lam, self.p.columns)
        f = self.f - self.lam * u * kernel.there(w * only(self.g / sums, self.p.columns))
        self._row_step(-1, u * f)
        self._column_step(-1)

    def _row_step(self, at: int, weighted: Tensor) -> None:
        """Add the columns of row step `at`, for u times its cotangent."""
        self._add_columns(weighted, self.run.w[at])

    def _column_step(self, at: int) -> Tensor:
        """Add the columns of column step `at`, whose cotangent is g; return lam * g * normalizer."""
        normalizer = self.run.normalizer[at]
        if self.p.lam is not None:
            distance = only(self.p.log_ratio + LOG_2 * (normalizer.log2() - self.c), self.p.columns)
            self.dlam = self.dlam + (self.g * distance).sum(-2, keepdim=True)
        weighted = self.lam * self.g * normalizer
        self._add_columns(self.run.u[at], weighted)
        return weighted

    def _add_columns(self, left: Tensor, right: Tensor) -> None:
        """Those of a half-step, which are subtracted."""
        self.left[..., self.taken] = -left[..., 0]
        self.right[..., self.taken] = right[..., 0]
        self.taken += 1


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Entry by entry. A compiler takes no output that isn't contiguous."""
    return out.copy_(a * b) if torch.compiler.is_compiling() else torch.mul(a, b, out=out)


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
    threads = torch.get_num_threads() if on_cpu and not torch.compiler.is_compiling() else 1
    matrix = max(1, queries * keys * q.element_size())
    alone = matrix > TILE_BYTES or heads < threads
    lanes = threads if alone and queries % threads == 0 and queries // threads >= LANE_ROWS else 1
    size = 1 if lanes > 1 else threads * max(1, (BLOCK_BYTES if on_cpu else GPU_BLOCK_BYTES) // matrix)
    for start in range(0, heads, size):
        yield slice(start, min(start + size, heads)), lanes


def _residual(p: Problem, kernel: Kernel, run: _Run) -> Tensor:
    u, w = run.u[-1], run.w[-1]
    ratio = p.log_ratio.exp() if isinstance(p.log_ratio, Tensor) else math.exp(p.log_ratio)
    row_error = only((u * kernel.there(w) - 1).abs(), p.rows).amax((-2, -1))
    column_error = only((w * kernel.back(u) / ratio - 1).abs(), p.columns).amax((-2, -1))
    return torch.maximum(row_error.unflatten(0, (len(column_error), -1)).amax(-1), column_error)
