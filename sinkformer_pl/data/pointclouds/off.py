"""A strict reader of .off files.

trimesh reads them, too, but as far as they go: without a look at the counts of the header, and not polygons of five
corners and more beside others.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sinkformer_pl.data.pointclouds.shape import COORDINATES, Columns, FormatError
from sinkformer_pl.data.reading import cause, open_file


def read_off(path: Path) -> tuple[Columns, NDArray[np.int64]]:
    """Read a file in the Object File Format.

    Read are also: comments and blank lines anywhere, a header glued to the counts (`OFF3514 3546 0`, as in many files
    of ModelNet), either kind of line end, polygons (cut into a fan of triangles) and colours after a face.

    Args:
        path: a text file.

    Returns:
        The coordinates, and the triangles in the order of the file's faces.

    Raises:
        FormatError: not an .off file, fewer or more lines than declared, values that are not numbers, no faces.
        UserError: a file that can't be read.
    """
    lines = _lines(path)
    vertices, faces = _counts(lines)
    points = _vertices(lines[:vertices])
    return dict(zip(COORDINATES, points.T, strict=True)), _triangles(lines[vertices : vertices + faces], vertices)


def _lines(path: Path) -> list[str]:
    """Return the lines that say something, without comments, and without the header's `OFF`."""
    with open_file(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError("not a text file") from None
    lines = text.splitlines()
    if "#" in text:
        lines = [line.partition("#")[0] for line in lines]
    lines = [line for line in lines if line and not line.isspace()]
    if not lines:
        raise FormatError("the file is empty")
    header = lines[0].strip()
    if not header.startswith("OFF"):
        raise FormatError(f"not an OFF file: it starts with {header[:20]!r} in place of 'OFF'")
    counts = header.removeprefix("OFF")
    return [counts, *lines[1:]] if counts else lines[1:]


def _is_count(token: str) -> bool:
    # Python refuses to read a number of thousands of digits.
    return token.isascii() and token.isdigit() and len(token) < 19


def _counts(lines: list[str]) -> tuple[int, int]:
    """Take the counts from the front of `lines` and hold them against the lines that are left."""
    header = lines.pop(0).split() if lines else []
    if len(header) not in (2, 3) or not all(_is_count(token) for token in header):
        raise FormatError(f"the counts of vertices, faces and edges are {' '.join(header)[:40]!r}")
    vertices, faces = int(header[0]), int(header[1])
    # Before anything is allocated by what a header claims.
    if vertices + faces != len(lines):
        raise FormatError(f"{vertices} vertices and {faces} faces declared, but {len(lines)} lines follow")
    if not faces:
        raise FormatError("no faces, so no surface to draw points from")
    return vertices, faces


def _vertices(lines: list[str]) -> NDArray[np.float64]:
    if not lines:
        raise FormatError("no vertices")
    try:
        vertices = np.loadtxt(lines, dtype=np.float64, comments=None, ndmin=2)
    except ValueError as error:
        # Behind the semicolon is advice about arguments of numpy.
        said = cause(error).partition(";")[0]
        raise FormatError(f"a vertex is not three numbers ({said})") from None
    if vertices.shape[1] != 3:
        raise FormatError(f"vertices have {vertices.shape[1]} numbers in place of 3")
    return vertices


def _triangles(lines: list[str], vertices: int) -> NDArray[np.int64]:
    rows = [line.split() for line in lines]
    triangles: list[NDArray[np.int64]] = []
    order: list[NDArray[np.int64]] = []
    for size in {row[0] for row in rows}:
        corners = int(size) if _is_count(size) else 0
        chosen = [index for index, row in enumerate(rows) if row[0] == size]
        shortest = min(chosen, key=lambda index: len(rows[index]))
        if corners < 3 or len(rows[shortest]) < corners + 1:
            raise FormatError(
                f"face {shortest} is {lines[shortest].strip()[:40]!r}: not a count (3 or more) of indices"
            )
        try:
            polygons = np.array([rows[index][1 : corners + 1] for index in chosen], dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise FormatError(f"a face has an index that is not a whole number ({error})") from None
        outside = ((polygons < 0) | (polygons >= vertices)).any(axis=1)
        if outside.any():
            face = chosen[int(outside.argmax())]
            raise FormatError(f"face {face} has an index outside 0 to {vertices - 1}: {lines[face].strip()[:40]!r}")
        for corner in range(1, corners - 1):
            triangles.append(polygons[:, [0, corner, corner + 1]])
            order.append(np.array(chosen))
    return np.concatenate(triangles)[np.argsort(np.concatenate(order), kind="stable")]
