"""Sigmoid: each weight from its own score."""

import math

from torch import Tensor

from sinkformer_pl.normalizations.contract import ScoreNormalization
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.pointwise import sigmoid


@register
class Sigmoid(ScoreNormalization):
    """Sigmoid of scores + bias: keys don't compete, and rows have no prescribed sum.

    Args:
        bias: a finite number; None is -log n, with n the number of keys that a query may meet, so that a row of zero
            scores sums to about 1.

    Raises:
        ValueError: `bias` is neither None nor a finite number.

    References:
        Ramapuram et al. 2024 (ramapuram2024sigmoid).
    """

    promises = Promises(equivariant=True, pairs=True, causal=True)

    def __init__(self, bias: float | None = None) -> None:
        super().__init__()
        if bias is not None and (
            isinstance(bias, bool) or not isinstance(bias, int | float) or not math.isfinite(bias)
        ):
            raise ValueError(f"Sigmoid: bias must be a finite number, or None for -log n, got {bias!r}")
        self.bias = bias

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply `sinkformer_pl.ops.pointwise.sigmoid` to scores (B, H, Q, K)."""
        return sigmoid(scores, bias=self.bias, mask=mask)

    def extra_repr(self) -> str:
        """Show the arguments in `print(model)`."""
        return f"bias={'-log n' if self.bias is None else self.bias}"
