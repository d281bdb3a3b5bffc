"""LowRankSinkhorn: doubly stochastic attention through a few learned pivots."""

from typing import Any, Unpack

import torch
from torch import Tensor, nn

from sinkformer_pl.normalizations.contract import AttentionNormalization, ScoreOptions, refuse_bias
from sinkformer_pl.normalizations.per_head import unbuilt
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.low_rank_sinkhorn import low_rank_attention, low_rank_sinkhorn
from sinkformer_pl.ops.mask import Mask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast
from sinkformer_pl.ops.sinkhorn import require_odd_half_steps


@register
class LowRankSinkhorn(AttentionNormalization):
    """The attention of LOTFormer: queries are coupled to learned pivots, and pivots to keys, both by Sinkhorn.

    Each head learns pivots, as wide as its queries and keys, and their masses. The scores are scale * q·pivot and
    scale * pivot·k; the weights have at most rank `rank`, and time and memory are linear in the numbers of queries and
    keys.

    Args:
        rank: r, number of pivots of each head, at least 2: a single one makes all weights equal.
        n_iters: number of half-steps of either coupling, odd, so that rows sum to 1 exactly, and at least 3, for the
            masses cancel in a single one. Columns sum to Q/K in the limit.

    Raises:
        ValueError: `rank` below 2, `n_iters` even or below 3.
        NotImplementedError: in use, a bias or a mask with `pairs`.

    References:
        Shahbazi et al. 2025 (shahbazi2025lotformer).
    """

    promises = Promises(row_sums="one", unit_columns=True, equivariant=True, linear=True)
    takes_bias = False
    pivots: nn.Parameter | None
    mass_logits: nn.Parameter | None

    def __init__(self, rank: int = 16, n_iters: int = 5) -> None:
        super().__init__()
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 2:
            raise ValueError(f"LowRankSinkhorn: rank must be an integer of at least 2, got {rank!r}")
        require_odd_half_steps(n_iters, least=3, of=type(self).__name__)
        self.rank = rank
        self.n_iters = n_iters
        self.register_parameter("pivots", None)
        self.register_parameter("mass_logits", None)

    def build(self, num_heads: int, head_dim: int) -> None:
        """Draw the pivots (H, r, D), normal numbers; the logits of their masses (H, r) start at 0."""
        self.pivots = nn.Parameter(torch.randn(num_heads, self.rank, head_dim))
        self.mass_logits = nn.Parameter(torch.zeros(num_heads, self.rank))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Multiply weights and values, (B, H, Q, Dv), without the weights."""
        return low_rank_attention(q, k, v, **self._arguments(q, k, mask, **options))

    def weights(self, q: Tensor, k: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Compute the weights themselves, (B, H, Q, K)."""
        plan = low_rank_sinkhorn(q, k, **self._arguments(q, k, mask, **options))
        with no_autocast(q):
            return (plan.to_pivots @ plan.to_keys).to(q.dtype)

    def _arguments(self, q: Tensor, k: Tensor, mask: Mask, **options: Unpack[ScoreOptions]) -> Any:
        scale, bias, mask = self._prepare(q, k, mask, **options)
        refuse_bias(self, bias, "it never forms the scores of queries and keys")
        if self.pivots is None or self.mass_logits is None:
            raise unbuilt(self, "pivots")
        masses = at_least_float32(self.mass_logits).softmax(-1)
        return {"pivots": self.pivots, "masses": masses, "n_iters": self.n_iters, "scale": scale, "mask": mask}
