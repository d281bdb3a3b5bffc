"""The tables of a data set: one for each split, or one with a column of splits."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sinkformer_pl.data.arrow import class_names, is_saved_dataset
from sinkformer_pl.data.dataset import Split
from sinkformer_pl.data.labels import Labels
from sinkformer_pl.data.table import TABLE_SUFFIXES, Row, read_table
from sinkformer_pl.errors import UserError

SPLITS: tuple[Split, ...] = ("train", "test", "val")


class Part(NamedTuple):
    """The rows of a split.

    Attributes:
        name: of their table, below `folder`.
        folder: of the data set.
        rows: in their order.
    """

    name: str
    folder: Path
    rows: Sequence[Row]

    @property
    def table(self) -> Path:
        """The file or folder."""
        return self.folder / self.name

    @property
    def names(self) -> list[str]:
        """Name each row by its table and line."""
        return [f"{self.name}:{row.line}" for row in self.rows]


@dataclass(frozen=True)
class SplitTables:
    """Where the samples of each split are listed, with their labels.

    A table is a .csv, .tsv, .jsonl or .parquet file, or a folder that `save_to_disk` of Hugging Face's `datasets`
    wrote. Columns are given by name or by number, from 1 on.

    Attributes:
        root: the folder of the tables; or one table, with a column of splits.
        train: name of the training table, which may lack its suffix where one file alone has that name.
        test: name of the test table.
        val: name of the validation table; None to divide validation from training.
        split: column of the splits, "train", "test" and perhaps "val", where `root` is a table; None is "split".
        labels: where the classes of a row are.
        header: whether the first row of a .csv or .tsv file names the columns.
        remedy: how to name columns, for messages.
    """

    root: Path
    train: str = "train"
    test: str = "test"
    val: str | None = None
    split: str | None = None
    labels: Labels = field(default_factory=Labels)
    header: bool = True
    remedy: str = ""

    def __post_init__(self) -> None:
        """Refuse arguments that have no effect.

        Raises:
            UserError: names the argument.
        """
        if not self.single and self.split is not None:
            raise UserError(
                f"data.split is {self.split}, but data.root, {self.root}, is no table; give the table as data.root, or "
                "leave data.split out"
            )
        for name in SPLITS if self.single else ():
            if getattr(self, name) != getattr(SplitTables, name):
                raise UserError(
                    f"data.{name} is {getattr(self, name)}, but data.root, {self.root}, is a table with a column of "
                    "splits; leave it out, or give the folder of the tables as data.root"
                )

    @property
    def single(self) -> bool:
        """Tell whether one table has all splits."""
        return os.path.isfile(self.root) or is_saved_dataset(self.root)

    def classes(self, columns: Sequence[str] = ()) -> list[str]:
        """Find the classes: those that the training table's own types name, else its labels, sorted.

        Args:
            columns: further ones that it must have.

        Raises:
            UserError: a table that can't be read, or without labels; nothing left for validation, since each row has
                another label.
        """
        parts = self.read(columns, only=None if self.single else "train")
        table, rows = parts["train"].table, parts["train"].rows
        single = not self.labels.multi_label
        if single and (named := class_names(table, self.labels.columns[0])) is not None:
            return named
        classes = self.labels.classes_of(rows)
        if single and self.val is None and "val" not in parts and len(classes) == len(rows) > 1:
            raise UserError(
                f"{table}: column {self.labels.column} has another label in each row, so that nothing is left for "
                "validation; give more samples, or name the column of labels by data.label"
            )
        return classes

    def read(
        self, columns: Sequence[str], *, of_training: Sequence[str] = (), only: Split | None = None
    ) -> dict[Split, Part]:
        """Read the rows of each split, of "val" where it has some of its own.

        Args:
            columns: those that are needed, beside the labels.
            of_training: further ones of the training table.
            only: the split that is read, None for all.

        Raises:
            UserError: a table that is missing, can't be read or lacks a column; a split without rows.
        """
        if self.single:
            return self._divided([*columns, *of_training], only)
        tables: dict[Split, str | None] = {"train": self.train, "test": self.test, "val": self.val}
        parts: dict[Split, Part] = {}
        for split, given in tables.items():
            if given is None or only not in (None, split):
                continue
            name = self._name(given)
            path = self.root / name
            wanted = [*columns, *self.labels.columns, *(of_training if split == "train" else ())]
            parts[split] = Part(name, self.root, read_table(path, wanted, self.remedy, header=self.header))
        return parts

    def _divided(self, columns: Sequence[str], only: Split | None) -> dict[Split, Part]:
        column = self.split or "split"
        rows = read_table(self.root, [*columns, *self.labels.columns, column], self.remedy, header=self.header)
        parts: dict[Split, list[Row]] = {split: [] for split in SPLITS}
        for row in rows:
            named = str(row.cells[column]).strip()
            if named not in parts:
                raise UserError(f"{row.where}: column {column} has {named[:20]!r}; give one of {', '.join(SPLITS)}")
            parts[named].append(row)  # type: ignore[index]
        for split in SPLITS[:2]:
            if not parts[split]:
                raise UserError(f"{self.root}: no row of split {split} in column {column}; give some")
        return {
            split: Part(self.root.name, self.root.parent, chosen)
            for split, chosen in parts.items()
            if chosen and only in (None, split)
        }

    def _name(self, given: str) -> str:
        path = self.root / given
        if path.suffix.lower() in TABLE_SUFFIXES or os.path.isfile(path) or is_saved_dataset(path):
            return given
        found = [f"{given}{suffix}" for suffix in TABLE_SUFFIXES if os.path.isfile(f"{path}{suffix}")]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{self.root}: {' and '.join(found)}; say which, such as --data.train {found[0]}")
        raise UserError(
            f"{path}: no such table; put {given}{TABLE_SUFFIXES[0]} there (or {', '.join(TABLE_SUFFIXES[1:])}, or a "
            "folder of save_to_disk), or correct data.root or the table's name"
        )
