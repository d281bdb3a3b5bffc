"""The memory that goes from a forward of the kernels to its backward."""

import math
from typing import NamedTuple

from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.inputs import OperatorInputs

ALIGNED = 4
"""Numbers between the beginnings of tensors that share memory: 16 bytes, which Triton compiles kernels for."""


class State(NamedTuple):
    """Hold the tensors of the forward that its backward needs, in base 2.

    For `on_chip`: the scalings u (row steps, N, Q) and w (1 + column steps, N, K), normalizers (column steps, N, K),
    the shifts m (N, Q) and c (N, K). For the others: potentials f of the queries and g of the keys, likewise, and where
    it is needed minus the log-sum-exp of the columns in each column step.
    """

    f: Tensor
    g: Tensor
    nu: Tensor
    m: Tensor
    c: Tensor


def numbers(x: OperatorInputs) -> int:
    """Count the numbers of float32 in the memory of a state."""
    return sum(aligned(math.prod(shape)) for shape in _shapes(x))


def parts(x: OperatorInputs, memory: Tensor) -> State:
    """Look at the memory (`numbers`) of a state as its tensors."""
    shapes = _shapes(x)
    pieces = memory.split([aligned(math.prod(shape)) for shape in shapes])
    return State(*(piece[: math.prod(shape)].view(shape) for piece, shape in zip(pieces, shapes, strict=True)))


def aligned(size: int) -> int:
    """Round up to a multiple of `ALIGNED`."""
    return -(-size // ALIGNED) * ALIGNED


def _shapes(x: OperatorInputs) -> tuple[tuple[int, ...], ...]:
    (b, h, queries), keys = x.q.shape[:3], x.k.shape[2]
    n, row_steps, pairs = b * h, (x.n_iters + 1) // 2, x.n_iters // 2
    return (row_steps, n, queries), (1 + pairs, n, keys), (pairs, n, keys), (n, queries), (n, keys)
