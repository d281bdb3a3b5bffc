"""What happens to a point cloud between its file and the model: standardising and augmentation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkformer_pl.errors import UserError


def standardize(points: Tensor) -> Tensor:
    """Centre a cloud at its mean and divide it by one number, so that its proportions stay.

    Args:
        points: (N, C) float, coordinates and then features.

    Returns:
        (N, C): mean 0 in each coordinate and standard deviation 1 over all of them; all zeros when the points are
        all equal. Features are as they were.
    """
    coordinates, features = points[:, :3], points[:, 3:]
    centred = coordinates - coordinates.mean(dim=0)
    deviation = centred.square().mean().sqrt()
    centred = centred / deviation.clamp_min(torch.finfo(points.dtype).tiny)
    return torch.cat([centred, features], dim=1) if features.shape[1] else centred


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes that leave a cloud's class as it is; each is off by default.

    Attributes:
        rotation: about the z axis, by an angle drawn uniformly from [-rotation, rotation], in radians.
        scale: range from which a factor for each axis is drawn uniformly.
        jitter: standard deviation of Gaussian noise on each coordinate, in the cloud's units (after standardising:
            in standard deviations of the cloud).
        dropout: largest share of points left out, in [0, 1); the share is drawn uniformly from [0, dropout], so that
            clouds come to differ in size.
    """

    rotation: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    jitter: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values without a meaning."""
        low, high = self.scale
        for name, value, valid, expected in (
            ("rotation", self.rotation, 0 <= self.rotation < math.inf, "radians, 0 or more"),
            ("scale", self.scale, 0 < low <= high < math.inf, "a range such as [0.8, 1.25]"),
            ("jitter", self.jitter, 0 <= self.jitter < math.inf, "a standard deviation, 0 or more"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "a share in [0, 1)"),
        ):
            if not valid:
                raise UserError(f"augmentation.{name} is {value}: give {expected}")

    def __call__(self, points: Tensor, generator: torch.Generator, *, normals: int | None = None) -> Tensor:
        """Return a changed copy.

        Args:
            points: (N, C) float, N >= 1, coordinates and then features, which stay as they are.
            generator: the source of all randomness; equal states give equal results.
            normals: first of the three columns of normals, which turn with the surface; None for no normals.

        Returns:
            (M, C), 1 <= M <= N.
        """
        angle, share, *factors = torch.rand(5, generator=generator).tolist()
        kept = len(points) - int(self.dropout * share * len(points))
        if kept < len(points):
            points = points[torch.randperm(len(points), generator=generator)[:kept]]
        low, high = self.scale
        scale = torch.tensor([low + (high - low) * factor for factor in factors], dtype=points.dtype)
        angle = self.rotation * (2 * angle - 1)
        cos, sin = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]], dtype=points.dtype)
        moved = (points[:, :3] * scale) @ turn
        moved = moved + self.jitter * torch.randn(moved.shape, generator=generator, dtype=points.dtype)
        if points.shape[1] == 3:
            return moved
        features = points[:, 3:].clone()
        if normals is not None:
            # A surface that is stretched along an axis has its normals shrunk along it.
            own = features[:, normals - 3 : normals]
            features[:, normals - 3 : normals] = torch.nn.functional.normalize((own / scale) @ turn)
        return torch.cat([moved, features], dim=1)
