"""One Sinkhorn attention problem in canonical form, as all backends take it."""

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
        bias: (N, Q, K) or None.
        rows: (N, Q, 1) bool, the queries with mass; None is all.
        columns: (N, K, 1) bool, the keys with mass; None is all.
        log_ratio: log(Q/K) of the real tokens, a number or (N, 1, 1).
        lam: damping of the column step, a number or (N, 1, 1); None is exactly 1.
        n_iters: half-steps.
        gradient: of what the gradient is.
        with_info: whether potentials and residual are wanted.
        kept: whether the closed form keeps the kernel matrix of a block of heads in memory. If not, there is no bias,
            one tile of it is the most that is held, and each half-step makes the tiles anew.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    bias: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    log_ratio: float | Tensor
    lam: float | Tensor | None
    n_iters: int
    gradient: Gradient
    with_info: bool
    kept: bool

    def block(self, heads: slice, lanes: int = 1) -> "Problem":
        """Some of the N problems, what belongs to queries divided into lanes; numbers and None are the same for all."""
        tensors: dict[str, Any] = {
            name: laned(entry[heads], lanes) if name in ("q", "bias", "rows") else entry[heads]
            for name, entry in self._asdict().items()
            if isinstance(entry, Tensor)
        }
        return self._replace(**tensors)


class Solution(NamedTuple):
    """What a backend returns; the last three detached, and None unless `with_info`.

    Attributes:
        output: (N, Q, Dv), 0 in rows without mass.
        f: (N, Q, 1), potential of the queries.
        g: (N, K, 1), potential of the keys.
        residual: (N,), the larger of the row and the column error.
    """

    output: Tensor
    f: Tensor | None
    g: Tensor | None
    residual: Tensor | None


def laned(rows: Tensor, lanes: int, axis: int = 0) -> Tensor:
    """View (N, Q, D), N at `axis`, as (N * lanes, Q / lanes, D); more than one lane for N = 1 only."""
    shape = rows.shape
    return rows.view(*shape[:axis], shape[axis] * lanes, shape[axis + 1] // lanes, shape[-1])
