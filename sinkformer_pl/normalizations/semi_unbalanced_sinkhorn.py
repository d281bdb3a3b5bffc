"""SemiUnbalancedSinkhorn: rows exact, columns as close to Q/K as a strength says."""

import math
from dataclasses import replace

from sinkformer_pl.normalizations.half_steps import HalfSteps
from sinkformer_pl.normalizations.per_head import PerHead
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.sinkhorn import require_odd_half_steps

LARGEST_LEARNED = 1e15
"""Above it rho / (1 + rho) is 1 to rounding, which is Sinkhorn."""


@register
class SemiUnbalancedSinkhorn(HalfSteps):
    """Between softmax and Sinkhorn: column sums are drawn to Q/K with strength rho, rows sum to 1 exactly.

    As Sinkhorn, with the column step g <- lam (log(Q/K) - logsumexp_i(scores + f)) damped by lam = rho / (1 + rho). In
    the limit of many half-steps the weights minimize -<P, scores> + sum P (log P - 1) + rho KL(columns | Q/K) among
    those whose rows sum to 1.

    Args:
        rho: strength, in [0, inf]: 0 is Softmax, inf is Sinkhorn.
        learned: learn a rho for each head, the parameter `log_rho` (H,), from the given one on. The logit of lam is
            log rho.
        n_iters: number of half-steps, odd, so that the last one is a row step; 1 is Softmax, whatever rho.

    Raises:
        ValueError: rho out of range; learned from 0 or 1e15 on, or with n_iters=1; `n_iters` is even or below 1.
        NotImplementedError: in use, a mask with `pairs`.

    References:
        The damped step is that of unbalanced transport, Chizat et al. 2018 (chizat2018scaling), here of the columns
        alone.
    """

    promises = Promises(row_sums="one", equivariant=True)
    lam = PerHead(
        "log_rho", to_raw=lambda lam: math.log(lam / (1 - lam)), from_raw=lambda log_rho, _: log_rho.sigmoid()
    )

    def __init__(self, rho: float = 1.0, learned: bool = False, n_iters: int = 3) -> None:
        super().__init__()
        if isinstance(rho, bool) or not isinstance(rho, int | float) or not rho >= 0:
            raise ValueError(f"SemiUnbalancedSinkhorn: rho must be a number in [0, inf], got {rho!r}")
        if learned and not 0 < rho < LARGEST_LEARNED:
            raise ValueError(
                f"SemiUnbalancedSinkhorn: a learned rho starts above 0 and below {LARGEST_LEARNED:g}, got {rho!r}"
            )
        require_odd_half_steps(n_iters, of=type(self).__name__)
        self.n_iters = n_iters
        if learned and n_iters == 1:
            raise ValueError("SemiUnbalancedSinkhorn: n_iters=1 has no column step to learn rho from: use 3 or more")
        self.learned = learned
        self.rho = rho
        self.lam = 1.0 if rho == math.inf else rho / (1 + rho)
        if rho == 0 or n_iters == 1:
            self.takes_marginal = False
        if rho == math.inf and n_iters > 1:
            self.promises = replace(self.promises, unit_columns=True)
