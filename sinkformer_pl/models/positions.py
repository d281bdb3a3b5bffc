"""Tell a transformer the order of its tokens."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that PyTorch's own documentation uses)
from torch import Tensor, nn


def token_positions(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Count positions of tokens (B, N) from the first real one of each sequence, which is 0.

    Args:
        tokens: (B, N, ...); its sizes and device alone matter.
        mask: (B, N) bool of real tokens, padded on whichever side; None when every token is real.

    Returns:
        int64, (B, N) or (1, N), below N, at padded places too.
    """
    if mask is None:
        return torch.arange(tokens.shape[1], device=tokens.device)[None]
    return (mask.cumsum(1) - 1).clamp(min=0)


def resize_grid(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate positions (h * w, dim) of a grid of h rows and w columns to those (H * W, dim) of another.

    Bicubic, with antialiasing where the grid gets smaller.
    """
    if old == new:
        return positions
    grid = positions.float().unflatten(0, old).movedim(-1, 0)[None]
    resized = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return resized[0].flatten(1).mT.to(positions.dtype)


def resize_sequence(positions: Tensor, length: int) -> Tensor:
    """Interpolate positions (N, dim) of a sequence linearly to a greater length; of a smaller one keep the first."""
    if length <= len(positions):
        return positions[:length]
    return F.interpolate(positions.float().mT[None], size=length, mode="linear")[0].mT.to(positions.dtype)


class LearnedPositions(nn.Module):
    """One learned vector for each position from 0 to max_length - 1, drawn from a normal distribution of 0.02."""

    def __init__(self, max_length: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(max_length, dim))
        nn.init.normal_(self.table, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that don't decay by default."""
        return {"table"}

    def forward(self, positions: Tensor) -> Tensor:
        """Return vectors (..., dim) of int64 positions (...)."""
        return F.embedding(positions, self.table)

    def resize_positions(self, saved: dict[str, Tensor], prefix: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Fit the positions in a state_dict to the number of these, in place, by `resize_sequence`.

        Args:
            saved: a state_dict.
            prefix: of this module in it.
            arguments: those of the backbone that the state_dict is of.

        Returns:
            The names of what was changed, each with its old and new size.
        """
        key = f"{prefix}table"
        table, (length, dim) = saved.get(key), self.table.shape
        if table is None or table.ndim != 2 or table.shape[1] != dim or len(table) == length:
            return {}
        saved[key] = resize_sequence(table, length)
        return {key: f"{len(table)} to {length}" + ", of which the first are kept" * (length < len(table))}


class SinusoidalPositions(nn.Module):
    """Sines and cosines of the position, at wavelengths from 2 pi to 20000 pi, in turn; nothing is learned.

    References:
        Vaswani et al. 2017 (vaswani2017attention), section 3.5.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, positions: Tensor) -> Tensor:
        """Compute vectors (..., dim) float32 of int64 positions (...)."""
        # Not a buffer, which a network in half precision would round.
        even = torch.arange(0, self.dim, 2, device=positions.device, dtype=torch.float32)
        angles = positions[..., None] * torch.exp(even * (-math.log(10000.0) / self.dim))
        return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., : self.dim]


class RelativePositionBias(nn.Module):
    """A learned number for each head and each distance between two tokens, to be added to the scores.

    Distances of `reach` and more share one number on each side. Starts at 0, so as no positions at all.

    References:
        Raffel et al. 2020 (raffel2020t5), section 2.1, without the logarithmic buckets.
    """

    def __init__(self, num_heads: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * reach + 1))

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that don't decay by default."""
        return {"table"}

    def forward(self, size: int, *, leading: int = 0) -> Tensor:
        """Return the bias (1, H, N, N) of N = leading + size tokens, 0 for pairs with one of the leading tokens.

        Padding on either side changes no distance between real tokens, so samples of a batch share it.
        """
        at = torch.arange(size, device=self.table.device)
        distance = (at[None, :] - at[:, None]).clamp(-self.reach, self.reach) + self.reach
        return F.pad(self.table[:, distance], (leading, 0, leading, 0))[None]
