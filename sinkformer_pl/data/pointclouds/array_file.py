"""One file with all clouds as arrays: .npz or HDF5."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sinkformer_pl.data.pointclouds.arrays import open_arrays
from sinkformer_pl.data.pointclouds.base import Clouds, Source
from sinkformer_pl.data.pointclouds.shape import COORDINATES, expanded
from sinkformer_pl.data.reading import cause
from sinkformer_pl.errors import UserError

ARRAY_SUFFIXES = (".npz", ".h5", ".hdf5")
"""Of files with all clouds."""

# Ours, and those under which ModelNet40 has been published as clouds.
_POINTS = {"train": ("train_points", "tr_cloud"), "test": ("test_points", "test_cloud")}
_LABELS = {"train": ("train_label", "tr_label", "tr_labels"), "test": ("test_label", "test_labels")}


def read_array_classes(path: Path) -> tuple[str, ...]:
    """Return the class names, without reading any points.

    Returns:
        The array `classes`, else "0" to the largest label of either part, none of which may be absent from both.

    Raises:
        UserError: a file that is none, or whose labels and classes do not fit each other.
    """
    with open_arrays(path) as file:
        labels = [_labels(file, part, path) for part in ("train", "test")]
        largest = max((int(label.max()) for label in labels if len(label)), default=-1)
        if "classes" not in file:
            present = set(np.concatenate(labels).tolist())
            if len(present) <= largest:
                absent = next(label for label in range(largest) if label not in present)
                raise UserError(
                    f"{path}: there is a label {largest}, but no label {absent}; correct it, or add an array classes "
                    "with the names of all"
                )
            return tuple(str(label) for label in range(largest + 1))
        classes = tuple(_text(name, path) for name in _array(file, ("classes",), path).ravel().tolist())
    if largest >= len(classes):
        raise UserError(f"{path}: label {largest} for {len(classes)} classes; labels are indices into classes")
    # Here already, since a network and a confusion matrix are made of them before the points are read.
    if len(labels[0]) < len(classes):
        raise UserError(f"{path}: {len(classes)} classes for {len(labels[0])} training clouds; correct array classes")
    return classes


def load_array_file(path: Path, *, features: Sequence[str] = (), columns: Sequence[str] | None = None) -> Source:
    """Read all clouds.

    Integers are read as value / largest value of their type, floats as they are.

    Args:
        path: the file.
        features: columns beside the coordinates.
        columns: names of the columns; None for x, y, z, "4", "5" and so on.

    Raises:
        UserError: missing arrays or wrong shapes.
    """
    with open_arrays(path) as file:
        return Source(*(_clouds(file, part, path, features, columns) for part in ("train", "test")))


def _array(file: Mapping[str, Any], names: tuple[str, ...], path: Path) -> np.ndarray:
    present = [name for name in names if name in file]
    if not present:
        raise UserError(f"{path}: no array {' or '.join(names)}; it has {', '.join(file) or 'none'}")
    try:
        return np.asarray(file[present[0]])
    except ValueError as error:
        raise UserError(
            f"{path}: array {present[0]} cannot be read ({cause(error)}); store plain numbers or text"
        ) from None


def _labels(file: Mapping[str, Any], part: str, path: Path) -> np.ndarray:
    labels = _array(file, _LABELS[part], path)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: {part} labels are {labels.dtype} {labels.shape}; store integers (n,)")
    for label in (labels.min(), labels.max()) if len(labels) else ():
        if not 0 <= int(label) < 2**63:
            raise UserError(f"{path}: {part} label {label}; labels start at 0 and count the classes")
    return labels.astype(np.int64)


def _text(name: Any, path: Path) -> str:
    try:
        return name.decode() if isinstance(name, bytes) else str(name)
    except UnicodeDecodeError:
        raise UserError(f"{path}: class name {name!r} isn't UTF-8; store text") from None


def _clouds(
    file: Mapping[str, Any], part: str, path: Path, features: Sequence[str], columns: Sequence[str] | None
) -> Clouds:
    labels = _labels(file, part, path)
    points = _array(file, _POINTS[part], path)
    if points.ndim != 3 or points.shape[2] < 3 or points.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: {part} points are {points.dtype} {points.shape}; store numbers (n, points, 3 or more)"
        )
    if not len(points):
        raise UserError(f"{path}: it has no {part} clouds; give one or more of each class")
    if len(points) != len(labels):
        raise UserError(f"{path}: {len(points)} {part} clouds but {len(labels)} labels; give one label per cloud")
    scale = np.iinfo(points.dtype).max if points.dtype.kind in "iu" else 1
    points = points[:, :, _places(points.shape[2], features, columns, path)].astype(np.float32)
    points /= scale
    return Clouds(
        points=torch.from_numpy(points).flatten(0, 1),
        sizes=torch.full((len(points),), points.shape[1]),
        targets=torch.from_numpy(labels),
        names=[f"{part}/{index}" for index in range(len(points))],
        stamps=[str(zlib.crc32(cloud.tobytes())) for cloud in points],
    )


def _places(width: int, features: Sequence[str], columns: Sequence[str] | None, path: Path) -> list[int]:
    """Return the columns of the coordinates and of the features."""
    names = [*COORDINATES, *(str(place) for place in range(4, width + 1))] if columns is None else [*columns]
    if len(names) != width:
        raise UserError(f"{path}: {width} columns, but data.columns names {len(names)}; name each")
    wanted = [*COORDINATES, *expanded(features)]
    if missing := [name for name in wanted if name not in names]:
        raise UserError(f"{path}: no column {missing[0]}; it has {', '.join(names)}: name them by data.columns")
    return [names.index(name) for name in wanted]
