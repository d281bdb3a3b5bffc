"""SymmetricSinkhorn: doubly stochastic attention of a set to itself, with queries that are the keys."""

from dataclasses import replace

from torch import Tensor

from sinkformer_pl.normalizations.base import Guarantees, ScoreNormalization
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.sinkhorn import require_half_steps
from sinkformer_pl.ops.symmetric_sinkhorn import symmetric_sinkhorn


@register
class SymmetricSinkhorn(ScoreNormalization):
    """Sinkhorn under tied projections: scores are symmetric, so one potential serves rows and columns.

    The limit is Sinkhorn's, symmetric. Its steps halve the distance from it or better, however sharp the scores, where
    those of Sinkhorn get slower; of nearly flat scores Sinkhorn's are the faster ones.

    Args:
        n_iters: number of steps, the last of which makes rows sum to 1 exactly; columns sum to 1 in the limit. 1 is
            Softmax.

    Raises:
        ValueError: `n_iters` below 1; in use, queries and keys, or their masks, that are two tensors.
        NotImplementedError: in use, a bias, a mask with `pairs`.

    References:
        Sander et al. 2022 (sander2022sinkformers) for the limit; Knight et al. 2014 (knight2014symmetry) and Feydy et
        al. 2019 (feydy2019interpolating) for the steps.
    """

    guarantees = Guarantees(row_sums="one", unit_columns=True, equivariant=True, square=True, tied=True)

    def __init__(self, n_iters: int = 3) -> None:
        super().__init__()
        require_half_steps(n_iters)
        self.n_iters = n_iters
        if n_iters == 1:
            self.guarantees = replace(self.guarantees, unit_columns=False)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """`sinkformer_pl.ops.symmetric_sinkhorn` of scores (B, H, N, N), which must equal their transpose."""
        return symmetric_sinkhorn(scores, self.n_iters, mask=mask)

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
        """Weights times values, (B, H, N, Dv)."""
        _require_symmetric(q, k, bias)
        return super().attend(q, k, v, mask, scale=scale)

    def weights(
        self, q: Tensor, k: Tensor, mask: AttentionMask | None, *, scale: float | Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The weights themselves, (B, H, N, N)."""
        _require_symmetric(q, k, bias)
        return super().weights(q, k, mask, scale=scale)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"n_iters={self.n_iters}"


def _require_symmetric(q: Tensor, k: Tensor, bias: Tensor | None) -> None:
    # Symmetry of the data itself can't be looked at: that would wait for the device.
    if q is not k:
        raise ValueError(
            "SymmetricSinkhorn needs symmetric scores, so queries and keys from one projection: give the same tensor "
            "as q and k, or use Sinkhorn"
        )
    if bias is not None:
        raise NotImplementedError(
            "SymmetricSinkhorn takes no bias, which would have to be symmetric and can't be checked; use Sinkhorn"
        )
