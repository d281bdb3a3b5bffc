"""Geometry of point clouds: centres that cover a cloud, and the points around each."""

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor

from sinkformer_pl.ops.precision import at_least_float32, no_autocast


def farthest_points(points: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Sample farthest points: each centre is the point farthest from the centres before it.

    The first is the point farthest from the mean of the cloud, so that the centres don't depend on the order of the
    points; of points at equal distances the earliest is taken. No point is taken twice before every point has been,
    also of points in one place. No gradient.

    Args:
        points: (B, N, D) coordinates of any float dtype, N at least 1; finite at padding too.
        mask: (B, N) bool of real points; None when every point is real.
        count: number of centres, 1 or more.

    Returns:
        Indices (B, min(count, N)) int64 of real points. A cloud of fewer real points than that has all of them first
        and one of them again and again afterwards; a cloud without points has zeros.

    References:
        Eldar et al. 1997 (eldar1997farthest).
    """
    return _farthest_points(points.detach(), mask, min(count, points.shape[1]))


# One operator, so that a compiled graph holds neither the loop nor its thousands of steps.
@torch.library.custom_op("sinkformer_pl::farthest_points", mutates_args=())
def _farthest_points(points: Tensor, mask: Tensor | None, count: int) -> Tensor:
    with no_autocast(points), torch.no_grad():
        # Coordinates apart, each (B, N) in one piece: an axis of three is slow to sum over.
        x = at_least_float32(points).mT.contiguous()
        if mask is None:
            mean = x.mean(-1, keepdim=True)
            nearest = x.new_full((x.shape[0], x.shape[2]), torch.inf)
        else:
            real = mask[:, None]
            mean = x.where(real, 0.0).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
            nearest = x.new_zeros(mask.shape).masked_fill_(mask, torch.inf).masked_fill_(~mask, -torch.inf)
        chosen = points.new_empty((points.shape[0], count), dtype=torch.int64)
        distance = torch.where(nearest > 0, (x - mean).square_().sum(1), nearest)
        for step in range(count):
            index = distance.argmax(-1, keepdim=True)
            chosen[:, step] = index[:, 0]
            centre = x.gather(-1, index[:, None].expand(-1, x.shape[1], -1))
            distance = torch.minimum(nearest, (x - centre).square_().sum(1))
            # Below every distance and above padding: a point comes again only when no other is left.
            nearest = distance.scatter_(-1, index, distance.gather(-1, index).clamp_(max=-1.0))
    return chosen


@_farthest_points.register_fake
def _(points: Tensor, mask: Tensor | None, count: int) -> Tensor:
    return points.new_empty((points.shape[0], count), dtype=torch.int64)


def plain_farthest_points(points: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Compute the operator in plain operations that change nothing in place, for exported programs."""
    x = at_least_float32(points).mT
    real = torch.ones_like(x[:, :1], dtype=torch.bool) if mask is None else mask[:, None]
    mean = x.where(real, 0.0).sum(-1, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)
    nearest = torch.full_like(x[:, 0], torch.inf).where(real[:, 0], -torch.inf)
    distance = torch.where(nearest > 0, (x - mean).square().sum(1), nearest)
    chosen = []
    for _ in range(count):
        index = distance.argmax(-1, keepdim=True)
        chosen.append(index)
        centre = x.gather(-1, index[:, None].expand(-1, x.shape[1], -1))
        distance = torch.minimum(nearest, (x - centre).square().sum(1))
        nearest = distance.scatter(-1, index, distance.gather(-1, index).clamp(max=-1.0))
    return torch.cat(chosen, -1)


def plain_distances(x: Tensor, y: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """Compute the operator of `torch.cdist`, which ONNX lacks: Euclidean distances (B, Q, N) of x and y, (B, ., D)."""
    return (x[:, :, None] - y[:, None]).square().sum(-1).sqrt()


def nearest_neighbours(queries: Tensor, points: Tensor, mask: Tensor | None, k: int) -> Tensor:
    """Find the k points nearest to each query, by Euclidean distance, from near to far. No gradient.

    Args:
        queries: (B, Q, D) coordinates of any float dtype.
        points: (B, N, D) coordinates of the same dtype, N at least 1; finite at padding too.
        mask: (B, N) bool of real points; None when every point is real.
        k: number of neighbours, 1 or more. A query that is one of the points is its own first neighbour.

    Returns:
        Indices (B, Q, k) int64 of real points. In a cloud of n < k real points these come round again in the same
        order: the nearest, ..., the n-th nearest, the nearest, ... In a cloud without points all are one and the same.
    """
    with no_autocast(points), torch.no_grad():
        # Products of matrices would lose the digits of small distances.
        distances = torch.cdist(
            at_least_float32(queries), at_least_float32(points), compute_mode="donot_use_mm_for_euclid_dist"
        )
        if mask is not None:
            distances = distances.masked_fill(~mask[:, None], torch.inf)
        nearest = distances.topk(min(k, points.shape[1]), largest=False, sorted=True).indices
        if mask is None and nearest.shape[-1] == k:
            return nearest
        order = torch.arange(k, device=points.device).expand(points.shape[0], 1, k)
        members = nearest.shape[-1] if mask is None else mask.sum(-1).clamp(1, nearest.shape[-1])[:, None, None]
        return nearest.gather(-1, (order % members).expand(-1, nearest.shape[1], -1))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Take rows of each sample: x (B, N, C) at index (B, ...) int64 gives (B, ..., C)."""
    first = torch.arange(x.shape[0], device=x.device) * x.shape[1]
    return F.embedding(index + first.reshape(-1, *[1] * (index.ndim - 1)), x.flatten(0, 1))
