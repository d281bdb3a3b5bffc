"""Residual blocks of attention and a row-wise network."""

from typing import Literal, NotRequired, TypedDict, Unpack, get_args

from torch import Tensor, nn

from sinkformer_pl.models.attention_core import Temperature
from sinkformer_pl.models.class_mass import Mass
from sinkformer_pl.models.multi_head_attention import MultiHeadAttention
from sinkformer_pl.normalizations.contract import AttentionNormalization, NormalizationFactory
from sinkformer_pl.ops.mask import AttentionMask, Mask

LayerNormPlace = Literal["pre", "post", "none"]


class BlockOptions(TypedDict):
    """The keyword arguments of `AttentionBlock`, for what is built of blocks."""

    mlp_dim: int
    head_dim: int | None
    dropout: float
    layer_norm: LayerNormPlace
    temperature: Temperature
    causal: NotRequired[bool]
    class_mass: NotRequired[Mass]


class AttentionBlock(nn.Module):
    """Attention from one set to another (or to itself), then a row-wise two-layer network, each with a residual.

    Args:
        dim: width.
        num_heads: heads of the attention.
        normalization: makes the attention's normalization.
        mlp_dim: hidden width of the row-wise network; 0 leaves it out.
        head_dim: width of each head; None is dim / num_heads.
        dropout: share dropped after the attention and after the row-wise network.
        layer_norm: before each of the two parts ("pre"), after each residual ("post"), or nowhere ("none").
        temperature: of the attention's scores.
        causal: a query meets the keys up to its own position.
        class_mass: sum of the column of the first key, as of `AttentionCore`.

    Raises:
        ValueError: another place for the layer norm; heads that don't divide the width; a temperature that isn't
            positive.
        NotImplementedError: `causal`, or a class token's own mass, under a normalization that can't have it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        normalization: NormalizationFactory,
        *,
        mlp_dim: int,
        head_dim: int | None = None,
        dropout: float = 0.0,
        layer_norm: LayerNormPlace = "pre",
        temperature: Temperature = 1.0,
        causal: bool = False,
        class_mass: Mass = 1.0,
    ) -> None:
        super().__init__()
        if layer_norm not in get_args(LayerNormPlace):
            raise ValueError(f"layer_norm must be one of {', '.join(get_args(LayerNormPlace))}, got {layer_norm!r}")
        self.layer_norm = layer_norm
        self.attention = MultiHeadAttention(
            *(dim, num_heads, normalization),
            head_dim=head_dim,
            temperature=temperature,
            causal=causal,
            class_mass=class_mass,
        )
        self.mlp = (
            nn.Sequential(nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim))
            if mlp_dim
            else None
        )
        self.dropout = nn.Dropout(dropout)
        self.attention_norm = nn.LayerNorm(dim) if layer_norm != "none" else nn.Identity()
        self.mlp_norm = nn.LayerNorm(dim) if layer_norm != "none" and mlp_dim else nn.Identity()

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Mask = None, bias: Tensor | None = None
    ) -> Tensor:
        """Update x (B, Q, dim) by what it attends to in context (B, K, dim), by default x itself.

        In the "pre" form x and a context of its own are normalized; another context is taken as it comes. A bias,
        broadcastable to (B, H, Q, K), is added to the scaled scores.
        """
        pre = self.layer_norm == "pre"
        queries = self.attention_norm(x) if pre else x
        x = x + self.dropout(self.attention(queries, queries if context is None else context, mask, bias))
        if not pre:
            x = self.attention_norm(x)
        if self.mlp is None:
            return x
        x = x + self.dropout(self.mlp(self.mlp_norm(x) if pre else x))
        return x if pre else self.mlp_norm(x)


class TransformerEncoder(nn.Module):
    """A sequence attends to itself, block after block.

    Args:
        dim: width.
        num_heads: heads of each attention.
        normalization: makes the normalization of each attention.
        depth: number of blocks.
        block: arguments of each `AttentionBlock`. With `layer_norm="pre"` there is another layer norm after the last.

    Raises:
        ValueError: `depth` below 1, or an argument that the blocks refuse.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        normalization: NormalizationFactory,
        *,
        depth: int,
        **block: Unpack[BlockOptions],
    ) -> None:
        super().__init__()
        require_at_least(1, depth=depth)
        require_at_least(0, mlp_dim=block["mlp_dim"])
        self.blocks = nn.ModuleList(AttentionBlock(dim, num_heads, normalization, **block) for _ in range(depth))
        self.norm = nn.LayerNorm(dim) if block["layer_norm"] == "pre" else nn.Identity()

    @property
    def normalization(self) -> AttentionNormalization:
        """Return the normalization of the first block, for its promises and requirements."""
        return self.blocks[0].attention.core.normalization  # type: ignore[union-attr, return-value]

    def forward(self, x: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Map x (B, N, dim), with the (B, N) bool mask of its real tokens, to a sequence of the same shape.

        A bias, broadcastable to (B, H, N, N), is added to the scaled scores of every block.
        """
        # One tensor as both entries: a normalization may need to see that queries and keys are the same tokens.
        both = None if mask is None else AttentionMask(mask, mask)
        for block in self.blocks:
            x = block(x, mask=both, bias=bias)
        return self.norm(x)


def require_at_least(least: int, **sizes: int) -> None:
    """Refuse sizes below `least`, by the name that they are given under.

    Raises:
        ValueError: a size is below.
    """
    for name, value in sizes.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def refuse_square(normalization: AttentionNormalization) -> None:
    """Refuse a normalization of square scores for an attention from one set to another.

    Raises:
        NotImplementedError: it needs as many queries as keys.
    """
    if normalization.requires_square:
        raise NotImplementedError(
            f"{type(normalization).__name__} needs as many queries as keys; use inducing_points=0 (blocks in which the "
            "set attends to itself), and a pooling that takes rectangular scores"
        )
