"""Memory that is kept from call to call, since the page faults of fresh memory cost as much as a product."""

import threading

import torch
from torch import Tensor

WORKSPACE_BYTES = 2**27
"""Larger pieces are given back after each call."""


class _Pieces(threading.local):
    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}


_pieces = _Pieces()


def workspace(name: str, numel: int, like: Tensor) -> Tensor:
    """A flat piece of memory of the dtype and device of `like`, whose content is undefined.

    On the CPU a thread gets the same piece again for the same name, so one call at a time may use a name.
    """
    if like.device.type != "cpu" or numel * like.element_size() > WORKSPACE_BYTES:
        return like.new_empty(numel)
    kept = _pieces.by_name.get(name)
    if kept is None or kept.numel() < numel or kept.dtype != like.dtype:
        # What is made in inference mode could not be written to in a later training.
        with torch.inference_mode(False):
            kept = _pieces.by_name[name] = torch.empty(numel, dtype=like.dtype)
    return kept[:numel]


def release() -> None:
    """Give the memory that this thread keeps back to the allocator."""
    _pieces.by_name.clear()
