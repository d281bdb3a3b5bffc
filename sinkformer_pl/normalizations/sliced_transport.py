"""SlicedTransport: attention by expected sliced transport plans."""

from dataclasses import replace
from typing import Unpack

import torch
from torch import Tensor, nn

from sinkformer_pl.normalizations.contract import AttentionNormalization, ScoreOptions, refuse_bias
from sinkformer_pl.normalizations.per_head import unbuilt
from sinkformer_pl.normalizations.promises import Promises
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import Mask
from sinkformer_pl.ops.sliced_transport import require_temperatures, sliced_transport


@register
class SlicedTransport(AttentionNormalization):
    """The attention of ESPFormer: queries and keys of equal rank are matched in every slice, and slices averaged.

    Matchings whose tokens lie close, by Euclidean distance over all features, weigh more. Needs as many queries as
    keys. Both are multiplied by the square root of `scale` first, so that their products are scale * q·k; temperatures
    are in units of these. With n tokens, soft ranks cost n³ operations for each slice (the distances under its plan)
    and n² memory; hard ones cost n log n, and memory n.

    Args:
        sort_temperature: of the soft ranks. Rows and columns sum to 1 only nearly, the better the lower it is
            (`sinkformer_pl.ops.marginal_error` measures how far off they are). 0 is the limit: hard ranks, rows and
            columns exact; ranks give no gradient then, queries and keys learn through the weights of the slices alone.
        slice_temperature: of the softmax over the slices; high is the mean over them, low the cheapest slice.
        slices: number of directions to learn for each head. None: every feature is a slice, and nothing is learned.

    Raises:
        ValueError: a temperature or `slices` out of range; `slices` at a `sort_temperature` of 0, at which directions
            get no gradient. In use, unequal numbers of queries and keys; a scale that isn't above 0.
        NotImplementedError: in use, a bias or a mask with `pairs`.

    References:
        Shahbazi et al. 2025 (shahbazi2025espformer).
    """

    promises = Promises(unit_columns=True, equivariant=True)
    requires_square = True
    takes_bias = False
    directions: nn.Parameter | None

    def __init__(
        self, sort_temperature: float = 1e-2, slice_temperature: float = 1.0, slices: int | None = None
    ) -> None:
        super().__init__()
        try:
            require_temperatures(sort_temperature, slice_temperature)
        except ValueError as error:
            raise ValueError(f"SlicedTransport: {error}") from None
        if slices is not None and (isinstance(slices, bool) or not isinstance(slices, int) or slices < 1):
            raise ValueError(f"SlicedTransport: slices must be None or an integer of at least 1, got {slices!r}")
        if slices is not None and sort_temperature == 0:
            raise ValueError(
                "SlicedTransport: slices are learned through soft ranks, give a sort_temperature above 0 or slices=None"
            )
        self.sort_temperature = sort_temperature
        self.slice_temperature = slice_temperature
        self.slices = slices
        self.register_parameter("directions", None)
        if sort_temperature == 0:
            self.promises = replace(self.promises, row_sums="one", sparse=True, linear=True)

    def build(self, num_heads: int, head_dim: int) -> None:
        """Draw the directions (H, slices, D), if they are learned."""
        if self.slices is not None:
            self.directions = nn.Parameter(torch.randn(num_heads, self.slices, head_dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Multiply weights and values, (B, H, n, Dv), by `sinkformer_pl.ops.sliced_transport`."""
        scale, bias, mask = self._prepare(q, k, mask, **options)
        refuse_bias(self, bias, "it forms no scores")
        if self.slices is not None and self.directions is None:
            raise unbuilt(self, "directions")
        return sliced_transport(
            q,
            k,
            v,
            sort_temperature=self.sort_temperature,
            slice_temperature=self.slice_temperature,
            scale=scale,
            directions=self.directions,
            mask=mask,
        )

    def weights(self, q: Tensor, k: Tensor, mask: Mask = None, **options: Unpack[ScoreOptions]) -> Tensor:
        """Compute the weights themselves, (B, H, n, n)."""
        identity = torch.eye(k.shape[-2], dtype=q.dtype, device=q.device).expand(*k.shape[:-1], -1)
        return self.attend(q, k, identity, mask, **options)
