"""Headers and labels of tables: what usually is wrong with them is named, or cleaned."""

import csv
from collections.abc import Sequence

from sinkformer_pl.errors import UserError

MISSING = ("nan", "<na>", "#n/a", "n/a", "nat", "null")
"""Words, in any case, that programs write for a value that isn't there."""

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}


def is_missing(label: str) -> bool:
    """Tell whether a label, without spaces around it, stands for none."""
    return not label or label.casefold() in MISSING


def require_line_ends(line: str, where: str) -> None:
    """Check that a first line isn't all of a file whose lines end as on old systems.

    Raises:
        UserError: a carriage return within the line.
    """
    if "\r" in line.rstrip("\r\n"):
        raise UserError(rf"{where}: its lines end in \r alone, as on old systems; save it with line ends \n or \r\n")


def find_columns(
    columns: Sequence[str], present: Sequence[str], where: str, remedy: str, *, numbered: bool = True
) -> dict[str, int]:
    """Find the places of some columns of a table, by name or by number.

    Args:
        columns: names that are needed; "1" is the first column, unless one is called so.
        present: names that there are.
        where: file and line, for messages.
        remedy: how to name columns.
        numbered: whether numbers count: the order of the columns has a meaning.

    Returns:
        For each of `columns` its place in `present`, from 0 on.

    Raises:
        UserError: names the column that is missing or there twice, or another separator by which they would be there.
    """
    places: dict[str, int] = {}
    for column in columns:
        if present.count(column) == 1:
            places[column] = present.index(column)
        elif numbered and column not in present and _is_place(column, len(present)):
            places[column] = int(column) - 1
        else:
            cause = "no column" if column not in present else "more than one column"
            raise UserError(
                f"{where}: {cause} {column}; it has {', '.join(present) or 'none'}: "
                # One cell is what a header is that is divided otherwise.
                f"{(other_separator(columns, present[0]) if len(present) == 1 else None) or remedy}"
            )
    return places


def other_separator(columns: Sequence[str], header: str) -> str | None:
    """Say by which character a header is divided, if some columns are in it then."""
    for delimiter, name in _DELIMITERS.items():
        cells = next(csv.reader([header], delimiter=delimiter), [])
        if set(columns) <= {cell.strip() for cell in cells}:
            return f"its columns are separated by {name}; save it with commas as .csv, or with tabs as .tsv"
    return None


def _is_place(column: str, number: int) -> bool:
    return column.isascii() and column.isdecimal() and len(column) < 9 and 1 <= int(column) <= number
