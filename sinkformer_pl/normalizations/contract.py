"""The contract of a normalization: two abstract classes, with the promises and requirements of each class."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypedDict, Unpack

from torch import Tensor, nn

from sinkformer_pl.normalizations.old_spelling import Guarantees, adopt, adopt_class, old_view
from sinkformer_pl.normalizations.per_head import numbers_per_head
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.ops.forbidden import forbid, forbid_pairs
from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast, per_head, score_scale


class ScoreOptions(TypedDict, total=False):
    """Keywords of `attend` and `weights`, by which scores are made of queries and keys.

    Attributes:
        scale: multiplies q·k, a number or a tensor (H,); None is 1 / sqrt(D).
        bias: added to the scaled scores, broadcastable to (B, H, Q, K), or None. An entry of -inf, or at or below -1e9,
            forbids its pair (`sinkformer_pl.ops.forbid`).
    """

    scale: float | Tensor | None
    bias: Tensor | None


class AttentionNormalization(nn.Module, ABC):
    """Turn attention scores into weights. Every layer owns its instance; parameters aren't shared across depth.

    Subclass `ScoreNormalization` unless the method works on queries and keys and never forms their Q x K scores.

    The contract, of both classes: q (B, H, Q, D), k (B, H, K, D), v (B, H, K, Dv) of one float dtype; `mask` an
    `AttentionMask` or None; keywords as in `ScoreOptions`. Results have the input's dtype and are computed in at least
    float32 with autocast off. Masked and forbidden weights are exactly 0; a query without a key gives 0; a padded batch
    gives exactly what its samples give unpadded, gradients too. Q, K and B may be 0. No data-dependent branch and no
    device synchronisation. What can't be honoured is refused with its reason: ValueError for a wrong argument,
    NotImplementedError for a valid but unsupported one.

    Attributes:
        promises: of the weights.
        requires_square: needs as many queries as keys.
        requires_tied: needs queries and keys that are one tensor, from one projection; then requires_square, too.
        takes_bias: adds a bias; False if it refuses one.
        takes_marginal: the sums of its columns may be given, see `HalfSteps`.
    """

    promises: Promises = Promises()
    requires_square: bool = False
    requires_tied: bool = False
    takes_bias: bool = True
    takes_marginal: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Accept the old spelling of promises and requirements."""
        super().__init_subclass__(**kwargs)
        if "guarantees" in vars(cls):
            adopt_class(cls)

    @property
    def guarantees(self) -> Guarantees:
        """Return promises and requirements in their old spelling."""
        return old_view(self)

    @guarantees.setter
    def guarantees(self, old: Guarantees) -> None:
        adopt(self, old)

    def build(self, num_heads: int, head_dim: int) -> None:
        """Create what depends on the owning layer, such as parameters per head. Called once, by that layer."""
        for number in numbers_per_head(type(self)):
            number.build(self, num_heads)

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Multiply weights and values; returns (B, H, Q, Dv)."""

    @abstractmethod
    def weights(self, q: Tensor, k: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Compute the weights themselves, (B, H, Q, K): for diagnostics and tests, not in the path of training."""

    def extra_repr(self) -> str:
        """Show the arguments in `print(model)`: those that the instance keeps under their names."""
        kept = {name.removeprefix("initial_"): value for name, value in vars(self).items()}
        return ", ".join(f"{name}={kept[name]}" for name in inspect.signature(type(self)).parameters if name in kept)

    def _prepare(
        self,
        q: Tensor,
        k: Tensor,
        mask: Mask,
        *,
        scale: float | Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[float | Tensor, Tensor | None, AttentionMask]:
        """Fill in the defaults, and apply the rule of a bias that forbids."""
        rule = forbid_pairs if self.promises.pairs else forbid
        bias, mask = rule(bias, mask, q.new_empty(()).expand(*q.shape[:-1], k.shape[-2]))
        return score_scale(q, scale), bias, mask


class ScoreNormalization(AttentionNormalization):
    """A normalization of the Q x K scores. `forward` is all that a subclass must write.

    A class that knows a faster way overrides `attend` and gives the same numbers.
    """

    @abstractmethod
    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Map scores to weights.

        Args:
            scores: (B, H, Q, K), float32 or float64, scaled and with the bias added. Entries outside of the mask are
                arbitrary and must change nothing. A bias that forbids comes as `mask.pairs` if the class promises to
                honour them, else as scores of -inf, whose weight is 0.
            mask: never None; `mask.allowed(scores)` is the bool tensor of the entries that count.

        Returns:
            Weights (B, H, Q, K) in the dtype of the scores, exactly 0 outside of the mask.
        """

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Multiply weights and values; returns (B, H, Q, Dv)."""
        scale, bias, mask = self._prepare(q, k, mask, **options)
        q, k, v = mask.without_padding(q, k, v)
        with no_autocast(q):
            weights = self(scores_of(q, k, scale, bias), mask)
            return (weights @ at_least_float32(v)).to(v.dtype)

    def weights(self, q: Tensor, k: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Compute the weights themselves, (B, H, Q, K)."""
        scale, bias, mask = self._prepare(q, k, mask, **options)
        q, k, _ = mask.without_padding(q, k, k)
        with no_autocast(q):
            return self(scores_of(q, k, scale, bias), mask).to(q.dtype)


NormalizationFactory = Callable[[], AttentionNormalization]
"""Makes one normalization for each attention layer: a class, or `functools.partial(Sinkhorn, n_iters=21)`."""


def refuse_bias(module: AttentionNormalization, bias: Tensor | None, reason: str) -> None:
    """Raise a NotImplementedError with the reason if there is a bias."""
    if bias is not None:
        raise NotImplementedError(f"{type(module).__name__} takes no bias: {reason}; use Softmax or Sinkhorn")


def scores_of(q: Tensor, k: Tensor, scale: float | Tensor, bias: Tensor | None) -> Tensor:
    """Compute scale * q @ k.mT + bias, (B, H, Q, K) in at least float32."""
    q, k = at_least_float32(q), at_least_float32(k)
    if isinstance(scale, Tensor):
        scale = scale.to(q.dtype)
    scores = (q * per_head(scale)) @ k.mT
    return scores if bias is None else scores + bias.to(scores.dtype)
