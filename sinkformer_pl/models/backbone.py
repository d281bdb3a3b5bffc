"""What a task expects of a network."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor, nn

from sinkformer_pl.normalizations.base import NormalizationFactory


class Backbone(nn.Module, ABC):
    """A network from a batch of samples to one feature vector each.

    A subclass takes a `NormalizationFactory` as its first argument, calls it once for every attention layer, and sets
    `out_dim`.

    Attributes:
        out_dim: width of the features.
    """

    out_dim: int

    @abstractmethod
    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map inputs, in sets (B, N, C) with a bool mask (B, N) of the real tokens, to features (B, out_dim)."""


BackboneFactory = Callable[[NormalizationFactory], Backbone]
"""Makes a backbone: a class, or `functools.partial(SetTransformer, dim=64)`."""
