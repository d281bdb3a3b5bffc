"""One process at a time in a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import lock_descriptor

from sinkformer_pl.errors import UserError

_held: set[int] = set()


@contextmanager
def locked(path: Path, refusal: str) -> Iterator[int]:
    """Lock a file until this context or the process ends; it is made if there is none.

    A forked process, such as a loader's worker that outlives a killed training by seconds, doesn't keep the lock. One
    that is started with the descriptor (`pass_fds` of `subprocess`) does. File systems without locks keep nobody away.

    Args:
        path: the file, in the folder that is to be used by one process alone.
        refusal: error message if another process holds the lock.

    Yields:
        The descriptor of the open file.

    Raises:
        UserError: another process holds the lock.
        OSError: the file can't be made.
    """
    with path.open("a") as file:
        try:
            taken = lock_descriptor(file.fileno(), blocking=False)
        except OSError:
            taken = True
        if not taken:
            raise UserError(refusal)
        _held.add(file.fileno())
        try:
            yield file.fileno()
        finally:
            _held.discard(file.fileno())


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
