"""The Large Movie Review Dataset (Maas et al. 2011): its folder and its download."""

import http.client
import os
import tarfile
from pathlib import Path
from typing import Any

import torch

from sinkformer_pl.data.archives import folder_within, obtain
from sinkformer_pl.data.reading import files_ending, is_folder, warn_of_left_out
from sinkformer_pl.data.source import Source
from sinkformer_pl.data.texts.base import TextData, Texts, read_lines, read_utf8
from sinkformer_pl.errors import UserError

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
CHECKSUM = "md5:7c2ac02c03563afcf9b574c7e56c153a"
CLASSES = ("neg", "pos")
PARTS = ("train", "test")
LAYOUT = "train/pos, train/neg, test/pos and test/neg, in it or in its folder aclImdb"


class IMDb(TextData):
    """Film reviews, good or bad, in the layout of the official archive.

    Reviews are `train/pos/ID_RATING.txt` and so on, in `root` or in `root/aclImdb`. Where `train/urls_pos.txt` and
    `train/urls_neg.txt` are there, whose line ID names the film of a review, no film has reviews both in training and
    in validation.
    """

    def __init__(self, root: str | Path, *, download: bool = False, **kwargs: Any) -> None:
        """Look for the folder; nothing is read.

        Args:
            root: the folder.
            download: whether to fetch the official archive (80 MB) into `root` where that holds no reviews yet.
            **kwargs: what `TextData` takes.

        Raises:
            UserError: no reviews and no download, or an argument out of its range.
        """
        self.root = Path(root)
        self.download = download
        super().__init__(CLASSES, **kwargs)
        if not download:
            self._folder()

    def prepare_data(self) -> None:
        """Fetch what is missing; Lightning calls this in one process only."""
        if self.download and not _is_complete(self.root) and not _is_complete(self.root / "aclImdb"):
            fetch_imdb(self.root)

    def load(self) -> Source[Texts]:
        """Read the reviews."""
        folder = self._folder()
        warn_of_left_out(
            folder,
            [file for part in PARTS for name in CLASSES for file in files_ending(folder / part / name, ".txt")],
            lambda file: file.relative_to(folder).parts[:2] in [(part, name) for part in PARTS for name in CLASSES],
            f"reviews are files *.txt in {LAYOUT}",
        )
        return Source(train=_read(folder, "train"), test=_read(folder, "test"))

    def _folder(self) -> Path:
        for folder in (self.root, self.root / "aclImdb"):
            if _is_complete(folder):
                return folder
        if self.root.is_file():
            raise UserError(f"{self.root}: a file; unpack the archive and give the folder, or its folder aclImdb")
        if not self.root.exists():
            raise UserError(f"{self.root}: no such folder; give data.root, or data.download=true")
        raise UserError(f"{self.root}: no reviews; expected {LAYOUT}, or set data.download=true")


def fetch_imdb(root: Path) -> None:
    """Put the folder `root/aclImdb` there, from `root/aclImdb_v1.tar.gz` where that lies ready, else from the network.

    The folder appears complete or not at all.

    Raises:
        UserError: no network, an archive with another checksum, or no permission to write.
    """
    archive = root / URL.rpartition("/")[2]
    try:
        with folder_within(root) as folder:
            _extract(obtain(URL, CHECKSUM, archive, folder), folder)
            os.replace(folder / "aclImdb", root / "aclImdb")
    except tarfile.TarError as error:
        raise UserError(f"{archive}: cannot be unpacked ({error}); put {URL} there") from None
    except (OSError, EOFError, http.client.HTTPException) as error:
        raise UserError(f"{root}: cannot fetch the reviews ({error}); put {URL} there as {archive.name}") from None


def _extract(archive: Path, folder: Path) -> None:
    """Extract an archive, of which the filter refuses every member that leaves the folder."""
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


def _is_complete(folder: Path) -> bool:
    return all(is_folder(folder / part / name) for part in PARTS for name in CLASSES)


def _read(folder: Path, part: str) -> Texts:
    texts: list[str] = []
    targets: list[int] = []
    names: list[str] = []
    films: list[str] | None = []
    for target, name in enumerate(CLASSES):
        files = files_ending(folder / part / name, ".txt")
        urls = folder / part / f"urls_{name}.txt"
        lines = read_lines(urls) if urls.is_file() else None
        if lines is None:
            films = None
        for file in files:
            texts.append(read_utf8(file))
            targets.append(target)
            names.append(file.relative_to(folder).with_suffix("").as_posix())
            if films is not None and lines is not None:
                films.append(_film(file, lines, urls))
    if not texts:
        raise UserError(f"{folder / part}: no reviews in pos and neg; put some there, as files *.txt")
    return Texts(texts, torch.tensor(targets, dtype=torch.int64), names, films)


def _film(file: Path, lines: list[str], urls: Path) -> str:
    number = file.name.partition("_")[0]
    if not (number.isdecimal() and int(number) < len(lines)):
        raise UserError(f"{file}: no line of {urls} names its film; name it ID_RATING.txt, or remove {urls.name}")
    return lines[int(number)]
