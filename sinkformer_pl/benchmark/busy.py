"""Other processes that keep cores busy, as a browser or a second training would."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SPIN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""
"""A loop that ends with the process that started it, however that ends."""


@contextmanager
def busy_cores(number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run so many processes that do nothing but take a core's time."""
    processes = [subprocess.Popen([sys.executable, "-c", SPIN, str(os.getpid())]) for _ in range(number)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
