"""Softmax1: softmax that may attend to nothing."""

from typing import Unpack

from torch import Tensor

from sinkformer_pl.normalizations.contract import ScoreNormalization, ScoreOptions
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.softmax import softmax, softmax_attention


@register
class Softmax1(ScoreNormalization):
    """Softmax with 1 added to the denominator, exp(x) / (1 + sum exp(x)): one more key of score 0 and value 0.

    A query whose scores are all very negative has weights near 0 instead of having to spread a sum of 1 ("attention
    sinks"). Adding a constant to the scores changes the weights, unlike those of softmax.

    References:
        Miller 2023 (miller2023attention), who calls it softmax1 and the attention "quiet".
    """

    promises = Promises(row_sums="at most one", equivariant=True, pairs=True, causal=True)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply `sinkformer_pl.ops.softmax.softmax` with a sink to scores (B, H, Q, K)."""
        return softmax(scores, mask=mask, sink=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Multiply weights and values, (B, H, Q, Dv), by `sinkformer_pl.ops.softmax.softmax_attention`."""
        return softmax_attention(q, k, v, mask=mask, sink=True, **options)
