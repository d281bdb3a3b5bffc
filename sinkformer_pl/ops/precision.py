"""At least single precision inside, whatever the autocast state; the caller's dtype outside."""

import math
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor itself if it is float32 or float64, else a float32 copy.

    Raises:
        TypeError: not a float tensor.
    """
    if not tensor.is_floating_point():
        raise TypeError(f"expected a float tensor, got {tensor.dtype}")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def no_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context in which operators on this tensor's device keep the dtype of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False)


def per_head(parameter: float | Tensor) -> float | Tensor:
    """Shape a tensor (H,) as (H, 1, 1), and leave a number as it is, to broadcast against (..., H, Q, K)."""
    if isinstance(parameter, Tensor) and parameter.ndim > 0:
        return parameter[..., None, None]
    return parameter


def score_scale(q: Tensor, scale: float | Tensor | None) -> float | Tensor:
    """Return the scale of the scores q·k as it is given; None is 1 / sqrt(D) for q (..., Q, D)."""
    return 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale
