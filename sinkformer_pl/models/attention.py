"""Multi-head attention over any normalization."""

import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from sinkformer_pl.normalizations.base import NormalizationFactory
from sinkformer_pl.ops.mask import AttentionMask, causal_pairs

Made = TypeVar("Made")

Temperature = float | Literal["learned"]
"""Divides the scores: a number, or one learned for each head, from 1 on."""


class MultiHeadAttention(nn.Module):
    """Project to queries, keys and values, attend in every head, project back.

    Args:
        dim: width of inputs and outputs.
        num_heads: number of heads; divides `dim`, unless `head_dim` is given.
        normalization: makes this layer's own normalization.
        head_dim: width of each head; None is dim / num_heads.
        causal: a query meets the keys up to its own position.
        temperature: divides the scores, which are q·k / sqrt(head_dim): a positive number, or "learned".

    Under a normalization that needs one tensor as queries and keys (`Guarantees.tied`) they share their projection.

    Raises:
        ValueError: the heads don't divide the width; a temperature that isn't positive.
        NotImplementedError: `causal` under a normalization that can't be.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        normalization: NormalizationFactory,
        *,
        head_dim: int | None = None,
        causal: bool = False,
        temperature: Temperature = 1.0,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads={num_heads} must divide the width dim={dim}; or give head_dim")
        head_dim = dim // num_heads if head_dim is None else head_dim
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        learned = temperature == "learned"
        if not learned and (isinstance(temperature, str) or not 0 < temperature < math.inf):
            raise ValueError(f"temperature must be a positive number or 'learned', got {temperature!r}")
        self.num_heads = num_heads
        self.causal = causal
        self.scale = 1 / math.sqrt(head_dim) / (1.0 if isinstance(temperature, str) else temperature)
        self.log_temperature = nn.Parameter(torch.zeros(num_heads)) if learned else None
        made = _without_a_trace(normalization)
        if not isinstance(made, nn.Module) or "_modules" not in vars(made):
            raise TypeError(
                f"{type(made).__name__} is no usable module: its __init__ must call super().__init__() first"
            )
        self.normalization = made
        guarantees = self.normalization.guarantees
        if causal and not guarantees.causal:
            name = type(self.normalization).__name__
            reason = " (the only doubly stochastic causal matrix is the identity)" if guarantees.unit_columns else ""
            raise NotImplementedError(f"{name} can't be causal{reason}; use a normalization that can, such as Softmax")
        # Projections first and always four of them: their initial weights then are the same under any normalization.
        inner = num_heads * head_dim
        self.query, key, self.value = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.out: nn.Module = nn.Linear(inner, dim)
        self.key = None if guarantees.tied else key
        _without_a_trace(lambda: self.normalization.build(num_heads, head_dim))

    def forward(self, queries: Tensor, keys: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """Attend from queries (B, Q, dim) to keys (B, K, dim), which are the values too; returns (B, Q, dim)."""
        q, k, mask = self._queries_and_keys(queries, keys, mask)
        attended = self.normalization.attend(q, k, self._heads(self.value(keys)), mask, scale=self._scale())
        return self.out(attended.transpose(1, 2).flatten(2))

    def weights(self, queries: Tensor, keys: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """The attention weights (B, H, Q, K) that `forward` would use."""
        q, k, mask = self._queries_and_keys(queries, keys, mask)
        return self.normalization.weights(q, k, mask, scale=self._scale())

    def _queries_and_keys(
        self, queries: Tensor, keys: Tensor, mask: AttentionMask | None
    ) -> tuple[Tensor, Tensor, AttentionMask | None]:
        q = self._heads(self.query(queries))
        if self.key is not None:
            k = self._heads(self.key(keys))
        elif queries is keys:
            k = q
        else:
            name = type(self.normalization).__name__
            raise ValueError(f"{name} needs a set that attends to itself: give the same tensor as queries and keys")
        return q, k, self.merged_mask(q, k, mask)

    def _scale(self) -> float | Tensor:
        return self.scale if self.log_temperature is None else self.scale * (-self.log_temperature).exp()

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merged_mask(self, q: Tensor, k: Tensor, mask: AttentionMask | None) -> AttentionMask | None:
        """The mask, with the pairs that causality forbids; of queries (..., Q, D) and keys (..., K, D)."""
        if not self.causal:
            return mask
        mask = mask or AttentionMask()
        pairs = causal_pairs(q.shape[-2], k.shape[-2], device=q.device)
        return AttentionMask(mask.query, mask.key, pairs if mask.pairs is None else pairs & mask.pairs)


def _without_a_trace(make: Callable[[], Made]) -> Made:
    """Leave the random state as it was: whatever a normalization draws, all other weights start the same."""
    with torch.random.fork_rng(devices=()):
        return make()
