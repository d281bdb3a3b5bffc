"""Attention of timm: its own forward, whose `scaled_dot_product_attention` is a core.

What is written with that function is converted, in whatever class it stands: projections, norms of queries and keys,
rotary embeddings, gates and windows stay timm's. All else is named with a reason.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from sinkformer_pl.conversion.attend import attend
from sinkformer_pl.conversion.core import ConvertedCore
from sinkformer_pl.conversion.site import Site
from sinkformer_pl.errors import UserError
from sinkformer_pl.normalizations.contract import AttentionNormalization


class ConvertedAttention(nn.Module):
    """Base of converted classes: the forward of timm's class, in which the module's `core` attends."""

    original: ClassVar[type[nn.Module]]
    core: ConvertedCore

    # What timm asks before it calls scaled_dot_product_attention; the module's own answer is kept for `revert`.
    fused_attn = property(lambda self: True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend, as the forward of timm's class.

        Raises:
            UserError: `torch.jit.trace` calls it.
            NotImplementedError: it doesn't call `scaled_dot_product_attention`, so that the core isn't asked.
        """
        if torch.jit.is_tracing():
            raise UserError(self._refusal("torch.jit.trace can't follow"))
        asked: list[bool] = []
        with _Redirected(self, asked):
            output = super().forward(*args, **kwargs)
        if not asked:
            raise NotImplementedError(
                f"{self.core.layer or 'attention'}: {self.original.__name__}, as it was called, didn't use "
                "scaled_dot_product_attention; leave this layer out by convert(layers=...)"
            )
        return output

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copy and pickle by the class of timm: the converted one is made when it is needed."""
        return _new, (self.original,), self.__dict__

    def __prepare_scriptable__(self) -> nn.Module:
        raise UserError(self._refusal("torch.jit.script can't compile"))

    def _refusal(self, cause: str) -> str:
        name = self.core.layer or "attention"
        return f"{name}: {cause} a converted attention; use torch.compile or torch.export, or revert the model"


class _Redirected(TorchFunctionMode):
    """Have a module's core attend where `scaled_dot_product_attention` is called, and note it in `asked`."""

    def __init__(self, module: ConvertedAttention, asked: list[bool]) -> None:
        super().__init__()
        self.module = module
        self.asked = asked

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.asked.append(True)
            return _attend(self.module, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(
    module: ConvertedAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attend by a module's core, with the arguments of `scaled_dot_product_attention`."""
    core = module.core
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(core.scale, float) and abs(scale / core.scale - 1) > 1e-6:
        q = q * (scale / core.scale)
    to_heads, back = _layout(module, q)
    if q.ndim == 3 and attn_mask is not None:
        attn_mask = to_heads(attn_mask)
    q, k, v = to_heads(q), to_heads(k), to_heads(v)
    if attn_mask is not None and _adds_positions(module) and attn_mask.is_floating_point():
        # It forbids nothing: what looks for forbidden pairs is left out.
        return back(core(q, k, v, None, attn_mask, dropout=core.dropout_of(dropout_p)))
    return back(attend(core, q, k, v, mask=attn_mask, dropout=dropout_p, causal=is_causal))


def _layout(module: ConvertedAttention, q: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return what brings queries to (B, H, N, D), and what brings the output back."""
    if q.ndim == 3:  # (B * H, N, D), in SAM
        return lambda x: x.unflatten(0, (-1, module.core.num_heads)), lambda x: x.flatten(0, 1)
    if q.ndim == 4:
        return lambda x: x, lambda x: x
    # Windows beside the samples: (B, H, W, N, D), or (B, W, H, N, D) in Twins.
    if _key(module.original) == "twins.LocallyGroupedAttn":
        return lambda x: x.flatten(0, 1), lambda x: x.unflatten(0, q.shape[:2])
    windows = q.shape[0], q.shape[2]
    return lambda x: x.transpose(1, 2).flatten(0, 1), lambda x: x.unflatten(0, windows).transpose(1, 2)


_CONVERTED: dict[type[nn.Module], type[nn.Module]] = {}


def converted_class(original: type[nn.Module]) -> type[nn.Module]:
    """Return the converted class of one of timm's, or of a subclass of a user's; one alone for each."""
    if original not in _CONVERTED:
        bases = (ConvertedAttention, original)
        _CONVERTED[original] = type(f"Converted{original.__name__}", bases, {"original": original})
    return _CONVERTED[original]


def _new(original: type[nn.Module]) -> nn.Module:
    return nn.Module.__new__(converted_class(original))


class TimmSite(Site):
    """An attention of timm.

    Attributes:
        query: words for what it attends from, if that is one token alone; under a normalization with column sums, that
            is refused.
    """

    query: str | None = None

    @override
    def attach(self, core: ConvertedCore) -> None:
        super().attach(core)
        if self.query is not None:
            core.sides = (self.query, "token")

    @override
    def refusal(self, normalization: AttentionNormalization) -> str | None:
        if self.reason is None and self.query is not None and normalization.promises.unit_columns:
            return (
                f"one query, the {self.query}, under {type(normalization).__name__} is a mean of the values, whose "
                "queries and keys wouldn't train"
            )
        return super().refusal(normalization)


CHANNELS = "it attends from channels to channels, so that its plan isn't one of tokens"
LINEAR = "linear attention, which has no weights of pairs"
OWN = "its forward computes softmax by itself, not by scaled_dot_product_attention"
NO_SOFTMAX = "it has no softmax of products of queries and keys"
TALKING = "talking heads: maps between the heads come before and after its softmax"
DIFFERENCE = "differential attention, the difference of two softmaxes"

REASONS = {
    "cait.TalkingHeadAttn": TALKING,
    "coat.FactorAttnConvRelPosEnc": LINEAR,
    "convit.GPSA": "its weights are blended with weights of positions by a gate",
    "davit.ChannelAttention": CHANNELS,
    "davit.ChannelAttentionV2": CHANNELS,
    "diff_attention.DiffAttention": DIFFERENCE,
    "edgenext.CrossCovarianceAttn": CHANNELS,
    "efficientformer_v2.Attention2d": TALKING,
    "efficientformer_v2.Attention2dDownsample": TALKING,
    "efficientvit_mit.LiteMLA": LINEAR,
    "mobilevit.LinearSelfAttention": LINEAR,
    "swiftformer.EfficientAdditiveAttention": LINEAR,
    "swin_transformer_v2.WindowAttention": "cosine attention, whose forward computes softmax by itself",
    "swin_transformer_v2_cr.WindowMultiHeadAttention": "cosine attention, whose forward computes softmax by itself",
    "vision_transformer.DiffParallelScalingBlock": DIFFERENCE,
    "volo.OutlookAttention": "its weights are a linear map of one token each, no products of queries and keys",
    "xcit.XCA": CHANNELS,
}
"""Why a class, by its file and name, can't be converted, where more is known than what its code shows."""

SINGLE = {
    "cait.ClassAttn": "class token",
    "attention_pool.AttentionPoolLatent": "latent query",
    "other_pool.SimPool1d": "mean token",
    "other_pool.SimPool2d": "mean token",
}
"""What classes attend from that have one query."""

RECTANGULAR = {
    *("attention2d.MultiQueryAttention2d", "hiera.MaskUnitAttention", "hieradet_sam2.MultiScaleAttention"),
    *("nextvit.EfficientAttention", "pvt_v2.Attention", "twins.GlobalSubSampleAttn"),
}
"""Classes that pool queries or keys, so that there may be fewer of them."""

POSITIONS = ("relative_position_bias_table", "rel_pos", "rel_pos_h", "attention_biases")
"""Attributes of attention that adds something for positions to its scores; nothing that forbids a pair."""

SHARED_POSITIONS = ("rel_pos_bias", "shared_rel_pos")
"""Attributes of models that give such a thing to all of their attention."""

GATES = {
    *("cbam", "coord_attn", "create_attn", "eca", "gather_excite", "global_context"),
    *("selective_kernel", "split_attn", "squeeze_excite"),
}
"""Files of what is called attention and weighs channels or places by a gate."""

_NAMED = re.compile(r"Att(n|ention)|MHSA|MLA|SHSA|GPSA|SHMA|Lambda")


def find(model: nn.Module) -> list[Site]:
    """List the attention of timm in a model, in the order of `named_modules`."""
    found = {name: module for name, module in model.named_modules() if _attends(module)}
    shared = {
        id(inner)
        for module in model.modules()
        if any(getattr(module, name, None) is not None for name in SHARED_POSITIONS)
        for inner in module.modules()
    }
    return [_site(name, module, shared=id(module) in shared) for name, module in found.items()]


def _site(name: str, module: nn.Module, *, shared: bool) -> TimmSite:
    original = _original(module)
    key = _key(original)
    heads = _first(module, "num_heads", "heads", default=1)
    scale = getattr(module, "scale", None)
    width = _first(module, "head_dim", "dim_head", "key_dim", default=0)
    if not width and isinstance(scale, float):
        width = round(scale**-2)
    dropout = getattr(getattr(module, "attn_drop", None), "p", 0.0)
    site = TimmSite(
        name=name,
        module=module,
        family=f"{original.__module__}.{original.__name__}",
        num_heads=heads,
        head_dim=width,
        kind="cross" if key in RECTANGULAR or key in SINGLE else "self",
        bias=shared or _adds_positions(module),
        dropout=dropout,
        reason=_reason(module, original, width),
        converted=converted_class(original),
    )
    site.query = SINGLE.get(key) if getattr(module, "latent_len", 1) == 1 else None
    return site


def _reason(module: nn.Module, original: type[nn.Module], width: int) -> str | None:
    """Say why a module can't be converted, if so."""
    names = _names(original)
    if known := REASONS.get(_key(original)):
        return known
    if "scaled_dot_product_attention" not in names:
        return OWN if "softmax" in names else NO_SOFTMAX
    if getattr(module, "einsum", False):
        return "it is made to attend by torch.einsum; make it with einsum=False"
    if not width:
        return "its number of heads and their width aren't known"
    if not hasattr(module, "fused_attn"):
        return "it has no attribute fused_attn, by which scaled_dot_product_attention is chosen"
    if hasattr(module, "core") and not isinstance(module, ConvertedAttention):
        return "it has an attribute `core` already"
    return None


def _attends(module: nn.Module) -> bool:
    """Tell whether a module is attention of timm, rather than what has attention in it, or a gate."""
    original = _original(module)
    place = _timm_class(original)
    if place is None or place.__module__.rpartition(".")[2] in GATES:
        return False
    if {"scaled_dot_product_attention", "softmax"} & _names(original):
        return bool(_NAMED.search(original.__name__)) or "scaled_dot_product_attention" in _names(original)
    inner = (each for each in module.modules() if each is not module)
    return bool(_NAMED.search(original.__name__)) and not any(_attends(each) for each in inner)


def _original(module: nn.Module) -> type[nn.Module]:
    return module.original if isinstance(module, ConvertedAttention) else type(module)


def _timm_class(original: type[nn.Module]) -> type | None:
    """Return the class of timm that a class is, or is derived from."""
    return next((base for base in original.__mro__ if base.__module__.startswith("timm.")), None)


def _key(original: type[nn.Module]) -> str:
    return f"{original.__module__.rpartition('.')[2]}.{original.__name__}"


def _names(original: type[nn.Module]) -> frozenset[str]:
    """Return the names of functions and attributes that a class's forward uses."""
    code = getattr(inspect.unwrap(original.forward), "__code__", None)
    return frozenset(() if code is None else code.co_names)


def _first(module: nn.Module, *names: str, default: int) -> int:
    return next((value for name in names if isinstance(value := getattr(module, name, None), int)), default)


def _adds_positions(module: nn.Module) -> bool:
    return any(getattr(module, name, None) is not None for name in POSITIONS)
