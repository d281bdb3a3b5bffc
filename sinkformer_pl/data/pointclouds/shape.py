"""Hold and check the content of a file of one cloud or mesh, of any format."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sinkformer_pl.data.reading import cause
from sinkformer_pl.errors import UserError

LARGEST = 1e15
"""Of a coordinate: sums of squares of more overflow in single precision."""

COORDINATES = ("x", "y", "z")
NORMALS = ("nx", "ny", "nz")
COLOURS = ("red", "green", "blue")

GROUPS = {"normals": NORMALS, "colours": COLOURS, "colors": COLOURS}
"""Features of several columns."""

_SPELLINGS = {
    **{f"{spelling}{axis}": f"n{axis}" for spelling in ("normal_", "normal") for axis in COORDINATES},
    **{letter: colour for colour in COLOURS for letter in (colour[0], f"diffuse_{colour}")},
}

Columns = Mapping[str, NDArray[np.float64]]
"""Numbers of each point, (N,) each; by their names, or by "1", "2" and so on where the file has none."""


class Shape(NamedTuple):
    """A cloud, or a mesh.

    Attributes:
        points: (N, 3) float64, all finite; N >= 1.
        faces: (F, 3) int64 indices of points, F >= 1; None for a cloud.
        columns: further numbers of each point.
    """

    points: NDArray[np.float64]
    faces: NDArray[np.int64] | None
    columns: Columns


class FormatError(Exception):
    """A fault of a file; `formats.read_shape` adds the file's name."""


def make_shape(columns: Columns, faces: NDArray[np.int64] | None, names: Sequence[str] | None) -> Shape:
    """Take the coordinates from the columns of a file, and check that they are sound.

    Args:
        columns: the file's.
        faces: indices of its points.
        names: for the columns of a file that doesn't name them; None for x, y, z, "4", "5" and so on.

    Raises:
        FormatError: no points, no coordinates, coordinates that aren't finite or too large, indices of no point, no
            surface.
    """
    columns = _named(columns, names)
    if missing := [name for name in COORDINATES if name not in columns]:
        raise FormatError(f"no column {missing[0]}; it has {', '.join(columns) or 'none'}")
    points = np.stack([columns[name] for name in COORDINATES], axis=1).astype(np.float64)
    if not len(points):
        raise FormatError("no points")
    for bad, what in (
        (~np.isfinite(points), "is not finite"),
        (np.abs(points) > LARGEST, f"is further than {LARGEST:g} from the origin, too far for single precision"),
    ):
        if bad.any():
            raise FormatError(f"point {int(bad.any(axis=1).argmax())} {what}")
    if faces is not None:
        _check_surface(points, faces)
    return Shape(points, faces, {name: column for name, column in columns.items() if name not in COORDINATES})


def expanded(features: Sequence[str]) -> list[str]:
    """Return the names of the columns of features, of which a group, such as normals, has several."""
    return [column for feature in features for column in GROUPS.get(feature, (feature,))]


def chosen_columns(shape: Shape, features: Sequence[str]) -> NDArray[np.float64]:
    """Return the (N, F) columns that `features` name.

    Raises:
        FormatError: one is missing, or isn't finite.
    """
    names = expanded(features)
    if missing := [name for name in names if name not in shape.columns]:
        raise FormatError(f"no column {missing[0]}; beside x, y, z it has {', '.join(shape.columns) or 'none'}")
    values = [np.asarray(shape.columns[name], dtype=np.float64) for name in names]
    for name, column in zip(names, values, strict=True):
        if not (np.abs(column) <= LARGEST).all():
            raise FormatError(f"column {name} has numbers that are not finite, or beyond {LARGEST:g}")
    return np.stack(values, axis=1) if values else np.empty((len(shape.points), 0))


def one_line(error: Exception) -> str:
    """Say in a line what another library says of a file."""
    # Behind a semicolon is advice about numpy's arguments.
    return cause(error).partition(";")[0][:150]


def _named(columns: Columns, names: Sequence[str] | None) -> dict[str, NDArray[np.float64]]:
    numbered = [name for name in columns if name.isdecimal()]
    if numbered:
        if names is not None and len(names) != len(numbered):
            raise FormatError(f"{len(numbered)} columns without names, but data.columns names {len(names)}")
        given = [*COORDINATES[: len(numbered)], *numbered[3:]] if names is None else names
        rest = {name: column for name, column in columns.items() if name not in numbered}
        columns = {**dict(zip(given, (columns[name] for name in numbered), strict=True)), **rest}
    named: dict[str, NDArray[np.float64]] = {}
    for name, column in columns.items():
        key = name.strip().lower()
        key = _SPELLINGS.get(key, key)
        if key in named:
            raise FormatError(f"two columns of one name, {key}")
        named[key] = column
    return named


def _check_surface(points: NDArray[np.float64], faces: NDArray[np.int64]) -> None:
    outside = ((faces < 0) | (faces >= len(points))).any(axis=1)
    if outside.any():
        face = int(outside.argmax())
        raise FormatError(f"triangle {face} has an index outside 0 to {len(points) - 1}: {faces[face].tolist()}")
    # Scaled, so that squares neither overflow nor vanish.
    corners = (points / (np.abs(points).max() or 1.0))[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    if not np.abs(normals).max(initial=0) > 0:
        raise FormatError("the faces have no area, so there is no surface to draw points from")


def require_features(features: Sequence[str], key: str) -> None:
    """Refuse features that no file can have.

    Raises:
        UserError: names the key.
    """
    names = expanded(features)
    for name in names:
        if name in COORDINATES or names.count(name) > 1 or name != name.strip().lower():
            raise UserError(
                f"{key} is {', '.join(features)}: give each once, in small letters, without x, y and z: normals, "
                "colours, intensity or other columns of the files"
            )
