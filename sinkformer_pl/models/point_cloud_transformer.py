"""Point Cloud Transformer: neighbourhoods of a point cloud as tokens, and offset attention among them."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor, nn

from sinkformer_pl.errors import UserError
from sinkformer_pl.models.attention_core import AttentionCore, Temperature, rename_old_keys
from sinkformer_pl.models.backbone import Backbone, require_points
from sinkformer_pl.models.batch_norm import MaskedBatchNorm
from sinkformer_pl.models.blocks import BlockOptions, require_at_least
from sinkformer_pl.models.multi_head_attention import join_heads, split_heads
from sinkformer_pl.models.neighbours import farthest_points, nearest_neighbours, take
from sinkformer_pl.models.pooling import ClassToken, Pooling, Readout
from sinkformer_pl.models.tokens import Tokens, describe_tokens
from sinkformer_pl.normalizations.contract import NormalizationFactory
from sinkformer_pl.ops.mask import AttentionMask, Mask

PointPooling = Literal["max", "mean", "cls", "seed", "max+mean", "max+cls", "max+seed", "max+mean+cls", "max+mean+seed"]


class LBR(nn.Module):
    """Linear, batch norm, ReLU (leaky where a slope is given), row by row: (..., in_dim) to (..., out_dim).

    No bias before a batch norm, which would take it away again.
    """

    def __init__(self, in_dim: int, out_dim: int, *, slope: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, out_dim, bias=False)
        self.norm = MaskedBatchNorm(out_dim)
        self.slope = slope

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (..., in_dim), with the bool mask (...) of its real rows."""
        return F.leaky_relu(self.norm(self.linear(x), mask), self.slope)


class NeighbourEmbedding(nn.Module):
    """Sample and group: fewer tokens, each of which stands for the neighbourhood of a centre.

    The centres are farthest points. Each neighbour of a centre gives the difference of its features to the centre's,
    and the centre's features, to two LBR; the maximum over the neighbours is the new token.

    Args:
        in_dim: width of the features.
        out_dim: width of the new tokens.
        centres: number of new tokens.
        neighbours: number of neighbours of each, the centre itself among them. In a cloud of fewer points they come
            round again, and count again in the statistics of the batch norms.
    """

    def __init__(self, in_dim: int, out_dim: int, *, centres: int, neighbours: int) -> None:
        super().__init__()
        self.centres = centres
        self.neighbours = neighbours
        self.pairs = LBR(2 * in_dim, out_dim)
        self.layer = LBR(out_dim, out_dim)

    def forward(self, points: Tensor, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the centres and their tokens.

        Args:
            points: (B, N, 3) coordinates, finite at padding too.
            x: (B, N, in_dim) features, finite at padding too.
            mask: (B, N) bool of real points; None when every point is real.

        Returns:
            Coordinates (B, S, 3), tokens (B, S, out_dim) and the mask (B, S) of the real ones, None where `mask` is,
            with S = min(centres, N). A cloud of fewer points has each of them as a centre.
        """
        chosen = farthest_points(points, mask, self.centres)
        centres = take(points, chosen)
        near = nearest_neighbours(centres, points, mask, self.neighbours)
        if mask is not None:
            mask = torch.arange(chosen.shape[1], device=x.device) < mask.sum(1, keepdim=True)
        grouped_mask = None if mask is None else mask[..., None]
        # W (neighbour - centre, centre) by linearity: a product for each point rather than for each pair.
        difference, own = self.pairs.linear.weight.chunk(2, dim=1)
        grouped = take(F.linear(x, difference), near) + F.linear(take(x, chosen), own - difference)[:, :, None]
        grouped = F.relu(self.pairs.norm(grouped, grouped_mask))
        # Not amax, whose gradient takes four times as long on the CPU.
        return centres, self.layer(grouped, grouped_mask).max(2).values, mask


class SharedAttention(nn.Module):
    """The attention of PCT: keys are the queries, a quarter as wide as the values; no projection back.

    Args:
        dim: width of inputs, values and outputs.
        num_heads: number of heads; four times as many divide `dim`.
        normalization: makes this layer's own normalization.
        temperature: divides the scores, which are q·q / sqrt(dim / num_heads / 4).

    Raises:
        ValueError: heads that don't divide the width; a temperature that isn't positive.
    """

    def __init__(
        self, dim: int, num_heads: int, normalization: NormalizationFactory, *, temperature: Temperature = 1.0
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, num_heads=num_heads)
        if dim % (4 * num_heads):
            raise ValueError(f"4 * num_heads = {4 * num_heads} must divide the width dim={dim}")
        # Drawn before the core, so that their initial weights are the same under any normalization.
        query, value = nn.Linear(dim, dim // 4, bias=False), nn.Linear(dim, dim)
        # The order of these is the order of parameters in checkpoints.
        self.core = AttentionCore(num_heads, dim // 4 // num_heads, normalization, temperature=temperature)
        self.query, self.value = query, value
        self.register_load_state_dict_pre_hook(rename_old_keys)

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        """Attend from tokens x (B, N, dim) to the same tokens; returns (B, N, dim)."""
        q = split_heads(self.query(x), self.core.num_heads)
        return join_heads(self.core(q, q, split_heads(self.value(x), self.core.num_heads), mask))


class OffsetAttention(nn.Module):
    """x + LBR(x - attention(x)): what a token learns is how it differs from those that it attends to.

    Arguments as of `SharedAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int, normalization: NormalizationFactory, *, temperature: Temperature = 1.0
    ) -> None:
        super().__init__()
        self.attention = SharedAttention(dim, num_heads, normalization, temperature=temperature)
        self.layer = LBR(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, dim), with the (B, N) bool mask of the real ones, to tokens of the same shape."""
        both = None if mask is None else AttentionMask(mask, mask)
        return x + self.layer(x - self.attention(x, both), mask)


class PointCloudTransformer(Backbone):
    """Point Cloud Transformer, PCT (Guo et al. 2021, guo2021pct), under any normalization.

    Points are embedded, gathered into fewer and wider tokens (neighbour embedding), and pass the offset attentions.
    The embedding and the outputs of all attentions go together to one wide layer, whose maximum over the tokens goes
    through the hidden layers of the published classifier: `out_dim` is the width of the last of them.

    The defaults are the published network, for 1024 points. With `dim=128, centres=()` it is the one without neighbour
    embedding (SPCT, simple PCT), in which the outputs of the attentions alone go to the wide layer.

    Differences. The published network normalizes unscaled scores over the queries by a softmax and then divides by the
    sums over the keys, which is Sinkhorn of two half-steps, columns first; here the given normalization is in its
    place, of scores divided by the square root of their width. So `Softmax` isn't the published arm. `temperature`
    1 / sqrt(dim / num_heads / 4) leaves the scores unscaled. The first centre is the point farthest from the mean
    instead of the first of the list, so that the order of the points changes nothing, save where distances are equal.
    Biases before batch norms are left out.

    Clouds of unequal size come padded with a mask, and give in evaluation what each gives alone.

    Args:
        normalization: makes the normalization of each attention layer.
        in_features: C, numbers per point, of which the first three are its coordinates.
        dim: width of the attention; the points are embedded at dim / 2 for each stage of `centres`, so 64, 128, 256.
        num_heads: heads of each attention layer; four times as many divide `dim`.
        depth: number of attention layers.
        centres: number of tokens after each stage of neighbour embedding, not growing; empty for one token a point.
        neighbours: points that each of them is made from.
        fused_dim: width of the layer before the pooling.
        head_dims: widths of the hidden layers after the pooling; with none the pooled vector is the result.
        dropout: share dropped after each of these.
        temperature: divides the scores of each attention layer: a positive number, or "learned", one for each head.
        pooling: over the tokens: "max", as in the published code and its number of parameters (2.88 million); "mean";
            "cls", the final state of a learned token that joins them after the neighbour embedding; "seed", a learned
            query that attends to them under Softmax, behind the wide layer. Or several, such as
            "max+mean", in one vector.

    Raises:
        ValueError: a size out of range; heads or stages that don't divide the width; a temperature that isn't positive;
            an unknown pooling.
    """

    def __init__(
        self,
        normalization: NormalizationFactory,
        in_features: int = 3,
        dim: int = 256,
        num_heads: int = 1,
        depth: int = 4,
        centres: Sequence[int] = (512, 256),
        neighbours: int = 32,
        fused_dim: int = 1024,
        head_dims: Sequence[int] = (512, 256),
        dropout: float = 0.5,
        temperature: Temperature = 1.0,
        pooling: PointPooling = "max",
    ) -> None:
        super().__init__()
        require_at_least(1, dim=dim, depth=depth, neighbours=neighbours, fused_dim=fused_dim)
        require_at_least(1, centres=min(centres, default=1), head_dims=min(head_dims, default=1))
        require_at_least(3, in_features=in_features)
        if list(centres) != sorted(centres, reverse=True):
            raise ValueError(f"centres must not grow from stage to stage, got {list(centres)}")
        if dim % 2 ** len(centres):
            raise ValueError(f"{2 ** len(centres)}, 2 for each stage of centres, must divide the width dim={dim}")
        if pooling not in get_args(PointPooling):
            raise ValueError(f"pooling must be one of {', '.join(get_args(PointPooling))}, got {pooling!r}")
        self.in_features = in_features
        if centres:
            # With fewer points a stage makes fewer centres, of fewer neighbours: another program.
            self.token_limits = max(centres[0], neighbours), None
        self.pooling: PointPooling = pooling
        widths = [dim // 2 ** (len(centres) - stage) for stage in range(len(centres) + 1)]
        self.embed = nn.ModuleList([LBR(in_features, widths[0]), LBR(widths[0], widths[0])])
        self.stages = nn.ModuleList(
            NeighbourEmbedding(width, 2 * width, centres=number, neighbours=neighbours)
            for width, number in zip(widths[:-1], centres, strict=True)
        )
        self.project = nn.ModuleList(LBR(dim, dim) for _ in range(2 if centres else 0))
        self.blocks = nn.ModuleList(
            OffsetAttention(dim, num_heads, normalization, temperature=temperature) for _ in range(depth)
        )
        self.fuse = LBR((depth + bool(centres)) * dim, fused_dim, slope=0.2)
        kinds: list[Pooling] = pooling.split("+")  # type: ignore[assignment]
        pooled = fused_dim * len(kinds)
        self.head = nn.ModuleList(LBR(*sizes) for sizes in zip([pooled, *head_dims], head_dims, strict=False))
        self.dropout = nn.Dropout(dropout)
        self.out_dim = head_dims[-1] if head_dims else pooled
        self.class_token = ClassToken(dim) if "cls" in kinds else None
        seed = BlockOptions(mlp_dim=0, head_dim=None, dropout=0.0, layer_norm="pre", temperature=1.0)
        # A rectifier stands between each attention and a mean, which so sees what attention does.
        self.readouts = nn.ModuleList(Readout(kind, fused_dim, num_heads, follows=None, **seed) for kind in kinds)

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map clouds (B, N, in_features), with the (B, N) bool mask of real points, to features (B, out_dim).

        What stands at padding changes nothing and gets no gradient. A cloud without points gives finite features.

        Raises:
            UserError: inputs of another shape or dtype.
        """
        self._check(inputs)
        _, x, mask = self._tokens(inputs, mask)
        if self.class_token is not None:
            x, mask = self.class_token(x, mask)
        outputs = [x] if len(self.stages) else []
        for layer in self.project:
            x = layer(x, mask)
        for block in self.blocks:
            x = block(x, mask)
            outputs.append(x)
        x = self.fuse(torch.cat(outputs, -1), mask)
        leading = int(self.class_token is not None)
        others = x[:, leading:], None if mask is None else mask[:, leading:]
        x = torch.cat([readout(x) if readout.pooling == "cls" else readout(*others) for readout in self.readouts], -1)
        for layer in self.head:
            x = self.dropout(layer(x))
        return x

    def describe_tokens(self, inputs: Tensor, mask: Tensor | None = None) -> list[Tokens]:
        """Describe the centres that the points are gathered into, or the points, behind the class token."""
        points, _, mask = self._tokens(inputs, mask)
        return describe_tokens(points, mask, leading=int(self.class_token is not None))

    def _tokens(self, inputs: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embed points and gather them: coordinates, tokens and mask."""
        if mask is not None:
            inputs = inputs.where(mask[..., None], 0.0)
        points, x = inputs[..., :3], inputs
        for layer in self.embed:
            x = layer(x, mask)
        for stage in self.stages:
            points, x, mask = stage(points, x, mask)
        return points, x, mask

    def _check(self, inputs: Tensor) -> None:
        if inputs.ndim == 3 and inputs.shape[-1] < 3:
            raise UserError(
                f"PointCloudTransformer takes points of three coordinates and more, got {inputs.shape[-1]} numbers: "
                "choose another data module, or another model.backbone"
            )
        require_points(inputs, self.in_features, "PointCloudTransformer")
        if inputs.shape[1] < 1:
            raise UserError("PointCloudTransformer takes clouds of one point or more, got a batch without any")
