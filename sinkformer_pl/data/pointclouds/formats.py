"""Files of one point cloud or mesh: a reader for each suffix."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sinkformer_pl.data.pointclouds.arrays import columns_of, read_array
from sinkformer_pl.data.pointclouds.mesh import MeshColumns, read_mesh, sample_surface
from sinkformer_pl.data.pointclouds.off import read_off
from sinkformer_pl.data.pointclouds.pcd import read_pcd
from sinkformer_pl.data.pointclouds.shape import Columns, FormatError, Shape, chosen_columns, make_shape, one_line
from sinkformer_pl.data.pointclouds.table import read_table
from sinkformer_pl.errors import UserError

MESHES: dict[str, Callable[[Path], MeshColumns]] = {
    ".off": read_off,
    **dict.fromkeys((".ply", ".obj", ".stl"), read_mesh),
}
"""Readers of files that may have faces."""

CLOUDS: dict[str, Callable[[Path], Columns]] = {
    ".pcd": read_pcd,
    **dict.fromkeys((".npy", ".npz", ".h5", ".hdf5"), read_array),
    **dict.fromkeys((".xyz", ".txt", ".csv"), read_table),
}
"""Readers of files of points."""

SUFFIXES = (*MESHES, *CLOUDS)
"""Of all files that are read, in small letters; files may have them in any."""


def is_cloud_file(path: Path) -> bool:
    """Tell by its name whether a file is read."""
    return path.suffix.lower() in SUFFIXES


def read_shape(path: Path, columns: Sequence[str] | None = None) -> Shape:
    """Read a file of one cloud or mesh.

    Args:
        path: the file.
        columns: names for the columns of a file that doesn't name them.

    Raises:
        UserError: whatever is wrong with it, so that nothing is read in part or has numbers without a meaning.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: no point cloud by its name; give one of {', '.join(SUFFIXES)}")
    try:
        found, faces = MESHES[suffix](path) if suffix in MESHES else (CLOUDS[suffix](path), None)
        return make_shape(found, faces, columns)
    except FormatError as error:
        raise _refusal(path, error) from None
    except UserError:
        raise
    except Exception as error:  # Broken bytes make the libraries raise nearly anything.
        raise _refusal(path, FormatError(f"can't be read as {suffix} ({one_line(error)})")) from None


def read_cloud(
    path: Path, *, pool_size: int, features: Sequence[str] = (), columns: Sequence[str] | None = None, centred: bool
) -> Tensor:
    """Read a cloud, or points from the surface of a mesh.

    Args:
        path: the file.
        pool_size: points that are drawn from a mesh; a cloud has all of its points.
        features: columns beside the coordinates.
        columns: names for the columns of a file that doesn't name them.
        centred: whether the mean of the coordinates is subtracted while they have double precision.

    Returns:
        (N, 3 + F) float32.

    Raises:
        UserError: as `read_shape`, and a column that the file hasn't.
    """
    shape = read_shape(path, columns)
    try:
        return cloud_of(
            sample_surface(shape, pool_size) if shape.faces is not None else shape, features, centred=centred
        )
    except FormatError as error:
        raise _refusal(path, error) from None


def cloud_from_array(
    array: object, *, features: Sequence[str] = (), columns: Sequence[str] | None = None, centred: bool
) -> Tensor:
    """Make a cloud of an array in memory; arguments, result and errors are those of `read_cloud`."""
    try:
        return cloud_of(make_shape(columns_of(array), None, columns), features, centred=centred)
    except FormatError as error:
        raise UserError(f"a cloud in memory: {error}") from None


def cloud_of(shape: Shape, features: Sequence[str], *, centred: bool) -> Tensor:
    """Return (N, 3 + F) float32 of a cloud.

    Raises:
        FormatError: a column that it hasn't.
    """
    points = torch.from_numpy(shape.points - shape.points.mean(axis=0) if centred else shape.points)
    return torch.cat([points, torch.from_numpy(chosen_columns(shape, features))], dim=1).float()


def _refusal(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: {error}; repair or remove the file")
