"""Multi-head attention over any normalization."""

from torch import Tensor, nn

from sinkformer_pl.models.attention_core import AttentionCore, Temperature, rename_old_keys
from sinkformer_pl.models.class_mass import Mass
from sinkformer_pl.normalizations.contract import NormalizationFactory
from sinkformer_pl.ops.mask import Mask


class MultiHeadAttention(nn.Module):
    """Project to queries, keys and values, attend in every head, project back.

    Args:
        dim: width of inputs and outputs.
        num_heads: number of heads; divides `dim`, unless `head_dim` is given.
        normalization: makes this layer's own normalization.
        head_dim: width of each head; None is dim / num_heads.
        causal: a query meets the keys up to its own position.
        temperature: divides the scores, which are q·k / sqrt(head_dim): a positive number, or "learned".
        class_mass: sum of the column of the first key, as of `AttentionCore`.

    Under a normalization that needs one tensor as queries and keys (`requires_tied`) they share their projection.

    Raises:
        ValueError: the heads don't divide the width; a temperature that isn't positive.
        NotImplementedError: `causal`, or a class token's own mass, under a normalization that can't have it.
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
        class_mass: Mass = 1.0,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads={num_heads} must divide the width dim={dim}; or give head_dim")
        head_dim = dim // num_heads if head_dim is None else head_dim
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        # Drawn before the core, and always four of them: their initial weights are the same under any normalization.
        inner = num_heads * head_dim
        query, key, value = nn.Linear(dim, inner), nn.Linear(dim, inner), nn.Linear(dim, inner)
        out = nn.Linear(inner, dim)
        # The order of these is the order of parameters in checkpoints.
        self.core = AttentionCore(
            num_heads, head_dim, normalization, temperature=temperature, causal=causal, class_mass=class_mass
        )
        self.query, self.value, self.out = query, value, out
        self.key = None if self.core.normalization.requires_tied else key
        self.register_load_state_dict_pre_hook(rename_old_keys)

    def forward(self, queries: Tensor, keys: Tensor, mask: Mask = None, bias: Tensor | None = None) -> Tensor:
        """Attend from queries to keys, which are the values too.

        Args:
            queries: (B, Q, dim).
            keys: (B, K, dim).
            mask: real queries and keys, permitted pairs.
            bias: added to the scaled scores, broadcastable to (B, H, Q, K).

        Returns:
            (B, Q, dim).
        """
        q, k = self._queries_and_keys(queries, keys)
        attended = self.core(q, k, split_heads(self.value(keys), self.core.num_heads), mask, bias)
        return self.out(join_heads(attended))

    def weights(self, queries: Tensor, keys: Tensor, mask: Mask = None, bias: Tensor | None = None) -> Tensor:
        """Compute the attention weights (B, H, Q, K) that `forward` would use."""
        return self.core.weights(*self._queries_and_keys(queries, keys), mask, bias)

    def _queries_and_keys(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        q = split_heads(self.query(queries), self.core.num_heads)
        if self.key is not None:
            return q, split_heads(self.key(keys), self.core.num_heads)
        if queries is not keys:
            name = type(self.core.normalization).__name__
            raise ValueError(f"{name} needs a set that attends to itself: give the same tensor as queries and keys")
        return q, q


def split_heads(projected: Tensor, num_heads: int) -> Tensor:
    """Rearrange (B, N, num_heads * D) to (B, num_heads, N, D)."""
    return projected.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def join_heads(attended: Tensor) -> Tensor:
    """Rearrange (B, H, N, D) to (B, N, H * D)."""
    return attended.transpose(1, 2).flatten(2)
