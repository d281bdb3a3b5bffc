"""The loader of every split: it goes on in the middle of an epoch, and passes small batches on quickly."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from sinkformer_pl.batch import LARGEST_MESSAGE, Batch, Sample, collate
from sinkformer_pl.data.sampling import EpochSampler

MOST_WORKERS = 8
"""Loader processes that are started unasked."""

Parts = TypeVar("Parts", bound=tuple[Any, ...])


class ResumableLoader(DataLoader[Sample]):
    """A loader that begins an epoch where the training is, and not before the first batch is asked for.

    Lightning makes the iterator before it knows the epoch and the batch at which a training goes on; workers that
    began to fetch then would fetch those of epoch 0.

    Small batches come from its processes as messages, not through shared memory, whose handles take milliseconds to
    pass on.

    Args:
        args: those of a DataLoader, with an `EpochSampler`; `collate` makes the batches.
        position: returns the number of batches of this epoch that the training has had.
        kwargs: see args.
    """

    def __init__(self, *args: Any, position: Callable[[], int], **kwargs: Any) -> None:
        own = {"collate_fn": _collate, "worker_init_fn": heed_the_training_alone}
        super().__init__(*args, **(own | kwargs))
        self.position = position

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches that are left of the epoch."""
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start = self.position() * (self.batch_size or 1)
        yield from map(unpacked, super().__iter__())

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is the training's; the method tells Lightning that it is kept."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing, see `state_dict`."""


@dataclass(frozen=True)
class _Message(Generic[Parts]):
    """A batch whose tensors are arrays, which are pickled whole where tensors would move to shared memory."""

    kind: Callable[..., Parts]
    parts: tuple[Any, ...]

    def unpacked(self) -> Parts:
        return self.kind(*(torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in self.parts))

    def pin_memory(self) -> Parts:
        """Return the batch in pinned memory; a loader that pins its batches calls this in a thread of its own."""
        return self.kind(*(part.pin_memory() if isinstance(part, Tensor) else part for part in self.unpacked()))


def packed(batch: Parts) -> Parts | _Message[Parts]:
    """Make a message of a batch, a named tuple, that is small and made in a loader's process; others stay as they are.

    `unpacked` makes the batch of it again.
    """
    if get_worker_info() is None or sum(part.nbytes for part in batch if isinstance(part, Tensor)) > LARGEST_MESSAGE:
        return batch
    return _Message(type(batch), tuple(part.numpy() if isinstance(part, Tensor) else part for part in batch))


def unpacked(batch: Any) -> Any:
    """Return the batch of what a loader with `packed` gives."""
    return batch.unpacked() if isinstance(batch, _Message) else batch


def default_workers(processes: int) -> int:
    """Loader processes for each of some training processes of this machine, where a GPU computes.

    All but one of the CPUs that this process may use, at most `MOST_WORKERS`.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST_WORKERS, usable // max(processes, 1) - 1))


def _collate(samples: Sequence[Sample]) -> Batch | _Message[Batch]:
    return packed(collate(samples))


def heed_the_training_alone(worker: int) -> None:
    """Keep a worker alive when a signal comes to all processes of a terminal or a job: the training ends it."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()


def _end_when_told(by: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != by:
        pass
    os._exit(0)
