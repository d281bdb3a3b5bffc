"""Threads of Python whose operators run in one thread each, so that none ends in a barrier of OpenMP.

That barrier spins: where another process keeps a core busy, each operator that is divided between threads waits for one
that isn't running. Operators release the interpreter's lock, so threads that each work through blocks of heads need no
barrier. Those that share the queries of one head meet in one that sleeps.
"""

import os
import threading
from collections.abc import Callable
from functools import reduce
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor


class Member:
    """One of the threads that do the same work on different queries.

    Attributes:
        rank: which one, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, barrier: threading.Barrier | None = None, given: Any = None) -> None:
        self.rank, self.size = rank, 1 if barrier is None else barrier.parties
        self._barrier, self._given, self._turn = barrier, given, 0

    def over(self, operation: Callable[[Tensor, Tensor], Tensor], part: Tensor) -> Tensor:
        """Reduce the parts that all members give, in the order of their ranks; nobody may write to a part after it."""
        if self._barrier is None:
            return part
        # Two lists in turn, since a fast member may give its next part before a slow one has read this one.
        self._turn = 1 - self._turn
        given = self._given[self._turn]
        given[self.rank] = part
        self._barrier.wait()
        return reduce(operation, given)


def together(number: int, work: Callable[[Member], None]) -> None:
    """Call `work` in that many threads at once, and wait for all; alone, in the thread of the caller.

    Raises:
        Exception: the first error of a thread.
    """
    if number == 1:
        work(Member())
        return
    barrier, given, done = threading.Barrier(number), ([None] * number, [None] * number), SimpleQueue[Any]()

    def run(rank: int) -> None:
        error = None
        try:
            # Results of a caller in inference mode can be written to in no other mode.
            with torch.inference_mode():
                work(Member(rank, barrier, given))
        except BaseException as caught:
            error = caught
            barrier.abort()
        done.put(error)

    _pool.start(number, run)
    errors = [error for error in [done.get() for _ in range(number)] if error is not None]
    if errors:
        # Those that waited for the thread that failed have failed because of it.
        raise min(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError))


class _Pool:
    """Threads that wait for work, made when they are first needed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inboxes: list[SimpleQueue[tuple[Callable[[int], None], int]]] = []

    def start(self, number: int, run: Callable[[int], None]) -> None:
        """Hand `run` to the first so many threads, in each after all that was handed to it before."""
        # In one order to all threads: two calls that each held a thread of the other's would wait for ever.
        with self.lock:
            while len(self.inboxes) < number:
                self.inboxes.append(_new_thread())
            for rank, inbox in enumerate(self.inboxes[:number]):
                inbox.put((run, rank))


def _new_thread() -> "SimpleQueue[tuple[Callable[[int], None], int]]":
    inbox: SimpleQueue[tuple[Callable[[int], None], int]] = SimpleQueue()
    ready = threading.Event()
    default: list[int] = []

    def serve() -> None:
        default.append(torch.get_num_threads())
        torch.set_num_threads(1)
        ready.set()
        while True:
            run, rank = inbox.get()
            run(rank)
            del run

    threading.Thread(target=serve, name="sinkhorn_attention", daemon=True).start()
    ready.wait()
    # The number belongs to a thread, but new threads begin with the last one that was set anywhere.
    restore = threading.Thread(target=torch.set_num_threads, args=default)
    restore.start()
    restore.join()
    return inbox


_pool = _Pool()


def _forget_pool() -> None:
    """Begin anew in a forked child, which has none of the threads of its parent."""
    global _pool
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
