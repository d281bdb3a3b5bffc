"""Numbers of a device that are read some steps late, so that the host doesn't wait for them."""

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

DELAY = 8
"""Steps between a number and its reading on a GPU: longer than the queue of kernels that the host runs ahead by."""

About = TypeVar("About")


class Delayed(Generic[About]):
    """A queue of small tensors, each on its way to the host.

    A copy is begun at once and waited for only when it is read. Whoever puts one in at each step and takes out those
    older than a fixed number of steps reads the same entries at the same steps in every process.
    """

    def __init__(self) -> None:
        self._queue: deque[tuple[Tensor, torch.cuda.Event | None, About]] = deque()

    def __len__(self) -> int:
        """Return the number of entries that weren't taken out yet."""
        return len(self._queue)

    def put(self, value: Tensor, about: About) -> None:
        """Copy a value as it is now; `about` comes back with it."""
        if value.is_cuda:
            copy = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(value.device))
            self._queue.append((copy, event, about))
        else:
            self._queue.append((value.clone(), None, about))

    def take(self, delay: int = 0) -> Iterator[tuple[Tensor, About]]:
        """Take out all entries but the newest `delay`, oldest first."""
        while len(self._queue) > delay:
            copy, event, about = self._queue.popleft()
            if event is not None:
                event.synchronize()
            yield copy, about

    def clear(self) -> None:
        """Drop all entries."""
        self._queue.clear()
