"""Describe the tokens of an attention layer: points in space, patches of an image, pieces of a text."""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The tokens of one sample that attend to one another, without its padding.

    Attributes:
        kind: of the tokens; "tokens" where nothing is known.
        size: their number.
        leading: class tokens before them, counted in `size`.
        points: (size, 2 or 3) float, of points.
        image: (H, W) or (H, W, 3) float in [0, 1], of patches.
        grid: rows and columns of patches.
        numbers: of a text, (size - leading,) int64, one for each token that isn't leading.
        words: of a text, the same as strings, once they are spelled.
    """

    kind: Literal["points", "patches", "words", "tokens"]
    size: int
    leading: int = 0
    points: Tensor | None = None
    image: Tensor | None = None
    grid: tuple[int, int] = (0, 0)
    numbers: Tensor | None = None
    words: list[str] = field(default_factory=list)


def describe_tokens(inputs: Tensor, mask: Tensor | None, *, leading: int = 0) -> list[Tokens]:
    """Describe the tokens of each sample, for a network that keeps one token for each point or number.

    Args:
        inputs: points (B, N, 2 or more) float, token numbers (B, N) int, images (B, C, H, W) float, or anything
            else (B, N, ...).
        mask: (B, N) bool of real tokens, or None.
        leading: class tokens that the network puts before them.
    """
    if inputs.ndim == 4 and inputs.is_floating_point():
        return [replace(image, kind="tokens", size=0) for image in describe_patches(inputs, (0, 0))]
    real = [sample if mask is None else sample[row] for sample, row in zip(inputs, _rows(mask, inputs), strict=True)]
    if inputs.ndim == 2 and not inputs.is_floating_point():
        return [Tokens("words", leading + len(numbers), leading, numbers=numbers) for numbers in real]
    if inputs.ndim == 3 and inputs.shape[-1] >= 2 and inputs.is_floating_point():
        return [Tokens("points", leading + len(cloud), leading, points=cloud[:, :3].float().cpu()) for cloud in real]
    return [Tokens("tokens", leading + len(sample), leading) for sample in real]


def describe_patches(images: Tensor, grid: tuple[int, int], *, leading: int = 0) -> list[Tokens]:
    """Describe the patches of images (B, C, H, W), a grid of rows and columns, behind `leading` class tokens."""
    images = images.float().cpu()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    images = ((images - low) / (high - low).clamp(min=1e-6)).movedim(1, -1)
    if images.shape[-1] != 3:
        images = images[..., 0]
    return [Tokens("patches", leading + grid[0] * grid[1], leading, image=image, grid=grid) for image in images]


def _rows(mask: Tensor | None, inputs: Tensor) -> Tensor:
    return torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device) if mask is None else mask
