"""Memory that is kept from call to call, since the page faults of fresh memory cost as much as a product."""

import threading
from weakref import WeakValueDictionary

import torch
from torch import Tensor

WORKSPACE_BYTES = 2**27
"""Larger pieces are given back after each call."""


class _ByName(dict[str, Tensor]):
    """The pieces of one thread; a class of its own, since there are no weak references to a plain dict."""


class _Pieces(threading.local):
    def __init__(self) -> None:
        self.by_name = _of_threads[threading.get_ident()] = _ByName()


_of_threads: WeakValueDictionary[int, _ByName] = WeakValueDictionary()
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
    """Give the memory that all threads keep back to the allocator."""
    for by_name in list(_of_threads.values()):
        by_name.clear()
