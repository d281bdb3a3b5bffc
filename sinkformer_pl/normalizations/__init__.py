"""How attention scores become weights: the contract, the registry, and one file for each normalization."""

from sinkformer_pl.normalizations.base import (
    AttentionNormalization,
    Guarantees,
    NormalizationFactory,
    ScoreNormalization,
)
from sinkformer_pl.normalizations.registry import load_plugins, register, registered
from sinkformer_pl.normalizations.sinkhorn import Sinkhorn
from sinkformer_pl.normalizations.softmax import Softmax

__all__ = [
    "AttentionNormalization",
    "Guarantees",
    "NormalizationFactory",
    "ScoreNormalization",
    "Sinkhorn",
    "Softmax",
    "load_plugins",
    "register",
    "registered",
]
