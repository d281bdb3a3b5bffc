"""The dense backend: the kernel matrix of a few heads at a time, and the backward in closed form.

With row maxima m and then column maxima c of the scores S, the matrix Z = exp(S - m - c) has entries in [0, 1] and a
1 in each row and each column. So no sum over it under- or overflows at the start, whatever the scores, and every
half-step is a product of Z or its transpose with a vector: u = exp(f + m), w = exp(g + c), and the plan is
diag(u) Z diag(w). Where the potentials go far in many half-steps, Z is made anew around them: a segment is the
half-steps of one Z. docs/fast_attention.md derives the backward: all of it is Z times, entry by entry, a matrix of
rank Dv + n_iters.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.implicit import key_cotangent
from sinkformer_pl.ops.marginals import only
from sinkformer_pl.ops.problem import Problem, Solution

BLOCK_BYTES = 2**22
"""Size of the kernel matrices that are worked on together: they should stay in the cache between half-steps."""

SEGMENT = 22
"""Half-steps of one Z, an even number; few enough for the potentials to stay in range at scores of 1e4."""


class _Run(NamedTuple):
    """What the half-steps leave behind; row steps, column steps or segments are the first axis.

    Attributes:
        u: (row steps, N, Q, 1), after each row step.
        w: (1 + column steps, N, K, 1), before each row step, and in the end.
        normalizer: (column steps, N, K, 1), what makes the columns of diag(u) Z sum to 1.
        m: (segments, N, Q, 1), the shift of the rows: Z = exp(S - m - c). Infinite in rows without mass.
        c: (segments, N, K, 1), the shift of the columns, likewise.
    """

    u: Tensor
    w: Tensor
    normalizer: Tensor
    m: Tensor
    c: Tensor

    def block(self, heads: slice) -> "_Run":
        return _Run(*(tensor[:, heads] for tensor in self))


def dense_attention(problem: Problem) -> Solution:
    """Solve a problem; beside inputs and outputs it takes the memory of one block."""
    p = problem
    lam = p.lam if isinstance(p.lam, Tensor) else None
    return Solution(*_DenseAttention.apply(p.q, p.k, p.v, p.bias, lam, problem))


class _DenseAttention(torch.autograd.Function):
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
        for heads in _blocks(q, k):
            part = p.block(heads)
            output[heads], z = _iterate(part, run.block(heads))
            if residual is not None:
                residual[heads] = _residual(part, z, run.block(heads))
        ctx.save_for_backward(q, k, v, bias, lam, output, *run)
        # Tensors of a graph belong to save_for_backward alone.
        none: Any = None
        ctx.problem = p._replace(q=none, k=none, v=none, bias=None, lam=None if lam is not None else p.lam)
        f = g = None
        if p.with_info:
            f, g = only(run.u[-1].log() - run.m[-1], p.rows), only(run.w[-1].log() - run.c[-1], p.columns)
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
        for heads in _blocks(q, k):
            adjoint = _Adjoint(p.block(heads), _Run(*run).block(heads))
            dscores = adjoint.run_back(output[heads], grad[heads])
            dv[heads] = adjoint.dv
            torch.bmm(dscores, k[heads], out=dq[heads])
            torch.bmm(dscores.mT, q[heads], out=dk[heads])
            if dbias is not None:
                dbias[heads] = dscores
            if dlam is not None:
                dlam[heads] = adjoint.dlam
        return dq, dk, dv, dbias, dlam, None


def _iterate(p: Problem, run: _Run) -> tuple[Tensor, Tensor]:
    """All half-steps of a block, which fill the run; returns the output and the last Z."""
    ratio = p.log_ratio.exp() if isinstance(p.log_ratio, Tensor) else math.exp(p.log_ratio)
    g: Tensor | None = None
    for segment, steps in enumerate(_segments(p.n_iters)):
        c = run.c[segment]
        z = _kernel_around(p, g, run.m[segment], c, run.w[steps.start // 2])
        for step in steps:
            u, w = run.u[step // 2], run.w[step // 2]
            if step == p.n_iters - 1 and step % 2 == 0:
                # The last row step is one more column of the product with the values.
                products = torch.bmm(z, torch.cat([w * p.v, w], -1))
                u.copy_(products[..., -1:])
                return _invert(u, p.rows) * products[..., :-1], z
            if step % 2 == 0:
                torch.bmm(z, w, out=u)
                _invert(u, p.rows)
                continue
            normalizer, w = run.normalizer[step // 2], run.w[1 + step // 2]
            torch.bmm(z.mT, u, out=normalizer)
            _invert(normalizer, p.columns)
            if p.lam is None:
                torch.mul(normalizer, ratio, out=w)
            else:
                w.copy_(only((p.lam * (p.log_ratio + normalizer.log() - c) + c).exp(), p.columns))
        g = only(w.log() - c, p.columns)
    return u * torch.bmm(z, w * p.v), z


def _kernel_around(p: Problem, g: Tensor | None, m: Tensor, c: Tensor, w: Tensor) -> Tensor:
    """Z around the potential g of the keys, None for 0; fills its shifts m and c, and the w of g."""
    scores = _scores(p) if g is None else _scores(p) + g.mT
    if p.columns is not None:
        scores.masked_fill_(~p.columns.mT, -math.inf)
    torch.amax(scores, -1, keepdim=True, out=m)
    if p.rows is not None:
        m.masked_fill_(~p.rows, math.inf)
    scores -= m
    torch.amax(scores, -2, keepdim=True, out=c.mT)
    if p.columns is not None:
        c.masked_fill_(~p.columns, math.inf)
    scores -= c.mT
    torch.exp(c, out=w)
    if p.columns is not None:
        w.masked_fill_(~p.columns, 0.0)
    if g is None:
        return scores.exp_()
    c -= g
    return _kernel(_scores(p), m, c)


def _scores(p: Problem) -> Tensor:
    scores = torch.bmm(p.q, p.k.mT)
    return scores if p.bias is None else scores.add_(p.bias)


def _kernel(scores: Tensor, m: Tensor, c: Tensor) -> Tensor:
    """Z of known shifts. Segments subtract from the same scores, or their terms would not cancel to the last bits."""
    return (scores - m).sub_(c.mT).exp_()


def _only_kernel(p: Problem, m: Tensor, c: Tensor) -> Tensor:
    """Z of known shifts where there is one segment: two more features subtract them within the product."""
    scores = torch.bmm(torch.cat([p.q, -m, torch.ones_like(m)], -1), torch.cat([p.k, torch.ones_like(c), -c], -1).mT)
    if p.bias is not None:
        scores += p.bias
    return scores.exp_()


class _Adjoint:
    """The way back through the half-steps of a block.

    `f` and `g` are the cotangents of the potentials, (N, Q, 1) and (N, K, 1). What the half-steps of a segment add to
    the gradient of the scores is Z * (left @ right^T); their columns are gathered on the way.
    """

    def __init__(self, p: Problem, run: _Run) -> None:
        self.p, self.run = p, run
        self.lam: float | Tensor = 1.0 if p.lam is None else p.lam
        self.dlam: Tensor | float = 0.0

    def run_back(self, output: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the scores (N, Q, K); `dv` and `dlam` are set."""
        segments = list(enumerate(_segments(self.p.n_iters)))
        scores = _scores(self.p) if len(segments) > 1 else None
        total: Tensor | None = None
        for segment, steps in reversed(segments if self.p.gradient == "unrolled" else segments[-1:]):
            self.c = self.run.c[segment]
            m = self.run.m[segment]
            self.z = _only_kernel(self.p, m, self.c) if scores is None else _kernel(scores, m, self.c)
            self.left: list[Tensor] = []
            self.right: list[Tensor] = []
            if total is None:
                self._product_with_values(output, grad)
            {"unrolled": self._unrolled, "implicit": self._implicit, "detached": self._detached}[self.p.gradient](steps)
            part = torch.bmm(torch.cat(self.left, -1), torch.cat(self.right, -1).mT).mul_(self.z)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def _product_with_values(self, output: Tensor, grad: Tensor) -> None:
        u, w = self.run.u[-1], self.run.w[-1]
        self.f = (grad * output).sum(-1, keepdim=True)
        left = u * grad
        # One pass over Z gives the gradient of the values and what the last row step passes on.
        products = torch.bmm(self.z.mT, torch.cat([left, u * self.f], -1))
        self.dv = w * products[..., :-1]
        self.passed_on = w * products[..., -1:]
        self.g = (self.p.v * self.dv).sum(-1, keepdim=True)
        self.left.append(left)
        self.right.append(w * self.p.v)

    def _unrolled(self, steps: range) -> None:
        last = self.p.n_iters - 1
        for step in reversed(steps):
            at = step // 2
            if step % 2 == 0:
                weighted = self._row_step(at)
                if step == last:
                    self.g = self.g - self.passed_on
                elif step:
                    self.g = -self.run.w[at] * torch.bmm(self.z.mT, weighted)
            else:
                passed_on = self.run.u[at] * torch.bmm(self.z, self._column_step(at, self.g))
                self.f = self.f - passed_on if step == last else -passed_on

    def _detached(self, steps: range) -> None:
        self._row_step((self.p.n_iters - 1) // 2)

    def _implicit(self, steps: range) -> None:
        u, w = self.run.u[-1], self.run.w[-1]
        sums = w * torch.bmm(self.z.mT, u)

        def plan(vector: Tensor) -> Tensor:
            return u * torch.bmm(self.z, w * vector)

        def gram(vector: Tensor) -> Tensor:
            return w * torch.bmm(self.z.mT, u * plan(vector))

        self.g = key_cotangent(gram, self.g - self.passed_on, sums, self.lam, self.p.columns, dim=-2)
        self.f = self.f - self.lam * plan(only(self.g / sums, self.p.columns))
        self._row_step(-1)
        self._column_step(-1, self.g)

    def _row_step(self, at: int) -> Tensor:
        """Add the columns of row step `at`, whose cotangent is f; return u f."""
        weighted = self.run.u[at] * self.f
        self.left.append(-weighted)
        self.right.append(self.run.w[at])
        return weighted

    def _column_step(self, at: int, cotangent: Tensor) -> Tensor:
        """Add the columns of column step `at`; return lam * cotangent * normalizer."""
        normalizer = self.run.normalizer[at]
        if self.p.lam is not None:
            distance = only(self.p.log_ratio + normalizer.log() - self.c, self.p.columns)
            self.dlam = self.dlam + (cotangent * distance).sum(-2, keepdim=True)
        weighted = self.lam * cotangent * normalizer
        self.left.append(-self.run.u[at])
        self.right.append(weighted)
        return weighted


def _segments(n_iters: int) -> list[range]:
    return [range(start, min(start + SEGMENT, n_iters)) for start in range(0, n_iters, SEGMENT)]


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_BYTES // (max(1, q.shape[1] * k.shape[1]) * q.element_size()))
    for start in range(0, q.shape[0], size):
        yield slice(start, min(start + size, q.shape[0]))


def _invert(sums: Tensor, places: Tensor | None) -> Tensor:
    """In place; 0 where there is no mass."""
    sums.clamp_(min=torch.finfo(sums.dtype).tiny).reciprocal_()
    return sums if places is None else sums.masked_fill_(~places, 0.0)


def _residual(p: Problem, z: Tensor, run: _Run) -> Tensor:
    u, w = run.u[-1], run.w[-1]
    ratio = p.log_ratio.exp() if isinstance(p.log_ratio, Tensor) else math.exp(p.log_ratio)
    row_error = only((u * torch.bmm(z, w) - 1).abs(), p.rows)
    column_error = only((w * torch.bmm(z.mT, u) / ratio - 1).abs(), p.columns)
    return torch.maximum(row_error.amax((-2, -1)), column_error.amax((-2, -1)))
