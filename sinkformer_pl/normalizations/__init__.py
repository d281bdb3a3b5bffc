"""Turn attention scores into weights: the contract, the registry, and one file for each normalization."""

from sinkformer_pl.normalizations.blend import Blend
from sinkformer_pl.normalizations.contract import AttentionNormalization, NormalizationFactory, ScoreNormalization
from sinkformer_pl.normalizations.entmax import Entmax
from sinkformer_pl.normalizations.entmax15 import Entmax15
from sinkformer_pl.normalizations.gumbel_sinkhorn import GumbelSinkhorn
from sinkformer_pl.normalizations.low_rank_sinkhorn import LowRankSinkhorn
from sinkformer_pl.normalizations.old_spelling import Guarantees
from sinkformer_pl.normalizations.per_head import PerHead
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import load_plugins, register, registered
from sinkformer_pl.normalizations.relu import ReLU
from sinkformer_pl.normalizations.scalable_softmax import ScalableSoftmax
from sinkformer_pl.normalizations.semi_unbalanced_sinkhorn import SemiUnbalancedSinkhorn
from sinkformer_pl.normalizations.sigmoid import Sigmoid
from sinkformer_pl.normalizations.sinkhorn import Sinkhorn
from sinkformer_pl.normalizations.sliced_transport import SlicedTransport
from sinkformer_pl.normalizations.softmax import Softmax
from sinkformer_pl.normalizations.softmax1 import Softmax1
from sinkformer_pl.normalizations.softpick import Softpick
from sinkformer_pl.normalizations.sparsemax import Sparsemax
from sinkformer_pl.normalizations.symmetric_sinkhorn import SymmetricSinkhorn

__all__ = [
    "AttentionNormalization",
    "Blend",
    "Entmax",
    "Entmax15",
    "Guarantees",
    "GumbelSinkhorn",
    "LowRankSinkhorn",
    "NormalizationFactory",
    "PerHead",
    "Promises",
    "ReLU",
    "ScalableSoftmax",
    "ScoreNormalization",
    "SemiUnbalancedSinkhorn",
    "Sigmoid",
    "Sinkhorn",
    "SlicedTransport",
    "Softmax",
    "Softmax1",
    "Softpick",
    "Sparsemax",
    "SymmetricSinkhorn",
    "load_plugins",
    "register",
    "registered",
]
