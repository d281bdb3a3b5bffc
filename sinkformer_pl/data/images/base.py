"""Share between sources of images size, colour, random changes in training, normalising."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torchvision.transforms import v2
from typing_extensions import override

from sinkformer_pl.data.classification import ClassificationData
from sinkformer_pl.data.dataset import LabelledDataset, Split
from sinkformer_pl.data.images.preprocessing import ImagePreprocessing, ImageSize, height_and_width
from sinkformer_pl.data.preprocessing import Preprocessing
from sinkformer_pl.data.sampling import Draw
from sinkformer_pl.data.source import Source
from sinkformer_pl.errors import UserError

STATISTICS_SIZE = 1000

SHAPES = 3 / 4, 4 / 3
"""Least and largest width of a random part of an image, relative to its height, as a share of that of the inputs."""

_AT_ONCE = 1000

Transform = Callable[[Tensor], Tensor]


class Images(NamedTuple):
    """Labelled images, in memory or as files of any sizes.

    Attributes:
        images: (n, 1 or 3, H, W) uint8, or n files, which are decoded when they are asked for.
        targets: (n,) int64 class indices.
        names: n names, for prediction files.
    """

    images: Tensor | Sequence[Path]
    targets: Tensor
    names: Sequence[str]


class ImageDataset(LabelledDataset):
    """One split of images; the inputs are (C, height, width) float32."""

    preprocessing: ImagePreprocessing

    def __init__(
        self,
        images: Images,
        chosen: Tensor,
        preprocessing: ImagePreprocessing,
        augmentation: Callable[[ImagePreprocessing], Sequence[Transform]] | None = None,
    ) -> None:
        """Choose images without copying them.

        Args:
            images: the images, of which `chosen` may be a part.
            chosen: (n,) int64, indices of this split's images.
            preprocessing: of evaluation.
            augmentation: from the preprocessing to what is done in the place of its resizing to an image, (channels,
                H, W) uint8 or float32 in [0, 1]. The randomness of these is torch's global generator, which is seeded
                for each image and left as it was.
        """
        self.chosen: list[int] = chosen.tolist()
        super().__init__(images.targets[chosen], [images.names[index] for index in self.chosen])
        self.images = images.images
        self.augmentation = augmentation
        self.use(preprocessing)

    @override
    def use(self, preprocessing: Preprocessing) -> None:
        assert isinstance(preprocessing, ImagePreprocessing)
        self.preprocessing = preprocessing
        self.transform = None if self.augmentation is None else v2.Compose(self.augmentation(preprocessing))

    @override
    def content(self) -> Iterator[bytes]:
        for start in range(0, len(self.chosen), _AT_ONCE):
            part = self.chosen[start : start + _AT_ONCE]
            if isinstance(self.images, Tensor):
                yield self.images[part].numpy().tobytes()
            else:
                yield " ".join(str(self.images[index].stat().st_size) for index in part).encode()

    def inputs(self, draw: Draw) -> Tensor:
        """Return one image as the model sees it."""
        image = self.images[self.chosen[draw.index]]
        if self.transform is None:
            return self.preprocessing(image)
        image = self.preprocessing.pixels(image)
        with torch.random.fork_rng(devices=()):
            # Not torch.manual_seed, which would seed the accelerator's generator too, on which dropout depends.
            torch.default_generator.manual_seed(draw.seed)
            image = self.transform(image)
        return self.preprocessing.normalized(image)


class ImageData(ClassificationData, ABC):
    """Base of all images: a subclass passes its class names to `__init__` and writes `load`.

    In evaluation an image is resized until it just covers `image_size`, and the centre is cut out. In training there
    is, in this order: a random part instead (`crop_area`), a random shift (`crop_padding`), a random mirror image
    (`flip`); what is not asked for is left out. Last, values in [0, 1] are normalised to mean 0 and standard deviation
    1 in each channel, over training images as evaluation would show them. These constants are those of a checkpoint
    where its model is evaluated or trained on (`restore`).

    Attributes:
        preprocessing: of evaluation, with the mean and standard deviation of the training images, at most 1000 of
            them, chosen by `seed`; after `setup`.
    """

    preprocessing_class = ImagePreprocessing
    preprocessing: ImagePreprocessing | None

    def __init__(
        self,
        classes: Sequence[str],
        *,
        image_size: ImageSize = 224,
        channels: int = 3,
        crop_area: float = 1.0,
        crop_padding: int = 0,
        flip: bool = False,
        train_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the arguments.

        Args:
            classes: class names in the order of their indices.
            image_size: side of the inputs in pixels, or [height, width].
            channels: 1 for grey, 3 for RGB.
            crop_area: smallest share of a training image's area that is cut out at random and resized, in (0, 1];
                1 cuts out the centre as in evaluation.
            crop_padding: largest shift of a training image in each direction, in pixels; black moves in.
            flip: whether every other training image is mirrored, left to right.
            train_size: training images that are kept, the same share of each class and one at least, chosen by `seed`
                after validation has been divided off; None for all.
            **kwargs: what `ClassificationData` takes.

        Raises:
            UserError: an argument out of its range.
        """
        super().__init__(classes, **kwargs)
        for name, value, valid, expected in (
            ("image_size", image_size, _is_size(image_size), "1 or more, or [height, width], each 1 or more"),
            ("channels", channels, channels in (1, 3), "1 (grey) or 3 (RGB)"),
            ("crop_area", crop_area, 0 < crop_area <= 1, "a share in (0, 1]"),
            ("crop_padding", crop_padding, crop_padding >= 0, "0 or more"),
            (
                "train_size",
                train_size,
                train_size is None or train_size >= len(self.classes),
                f"{len(self.classes)} or more, one of each class, or null for all",
            ),
        ):
            if not valid:
                raise UserError(f"data.{name} is {value}: give {expected}")
        self.image_size = image_size if isinstance(image_size, int) else tuple(image_size)
        self.channels = channels
        self.crop_area = crop_area
        self.crop_padding = crop_padding
        self.flip = flip
        self.train_size = train_size

    @property
    def mean(self) -> Tensor:
        """The (channels,) float32 mean of each channel, of values in [0, 1]; after `setup`."""
        assert self.preprocessing is not None
        return torch.tensor(self.preprocessing.mean)

    @property
    def std(self) -> Tensor:
        """The (channels,) float32 standard deviation of each channel, likewise."""
        assert self.preprocessing is not None
        return torch.tensor(self.preprocessing.std)

    @abstractmethod
    def load(self) -> Source[Images]:
        """Read images, or find their files."""

    def make_datasets(self) -> dict[Split, LabelledDataset]:
        """Load and divide the images, and learn the constants of `preprocessing` unless a checkpoint gave them.

        Raises:
            UserError: more training images asked for than there are, or a file that can't be decoded.
        """
        train_images, test_images, val_images = self.load()
        train = _all(train_images)
        if val_images is None:
            train, val = self._divide(train_images.targets)
            val_images = train_images
        else:
            val = _all(val_images)
        train = self._kept(train, train_images.targets)
        if self.preprocessing is None:
            self.preprocessing = self._learnt(train_images, train)
        augmentation = partial(augmented, crop_area=self.crop_area, crop_padding=self.crop_padding, flip=self.flip)
        return {
            "train": ImageDataset(train_images, train, self.preprocessing, augmentation),
            "val": ImageDataset(val_images, val, self.preprocessing),
            "test": ImageDataset(test_images, _all(test_images), self.preprocessing),
        }

    def preprocessing_of(self, saved: Mapping[str, Any]) -> ImagePreprocessing | None:
        """Take mean and standard deviation; without them, which is said, they are learnt anew.

        Raises:
            UserError: they are of another number of channels.
        """
        if not {"mean", "std"} <= saved.keys():
            rank_zero_warn(
                "the checkpoint, of an older version, has no mean and standard deviation of the images that it was "
                f"trained on: those of the training images of {self.origin} are used"
            )
            return None
        if len(saved["mean"]) != self.channels:
            raise UserError(f"data.channels is {self.channels}: the checkpoint's images have {len(saved['mean'])}")
        kept = {name: saved[name] for name in ImagePreprocessing.from_data if name in saved}
        return ImagePreprocessing(self.image_size, self.channels, **kept)

    def _kept(self, train: Tensor, targets: Tensor) -> Tensor:
        if self.train_size is None:
            return train
        if self.train_size > len(train):
            raise UserError(f"data.train_size is {self.train_size}: there are {len(train)}; give at most as many")
        # In proportion to each class, of which multi-label data have several.
        labels = targets[train].numpy() if targets.ndim == 1 else np.zeros(len(train))
        rng = np.random.default_rng(self.seed)
        place = np.empty(len(train))
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            place[rng.permutation(members)] = np.arange(len(members)) / len(members)
        # Of every class the same share lies below any threshold, and its first one lies at 0.
        return train[np.sort(np.argsort(place, kind="stable")[: self.train_size])]

    def _learnt(self, images: Images, train: Tensor) -> ImagePreprocessing:
        unscaled = ImagePreprocessing(self.image_size, self.channels, [0.0] * self.channels, [1.0] * self.channels)
        dataset = ImageDataset(images, train, unscaled)
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(dataset), generator=generator)[:STATISTICS_SIZE].tolist()
        moments = torch.zeros(2, self.channels, dtype=torch.float64)
        for index in chosen:
            image = dataset[index].inputs.double()
            moments += torch.stack([image.mean(dim=(1, 2)), image.square().mean(dim=(1, 2))])
        mean, square = moments / max(len(chosen), 1)
        std = (square - mean**2).clamp_min(0).sqrt()
        # One colour only: there is nothing to scale.
        std = torch.where(std > 1e-6, std, 1.0)
        return replace(unscaled, mean=mean.float().tolist(), std=std.float().tolist())


def augmented(preprocessing: ImagePreprocessing, *, crop_area: float, crop_padding: int, flip: bool) -> list[Transform]:
    """Return what is done to a training image before its values are normalised; arguments as of `ImageData`."""
    height, width = height_and_width(preprocessing.image_size)
    transforms: list[Transform] = [preprocessing.framed]
    if crop_area < 1:
        narrowest, widest = (shape * (width / height) for shape in SHAPES)
        transforms = [
            v2.RandomResizedCrop(
                (height, width),
                scale=(crop_area, 1.0),
                ratio=(narrowest, widest),
                interpolation=v2.InterpolationMode(preprocessing.interpolation),
            )
        ]
    if crop_padding:
        transforms.append(v2.RandomCrop((height, width), padding=crop_padding))
    if flip:
        transforms.append(v2.RandomHorizontalFlip())
    return transforms


def _is_size(size: ImageSize) -> bool:
    return size >= 1 if isinstance(size, int) else len(size) == 2 and min(size) >= 1


def _all(images: Images) -> Tensor:
    return torch.arange(len(images.targets))
