"""The embedded data: shapes made on the fly, without files or network."""

import math
from typing import Any

import numpy as np
import torch

from sinkformer_pl.data.pointclouds.base import Clouds, PointCloudData
from sinkformer_pl.data.pointclouds.shapes import FAMILIES, sample_shape
from sinkformer_pl.data.source import Source
from sinkformer_pl.errors import UserError

LARGEST_NOISE = 1000
"""In half-sizes; of a shape nothing is left long before."""


class ProceduralShapes(PointCloudData):
    """Noisy, turned and partly hidden surfaces of the families in `shapes.py`, each class equally often.

    A shape depends on (seed, part, index) alone, `part` being test or not: no two splits share one.
    """

    def __init__(
        self,
        *,
        train_size: int = 2400,
        val_size: int = 400,
        test_size: int = 400,
        min_points: int = 48,
        max_points: int = 112,
        tilt: float = math.pi / 12,
        noise: float = 0.02,
        occlusion: float = 0.2,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; the shapes are made in `setup`.

        Args:
            train_size: number of training shapes.
            val_size: number of validation shapes; takes the place of `val_fraction`.
            test_size: number of test shapes.
            min_points: fewest points of a cloud.
            max_points: most points of a cloud; the number is drawn uniformly.
            tilt: largest angle between a shape's axis and z, in radians.
            noise: standard deviation of each coordinate's error, in half-sizes of a shape.
            occlusion: largest share of a surface that is cut away, in [0, 1).
            **kwargs: what `PointCloudData` takes.

        Raises:
            UserError: an argument out of its range.
        """
        for name, value, valid, expected in (
            ("train_size", train_size, train_size >= 1, "1 or more"),
            ("val_size", val_size, val_size >= 1, "1 or more"),
            ("test_size", test_size, test_size >= 1, "1 or more"),
            ("min_points", min_points, min_points >= 2, "2 or more"),
            ("max_points", max_points, max_points >= min_points, "min_points or more"),
            ("tilt", tilt, 0 <= tilt <= math.pi, "radians from 0 to pi"),
            ("noise", noise, 0 <= noise <= LARGEST_NOISE, f"a standard deviation from 0 to {LARGEST_NOISE}"),
            ("occlusion", occlusion, 0 <= occlusion < 1, "a share in [0, 1)"),
        ):
            if not valid:
                raise UserError(f"data.{name} is {value}: give {expected}")
        super().__init__(list(FAMILIES), val_fraction=val_size / (train_size + val_size), **kwargs)
        if self.num_points is not None and self.num_points > min_points:
            raise UserError(f"data.num_points is {self.num_points}: give at most data.min_points, {min_points}")
        self.train_size = train_size
        self.val_size = val_size
        self.test_size = test_size
        self.min_points = min_points
        self.max_points = max_points
        self.tilt = tilt
        self.noise = noise
        self.occlusion = occlusion

    def load(self) -> Source[Clouds]:
        """Make all shapes: about a second for some thousands."""
        return Source(train=self._part(0, self.train_size + self.val_size), test=self._part(1, self.test_size))

    def _part(self, part: int, size: int) -> Clouds:
        targets = [index % len(self.found_classes) for index in range(size)]
        clouds = []
        for index, target in enumerate(targets):
            rng = np.random.default_rng((self.seed, part, index))
            count = int(rng.integers(self.min_points, self.max_points, endpoint=True))
            clouds.append(
                sample_shape(
                    self.found_classes[target],
                    rng,
                    count=count,
                    tilt=self.tilt,
                    noise=self.noise,
                    occlusion=self.occlusion,
                )
            )
        return Clouds(
            points=torch.from_numpy(np.concatenate(clouds)),
            sizes=torch.tensor([len(cloud) for cloud in clouds]),
            targets=torch.tensor(targets),
            names=[f"{('train', 'test')[part]}/{self.found_classes[target]}/{i}" for i, target in enumerate(targets)],
            stamps=[f"{self.tilt} {self.noise} {self.occlusion}"] * size,
        )
