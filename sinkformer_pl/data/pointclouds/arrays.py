"""One cloud as an array or a few: .npy, .npz and HDF5."""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sinkformer_pl.data.pointclouds.shape import GROUPS, Columns, FormatError
from sinkformer_pl.data.reading import cause, open_file
from sinkformer_pl.errors import UserError

POINTS = ("points", "pos", "xyz", "coordinates", "data")


@contextmanager
def open_arrays(path: Path) -> Iterator[Mapping[str, Any]]:
    """Open the arrays of a .npz, .npy or HDF5 file, by their names; nothing in it is unpickled.

    Raises:
        UserError: a file that can't be read, or that is broken, here or when an array is asked for.
    """
    # Before the libraries, which take long words to say that they may not read a file, or wait for a pipe.
    open_file(path).close()
    # Broken bytes and other people's formats make both raise nearly anything, also when an array is asked for.
    try:
        suffix = path.suffix.lower()
        if suffix == ".npy":
            yield {"points": np.load(path)}
        elif suffix == ".npz":
            if not zipfile.is_zipfile(path):
                raise zipfile.BadZipFile("not a zip archive")
            with np.load(path) as file:
                yield file
        else:
            with _h5py().File(path, "r") as file:
                yield file
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({cause(error)}); give a complete {path.suffix} file") from None


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise UserError("HDF5 files need h5py: pip install 'sinkformer_pl[hdf5]'") from None
    return h5py


def read_array(path: Path) -> Columns:
    """Read a cloud from a .npy, .npz or HDF5 file.

    The points are its only array, or the one of a name in `POINTS`: (N, C) numbers, x, y and z first, or a structured
    array (N,) with names. Further arrays of N rows are columns: normals and colours by their names, (N,) under the
    array's name, (N, K) under `NAME_0` and so on. Integers are read as value / largest of their type.

    Raises:
        FormatError: no such array.
        UserError: a file that can't be read.
    """
    with open_arrays(path) as file:
        arrays = {name: np.asarray(file[name]) for name in file}
    name = next(iter(arrays), "") if len(arrays) == 1 else next((name for name in POINTS if name in arrays), "")
    points = arrays.pop(name, None)
    if points is None:
        raise FormatError(f"no array {', '.join(POINTS[:-1])} or {POINTS[-1]}; it has {', '.join(arrays) or 'none'}")
    columns = _columns_of_points(points)
    for name, array in arrays.items():
        if array.dtype.kind in "iuf" and array.ndim in (1, 2) and len(array) == len(points):
            values = array.reshape(len(array), -1)
            group = GROUPS.get(name, ()) or GROUPS.get(f"{name}s", ())
            names = group if values.shape[1] == len(group) else [f"{name}_{place}" for place in range(values.shape[1])]
            columns |= dict(zip([name] if array.ndim == 1 else names, _scaled(values).T, strict=True))
    return columns


def columns_of(array: Any) -> Columns:
    """Return the columns of a cloud in memory, (N, C) numbers or a structured array (N,).

    Raises:
        FormatError: it is none.
    """
    return _columns_of_points(np.asarray(array))


def _columns_of_points(points: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    if points.dtype.names and points.ndim == 1:
        return {name: _scaled(points[name]) for name in points.dtype.names}
    if points.ndim != 2 or points.dtype.kind not in "iuf":
        raise FormatError(f"an array of {points.dtype} {points.shape}; a cloud is numbers (points, 3 or more)")
    columns = {str(place): column for place, column in enumerate(_scaled(points).T, 1)}
    return columns if len(columns) == points.shape[1] else {}


def _scaled(values: NDArray[Any]) -> NDArray[np.float64]:
    if values.dtype.kind not in "iuf":
        raise FormatError(f"an array of {values.dtype}; store numbers")
    return values / np.iinfo(values.dtype).max if values.dtype.kind in "iu" else values.astype(np.float64)
