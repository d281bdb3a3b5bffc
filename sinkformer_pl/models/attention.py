"""Old name of `sinkformer_pl.models.multi_head_attention`, for plug-ins written for version 0.1; it goes in 0.3."""

import warnings

from sinkformer_pl.models.attention_core import Temperature as Temperature
from sinkformer_pl.models.multi_head_attention import MultiHeadAttention as MultiHeadAttention

warnings.warn("sinkformer_pl.models.attention will go: import from sinkformer_pl.models", FutureWarning, stacklevel=2)
