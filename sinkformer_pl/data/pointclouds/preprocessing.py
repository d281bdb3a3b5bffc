"""Point clouds as a network sees them: a subset of the points, standardised."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sinkformer_pl.data.pointclouds.transforms import standardize
from sinkformer_pl.data.preprocessing import Preprocessing


@dataclass(frozen=True)
class CloudPreprocessing(Preprocessing):
    """Draw a subset of a cloud's points and standardise it.

    Attributes:
        num_points: size of the random subset; None for all points.
        standardize: whether to centre the subset and divide it by its standard deviation.
    """

    kind = "point clouds"

    num_points: int | None
    standardize: bool

    def __call__(self, raw: Tensor, seed: int = 0) -> Tensor:
        """Return (M, 3) float32 of points (N, 3) float32, M <= num_points."""
        return self.drawn(raw, torch.Generator().manual_seed(seed))

    def drawn(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """Return the same, the subset drawn by a generator."""
        if self.num_points is not None:
            points = points[torch.randperm(len(points), generator=generator)[: self.num_points]]
        return standardize(points) if self.standardize else points
