"""Share the cores with other processes.

A thread of OpenMP that waits for work keeps its core for milliseconds, since to wake a sleeping one takes long. Where
another process needs that core, each operator of a network then waits for a thread that had none: a small network
trains four times slower. libgomp waits a three-thousandth of that while there are more threads of OpenMP than cores
(GOMP_SPINCOUNT in its manual), so threads are added, which sleep.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

STAT = "/proc/stat"
"""Where Linux says how long each core was busy; some sandboxes don't have it."""

PERIOD = 0.5
"""Seconds between two looks at the cores."""

BUSY, QUIET = 0.4, 0.2
"""Cores that others must take of ours for threads to sleep, and at most for them to wait awake again.

Beside threads that wait awake a process gets two thirds of a core of two; between the two numbers nothing changes.
"""


@contextmanager
def share_cores() -> Iterator[None]:
    """Let threads of OpenMP sleep at once while other processes need their cores.

    On Linux with libgomp, as PyTorch's builds have it; elsewhere, without /proc/stat, with one thread, or where
    GOMP_SPINCOUNT or OMP_WAIT_POLICY says how threads wait, it does nothing. It changes no number of a training.
    """
    ended = threading.Event()
    chosen = any(name in os.environ for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"))
    if chosen or not os.access(STAT, os.R_OK) or os.environ.get("OMP_NUM_THREADS") == "1":
        yield
        return
    watcher = threading.Thread(target=_watch, args=(ended,), name="share_cores", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(ended: threading.Event) -> None:
    cores, team = os.sched_getaffinity(0), None
    taken, since = _taken(cores), time.monotonic()
    while not ended.wait(PERIOD):
        before, then, taken, since = taken, since, _taken(cores), time.monotonic()
        # torch may not be loaded yet, and must not be for this.
        threads = sys.modules["torch"].get_num_threads() if hasattr(sys.modules.get("torch"), "get_num_threads") else 1
        missed = (taken - before) / (since - then) - (len(cores) - threads)
        if team is None and threads > 1 and missed > BUSY:
            team = _Team(len(cores) - threads + 2)
        elif team is not None and missed < QUIET:
            team.end()
            team = None
    if team is not None:
        team.end()


def _taken(cores: set[int]) -> float:
    """Return the seconds that other processes have had of these cores."""
    with open(STAT, encoding="ascii") as file:
        lines = [line.split() for line in file if line.startswith("cpu") and line[3].isdigit()]
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are in the first two.
    ticks = sum(sum(map(int, each[1:4] + each[6:9])) for each in lines if int(each[0][3:]) in cores)
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()


class _Team:
    """Threads of OpenMP that sleep until they end."""

    def __init__(self, size: int) -> None:
        import torch

        ready, self._ended = threading.Event(), threading.Event()

        def serve() -> None:
            default = torch.get_num_threads()
            torch.set_num_threads(size)
            try:
                torch.zeros(2**18).add_(1)
            finally:
                # New threads begin with the last number that was set anywhere.
                torch.set_num_threads(default)
                ready.set()
            self._ended.wait()

        self._leader = threading.Thread(target=serve, daemon=True)
        self._leader.start()
        ready.wait()

    def end(self) -> None:
        self._ended.set()
        self._leader.join()
