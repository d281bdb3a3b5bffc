"""Triangle meshes: a strict reader of .off files, and points drawn from their surface."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinkformer_pl.data.reading import cause, open_file
from sinkformer_pl.errors import UserError

LARGEST = 1e15
"""Of a coordinate: sums of squares of more overflow in single precision."""


class Mesh(NamedTuple):
    """A surface made of triangles.

    Attributes:
        vertices: (V, 3) float64, all finite.
        faces: (F, 3) int64 indices of vertices, F >= 1.
    """

    vertices: NDArray[np.float64]
    faces: NDArray[np.int64]


def read_off(path: str | Path) -> Mesh:
    """Read an .off file.

    Read are also: comments and blank lines anywhere, a header glued to the counts (`OFF3514 3546 0`, as in many files
    of ModelNet), either kind of line end, polygons (cut into a fan of triangles) and colours after a face.

    Args:
        path: a text file in the Object File Format.

    Returns:
        The mesh; triangles in the order of the file's faces.

    Raises:
        UserError: whatever is wrong with the file, so that no mesh is read in part or holds numbers without a
            meaning: not to be read, not an .off file, fewer or more lines than declared, values that are not finite
            numbers, indices of no vertex, no faces, no surface.
    """
    try:
        lines = _lines(Path(path))
        vertices, faces = _counts(lines)
        mesh = Mesh(_vertices(lines[:vertices]), _triangles(lines[vertices : vertices + faces], vertices))
        _check_surface(mesh)
    except _OffError as error:
        raise UserError(f"{path}: {error}; repair or remove the file") from None
    return mesh


def sample_surface(mesh: Mesh, name: str, count: int) -> Tensor:
    """Draw points from the surface, in proportion to the area of the faces.

    Args:
        mesh: where to draw from.
        name: seeds the draw; torch's global random state is neither used nor changed.
        count: number of points.

    Returns:
        (count, 3) float32.
    """
    # Imported here, since it takes seconds that no other source of data should cost.
    from torch_geometric.data import Data
    from torch_geometric.transforms import SamplePoints

    data = Data(pos=torch.from_numpy(mesh.vertices), face=torch.from_numpy(mesh.faces.T.copy()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
        points: Tensor = SamplePoints(count)(data).pos
    return points.float()


class _OffError(Exception):
    """What is wrong with a file; `read_off` adds its name."""


def _lines(path: Path) -> list[str]:
    """Return the lines that say something, without comments, and without the header's `OFF`."""
    with open_file(path) as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _OffError("not a text file") from None
    lines = text.splitlines()
    if "#" in text:
        lines = [line.partition("#")[0] for line in lines]
    lines = [line for line in lines if line and not line.isspace()]
    if not lines:
        raise _OffError("the file is empty")
    header = lines[0].strip()
    if not header.startswith("OFF"):
        raise _OffError(f"not an OFF file: it starts with {header[:20]!r} in place of 'OFF'")
    counts = header.removeprefix("OFF")
    return [counts, *lines[1:]] if counts else lines[1:]


def _is_count(token: str) -> bool:
    # Python refuses to read a number of thousands of digits.
    return token.isascii() and token.isdigit() and len(token) < 19


def _counts(lines: list[str]) -> tuple[int, int]:
    """Take the counts from the front of `lines` and hold them against the lines that are left."""
    header = lines.pop(0).split() if lines else []
    if len(header) not in (2, 3) or not all(_is_count(token) for token in header):
        raise _OffError(f"the counts of vertices, faces and edges are {' '.join(header)[:40]!r}")
    vertices, faces = int(header[0]), int(header[1])
    # Before anything is allocated by what a header claims.
    if vertices + faces != len(lines):
        raise _OffError(f"{vertices} vertices and {faces} faces declared, but {len(lines)} lines follow")
    if not faces:
        raise _OffError("no faces, so no surface to draw points from")
    return vertices, faces


def _vertices(lines: list[str]) -> NDArray[np.float64]:
    if not lines:
        raise _OffError("no vertices")
    try:
        vertices = np.loadtxt(lines, dtype=np.float64, comments=None, ndmin=2)
    except ValueError as error:
        # Behind the semicolon is advice about arguments of numpy.
        said = cause(error).partition(";")[0]
        raise _OffError(f"a vertex is not three numbers ({said})") from None
    if vertices.shape[1] != 3:
        raise _OffError(f"vertices have {vertices.shape[1]} numbers in place of 3")
    for bad, what in (
        (~np.isfinite(vertices), "is not finite"),
        (np.abs(vertices) > LARGEST, f"is further than {LARGEST:g} from the origin, too far for single precision"),
    ):
        if bad.any():
            raise _OffError(f"vertex {int(bad.any(axis=1).argmax())} {what}")
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
            raise _OffError(f"face {shortest} is {lines[shortest].strip()[:40]!r}: not a count (3 or more) of indices")
        try:
            polygons = np.array([rows[index][1 : corners + 1] for index in chosen], dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise _OffError(f"a face has an index that is not a whole number ({error})") from None
        outside = ((polygons < 0) | (polygons >= vertices)).any(axis=1)
        if outside.any():
            face = chosen[int(outside.argmax())]
            raise _OffError(f"face {face} has an index outside 0 to {vertices - 1}: {lines[face].strip()[:40]!r}")
        for corner in range(1, corners - 1):
            triangles.append(polygons[:, [0, corner, corner + 1]])
            order.append(np.array(chosen))
    return np.concatenate(triangles)[np.argsort(np.concatenate(order), kind="stable")]


def _check_surface(mesh: Mesh) -> None:
    # Scaled, so that squares neither overflow nor vanish.
    corners = (mesh.vertices / (np.abs(mesh.vertices).max() or 1.0))[mesh.faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    if not np.abs(normals).max() > 0:
        raise _OffError("the faces have no area, so there is no surface to draw points from")
