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
        row: (N, Q, 1), sums of the rows, 0 without mass; None is 1 everywhere.
        columns: (N, K, 1) bool, the keys with mass; None is all.
        log_column: logarithms of the sums of the columns, a number or (N, K, 1), there 0 without mass.
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

    def block(self, heads: slice, lanes: int = 1) -> "Problem":
        """Take some of the N problems, what belongs to queries divided into lanes; numbers and None stay."""
        tensors: dict[str, Any] = {
            name: laned(entry[heads], lanes) if name in ("q", "bias", "row") else entry[heads]
            for name, entry in self._asdict().items()
            if isinstance(entry, Tensor)
        }
        return self._replace(**tensors)


def laned(rows: Tensor, lanes: int, axis: int = 0) -> Tensor:
    """View (N, Q, D), N at `axis`, as (N * lanes, Q / lanes, D); more than one lane for N = 1 only."""
    shape = rows.shape
    return rows.view(*shape[:axis], shape[axis] * lanes, shape[axis + 1] // lanes, shape[-1])
