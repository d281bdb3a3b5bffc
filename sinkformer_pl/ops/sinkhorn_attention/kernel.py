"""The kernel matrix of Sinkhorn attention, in tiles of queries, and the products that its half-steps are made of.

With row maxima m and then column maxima c of the scores S, Z = 2^(S - m - c) has entries in [0, 1] and a 1 in each row
and each column. So no sum over it under- or overflows at the start, whatever the scores, and every half-step is a
product of Z or its transpose with a vector. docs/fast_attention.md derives what is built on it.

Scores and all that is added to them are in units of log(2), since PyTorch's exp2 takes a third of the time of exp.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.problem import Problem
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
    The queries may be divided into *lanes*, for threads to work on one head together: all that belongs to queries is
    (L, R, ...), L lanes of R queries, and all that belongs to keys (N, K, ...), where N = L or N = 1.
    """

    def __init__(self, p: Problem) -> None:
        self.p, self.kept = p, p.kept
        self.lanes, queries, keys = len(p.q), p.q.shape[1], p.k.shape[1]
        self.heads = len(p.k)
        size = _rows_of_tile(self.lanes, queries, keys, p.q)
        self.slices = [slice(start, min(start + size, queries)) for start in range(0, queries, max(1, size))]
        tile, matrix = self.lanes * min(size, queries) * keys, self.lanes * queries * keys
        memory = workspace("kernel", matrix if p.kept else tile, p.q)
        self.scratch = workspace("scratch", tile, p.q)
        self.tiles = [self._tile(memory, rows, p.kept) for rows in self.slices]
        self.k = p.k.expand(self.lanes, -1, -1)

    def start(self, g: Tensor | None, m: Tensor, c: Tensor, w: Tensor, u: Tensor) -> Tensor:
        """Choose the shifts around the potential g of the keys, None for 0, and do a row step.

        Args:
            g: (N, K, 1) or None.
            m: (L, R, 1), filled with the shift of the rows; infinite in rows without mass.
            c: (N, K, 1), filled with the shift of the columns, likewise.
            w: (N, K, 1), filled with 2^(g + c).
            u: (L, R, 1), filled with r / (Z w).

        Returns:
            Z^T u, (N, K, 1).
        """
        self.use(m, c)
        if self.kept:
            self._shift_whole(g)
            self._fill(g, w)
            # Around another g the scores are made again: taking g away from these would round them otherwise.
            self.shifted = g is None
            return self.row_and_column_step(w, u)
        sums = self._shift_by_tiles(g, u)
        self._fill(g, w)
        return sums

    def use(self, m: Tensor, c: Tensor) -> None:
        """Take shifts that `start` chose."""
        self.m, self.c, self.made, self.shifted = m, c, False, False

    def row_and_column_step(self, w: Tensor, u: Tensor) -> Tensor:
        """Set u to r / (Z w), a row step, and return Z^T u, what the column step after it divides by."""

        def row_step(rows: slice, sums: Tensor) -> Tensor:
            u[:, rows] = self.row_step(sums, rows)
            return u[:, rows]

        return self.rmatvec_of_matvec(w, row_step)

    def rmatvec_of_matvec(self, x: Tensor, between: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """Z^T between(rows, Z x), (N, K, 1), for x (N, K, 1); `between` is told which rows it gets of Z x."""
        x, total = self._for_lanes(x), None
        for rows, z in self._made():
            part = _from_left(between(rows, _from_right(z, x)), z)
            total = part if total is None else total.add_(part)
        return self.over_lanes(total)

    def matvec(self, x: Tensor) -> Tensor:
        """Z x, (L, R, 1), for x (N, K, 1)."""
        x = self._for_lanes(x)
        return torch.cat([_from_right(z, x) for _, z in self._made()], 1)

    def rmatvec(self, y: Tensor) -> Tensor:
        """Z^T y, (N, K, 1), for y (L, R, 1)."""
        total = None
        for rows, z in self._made():
            part = _from_left(y[:, rows], z)
            total = part if total is None else total.add_(part)
        return self.over_lanes(total)

    def rmatvec_and_product(self, y: Tensor, factors: Tensor, out: Tensor) -> Tensor:
        """Z^T y, (N, K, 1), for y (L, R, 1); sets the output (N, K, D) to Z^T factors, for factors (L, R, D)."""
        total, products = None, _FromLeft(self, out, add=False)
        for rows, z in self._made():
            part = _from_left(y[:, rows], z)
            total = part if total is None else total.add_(part)
            products.add(z, factors[:, rows])
        products.finish()
        return self.over_lanes(total)

    def times_values(self, w: Tensor, u: Tensor, output: Tensor, *, row_step: bool) -> None:
        """Set the output (L, R, Dv) to u * Z (w * v), u to r / (Z w) before that where there is a row step left."""
        values, w = self._for_lanes(w * self.p.v), self._for_lanes(w)
        for rows, z in self._made():
            if row_step:
                u[:, rows] = self.row_step(_from_right(z, w), rows)
            _product(z, values, output[:, rows], add=False)
        output *= u

    def add_gradients(
        self, left: Tensor, right: Tensor, dq: Tensor, dk: Tensor, dbias: Tensor | None, *, first: bool
    ) -> None:
        """Add what follows from the gradient Z * (left @ right^T) of the scores.

        Args:
            left: (L, R, rank).
            right: (N, K, rank).
            dq: (L, R, D).
            dk: (N, K, D).
            dbias: (L, R, K) or None.
            first: whether what dq, dk and dbias hold is undefined, and to be overwritten.
        """
        columns, products = self._for_lanes(right).mT, _FromLeft(self, dk, add=not first)
        for rows, z in self._made():
            dscores = self._tile(self.scratch, rows, kept=False)
            alpha = self.p.scale if dbias is None else 1.0
            torch.baddbmm(dscores, left[:, rows], columns, beta=0, alpha=alpha, out=dscores).mul_(z)
            if dbias is not None:
                _assign(dbias[:, rows], dscores, add=not first)
                dscores *= self.p.scale
            _product(dscores, self.k, dq[:, rows], add=not first)
            products.add(dscores, self.p.q[:, rows])
        products.finish()

    def over_lanes(self, total: Tensor | None) -> Tensor:
        """The sum (N, ...) over the lanes of a head."""
        assert total is not None
        return total if self.lanes == self.heads else total.sum(0, keepdim=True)

    def row_step(self, sums: Tensor, rows: slice) -> Tensor:
        """Turn the sums Z w of some rows into their scalings u = r / (Z w), in place; 0 where there is no mass."""
        u = invert(sums, forbidden=self.p.bias is not None)
        return u if self.p.row is None else u.mul_(self.p.row[:, rows])

    def column_step(self, sums: Tensor) -> Tensor:
        """Turn the sums Z^T u of the columns into the scalings that make them 1, in place; 0 where there is no mass."""
        normalizer = invert(sums, forbidden=self.p.bias is not None)
        return normalizer if self.p.columns is None else normalizer.masked_fill_(~self.p.columns, 0.0)

    def _made(self) -> Iterator[tuple[slice, Tensor]]:
        for rows, z in zip(self.slices, self.tiles, strict=True):
            if not self.made:
                if not self.shifted:
                    self._scores(rows, z).sub_(self.m[:, rows])
                z.sub_(self.c.mT).exp2_()
            yield rows, z
        self.made, self.shifted = self.kept, False

    def _scores(self, rows: slice, z: Tensor) -> Tensor:
        torch.baddbmm(z, self.p.q[:, rows], self.k.mT, beta=0, alpha=self.p.scale / LOG_2, out=z)
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
        """Fill z with S + g - m; returns its column maxima (L, 1, K), not below the lowest finite number."""
        self._scores(rows, z)
        if g is not None:
            z += g.mT
        if self.p.columns is not None:
            z.masked_fill_(~self.p.columns.mT, -math.inf)
        m = torch.amax(z, -1, keepdim=True)
        if self.p.bias is not None:  # whose -inf may have left a row nothing
            m.masked_fill_(m == -math.inf, math.inf)
        if self.p.row is not None:
            m.masked_fill_(self.p.row[:, rows] == 0, math.inf)
        self.m[:, rows] = m
        return z.sub_(m).amax(-2, keepdim=True).clamp_(min=torch.finfo(z.dtype).min)

    def _shift_whole(self, g: Tensor | None) -> None:
        highest = None
        for rows, z in zip(self.slices, self.tiles, strict=True):
            c = self._shift_rows(rows, z, g)
            highest = c if highest is None else torch.maximum(highest, c)
        assert highest is not None
        self.c.mT.copy_(highest if self.lanes == self.heads else highest.amax(0, keepdim=True))

    def _shift_by_tiles(self, g: Tensor | None, u: Tensor) -> Tensor:
        """The same in one pass with the row step: each tile and lane has column maxima of its own to begin with."""
        highest = sums = None
        for rows, z in zip(self.slices, self.tiles, strict=True):
            c = self._shift_rows(rows, z, g)
            totals = _from_right(z.sub_(c).exp2_(), c.exp2().mT)
            u[:, rows] = self.row_step(totals, rows)
            part = _from_left(u[:, rows], z).mT
            if highest is None or sums is None:
                highest, sums = c, part
                continue
            old, highest = highest, torch.maximum(highest, c)
            sums = sums * (old - highest).exp2() + part * (c - highest).exp2()
        assert highest is not None
        assert sums is not None
        if self.lanes != self.heads:
            old, highest = highest, highest.amax(0, keepdim=True)
            sums = (sums * (old - highest).exp2()).sum(0, keepdim=True)
        self.c.copy_(highest.mT)
        return sums.mT

    def _tile(self, memory: Tensor, rows: slice, kept: bool) -> Tensor:
        # Products are slow into memory that isn't contiguous, so a tile is.
        keys = self.p.k.shape[1]
        start, size = self.lanes * rows.start * keys if kept else 0, self.lanes * (rows.stop - rows.start) * keys
        return memory[start : start + size].view(self.lanes, -1, keys)

    def _for_lanes(self, x: Tensor) -> Tensor:
        return x.expand(self.lanes, -1, -1)


class _FromLeft:
    """The sum over tiles of Z^T times factors; for large Z as its transpose, which is a third faster.

    Args:
        kernel: that goes through the tiles.
        out: (N, K, D), set to the sum in the end, or to more by it.
        add: whether to add.
    """

    def __init__(self, kernel: Kernel, out: Tensor, *, add: bool) -> None:
        self.kernel, self.out, self.adds = kernel, out, add
        lanes, heads = kernel.lanes, kernel.heads
        self.transposed = min(kernel.p.q.shape[1] * lanes // heads, out.shape[1]) >= TRANSPOSE_FROM
        self.direct = not self.transposed and lanes == heads and _writable(out)
        self.beta = int(add and self.direct)
        if self.direct:
            self.total = out
            return
        shape = lanes, *(out.mT if self.transposed else out).shape[1:]
        self.total = workspace("from left", math.prod(shape), out).view(shape)

    def add(self, z: Tensor, factors: Tensor) -> None:
        pair = (factors.mT.contiguous(), z) if self.transposed else (z.mT, factors)
        torch.baddbmm(self.total, *pair, beta=self.beta, out=self.total)
        self.beta = 1

    def finish(self) -> None:
        if not self.direct:
            total = self.kernel.over_lanes(self.total)
            _assign(self.out, total.mT if self.transposed else total, add=self.adds)


def invert(sums: Tensor, *, forbidden: bool) -> Tensor:
    """1 / sums, in place; with `forbidden` pairs a sum may be 0, and stays so."""
    nothing = sums == 0 if forbidden else None
    sums.clamp_(min=torch.finfo(sums.dtype).tiny).reciprocal_()
    return sums if nothing is None else sums.masked_fill_(nothing, 0.0)


# As products of a row vector from the left, and one that isn't a transpose: all other forms take a batch of large Z
# three times longer.
def _from_right(z: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(x.view(len(x), 1, -1), z.mT).mT


def _from_left(y: Tensor, z: Tensor) -> Tensor:
    return torch.bmm(y.view(len(y), 1, -1), z).mT


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


def _rows_of_tile(lanes: int, queries: int, keys: int, like: Tensor) -> int:
    """Queries of a tile; where a matrix of a lane fits, all."""
    on_cpu = like.device.type == "cpu"
    row = max(1, keys) * like.element_size() * max(1, lanes // torch.get_num_threads() if on_cpu else lanes)
    rows = max(MIN_ROWS, (TILE_BYTES if on_cpu else GPU_TILE_BYTES) // row)
    tiles = max(1, math.ceil(queries / rows))
    return max(1, math.ceil(queries / tiles))
