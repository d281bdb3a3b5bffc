"""Run commands of the package as a user does, each in a process of its own.

A new interpreter spends five seconds on imports. `run` and `start` fork a child of the standard library's fork server
instead, a process that has everything imported and has done nothing else: the child has its own session, folder,
environment, output and exit status. `interpreter` gives the command line of a new process, for tests where the
process itself is the matter: trainings of several processes, installation, imports.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *("matplotlib.pyplot", "pytorch_lightning.cli", "scipy.stats", "sklearn.datasets"),
        *("tensorboard.summary", "tokenizers", "torch.utils.tensorboard"),
        *(f"sinkformer_pl.{part}" for part in ("callbacks", "cli", "comparison", "data", "models", "tasks")),
    ]
)


def run(
    *argv: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    first: Callable[[], None] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Run `python -m sinkformer_pl ARGV` in a forked child.

    Args:
        argv: the arguments of the command; `-c` and code of Python run that code instead.
        cwd: the folder in which it runs.
        env: variables to add to the environment of the tests.
        first: a function of a module that the child calls before the command.
        timeout: seconds after which the child and what it started are killed.

    Returns:
        Its exit status, negative for a signal, and what it printed.

    Raises:
        subprocess.TimeoutExpired: it took too long.
    """
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        for path in (out, err):
            path.touch()
        child = start(*argv, cwd=cwd, env=env, first=first, out=out, err=err)
        child.join(timeout)
        if child.exitcode is None:
            os.killpg(child.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(argv, timeout, out.read_bytes(), err.read_bytes())
        # Of several processes another may still be about to say why.
        deadline = time.monotonic() + 10
        while _lives(child.pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        return subprocess.CompletedProcess(argv, child.exitcode, out.read_text(), err.read_text())


def _lives(group: int) -> bool:
    """Tell whether a process of a group hasn't ended; one that nobody has waited for has."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


def start(
    *argv: str,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    first: Callable[[], None] | None = None,
    out: Path = Path(os.devnull),
    err: Path = Path(os.devnull),
) -> ForkServerProcess:
    """Start a command as `run` does; the child leads a process group, and writes its output to two files."""
    child = SERVER.Process(target=_be_command, args=(argv, cwd, {**os.environ, **(env or {})}, first, out, err))
    child.start()
    return child


def interpreter(*argv: str) -> list[str]:
    """Return the command line of `python -m sinkformer_pl ARGV` for a new process."""
    return [sys.executable, "-m", "sinkformer_pl", *argv]


class _ForkedTrial:
    """What `compare` asks of a process."""

    def __init__(self, command: Sequence[str], *, stdout: IO[str], env: Mapping[str, str], **_: Any) -> None:
        log, status = Path(stdout.name), 1
        self.pid = os.fork()
        if self.pid:
            return
        try:
            _be_command(command[3:], Path.cwd(), env, None, log, log, leads=False)
            status = 0
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # not by way of the threads of compare, which aren't there

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def fork_trials() -> None:
    """Let a `compare` of this process fork its trials; for the argument `first`."""
    from sinkformer_pl.comparison import schedule

    schedule.subprocess = SimpleNamespace(Popen=_ForkedTrial, STDOUT=subprocess.STDOUT)


def _be_command(
    argv: Sequence[str],
    cwd: Path,
    env: Mapping[str, str],
    first: Callable[[], None] | None,
    out: Path,
    err: Path,
    leads: bool = True,
) -> None:
    if leads:
        os.setsid()
    # As in a new interpreter: the start method of the workers of a loader, and what Lightning repeats for its ranks.
    multiprocessing.set_start_method(None, force=True)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for path, number in ((out, 1), (err, 2)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.path.insert(0, str(cwd))
    sys.argv = ["sinkformer_pl", *argv]
    if first is not None:
        first()
    if argv[0] == "-c":
        exec(argv[1], {"__name__": "__main__"})
    else:
        runpy.run_module("sinkformer_pl", run_name="__main__", alter_sys=True)
