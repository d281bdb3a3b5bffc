"""ScalableSoftmax: softmax that doesn't flatten as the number of keys grows."""

import math
from typing import Unpack

from torch import Tensor

from sinkformer_pl.normalizations.contract import ScoreNormalization, ScoreOptions
from sinkformer_pl.normalizations.per_head import PerHead
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.softmax import scalable_softmax, scalable_softmax_attention


@register
class ScalableSoftmax(ScoreNormalization):
    """Softmax of s · log n · scores, with n the number of keys that a query may meet.

    The largest weight of a softmax falls towards 0 as keys are added, though its score stands out as before; times
    log n it doesn't. Padding doesn't count in n; under causal pairs every query has its own n.

    Args:
        s: factor, above 0; if learned, where it starts. By default that of the paper's first figure, with which 10 keys
            make the softmax itself (0.43 · log 10 = 0.99), fewer a flatter and more a sharper one.
        learned: one s for each head, trained, free to take any sign; else s is fixed.

    Raises:
        ValueError: `s` isn't a finite number above 0, `learned` isn't a bool.

    References:
        Nakanishi 2025 (nakanishi2025scalable).
    """

    promises = Promises(row_sums="one", equivariant=True, pairs=True, causal=True)
    factor = PerHead("s")

    def __init__(self, s: float = 0.43, learned: bool = False) -> None:
        super().__init__()
        if isinstance(s, bool) or not isinstance(s, int | float) or not (math.isfinite(s) and s > 0):
            raise ValueError(f"ScalableSoftmax: s must be a finite number above 0, got {s!r}")
        self.learned = learned
        self.factor = float(s)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply `sinkformer_pl.ops.softmax.scalable_softmax` to scores (B, H, Q, K)."""
        return scalable_softmax(scores, self.factor, mask=mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Multiply weights and values, (B, H, Q, Dv), by `sinkformer_pl.ops.softmax.scalable_softmax_attention`."""
        return scalable_softmax_attention(q, k, v, self.factor, mask=mask, **options)

    def extra_repr(self) -> str:
        """Show the arguments in `print(model)`."""
        return f"s={self.initial_factor:g}, learned={self.learned}"
