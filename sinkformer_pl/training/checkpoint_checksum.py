"""A checksum inside a checkpoint: SHA-256 in the comment of its ZIP archive, over every other byte of the file.

An archive ends with a record whose last field is the length of a comment, and the comment
(https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.16). `torch.save` leaves it empty, and `torch.load`,
`zipfile` and `unzip` take no notice of one; so a file with a checksum stays an ordinary checkpoint.
"""

import hashlib
import zipfile
from typing import Any, BinaryIO

import torch

_MARK = b"sinkformer_pl sha256 "
_LENGTH = len(_MARK) + 2 * hashlib.sha256().digest_size
_END = b"PK\x05\x06"
_END_SIZE = 22
_CHUNK = 2**20


class DamagedError(Exception):
    """Error: the bytes of a file aren't those that were written; the message says how that shows."""


def write(content: Any, file: BinaryIO) -> None:
    """Save what `torch.save` can save, with a checksum.

    Args:
        content: what to save.
        file: an empty file, open for reading and writing.

    Raises:
        OSError: writing failed.
    """
    writer = _Writer(file)
    torch.save(content, writer)  # type: ignore[arg-type]  # It asks for `write` and `flush` alone.
    if writer.error is not None:
        raise writer.error
    file.seek(-_END_SIZE, 2)
    if not _ends_plainly(file.read()):
        raise RuntimeError("torch.save no longer writes an archive without a comment: it has no place for a checksum")
    file.seek(-2, 2)
    file.write(_LENGTH.to_bytes(2, "little") + _MARK + writer.digest.hexdigest().encode())


def verify(file: BinaryIO) -> bool:
    """Check a file against its checksum; one without, of plain Lightning or PyTorch, against the CRC-32 of its parts.

    Args:
        file: open for reading.

    Returns:
        Whether there was anything to check against.

    Raises:
        DamagedError: it differs, or the end of the file is missing.
    """
    size = file.seek(0, 2)
    file.seek(max(size - _LENGTH - _END_SIZE, 0))
    tail = file.read()
    end, mark = tail[:-_LENGTH], tail[-_LENGTH:]
    if mark.startswith(_MARK):
        if end[-2:] != _LENGTH.to_bytes(2, "little"):
            raise DamagedError("its end is altered")
        if _digest(file, size - _LENGTH - 2) != mark.removeprefix(_MARK):
            raise DamagedError("its bytes don't match its checksum")
        return True
    file.seek(0)
    if file.read(2) != _END[:2]:
        return False
    # A comment that is cut off or altered counts, too: torch.save writes none.
    if not _ends_plainly(tail[-_END_SIZE:]):
        raise DamagedError("its end is missing or altered")
    return _verify_parts(file)


class _Writer:
    """File for `torch.save` that hashes the bytes on their way.

    An exception would reach `torch.save` through C++ and come out as another one, so it is kept instead.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.error: BaseException | None = None

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                self.file.write(data)
                self.digest.update(data)
            except BaseException as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        pass


def _ends_plainly(end: bytes) -> bool:
    return end.startswith(_END) and end.endswith(b"\0\0")


def _digest(file: BinaryIO, length: int) -> bytes:
    """Return the SHA-256 of the first `length` bytes and the length of an empty comment: of what `torch.save` wrote."""
    digest = hashlib.sha256()
    file.seek(0)
    while length and (chunk := file.read(min(_CHUNK, length))):
        digest.update(chunk)
        length -= len(chunk)
    digest.update(b"\0\0")
    return digest.hexdigest().encode()


def _verify_parts(file: BinaryIO) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            if not any(part.CRC for part in archive.infolist()):
                return False  # torch.serialization.set_crc32_options(False)
            part = archive.testzip()
    except Exception as error:  # Altered headers make zipfile raise anything.
        raise DamagedError(f"its archive is broken ({error})") from None
    if part is not None:
        raise DamagedError(f"the bytes of its part {part} don't match their CRC-32")
    return True
