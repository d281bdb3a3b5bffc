"""A stream of raw inputs from what is on the disk: files, folders, lines, tables, arrays; nothing is read ahead."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from pytorch_lightning.utilities import rank_zero_warn
from torchvision.datasets.folder import IMG_EXTENSIONS

from sinkformer_pl.data.pointclouds.formats import SUFFIXES
from sinkformer_pl.data.reading import cause, decoded_lines, files_below, is_folder, open_file
from sinkformer_pl.data.table import SEPARATED, is_table, table_rows
from sinkformer_pl.errors import UserError
from sinkformer_pl.inference.inputs import Item

STANDARD_INPUT = "-"
ENDINGS: dict[str, Sequence[str]] = {
    "images": IMG_EXTENSIONS,
    "texts": (".txt", ".text", ".md", ".rst"),
    "point clouds": SUFFIXES,
}
"""Of the files in folders, by the kind of inputs; a file that is named itself may be called as it likes."""


@dataclass(frozen=True)
class Sources:
    """What to read, and how.

    Attributes:
        paths: files and folders, or "-" for standard input: a text in each line, or a path for other inputs.
        kind: of the model's preprocessing.
        classes: of the model; the nearest folder of such a name labels a file in a folder.
        lines: whether each line of a text file, in folders too, is a text.
        columns: of the texts in tables, one, or two of pairs; in lines a tab stands between the texts of a pair.
        label: column of labels; None for no labels.
        header: whether the first row of a .csv or .tsv table names the columns.
    """

    paths: Sequence[str]
    kind: str
    classes: Sequence[str] = ()
    lines: bool = False
    columns: Sequence[str] = ("text",)
    label: str | None = None
    header: bool = True

    def items(self, *, warn: bool = True) -> Iterator[Item]:
        """Yield the inputs in order; an error that ends the source comes last, as an item.

        Args:
            warn: whether files of folders that are left out are said; one process of several does.
        """
        try:
            for path in self.paths:
                yield from self._items(path, warn)
        except UserError as error:
            yield Item("", error, last=True)

    def _items(self, name: str, warn: bool) -> Iterator[Item]:
        if name == STANDARD_INPUT:
            yield from self._in_standard_input(warn)
        elif self.kind == "texts" and is_table(Path(name)):
            yield from self._in_table(Path(name))
        elif is_folder(Path(name)):
            yield from self._in_folder(Path(name), warn)
        elif self.kind != "texts" and Path(name).suffix.lower() == ".npy":
            yield from self._in_array(Path(name))
        else:
            yield from self._in_file(Path(name))

    def _in_standard_input(self, warn: bool) -> Iterator[Item]:
        for number, line in _lines(sys.stdin.buffer, "standard input"):
            if self.kind == "texts":
                yield Item(f"{STANDARD_INPUT}:{number}", self._of_line(line))
            elif line in ("", STANDARD_INPUT):
                yield Item(f"{STANDARD_INPUT}:{number}", UserError(f"{line!r} is no file; give a path in each line"))
            else:
                yield from self._items(line, warn)

    def _in_file(self, path: Path, label: str | None = None) -> Iterator[Item]:
        if self.lines:
            with open_file(path) as file:
                for number, line in _lines(file, str(path)):
                    yield Item(f"{path}:{number}", self._of_line(line), label)
        else:
            yield Item(str(path), path, label)

    def _in_folder(self, folder: Path, warn: bool) -> Iterator[Item]:
        used, left_out, first = 0, 0, ""
        for file in files_below(folder):
            if file.name.lower().endswith(tuple(ENDINGS[self.kind])):
                used += 1
                places = [folder.resolve().name, *file.parent.relative_to(folder).parts]
                label = next((place for place in reversed(places) if place in self.classes), None)
                yield from self._in_file(file, label)
            else:
                left_out, first = left_out + 1, first or str(file.relative_to(folder))
        endings = ", ".join(ENDINGS[self.kind])
        if not used:
            found = f" among {left_out} files, such as {first}" if left_out else ": the folder is empty"
            raise UserError(f"{folder}: no {self.kind}{found}; give files that end in {endings}, or name a file itself")
        if left_out and warn:
            number = "1 file is" if left_out == 1 else f"{left_out} files are"
            rank_zero_warn(f"{folder}: {number} left out, the first is {first}; {self.kind} end in {endings}")

    def _in_table(self, path: Path) -> Iterator[Item]:
        columns = [*self.columns] if self.label is None else [*self.columns, self.label]
        remedy = f"name the columns by {'--text' if len(self.columns) == 1 else '--text_columns'} and --label"
        header = self.header or path.suffix.lower() not in SEPARATED
        for row in table_rows(path, columns, remedy, header=header):
            label = None if self.label is None else row.cells[self.label]
            known = label is not None and str(label).strip()
            texts = tuple(row.cells[column] for column in self.columns)
            raw = texts[0] if len(texts) == 1 else texts
            yield Item(f"{path}:{row.line}", raw, str(label).strip() if known else None)

    def _of_line(self, line: str) -> str | tuple[str, ...]:
        return line if len(self.columns) == 1 else tuple(line.split("\t"))

    def _in_array(self, path: Path) -> Iterator[Item]:
        try:
            open_file(path).close()
            # One sample at a time is read from the disk.
            array = np.load(path, mmap_mode="r")
        except UserError as error:
            yield Item(str(path), error)
            return
        except Exception as error:
            problem = UserError(f"{path}: cannot be read ({cause(error)}); give a complete .npy file")
            yield Item(str(path), problem)
            return
        several = array.ndim == 3 if self.kind == "point clouds" else array.ndim == 4
        for place, sample in enumerate(array if several else [array]):
            yield Item(f"{path}:{place}" if several else str(path), np.asarray(sample))


def _lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    r"""Yield the numbers and texts of lines, which end in "\n" or "\r\n"."""
    for number, line in enumerate(decoded_lines(file, name), 1):
        yield number, line.removesuffix("\r")
