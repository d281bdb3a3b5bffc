"""Labels in the columns of tables: from what a cell holds to a class, for all modalities."""

from collections.abc import Sequence
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor

from sinkformer_pl.data.columns import is_missing
from sinkformer_pl.data.table import Row, plain
from sinkformer_pl.errors import UserError


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
    # What differs from itself is JSON's NaN.
    if cell is None or cell != cell or isinstance(cell, (dict, list)) or not (label := plain(cell).strip()):
        raise UserError(f"{row.where}: column {column} has no label; give one or remove the line")
    if is_missing(label) and label not in (classes or ()):
        raise UserError(
            f"{row.where}: column {column} has {label!r}, which stands for no label; give one or remove "
            "the line, or if it is a class, name all by data.classes"
        )
    return label


def classes_of(rows: Sequence[Row], column: str) -> list[str]:
    """Return the classes that the labels of some rows name: sorted, as numbers where all are.

    Raises:
        UserError: a row without a label.
    """
    labels = {label_of(row, column, None) for row in rows}
    return sorted(labels, key=int) if all(map(is_number, labels)) else sorted(labels)


def targets_of(rows: Sequence[Row], column: str, classes: Sequence[str]) -> Tensor:
    """Return (n,) int64 places of the rows' labels in the classes; one warning counts labels with spaces around them.

    Raises:
        UserError: a row without a label, or one that is no class.
    """
    numbers = {label: number for number, label in enumerate(classes)}
    targets = []
    for row in rows:
        if (label := label_of(row, column, classes)) not in numbers:
            if len(classes) == 1:
                raise UserError(f"{row.table.parent}: one class, {classes[0]}; give data of two or more")
            raise UserError(
                f"{row.where}: column {column} has {label!r}, which is no class; the classes are "
                f"{', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}: correct it, or give data.classes"
            )
        targets.append(numbers[label])
    _warn_of_spaces(rows, column)
    return torch.tensor(targets, dtype=torch.int64)


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
