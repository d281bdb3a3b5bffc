"""Images of the user's own: a folder for each class."""

import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from sinkformer_pl.data.images.base import ImageData, Images, ImageSource
from sinkformer_pl.data.images.decoding import check_images
from sinkformer_pl.data.validation import warn_if_unused
from sinkformer_pl.errors import UserError

LAYOUT = "train/CLASS/* and test/CLASS/*"


class ImageFolder(ImageData):
    """Image files in `root/train/CLASS` and `root/test/CLASS`, at any depth; optionally also in `root/val/CLASS`.

    Without `root/val`, validation is divided from the training images; with it, `val_fraction` has no meaning. Files
    of other extensions than `torchvision.datasets.ImageFolder` reads are left out, which is said; so are hidden ones.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        check_files: bool = True,
        crop_area: float = 0.08,
        flip: bool = True,
        **kwargs: Any,
    ) -> None:
        """Look at the folders and learn the classes; no image is read.

        Args:
            root: the folder of the folders `train` and `test`.
            check_files: whether to decode every file before training, 0.3 to 1 ms each, and to look for test images
                among the training images. Otherwise a broken file is an error when its turn comes.
            crop_area: smallest share of a training image's area that is cut out at random and resized, in (0, 1];
                1 cuts out the centre as in evaluation.
            flip: whether every other training image is mirrored, left to right.
            **kwargs: what `ImageData` takes.

        Raises:
            UserError: folders that are missing or can't be read, or an argument out of its range.
        """
        self.root = Path(root)
        self.check_files = check_files
        parts = [part for part in ("train", "test", "val") if (self.root / part).is_dir()]
        if {"train", "test"} - set(parts):
            raise UserError(f"{self.root}: found {_found(self.root)}; expected {LAYOUT}")
        self.parts = parts
        classes = sorted({name for part in parts for name in _folders(self.root / part)})
        if not classes:
            raise UserError(f"{self.root}/train: found {_found(self.root / 'train')}; expected {LAYOUT}")
        super().__init__(classes, crop_area=crop_area, flip=flip, **kwargs)
        if "val" in parts:
            warn_if_unused(self.val_fraction, f"{self.root}/val")

    def load(self) -> ImageSource:
        """Find the files, in an order that doesn't depend on the file system."""
        files = {part: self._files(part) for part in self.parts}
        if self.check_files:
            check_images({part: images.images for part, images in files.items()})  # type: ignore[misc]
        return ImageSource(**files)

    def _files(self, part: str) -> Images:
        indices = {name: index for index, name in enumerate(self.classes)}
        found = make_dataset(self.root / part, indices, extensions=IMG_EXTENSIONS, allow_empty=True)
        files = [(Path(file), target) for file, target in found if not Path(file).name.startswith(".")]
        self._warn_of_others(part)
        return Images(
            images=[file for file, _ in files],
            targets=torch.tensor([target for _, target in files], dtype=torch.int64),
            names=[file.relative_to(self.root).as_posix() for file, _ in files],
        )

    def _warn_of_others(self, part: str) -> None:
        others = [
            Path(folder, name)
            for label in self.classes
            for folder, _, names in os.walk(self.root / part / label, followlinks=True)
            for name in names
            if not name.startswith(".") and not name.lower().endswith(IMG_EXTENSIONS)
        ]
        if others:
            rank_zero_warn(
                f"{self.root / part}: {len(others)} files are no images by their names and are left out, the first is "
                f"{min(others).name}; images end in {', '.join(IMG_EXTENSIONS)}"
            )


def _folders(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({error.strerror}); give a folder that you may read") from None


def _found(folder: Path) -> str:
    if not folder.is_dir():
        return "a file" if folder.exists() else "no such folder"
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({error.strerror}); give a folder that you may read") from None
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "an empty folder"
