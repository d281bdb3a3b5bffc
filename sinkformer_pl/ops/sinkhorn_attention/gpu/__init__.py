"""Sinkhorn attention on GPUs: kernels in Triton, and the choice among them.

The kernels themselves are imported where they are first called: Triton isn't there on every machine.
"""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

WIDEST = 256
"""Features of a query, key or value at the most."""

OLDEST = 8, 0
"""The first compute capability with bfloat16 and asynchronous copies."""


def reason_against(q: Tensor, v: Tensor) -> str | None:
    """Say why the kernels can't take queries (..., D) and values (..., Dv) of this dtype and device; None if they can.

    With TRITON_INTERPRET=1 in the environment when they are first imported they take tensors of the CPU, slowly.
    """
    if not _has_triton():
        return "Triton isn't installed"
    if q.is_cuda and torch.version.hip is not None:
        return "the kernels weren't tried on ROCm"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < OLDEST:
        return f"{torch.cuda.get_device_name(q.device)} is older than compute capability {OLDEST[0]}.{OLDEST[1]}"
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs tensors on CUDA, got {q.device.type} (or TRITON_INTERPRET=1 to try the kernels on the CPU)"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has no kernels for {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"has no kernels for more than {WIDEST} features, got {max(q.shape[-1], v.shape[-1])}"
    return None


def laid_out_like(tensor: Tensor, width: int) -> Tensor:
    """Return (B, H, N, width) uninitialized, tokens before heads in memory where those of `tensor` (B, H, N, D) are.

    So the output fits what made the queries: the projections around attention, or tensors (B, H, N, D) as they are.
    """
    b, h, n, _ = tensor.shape
    tokens_first = tensor.stride(1) < tensor.stride(2)
    steps = (width, h * width) if tokens_first else (n * width, width)
    return tensor.new_empty_strided((b, h, n, width), (n * h * width, *steps, 1))


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
