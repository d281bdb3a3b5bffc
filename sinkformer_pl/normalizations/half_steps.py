"""Normalizations by Sinkhorn's half-steps, whose columns may be given other sums than Q/K."""

from typing import Unpack

from torch import Tensor

from sinkformer_pl import ops
from sinkformer_pl.normalizations.contract import ScoreNormalization, ScoreOptions, scores_of
from sinkformer_pl.ops.marginals import unit_rows
from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.precision import no_autocast
from sinkformer_pl.ops.sinkhorn_attention.problem import Gradient


class HalfSteps(ScoreNormalization):
    """Row and column steps in turn, the column step damped by `lam`.

    `attend` and `weights` take, beside the other keywords, `column_marginal`: (B, H, K) sums of the columns, at least
    0, 0 at padding, whose total is the number of real queries; differentiable.

    Attributes:
        n_iters: number of half-steps.
        lam: damping in [0, 1], a number or a tensor (H,).
        gradient: of `sinkformer_pl.ops.sinkhorn_attention`.
    """

    takes_marginal = True
    n_iters: int
    lam: float | Tensor = 1.0
    gradient: Gradient = "unrolled"

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply `sinkformer_pl.ops.sinkhorn` to scores (B, H, Q, K)."""
        return ops.sinkhorn(scores, self.n_iters, mask=mask, lam=self.lam)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask = None,
        *,
        column_marginal: Tensor | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Tensor:
        """Multiply weights and values, (B, H, Q, Dv), by `sinkformer_pl.ops.sinkhorn_attention`."""
        return ops.sinkhorn_attention(
            *(q, k, v),
            n_iters=self.n_iters,
            mask=mask,
            lam=self.lam,
            row_marginal=None if column_marginal is None else unit_rows(q, column_marginal, mask),
            column_marginal=column_marginal,
            gradient=self.gradient,
            **options,
        )

    def weights(
        self,
        q: Tensor,
        k: Tensor,
        mask: Mask = None,
        *,
        column_marginal: Tensor | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Tensor:
        """Compute the weights themselves, (B, H, Q, K)."""
        if column_marginal is None:
            return super().weights(q, k, mask, **options)
        scale, bias, mask = self._prepare(q, k, mask, **options)
        q, k, _ = mask.without_padding(q, k, k)
        with no_autocast(q):
            marginals = {"row_marginal": unit_rows(q, column_marginal, mask), "column_marginal": column_marginal}
            scores = scores_of(q, k, scale, bias)
            return ops.sinkhorn(scores, self.n_iters, mask=mask, lam=self.lam, **marginals).to(q.dtype)
