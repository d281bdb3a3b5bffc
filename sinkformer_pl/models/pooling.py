"""Read a sample out of its tokens, as one vector, without its padding."""

import warnings
from typing import Literal, Unpack

import torch
from torch import Tensor, nn

from sinkformer_pl.models.blocks import AttentionBlock, BlockOptions, refuse_square
from sinkformer_pl.models.class_mass import Mass
from sinkformer_pl.normalizations.contract import AttentionNormalization, NormalizationFactory
from sinkformer_pl.normalizations.softmax import Softmax
from sinkformer_pl.ops.mask import AttentionMask

Pooling = Literal["cls", "mean", "max", "seed"]
"""Ways to read a sample out of its tokens: "cls", the final state of a learned token before them; "mean" or "max" over
them, entry by entry; "seed", a learned query that attends to them under Softmax."""


def pool(x: Tensor, mask: Tensor | None, pooling: Literal["cls", "mean", "max"]) -> Tensor:
    """Pool to one vector for each sample.

    Args:
        x: (B, N, dim), N at least 1.
        mask: (B, N) bool of real tokens; None when every token is real.
        pooling: "cls", the first token; "mean" or "max" over the real tokens, entry by entry.

    Returns:
        (B, dim); 0 for the mean or maximum of no token.
    """
    if pooling == "cls":
        return x[:, 0]
    if mask is None:
        return x.mean(1) if pooling == "mean" else x.amax(1)
    real = mask[..., None]
    if pooling == "mean":
        return x.where(real, 0.0).sum(1) / real.sum(1).clamp(min=1)
    return x.where(real, -torch.inf).amax(1).where(real.any(1), 0.0)


def require_class_token(class_mass: Mass, pooling: str) -> None:
    """Raise a ValueError if there is a mass of a class token and no class token."""
    if class_mass != 1 and pooling != "cls":
        raise ValueError(f"class_mass={class_mass} is of the class token; give pooling=cls, or leave it at 1")


class ClassToken(nn.Module):
    """A learned token before all others, whose final state stands for the sample (Devlin et al. 2019).

    It starts from a normal distribution of standard deviation `std`.
    """

    def __init__(self, dim: int, *, std: float = 0.02) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(dim))
        nn.init.normal_(self.token, std=std)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Prepend the token to x (B, N, dim), and True to the (B, N) bool mask of its real tokens."""
        x = torch.cat((self.token.expand(x.shape[0], 1, -1), x), 1)
        return x, None if mask is None else nn.functional.pad(mask, (1, 0), value=True)


class PMA(nn.Module):
    """Pooling by multi-head attention: learned seeds attend to the set (Lee et al. 2019, lee2019settransformer).

    With one seed and a doubly stochastic normalization of two half-steps or more the plan is uniform: the pool is the
    mean, and this layer's queries and keys are never trained. A warning says so.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        normalization: NormalizationFactory,
        *,
        seeds: int = 1,
        **block: Unpack[BlockOptions],
    ) -> None:
        super().__init__()
        self.seeds = nn.Parameter(torch.empty(seeds, dim))
        nn.init.xavier_uniform_(self.seeds)
        self.block = AttentionBlock(dim, num_heads, normalization, **block)
        self.block.attention.core.sides = ("seed", "token")
        own = self.block.attention.core.normalization
        refuse_square(own)
        if seeds == 1:
            warn_of_a_blind_mean("pooling by one seed, a mean", own, "use pooling=Softmax")

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that don't decay by default."""
        return {"seeds"}

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map a set (B, N, dim), with the (B, N) bool mask of its real members, to (B, seeds, dim)."""
        return self.block(self.seeds.expand(x.shape[0], -1, -1), x, None if mask is None else AttentionMask(key=mask))


class Readout(nn.Module):
    """Read a sample out of its tokens, of which the first is a class token if it is read out by one.

    Args:
        pooling: the way. A seed is one query of an attention of its own, under Softmax and without a row-wise network.
        dim: width of the tokens.
        num_heads: heads of the seed's attention.
        follows: normalization of the attention before, of which a mean may see nothing; a warning says so. None if
            something stands between them.
        block: arguments of the seed's `AttentionBlock`.
    """

    def __init__(
        self,
        pooling: Pooling,
        dim: int,
        num_heads: int,
        *,
        follows: AttentionNormalization | None,
        **block: Unpack[BlockOptions],
    ) -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        if pooling == "mean" and follows is not None:
            warn_of_a_blind_mean("pooling=mean", follows, "use pooling=cls or pooling=seed")
        own = BlockOptions({**block, "mlp_dim": 0, "temperature": 1.0, "causal": False, "class_mass": 1.0})
        self.seed = PMA(dim, num_heads, Softmax, **own) if pooling == "seed" else None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, dim), with the (B, N) bool mask of the real ones, to (B, dim)."""
        if self.pooling != "seed":
            return pool(x, mask, self.pooling)
        assert self.seed is not None
        return self.seed(x, mask)[:, 0]

    def extra_repr(self) -> str:
        """Show the way in `print(model)`."""
        return f"pooling={self.pooling}"


def warn_of_a_blind_mean(reading: str, normalization: AttentionNormalization, remedy: str) -> None:
    """Warn in a line, under a doubly stochastic normalization, of a mean over tokens that doesn't see its weights.

    Args:
        reading: what the mean is.
        normalization: of the attention whose output it is taken of.
        remedy: what to give in its place.
    """
    if normalization.promises.unit_columns:
        warnings.warn(
            f"{reading} under {type(normalization).__name__}: a mean doesn't see the weights of a doubly stochastic "
            f"attention (docs/theory.md), whose queries and keys hardly train; {remedy}, unless that is what you want",
            stacklevel=3,
        )
