"""Softmax, through PyTorch's fused attention."""

from dataclasses import replace

import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor

from sinkformer_pl import ops
from sinkformer_pl.normalizations.base import Guarantees, ScoreNormalization
from sinkformer_pl.normalizations.registry import register
from sinkformer_pl.ops.mask import AttentionMask
from sinkformer_pl.ops.precision import no_autocast, per_head


@register
class Softmax(ScoreNormalization):
    """The attention of Vaswani et al. 2017: rows are exp(scores), divided by their sums."""

    guarantees = Guarantees(row_sums="one", equivariant=True, pairs=True, causal=True)

    def forward(self, scores: Tensor, mask: AttentionMask) -> Tensor:
        """Row softmax of scores (B, H, Q, K) over the keys that the mask permits."""
        return ops.softmax(scores, mask=mask)

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
        """Weights times values, (B, H, Q, Dv), by `scaled_dot_product_attention`."""
        dtype = q.dtype
        exact = isinstance(scale, Tensor) or (bias is not None and bias.dtype != dtype)
        if exact and dtype.itemsize < 4:
            # The operator takes a number for scale and a bias of the dtype of q: here both would be rounded.
            return super().attend(q, k, v, mask, scale=scale, bias=bias)
        if bias is not None:
            bias = bias.to(dtype).expand(*q.shape[:-1], k.shape[-2])
        with no_autocast(q):
            if isinstance(scale, Tensor):
                q, scale = (q * per_head(scale)).to(dtype), 1.0
            if mask is None:
                return F.scaled_dot_product_attention(q, k, v, bias, scale=scale)
            q, k, v = mask.without_padding(q, k, v)
            like_scores = q.new_empty(()).expand(*q.shape[:-1], k.shape[-2])
            # Padded queries are zeroed afterwards instead of masked: a mask of the keys alone is Q times smaller.
            allowed = replace(mask, query=None).allowed(like_scores)
            some_key = allowed.any(-1, keepdim=True)
            reachable = allowed | ~some_key
            if bias is not None:
                reachable = bias.masked_fill(~reachable, float("-inf"))
            output = F.scaled_dot_product_attention(q, k, v, reachable, scale=scale)
            return output.where(mask.query_column(like_scores) & some_key, 0.0)
