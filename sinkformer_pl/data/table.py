"""Rows of tables, .csv, .tsv and .jsonl files, as they are read."""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from sinkformer_pl.data.columns import is_missing, other_separator, require_columns, require_line_ends
from sinkformer_pl.data.reading import decoded_lines, open_file
from sinkformer_pl.errors import UserError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")

REMEDY = "name the columns by data.text, data.label and data.group"
"""Of texts to train on, where a column isn't there."""


class Row(NamedTuple):
    """A row of a table.

    Attributes:
        line: where it begins, from 1 on.
        cells: values by the names of their columns; text, or of .jsonl anything.
    """

    line: int
    cells: dict[str, Any]


def plain(cell: Any) -> str:
    """Return a cell as text."""
    return cell if isinstance(cell, str) else json.dumps(cell)


def label_of(row: Row, column: str, path: Path, classes: Sequence[str] | None) -> str:
    """Return the label of a row, without spaces around it.

    Args:
        row: the row.
        column: of the labels.
        path: of the table, for messages.
        classes: known names; a word for a missing value is a label only if it is one of them.

    Raises:
        UserError: there is no label.
    """
    cell = row.cells[column]
    # What differs from itself is JSON's NaN.
    if cell is None or cell != cell or isinstance(cell, (dict, list)) or not (label := plain(cell).strip()):
        raise UserError(f"{path}, line {row.line}: column {column} has no label; give one or remove the line")
    if is_missing(label) and label not in (classes or ()):
        raise UserError(
            f"{path}, line {row.line}: column {column} has {label!r}, which stands for no label; give one or remove "
            "the line, or if it is a class, name all by data.classes"
        )
    return label


def read_table(path: Path, columns: Sequence[str]) -> list[Row]:
    """Read all rows of a table, as `table_rows` yields them.

    Raises:
        UserError: as `table_rows`, or no rows.
    """
    rows = list(table_rows(path, columns))
    if not rows:
        raise UserError(f"{path}: no rows; give a table with texts")
    return rows


def table_rows(path: Path, columns: Sequence[str], remedy: str = REMEDY) -> Iterator[Row]:
    """Yield the rows of a table that has all of `columns`, as they are read; spaces around their names don't count.

    Args:
        path: of the table.
        columns: names of those that are needed.
        remedy: how to name columns, for messages.

    Raises:
        UserError: no such table, a missing column, or a row that is broken.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise UserError(f"{path}: not one of {', '.join(TABLE_SUFFIXES)}; give such a table")
    with open_file(path) as file:
        yield from (_json_rows if suffix == ".jsonl" else _csv_rows)(file, path, columns, remedy)


def _csv_rows(file: IO[bytes], path: Path, columns: Sequence[str], remedy: str) -> Iterator[Row]:
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
    header: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            if header is None:
                header = [name.strip() for name in cells]
                require_columns(columns, header, f"{path}, line {line}", remedy)
            elif len(cells) not in (0, len(header)):
                raise UserError(
                    f"{path}, line {line}: {len(cells)} columns, but line 1 names {len(header)}; put texts with "
                    "separators in them into quotes"
                )
            elif cells:
                yield Row(line, dict(zip(header, cells, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        if header is None and (hint := other_separator(columns, first)):
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
        require_columns(columns, list(cells), f"{path}, line {line}", remedy)
        yield Row(line, cells)
