"""Look at what attention does: the weights of every attention layer of a network, and measures of them.

`pictures` draws them with matplotlib, `page` writes them as an HTML page; neither is imported here.
"""

from sinkformer_pl.diagnostics.capture import LayerAttention, attention_of, learned_parameters
from sinkformer_pl.diagnostics.measures import (
    column_sums,
    effective_rank,
    entropy,
    relative_entropy,
    row_sums,
    sink_share,
    summary,
    zero_share,
)

__all__ = [
    "LayerAttention",
    "attention_of",
    "column_sums",
    "effective_rank",
    "entropy",
    "learned_parameters",
    "relative_entropy",
    "row_sums",
    "sink_share",
    "summary",
    "zero_share",
]
