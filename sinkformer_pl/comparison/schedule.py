"""Runs one after the other, or several at once, each in a process of its own."""

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sinkformer_pl.comparison.trial import Trial
from sinkformer_pl.errors import UserError

USERS_FAULT = 2
"""Exit status of a command that was refused."""


def run_all(trials: Sequence[Trial], *, jobs: int, lock: int, said: Callable[[str], None]) -> dict[str, str]:
    """Do what is left of every trial.

    A trial that fails doesn't stop the others, unless its arguments or data were refused: so will be the others'. Each
    job has its share of the CPU's threads (`OMP_NUM_THREADS`, unless it is set already) and, where
    `CUDA_VISIBLE_DEVICES` lists several devices, one of them in turn.

    Args:
        trials: the runs.
        jobs: how many at once.
        lock: descriptor of the locked file of the comparison; the runs inherit it, so that the lock lasts as long as
            any of them lives.
        said: is told a line as each trial begins and ends.

    Returns:
        The cause of failure, for each trial that failed, by its name.

    Raises:
        UserError: a trial was refused.
    """
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(jobs):
        slots.put(slot)
    running: set[subprocess.Popen[bytes]] = set()
    stop = threading.Event()
    failed: dict[str, str] = {}

    def work(trial: Trial) -> None:
        """Do what is left of a trial, in the next free slot."""
        if stop.is_set():
            return
        slot = slots.get()
        try:
            said(f"{trial.label}: begins" if trial.folder is None else f"{trial.label}: resumes")
            for command in trial.commands():
                status = _run(command, trial.log, _environment(slot, jobs), lock, running, stop)
                if stop.is_set():
                    return
                if status:
                    failed[trial.name] = _cause(trial.log, status)
                    said(f"{trial.label}: {command[0]} failed, {failed[trial.name]}")
                    if status == USERS_FAULT:
                        stop.set()
                        raise UserError(failed[trial.name])
                    return
            said(f"{trial.label}: done")
        finally:
            slots.put(slot)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            for future in [pool.submit(work, trial) for trial in trials if not trial.done]:
                future.result()
        finally:
            stop.set()
            for process in list(running):
                process.terminate()
    return failed


def _run(
    command: Sequence[str],
    log: Path,
    environment: dict[str, str],
    lock: int,
    running: set[subprocess.Popen[bytes]],
    stop: threading.Event,
) -> int:
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "sinkformer_pl", *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=() if os.name == "nt" else (lock,),
        )
        running.add(process)
        if stop.is_set():
            process.terminate()
        try:
            return process.wait()
        finally:
            running.discard(process)


def _environment(slot: int, jobs: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // jobs)))
    devices = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if jobs > 1 and len(devices) > 1:
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return environment


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cause(log: Path, status: int) -> str:
    """Return what a command printed last, or as an error."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
    last = lines[-1].strip() if lines else "no output"
    return f"status {status}: {last} ({log})"
