"""Rows of tables as they are read: .csv, .tsv, .jsonl and Parquet files, and saved data sets."""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from sinkformer_pl.data.arrow import PARQUET, arrow_rows, is_saved_dataset
from sinkformer_pl.data.columns import find_columns, other_separator, require_line_ends
from sinkformer_pl.data.reading import decoded_lines, is_folder, open_file
from sinkformer_pl.errors import UserError

SEPARATED = (".csv", ".tsv")
TABLE_SUFFIXES = (*SEPARATED, ".jsonl", PARQUET)


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        table: the file or folder.
        line: where it begins, from 1 on; of tables without lines its number.
        cells: values by the names of their columns, and by the names that were asked for; text, or of .jsonl and
            Parquet anything.
    """

    table: Path
    line: int
    cells: dict[str, Any]

    @property
    def where(self) -> str:
        """Table and line, for messages."""
        unit = "line" if self.table.suffix.lower() in (*SEPARATED, ".jsonl") else "row"
        return f"{self.table}, {unit} {self.line}"


def plain(cell: Any) -> str:
    """Return a cell as text: as JSON what JSON has, such as true."""
    return json.dumps(cell, default=str) if isinstance(cell, bool | int | float | list | dict | None) else str(cell)


def is_table(path: Path) -> bool:
    """Tell whether something is a table, by the suffix of a file or by what is in a folder."""
    return is_saved_dataset(path) or (path.suffix.lower() in TABLE_SUFFIXES and not is_folder(path))


def read_table(path: Path, columns: Sequence[str], remedy: str, *, header: bool = True) -> list[Row]:
    """Read all rows of a table, as `table_rows` yields them.

    Raises:
        UserError: as `table_rows`, or no rows.
    """
    rows = list(table_rows(path, columns, remedy, header=header))
    if not rows:
        raise UserError(f"{path}: no rows; give a table with some")
    return rows


def table_rows(path: Path, columns: Sequence[str], remedy: str, *, header: bool = True) -> Iterator[Row]:
    """Yield the rows of a table that has all of `columns`, as they are read; spaces around their names don't count.

    Args:
        path: of the table.
        columns: names of those that are needed, or their numbers, from 1 on.
        remedy: how to name columns, for messages.
        header: whether the first row of a .csv or .tsv file names the columns; else numbers alone do.

    Raises:
        UserError: no such table, a missing column, or a row that is broken.
    """
    suffix = path.suffix.lower()
    saved = is_saved_dataset(path)
    if not saved and suffix not in TABLE_SUFFIXES:
        raise UserError(f"{path}: not one of {', '.join(TABLE_SUFFIXES)}; give such a table")
    if not header and suffix not in SEPARATED:
        raise UserError(f"{path}: its columns have names; leave out data.header, which is of {', '.join(SEPARATED)}")
    if saved or suffix == PARQUET:
        for line, cells in enumerate(arrow_rows(path, columns, remedy), 1):
            yield Row(path, line, cells)
        return
    with open_file(path) as file:
        if suffix == ".jsonl":
            yield from _json_rows(file, path, columns, remedy)
        else:
            yield from _csv_rows(file, path, columns, remedy, header)


def _csv_rows(file: IO[bytes], path: Path, columns: Sequence[str], remedy: str, header: bool) -> Iterator[Row]:
    # "\n" alone ends a line, as for the other kinds of files; the reader takes care of those inside of quotes.
    content = decoded_lines(file, str(path))
    first = next(content, "")
    require_line_ends(first, str(path))
    lines = (line + "\n" for line in chain([first], content))
    if path.suffix.lower() == ".tsv":
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines, strict=True)
    limit = csv.field_size_limit(sys.maxsize)
    names: list[str] | None = None
    places: dict[str, int] = {}
    line = 1
    try:
        for cells in reader:
            if names is None:
                names = [name.strip() if header else str(place) for place, name in enumerate(cells, 1)]
                places = find_columns(columns, names, f"{path}, line {line}", remedy)
                if header:
                    line = reader.line_num + 1
                    continue
            if len(cells) not in (0, len(names)):
                raise UserError(
                    f"{path}, line {line}: {len(cells)} columns, but line 1 {'names' if header else 'has'} "
                    f"{len(names)}; put texts with separators in them into quotes"
                )
            if cells:
                named = dict(zip(names, cells, strict=True))
                yield Row(path, line, named | {column: cells[place] for column, place in places.items()})
            line = reader.line_num + 1
    except csv.Error as error:
        if names is None and (hint := other_separator(columns, first)):
            raise UserError(f"{path}, line {line}: {hint}") from None
        raise UserError(f"{path}, line {line}: {error}; repair the row's quotes") from None
    finally:
        csv.field_size_limit(limit)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{key} stands {count} times in one object")
    return dict(pairs)


def _json_rows(file: IO[bytes], path: Path, columns: Sequence[str], remedy: str) -> Iterator[Row]:
    for line, content in enumerate(decoded_lines(file, str(path)), 1):
        if line == 1:
            require_line_ends(content, str(path))
        if not content.strip():
            continue
        try:
            cells = json.loads(content, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            cause = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{path}, line {line}: no JSON ({cause}); give one object a line") from None
        if not isinstance(cells, dict):
            raise UserError(f"{path}, line {line}: a {type(cells).__name__}; give one object a line")
        find_columns(columns, list(cells), f"{path}, line {line}", remedy, numbered=False)
        yield Row(path, line, cells)
