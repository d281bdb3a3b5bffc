"""A problem on its way to the kernels: its tensors with their strides, and the kernels chosen for it."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.gpu.choice import Choice, choose, power_of_2, shared_memory, streaming_tiles

NONE = -1e30
"""The potential of a token without mass."""


class Inputs(NamedTuple):
    """B samples of H heads, with any strides whose last is 1.

    Attributes:
        q: (B, H, Q, D), float32, bfloat16 or float16.
        k: (B, H, K, D).
        v: (B, H, K, Dv).
        bias: (B, H, Q, K), added to the scores, or None.
        log_row: (B, H, Q) float32, natural logarithms of the row marginals, -inf without mass; None is 0 everywhere.
        log_column: (B, H, K) float32, likewise; None is log(Q/K), and both are None or neither.
        scale: of the scores, a number or (B, H).
        lam: damping of the column step, (B, H); None is exactly 1.
        n_iters: half-steps.
        gradient: of what the gradient is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    log_row: Tensor | None
    log_column: Tensor | None
    scale: float | Tensor
    lam: Tensor | None
    n_iters: int
    gradient: str


class State(NamedTuple):
    """What the backward needs of the forward, in base 2.

    For `on_chip`: the scalings u (row steps, N, Q) and w (1 + column steps, N, K), normalizers (column steps, N, K),
    the shifts m (N, Q) and c (N, K). For the others: potentials f of the queries and g of the keys, likewise, and where
    it is needed minus the log-sum-exp of the columns in each column step.
    """

    f: Tensor
    g: Tensor
    nu: Tensor
    m: Tensor
    c: Tensor


class Gradients(NamedTuple):
    """Of the inputs of the same name, of the last five those that are wanted; float32 but q, k, v."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    log_row: Tensor | None
    log_column: Tensor | None
    scale: Tensor | None
    lam: Tensor | None


class Problem:
    """One problem on its way to the kernels."""

    def __init__(self, x: Inputs) -> None:
        self.x = x
        b, self.heads, self.queries, width = x.q.shape
        self.keys, value_width = x.v.shape[2:]
        self.n, self.pairs, self.even = b * self.heads, x.n_iters // 2, x.n_iters % 2 == 0
        self.choice: Choice = choose(
            self.queries, self.keys, width, value_width, x.q.dtype, x.n_iters, x.gradient, shared_memory(x.q.device)
        )
        self.tiles = streaming_tiles(width, value_width, x.q.dtype)
        self.scale = x.scale if isinstance(x.scale, Tensor) else None
        self.number = 1.0 if isinstance(x.scale, Tensor) else x.scale
        self.uniform = math.log2(max(self.queries, 1) / max(self.keys, 1))
        self.key_width: dict[str, Any] = {"D": width, "DB": power_of_2(width), "PRECISION": _precision(x.q)}
        self.widths = self.key_width | {"DV": value_width, "DVB": power_of_2(value_width)}
        # A kernel is compiled for the types of its arguments: a new one where a scale is there.
        self.q, self.k, self.v = (strides(tensor) for tensor in (x.q, x.k, x.v))
        self.bias = (0,) * 4 if x.bias is None else x.bias.stride()
        self.row, self.column = strides(x.log_row, 2), strides(x.log_column, 2)
        self.scales, self.lams = strides(self.scale, 2), strides(x.lam, 2)

    @property
    def damped(self) -> bool:
        """Whether lam may differ from 1."""
        return self.x.lam is not None

    @property
    def masked(self) -> bool:
        """Whether there may be tokens without mass, which may hold anything."""
        return self.x.log_row is not None

    def steps(self, number: int, tokens: int) -> Tensor:
        """(number, N, tokens) float32, uninitialized."""
        return self.x.q.new_empty(number, self.n, tokens, dtype=torch.float32)


def strides(x: Tensor | None, axes: int = 3) -> tuple[int, ...]:
    """Of the leading axes; 0 for no tensor."""
    return (0,) * axes if x is None else x.stride()[:axes]


def _precision(x: Tensor) -> str:
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"
