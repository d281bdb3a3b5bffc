"""Old name of `sinkformer_pl.normalizations.contract`, for plug-ins written for version 0.1; it goes in 0.3."""

import warnings

from sinkformer_pl.normalizations.contract import (
    AttentionNormalization as AttentionNormalization,
)
from sinkformer_pl.normalizations.contract import (
    NormalizationFactory as NormalizationFactory,
)
from sinkformer_pl.normalizations.contract import (
    ScoreNormalization as ScoreNormalization,
)
from sinkformer_pl.normalizations.old_spelling import Guarantees as Guarantees

warnings.warn(
    "sinkformer_pl.normalizations.base will go: import from sinkformer_pl.normalizations", FutureWarning, stacklevel=2
)
