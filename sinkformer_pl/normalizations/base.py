"""The contract of a normalization: two abstract classes, and the guarantees that each concrete one declares."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.precision import at_least_float32, no_autocast, per_head


@dataclass(frozen=True, kw_only=True)
class Guarantees:
    """What a normalization promises of its weights, in evaluation mode; `check_normalization` holds it to this.

    Attributes:
        row_sums: sums over the keys: "one", "at most one", or None where nothing is promised. A query without a key
            has a row of zeros in any case.
        unit_columns: columns sum to Q/K in the limit of many iterations.
        sparse: some weights of real pairs are exactly zero.
        equivariant: permuting queries or keys permutes the weights.
        pairs: an AttentionMask with any `pairs` is honoured.
        causal: causal `pairs` are honoured.
        square: needs as many queries as keys.
        tied: needs queries and keys that are one tensor, from one projection.
        linear: `attend` takes time and memory linear in Q + K.
        stochastic: training mode draws random numbers.
    """

    row_sums: Literal["one", "at most one"] | None = None
    unit_columns: bool = False
    sparse: bool = False
    equivariant: bool = False
    pairs: bool = False
    causal: bool = False
    square: bool = False
    tied: bool = False
    linear: bool = False
    stochastic: bool = False


class AttentionNormalization(nn.Module, ABC):
    """How attention scores become weights. Every layer owns its instance; parameters aren't shared across depth.

    Subclass `ScoreNormalization` unless the method works on queries and keys and never forms their Q x K scores.

    The contract, of both classes: q (B, H, Q, D), k (B, H, K, D), v (B, H, K, Dv) of one float dtype; `mask` an
    `AttentionMask` or None; `scale` multiplies q·k and is a number or a tensor (H,); `bias` is added to the scaled
    scores, broadcastable to (B, H, Q, K). Results have the input's dtype and are computed in at least float32 with
    autocast off. Masked weights are exactly 0; a query without a key gives 0; a padded batch gives exactly what its
    samples give unpadded, gradients too. No data-dependent branch and no device synchronisation. What can't be
    honoured is refused with its reason: ValueError for a wrong argument, NotImplementedError for a valid but
    unsupported one.
    """

    guarantees: Guarantees = Guarantees()

    def build(self, num_heads: int, head_dim: int) -> None:
        """Create what depends on the owning layer, such as parameters per head. Called once, by that layer."""

    @abstractmethod
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
        """Weights times values, (B, H, Q, Dv)."""

    @abstractmethod
    def weights(
        self, q: Tensor, k: Tensor, mask: AttentionMask | None, *, scale: float | Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The weights themselves, (B, H, Q, K): for diagnostics and tests, not in the path of training."""


class ScoreNormalization(AttentionNormalization):
    """A normalization of the Q x K scores. `forward` is all that a subclass must write.

    A class that knows a faster way overrides `attend` and gives the same numbers.
    """

    @abstractmethod
    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Map scores to weights.

        Args:
            scores: (B, H, Q, K), float32 or float64, scaled and with the bias added. Entries outside of the mask are
                arbitrary and must change nothing.
            mask: never None; `mask.allowed(scores)` is the bool tensor of the entries that count.

        Returns:
            Weights (B, H, Q, K) in the dtype of the scores, exactly 0 outside of the mask.
        """

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
        """Weights times values, (B, H, Q, Dv)."""
        mask = mask or AttentionMask()
        q, k, v = mask.without_padding(q, k, v)
        with no_autocast(q):
            weights = self(_scores(q, k, scale, bias), mask)
            return (weights @ at_least_float32(v)).to(v.dtype)

    def weights(
        self, q: Tensor, k: Tensor, mask: AttentionMask | None, *, scale: float | Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The weights themselves, (B, H, Q, K)."""
        mask = mask or AttentionMask()
        q, k, _ = mask.without_padding(q, k, k)
        with no_autocast(q):
            return self(_scores(q, k, scale, bias), mask).to(q.dtype)


NormalizationFactory = Callable[[], AttentionNormalization]
"""Makes one normalization for each attention layer: a class, or `functools.partial(Sinkhorn, n_iters=21)`."""


def _scores(q: Tensor, k: Tensor, scale: float | Tensor, bias: Tensor | None) -> Tensor:
    q, k = at_least_float32(q), at_least_float32(k)
    if isinstance(scale, Tensor):
        scale = scale.to(q.dtype)
    scores = (q * per_head(scale)) @ k.mT
    return scores if bias is None else scores + bias.to(scores.dtype)
