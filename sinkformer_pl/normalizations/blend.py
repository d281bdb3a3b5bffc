"""Blend: a share of softmax, and the rest another normalization."""

import math
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor

from sinkformer_pl.normalizations.contract import AttentionNormalization, NormalizationFactory, ScoreOptions
from sinkformer_pl.normalizations.per_head import PerHead
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.normalizations.sinkhorn import Sinkhorn
from sinkformer_pl.normalizations.softmax import Softmax
from sinkformer_pl.ops.mask import Mask
from sinkformer_pl.ops.precision import at_least_float32

WHOLE = 1_000_000
"""The unit of the share that is kept."""


@register
class Blend(AttentionNormalization):
    """Weights (1 - share) · softmax + share · those of another normalization.

    At a share of 0 or 1 that stays, one of the two is computed alone. The callback `Gradual` raises the share from 0 in
    the course of a training; the state_dict keeps where it stands.

    Args:
        target: makes the other normalization.
        share: of the other, in (0, 1]; under `Gradual` the one at the end.
        learned: learn a share for each head, the parameter `share_logit` (H,), from the given one on.

    Raises:
        ValueError: a share out of range; learned from 1 on.
        TypeError: `target` makes no normalization.
        NotImplementedError: in use, what the other refuses.
    """

    # Of the class with its defaults; an instance has those of what it blends.
    promises = Promises(row_sums="one", unit_columns=True, equivariant=True)
    share = PerHead(
        "share_logit",
        to_raw=lambda share: math.log(share / (1 - share)),
        from_raw=lambda share_logit, _: share_logit.sigmoid(),
    )
    reached: Tensor | None

    def __init__(self, target: NormalizationFactory = Sinkhorn, share: float = 1.0, learned: bool = False) -> None:
        super().__init__()
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"Blend: share must be a number in (0, 1], got {share!r}; none of the other is Softmax")
        if learned and share == 1:
            raise ValueError("Blend: a learned share starts below 1, where it could learn, got 1")
        self.learned = learned
        self.share = share
        self.softmax, self.target = Softmax(), target()
        if not isinstance(self.target, AttentionNormalization):
            raise TypeError(f"Blend: target must make a normalization, got {type(self.target).__name__}")
        self.promises = _blended(self.target.promises, share)
        self.requires_square, self.requires_tied = self.target.requires_square, self.target.requires_tied
        self.takes_bias = self.target.takes_bias
        # A whole number, which averages of the weights copy: between 0 and 1 they would never arrive.
        self.register_buffer("reached", None if learned else torch.tensor(round(share * WHOLE)))
        self._alone: str | None = None
        self.find_alone()
        self.register_load_state_dict_post_hook(Blend.find_alone)

    def build(self, num_heads: int, head_dim: int) -> None:
        """Create what both depend on."""
        super().build(num_heads, head_dim)
        self.target.build(num_heads, head_dim)

    def move(self, done: float) -> None:
        """Set the share that is in use to a part of the final one, `done` in [0, 1]; not of a learned one."""
        assert self.reached is not None
        whole = round(min(max(done, 0.0), 1.0) * self.share * WHOLE)
        self.reached.fill_(whole)
        self._alone = _alone(whole)

    def find_alone(self, *_: Any) -> None:
        """Look up, once a state was loaded, whether one of the two is computed alone.

        Apart from the tensor that says it: to look there at each call would be to wait for a GPU.
        """
        if self.reached is not None and not self.reached.is_meta:
            self._alone = _alone(int(self.reached))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Multiply weights and values; returns (B, H, Q, Dv)."""
        if self._alone is not None:
            return getattr(self, self._alone).attend(q, k, v, mask, **options)
        return self._mixed(*(part.attend(q, k, v, mask, **options) for part in (self.softmax, self.target)))

    def weights(self, q: Tensor, k: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Compute the weights themselves, (B, H, Q, K)."""
        if self._alone is not None:
            return getattr(self, self._alone).weights(q, k, mask, **options)
        return self._mixed(*(part.weights(q, k, mask, **options) for part in (self.softmax, self.target)))

    def _mixed(self, one: Tensor, other: Tensor) -> Tensor:
        share = self.reached / WHOLE if self.reached is not None else self.share[:, None, None]
        first, second = at_least_float32(one), at_least_float32(other)
        return torch.lerp(first, second, share.to(first.dtype)).to(one.dtype)


def _alone(whole: int) -> str | None:
    return {0: "softmax", WHOLE: "target"}.get(whole)


def _blended(other: Promises, share: float) -> Promises:
    """Return what a blend of softmax and another may promise."""
    return other if share == 1 else replace(other, unit_columns=False, sparse=False, linear=False)
