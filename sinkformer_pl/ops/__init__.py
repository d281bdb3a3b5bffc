"""The mathematics: pure functions on tensors, which need nothing but torch."""

from sinkformer_pl.ops.entmax import entmax, entmax15, sparsemax
from sinkformer_pl.ops.forbidden import forbid
from sinkformer_pl.ops.low_rank_sinkhorn import low_rank_sinkhorn
from sinkformer_pl.ops.mask import AttentionMask, causal_pairs
from sinkformer_pl.ops.pointwise import relu, sigmoid
from sinkformer_pl.ops.sinkhorn import marginal_error, sinkhorn
from sinkformer_pl.ops.sinkhorn_attention.api import SinkhornInfo, sinkhorn_attention
from sinkformer_pl.ops.sliced_transport import sliced_transport
from sinkformer_pl.ops.softmax import (
    scalable_softmax,
    scalable_softmax_attention,
    softmax,
    softmax_attention,
    softpick,
)
from sinkformer_pl.ops.symmetric_sinkhorn import symmetric_sinkhorn

__all__ = [
    "AttentionMask",
    "SinkhornInfo",
    "causal_pairs",
    "entmax",
    "entmax15",
    "forbid",
    "low_rank_sinkhorn",
    "marginal_error",
    "relu",
    "scalable_softmax",
    "scalable_softmax_attention",
    "sigmoid",
    "sinkhorn",
    "sinkhorn_attention",
    "sliced_transport",
    "softmax",
    "softmax_attention",
    "softpick",
    "sparsemax",
    "symmetric_sinkhorn",
]
