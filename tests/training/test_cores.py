"""Threads of OpenMP make room for other processes."""

import os
import subprocess
import sys

import pytest

from tests import commands

SCRIPT = """
import os, time
import torch
from sinkformer_pl.training.cores import share_cores

def threads_after(wanted):
    deadline = time.monotonic() + 30
    while not wanted(len(os.listdir("/proc/self/task"))) and time.monotonic() < deadline:
        time.sleep(0.1)
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
alone = threads_after(lambda number: True)
with share_cores():
    torch.zeros(2**20).add_(1)
    beside = threads_after(lambda number: number > alone + 2)
    numbers = torch.get_num_threads()
print(alone, beside, threads_after(lambda number: number <= alone + 1), numbers)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads of libgomp, counted in /proc")
def test_threads_are_added_while_other_processes_have_the_cores(tmp_path):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        done = commands.run("-c", SCRIPT, cwd=tmp_path, env={"OMP_NUM_THREADS": "2"})
        chosen = commands.run("-c", SCRIPT.replace("+ 30", "+ 1.5"), cwd=tmp_path, env={"OMP_WAIT_POLICY": "PASSIVE"})
    finally:
        for process in busy:
            process.kill()
    assert done.returncode == 0, done.stderr
    alone, beside, after, numbers = map(int, done.stdout.split())
    # Its own thread, that of OpenMP, and those that are added.
    assert beside > alone + 2
    assert after <= alone + 1
    assert numbers == 2
    alone, beside, *_ = map(int, chosen.stdout.split())
    assert beside == alone + 1
