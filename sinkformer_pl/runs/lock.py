"""One training in a folder at a time."""

from pathlib import Path
from typing import TextIO

from sinkformer_pl.errors import UserError

try:
    import fcntl
except ImportError:  # Not on Windows.
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


def hold(folder: Path) -> TextIO:
    """Keep other processes from training in a folder, until the file that this returns is closed or the process ends.

    Systems and file systems without locks keep nobody away.

    Args:
        folder: of a run.

    Raises:
        UserError: another process trains there.
        OSError: the file can't be made.
    """
    file = (folder / LOCK).open("a")
    if fcntl is None:
        return file
    try:
        # Not flock, which loader processes that outlive the training by seconds would hold on.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"{folder}: another process trains there; wait for its end, or end it") from None
    except OSError:
        pass
    return file
