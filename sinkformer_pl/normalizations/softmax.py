"""Softmax, through PyTorch's fused attention."""

from typing import Unpack

from torch import Tensor

from sinkformer_pl.normalizations.contract import ScoreNormalization, ScoreOptions
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.softmax import softmax, softmax_attention


@register
class Softmax(ScoreNormalization):
    """The attention of Vaswani et al. 2017: rows are exp(scores), divided by their sums.

    References:
        Vaswani et al. 2017 (vaswani2017attention).
    """

    promises = Promises(row_sums="one", equivariant=True, pairs=True, causal=True)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply softmax to the rows of scores (B, H, Q, K), over the keys that the mask permits."""
        return softmax(scores, mask=mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Multiply weights and values, (B, H, Q, Dv), by `sinkformer_pl.ops.softmax.softmax_attention`."""
        return softmax_attention(q, k, v, mask=mask, **options)
