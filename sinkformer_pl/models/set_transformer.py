"""Set Transformer: permutation-invariant classification of sets of points."""

from typing import Unpack, get_args

import torch
from torch import Tensor, nn

from sinkformer_pl.models.attention_core import AttentionCore, Temperature
from sinkformer_pl.models.backbone import Backbone, require_points
from sinkformer_pl.models.blocks import AttentionBlock, BlockOptions, LayerNormPlace, refuse_square, require_at_least
from sinkformer_pl.models.pooling import PMA, ClassToken, Pooling, Readout
from sinkformer_pl.models.tokens import Tokens, describe_tokens
from sinkformer_pl.normalizations.contract import NormalizationFactory
from sinkformer_pl.normalizations.softmax import Softmax
from sinkformer_pl.ops.mask import AttentionMask


class SAB(nn.Module):
    """Set attention block: the set attends to itself. Arguments as of `AttentionBlock`."""

    def __init__(
        self, dim: int, num_heads: int, normalization: NormalizationFactory, **block: Unpack[BlockOptions]
    ) -> None:
        super().__init__()
        self.block = AttentionBlock(dim, num_heads, normalization, **block)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map a set (B, N, dim), with the (B, N) bool mask of its real members, to a set of the same shape."""
        return self.block(x, mask=None if mask is None else AttentionMask(mask, mask))


class ISAB(nn.Module):
    """Induced set attention block: learned inducing points attend to the set, and the set to what they found.

    Two rectangular plans, (inducing x N) and (N x inducing), so that the cost is linear in N.

    Raises:
        NotImplementedError: the normalization needs as many queries as keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        normalization: NormalizationFactory,
        *,
        inducing_points: int,
        **block: Unpack[BlockOptions],
    ) -> None:
        super().__init__()
        self.inducing = nn.Parameter(torch.empty(inducing_points, dim))
        nn.init.xavier_uniform_(self.inducing)
        self.gather = AttentionBlock(dim, num_heads, normalization, **block)
        self.scatter = AttentionBlock(dim, num_heads, normalization, **block)
        self.gather.attention.core.sides = ("inducing point", "token")
        self.scatter.attention.core.sides = ("token", "inducing point")
        refuse_square(self.gather.attention.core.normalization)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that don't decay by default."""
        return {"inducing"}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map a set (B, N, dim), with the (B, N) bool mask of its real members, to a set of the same shape."""
        inducing = self.inducing.expand(x.shape[0], -1, -1)
        found = self.gather(inducing, x, None if mask is None else AttentionMask(key=mask))
        return self.scatter(x, found, None if mask is None else AttentionMask(query=mask))


class SetTransformer(Backbone):
    """Set Transformer (Lee et al. 2019, lee2019settransformer): embed, attend, pool.

    The same network for every normalization. Sets of unequal size come padded with a mask, and give what each set
    gives alone.

    Args:
        normalization: makes the normalization of each attention layer but the pooling's.
        in_features: C, numbers per point.
        dim: width.
        num_heads: heads of each attention layer; divides `dim`, unless `head_dim` is given.
        depth: number of attention blocks before the pooling.
        inducing_points: inducing points of each block (ISAB); 0 lets the set attend to itself (SAB), which costs N²
            and is what normalizations need that take square scores alone.
        mlp_dim: hidden width of the row-wise networks; None is `dim`.
        dropout: share dropped inside the blocks.
        pool_dropout: share dropped before and after the pooling.
        layer_norm: where the blocks have their layer norms.
        temperature: divides the scores of each attention layer but the pooling's: a positive number, or "learned", one
            for each head, from 1 on.
        head_dim: width of each head; None is dim / num_heads.
        pooling: how the sample is read out. A normalization, or "seed" for Softmax: a learned query attends to the set
            under it, in a block with a row-wise network. The same in both arms of a comparison by default, since one
            query under Sinkhorn is mean pooling. Or "cls", the final state of a learned member of the set; "mean" or
            "max" over the members.

    Raises:
        ValueError: a size out of range; heads that don't divide the width; a temperature that isn't positive; an
            unknown pooling.
        NotImplementedError: inducing points under a normalization that needs square scores.
    """

    def __init__(
        self,
        normalization: NormalizationFactory,
        in_features: int = 3,
        dim: int = 128,
        num_heads: int = 4,
        depth: int = 2,
        inducing_points: int = 16,
        mlp_dim: int | None = None,
        dropout: float = 0.0,
        pool_dropout: float = 0.0,
        layer_norm: LayerNormPlace = "pre",
        temperature: Temperature = 1.0,
        head_dim: int | None = None,
        pooling: Pooling | NormalizationFactory = Softmax,
    ) -> None:
        super().__init__()
        require_at_least(1, in_features=in_features, dim=dim, depth=depth)
        require_at_least(0, inducing_points=inducing_points, mlp_dim=mlp_dim or 0)
        if isinstance(pooling, str) and pooling not in get_args(Pooling):
            raise ValueError(
                f"pooling must be a normalization or one of {', '.join(get_args(Pooling))}, got {pooling!r}"
            )
        mlp_dim = dim if mlp_dim is None else mlp_dim
        shared = BlockOptions(
            mlp_dim=mlp_dim, head_dim=head_dim, dropout=dropout, layer_norm=layer_norm, temperature=1.0
        )
        block = BlockOptions({**shared, "temperature": temperature})
        self.out_dim = dim
        self.embed = nn.Linear(in_features, dim)
        self.blocks = nn.ModuleList(
            ISAB(dim, num_heads, normalization, inducing_points=inducing_points, **block)
            if inducing_points
            else SAB(dim, num_heads, normalization, **block)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim) if layer_norm == "pre" else nn.Identity()
        self.pool_dropout = nn.Dropout(pool_dropout)
        self.class_token = ClassToken(dim) if pooling == "cls" else None
        self.pool: PMA | Readout
        if isinstance(pooling, str) and pooling != "seed":
            *_, last = (module for module in self.blocks.modules() if isinstance(module, AttentionCore))
            self.pool = Readout(pooling, dim, num_heads, follows=last.normalization, **shared)
        else:
            self.pool = PMA(dim, num_heads, Softmax if isinstance(pooling, str) else pooling, **shared)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map sets (B, N, in_features), with the (B, N) bool mask of real points, to features (B, dim)."""
        require_points(inputs, self.embed.in_features, "SetTransformer")
        x = self.embed(inputs)
        if self.class_token is not None:
            x, mask = self.class_token(x, mask)
        for block in self.blocks:
            x = block(x, mask)
        pooled = self.pool(self.pool_dropout(self.norm(x)), mask)
        return self.pool_dropout(pooled.flatten(1))

    def describe_tokens(self, inputs: Tensor, mask: Tensor | None = None) -> list[Tokens]:
        """Describe the points of each set, behind the class token."""
        return describe_tokens(inputs, mask, leading=int(self.class_token is not None))
