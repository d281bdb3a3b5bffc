"""Softpick: rectified softmax."""

from torch import Tensor

from sinkformer_pl.normalizations.contract import ScoreNormalization
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.softmax import softpick


@register
class Softpick(ScoreNormalization):
    """relu(e^x - 1) / (sum |e^x - 1| + 1e-6): keys of negative score have no weight, but lower that of the others.

    A query may attend to nothing, and the keys without weight still get a gradient through the denominator, as long as
    some score of the row is positive.

    References:
        Zuhri et al. 2025 (zuhri2025softpick).
    """

    promises = Promises(row_sums="at most one", sparse=True, equivariant=True, pairs=True, causal=True)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply `sinkformer_pl.ops.softmax.softpick` to scores (B, H, Q, K)."""
        return softpick(scores, mask=mask)
