"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, TextIO, overload


@overload
def replacing(path: Path) -> AbstractContextManager[TextIO]: ...
@overload
def replacing(path: Path, mode: Literal["wb"]) -> AbstractContextManager[IO[bytes]]: ...
@contextmanager
def replacing(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[Any]:
    """Open a new file, text by default, which gets the name `path` when the block ends well; its folder is made.

    A process that is killed leaves the old file or the new one; a block that fails, the old one alone, and no folder
    that was made for it.
    """
    new = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        text: dict[str, Any] = {"newline": "", "encoding": "utf-8"} if mode == "w" else {}
        with part.open(mode, **text) as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        for folder in new:
            with suppress(OSError):  # there is something in it
                folder.rmdir()
