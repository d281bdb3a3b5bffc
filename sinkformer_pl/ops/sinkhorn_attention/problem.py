"""One Sinkhorn attention problem in canonical form, as the backends for the CPU take it."""

from typing import Any, Literal, NamedTuple

from torch import Tensor

Gradient = Literal["unrolled", "implicit", "detached"]


class Problem(NamedTuple):
    """N independent problems (samples times heads), in float32 or float64, padding zeroed.

    Attributes:
        q: (N, Q, D), a scale of its own for each head multiplied in.
        k: (N, K, D).
        v: (N, K, Dv).
        scale: a number that multiplies all q @ k^T.
        bias: (N, Q, K) or None; -inf forbids a pair.
        row: (N, 1, Q), sums of the rows, 0 without mass; None is 1 everywhere.
        columns: (N, 1, K) bool, the keys with mass; None is all.
        log_column: logarithms of the sums of the columns, a number or (N, 1, K), there 0 without mass.
        lam: damping of the column step, a number or (N, 1, 1); None is exactly 1.
        n_iters: half-steps.
        gradient: of what the gradient is.
        kept: whether the closed form keeps the kernel matrix of a block of heads in memory. If not, there is no bias,
            one tile of it is the most that is held, and each half-step makes the tiles anew.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    row: Tensor | None
    columns: Tensor | None
    log_column: float | Tensor
    lam: float | Tensor | None
    n_iters: int
    gradient: Gradient
    kept: bool

    def block(self, heads: slice, queries: slice) -> "Problem":
        """Take some of the N problems, and of these some queries; numbers and None stay."""
        tensors: dict[str, Any] = {
            name: entry[heads] for name, entry in self._asdict().items() if isinstance(entry, Tensor)
        }
        for name in {"q", "bias"} & tensors.keys():
            tensors[name] = tensors[name][:, queries]
        if "row" in tensors:
            tensors["row"] = tensors["row"][..., queries]
        return self._replace(**tensors)
