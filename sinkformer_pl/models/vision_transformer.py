"""Vision Transformer: an image as a sequence of patches."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sinkformer_pl.errors import UserError
from sinkformer_pl.models.attention_core import Temperature
from sinkformer_pl.models.backbone import Backbone
from sinkformer_pl.models.blocks import BlockOptions, LayerNormPlace, TransformerEncoder, require_at_least
from sinkformer_pl.models.class_mass import Mass
from sinkformer_pl.models.pooling import ClassToken, Pooling, Readout, require_class_token
from sinkformer_pl.models.positions import resize_grid
from sinkformer_pl.models.tokens import Tokens, describe_patches
from sinkformer_pl.normalizations.contract import NormalizationFactory


class VisionTransformer(Backbone):
    """Vision Transformer (Dosovitskiy et al. 2021): cut the image into patches, embed them, attend, pool.

    Positions are learned. The same network for every normalization, those included that need square scores. With
    `depth=1, num_heads=1, mlp_dim=0, dim=128, head_dim=64, token_std=1.0, channels=1` it is the attention-only network
    of the MNIST study of Sander et al. 2022 (sander2022sinkformers): one attention over the layer-normalized tokens, a
    residual, a layer norm, the class token. But for the biases of queries, keys and values, which they leave out.

    Args:
        normalization: makes the normalization of each attention layer.
        image_size: side of the images in pixels, or (height, width).
        patch_size: side of the square patches in pixels; divides height and width.
        channels: of the images.
        dim: width.
        num_heads: heads of each attention layer; divides `dim`, unless `head_dim` is given.
        depth: number of attention blocks.
        mlp_dim: hidden width of the row-wise networks; None is 4 `dim`, 0 leaves them out.
        dropout: share dropped after the positions are added and inside the blocks.
        layer_norm: where the blocks have their layer norms; "pre" has another one before the pooling.
        temperature: divides the scores of each attention layer: a positive number, or "learned", one for each head.
        head_dim: width of each head; None is dim / num_heads.
        pooling: "cls", the final state of a learned token beside the patches; "mean" or "max" over all patches, which
            are then all tokens there are; "seed", a learned query that attends to them under Softmax. A mean sees
            little of a doubly stochastic attention.
        token_std: standard deviation of the normal distribution that positions and class token start from.
        class_mass: sum of the class token's column in every plan over that of any other token: 1 counts it as they are;
            0 lets nobody read it; another number; "learned", one for each head, from 1 on; "free", what it receives
            under Softmax. Under Sinkhorn and SemiUnbalancedSinkhorn.

    Raises:
        ValueError: a patch that doesn't divide the image; a size out of range; heads that don't divide the width; a
            temperature that isn't positive; an unknown pooling or place of the layer norms; a mass of a class token
            that isn't there.
        NotImplementedError: a class token's own mass under a normalization without column sums to set.
    """

    def __init__(
        self,
        normalization: NormalizationFactory,
        image_size: int | tuple[int, int] = 28,
        patch_size: int = 4,
        channels: int = 3,
        dim: int = 64,
        num_heads: int = 4,
        depth: int = 4,
        mlp_dim: int | None = None,
        dropout: float = 0.0,
        layer_norm: LayerNormPlace = "pre",
        temperature: Temperature = 1.0,
        head_dim: int | None = None,
        pooling: Pooling = "cls",
        token_std: float = 0.02,
        class_mass: Mass = 1.0,
    ) -> None:
        super().__init__()
        height, width = _height_and_width(image_size)
        require_at_least(1, image_size=min(height, width), patch_size=patch_size, channels=channels, dim=dim)
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"patch_size={patch_size} must divide the image size, {height} x {width}: take another patch size, or "
                "resize the images"
            )
        if not 0 <= token_std < math.inf:
            raise ValueError(f"token_std must be 0 or a positive number, got {token_std}")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
        require_class_token(class_mass, pooling)
        mlp_dim = 4 * dim if mlp_dim is None else mlp_dim
        self.out_dim = dim
        self.image_shape = (channels, height, width)
        self.pooling: Pooling = pooling
        self.grid = height // patch_size, width // patch_size
        self.embed = nn.Conv2d(channels, dim, patch_size, stride=patch_size)
        self.class_token = ClassToken(dim, std=token_std) if pooling == "cls" else None
        self.positions = nn.Parameter(torch.empty(math.prod(self.grid) + (pooling == "cls"), dim))
        nn.init.normal_(self.positions, std=token_std)
        self.dropout = nn.Dropout(dropout)
        block = BlockOptions(
            mlp_dim=mlp_dim,
            head_dim=head_dim,
            dropout=dropout,
            layer_norm=layer_norm,
            temperature=temperature,
            class_mass=class_mass,
        )
        self.encoder = TransformerEncoder(dim, num_heads, normalization, depth=depth, **block)
        self.readout = Readout(pooling, dim, num_heads, follows=self.encoder.normalization, **block)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that don't decay by default."""
        return {"positions"}

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map images (B, channels, height, width) float to features (B, dim).

        Raises:
            UserError: images of another size, number of channels or dtype than the network was built for; a mask, since
                no part of an image is padding.
        """
        self._check(inputs, mask)
        x = self.embed(inputs).flatten(2).mT
        if self.class_token is not None:
            x, _ = self.class_token(x)
        return self.readout(self.encoder(self.dropout(x + self.positions)))

    def describe_tokens(self, inputs: Tensor, mask: Tensor | None = None) -> list[Tokens]:
        """Describe the patches, behind the class token."""
        height, width = (size // side for size, side in zip(inputs.shape[2:], self.embed.kernel_size, strict=True))
        return describe_patches(inputs, (height, width), leading=int(self.class_token is not None))

    def resize_positions(self, saved: dict[str, Tensor], prefix: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Fit the positions in a state_dict to this grid of patches, in place, by `resize_grid`.

        That of the class token is kept apart; where the state_dict has none, it is that of this network.

        Args:
            saved: a state_dict.
            prefix: of this module in it.
            arguments: those of the backbone that the state_dict is of; without an image size its grid is a square.

        Returns:
            The names of what was changed, each with its old and new size.
        """
        key = f"{prefix}positions"
        positions, leading = saved.get(key), int(self.class_token is not None)
        if positions is None or positions.ndim != 2 or positions.shape[1] != self.out_dim:
            return {}
        grid = _grid(arguments)
        if grid is None or len(positions) - math.prod(grid) not in (0, 1):
            side = math.isqrt(len(positions))
            grid = side, side
        first = len(positions) - math.prod(grid)
        if first not in (0, 1) or (first, grid) == (leading, self.grid):
            return {}
        own = self.positions.detach()[:leading].to(positions.dtype)
        token = positions[:leading] if first else own
        saved[key] = torch.cat((token, resize_grid(positions[first:], grid, self.grid)))
        return {key: " to ".join(f"{height} x {width}" for height, width in (grid, self.grid))}

    def _check(self, inputs: Tensor, mask: Tensor | None) -> None:
        if inputs.ndim != 4 or not inputs.is_floating_point():
            raise UserError(
                f"VisionTransformer takes images (batch, channels, height, width) of a float dtype, got shape "
                f"{tuple(inputs.shape)} of {inputs.dtype}: choose another data module, or another model.backbone"
            )
        if tuple(inputs.shape[1:]) != self.image_shape:
            channels, height, width = inputs.shape[1:]
            built = " x ".join(map(str, self.image_shape))
            raise UserError(
                f"images are {channels} x {height} x {width} (channels x height x width), but the network takes "
                f"{built}: set model.backbone.channels to {channels} and model.backbone.image_size to "
                f"[{height}, {width}], or have the data convert its images"
            )
        if mask is not None:
            raise UserError(
                "VisionTransformer takes no mask, no part of an image being padding: have the data give images of one "
                "size"
            )


def _grid(arguments: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of patches under some arguments, if they have them."""
    image_size, patch_size = arguments.get("image_size"), arguments.get("patch_size")
    if not isinstance(image_size, int | Sequence) or not isinstance(patch_size, int):
        return None
    height, width = _height_and_width(image_size)
    return height // patch_size, width // patch_size


def _height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(image_size, int):
        return image_size, image_size
    if len(image_size) != 2:
        raise ValueError(f"image_size must be a number of pixels or (height, width), got {image_size!r}")
    height, width = image_size
    return height, width
