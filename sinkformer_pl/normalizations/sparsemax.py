"""Sparsemax: the projection of scores onto the simplex."""

from torch import Tensor

from sinkformer_pl.normalizations.contract import ScoreNormalization
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.entmax import sparsemax
from sinkformer_pl.ops.mask import AttentionMask


@register
class Sparsemax(ScoreNormalization):
    """Rows are the points of the simplex nearest to the scores: the sparsest of the alpha-entmax family, alpha = 2.

    Keys whose score is 1 or more below the best one get exactly 0. Exact, by sorting each row.

    References:
        Martins and Astudillo 2016 (martins2016sparsemax).
    """

    promises = Promises(row_sums="one", sparse=True, equivariant=True, pairs=True, causal=True)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply `sinkformer_pl.ops.sparsemax` to scores (B, H, Q, K)."""
        return sparsemax(scores, mask=mask)
