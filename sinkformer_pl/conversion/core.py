"""The core that takes over the attention of a library's layer."""

from sinkformer_pl.factories import Spec
from sinkformer_pl.models.attention_core import AttentionCore
from sinkformer_pl.normalizations.contract import NormalizationFactory


class ConvertedCore(AttentionCore):
    """The child `core` of a converted attention.

    Args:
        num_heads: number of heads of the queries.
        head_dim: width of the queries and keys of a head.
        normalization: makes this core's own normalization.
        scale: multiplies q·k, as in the library; None is 1 / sqrt(head_dim).
        layer: name of the attention in the model, for messages.
        attention_dropout: share of the weights dropped in training; None leaves it to the library.
        spec: plain data that makes the normalization, for what saves a converted model; None if there is none.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        normalization: NormalizationFactory,
        *,
        scale: float | None = None,
        layer: str = "",
        attention_dropout: float | None = None,
        spec: Spec | None = None,
    ) -> None:
        super().__init__(num_heads, head_dim, normalization)
        if scale is not None:
            self.scale = scale
        self.layer = layer
        self.attention_dropout = attention_dropout
        self.spec = spec

    def dropout_of(self, library: float) -> float:
        """Return the share of weights to drop now: the library's own, unless another was set; 0 in evaluation."""
        if not self.training:
            return 0.0
        return library if self.attention_dropout is None else self.attention_dropout
