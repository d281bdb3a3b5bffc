"""Images of the user's own: a folder for each class."""

from pathlib import Path
from typing import Any

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from sinkformer_pl.data.images.base import ImageData, Images
from sinkformer_pl.data.images.decoding import check_images
from sinkformer_pl.data.reading import files_below, is_folder, list_folder, warn_of_left_out
from sinkformer_pl.data.source import Source
from sinkformer_pl.data.validation import warn_if_unused
from sinkformer_pl.errors import UserError

LAYOUT = "train/CLASS/*, test/CLASS/* and perhaps val/CLASS/*"


class ImageFolder(ImageData):
    """Image files in `root/train/CLASS` and `root/test/CLASS`, at any depth; optionally also in `root/val/CLASS`.

    Without `root/val`, validation is divided from the training images; with it, `val_fraction` has no meaning. Files
    of other extensions than `torchvision.datasets.ImageFolder` reads are left out, and so are images outside of these
    folders; one warning says how many. Hidden files are left out.
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
        parts = [part for part in ("train", "test", "val") if is_folder(self.root / part)]
        if {"train", "test"} - set(parts):
            raise UserError(f"{self.root}: found {_found(self.root)}; expected {LAYOUT}")
        self.parts = parts
        classes = sorted({folder.name for part in parts for folder in list_folder(self.root / part)[0]})
        if not classes:
            raise UserError(f"{self.root}/train: found {_found(self.root / 'train')}; expected {LAYOUT}")
        super().__init__(classes, crop_area=crop_area, flip=flip, **kwargs)
        if "val" in parts:
            warn_if_unused(self.val_fraction, f"{self.root}/val")

    def load(self) -> Source[Images]:
        """Find the files, in an order that doesn't depend on the file system.

        Raises:
            UserError: a part without images, or a folder that can't be read.
        """
        files = {part: self._files(part) for part in self.parts}
        warn_of_left_out(
            self.root,
            (file for images in files.values() for file in images.images),  # type: ignore[misc]
            lambda file: _is_image(file) or file.relative_to(self.root).parts[0] in self.parts,
            f"images lie in {LAYOUT}, and end in {', '.join(IMG_EXTENSIONS)}",
        )
        if self.check_files:
            check_images({part: images.images for part, images in files.items()})  # type: ignore[misc]
        return Source(**files)

    def _files(self, part: str) -> Images:
        folders = [(self.root / part / name, target) for target, name in enumerate(self.found_classes)]
        files = [(file, target) for folder, target in folders if is_folder(folder) for file in files_below(folder)]
        images = [(file, target) for file, target in files if _is_image(file)]
        if not images:
            found = _found(self.root / part)
            raise UserError(f"{self.root / part}: no images in folders of classes; found {found}; expected {LAYOUT}")
        return Images(
            images=[file for file, _ in images],
            targets=torch.tensor([target for _, target in images], dtype=torch.int64),
            names=[file.relative_to(self.root).as_posix() for file, _ in images],
        )


def _is_image(file: Path) -> bool:
    return file.name.lower().endswith(IMG_EXTENSIONS)


def _found(folder: Path) -> str:
    if not is_folder(folder):
        return "a file" if folder.exists() else "no such folder"
    folders, files = list_folder(folder)
    names = sorted([path.name for path in folders] + [f"{path.name} (a file)" for path in files])
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "an empty folder"
