"""Which queries and keys of each sample are real, and which pairs of them may meet."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionMask:
    """The one form of a mask in this package. True = real, None = all real.

    A plain (B, 1, Q, K) tensor can't tell a padded query from one without a key, and the marginals of a transport
    plan need the real counts; so queries and keys are kept apart.

    Attributes:
        query: (B, Q) bool, the queries of each sample that are real.
        key: (B, K) bool, the keys of each sample that are real.
        pairs: bool, broadcastable to (B, H, Q, K) with all its four axes: which pairs may meet (causal, windows).

    Raises:
        TypeError: an entry isn't a bool tensor.
        ValueError: an entry has the wrong number of axes.
    """

    query: Tensor | None = None
    key: Tensor | None = None
    pairs: Tensor | None = None

    def __post_init__(self) -> None:
        """Check dtypes and axes."""
        for name, axes in (("query", 2), ("key", 2), ("pairs", 4)):
            entry = getattr(self, name)
            if entry is None:
                continue
            if not isinstance(entry, Tensor) or entry.dtype != torch.bool:
                kind = entry.dtype if isinstance(entry, Tensor) else type(entry).__name__
                raise TypeError(f"AttentionMask.{name} must be a bool tensor with True = real, got {kind}")
            if entry.ndim != axes:
                raise ValueError(f"AttentionMask.{name} must have {axes} axes, got shape {tuple(entry.shape)}")

    def without_padding(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (..., Q or K, D) and values (..., K, Dv) with zeros at padded tokens.

        What the padding holds can then neither overflow in a product nor reach a gradient.
        """
        if self.query is not None:
            q = q.where(_along(self.query, q, -2), 0.0)
        if self.key is not None:
            k, v = k.where(_along(self.key, k, -2), 0.0), v.where(_along(self.key, v, -2), 0.0)
        return q, k, v

    def query_column(self, scores: Tensor) -> Tensor:
        """Real queries, as a bool tensor (B, 1, ..., Q, 1) that broadcasts against scores (..., Q, K)."""
        return _along(self.query, scores, -2)

    def key_row(self, scores: Tensor) -> Tensor:
        """Real keys, as a bool tensor (B, 1, ..., 1, K) that broadcasts against scores (..., Q, K)."""
        return _along(self.key, scores, -1)

    def allowed(self, scores: Tensor) -> Tensor:
        """Real query, real key and a permitted pair: bool, broadcastable to scores (..., Q, K)."""
        allowed = self.query_column(scores) & self.key_row(scores)
        if self.pairs is None:
            return allowed
        if scores.ndim != 4:
            raise ValueError(f"a mask with pairs needs scores (B, H, Q, K), got shape {tuple(scores.shape)}")
        if any(size not in (1, wanted) for size, wanted in zip(self.pairs.shape, scores.shape, strict=True)):
            raise ValueError(
                f"AttentionMask.pairs {tuple(self.pairs.shape)} doesn't broadcast to scores {tuple(scores.shape)}"
            )
        return allowed & self.pairs

    def keys_met(self, scores: Tensor) -> Tensor | None:
        """Which keys a query may meet if it is real: bool, broadcastable to scores (..., Q, K); None is all."""
        if self.pairs is not None:
            return replace(self, query=None).allowed(scores)
        return None if self.key is None else self.key_row(scores)

    def num_keys(self, scores: Tensor) -> Tensor:
        """How many keys a query may meet, at least 1; padding doesn't count, under `pairs` each query has its own.

        Broadcastable to (..., Q, 1) for scores (..., Q, K), in at least float32; of no meaning at a padded query.
        """
        met = self.keys_met(scores)
        dtype = torch.promote_types(scores.dtype, torch.float32)
        return (self.key_row(scores) if met is None else met).sum(-1, keepdim=True).clamp(min=1).to(dtype)


def causal_pairs(queries: int, keys: int, *, device: torch.device | str | None = None) -> Tensor:
    """Pairs (1, 1, Q, K) in which a query meets the keys up to its own position."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]


def _along(entry: Tensor | None, tensor: Tensor, axis: int) -> Tensor:
    """A (B, N) entry, shaped to broadcast along one axis of a tensor whose first axis is the sample."""
    size = tensor.shape[axis]
    samples = tensor.shape[0] if tensor.ndim > 2 else 1
    shape = [1] * tensor.ndim
    shape[axis] = size
    if entry is None:
        return torch.ones(shape, dtype=torch.bool, device=tensor.device)
    if entry.shape != (samples, size):
        raise ValueError(
            f"a mask of shape {tuple(entry.shape)} doesn't fit a tensor of shape {tuple(tensor.shape)}, which needs "
            f"({samples}, {size}) = (samples, tokens)"
        )
    if tensor.ndim > 2:
        shape[0] = samples
    return entry.reshape(shape)
