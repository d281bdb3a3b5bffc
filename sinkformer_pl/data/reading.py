"""Files and folders of the user's: what can't be read is refused in one line, rather than waited for or left out."""

import contextlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from io import BufferedReader
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_warn

from sinkformer_pl.errors import UserError


def cause(error: Exception) -> str:
    """Say in one line what an error of another library says; without the path that the operating system repeats."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


def is_utf8(name: object) -> bool:
    """Whether a name can be written to a file; one read from a disk of another encoding can't."""
    try:
        str(name).encode()
    except UnicodeEncodeError:
        return False
    return True


def open_file(path: Path) -> BufferedReader:
    """Open a file for reading, and nothing else: a pipe would be waited for, a device has no end.

    Raises:
        UserError: no such file, no regular one, or one that can't be read.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file"
            raise UserError(f"{path}: {what}; replace or remove it")
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; put it there, or correct data.root or the file's name") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def decoded_lines(file: Iterable[bytes], where: str) -> Iterator[str]:
    r"""Decode lines of UTF-8 as they are read; "\n" alone ends a line, and a byte order mark is dropped.

    Args:
        file: a binary file, or other lines of bytes.
        where: its name, for messages.

    Yields:
        Each line without its "\n".

    Raises:
        UserError: bytes that aren't UTF-8.
    """
    place = 0
    for number, line in enumerate(file, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            at = f"byte {place + error.start}, line {number} (0x{line[error.start]:02x})"
            raise UserError(f"{where}: not UTF-8 at {at}; save it as UTF-8") from None
        place += len(line)
        yield (text.removeprefix("\ufeff") if number == 1 else text).removesuffix("\n")


def is_folder(path: Path) -> bool:
    """Whether there is a folder of this name; unlike `Path.is_dir` on some versions, always in one line.

    Raises:
        UserError: one that may not be looked at.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last for a name that no file can have
        return False
    except OSError as error:
        raise _unreadable(path, error) from None


def list_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return the folders and all else in a folder, each sorted by name; what is hidden is left out.

    Raises:
        UserError: it can't be read, or has a name that isn't UTF-8, which no prediction file could hold.
    """
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        raise _unreadable(Path(error.filename or folder), error) from None
    for name, _ in found:
        if not is_utf8(name):
            shown = os.fsencode(folder / name).decode("utf-8", "backslashreplace")
            raise UserError(f"{shown}: a name that isn't UTF-8; rename it")
    return [folder / name for name, deeper in found if deeper], [folder / name for name, deeper in found if not deeper]


def files_ending(folder: Path, suffix: str) -> list[Path]:
    """Return what lies in a folder under a name that ends so, in any case, sorted; errors as of `list_folder`."""
    folders, files = list_folder(folder)
    return sorted(path for path in folders + files if path.suffix.lower() == suffix)


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files at any depth, those of a folder before those of its folders; links are followed.

    Raises:
        UserError: a folder that can't be read, or a link to one that it lies in.
    """
    folders, files = list_folder(folder)
    yield from files
    for deeper in folders:
        if deeper.is_symlink() and folder.resolve().is_relative_to(deeper.resolve()):
            raise UserError(f"{deeper}: a link to a folder that it lies in; remove it")
        yield from files_below(deeper)


def warn_of_left_out(root: Path, used: Iterable[Path], matters: Callable[[Path], bool], expected: str) -> None:
    """Say in one warning how many files at any depth of a data folder aren't used, and which is the first.

    Args:
        root: the folder. Folders in it that can't be read are passed over; those of the data are refused before.
        used: the files that are used.
        matters: whether a file that isn't used is counted.
        expected: how the files that are used lie and end, for the message.
    """
    known = set(used)
    folders, others = list_folder(root)
    for folder in folders:
        with contextlib.suppress(UserError):
            others += files_below(folder)
    others = [file for file in others if file not in known and matters(file)]
    if others:
        number = "1 file is" if len(others) == 1 else f"{len(others)} files are"
        rank_zero_warn(f"{root}: {number} left out, the first is {others[0].relative_to(root)}; {expected}")


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: can't be read ({error.strerror}); give one that can, or remove it")
