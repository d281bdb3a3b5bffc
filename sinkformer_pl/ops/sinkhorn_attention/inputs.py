"""The inputs of the operator, in the one form that its backends know."""

from typing import Any, NamedTuple

from torch import Tensor

from sinkformer_pl.ops.sinkhorn_attention.problem import Gradient


class OperatorInputs(NamedTuple):
    """Hold the inputs of the operator, for B samples of H heads.

    Attributes:
        q: (B, H, Q, D).
        k: (B, H, K, D), and all others of the dtype of q.
        v: (B, H, K, Dv).
        bias: (B, H, Q, K), at least float32, or None; -inf forbids a pair.
        log_row: (B, H, Q), at least float32, logarithms of the sums of the rows, -inf without mass; None is 0.
        log_column: (B, H, K), likewise; None is log(Q/K), and both are None or neither.
        scale: (B, H), at least float32, or None, where it is `scale_number`.
        lam: (B, H), at least float32, or None, where it is `lam_number`.
        scale_number: scale of all scores.
        lam_number: damping of all column steps.
        n_iters: half-steps.
        gradient: of what the gradient is.
        backend: "dense", "streaming" or "triton"; "auto" is one of the first two, chosen when the operator runs, so
            that a compiled or exported program is good for all sizes.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    log_row: Tensor | None
    log_column: Tensor | None
    scale: Tensor | None
    lam: Tensor | None
    scale_number: float
    lam_number: float
    n_iters: int
    gradient: Gradient
    backend: str

    @property
    def tensors(self) -> tuple[Any, ...]:
        """Return the tensors, q to lam; the last five may be None."""
        return self[:8]

    @property
    def options(self) -> tuple[Any, ...]:
        """Return the inputs that are no tensors."""
        return self[8:]

    @property
    def empty(self) -> bool:
        """Tell whether there are no queries, no keys, or no heads."""
        return 0 in (*self.q.shape[:3], self.k.shape[2])
