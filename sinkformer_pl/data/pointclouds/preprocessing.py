"""Point clouds as a network sees them: read from any file, a subset of the points, standardised."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinkformer_pl.data.pointclouds.formats import cloud_from_array, read_cloud
from sinkformer_pl.data.pointclouds.shape import NORMALS, expanded
from sinkformer_pl.data.pointclouds.transforms import standardize
from sinkformer_pl.data.preprocessing import Preprocessing
from sinkformer_pl.errors import UserError


@dataclass(frozen=True)
class CloudPreprocessing(Preprocessing):
    """Draw a subset of a cloud's points and standardise it.

    Attributes:
        num_points: size of the random subset; None for all points.
        standardize: whether to centre the subset and divide it by its standard deviation.
        features: what a point has beside its coordinates, by the names of columns or of groups such as normals.
        columns: names for the columns of clouds that don't name them; None for x, y, z, "4", "5" and so on.
        pool_size: points that are drawn from a mesh.
    """

    kind = "point clouds"

    num_points: int | None
    standardize: bool
    features: Sequence[str] = ()
    columns: Sequence[str] | None = None
    pool_size: int = 2048

    def __call__(self, raw: Any, seed: int = 0) -> Tensor:
        """Return (M, 3 + F) float32, M <= num_points.

        Args:
            raw: a file, a mesh or cloud of any format that is read; or an array or tensor (N, 3 or more).
            seed: of the subset.

        Raises:
            UserError: a file or array that is none, lacks features, has one point or all points in one place, or fewer
                than num_points.
        """
        name = str(raw) if isinstance(raw, Path) else "a cloud in memory"
        points = self.read(raw)
        if (points[:, :3] == points[:1, :3]).all():
            what = "a single point" if len(points) == 1 else "all points in one place"
            raise UserError(f"{name}: {what}; give a cloud with a shape")
        if self.num_points is not None and len(points) < self.num_points:
            raise UserError(f"{name}: {len(points)} points; the model takes {self.num_points}: give a denser cloud")
        return self.drawn(points, torch.Generator().manual_seed(seed))

    def read(self, raw: Any) -> Tensor:
        """Return all points, (N, 3 + F) float32, of a mesh `pool_size` of its surface.

        Raises:
            UserError: a file or array that is none, or lacks features.
        """
        if isinstance(raw, Path):
            return read_cloud(
                raw,
                pool_size=max(self.pool_size, self.num_points or 0),
                features=self.features,
                columns=self.columns,
                centred=self.standardize,
            )
        array = np.asarray(raw.detach().cpu() if isinstance(raw, Tensor) else raw)
        # What has single precision gains nothing, and stays as data in memory are.
        centred = self.standardize and array.dtype.itemsize > 4
        return cloud_from_array(array, features=self.features, columns=self.columns, centred=centred)

    def drawn(self, points: Tensor, generator: torch.Generator) -> Tensor:
        """Return the subset of points (N, 3 + F) that a generator draws, standardised."""
        if self.num_points is not None:
            points = points[torch.randperm(len(points), generator=generator)[: self.num_points]]
        return standardize(points) if self.standardize else points

    @property
    def normals(self) -> int | None:
        """The first of the three columns of normals, None without normals."""
        names = expanded(self.features)
        place = names.index(NORMALS[0]) if NORMALS[0] in names else len(names)
        return 3 + place if tuple(names[place : place + 3]) == NORMALS else None
