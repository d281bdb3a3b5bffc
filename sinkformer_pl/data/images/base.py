"""What every source of images shares: size, colour, random changes in training, normalising."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from sinkformer_pl.data.classification import ClassificationData, LabelledDataset, Split
from sinkformer_pl.data.images.decoding import decode_image
from sinkformer_pl.data.sampling import Draw
from sinkformer_pl.errors import UserError

STATISTICS_SIZE = 1000


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


class ImageSource(NamedTuple):
    """Everything that a source has.

    Attributes:
        train: images to train on.
        test: images to test on.
        val: images to validate on; None to divide them from the training images.
    """

    train: Images
    test: Images
    val: Images | None = None


class ImageDataset(LabelledDataset):
    """One split of images; the inputs are (C, size, size) float32."""

    def __init__(
        self, images: Images, chosen: Tensor, transforms: Sequence[v2.Transform], *, mean: Tensor, std: Tensor
    ) -> None:
        """Choose images without copying them.

        Args:
            images: the images, of which `chosen` may be a part.
            chosen: (n,) int64, indices of this split's images.
            transforms: what is done to an image, (channels, H, W) uint8 or float32 in [0, 1]. Their randomness is
                torch's global generator, which is seeded for each image and left as it was.
            mean: (channels,) float32, of values in [0, 1]; taken off last.
            std: (channels,) float32, divided by after that.
        """
        self.chosen: list[int] = chosen.tolist()
        super().__init__(images.targets[chosen], [images.names[index] for index in self.chosen])
        self.images = images.images
        self.transform = v2.Compose(transforms) if transforms else None
        self.mean, self.std = mean[:, None, None], std[:, None, None]

    def inputs(self, draw: Draw) -> Tensor:
        """Return one image as the model sees it."""
        image = self.images[self.chosen[draw.index]]
        if isinstance(image, Path):
            image = decode_image(image, len(self.mean))
        if self.transform is not None:
            with torch.random.fork_rng(devices=()):
                # Not torch.manual_seed, which would seed the accelerator's generator too, on which dropout depends.
                torch.default_generator.manual_seed(draw.seed)
                image = self.transform(image)
        # By hand: torchvision's classes for these two take longer than a small image's whole way otherwise.
        return v2.functional.to_dtype(image, torch.float32, scale=True).sub(self.mean).div_(self.std)


class ImageData(ClassificationData, ABC):
    """Base of all images: a subclass passes its class names to `__init__` and writes `load`.

    In evaluation the shorter side is resized to `image_size` and the centre is cut out. In training there is, in this
    order: a random part instead (`crop_area`), a random shift (`crop_padding`), a random mirror image (`flip`); what
    is not asked for is left out. Last, values in [0, 1] are normalised to mean 0 and standard deviation 1 in each
    channel, over training images as evaluation would show them.

    Attributes:
        mean: (channels,) float32, of the training images, at most 1000 of them, chosen by `seed`; after `setup`.
        std: (channels,) float32, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        classes: Sequence[str],
        *,
        image_size: int = 224,
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
            image_size: height and width of the inputs, in pixels.
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
            ("image_size", image_size, image_size >= 1, "1 or more"),
            ("channels", channels, channels in (1, 3), "1 (grey) or 3 (RGB)"),
            ("crop_area", crop_area, 0 < crop_area <= 1, "a share in (0, 1]"),
            ("crop_padding", crop_padding, crop_padding >= 0, "0 or more"),
            (
                "train_size",
                train_size,
                train_size is None or train_size >= self.num_classes,
                f"{self.num_classes} or more, one of each class, or null for all",
            ),
        ):
            if not valid:
                raise UserError(f"data.{name} is {value}: give {expected}")
        self.image_size = image_size
        self.channels = channels
        self.crop_area = crop_area
        self.crop_padding = crop_padding
        self.flip = flip
        self.train_size = train_size

    @abstractmethod
    def load(self) -> ImageSource:
        """Read images, or find their files."""

    def make_datasets(self) -> dict[Split, LabelledDataset]:
        """Load and divide the images, and learn `mean` and `std`.

        Raises:
            UserError: more training images asked for than there are, or a file that can't be decoded.
        """
        train_images, test_images, val_images = (part and self._recoloured(part) for part in self.load())
        assert train_images is not None
        assert test_images is not None
        train = _all(train_images)
        if val_images is None:
            train, val = self._divide(train_images.targets)
            val_images = train_images
        else:
            val = _all(val_images)
        train = self._kept(train, train_images.targets)
        none, one = torch.zeros(self.channels), torch.ones(self.channels)
        shown = ImageDataset(train_images, train, self._framing(train_images), mean=none, std=one)
        self.mean, self.std = self._statistics(shown)
        splits: tuple[tuple[Split, Images, Tensor, list[v2.Transform]], ...] = (
            ("train", train_images, train, self._augmentation(train_images)),
            ("val", val_images, val, self._framing(val_images)),
            ("test", test_images, _all(test_images), self._framing(test_images)),
        )
        return {
            split: ImageDataset(images, chosen, transforms, mean=self.mean, std=self.std)
            for split, images, chosen, transforms in splits
        }

    def _recoloured(self, part: Images) -> Images:
        images = part.images
        if not isinstance(images, Tensor) or images.shape[1] == self.channels:
            return part
        grey = self.channels == 1
        return part._replace(images=v2.functional.rgb_to_grayscale(images) if grey else images.expand(-1, 3, -1, -1))

    def _kept(self, train: Tensor, targets: Tensor) -> Tensor:
        if self.train_size is None:
            return train
        if self.train_size > len(train):
            raise UserError(f"data.train_size is {self.train_size}: there are {len(train)}; give at most as many")
        labels, rng = targets[train].numpy(), np.random.default_rng(self.seed)
        place = np.empty(len(train))
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            place[rng.permutation(members)] = np.arange(len(members)) / len(members)
        # Of every class the same share lies below any threshold, and its first one lies at 0.
        return train[np.sort(np.argsort(place, kind="stable")[: self.train_size])]

    def _framing(self, images: Images) -> list[v2.Transform]:
        if isinstance(images.images, Tensor) and images.images.shape[2:] == (self.image_size, self.image_size):
            return []
        return [v2.Resize(self.image_size), v2.CenterCrop(self.image_size)]

    def _augmentation(self, images: Images) -> list[v2.Transform]:
        transforms = self._framing(images)
        if self.crop_area < 1:
            transforms = [v2.RandomResizedCrop(self.image_size, scale=(self.crop_area, 1.0))]
        if self.crop_padding:
            transforms.append(v2.RandomCrop(self.image_size, padding=self.crop_padding))
        if self.flip:
            transforms.append(v2.RandomHorizontalFlip())
        return transforms

    def _statistics(self, dataset: ImageDataset) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(dataset), generator=generator)[:STATISTICS_SIZE].tolist()
        moments = torch.zeros(2, self.channels, dtype=torch.float64)
        for index in chosen:
            image = dataset[index].inputs.double()
            moments += torch.stack([image.mean(dim=(1, 2)), image.square().mean(dim=(1, 2))])
        mean, square = moments / max(len(chosen), 1)
        std = (square - mean**2).clamp_min(0).sqrt()
        # One colour only: there is nothing to scale.
        return mean.float(), torch.where(std > 1e-6, std, 1.0).float()


def _all(images: Images) -> Tensor:
    return torch.arange(len(images.targets))
