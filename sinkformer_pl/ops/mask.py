"""Masks: the real queries and keys of each sample, and the pairs of them that may meet."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FORBIDDEN = -9.98e8
"""The bound: -1e9, rounded to bfloat16."""


def is_forbidden(values: Tensor) -> Tensor:
    """Find the entries that forbid their pair, as a bool tensor of the same shape; NaN doesn't.

    Raises:
        TypeError: not a float tensor.
    """
    if not values.is_floating_point():
        raise TypeError(f"a bias must be a float tensor, got {values.dtype}: give a bool mask as AttentionMask")
    return values <= max(FORBIDDEN, torch.finfo(values.dtype).min)


@dataclass(frozen=True)
class AttentionMask:
    """The one form of a mask in this package. True = real, None = all real.

    A plain (B, 1, Q, K) tensor can't tell a padded query from one without a key, and the marginals of a transport
    plan need the real counts; so queries and keys are kept apart. `from_padding` and `from_attention_mask` make one of
    the forms that other libraries use.

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

    @classmethod
    def from_padding(cls, *, real: Tensor | None = None, padding: Tensor | None = None) -> "AttentionMask":
        """Make the mask of padded sequences that attend to themselves: for queries and keys alike.

        For sequences that attend to others it is `AttentionMask(query=..., key=...)`, each with True = real.

        Args:
            real: (B, N), (B, 1, N) or (B, 1, 1, N), bool or 0 and 1, True or 1 at real tokens, as tokenizers give it.
            padding: the same with True at padding, as the `key_padding_mask` of PyTorch. One of the two.

        Raises:
            ValueError: both or neither; a shape that says more than which tokens are real.
            TypeError: neither bool nor whole numbers.
        """
        tokens = _one_of({"real": real, "padding": padding})
        if tokens.ndim > 2 and tokens.ndim <= 4 and all(size == 1 for size in tokens.shape[1:-1]):
            tokens = tokens.flatten(0, -2)
        if tokens.ndim != 2:
            raise ValueError(
                f"a padding mask must be (B, N) or (B, 1, 1, N), got {tuple(tokens.shape)}: use from_attention_mask "
                "for pairs of queries and keys"
            )
        return cls(tokens, tokens)

    @classmethod
    def from_attention_mask(
        cls,
        *,
        allowed: Tensor | None = None,
        forbidden: Tensor | None = None,
        additive: Tensor | None = None,
        padding_only: bool = False,
        self_attention: bool = True,
    ) -> "AttentionMask":
        """Make a mask of one that is broadcast to the scores: (Q, K), (B, Q, K), (B, 1, 1, K) or (B, H, Q, K).

        A mask of the keys alone, (B, 1, 1, K), is padding: it gives `key`, and `query` too under self-attention, so
        that padded queries spend no mass. Any other gives `pairs`, which transport plans refuse.

        Args:
            allowed: True where a pair may meet, as in `scaled_dot_product_attention`.
            forbidden: True where it may not, as the `attn_mask` of `torch.nn.MultiheadAttention`.
            additive: float, 0 where a pair may meet, and -inf, or -1e9 and less, where not. One of the three.
            padding_only: the pairs are those of real queries and real keys, and nothing else is forbidden: gives
                `query` and `key` and no `pairs`.
            self_attention: queries and keys are the same tokens.

        Raises:
            ValueError: not one of the three; a shape of another kind. On the CPU, where looking waits for no device,
                also an additive mask with other numbers, which is a bias, and `padding_only` where more is forbidden.
            TypeError: a dtype of another kind.
        """
        pairs = _one_of({"allowed": allowed, "forbidden": forbidden, "additive": additive})
        if pairs.ndim not in (2, 3, 4):
            raise ValueError(f"an attention mask must have 2, 3 or 4 axes, (B, H, Q, K), got {tuple(pairs.shape)}")
        pairs = pairs[None, None] if pairs.ndim == 2 else pairs[:, None] if pairs.ndim == 3 else pairs
        if pairs.shape[1] == pairs.shape[2] == 1:
            key = pairs[:, 0, 0]
            return cls(key if self_attention else None, key)
        if not padding_only:
            return cls(pairs=pairs)
        query, key = pairs.any((1, 3)), pairs.any((1, 2))
        if can_look(pairs) and not pairs.equal((query[:, None, :, None] & key[:, None, None]).expand_as(pairs)):
            raise ValueError("padding_only=True, but the mask forbids pairs of real queries and keys: leave it out")
        return cls(query, key)

    def without_padding(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put zeros at padded tokens of queries and keys (..., Q or K, D) and values (..., K, Dv).

        What the padding holds can then neither overflow in a product nor reach a gradient.
        """
        if self.query is not None:
            q = q.where(_along(self.query, q, -2), 0.0)
        if self.key is not None:
            k, v = k.where(_along(self.key, k, -2), 0.0), v.where(_along(self.key, v, -2), 0.0)
        return q, k, v

    def query_column(self, scores: Tensor) -> Tensor:
        """Return the real queries, as a bool tensor (B, 1, ..., Q, 1) that broadcasts against scores (..., Q, K)."""
        return _along(self.query, scores, -2)

    def key_row(self, scores: Tensor) -> Tensor:
        """Return the real keys, as a bool tensor (B, 1, ..., 1, K) that broadcasts against scores (..., Q, K)."""
        return _along(self.key, scores, -1)

    def allowed(self, scores: Tensor) -> Tensor:
        """Combine real query, real key and permitted pair: bool, broadcastable to scores (..., Q, K)."""
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
        """Find the keys that a query may meet if it is real: bool, broadcastable to scores (..., Q, K); None is all."""
        if self.pairs is not None:
            return replace(self, query=None).allowed(scores)
        return None if self.key is None else self.key_row(scores)

    def num_keys(self, scores: Tensor) -> Tensor:
        """Count the keys that a query may meet, at least 1, without padding; under `pairs` each has its own count.

        Broadcastable to (..., Q, 1) for scores (..., Q, K), in at least float32; of no meaning at a padded query.
        """
        met = self.keys_met(scores)
        dtype = torch.promote_types(scores.dtype, torch.float32)
        return (self.key_row(scores) if met is None else met).sum(-1, keepdim=True).clamp(min=1).to(dtype)


Mask = AttentionMask | None
"""Mask of an attention that may have none: every query and key is real then, and every pair may meet."""


def _one_of(given: dict[str, Tensor | None]) -> Tensor:
    """Turn the one mask that is given, by name, into a bool tensor with True = may meet."""
    names = [name for name, tensor in given.items() if tensor is not None]
    if len(names) != 1:
        raise ValueError(f"give one of {', '.join(f'{name}=' for name in given)}, got {' and '.join(names) or 'none'}")
    name, tensor = names[0], given[names[0]]
    assert tensor is not None
    if name == "additive":
        closed = is_forbidden(tensor)
        if can_look(tensor) and not (closed | (tensor == 0)).all():
            raise ValueError("additive= has numbers beside 0 and -inf: give it as the bias of attention instead")
        return ~closed
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}= must be bool, or 0 and 1, got {tensor.dtype}: a float mask is additive=")
    if tensor.dtype != torch.bool:
        if can_look(tensor) and not ((tensor == 0) | (tensor == 1)).all():
            raise ValueError(f"{name}= must be bool, or 0 and 1, got other numbers")
        tensor = tensor != 0
    return ~tensor if name in ("padding", "forbidden") else tensor


def can_look(tensor: Tensor) -> bool:
    """Tell whether values can be read without a wait for a GPU or a cut through a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def causal_pairs(queries: int, keys: int, *, device: torch.device | str | None = None) -> Tensor:
    """Make pairs (1, 1, Q, K) in which a query meets the keys up to its own position."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]


def _along(entry: Tensor | None, tensor: Tensor, axis: int) -> Tensor:
    """Shape a (B, N) entry to broadcast along one axis of a tensor whose first axis is the sample."""
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
