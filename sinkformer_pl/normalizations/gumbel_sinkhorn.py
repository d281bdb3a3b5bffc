"""GumbelSinkhorn: doubly stochastic attention to noisy scores."""

import math
from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor

from sinkformer_pl import ops
from sinkformer_pl.normalizations.contract import ScoreNormalization, ScoreOptions
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask, Mask
from sinkformer_pl.ops.precision import at_least_float32
from sinkformer_pl.ops.sinkhorn import require_odd_half_steps


@register
class GumbelSinkhorn(ScoreNormalization):
    """Sinkhorn of (scores + noise) / noise_temperature, with standard Gumbel noise in training mode only.

    As the temperature falls and half-steps grow, the weights of as many queries as keys approach the permutation with
    the largest total of noisy scores. In evaluation mode they are Sinkhorn's of scores / noise_temperature.

    Each call draws anew, `weights` too, for every pair of the padded batch and from PyTorch's generator of the device:
    `seed_everything` governs it, and in training a sample's draw depends on the batch that it is in.

    Args:
        n_iters: number of half-steps, odd, so that the last one is a row step: rows sum to 1 exactly, columns to Q/K in
            the limit. More by default than Sinkhorn's, since the noise spreads the scores and slows the columns down.
        noise_temperature: positive; divides scores, bias and noise.

    Raises:
        ValueError: `n_iters` is even or below 1; a temperature that isn't positive.
        NotImplementedError: in use, a mask with `pairs`.

    References:
        Mena et al. 2018 (mena2018gumbelsinkhorn).
    """

    promises = Promises(row_sums="one", unit_columns=True, equivariant=True, stochastic=True)

    def __init__(self, n_iters: int = 21, noise_temperature: float = 1.0) -> None:
        super().__init__()
        number = isinstance(noise_temperature, int | float) and not isinstance(noise_temperature, bool)
        if not number or not 0 < noise_temperature < math.inf:
            raise ValueError(
                f"GumbelSinkhorn: noise_temperature must be a positive number, got {noise_temperature!r}; as it goes "
                "to 0 weights become a permutation"
            )
        require_odd_half_steps(n_iters, of=type(self).__name__)
        self.n_iters = n_iters
        self.noise_temperature = noise_temperature
        if n_iters == 1:
            self.promises = replace(self.promises, unit_columns=False)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Apply `sinkformer_pl.ops.sinkhorn` to scores (B, H, Q, K), noisy in training mode."""
        noisy = scores + gumbel_noise(scores.shape, scores) if self.training else scores
        return ops.sinkhorn(noisy / self.noise_temperature, self.n_iters, mask=mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Multiply weights and values, (B, H, Q, Dv), by `ops.sinkhorn_attention` with the noise as a bias."""
        scale, bias, mask = self._prepare(q, k, mask, **options)
        if bias is not None:
            bias = at_least_float32(bias) / self.noise_temperature
        if self.training:
            noise = gumbel_noise((*q.shape[:-1], k.shape[-2]), at_least_float32(q)) / self.noise_temperature
            bias = noise if bias is None else bias + noise
        scale = (at_least_float32(scale) if isinstance(scale, Tensor) else scale) / self.noise_temperature
        return ops.sinkhorn_attention(q, k, v, n_iters=self.n_iters, mask=mask, bias=bias, scale=scale)


def gumbel_noise(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Draw from the standard Gumbel distribution, in the dtype and on the device of `like`; always finite."""
    exponential = like.new_empty(shape).exponential_()
    return -exponential.clamp(min=torch.finfo(like.dtype).tiny).log()
