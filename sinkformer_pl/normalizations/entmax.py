"""Entmax: sparse attention whose sparsity is chosen, or learned by each head."""

import math

from torch import Tensor

from sinkformer_pl.normalizations.contract import ScoreNormalization
from sinkformer_pl.normalizations.per_head import PerHead
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.entmax import entmax
from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.precision import at_least_float32


@register
class Entmax(ScoreNormalization):
    """Alpha-entmax: from softmax (alpha to 1) to sparsemax (alpha = 2), the sparser the larger alpha.

    Keys whose score is 1 / (alpha - 1) or more below the best one get exactly 0. By bisection, to the last bit; at a
    fixed 1.5 or 2, `Entmax15` and `Sparsemax` give the same numbers faster.

    Args:
        alpha: in (1, 2]; where it starts if it is learned, then below 2.
        learned: one alpha for each head, 1 + sigmoid(alpha_logit), so always between 1 and 2, as in adaptively
            sparse transformers. Neither weights nor gradients lose precision near 1. Weight decay pulls alpha to 1.5.

    Raises:
        ValueError: `alpha` out of range.

    References:
        Peters et al. 2019 (peters2019entmax); learned: Correia et al. 2019 (correia2019adaptively).
    """

    promises = Promises(row_sums="one", sparse=True, equivariant=True, pairs=True, causal=True)
    alpha = PerHead(
        "alpha_logit",
        to_raw=lambda alpha: math.log((alpha - 1) / (2 - alpha)),
        from_raw=lambda logit, _: 1 + at_least_float32(logit).sigmoid(),
    )

    def __init__(self, alpha: float = 1.5, learned: bool = False) -> None:
        super().__init__()
        allowed = "in (1, 2), since it is learned" if learned else "in (1, 2] (its limit at 1 is Softmax)"
        if not isinstance(alpha, int | float) or not 1 < alpha <= 2 or (learned and alpha == 2):
            raise ValueError(f"Entmax: alpha must be {allowed}, got {alpha!r}")
        self.learned = learned
        self.alpha = float(alpha)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply `sinkformer_pl.ops.entmax` to scores (B, H, Q, K)."""
        return entmax(scores, self.alpha, mask=mask)
