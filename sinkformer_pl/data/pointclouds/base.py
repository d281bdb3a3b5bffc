"""Share between sources of point clouds checks, subsets of points, standardising, augmentation."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from sinkformer_pl.data.classification import ClassificationData
from sinkformer_pl.data.dataset import LabelledDataset, Split
from sinkformer_pl.data.pointclouds.preprocessing import CloudPreprocessing
from sinkformer_pl.data.pointclouds.shape import LARGEST
from sinkformer_pl.data.pointclouds.transforms import Augmentation
from sinkformer_pl.data.sampling import Draw
from sinkformer_pl.data.source import Source
from sinkformer_pl.errors import UserError


class Clouds(NamedTuple):
    """Labelled point clouds of any sizes.

    Attributes:
        points: (total, 3 + F) float32, coordinates and features, one cloud after the other.
        sizes: (n,) int64, number of points of each cloud; they sum to total.
        targets: (n,) int64 class indices.
        names: n names, for prediction files and messages.
        stamps: n texts that change when the points of a cloud do, such as a checksum or the size of its file, by which
            a training that resumes knows its clouds; None where names and sizes tell enough.
    """

    points: Tensor
    sizes: Tensor
    targets: Tensor
    names: Sequence[str]
    stamps: Sequence[str] | None = None

    def subset(self, chosen: Tensor) -> "Clouds":
        """Return some of the clouds, by their indices."""
        ends = self.sizes.cumsum(0)
        rows = [torch.arange(int(ends[index] - self.sizes[index]), int(ends[index])) for index in chosen.tolist()]
        names = [self.names[index] for index in chosen.tolist()]
        stamps = None if self.stamps is None else [self.stamps[index] for index in chosen.tolist()]
        return Clouds(self.points[torch.cat(rows)], self.sizes[chosen], self.targets[chosen], names, stamps)


class PointCloudDataset(LabelledDataset):
    """One split of point clouds; the inputs are (N, 3 + F) float32."""

    preprocessing: CloudPreprocessing

    def __init__(
        self,
        clouds: Clouds,
        chosen: Tensor,
        *,
        preprocessing: CloudPreprocessing,
        augmentation: Augmentation | None,
    ) -> None:
        """Choose clouds without copying them.

        Args:
            clouds: the clouds, of which `chosen` may be a part.
            chosen: (n,) int64, indices of this split's clouds.
            preprocessing: of evaluation, and of training before `augmentation`.
            augmentation: applied last.
        """
        indices: list[int] = chosen.tolist()
        names = [clouds.names[index] for index in indices]
        super().__init__(clouds.targets[chosen], names)
        self.stamps = None if clouds.stamps is None else [clouds.stamps[index] for index in indices]
        self.points = clouds.points
        self.sizes = clouds.sizes[chosen]
        self.starts = (clouds.sizes.cumsum(0) - clouds.sizes)[chosen]
        self.preprocessing = preprocessing
        self.augmentation = augmentation

    @override
    def content(self) -> Iterator[bytes]:
        # Not the points: those that are computed differ in their last bits from one processor to another.
        yield " ".join(map(str, self.sizes.tolist())).encode()
        yield "\n".join(self.stamps or ()).encode()

    def inputs(self, draw: Draw) -> Tensor:
        """Return one cloud as the model sees it."""
        generator = torch.Generator().manual_seed(draw.seed)
        points = self.points.narrow(0, int(self.starts[draw.index]), int(self.sizes[draw.index]))
        points = self.preprocessing.drawn(points, generator)
        if self.augmentation is not None:
            points = self.augmentation(points, generator, normals=self.preprocessing.normals)
        return points


class PointCloudData(ClassificationData, ABC):
    """Base of all point clouds: a subclass passes its class names to `__init__` and writes `load`.

    A cloud goes through: a random subset of `num_points`, standardising, augmentation (training only). Training takes
    another subset and another augmentation each epoch, evaluation a subset that depends on seed and index alone.
    """

    preprocessing_class = CloudPreprocessing
    preprocessing: CloudPreprocessing

    def __init__(
        self,
        classes: Sequence[str],
        *,
        num_points: int | None = None,
        standardize: bool = True,
        augmentation: Augmentation | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the arguments.

        Args:
            classes: class names in the order of their indices.
            num_points: points per cloud, drawn at random from those it has, 2 or more; None for all of them.
            standardize: whether to centre each cloud and divide it by its standard deviation.
            augmentation: random changes, in training only.
            **kwargs: what `ClassificationData` takes.

        Raises:
            UserError: an argument out of its range.
        """
        super().__init__(classes, **kwargs)
        if num_points is not None and num_points < 2:
            raise UserError(f"data.num_points is {num_points}: give 2 or more, or null for all points")
        self.num_points = num_points
        self.standardize = standardize
        self.augmentation = augmentation
        self.preprocessing = CloudPreprocessing(num_points, standardize)

    @abstractmethod
    def load(self) -> Source[Clouds]:
        """Read or make all clouds; validation is divided from the training clouds afterwards."""

    def make_datasets(self) -> dict[Split, LabelledDataset]:
        """Load, check and divide the clouds.

        Raises:
            UserError: a cloud with too few points, with coordinates that are not finite or with all points equal.
        """
        source = self.load()
        for clouds in source:
            if clouds is not None:
                self._check(clouds)
        self._warn_of_copies(source)
        val_clouds = source.train if source.val is None else source.val
        if source.val is None:
            train, val = self._divide(source.train.targets)
        else:
            train, val = _all(source.train), _all(source.val)
        return {
            "train": self._dataset(source.train, train, self.augmentation),
            "val": self._dataset(val_clouds, val, None),
            "test": self._dataset(source.test, _all(source.test), None),
        }

    def _warn_of_copies(self, source: Source[Clouds]) -> None:
        known = dict(zip(_contents(source.train), source.train.names, strict=True))
        for part, clouds in (("test", source.test), ("val", source.val)):
            if clouds is None:
                continue
            pairs = zip(_contents(clouds), clouds.names, strict=True)
            copies = [f"{name} = {known[content]}" for content, name in pairs if content in known]
            if copies:
                rank_zero_warn(
                    f"{self.origin}: {len(copies)} of {len(clouds.names)} {part} clouds are also among the training "
                    f"clouds: {', '.join(copies[:3])}{', ...' if len(copies) > 3 else ''}; remove them from one of both"
                )

    def _dataset(self, clouds: Clouds, chosen: Tensor, augmentation: Augmentation | None) -> PointCloudDataset:
        return PointCloudDataset(
            clouds,
            chosen,
            preprocessing=self.preprocessing,
            augmentation=augmentation,
        )

    def preprocessing_of(self, saved: Mapping[str, Any]) -> CloudPreprocessing:
        """Return that of the arguments: nothing is learnt from data."""
        return self.preprocessing

    def _check(self, clouds: Clouds) -> None:
        if not len(clouds.sizes):
            return
        sizes = clouds.sizes.numpy()
        fewest = int(sizes.argmin())
        least = 1 if self.num_points is None else self.num_points
        if sizes[fewest] < least:
            remedy = (
                f"remove it or set data.num_points to {sizes[fewest]} or less" if sizes[fewest] > 1 else "remove it"
            )
            raise UserError(f"{self.origin}: cloud {clouds.names[fewest]} has {sizes[fewest]} points; {remedy}")
        points = clouds.points.numpy()
        starts = np.cumsum(sizes) - sizes
        low, high = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
        for bad, cause in (
            (~np.isfinite(low + high).all(axis=1), "has coordinates that are not finite numbers"),
            (
                (np.maximum(-low, high) > LARGEST).any(axis=1),
                f"has coordinates beyond {LARGEST:g}, too large for single precision",
            ),
            ((low == high)[:, :3].all(axis=1), "has all its points in one place"),
        ):
            if bad.any():
                name = clouds.names[int(bad.argmax())]
                raise UserError(f"{self.origin}: cloud {name} {cause}; repair or remove it")


def _all(clouds: Clouds) -> Tensor:
    return torch.arange(len(clouds.targets))


def _contents(clouds: Clouds) -> list[bytes]:
    """Return a digest of each cloud, in the order of its points."""
    parts = clouds.points.split(clouds.sizes.tolist())
    return [hashlib.blake2b(part.contiguous().numpy().tobytes(), digest_size=16).digest() for part in parts]
