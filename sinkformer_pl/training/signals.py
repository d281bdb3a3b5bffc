"""Signals that ask a training to end."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
"""Signals that end a training: of `kill`, of Ctrl-C, and that of schedulers some time before they kill."""


class Stopped(SystemExit):
    """Exit that a signal asked for; the exit status is 128 + its number, as shells have it.

    Attributes:
        line: what to tell the user.
    """

    def __init__(self, number: int, line: str) -> None:
        super().__init__(128 + number)
        self.line = line


class StopSignals:
    """Ends the process when a signal asks for it: at once, or as soon as a training has come to a good place.

    A second Ctrl-C ends it at once in any case.

    Attributes:
        deferred: whether a training looks at `received` itself; without one, a signal raises `Stopped`.
        received: the first signal that came, 0 before.
    """

    def __init__(self) -> None:
        self.deferred = False
        self.received = 0
        self._process = os.getpid()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals within this context; in the main thread, the only one that can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Handle the signals from now on, whoever did before."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # A process that was forked off, such as a loader's worker.
        if self.received:
            if number == signal.SIGINT:
                os.write(2, b"stopped at once\n")
                os._exit(128 + number)
            return
        self.received = number
        if not self.deferred:
            raise Stopped(number, f"stopped by {signal.Signals(number).name}")
