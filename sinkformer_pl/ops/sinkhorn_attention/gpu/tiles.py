"""Pieces that all kernels are made of: tiles of inputs, scores, and the two half-steps.

Everything is in base 2: scores, potentials f of queries and g of keys, log marginals. NONE stands for minus infinity,
the potential of a query or key without mass, and the score of a forbidden pair; it is finite, so that no difference of
two of them is NaN.
"""

import os

import triton
import triton.language as tl

NONE = tl.constexpr(-1e30)
ANY = tl.constexpr(-1e29)  # above: a potential, a score; below: NONE
FORBIDDEN = tl.constexpr(-1e9)  # a bias at or below it forbids the pair
LOG2E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # the interpreter multiplies the bits of bfloat16


@triton.jit
def load_rows(X, stride, rows, real, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile (rows, columns), 0 where a row isn't real and beyond the width."""
    at = X + rows[:, None] * stride + columns[None, :]
    inside = real[:, None]
    if WIDTH != BLOCK:
        inside = inside & (columns < WIDTH)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def load_columns(X, stride, rows, real, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The same tile transposed, (columns, rows)."""
    at = X + rows[None, :] * stride + columns[:, None]
    inside = real[None, :]
    if WIDTH != BLOCK:
        inside = inside & (columns < WIDTH)[:, None]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_rows(X, stride, rows, inside, columns, tile, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store a tile (rows, columns) in the dtype of its place."""
    at = X + rows[:, None] * stride + columns[None, :]
    tile = tile.to(X.dtype.element_ty)
    if WIDTH == BLOCK:
        tl.store(at, tile, mask=inside[:, None])
    else:
        tl.store(at, tile, mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Multiply two tiles, with sums in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_product(a, b, c, PRECISION: tl.constexpr):
    """Add the product of two tiles to c, with sums in float32."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def scores(a, b, scale, BIAS, stride_a, stride_b, rows, columns, num_rows, num_columns, PRECISION: tl.constexpr):
    """Scores of a (rows, D) and b (D, columns) in base 2, the bias of their head added."""
    s = product(a, b, PRECISION) * scale
    if BIAS is not None:
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        bias = tl.load(BIAS + rows[:, None] * stride_a + columns[None, :] * stride_b, mask=inside, other=0.0)
        bias = bias.to(tl.float32)
        s = tl.where(bias <= FORBIDDEN, NONE, s + bias * LOG2E)
    return s


@triton.jit
def log_marginal(L, i, n, uniform):
    """Log marginal of tokens i: from the natural logarithms L of their head, or one number for all."""
    if L is None:
        marginal = tl.where(i < n, uniform, NONE)
    else:
        marginal = tl.maximum(tl.load(L + i, mask=i < n, other=NONE) * LOG2E, NONE)
    return marginal


@triton.jit
def real_tokens(potential, i, n, MASKED: tl.constexpr):
    """Tell which of the tokens i to read: with MASKED those with mass, whose potential says so, else all n.

    A load that waits for the potential can't be started ahead of its turn.
    """
    return potential > ANY if MASKED else i < n


@triton.jit
def row_step(s, f, lr, MAXIMUM: tl.constexpr):
    """A row step of scores s (rows, columns) that the potential of the keys was added to.

    Without MAXIMUM the shift of a row is its potential f after the row step before: at lam = 1 a row that summed to one
    sums to at least 1/K^2 after a column step.

    Returns:
        e: 2^(s - shift).
        weight: (rows,), the plan after the step is weight * e; 0 without mass.
        f: (rows,), the new potential.
    """
    if MAXIMUM:
        shift = tl.max(s, 1)
        real = (lr > ANY) & (shift > ANY)
    else:
        real = f > ANY
        shift = tl.where(real, lr - f, -NONE)
    e = tl.exp2(s - shift[:, None])
    total = tl.sum(e, 1)
    f = tl.where(real, lr - shift - tl.log2(total), NONE)
    weight = tl.where(real, tl.exp2(lr) / total, 0.0)
    return e, weight, f


@triton.jit
def column_step(lse, lc, lam, DAMPED: tl.constexpr):
    """The potential of the keys from the log-sum-exp of their columns, NONE without mass."""
    g = lc - lse
    if DAMPED:
        g = g * lam
    return tl.where((lc > ANY) & (lse > ANY), g, NONE)


@triton.jit
def ratio(x, y):
    """2^(x - y) of two potentials, 0 where one is NONE."""
    there = (x > ANY) & (y > ANY)
    return tl.where(there, tl.exp2(tl.where(there, x - y, 0.0)), 0.0)
