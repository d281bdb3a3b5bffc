"""Write a CSV file that grows row by row, and from which a resumed training drops the rows that it makes anew."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sinkformer_pl.training.atomic_file import replacing


class CSVFile:
    """Rows by column name; a cell without a value is empty.

    A process that is killed leaves whole rows, and perhaps a part of the last one, which `keep` drops.

    Args:
        path: the file; its folder is made with the first row.
        sort: order the columns by their names; otherwise they stand in the order of their appearance.
    """

    def __init__(self, path: Path, *, sort: bool = False) -> None:
        self.path = path
        self.sort = sort
        self.columns, rows = self.read()
        self.length = len(rows)
        """Number of rows in the file."""

    def read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the columns and all rows; none where there is no file."""
        if not self.path.is_file():
            return [], []
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or []), list(reader)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; the file is written anew, as a whole, if they have columns that it lacks."""
        known = {*self.columns}
        new = dict.fromkeys(name for row in rows for name in row if name not in known)
        if new or not self.path.is_file():
            self._replace([*self.columns, *new], self.read()[1])
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerows(rows)
        self.length += len(rows)

    def keep(self, fits: Callable[[Mapping[str, str]], bool], most: int | None = None) -> None:
        """Drop incomplete rows and those that don't fit; of sorted columns also those that only they had.

        Args:
            fits: tells whether a row stays.
            most: look at so many rows, the first ones, and drop the others; None looks at all.
        """
        columns, rows = self.read()
        kept = [row for row in rows[:most] if None not in row and None not in row.values() and fits(row)]
        if len(kept) < len(rows):
            # Of sorted columns those come back in their places that a later row has again.
            used = [name for name in columns if not self.sort or any(row[name] for row in kept)]
            self._replace(used, kept)

    def _replace(self, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
        self.columns, self.length = sorted(columns) if self.sort else list(columns), len(rows)
        if not columns:
            self.path.unlink(missing_ok=True)
            return
        with replacing(self.path) as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


def before_epoch(epoch: int) -> Callable[[Mapping[str, str]], bool]:
    """Tell rows of earlier epochs from those of this one and later ones, by their column `epoch`."""
    return lambda row: row["epoch"].isdecimal() and int(row["epoch"]) < epoch
