"""Image files: decoding, and a look at all of them before training."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from sinkformer_pl.data.images.orientation import has_damaged_exif, open_image, upright
from sinkformer_pl.data.reading import cause, open_file
from sinkformer_pl.errors import UserError


def decode_image(path: Path, channels: int) -> Tensor:
    """Read an image, upright as its EXIF orientation says.

    Palettes, CMYK and the like become grey or RGB. What is transparent is laid over white. Grey values of more than 8
    bits are divided by the largest of 16 bits; of 16-bit colours Pillow reads the upper 8 bits.

    Args:
        path: a file of any format that Pillow reads.
        channels: 1 for grey, 3 for RGB.

    Returns:
        (channels, H, W), uint8, or float32 in [0, 1] where the file has more than 8 bits.

    Raises:
        UserError: not an image, one that is cut off, or less than 2 pixels high or wide.
    """
    return _decode(path, channels)[0]


def pixels_of(image: Image.Image, channels: int) -> Tensor:
    """Return the pixels of an image as `decode_image` does.

    Raises:
        ValueError: grey values of unknown scale.
    """
    pixels = _wide_grey(image) if image.mode[0] in "IF" else _eight_bits(image, channels)
    return pixels.expand(channels, -1, -1)


def check_images(files: dict[str, Sequence[Path]]) -> None:
    """Decode every file, photos at an eighth of their size: from 0.3 to 1 ms each.

    Args:
        files: the files of each part; those of "train" shouldn't be in another one.

    Raises:
        UserError: files that can't be decoded. Files with damaged EXIF data, and files of the same content as one in
            "train", are only warned about.
    """
    paths = [path for part in files.values() for path in part]
    with ThreadPoolExecutor() as pool:
        found = list(zip(paths, pool.map(_look_at, paths), strict=True))
    problems = [(path, str(problem)) for path, problem in found if isinstance(problem, UserError)]
    if problems:
        others = [path for path, _ in problems[1:]]
        more = f"; {len(others)} more can't be used: {_listed(others)}" if others else ""
        raise UserError(problems[0][1] + more)
    if damaged := [path for path, problem in found if problem]:
        rank_zero_warn(
            f"{len(damaged)} of {len(paths)} image files have damaged EXIF data: {_listed(damaged)}; they are used, "
            "upright where the orientation can be read"
        )
    contents = _contents(paths)
    training = {contents[path]: path for path in reversed(files["train"])}
    for part in (part for part in files if part != "train"):
        copies = [path for path in files[part] if contents[path] in training]
        if copies:
            rank_zero_warn(
                f"{len(copies)} of {len(files[part])} {part} files have the same content as a training file: "
                f"{_listed([f'{path} = {training[contents[path]]}' for path in copies])}; remove them from one of both"
            )


def _require_content(image: Image.Image, path: Path) -> None:
    if min(image.size) < 2:
        raise UserError(f"{path}: an image of {image.width}x{image.height} pixels shows nothing; replace or remove it")


def _unreadable(path: Path, error: Exception) -> UserError:
    why = "no image" if isinstance(error, UnidentifiedImageError) else cause(error)
    return UserError(f"{path}: can't be decoded ({why}); replace or remove the file")


def _wide_grey(image: Image.Image) -> Tensor:
    values = np.asarray(image).astype(np.float32)
    largest = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= largest):
        raise ValueError(f"grey values outside of 0 to {largest}: save it with 8 or 16 bits")
    return torch.from_numpy(values / largest)[None]


def _eight_bits(image: Image.Image, channels: int) -> Tensor:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    return torch.from_numpy(np.array(image).reshape(image.height, image.width, channels)).permute(2, 0, 1)


def _decode(path: Path, channels: int, *, small: bool = False) -> tuple[Tensor, Image.Image]:
    """Return what `decode_image` does, and the image; photos at an eighth of their size if `small`."""
    # Broken bytes make Pillow's decoders raise nearly anything.
    try:
        with open_file(path) as stream, open_image(stream) as image:
            _require_content(image, path)
            if small and image.format in ("JPEG", "MPO"):
                image.draft(None, (1, 1))
            return pixels_of(upright(image), channels), image
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None


def _look_at(path: Path) -> UserError | bool:
    """Return why a file can't be decoded, or whether its EXIF data are damaged."""
    try:
        _, image = _decode(path, 3, small=True)
    except UserError as error:
        return error
    return has_damaged_exif(image)


def _contents(paths: Sequence[Path]) -> dict[Path, tuple[int, bytes]]:
    """Return what tells the content of a file: its size, and a hash where another has that size."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in paths:
        by_size[path.stat().st_size].append(path)
    return {
        path: (size, hashlib.sha256(path.read_bytes()).digest() if len(group) > 1 else b"")
        for size, group in by_size.items()
        for path in group
    }


def _listed(names: Sequence[str | Path]) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "")
