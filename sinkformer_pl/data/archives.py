"""Published archives: from where they lie ready or from the network, never unverified."""

import hashlib
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sinkformer_pl.data.reading import open_file
from sinkformer_pl.errors import UserError


def obtain(url: str, checksum: str, archive: Path, folder: Path) -> Path:
    """The archive, its checksum verified.

    Args:
        url: where it is published.
        checksum: "ALGORITHM:HEX", of an algorithm that hashlib has.
        archive: where it may lie ready.
        folder: where a download goes otherwise.

    Returns:
        `archive`, or the file in `folder`.

    Raises:
        UserError: another checksum: damaged, incomplete or not the published archive; or no file.
        OSError: no network, or no permission to read or write.
        http.client.HTTPException: a broken answer.
    """
    ready = archive.exists()
    source = archive if ready else _download(url, folder / archive.name)
    algorithm, _, wanted = checksum.partition(":")
    with open_file(source) as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found == wanted:
        return source
    cause = f"its {algorithm.upper()} is {found}, not {wanted}: damaged or incomplete"
    if ready:
        raise UserError(f"{archive}: {cause}; put {url} there, or unpack it yourself if it is meant to be another")
    raise UserError(f"{url}: {cause}; try again, or put it there as {archive}")


@contextmanager
def folder_within(root: Path) -> Iterator[Path]:
    """A folder for what isn't complete yet, on the disk of `root`, which is made where missing; removed at the end.

    Raises:
        UserError: no folder can be made there.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=root, prefix=".download-")
    except OSError as error:
        raise UserError(f"{root}: can't be written ({error.strerror}); give another data.root") from None
    with folder as name:
        yield Path(name)


def _download(url: str, target: Path) -> Path:
    with urllib.request.urlopen(url, timeout=60) as response, target.open("wb") as file:
        shutil.copyfileobj(response, file)
    return target
