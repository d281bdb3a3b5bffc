"""The loader of every split: it goes on in the middle of an epoch, and passes small batches on quickly."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from sinkformer_pl.batch import Batch, Sample, collate
from sinkformer_pl.data.sampling import EpochSampler

LARGEST_MESSAGE = 2**20
"""Bytes of inputs above which shared memory is the quicker way.

On two cores of a CPU a batch of 50 kB came in 0.5 ms as a message and in 2.2 ms by shared memory, one of 1 MB in 2.0
and 2.3 ms, one of 4 MB in 6 and 2.8 ms.
"""


MOST_WORKERS = 8
"""Loader processes that are started unasked."""


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
        for batch in super().__iter__():
            yield batch.unpacked() if isinstance(batch, _Message) else batch

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the position is the training's; the method tells Lightning that it is kept."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing, see `state_dict`."""


@dataclass(frozen=True)
class _Message:
    """A batch as arrays, which are pickled whole where tensors would move to shared memory."""

    arrays: tuple[np.ndarray | None, ...]

    def unpacked(self) -> Batch:
        return Batch(*(None if array is None else torch.from_numpy(array) for array in self.arrays))  # type: ignore[arg-type]

    def pin_memory(self) -> Batch:
        """What a loader that pins its batches calls in the thread in which it does."""
        return Batch(*(None if part is None else part.pin_memory() for part in self.unpacked()))  # type: ignore[arg-type]


def default_workers(processes: int) -> int:
    """Loader processes for each of some training processes of this machine, where a GPU computes.

    All but one of the CPUs that this process may use, at most `MOST_WORKERS`.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST_WORKERS, usable // max(processes, 1) - 1))


def _collate(samples: Sequence[Sample]) -> Batch | _Message:
    batch = collate(samples)
    if get_worker_info() is None or batch.inputs.nbytes > LARGEST_MESSAGE:
        return batch
    return _Message(tuple(None if part is None else part.numpy() for part in batch))


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
