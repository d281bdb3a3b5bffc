"""ReLU: the positive part of each score."""

from torch import Tensor

from sinkformer_pl.normalizations.contract import ScoreNormalization
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.pointwise import relu


@register
class ReLU(ScoreNormalization):
    """Positive part of the scores over the number of keys that a query may meet; rows have no prescribed sum.

    References:
        Wortsman et al. 2023 (wortsman2023relu).
    """

    promises = Promises(sparse=True, equivariant=True, pairs=True, causal=True)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply `sinkformer_pl.ops.pointwise.relu` to scores (B, H, Q, K)."""
        return relu(scores, mask=mask)
