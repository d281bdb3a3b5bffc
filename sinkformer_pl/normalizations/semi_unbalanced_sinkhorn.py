"""SemiUnbalancedSinkhorn: rows exact, columns as close to Q/K as a strength says."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from sinkformer_pl import ops
from sinkformer_pl.normalizations.base import Guarantees, ScoreNormalization
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.sinkhorn import require_odd_half_steps


@register
class SemiUnbalancedSinkhorn(ScoreNormalization):
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
        ValueError: rho out of range; learned from 0 or inf on, or with n_iters=1; `n_iters` is even or below 1.
        NotImplementedError: in use, a mask with `pairs`.

    References:
        The damped step is that of unbalanced transport, Chizat et al. 2018 (chizat2018scaling), here of the columns
        alone.
    """

    guarantees = Guarantees(row_sums="one", equivariant=True)

    def __init__(self, rho: float = 1.0, learned: bool = False, n_iters: int = 3) -> None:
        super().__init__()
        if isinstance(rho, bool) or not isinstance(rho, int | float) or not rho >= 0:
            raise ValueError(f"SemiUnbalancedSinkhorn: rho must be a number in [0, inf], got {rho!r}")
        if learned and not 0 < rho < math.inf:
            raise ValueError(f"SemiUnbalancedSinkhorn: a learned rho starts above 0 and below inf, got {rho!r}")
        require_odd_half_steps(n_iters, of=type(self).__name__)
        self.n_iters = n_iters
        if learned and n_iters == 1:
            raise ValueError("SemiUnbalancedSinkhorn: n_iters=1 has no column step to learn rho from: use 3 or more")
        self.rho = rho
        self.learned = learned
        self.log_rho: nn.Parameter | None = None
        if rho == math.inf and n_iters > 1:
            self.guarantees = replace(self.guarantees, unit_columns=True)

    def build(self, num_heads: int, head_dim: int) -> None:
        """Make the parameter of each head."""
        if self.learned:
            self.log_rho = nn.Parameter(torch.full((num_heads,), math.log(self.rho)))

    @property
    def lam(self) -> float | Tensor:
        """Damping of the column step, in [0, 1]: a number, or (H,) once a learned one is built."""
        if self.log_rho is not None:
            return self.log_rho.sigmoid()
        return 1.0 if self.rho == math.inf else self.rho / (1 + self.rho)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """`sinkformer_pl.ops.sinkhorn` of scores (B, H, Q, K), with the column step damped."""
        return ops.sinkhorn(scores, self.n_iters, mask=mask, lam=self.lam)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask | None,
        *,
        scale: float | Tensor,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Weights times values, (B, H, Q, Dv), by `sinkformer_pl.ops.sinkhorn_attention`."""
        return ops.sinkhorn_attention(q, k, v, n_iters=self.n_iters, mask=mask, bias=bias, scale=scale, lam=self.lam)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"rho={self.rho}, learned={self.learned}, n_iters={self.n_iters}"
