"""Entmax15: halfway from softmax to sparsemax."""

from torch import Tensor

from sinkformer_pl.normalizations.contract import ScoreNormalization
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.entmax import entmax15
from sinkformer_pl.ops.mask import AttentionMask


@register
class Entmax15(ScoreNormalization):
    """Alpha-entmax at alpha = 1.5: sparse as sparsemax is, but smooth where a weight leaves 0.

    Keys whose score is 2 or more below the best one get exactly 0. Exact, by sorting each row; the same numbers as
    `Entmax(alpha=1.5)`, faster.

    References:
        Peters et al. 2019 (peters2019entmax).
    """

    promises = Promises(row_sums="one", sparse=True, equivariant=True, pairs=True, causal=True)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply `sinkformer_pl.ops.entmax15` to scores (B, H, Q, K)."""
        return entmax15(scores, mask=mask)
