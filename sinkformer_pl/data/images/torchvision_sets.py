"""Published sets of images, fetched and read by torchvision."""

import math
import os
import socket
import struct
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torchvision import datasets

from sinkformer_pl.data.archives import folder_within
from sinkformer_pl.data.images.base import ImageData, Images
from sinkformer_pl.data.images.decoding import check_images
from sinkformer_pl.data.images.preprocessing import ImageSize
from sinkformer_pl.data.source import Source
from sinkformer_pl.errors import UserError

_UNSIGNED_BYTES = 8
"""What MNIST's format calls them."""


class TorchvisionImages(ImageData):
    """Base of the sets that torchvision reads.

    Attributes:
        class_names: in the order of their indices.
        files: where the files belong, and which, for messages; `{root}` stands for the root.
    """

    class_names: ClassVar[tuple[str, ...]]
    files: ClassVar[str]

    def __init__(self, root: str | Path, *, download: bool = False, **kwargs: Any) -> None:
        """Check the arguments; nothing is read.

        Args:
            root: the folder that torchvision calls root.
            download: whether to fetch what is missing there, under a Trainer or by `prepare_data`.
            **kwargs: what `ImageData` takes.

        Raises:
            UserError: an argument out of its range.
        """
        self.root = Path(root)
        self.download = download
        super().__init__(self.class_names, **kwargs)

    @abstractmethod
    def read(self, root: Path, *, train: bool, download: bool) -> Images:
        """Read one part as torchvision does; what goes wrong is said by the caller."""

    def prepare_data(self) -> None:
        """Fetch what is missing or damaged; Lightning calls this in one process only.

        Files appear in the root when all are there and verified: torchvision itself would take for complete what a
        killed process left half unpacked.
        """
        if not self.download or self._complete():
            return
        before = socket.getdefaulttimeout()
        # torchvision sets no limit, so that a silent server would hold the run forever.
        socket.setdefaulttimeout(60)
        try:
            with folder_within(self.root) as folder:
                self._part(folder, train=True, download=True)
                _move(folder, self.root)
        except OSError as error:
            raise UserError(f"{self.root}: can't be written ({error.strerror}); give another data.root") from None
        finally:
            socket.setdefaulttimeout(before)

    def load(self) -> Source[Images]:
        """Read both parts."""
        return Source(train=self._part(self.root, train=True), test=self._part(self.root, train=False))

    def _complete(self) -> bool:
        try:
            self._part(self.root, train=True)
            self._part(self.root, train=False)
        except UserError:
            return False
        return True

    def _part(self, root: Path, *, train: bool, download: bool = False) -> Images:
        name = type(self).__name__
        try:
            images = self.read(root, train=train, download=download)
        except Exception as error:
            cause = " ".join((str(error) or type(error).__name__).split())
            # What torchvision adds is how its own functions are called.
            cause = cause.split(". You can use download=True")[0]
            what = "can't be fetched" if download else "can't be read"
            remedy = f"put {self.files.format(root=self.root)}" + ", or set data.download=true" * (not self.download)
            if not download and (above := self._above(root)):
                remedy = f"it is in {above}: give that as data.root"
            raise UserError(f"{self.root}: {name} {what} ({cause}); {remedy}") from None
        labels = images.targets.tolist()
        smallest, largest = min(labels, default=0), max(labels, default=0)
        if len(labels) != len(images.images) or smallest < 0 or largest >= len(self.found_classes):
            raise UserError(
                f"{self.root}: {name} has {len(images.images)} {'training' if train else 'test'} images, {len(labels)} "
                f"labels from {smallest} to {largest}, but {len(self.found_classes)} classes, from 0 on; put "
                f"{self.files.format(root=self.root)}"
            )
        return images

    def _above(self, root: Path) -> Path | None:
        """The folder above `root` that should have been given."""
        for folder in root.absolute().parents[:2]:
            try:
                self.read(folder, train=True, download=False)
            except Exception:
                continue
            return folder
        return None


class MNIST(TorchvisionImages):
    """Handwritten digits, 60000 and 10000 of 28x28 in grey (LeCun et al. 1998)."""

    class_names = tuple("0123456789")
    files = "train-images-idx3-ubyte, train-labels-idx1-ubyte and the same of t10k, unpacked, into {root}/MNIST/raw"
    source: ClassVar[type[datasets.MNIST]] = datasets.MNIST

    def __init__(self, root: str | Path, *, image_size: ImageSize = 28, channels: int = 1, **kwargs: Any) -> None:
        """Check the arguments; nothing is read.

        Args:
            root: the folder of the folder named like this class.
            image_size: side of the inputs in pixels, or [height, width].
            channels: 1 for grey, 3 for RGB.
            **kwargs: what `TorchvisionImages` takes.

        Raises:
            UserError: an argument out of its range.
        """
        super().__init__(root, image_size=image_size, channels=channels, **kwargs)

    def read(self, root: Path, *, train: bool, download: bool) -> Images:
        """Read one part into memory."""
        if not download:
            for address, _ in self.source.resources:
                _check_idx(root / self.source.__name__ / "raw" / Path(address).stem)
        found = self.source(root, train=train, download=download)
        return Images(found.data[:, None], found.targets, _numbered(train, len(found.data)))


class FashionMNIST(MNIST):
    """Pieces of clothing in the format of MNIST (Xiao et al. 2017)."""

    class_names = tuple(datasets.FashionMNIST.classes)
    files = MNIST.files.replace("/MNIST/", "/FashionMNIST/")
    source = datasets.FashionMNIST


class CIFAR10(TorchvisionImages):
    """Photos of ten kinds of things, 50000 and 10000 of 32x32 in colour (Krizhevsky 2009)."""

    class_names: ClassVar[tuple[str, ...]] = (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    files = "the folder cifar-10-batches-py of cifar-10-python.tar.gz into {root}"
    source: ClassVar[type[datasets.CIFAR10]] = datasets.CIFAR10

    def __init__(
        self, root: str | Path, *, image_size: ImageSize = 32, crop_padding: int = 4, flip: bool = True, **kwargs: Any
    ) -> None:
        """Check the arguments; nothing is read.

        Args:
            root: the folder of the archive's folder.
            image_size: side of the inputs in pixels, or [height, width].
            crop_padding: largest shift of a training image in each direction, in pixels; black moves in.
            flip: whether every other training image is mirrored, left to right.
            **kwargs: what `TorchvisionImages` takes.

        Raises:
            UserError: an argument out of its range.
        """
        super().__init__(root, image_size=image_size, crop_padding=crop_padding, flip=flip, **kwargs)

    def read(self, root: Path, *, train: bool, download: bool) -> Images:
        """Read one part into memory."""
        found = self.source(root, train=train, download=download)
        images = torch.from_numpy(np.ascontiguousarray(found.data.transpose(0, 3, 1, 2)))
        return Images(images, torch.tensor(found.targets), _numbered(train, len(images)))


class CIFAR100(CIFAR10):
    """Photos of a hundred kinds of things, in the format of CIFAR10 (Krizhevsky 2009); the fine labels."""

    class_names = (
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle",
        "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle",
        "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur",
        "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard",
        "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
        "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
        "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
        "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
        "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger",
        "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    )  # fmt: skip
    files = "the folder cifar-100-python of cifar-100-python.tar.gz into {root}"
    source = datasets.CIFAR100


class OxfordPets(TorchvisionImages):
    """Photos of 37 breeds of cats and dogs, 3680 and 3669 (Parkhi et al. 2012)."""

    class_names = (
        "Abyssinian", "American Bulldog", "American Pit Bull Terrier", "Basset Hound", "Beagle", "Bengal", "Birman",
        "Bombay", "Boxer", "British Shorthair", "Chihuahua", "Egyptian Mau", "English Cocker Spaniel",
        "English Setter", "German Shorthaired", "Great Pyrenees", "Havanese", "Japanese Chin", "Keeshond", "Leonberger",
        "Maine Coon", "Miniature Pinscher", "Newfoundland", "Persian", "Pomeranian", "Pug", "Ragdoll", "Russian Blue",
        "Saint Bernard", "Samoyed", "Scottish Terrier", "Shiba Inu", "Siamese", "Sphynx", "Staffordshire Bull Terrier",
        "Wheaten Terrier", "Yorkshire Terrier",
    )  # fmt: skip
    files = "the folders images and annotations of images.tar.gz and annotations.tar.gz into {root}/oxford-iiit-pet"

    def __init__(
        self,
        root: str | Path,
        *,
        check_files: bool = True,
        crop_area: float = 0.08,
        flip: bool = True,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; nothing is read.

        Args:
            root: the folder of the folder oxford-iiit-pet.
            check_files: whether to decode every file before training, about 1 ms each. Otherwise a broken file is an
                error when its turn comes.
            crop_area: smallest share of a training image's area that is cut out at random and resized, in (0, 1];
                1 cuts out the centre as in evaluation.
            flip: whether every other training image is mirrored, left to right.
            **kwargs: what `TorchvisionImages` takes.

        Raises:
            UserError: an argument out of its range.
        """
        super().__init__(root, crop_area=crop_area, flip=flip, **kwargs)
        self.check_files = check_files

    def load(self) -> Source[Images]:
        """Find the files of both parts."""
        source = super().load()
        if self.check_files:
            check_images({"train": source.train.images, "test": source.test.images})  # type: ignore[dict-item]
        return source

    def read(self, root: Path, *, train: bool, download: bool) -> Images:
        """Find the files of one part, in the order of the published list."""
        part = "trainval" if train else "test"
        datasets.OxfordIIITPet(root, split=part, download=download)
        folder = root / "oxford-iiit-pet"
        # A line is "NAME CLASS SPECIES BREED"; torchvision keeps the files to itself.
        lines = (folder / "annotations" / f"{part}.txt").read_text(encoding="utf-8").splitlines()
        names = [line.split()[0] for line in lines]
        targets = torch.tensor([int(line.split()[1]) - 1 for line in lines])
        files = [folder / "images" / f"{name}.jpg" for name in names]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise FileNotFoundError(f"{len(absent)} images are missing, such as {absent[0]}")
        return Images(files, targets, names)


def _check_idx(path: Path) -> None:
    """Say what is wrong with a file of MNIST's format, of which torchvision only says that something is."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.name}")
    kind, dimensions = ("images", 3) if "images" in path.name else ("labels", 1)
    with path.open("rb") as file:
        header = file.read(4 + 4 * dimensions)
    if header.startswith(b"\x1f\x8b"):
        raise ValueError(f"{path.name} is a gzip archive, not unpacked")
    if len(header) < 4 + 4 * dimensions or header[:4] != bytes((0, 0, _UNSIGNED_BYTES, dimensions)):
        raise ValueError(f"{path.name} is no idx file of {kind}")
    size, declared = path.stat().st_size - len(header), math.prod(struct.unpack(f">{dimensions}I", header[4:]))
    if not declared:
        raise ValueError(f"{path.name} has no {kind}")
    if size != declared:
        raise ValueError(f"{path.name} has {size} bytes of {kind}, but its header says {declared}")


def _move(source: Path, target: Path) -> None:
    """Move all that is in a folder into another one, over files of the same name."""
    for entry in source.iterdir():
        if entry.is_dir() and (target / entry.name).is_dir():
            _move(entry, target / entry.name)
        else:
            os.replace(entry, target / entry.name)


def _numbered(train: bool, count: int) -> list[str]:
    return [f"{'train' if train else 'test'}/{index}" for index in range(count)]
