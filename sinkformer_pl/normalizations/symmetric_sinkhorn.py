"""SymmetricSinkhorn: doubly stochastic attention of a set to itself, with queries that are the keys."""

from dataclasses import replace
from typing import Unpack

from torch import Tensor

from sinkformer_pl.normalizations.contract import ScoreNormalization, ScoreOptions, refuse_bias
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask, Mask
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

    promises = Promises(row_sums="one", unit_columns=True, equivariant=True)
    requires_square = True
    requires_tied = True
    takes_bias = False

    def __init__(self, n_iters: int = 3) -> None:
        super().__init__()
        require_half_steps(n_iters)
        self.n_iters = n_iters
        if n_iters == 1:
            self.promises = replace(self.promises, unit_columns=False)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply `sinkformer_pl.ops.symmetric_sinkhorn` to scores (B, H, N, N), which must equal their transpose."""
        return symmetric_sinkhorn(scores, self.n_iters, mask=mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Multiply weights and values, (B, H, N, Dv)."""
        self._require_symmetric(q, k, options.get("bias"))
        return super().attend(q, k, v, mask, **options)

    def weights(self, q: Tensor, k: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Compute the weights themselves, (B, H, N, N)."""
        self._require_symmetric(q, k, options.get("bias"))
        return super().weights(q, k, mask, **options)

    def _require_symmetric(self, q: Tensor, k: Tensor, bias: Tensor | None) -> None:
        # Symmetry of the data itself can't be looked at: that would wait for the device.
        if q is not k:
            raise ValueError(
                "SymmetricSinkhorn needs symmetric scores, so queries and keys from one projection: give the same "
                "tensor as q and k, or use Sinkhorn"
            )
        refuse_bias(self, bias, "it would have to be symmetric, which can't be checked")
