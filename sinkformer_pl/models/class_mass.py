"""The share of the mass of a plan that the column of a class token holds."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from sinkformer_pl.normalizations.contract import AttentionNormalization
from sinkformer_pl.normalizations.softmax import Softmax
from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.precision import at_least_float32

Mass = float | Literal["free", "learned"]
"""Sum of the column of the first key over that of any other: 1, counted as they are; 0, read by nobody; another number;
"learned", one for each head, from 1 on; "free", what it receives under Softmax."""

ROOM = 1e-6
"""Least share of the mass that a free column leaves to all others."""


class ClassMass(nn.Module):
    """The sums of the columns of a plan in which the first key, a class token, has a mass of its own.

    With Q real queries and K real keys the first column sums to Q m / (m + K - 1) and the others to Q / (m + K - 1)
    each. Under "free" the first holds what it receives under Softmax of the same scores, which the first column step of
    Sinkhorn then leaves as it is, and the others share the rest evenly.

    Args:
        mass: m, at least 0, "learned" or "free".
        num_heads: number of heads.

    Raises:
        ValueError: another mass.
    """

    log_mass: nn.Parameter | None

    def __init__(self, mass: Mass, num_heads: int) -> None:
        super().__init__()
        number = isinstance(mass, int | float) and not isinstance(mass, bool) and 0 <= mass < math.inf
        if not number and mass not in ("free", "learned"):
            raise ValueError(f"class_mass must be a number of at least 0, 'free' or 'learned', got {mass!r}")
        self.mass = mass
        self.register_parameter("log_mass", nn.Parameter(torch.zeros(num_heads)) if mass == "learned" else None)
        self.softmax = Softmax()

    def forward(
        self, q: Tensor, k: Tensor, mask: AttentionMask, *, scale: float | Tensor, bias: Tensor | None
    ) -> Tensor:
        """Compute the sums of the columns (B, H, K), in at least float32, 0 at padding.

        Args:
            q: (B, H, Q, D).
            k: (B, H, K, D).
            mask: real queries and keys; the first key is real in every sample.
            scale: of the scores, a number or a tensor (H,).
            bias: of the scores, broadcastable to (B, H, Q, K), or None.
        """
        like_scores = q.new_empty(()).expand(*q.shape[:-1], k.shape[-2])
        dtype = torch.promote_types(q.dtype, torch.float32)
        keys = mask.key_row(like_scores)[..., 0, :].to(dtype)
        queries = mask.query_column(like_scores)[..., 0].sum(-1, keepdim=True).to(dtype)
        first = (torch.arange(k.shape[-2], device=k.device) == 0).to(dtype)
        others = (keys.sum(-1, keepdim=True) - 1).clamp(min=1)
        if self.mass == "free":
            # As wide as the keys, which fused attention asks for.
            indicator = first.to(q.dtype)[:, None].expand(k.shape)
            shares = self.softmax.attend(q, k, indicator, mask, scale=scale, bias=bias)[..., :1]
            received = at_least_float32(shares).sum(-2)
            received = torch.minimum(received, queries * (1 - ROOM))
            columns = received * first + (queries - received) / others * (1 - first)
        else:
            mass = float(self.mass) if self.log_mass is None else self.log_mass.to(dtype).exp()[:, None]
            shares = first * mass + (1 - first)
            columns = queries * shares / (shares * keys).sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
        return (columns * keys).expand(*k.shape[:-1])

    def extra_repr(self) -> str:
        """Show the argument in `print(model)`."""
        return f"mass={self.mass}"


def class_mass(mass: Mass, num_heads: int, normalization: AttentionNormalization) -> ClassMass | None:
    """Make the masses that an attention asks for; None where a class token counts as any other, as without them.

    Raises:
        ValueError: a mass that isn't one.
        NotImplementedError: a mass of its own under a normalization without column sums to set.
    """
    if mass == 1 and not isinstance(mass, bool):
        return None
    made = ClassMass(mass, num_heads)
    if not normalization.takes_marginal:
        raise NotImplementedError(
            f"class_mass={mass}: {type(normalization).__name__} has no column sums that could be given; leave it at 1, "
            "or use Sinkhorn or SemiUnbalancedSinkhorn of 3 half-steps or more"
        )
    return made
