"""Multi-head attention over any normalization."""

import math

from torch import Tensor, nn

from sinkformer_pl.normalizations.base import NormalizationFactory
from sinkformer_pl.ops.mask import AttentionMask, causal_pairs


class MultiHeadAttention(nn.Module):
    """Project to queries, keys and values, attend in every head, project back.

    Args:
        dim: width of inputs and outputs.
        num_heads: number of heads; divides `dim`.
        normalization: makes this layer's own normalization.
        causal: a query meets the keys up to its own position.

    Raises:
        ValueError: the heads don't divide the width.
        NotImplementedError: `causal` under a normalization that can't be.
    """

    def __init__(self, dim: int, num_heads: int, normalization: NormalizationFactory, *, causal: bool = False) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide the width dim={dim}")
        self.num_heads = num_heads
        self.causal = causal
        self.scale = 1 / math.sqrt(dim // num_heads)
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)
        made = normalization()
        if not isinstance(made, nn.Module) or "_modules" not in vars(made):
            raise TypeError(
                f"{type(made).__name__} is no usable module: its __init__ must call super().__init__() first"
            )
        self.normalization = made
        if causal and not self.normalization.guarantees.causal:
            name = type(self.normalization).__name__
            raise NotImplementedError(f"{name} can't be causal; use a normalization that can, such as Softmax")
        self.normalization.build(num_heads, dim // num_heads)

    def forward(self, queries: Tensor, keys: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """Attend from queries (B, Q, dim) to keys (B, K, dim), which are the values too; returns (B, Q, dim)."""
        q, k = self._heads(self.query(queries)), self._heads(self.key(keys))
        v = self._heads(self.value(keys))
        attended = self.normalization.attend(q, k, v, self._mask(q, k, mask), scale=self.scale)
        return self.out(attended.transpose(1, 2).flatten(2))

    def weights(self, queries: Tensor, keys: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """The attention weights (B, H, Q, K) that `forward` would use."""
        q, k = self._heads(self.query(queries)), self._heads(self.key(keys))
        return self.normalization.weights(q, k, self._mask(q, k, mask), scale=self.scale)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, mask: AttentionMask | None) -> AttentionMask | None:
        if not self.causal:
            return mask
        mask = mask or AttentionMask()
        pairs = causal_pairs(q.shape[-2], k.shape[-2], device=q.device)
        return AttentionMask(mask.query, mask.key, pairs if mask.pairs is None else pairs & mask.pairs)
