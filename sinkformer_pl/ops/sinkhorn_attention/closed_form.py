"""Sinkhorn attention by matrix-vector products, with its backward in closed form, some heads at a time.

u = 2^(f + m) and w = 2^(g + c) are the potentials behind the shifts of the kernel matrix Z, and the plan is
diag(u) Z diag(w). Where the potentials go far in many half-steps, the shifts are chosen anew around them: a segment is
the half-steps of one Z. docs/fast_attention.md derives the backward: all of it is Z times, entry by entry, a matrix of
rank Dv + n_iters.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.marginals import only
from sinkformer_pl.ops.sinkhorn_attention.blocks import each_block
from sinkformer_pl.ops.sinkhorn_attention.implicit import key_cotangent
from sinkformer_pl.ops.sinkhorn_attention.kernel import LOG_2, Kernel
from sinkformer_pl.ops.sinkhorn_attention.problem import Problem
from sinkformer_pl.ops.sinkhorn_attention.threads import Member
from sinkformer_pl.ops.sinkhorn_attention.workspace import workspace

SEGMENT = 22
"""Half-steps of one Z, an even number; few enough for the potentials to stay in range at scores of 1e4."""


class Run(NamedTuple):
    """What the half-steps leave behind; row steps, column steps or segments are the first axis.

    Attributes:
        u: (row steps, N, 1, Q), after each row step.
        w: (1 + column steps, N, 1, K), before each row step, and in the end.
        normalizer: (column steps, N, 1, K), what makes the columns of diag(u) Z sum to 1.
        m: (segments, N, 1, Q), the shift of the rows.
        c: (segments, N, 1, K), the shift of the columns.
    """

    u: Tensor
    w: Tensor
    normalizer: Tensor
    m: Tensor
    c: Tensor

    def block(self, heads: slice, queries: slice) -> "Run":
        """Take some of the problems, and of these some queries."""
        u, w, normalizer, m, c = (tensor[:, heads] for tensor in self)
        return Run(u[..., queries], w, normalizer, m[..., queries], c)


class Gradients(NamedTuple):
    """Of the tensors of a problem with the same name; None where there is none.

    Attributes:
        q: (N, Q, D).
        k: (N, K, D).
        v: (N, K, Dv).
        bias: (N, Q, K).
        log_row: (N, 1, Q).
        log_column: (N, 1, K).
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
        u=q.new_empty(row_steps, n, 1, queries),
        w=q.new_empty(1 + p.n_iters // 2, n, 1, keys),
        normalizer=q.new_empty(p.n_iters // 2, n, 1, keys),
        m=q.new_empty(number, n, 1, queries),
        c=q.new_empty(number, n, 1, keys),
    )
    output = q.new_empty(n, queries, p.v.shape[2])

    def solve(heads: slice, rows: slice, member: Member) -> None:
        part, own = p.block(heads, rows), run.block(heads, rows)
        if member.rank:  # The first writes what all find for the keys.
            own = own._replace(**{name: torch.empty_like(getattr(own, name)) for name in ("w", "normalizer", "c")})
        _solve(part, Kernel(part, member), own, output[heads, rows])

    each_block(q, k, solve)
    return output, run


def backward(p: Problem, output: Tensor, run: Run, grad: Tensor, *, marginals: bool) -> Gradients:
    """Gradients of all that are tensors, of the marginals where they are wanted."""
    q, k = p.q, p.k
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(p.v)
    dbias = torch.empty_like(p.bias) if p.bias is not None else None
    dlam = torch.zeros_like(p.lam) if isinstance(p.lam, Tensor) else None
    drow, dcolumn = (q.new_zeros(x.shape[0], 1, x.shape[1]) if marginals else None for x in (q, k))

    def run_back(heads: slice, rows: slice, member: Member) -> None:
        part = p.block(heads, rows)
        adjoint = _Adjoint(part, Kernel(part, member), run.block(heads, rows))
        adjoint.drow = drow[heads, :, rows] if drow is not None else None
        adjoint.dcolumn = dcolumn[heads] if dcolumn is not None and not member.rank else None
        own_dk, own_dv = (tensor[heads] if not member.rank else torch.empty_like(tensor[heads]) for tensor in (dk, dv))
        own_dbias = dbias[heads, rows] if dbias is not None else None
        adjoint.run_back(output[heads, rows], grad[heads, rows], dq[heads, rows], own_dk, own_dv, own_dbias)
        if dlam is not None and not member.rank:
            dlam[heads] = adjoint.dlam

    each_block(q, k, run_back)
    return Gradients(dq, dk, dv, dbias, drow, dcolumn, dlam)


def segments(n_iters: int) -> int:
    """Count the kernel matrices that this many half-steps take."""
    return len(_segments(n_iters))


def potentials(p: Problem, run: Run) -> tuple[Tensor, Tensor]:
    """F (N, 1, Q) of the queries and g (N, 1, K) of the keys, -inf or NaN without mass."""
    return LOG_2 * (run.u[-1].log2() - run.m[-1]), LOG_2 * (run.w[-1].log2() - run.c[-1])


def sums(p: Problem, run: Run) -> tuple[Tensor, Tensor]:
    """Row sums (N, 1, Q) and column sums (N, 1, K) of the plan."""
    rows, columns = torch.empty_like(run.u[-1]), torch.empty_like(run.w[-1])

    def sum_up(heads: slice, queries: slice, member: Member) -> None:
        part, own = p.block(heads, queries), run.block(heads, queries)
        kernel, u, w = Kernel(part, member), own.u[-1], own.w[-1]
        kernel.use(own.m[-1], own.c[-1])
        rows[heads, :, queries] = u * kernel.matvec(w)
        sums = w * kernel.rmatvec(u)
        if not member.rank:
            columns[heads] = sums

    each_block(p.q, p.k, sum_up)
    return rows, columns


def _solve(p: Problem, kernel: Kernel, run: Run, output: Tensor) -> None:
    """All half-steps of a block, which fill the run and the output."""
    column = p.log_column.exp() if isinstance(p.log_column, Tensor) else math.exp(p.log_column)
    us, ws, normalizers, last = run.u.unbind(), run.w.unbind(), run.normalizer.unbind(), p.n_iters - 1
    g: Tensor | None = None
    for segment, steps in enumerate(_segments(p.n_iters)):
        c = run.c[segment]
        if segment:
            g = only(ws[steps.start // 2].log2() - run.c[segment - 1], p.columns)
        for step in range(steps.start, steps.stop, 2):
            at = step // 2
            if step == steps.start:
                sums = kernel.start(g, run.m[segment], c, ws[at], us[at])
            elif step < last:
                sums = kernel.row_step_and_column_sums(ws[at], us[at])
            if step == last:
                continue
            normalizer = kernel.column_step(sums, normalizers[at])
            if p.lam is None:
                torch.mul(normalizer, column, out=ws[at + 1])
            else:
                damped = p.lam * (p.log_column / LOG_2 + normalizer.log2() - c) + c
                ws[at + 1].copy_(only(damped.exp2(), normalizer > 0))
    kernel.times_values(ws[-1], us[-1], output, row_step=last > 0 and last % 2 == 0)


class _Adjoint:
    """The way back through the half-steps of a block.

    `f` (N, 1, R) and `g` (N, 1, K) are the cotangents of the potentials. What the half-steps of a segment add to the
    gradient of the scores is Z * (left @ right^T), with a column for each.
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
        (heads, _, rows), keys = self.run.u.shape[1:], self.run.w.shape[3]
        self.left = workspace("left", heads * rows * number, self.run.u).view(heads, rows, number)
        self.right = workspace("right", heads * keys * number, self.run.u).view(heads, keys, number)
        self.taken = 0

    def _product_with_values(self, output: Tensor, grad: Tensor, dv: Tensor) -> None:
        u, w, self.taken = self.run.u[-1], self.run.w[-1], grad.shape[-1]
        left, right = self.left[..., : self.taken], self.right[..., : self.taken]
        # What the columns will hold is written last; before that they are memory for two products.
        self.f = torch.mul(grad, output, out=left).sum(-1)[:, None]
        torch.mul(u.mT, grad, out=left)
        self.passed_on = w * self.kernel.rmatvec_and_product(self._normalized(u * self.f), left, dv)
        dv *= w.mT
        self.g = torch.mul(self.p.v, dv, out=right).sum(-1)[:, None]
        torch.mul(w.mT, self.p.v, out=right)

    def _unrolled(self, steps: range) -> None:
        first, stop, last = steps.start // 2, steps.stop // 2, self.p.n_iters - 1
        f: Tensor | None = self.f if steps[-1] == last else None
        if f is not None and last % 2 == 0:
            self._row_steps(self.run.u[-1:], f[None], self.run.w[-1:])
            f, self.g = None, self.g - self.passed_on
        # Column steps, each with the row step before it; `at` counts them from the first of this segment.
        us, ws, normalizers = (tensor[first:stop] for tensor in self.run[:3])
        fs, lefts, gs, rights = (torch.empty_like(x) for x in (us, us, normalizers, normalizers))
        back, scalings = -self._normalized(us), -self.lam * normalizers
        if stop > first:
            gs[-1] = self.g
        # As lists, since taking one of an axis is as many operations as the arithmetic.
        columns = list(zip(gs.unbind(), scalings.unbind(), rights.unbind(), strict=True))
        rows = list(zip(us.unbind(), back.unbind(), fs.unbind(), lefts.unbind(), strict=True))
        for at in reversed(range(stop - first)):
            g, scaling, right = columns[at]
            torch.mul(g, scaling, out=right)
            row_step = partial(self._back_row_step, *rows[at], f if at == stop - first - 1 else None)
            if first + at == 0:
                row_step(slice(0, self.kernel.queries), self.kernel.matvec(right))
            else:
                passed_on = self.kernel.rmatvec_of_matvec(right, row_step)
                self.g = torch.mul(passed_on, ws[at], out=columns[at - 1][0] if at else None)
        self._sum_up(fs, gs, normalizers)
        self._add_columns(us, rights)
        self._add_columns(lefts, ws)

    def _back_row_step(
        self, u: Tensor, back: Tensor, f: Tensor, left: Tensor, more: Tensor | None, rows: slice, product: Tensor
    ) -> Tensor:
        """Set some rows of the cotangent f and of the column `left`, for the product of Z and that of a column step."""
        part = self.kernel.part
        cotangent = torch.mul(product, part(u, rows), out=part(f, rows))
        if more is not None:
            cotangent += part(more, rows)
        return torch.mul(cotangent, part(back, rows), out=part(left, rows))

    def _detached(self, steps: range) -> None:
        at = (self.p.n_iters - 1) // 2
        self._row_steps(self.run.u[-1:], self.f[None], self.run.w[at : at + 1])

    def _implicit(self, steps: range) -> None:
        u, w, kernel = self.run.u[-1], self.run.w[-1], self.kernel
        sums, squared = w * kernel.rmatvec(u), self._normalized(u.square())

        def gram(vector: Tensor) -> Tensor:
            return w * kernel.rmatvec_of_matvec(w * vector, lambda rows, product: kernel.part(squared, rows) * product)

        has_mass = sums > 0 if self.p.bias is not None else self.p.columns
        self.g = key_cotangent(gram, self.g - self.passed_on, sums, self.lam, has_mass)
        f = self.f - self.lam * u * kernel.matvec(w * only(self.g / sums, has_mass))
        self._row_steps(self.run.u[-1:], f[None], self.run.w[-1:])
        normalizer, g = self.run.normalizer[-1:], self.g[None]
        self._sum_up(None, g, normalizer)
        self._add_columns(self.run.u[-1:], -self.lam * g * normalizer)

    def _row_steps(self, u: Tensor, f: Tensor, w: Tensor) -> None:
        """Add the columns of row steps (S, ...) with these cotangents of their potentials."""
        self._sum_up(f, None, None)
        self._add_columns(-self._normalized(u * f), w)

    def _normalized(self, x: Tensor) -> Tensor:
        """Divide what belongs to queries by the sums of their rows: a row step's softmax is its plan over these."""
        return x if self.inverse_row is None else x * self.inverse_row

    def _sum_up(self, f: Tensor | None, g: Tensor | None, normalizer: Tensor | None) -> None:
        """Add what cotangents f (S, N, 1, R) and g (S, N, 1, K) of half-steps give to those of marginals and lam."""
        if self.drow is not None and f is not None:
            self.drow += f.sum(0)
        if g is None or normalizer is None:
            return
        if self.p.lam is not None:
            distance = only(self.p.log_column + LOG_2 * (normalizer.log2() - self.c), normalizer > 0)
            self.dlam = self.dlam + (g * distance).sum((0, -1))[..., None]
        if self.dcolumn is not None:
            self.dcolumn += self.lam * g.sum(0)

    def _add_columns(self, left: Tensor, right: Tensor) -> None:
        """Those of S half-steps, left (S, N, 1, R) and right (S, N, 1, K)."""
        columns = slice(self.taken, self.taken + len(left))
        self.left[..., columns], self.right[..., columns] = left[:, :, 0].movedim(0, -1), right[:, :, 0].movedim(0, -1)
        self.taken = columns.stop


def _segments(n_iters: int) -> list[range]:
    # A last row step alone belongs to the segment before it.
    starts = range(0, max(1, n_iters - 1), SEGMENT)
    return [range(start, n_iters if start == starts[-1] else start + SEGMENT) for start in starts]
