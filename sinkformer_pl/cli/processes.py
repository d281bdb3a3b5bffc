"""The processes of one training on one machine: the first that fails says why, and none outlives the first."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sinkformer_pl.errors import RunError

if TYPE_CHECKING:
    import pytorch_lightning as pl

VARIABLE = "SINKFORMER_PL_PROCESSES"
"""Environment variable "PID:FILE": the first process, and a file that all of one machine share."""

GRACE = 10.0
"""Seconds that a process has to come to an end by itself once the first one is gone."""

REMEDY = "resume with --ckpt_path last"


@contextmanager
def together() -> Iterator[None]:
    """Be the first process of a training, one of torchrun's, or one that Lightning launched: that ends with it."""
    first, file = _first()
    leading = os.environ.get("LOCAL_RANK", "0") == "0"
    if file and not leading:
        if os.getppid() != first:
            raise SystemExit(1)
        threading.Thread(target=_end_with, args=(first,), daemon=True).start()
        yield
        return
    file = _shared_file()
    os.environ[VARIABLE] = f"{os.getpid()}:{file}"
    try:
        yield
    finally:
        del os.environ[VARIABLE]
        if leading:
            Path(file).unlink(missing_ok=True)


def _shared_file() -> str:
    """Return a new file, or the one that the processes of a torchrun have in common."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        handle, file = tempfile.mkstemp(prefix="sinkformer_pl-")
        os.close(handle)
        return file
    parts = (
        os.getuid(),
        os.environ["TORCHELASTIC_RUN_ID"],
        os.getppid(),
        os.environ.get("TORCHELASTIC_RESTART_COUNT"),
    )
    path = Path(tempfile.gettempdir()) / f"sinkformer_pl-{'-'.join(map(str, parts)).replace('/', '_')}"
    path.touch()
    return str(path)


def first_to_fail() -> bool:
    """Tell whether no process of this training has failed before: what fails in the others is a consequence."""
    _, file = _first()
    try:
        # Of several processes one alone succeeds.
        os.unlink(file)
    except OSError:
        return not file
    return True


def require_others(trainer: "pl.Trainer") -> None:
    """Say so if another process was ended in the midst of a training, which makes the others fail.

    Raises:
        RunError: which one, and by what.
    """
    if trainer.world_size == 1:
        return
    # A connection breaks a moment before its process is seen to be gone.
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        first, _ = _first()
        if first not in (os.getpid(), os.getppid(), 0):
            raise RunError(f"process {first}, the first of {trainer.world_size}, was ended; {REMEDY}")
        for number, process in enumerate(getattr(trainer.strategy.launcher, "procs", ()), 2):
            if (code := process.poll()) is not None and code < 0:
                raise RunError(
                    f"process {process.pid}, number {number} of {trainer.world_size}, was ended by "
                    f"{signal.Signals(-code).name} (SIGKILL is what a lack of memory looks like); {REMEDY}"
                )
        time.sleep(0.05)


def _first() -> tuple[int, str]:
    """Return the number of the first process and the shared file, 0 and "" outside of `together`."""
    number, _, file = os.environ.get(VARIABLE, "0:").partition(":")
    return int(number), file


def _end_with(first: int) -> None:
    # A process that waits for another in a collective operation can't be told in any other way.
    while os.getppid() == first:
        time.sleep(1)
    time.sleep(GRACE)
    os._exit(1)
