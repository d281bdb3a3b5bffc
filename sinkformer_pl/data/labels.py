"""Labels in the columns of tables: from what cells hold to classes, for all modalities."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from sinkformer_pl.data.columns import is_missing
from sinkformer_pl.data.table import Row, plain
from sinkformer_pl.errors import UserError

_HOLDS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}


@dataclass(frozen=True)
class Labels:
    """Where the rows of a table have their classes.

    Attributes:
        column: of the label; or several columns, one for each class, with 1 where it holds, else 0.
        separator: between the classes in a cell of the column; None where each row has one class.
    """

    column: str | Sequence[str] = "label"
    separator: str | None = None

    def __post_init__(self) -> None:
        """Refuse arguments that have no effect.

        Raises:
            UserError: names the argument.
        """
        if self.separator is not None and not isinstance(self.column, str):
            raise UserError(
                f"data.separator {self.separator}: it divides the labels of one column, and data.label names "
                f"{len(self.column)}; leave it out"
            )
        if self.separator == "" or not self.columns:
            name = "label" if self.separator is None else "separator"
            raise UserError(f"data.{name} is empty: give columns, or what stands between two labels, such as '|'")

    @property
    def columns(self) -> list[str]:
        """The columns that a table must have."""
        return [self.column] if isinstance(self.column, str) else list(self.column)

    @property
    def multi_label(self) -> bool:
        """Tell whether a row has any number of classes."""
        return self.separator is not None or not isinstance(self.column, str)

    def classes_of(self, rows: Sequence[Row]) -> list[str]:
        """Return the classes: the columns in their order; or all labels, sorted, as numbers where all are.

        Raises:
            UserError: a row without a label that needs one.
        """
        if not isinstance(self.column, str):
            return self.columns
        labels = {name for row in rows for name in self._names(row, None)}
        return sorted(labels, key=int) if all(map(is_number, labels)) else sorted(labels)

    def targets_of(self, rows: Sequence[Row], classes: Sequence[str]) -> Tensor:
        """Return the rows' targets: (n,) int64 places in the classes, or of multi-label rows (n, classes) bool.

        One warning counts single labels with spaces around them.

        Raises:
            UserError: a row without a label that needs one, one that is no class, or a cell that can't be read.
        """
        numbers = {label: number for number, label in enumerate(classes)}
        found = [self._names(row, classes) for row in rows]
        for row, names in zip(rows, found, strict=True):
            for name in names:
                if name not in numbers:
                    if len(classes) == 1:
                        raise UserError(f"{row.table.parent}: one class, {classes[0]}; give data of two or more")
                    raise UserError(
                        f"{row.where}: column {self.column} has {name!r}, which is no class; the classes are "
                        f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}: correct it, or give "
                        "data.classes"
                    )
        if not self.multi_label:
            _warn_of_spaces(rows, self.columns[0])
            return torch.tensor([numbers[name] for [name] in found], dtype=torch.int64)
        targets = torch.zeros(len(rows), len(classes), dtype=torch.bool)
        for place, names in enumerate(found):
            targets[place, [numbers[name] for name in names]] = True
        return targets

    def _names(self, row: Row, classes: Sequence[str] | None) -> list[str]:
        """Return the classes of a row; a word for a missing value is one only where `classes` has it."""
        if not isinstance(self.column, str):
            return [name for name in self.column if _holds(row, name)]
        if self.separator is None:
            return [label_of(row, self.column, classes)]
        cell = row.cells[self.column]
        parts = cell if isinstance(cell, list) else [] if cell is None else plain(cell).split(self.separator)
        names = [name for part in parts if (name := plain(part).strip())]
        for name in names:
            if is_missing(name) and name not in (classes or ()):
                raise UserError(
                    f"{row.where}: column {self.column} has {name!r}, which stands for no label; leave the cell empty "
                    "where no class holds, or if it is a class, name all by data.classes"
                )
        return names


def labels_from(column: str | int | Sequence[str | int], separator: str | None) -> Labels:
    """Return `Labels` of the arguments of a data module; columns are given by name or by number."""
    listed = isinstance(column, Sequence) and not isinstance(column, str)
    return Labels(tuple(map(str, column)) if listed else str(column), separator)  # type: ignore[arg-type]


def label_of(row: Row, column: str, classes: Sequence[str] | None) -> str:
    """Return the label of a row, without spaces around it.

    Args:
        row: the row.
        column: of the labels.
        classes: known names; a word for a missing value is a label only if it is one of them.

    Raises:
        UserError: there is no label.
    """
    cell = row.cells[column]
    if isinstance(cell, list):
        raise UserError(f"{row.where}: column {column} has a list; for any number of classes, give data.separator")
    # What differs from itself is JSON's NaN.
    if cell is None or cell != cell or isinstance(cell, dict) or not (label := plain(cell).strip()):
        raise UserError(f"{row.where}: column {column} has no label; give one or remove the line")
    if is_missing(label) and label not in (classes or ()):
        raise UserError(
            f"{row.where}: column {column} has {label!r}, which stands for no label; give one or remove "
            "the line, or if it is a class, name all by data.classes"
        )
    return label


def is_number(label: str) -> bool:
    """Tell whether a label is a whole number of a size that can be one."""
    # Python refuses to read a number of thousands of digits.
    return label.strip().removeprefix("-").isdecimal() and label.isascii() and len(label) < 19


def _warn_of_spaces(rows: Sequence[Row], column: str) -> None:
    spaced = [row for row in rows if isinstance(cell := row.cells[column], str) and cell != cell.strip()]
    if spaced:
        table: Path = spaced[0].table
        rank_zero_warn(
            f"{table}: {len(spaced)} of {len(rows)} labels have spaces around them, the first is "
            f"{spaced[0].cells[column]!r} in line {spaced[0].line}; they are left out"
        )


def _holds(row: Row, column: str) -> bool:
    text = plain(row.cells[column]).strip().lower()
    if text not in _HOLDS:
        raise UserError(
            f"{row.where}: column {column} has {plain(row.cells[column])!r}; give 1 where the class holds, else 0"
        )
    return _HOLDS[text]
