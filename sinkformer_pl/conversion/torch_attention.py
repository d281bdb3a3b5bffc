"""PyTorch's own attention: `torch.nn.MultiheadAttention`, alone and in `torch.nn.Transformer`."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from typing_extensions import override

from sinkformer_pl.conversion.attend import core_inputs, require_independent_queries
from sinkformer_pl.conversion.core import ConvertedCore
from sinkformer_pl.conversion.site import Kind, Site
from sinkformer_pl.models.multi_head_attention import join_heads, split_heads
from sinkformer_pl.normalizations.contract import AttentionNormalization
from sinkformer_pl.ops.mask import is_forbidden


class ConvertedMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` over the normalization of its `core`; takes and returns the same."""

    original: ClassVar[type[nn.Module]] = nn.MultiheadAttention
    core: ConvertedCore

    # An encoder layer asks this before it computes softmax by an operator of its own, without a call of its attention.
    _qkv_same_embed_dim = property(lambda self: False)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        query_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, as `torch.nn.MultiheadAttention.forward`.

        Args:
            query: (B, Q, embed_dim), with the first axes exchanged unless `batch_first`, or (Q, embed_dim).
            key: (B, K, kdim), likewise.
            value: (B, K, vdim), likewise.
            key_padding_mask: (B, K), bool, True at padding, or float, added to the scores.
            need_weights: return the weights, too; those without dropout.
            attn_mask: (Q, K) or (B * H, Q, K), bool, True at pairs that may not meet, or float.
            average_attn_weights: return the mean of the weights over the heads.
            is_causal: `attn_mask` is causal.
            query_padding_mask: (B, Q) bool, True at padding: for attention to another sequence under a normalization
                that sums over queries. In self-attention it is the padding of the keys.

        Returns:
            The output, of the shape of the query, and the weights (B, Q, K), (B, H, Q, K) or None.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            raise NotImplementedError(
                f"{self.core.layer or 'attention'}: nested tensors go to PyTorch's own softmax alone; give padded "
                "ones, and set enable_nested_tensor=False in an encoder"
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask: give attn_mask, too")
        self_attention, batched = query is key, query.ndim == 3
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._projected(query, key, value)
        core, dropout = self.core, self.dropout
        given = core_inputs(
            core,
            q,
            k,
            v,
            **self._masks(attn_mask, key_padding_mask, len(query), extra := k.shape[2] - key.shape[1]),
            queries=None if query_padding_mask is None else ~query_padding_mask.bool(),
            self_attention=self_attention,
            extra_keys=extra,
            # The mask says it to those that honour pairs; to others it needn't be looked at.
            causal=is_causal and not core.normalization.promises.pairs,
        )
        output = self.out_proj(join_heads(core(*given, dropout=core.dropout_of(dropout))))
        output = output if not batched or self.batch_first else output.transpose(0, 1)
        weights = core.weights(given.q, given.k, given.mask, given.bias) if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if batched:
            return output, weights
        return output[0], None if weights is None else weights[0]

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project to heads (B, H, N, D), and append the keys and values that the layer has of its own."""
        if self.in_proj_weight is not None:
            matrices = self.in_proj_weight.chunk(3)
        else:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = map(F.linear, (query, key, value), matrices, biases)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(len(k), 1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(len(v), 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def _masks(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, samples: int, extra: int
    ) -> dict[str, Tensor | None]:
        """Write masks as the arguments of `core_inputs`; every query may meet the extra keys."""
        mask = bias = keys = None
        if attn_mask is not None:
            mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
            mask = F.pad(mask, (0, extra), value=1 if mask.dtype == torch.bool else 0.0)
            mask = mask if mask.ndim == 2 else mask.unflatten(0, (samples, self.num_heads))
        if key_padding_mask is not None and key_padding_mask.dtype == torch.bool:
            keys = F.pad(~key_padding_mask, (0, extra), value=1)
        elif key_padding_mask is not None:
            bias = F.pad(key_padding_mask, (0, extra))[:, None, None]
        return {"mask": mask, "bias": bias, "keys": keys}


class ConvertedTransformerEncoder(nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` that makes no nested tensors, whose attention PyTorch has for itself."""

    original: ClassVar[type[nn.Module]] = nn.TransformerEncoder

    use_nested_tensor = property(lambda self: False)  # type: ignore[assignment]


class ConvertedTransformerDecoderLayer(nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` that tells its attention to the memory which queries are padding.

    A target that is masked from left to right is refused under a plan there: what a query finds in the memory would
    depend on the queries behind it, through the sums over queries.
    """

    original: ClassVar[type[nn.Module]] = nn.TransformerDecoderLayer

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """Update tgt, as `torch.nn.TransformerDecoderLayer.forward`.

        Raises:
            NotImplementedError: a mask of the target under a plan in the attention to the memory.
        """
        more: dict[str, Any] = {}
        if isinstance(self.multihead_attn, ConvertedMultiheadAttention):
            require_independent_queries(self.multihead_attn.core, tgt_mask, causal=tgt_is_causal)
            if tgt_key_padding_mask is not None:
                more["query_padding_mask"] = forbidden_by(tgt_key_padding_mask)

        def to_memory(x: Tensor) -> Tensor:
            attended = self.multihead_attn(
                x,
                memory,
                memory,
                attn_mask=memory_mask,
                key_padding_mask=memory_key_padding_mask,
                is_causal=memory_is_causal,
                need_weights=False,
                **more,
            )
            return self.dropout2(attended[0])

        def to_itself(x: Tensor) -> Tensor:
            return self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        x = tgt
        for norm, update in ((self.norm1, to_itself), (self.norm2, to_memory), (self.norm3, self._ff_block)):
            x = x + update(norm(x)) if self.norm_first else norm(x + update(x))
        return x


def forbidden_by(mask: Tensor) -> Tensor:
    """Return True where a mask that is bool or float forbids."""
    return mask if mask.dtype == torch.bool else is_forbidden(mask)


class TorchSite(Site):
    """An attention of PyTorch and the layer or encoder around it, whose class is exchanged, too.

    Attributes:
        around: these, by what they become.
        decoder: the layer whose attention to the memory it is.
    """

    around: tuple[tuple[nn.Module, type[nn.Module]], ...] = ()
    decoder: nn.Module | None = None

    @override
    def refusal(self, normalization: AttentionNormalization) -> str | None:
        layer = nn.TransformerDecoderLayer if self.decoder is None else type(self.decoder)
        told = layer in (nn.TransformerDecoderLayer, ConvertedTransformerDecoderLayer)
        if not told and not normalization.promises.pairs:
            return (
                f"{layer.__name__} is a subclass of torch.nn.TransformerDecoderLayer, which may not say which queries "
                f"are padding or causal, and {type(normalization).__name__} sums over queries"
            )
        return super().refusal(normalization)

    @override
    def attach(self, core: ConvertedCore) -> None:
        super().attach(core)
        for module, converted in self.around:
            module.__class__ = converted

    @override
    def detach(self) -> None:
        super().detach()
        for module, converted in self.around:
            module.__class__ = converted.original  # type: ignore[attr-defined]


AROUND = {
    nn.TransformerEncoder: ConvertedTransformerEncoder,
    nn.TransformerDecoderLayer: ConvertedTransformerDecoderLayer,
}


def find(model: nn.Module) -> list[Site]:
    """List the `torch.nn.MultiheadAttention` in a model, whichever library it belongs to."""
    sites: list[Site] = []
    around: dict[nn.Module, list[tuple[nn.Module, type[nn.Module]]]] = {}
    for module in model.modules():
        for original, converted in AROUND.items():
            if type(module) in (original, converted):
                for child in module.modules():
                    around.setdefault(child, []).append((module, converted))
    kinds: dict[nn.Module, Kind] = {}
    decoders: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            kinds[module.self_attn] = "self"
        if isinstance(module, nn.TransformerDecoderLayer):
            kinds[module.multihead_attn], decoders[module.multihead_attn] = "cross", module
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        site = TorchSite(
            name=name,
            module=module,
            family="torch.nn.MultiheadAttention",
            num_heads=module.num_heads,
            head_dim=module.head_dim,
            kind=kinds.get(module, "any"),
            dropout=module.dropout,
            reason=_reason(module),
            converted=ConvertedMultiheadAttention,
        )
        site.around, site.decoder = tuple(around.get(module, ())), decoders.get(module)
        sites.append(site)
    return sites


def _reason(module: nn.MultiheadAttention) -> str | None:
    if type(module) not in (nn.MultiheadAttention, ConvertedMultiheadAttention):
        return f"{type(module).__name__} is a subclass of torch.nn.MultiheadAttention, which may attend in another way"
    if hasattr(module, "core") and not isinstance(module, ConvertedMultiheadAttention):
        return "it has an attribute `core` already"
    return None
