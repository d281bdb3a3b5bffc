"""The mathematics: pure functions on tensors, which need nothing but torch."""

from sinkformer_pl.ops.attention import SinkhornInfo, sinkhorn_attention
from sinkformer_pl.ops.mask import AttentionMask, causal_pairs
from sinkformer_pl.ops.sinkhorn import marginal_error, sinkhorn
from sinkformer_pl.ops.softmax import softmax

__all__ = [
    "AttentionMask",
    "SinkhornInfo",
    "causal_pairs",
    "marginal_error",
    "sinkhorn",
    "sinkhorn_attention",
    "softmax",
]
