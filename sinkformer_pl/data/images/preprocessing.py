"""Images as a network sees them: size, colour, normalising."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from sinkformer_pl.data.images.decoding import decode_image, pixels_of
from sinkformer_pl.data.images.orientation import upright
from sinkformer_pl.data.preprocessing import Preprocessing

LONGEST = 4
"""How much longer than in the input a side may be, relative to the other, before an image is cut and then resized: what
is cut would be left out afterwards."""

ImageSize = int | Sequence[int]
"""The side of a square in pixels, or [height, width]."""

Interpolation = Literal["nearest", "bilinear", "bicubic"]

CropMode = Literal["center", "squash"]
"""Whether an image keeps its proportions, and what is too long is cut off, or is stretched to those of the input."""


@dataclass(frozen=True)
class ImagePreprocessing(Preprocessing):
    """Resize an image until it covers the input, cut out the centre and normalise each channel.

    The last three are those of timm, for networks whose weights were trained with others than the defaults.

    Attributes:
        image_size: side of the input in pixels, or (height, width).
        channels: 1 for grey, 3 for RGB.
        mean: of each channel, of values in [0, 1]; subtracted last.
        std: of each channel; divided by after that.
        interpolation: of the resizing, with antialiasing.
        crop_pct: share of each side of the resized image that is cut out.
        crop_mode: whether proportions are kept.
    """

    kind = "images"
    from_data = ("mean", "std", "interpolation", "crop_pct", "crop_mode")

    image_size: ImageSize
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    interpolation: Interpolation = "bilinear"
    crop_pct: float = 1.0
    crop_mode: CropMode = "center"

    def __call__(self, raw: Path | Image.Image | Tensor, seed: int = 0) -> Tensor:
        """Return (channels, height, width) float32 of an image that `pixels` takes; nothing is random.

        Raises:
            UserError: a file that can't be decoded.
        """
        return self.normalized(self.framed(self.pixels(raw)))

    def pixels(self, raw: Path | Image.Image | Tensor) -> Tensor:
        """Return (channels, H, W), uint8 or float32 in [0, 1].

        Args:
            raw: a file, an image of Pillow, or (1 or 3, H, W) uint8 or float32 in [0, 1].

        Raises:
            UserError: a file that can't be decoded.
        """
        if isinstance(raw, Path):
            return decode_image(raw, self.channels)
        if isinstance(raw, Image.Image):
            return pixels_of(upright(raw), self.channels)
        if raw.shape[0] == self.channels:
            return raw
        return v2.functional.rgb_to_grayscale(raw) if self.channels == 1 else raw.expand(self.channels, -1, -1)

    def framed(self, image: Tensor) -> Tensor:
        """Resize pixels (channels, H, W) and cut out the input's size."""
        return framed(image, self.image_size, self.interpolation, self.crop_pct, self.crop_mode)

    def normalized(self, image: Tensor) -> Tensor:
        """Return pixels as float32, without mean and scale."""
        mean, std = self._constants
        # By hand: torchvision's classes for these two take longer than a small image's whole way otherwise.
        return v2.functional.to_dtype(image, torch.float32, scale=True).sub(mean).div_(std)

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]


def height_and_width(size: ImageSize) -> tuple[int, int]:
    """Return both sides of an `ImageSize`."""
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def framed(
    image: Tensor,
    size: ImageSize,
    interpolation: Interpolation = "bilinear",
    crop_pct: float = 1.0,
    crop_mode: CropMode = "center",
) -> Tensor:
    """Resize (channels, H, W) until `crop_pct` of it just covers `size`, and cut out the centre.

    Memory is bounded by `size`.
    """
    high, wide = height_and_width(size)
    height, width = image.shape[1:]
    if (height, width) == (high, wide) and crop_pct == 1:
        return image
    longest = max(LONGEST * width * high // wide, 1), max(LONGEST * height * wide // high, 1)
    if crop_mode == "center" and (height > longest[0] or width > longest[1]):
        image = v2.functional.center_crop(image, [min(height, longest[0]), min(width, longest[1])])
        height, width = image.shape[1:]
    # Rounded down as timm does.
    high_before, wide_before = (math.floor(side / crop_pct) for side in (high, wide))
    covering = [high_before, wide_before]
    if crop_mode == "center":
        # The side that has less to spare becomes that of the input; rounded down as torchvision does.
        if height * wide <= width * high:
            covering = [high_before, width * high_before // height]
        else:
            covering = [height * wide_before // width, wide_before]
    image = v2.functional.resize(image, covering, interpolation=v2.InterpolationMode(interpolation))
    return v2.functional.center_crop(image, [high, wide])
