"""Point clouds as text: a point in each line, with or without names of the columns."""

from pathlib import Path

import numpy as np

from sinkformer_pl.data.pointclouds.shape import Columns, FormatError, one_line
from sinkformer_pl.data.reading import open_file

_COMMENTS = ("#", "//")


def read_table(path: Path) -> Columns:
    """Read numbers between commas, semicolons or white space.

    Names are the first line, or the last comment (`#`, `//`) before the numbers where it has as many words as there are
    columns. Other comments at the beginning are skipped, and so is a line with the number of points.

    Args:
        path: a text file, such as .xyz, .txt or .csv.

    Raises:
        FormatError: no text, no numbers, lines of unequal length, or another number of lines than is said.
        UserError: a file that can't be read.
    """
    with open_file(path) as file:
        content = file.read()
    try:
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise FormatError("not a text file") from None
    lines = [line for line in lines if line]
    comments = []
    while lines and lines[0].startswith(_COMMENTS):
        comments.append(lines.pop(0).lstrip("#/").strip())
    if not lines:
        raise FormatError("the file is empty")
    names: list[str] | None = None
    if not all(map(_is_number, _split(lines[0]))):
        names = _split(lines.pop(0))
    if lines and len(_split(lines[0])) == 1:
        declared = lines.pop(0)
        if not declared.isdecimal() or len(declared) > 18 or int(declared) != len(lines):
            raise FormatError(f"{declared[:20]} points declared, but {len(lines)} lines follow")
    if not lines:
        raise FormatError("no points")
    delimiter = _delimiter(lines[0])
    try:
        values = np.loadtxt(lines, dtype=np.float64, delimiter=delimiter, comments=None, ndmin=2)
    except ValueError as error:
        raise FormatError(f"a line is not numbers ({one_line(error)})") from None
    if names is None and comments:
        words = _split(comments[-1])
        if len(words) == values.shape[1] and not any(map(_is_number, words)):
            names = words
    if names is not None and len(names) != values.shape[1]:
        raise FormatError(f"{len(names)} names ({', '.join(names)[:60]}) for {values.shape[1]} columns")
    names = names or [str(place) for place in range(1, values.shape[1] + 1)]
    if len(set(names)) < len(names):
        raise FormatError("two columns of one name")
    return dict(zip(names, values.T, strict=True))


def _delimiter(line: str) -> str | None:
    return next((mark for mark in ";," if mark in line), None)


def _split(line: str) -> list[str]:
    return [word.strip().strip('"') for word in line.split(_delimiter(line))]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
