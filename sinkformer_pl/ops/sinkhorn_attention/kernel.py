"""The kernel matrix of Sinkhorn attention, in tiles of queries, and the products that its half-steps are made of.

With row maxima m and then column maxima c of the scores S, Z = 2^(S - m - c) has entries in [0, 1] and a 1 in each row
and each column. So no sum over it under- or overflows at the start, whatever the scores, and every half-step is a
product of Z or its transpose with a vector. docs/fast_attention.md derives what is built on it.

Scores and all that is added to them are in units of log(2), since PyTorch's exp2 takes a third of the time of exp.
"""

import math
from collections.abc import Callable, Iterator
from functools import reduce

import torch
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.problem import Problem
from sinkformer_pl.ops.sinkhorn_attention.threads import Member
from sinkformer_pl.ops.sinkhorn_attention.workspace import workspace

LOG_2 = math.log(2)

TILE_BYTES = 2**22
"""Size of a tile of one thread: smaller ones stay in a nearer cache, but are more operations to start."""

GPU_TILE_BYTES = 2**26
"""Size of a tile on a GPU."""

MIN_ROWS = 128
"""Queries of a tile at the least: products of fewer rows are slow."""

TRANSPOSE_FROM = 256
"""Queries and keys from which it pays to transpose a factor rather than to multiply by a transposed Z."""


class Kernel:
    """Z of a block of heads, either kept in memory whole or made anew, a tile at a time, in each use.

    Each method goes through the tiles once, and does all that it has to do with a tile while that is in the cache.
    Vectors are rows, (N, 1, R) for the queries and (N, 1, K) for the keys of N heads. Where threads share heads, each
    has R of their queries and all keys, and what methods find for keys is that of all queries, the same in each thread.
    """

    def __init__(self, p: Problem, member: Member) -> None:
        self.p, self.kept, self.member = p, p.kept, member
        self.heads, self.queries, keys = len(p.q), p.q.shape[1], p.k.shape[1]
        size = _rows_of_tile(self.heads, self.queries, keys, p.q)
        self.slices = [slice(start, min(start + size, self.queries)) for start in range(0, self.queries, max(1, size))]
        tile, matrix = self.heads * min(size, self.queries) * keys, self.heads * self.queries * keys
        memory = workspace("kernel", matrix if p.kept else tile, p.q)
        self.scratch = workspace("scratch", tile, p.q)
        self.tiles = [self._tile(memory, rows, p.kept) for rows in self.slices]
        one = p.q.new_ones(())
        self.row, self.has_mass = one if p.row is None else p.row, one if p.columns is None else p.columns.to(p.q.dtype)

    def start(self, g: Tensor | None, m: Tensor, c: Tensor, w: Tensor, u: Tensor) -> Tensor:
        """Choose the shifts around the potential g of the keys, None for 0, and do a row step.

        Args:
            g: (N, 1, K) or None.
            m: (N, 1, R), filled with the shift of the rows; infinite in rows without mass.
            c: (N, 1, K), filled with the shift of the columns, likewise.
            w: (N, 1, K), filled with 2^(g + c).
            u: (N, 1, R), filled with r / (Z w).

        Returns:
            Z^T u, (N, 1, K).
        """
        self.use(m, c)
        if self.kept:
            self._shift_whole(g)
            self._fill(g, w)
            # Around another g the scores are made again: taking g away from these would round them otherwise.
            self.shifted = g is None
            return self.row_step_and_column_sums(w, u)
        sums = self._shift_by_tiles(g, u)
        self._fill(g, w)
        return sums

    def use(self, m: Tensor, c: Tensor) -> None:
        """Take shifts that `start` chose."""
        self.m, self.c, self.made, self.shifted = m, c, False, False

    def row_step_and_column_sums(self, w: Tensor, u: Tensor) -> Tensor:
        """Set u to r / (Z w), a row step, and return Z^T u, what the column step after it divides by."""
        return self.rmatvec_of_matvec(w, lambda rows, sums: self.row_step(sums, rows, u))

    def rmatvec_of_matvec(self, x: Tensor, between: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """Z^T between(rows, Z x), (N, 1, K), for x (N, 1, K); `between` is told which rows it gets of Z x."""
        return self._sum(torch.bmm(between(rows, torch.bmm(x, z.mT)), z) for rows, z in self._made())

    def matvec(self, x: Tensor) -> Tensor:
        """Z x, (N, 1, R), for x (N, 1, K)."""
        return torch.cat([torch.bmm(x, z.mT) for _, z in self._made()], -1)

    def rmatvec(self, y: Tensor) -> Tensor:
        """Z^T y, (N, 1, K), for y (N, 1, R)."""
        return self._sum(torch.bmm(self.part(y, rows), z) for rows, z in self._made())

    def rmatvec_and_product(self, y: Tensor, factors: Tensor, out: Tensor) -> Tensor:
        """Z^T y, (N, 1, K), for y (N, 1, R); sets the output (N, K, D) to Z^T factors, for factors (N, R, D)."""
        products = _FromLeft(self, out, add=False)

        def both(rows: slice, z: Tensor) -> Tensor:
            products.add(z, factors[:, rows])
            return torch.bmm(self.part(y, rows), z)

        total = self._sum(both(rows, z) for rows, z in self._made())
        products.finish()
        return total

    def times_values(self, w: Tensor, u: Tensor, output: Tensor, *, row_step: bool) -> None:
        """Set the output (N, R, Dv) to u * Z (w * v), u to r / (Z w) before that where there is a row step left."""
        values = w.mT * self.p.v
        for rows, z in self._made():
            if row_step:
                self.row_step(torch.bmm(w, z.mT), rows, u)
            _product(z, values, output[:, rows], add=False)
        output *= u.mT

    def add_gradients(
        self, left: Tensor, right: Tensor, dq: Tensor, dk: Tensor, dbias: Tensor | None, *, first: bool
    ) -> None:
        """Add what follows from the gradient Z * (left @ right^T) of the scores.

        Args:
            left: (N, R, rank).
            right: (N, K, rank).
            dq: (N, R, D).
            dk: (N, K, D).
            dbias: (N, R, K) or None.
            first: whether what dq, dk and dbias hold is undefined, and to be overwritten.
        """
        columns, products = right.mT, _FromLeft(self, dk, add=not first)
        for rows, z in self._made():
            dscores = self._tile(self.scratch, rows, kept=False)
            alpha = self.p.scale if dbias is None else 1.0
            torch.baddbmm(dscores, left[:, rows], columns, beta=0, alpha=alpha, out=dscores).mul_(z)
            if dbias is not None:
                _assign(dbias[:, rows], dscores, add=not first)
                dscores *= self.p.scale
            _product(dscores, self.p.k, dq[:, rows], add=not first)
            products.add(dscores, self.p.q[:, rows])
        products.finish()

    def row_step(self, sums: Tensor, rows: slice, u: Tensor) -> Tensor:
        """Set some rows of u to r / sums, for sums = Z w, 0 without mass, and return them; sums is used up."""
        return self._divide(self.part(self.row, rows), sums, self.part(u, rows))

    def column_step(self, sums: Tensor, out: Tensor) -> Tensor:
        """Set the output to the scalings 1 / sums that make columns 1, for sums = Z^T u; 0 where there is no mass."""
        return self._divide(self.has_mass, sums, out)

    def part(self, x: Tensor, rows: slice) -> Tensor:
        """Take some rows of x (N, 1, R), or all of what is the same for all."""
        return x if x.ndim == 0 or rows.stop - rows.start == self.queries else x[..., rows]

    def _divide(self, numerator: Tensor, sums: Tensor, out: Tensor) -> Tensor:
        nothing = sums == 0 if self.p.bias is not None else None  # Forbidden pairs may leave a sum nothing.
        sums.clamp_(min=torch.finfo(sums.dtype).tiny)
        if nothing is not None:
            sums.masked_fill_(nothing, math.inf)
        return torch.div(numerator, sums, out=out)

    def _sum(self, parts: Iterator[Tensor]) -> Tensor:
        """The sum over tiles, and over the threads that share the heads."""
        return self.member.over(torch.add, reduce(Tensor.add_, parts))

    def _made(self) -> Iterator[tuple[slice, Tensor]]:
        for rows, z in zip(self.slices, self.tiles, strict=True):
            if not self.made:
                if not self.shifted:
                    self._scores(rows, z).sub_(self.part(self.m, rows).mT)
                z.sub_(self.c).exp2_()
            yield rows, z
        self.made, self.shifted = self.kept, False

    def _scores(self, rows: slice, z: Tensor) -> Tensor:
        torch.baddbmm(z, self.p.q[:, rows], self.p.k.mT, beta=0, alpha=self.p.scale / LOG_2, out=z)
        return z if self.p.bias is None else z.add_(self.p.bias[:, rows], alpha=1 / LOG_2)

    def _fill(self, g: Tensor | None, w: Tensor) -> None:
        """Set w and make c the shift of the scores without g; until then it is that of the scores with g."""
        if self.p.columns is not None:
            self.c.masked_fill_(~self.p.columns, math.inf)
        torch.exp2(self.c, out=w)
        if self.p.columns is not None:
            w.masked_fill_(~self.p.columns, 0.0)
        if g is not None:
            self.c -= g

    def _shift_rows(self, rows: slice, z: Tensor, g: Tensor | None) -> Tensor:
        """Fill z with S + g - m; returns its column maxima (N, 1, K), not below the lowest finite number."""
        self._scores(rows, z)
        if g is not None:
            z += g
        if self.p.columns is not None:
            z.masked_fill_(~self.p.columns, -math.inf)
        m = z.amax(-1, keepdim=True)
        if self.p.bias is not None:  # whose -inf may have left a row nothing
            m.masked_fill_(m == -math.inf, math.inf)
        if self.p.row is not None:
            m.masked_fill_(self.p.row[..., rows].mT == 0, math.inf)
        self.part(self.m, rows).mT.copy_(m)
        return z.sub_(m).amax(-2, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)

    def _shift_whole(self, g: Tensor | None) -> None:
        tiles = zip(self.slices, self.tiles, strict=True)
        highest = reduce(torch.maximum, (self._shift_rows(rows, z, g) for rows, z in tiles))
        self.c.copy_(self.member.over(torch.maximum, highest))

    def _shift_by_tiles(self, g: Tensor | None, u: Tensor) -> Tensor:
        """The same in one pass with the row step: each tile has column maxima of its own to begin with."""
        highest = sums = None
        for rows, z in zip(self.slices, self.tiles, strict=True):
            c = self._shift_rows(rows, z, g)
            totals = torch.bmm(c.exp2(), z.sub_(c).exp2_().mT)
            part = torch.bmm(self.row_step(totals, rows, u), z)
            if highest is None or sums is None:
                highest, sums = c, part
                continue
            old, highest = highest, torch.maximum(highest, c)
            sums = sums * (old - highest).exp2() + part * (c - highest).exp2()
        assert highest is not None
        assert sums is not None
        if self.member.size > 1:
            old, highest = highest, self.member.over(torch.maximum, highest)
            sums = self.member.over(torch.add, sums * (old - highest).exp2())
        self.c.copy_(highest)
        return sums

    def _tile(self, memory: Tensor, rows: slice, kept: bool) -> Tensor:
        # Products are slow into memory that isn't contiguous, so a tile is.
        keys = self.p.k.shape[1]
        start, size = self.heads * rows.start * keys if kept else 0, self.heads * (rows.stop - rows.start) * keys
        return memory[start : start + size].view(self.heads, -1, keys)


class _FromLeft:
    """The sum over tiles of Z^T times factors; for large Z as its transpose, which is a third faster.

    Args:
        kernel: that goes through the tiles.
        out: (N, K, D), set to the sum in the end, or to more by it.
        add: whether to add.
    """

    def __init__(self, kernel: Kernel, out: Tensor, *, add: bool) -> None:
        self.kernel, self.out, self.adds = kernel, out, add
        alone = kernel.member.size == 1
        self.transposed = min(kernel.p.q.shape[1], out.shape[1]) >= TRANSPOSE_FROM
        self.direct = not self.transposed and alone and _writable(out)
        self.beta = int(add and self.direct)
        if self.direct:
            self.total = out
            return
        shape = (out.mT if self.transposed else out).shape
        # Other threads read it, when this one may be at its next block.
        memory = workspace("from left", math.prod(shape), out) if alone else out.new_empty(math.prod(shape))
        self.total = memory.view(shape)

    def add(self, z: Tensor, factors: Tensor) -> None:
        pair = (factors.mT.contiguous(), z) if self.transposed else (z.mT, factors)
        torch.baddbmm(self.total, *pair, beta=self.beta, out=self.total)
        self.beta = 1

    def finish(self) -> None:
        if not self.direct:
            total = self.kernel.member.over(torch.add, self.total)
            _assign(self.out, total.mT if self.transposed else total, add=self.adds)


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """Set the output to a @ b, or add that to it."""
    if _writable(out):
        torch.baddbmm(out, a, b, beta=int(add), out=out)
    else:
        _assign(out, torch.bmm(a, b), add=add)


def _writable(out: Tensor) -> bool:
    """Whether a product may be written into it."""
    return out.is_contiguous()


def _assign(target: Tensor, value: Tensor, *, add: bool) -> None:
    if add:
        target += value
    else:
        target.copy_(value)


def _rows_of_tile(heads: int, queries: int, keys: int, like: Tensor) -> int:
    """Queries of a tile; where all fit, all."""
    row = max(1, keys) * like.element_size() * heads
    rows = max(MIN_ROWS, (TILE_BYTES if like.device.type == "cpu" else GPU_TILE_BYTES) // row)
    tiles = max(1, math.ceil(queries / rows))
    return max(1, math.ceil(queries / tiles))
