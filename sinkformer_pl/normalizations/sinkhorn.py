"""Sinkhorn: doubly stochastic attention."""

from dataclasses import replace

from torch import Tensor

from sinkformer_pl import ops
from sinkformer_pl.normalizations.base import Guarantees, ScoreNormalization
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.sinkhorn import require_odd_half_steps


@register
class Sinkhorn(ScoreNormalization):
    """The attention of Sinkformers: exp(scores) with rows and columns normalized in turn, rows first and last.

    Args:
        n_iters: number of half-steps, odd, so that the last one is a row step: rows sum to 1 exactly, columns to Q/K in
            the limit (`sinkformer_pl.ops.marginal_error` measures how far off they are). 1 is Softmax.

    Raises:
        ValueError: `n_iters` is even or below 1.
        NotImplementedError: in use, a mask with `pairs`.

    References:
        Sander et al. 2022 (sander2022sinkformers).
    """

    guarantees = Guarantees(row_sums="one", unit_columns=True, equivariant=True)

    def __init__(self, n_iters: int = 3) -> None:
        super().__init__()
        require_odd_half_steps(n_iters, of=type(self).__name__)
        self.n_iters = n_iters
        if n_iters == 1:
            self.guarantees = replace(self.guarantees, unit_columns=False)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """`sinkformer_pl.ops.sinkhorn` of scores (B, H, Q, K)."""
        return ops.sinkhorn(scores, self.n_iters, mask=mask)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask | None,
        *,
        scale: float | Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Weights times values, (B, H, Q, Dv), by `sinkformer_pl.ops.sinkhorn_attention`."""
        return ops.sinkhorn_attention(q, k, v, n_iters=self.n_iters, mask=mask, bias=bias, scale=scale)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"n_iters={self.n_iters}"
