"""A problem on its way to the kernels: its tensors with their strides, and the kernels chosen for it."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.gpu.choice import Choice, choose, power_of_2, shared_memory, streaming_tiles
from sinkformer_pl.ops.sinkhorn_attention.gpu.replay import Launches
from sinkformer_pl.ops.sinkhorn_attention.gpu.state import parts
from sinkformer_pl.ops.sinkhorn_attention.inputs import OperatorInputs

NONE = -1e30
"""The potential of a token without mass."""


class Problem:
    """One problem on its way to the kernels.

    Args:
        x: inputs whose last strides are 1; lam is a tensor, or exactly 1.
        launches: starts the kernels; its given tensors begin with those of x.
        memory: of the state, see `state`; None where there is no need of it.
    """

    def __init__(self, x: OperatorInputs, launches: Launches, memory: Any = None) -> None:
        self.x = OperatorInputs(*launches.given[: len(x.tensors)], *x.options)
        self.start, self.call, self.scratch = launches.start, launches.call, launches.scratch
        if memory is not None:
            self.state = parts(x, memory)
        b, self.heads, self.queries, width = x.q.shape
        self.keys, value_width = x.v.shape[2:]
        self.n, self.pairs, self.even = b * self.heads, x.n_iters // 2, x.n_iters % 2 == 0
        self.choice = choice(x)
        self.tiles = streaming_tiles(width, value_width, x.q.dtype)
        self.number, self.uniform = x.scale_number, uniform(x)
        self.key_width: dict[str, Any] = {"D": width, "DB": power_of_2(width), "PRECISION": precision(x.q)}
        self.widths = self.key_width | {"DV": value_width, "DVB": power_of_2(value_width)}
        # A kernel is compiled for the types of its arguments: a new one where a scale is there.
        self.q, self.k, self.v = (strides(tensor) for tensor in (x.q, x.k, x.v))
        self.bias = (0,) * 4 if x.bias is None else x.bias.stride()
        self.row, self.column = strides(x.log_row, 2), strides(x.log_column, 2)
        self.scales, self.lams = strides(x.scale, 2), strides(x.lam, 2)

    @property
    def damped(self) -> bool:
        """Tell whether lam may differ from 1."""
        return self.x.lam is not None

    @property
    def masked(self) -> bool:
        """Tell whether there may be tokens without mass, which may hold anything."""
        return self.x.log_row is not None

    def steps(self, number: int, tokens: int) -> Tensor:
        """Return scratch of the shape (number, N, tokens)."""
        return self.scratch(number, self.n, tokens)


def options_of(x: OperatorInputs) -> tuple[Any, ...]:
    """Return all that launches depend on beside the tensors."""
    return *x.options, precision(x.q)


def new_bias_gradient(launches: Launches, x: OperatorInputs, wanted: Sequence[str]) -> Tensor | None:
    """Allocate the gradient of the bias, if it is wanted."""
    if "bias" not in wanted or x.bias is None:
        return None
    return launches.new(x.q.new_empty(x.bias.shape, dtype=torch.float32))


def choice(x: OperatorInputs) -> Choice:
    """Choose kernels and tiles for this problem on its device."""
    queries, keys, limit = x.q.shape[2], x.k.shape[2], shared_memory(x.q.device)
    return choose(queries, keys, x.q.shape[3], x.v.shape[3], x.q.dtype, x.n_iters, x.gradient, limit)


def uniform(x: OperatorInputs) -> float:
    """Return the logarithm in base 2 of the sums of the columns, where no marginals are given."""
    return math.log2(max(x.q.shape[2], 1) / max(x.k.shape[2], 1))


def strides(x: Tensor | None, axes: int = 3) -> tuple[int, ...]:
    """Return the strides of the leading axes; 0 for no tensor."""
    return (0,) * axes if x is None else x.stride()[:axes]


def precision(x: Tensor) -> str:
    """Return the precision of products of float32 in PyTorch's setting, as Triton names it."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"
