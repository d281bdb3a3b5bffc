"""Rows of tables of texts: .csv, .tsv and .jsonl files."""

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sinkformer_pl.data.columns import is_missing, other_separator, require_columns, require_line_ends
from sinkformer_pl.data.texts.base import read_lines, read_utf8
from sinkformer_pl.errors import UserError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")

_REMEDY = "name the columns by data.text, data.label and data.group"


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
    """Read the rows of a table that has all of `columns`; spaces around their names don't count.

    Raises:
        UserError: no such table, a missing column, or a row that is broken.
    """
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise UserError(f"{path}: not one of {', '.join(TABLE_SUFFIXES)}; give such a table")
    rows = list(_json_rows(path, columns) if suffix == ".jsonl" else _csv_rows(path, columns))
    if not rows:
        raise UserError(f"{path}: no rows; give a table with texts")
    return rows


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    # "\n" alone ends a line, as for the other kinds of files; the reader takes care of those inside of quotes.
    content = read_utf8(path).split("\n")
    require_line_ends(content[0], str(path))
    lines = (line + "\n" for line in content)
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
                require_columns(columns, header, f"{path}, line {line}", _REMEDY)
            elif len(cells) not in (0, len(header)):
                raise UserError(
                    f"{path}, line {line}: {len(cells)} columns, but line 1 names {len(header)}; put texts with "
                    "separators in them into quotes"
                )
            elif cells:
                yield Row(line, dict(zip(header, cells, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        if header is None and (hint := other_separator(columns, content[0])):
            raise UserError(f"{path}, line {line}: {hint}") from None
        raise UserError(f"{path}, line {line}: {error}; repair the row's quotes") from None
    finally:
        csv.field_size_limit(limit)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"{key} stands {count} times in one object")
    return dict(pairs)


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for line, content in enumerate(read_lines(path), 1):
        if not content.strip():
            continue
        try:
            cells = json.loads(content, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            cause = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{path}, line {line}: no JSON ({cause}); give one object a line") from None
        if not isinstance(cells, dict):
            raise UserError(f"{path}, line {line}: a {type(cells).__name__}; give one object a line")
        require_columns(columns, list(cells), f"{path}, line {line}", _REMEDY)
        yield Row(line, cells)
