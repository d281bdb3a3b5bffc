"""The dense backend: the kernel matrix of a few heads at a time, and the backward in closed form.

With row maxima m and then column maxima c of the scores S, the matrix Z = exp(S - m - c) has entries in [0, 1] and a
1 in each row and each column. So no sum over it under- or overflows at the start, whatever the scores, and every
half-step is a product of Z or its transpose with a vector: u = exp(f + m), w = exp(g + c), and the plan is
diag(u) Z diag(w). Where the potentials go far in many half-steps, Z is made anew around them: a segment is the
half-steps of one Z. docs/fast_attention.md derives the backward: all of it is Z times, entry by entry, a matrix of
rank Dv + n_iters.
"""

import math
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.implicit import key_cotangent
from sinkformer_pl.ops.marginals import only
from sinkformer_pl.ops.problem import Problem, Solution

BLOCK_BYTES = 2**20
"""Size of the kernel matrices that one thread works on together: they should stay in its cache between half-steps."""

WORKSPACE_BYTES = 2**26
"""Blocks up to this size keep their memory from call to call, two of them a thread."""

TRANSPOSE_FROM = 256
"""Queries and keys from which it pays to transpose a factor rather than to multiply by a transposed Z."""

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
        memory = _memory(q, k)
        for heads in _blocks(q, k):
            part = p.block(heads)
            z = _iterate(part, run.block(heads), output[heads], memory)
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
        memory = _memory(q, k), _memory(q, k, place=1)
        for heads in _blocks(q, k):
            adjoint = _Adjoint(p.block(heads), _Run(*run).block(heads), *memory)
            dscores = adjoint.run_back(output[heads], grad[heads], dv[heads])
            torch.bmm(dscores, k[heads], out=dq[heads])
            dk[heads] = _product_from_left(q[heads], dscores)
            if dbias is not None:
                dbias[heads] = dscores
            if dlam is not None:
                dlam[heads] = adjoint.dlam
        return dq, dk, dv, dbias, dlam, None


def _iterate(p: Problem, run: _Run, output: Tensor, memory: Tensor) -> Tensor:
    """All half-steps of a block, which fill the run and the output; returns the last Z."""
    ratio = p.log_ratio.exp() if isinstance(p.log_ratio, Tensor) else math.exp(p.log_ratio)
    g: Tensor | None = None
    for segment, steps in enumerate(_segments(p.n_iters)):
        c = run.c[segment]
        z = _kernel_around(p, g, run.m[segment], c, run.w[steps.start // 2], memory)
        for step in steps:
            u, w = run.u[step // 2], run.w[step // 2]
            if step == p.n_iters - 1 and step % 2 == 0:
                torch.bmm(z, w * p.v, out=output).mul_(_invert(_row_sums(z, w, out=u), p.rows))
                return z
            if step % 2 == 0:
                _invert(_row_sums(z, w, out=u), p.rows)
                continue
            normalizer, w = run.normalizer[step // 2], run.w[1 + step // 2]
            _invert(_column_sums(z, u, out=normalizer), p.columns)
            if p.lam is None:
                torch.mul(normalizer, ratio, out=w)
            else:
                w.copy_(only((p.lam * (p.log_ratio + normalizer.log() - c) + c).exp(), p.columns))
        g = only(w.log() - c, p.columns)
    torch.bmm(z, w * p.v, out=output).mul_(u)
    return z


def _kernel_around(p: Problem, g: Tensor | None, m: Tensor, c: Tensor, w: Tensor, memory: Tensor) -> Tensor:
    """Z around the potential g of the keys, None for 0; fills its shifts m and c, and the w of g."""
    scores = _scores(p, memory)
    if g is not None:
        scores += g.mT
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
    return _kernel(p, m, c, memory)


def _scores(p: Problem, memory: Tensor) -> Tensor:
    # A fresh matrix would cost as much in page faults as the product itself.
    scores = torch.bmm(p.q, p.k.mT, out=memory[: len(p.q)])
    return scores if p.bias is None else scores.add_(p.bias)


def _kernel(p: Problem, m: Tensor, c: Tensor, memory: Tensor) -> Tensor:
    """Z of known shifts. As features of the product they would have the scores rounded otherwise in each segment."""
    return _scores(p, memory).sub_(m).sub_(c.mT).exp_()


class _Adjoint:
    """The way back through the half-steps of a block.

    `f` and `g` are the cotangents of the potentials, (N, Q, 1) and (N, K, 1). What the half-steps of a segment add to
    the gradient of the scores is Z * (left @ right^T); their columns are gathered on the way.
    """

    def __init__(self, p: Problem, run: _Run, z: Tensor, dscores: Tensor) -> None:
        self.p, self.run, self.memory, self.dscores = p, run, z, dscores[: len(p.q)]
        self.lam: float | Tensor = 1.0 if p.lam is None else p.lam
        self.dlam: Tensor | float = 0.0

    def run_back(self, output: Tensor, grad: Tensor, dv: Tensor) -> Tensor:
        """Gradient of the scores (N, Q, K), in memory that the next block takes; fills dv and sets `dlam`."""
        segments = list(enumerate(_segments(self.p.n_iters)))
        segments = segments if self.p.gradient == "unrolled" else segments[-1:]
        for segment, steps in reversed(segments):
            self.c = self.run.c[segment]
            self.z = _kernel(self.p, self.run.m[segment], self.c, self.memory)
            self.left: list[Tensor] = []
            self.right: list[Tensor] = []
            last = steps is segments[-1][1]
            if last:
                self._product_with_values(output, grad, dv)
            {"unrolled": self._unrolled, "implicit": self._implicit, "detached": self._detached}[self.p.gradient](steps)
            left, right = torch.cat(self.left, -1), torch.cat(self.right, -1).mT
            if last:
                torch.bmm(left, right, out=self.dscores).mul_(self.z)
            else:
                self.dscores += torch.bmm(left, right).mul_(self.z)
        return self.dscores

    def _product_with_values(self, output: Tensor, grad: Tensor, dv: Tensor) -> None:
        u, w = self.run.u[-1], self.run.w[-1]
        self.f = (grad * output).sum(-1, keepdim=True)
        left = u * grad
        torch.mul(w, _product_from_left(left, self.z), out=dv)
        self.passed_on = w * _column_sums(self.z, u * self.f)
        self.g = (self.p.v * dv).sum(-1, keepdim=True)
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
                    self.g = -self.run.w[at] * _column_sums(self.z, weighted)
            else:
                passed_on = self.run.u[at] * _row_sums(self.z, self._column_step(at, self.g))
                self.f = self.f - passed_on if step == last else -passed_on

    def _detached(self, steps: range) -> None:
        self._row_step((self.p.n_iters - 1) // 2)

    def _implicit(self, steps: range) -> None:
        u, w = self.run.u[-1], self.run.w[-1]
        sums = w * _column_sums(self.z, u)

        def plan(vector: Tensor) -> Tensor:
            return u * _row_sums(self.z, w * vector)

        def gram(vector: Tensor) -> Tensor:
            return w * _column_sums(self.z, u * plan(vector))

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


def _block_size(q: Tensor, k: Tensor) -> int:
    # A batch is divided over threads by its heads, which is much faster than dividing each product.
    threads = 1 if torch.compiler.is_compiling() or q.device.type != "cpu" else torch.get_num_threads()
    return threads * max(1, BLOCK_BYTES // (max(1, q.shape[1] * k.shape[1]) * q.element_size()))


class _Workspace(threading.local):
    """Memory of blocks, kept from call to call: the page faults of fresh memory cost as much as a product."""

    def __init__(self) -> None:
        self.places: dict[int, Tensor] = {}


_workspace = _Workspace()


def _memory(q: Tensor, k: Tensor, place: int = 0) -> Tensor:
    """One block of the size of the scores, for all blocks in turn."""
    shape = min(_block_size(q, k), q.shape[0]), q.shape[1], k.shape[1]
    size = math.prod(shape)
    if torch.compiler.is_compiling() or q.device.type != "cpu" or size * q.element_size() > WORKSPACE_BYTES:
        return q.new_empty(shape)
    kept = _workspace.places.get(place)
    if kept is None or kept.numel() < size or kept.dtype != q.dtype:
        kept = _workspace.places[place] = torch.empty(size, dtype=q.dtype)
    return kept[:size].view(shape)


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    size = _block_size(q, k)
    for start in range(0, q.shape[0], size):
        yield slice(start, min(start + size, q.shape[0]))


def _product_from_left(factor: Tensor, z: Tensor) -> Tensor:
    """Z^T times a factor; for large Z as the transpose of factor^T Z, which is a third faster."""
    if min(z.shape[-2:]) < TRANSPOSE_FROM:
        return torch.bmm(z.mT, factor)
    return torch.bmm(factor.mT.contiguous(), z).mT


# As products of a row vector from the left: a column vector from the right takes a batch three to seven times longer.
def _row_sums(z: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.bmm(w.mT, z.mT, out=None if out is None else out.mT).mT


def _column_sums(z: Tensor, u: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.bmm(u.mT, z, out=None if out is None else out.mT).mT


def _invert(sums: Tensor, places: Tensor | None) -> Tensor:
    """In place; 0 where there is no mass."""
    sums.clamp_(min=torch.finfo(sums.dtype).tiny).reciprocal_()
    return sums if places is None else sums.masked_fill_(~places, 0.0)


def _residual(p: Problem, z: Tensor, run: _Run) -> Tensor:
    u, w = run.u[-1], run.w[-1]
    ratio = p.log_ratio.exp() if isinstance(p.log_ratio, Tensor) else math.exp(p.log_ratio)
    row_error = only((u * _row_sums(z, w) - 1).abs(), p.rows)
    column_error = only((w * _column_sums(z, u) / ratio - 1).abs(), p.columns)
    return torch.maximum(row_error.amax((-2, -1)), column_error.amax((-2, -1)))
