"""Old name of `sinkformer_pl.normalizations.contract`, for plug-ins written for version 0.1; it goes in 0.3."""

import warnings

from sinkformer_pl.normalizations.contract import AttentionNormalization, NormalizationFactory, ScoreNormalization
from sinkformer_pl.normalizations.old_spelling import Guarantees

warnings.warn(
    "sinkformer_pl.normalizations.base will go: import from sinkformer_pl.normalizations", FutureWarning, stacklevel=2
)
