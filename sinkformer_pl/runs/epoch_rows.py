"""CSV files with rows for each epoch, of which a training that goes on drops those that it makes anew."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sinkformer_pl.runs.writing import replacing


def read_rows(path: Path) -> list[list[str]]:
    """All rows, that of the column names first; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Add rows; a new file gets the column names, of which `epoch` is the first, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows] if new else rows)


def keep_before(path: Path, epoch: int) -> None:
    """Drop the rows of this epoch and later ones, and broken ones; a killed process leaves the old file or the new."""
    columns, *rows = read_rows(path) or [[]]
    kept = [row for row in rows if len(row) == len(columns) and row[0].isdecimal() and int(row[0]) < epoch]
    if len(kept) == len(rows):
        return
    with replacing(path) as file:
        csv.writer(file).writerows([columns, *kept])
