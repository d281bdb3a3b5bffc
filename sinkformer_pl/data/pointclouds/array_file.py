"""All clouds as arrays in one file, .npz or HDF5, or in several, as data sets are published."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from sinkformer_pl.data.pointclouds.arrays import open_arrays
from sinkformer_pl.data.pointclouds.base import Clouds
from sinkformer_pl.data.pointclouds.shape import COORDINATES, expanded
from sinkformer_pl.data.reading import cause
from sinkformer_pl.data.source import Source
from sinkformer_pl.errors import UserError

ARRAY_SUFFIXES = (".npz", ".h5", ".hdf5")
"""Suffixes of files with all clouds."""

MASK = "mask"
"""Array of ScanObjectNN that tells the points of an object from those of its background."""

ArrayPart = Literal["train", "test"]


class Piece(NamedTuple):
    """A file with clouds of one part.

    Attributes:
        path: of the file.
        points: names that the array of the points may have.
        labels: likewise of the labels.
        alone: whether the file has no other part, so that further arrays are features of its points.
    """

    path: Path
    points: tuple[str, ...]
    labels: tuple[str, ...]
    alone: bool = False


class ArrayFiles(NamedTuple):
    """Files with all clouds as arrays.

    Attributes:
        root: the file or folder, for messages.
        parts: the files of each part.
        classes: class names, where files of their own or a published list has them; None for an array `classes`, or
            numbers.
    """

    root: Path
    parts: Mapping[ArrayPart, Sequence[Piece]]
    classes: tuple[str, ...] | None = None


def one_file(path: Path) -> ArrayFiles:
    """Return the parts of a file that has both, under our names or those of published clouds of ModelNet40."""
    return ArrayFiles(
        path,
        {
            "train": [Piece(path, ("train_points", "tr_cloud"), ("train_label", "tr_label", "tr_labels"))],
            "test": [Piece(path, ("test_points", "test_cloud"), ("test_label", "test_labels"))],
        },
    )


def read_array_classes(files: ArrayFiles) -> tuple[str, ...]:
    """Return the class names, without reading any points.

    Returns:
        Those of `files`; else the array `classes`, else "0" to the largest label of either part, none of which may be
        absent from both.

    Raises:
        UserError: a file that is none, or whose labels and classes do not fit each other.
    """
    found: dict[str, np.ndarray] = {}
    classes = files.classes
    for part, pieces in files.parts.items():
        labels = []
        for piece in pieces:
            with open_arrays(piece.path) as file:
                labels.append(_labels(file, piece, part))
                if classes is None and "classes" in file:
                    names = _array(file, ("classes",), piece.path).ravel().tolist()
                    classes = tuple(_text(name, piece.path) for name in names)
        found[part] = np.concatenate(labels)
    largest = max((int(labels.max()) for labels in found.values() if len(labels)), default=-1)
    if classes is None:
        present = set(np.concatenate([*found.values()]).tolist())
        if len(present) <= largest:
            absent = next(label for label in range(largest) if label not in present)
            raise UserError(
                f"{files.root}: there is a label {largest}, but no label {absent}; correct it, or add an array classes "
                "with the names of all"
            )
        return tuple(str(label) for label in range(largest + 1))
    if largest >= len(classes):
        raise UserError(f"{files.root}: label {largest} for {len(classes)} classes; labels are indices into classes")
    # Here already, since a network and a confusion matrix are made of them before the points are read.
    if len(found["train"]) < len(classes):
        raise UserError(
            f"{files.root}: {len(classes)} classes for {len(found['train'])} training clouds; correct array classes"
        )
    return classes


def load_array_files(
    files: ArrayFiles, *, features: Sequence[str] = (), columns: Sequence[str] | None = None
) -> Source[Clouds]:
    """Read all clouds.

    Integers are read as value / largest value of their type, floats as they are.

    Args:
        files: where they are.
        features: columns beside the coordinates, in the array of the points or in arrays of their own: `normals` in
            `normal`, any other under its name; of `mask`, 1 where a point is of the object and 0 where it is of its
            background, which has -1 in the file.
        columns: names of the columns; None for x, y, z, "4", "5" and so on.

    Raises:
        UserError: missing arrays or wrong shapes.
    """
    parts = {
        part: _joined([_clouds(piece, part, features, columns) for piece in pieces])
        for part, pieces in files.parts.items()
    }
    return Source(parts["train"], parts["test"])


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


def _labels(file: Mapping[str, Any], piece: Piece, part: str) -> np.ndarray:
    labels = _array(file, piece.labels, piece.path)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{piece.path}: {part} labels are {labels.dtype} {labels.shape}; store integers (n,)")
    for label in (labels.min(), labels.max()) if len(labels) else ():
        if not 0 <= int(label) < 2**63:
            raise UserError(f"{piece.path}: {part} label {label}; labels start at 0 and count the classes")
    return labels.astype(np.int64)


def _text(name: Any, path: Path) -> str:
    try:
        return name.decode() if isinstance(name, bytes) else str(name)
    except UnicodeDecodeError:
        raise UserError(f"{path}: class name {name!r} isn't UTF-8; store text") from None


def _clouds(piece: Piece, part: str, features: Sequence[str], columns: Sequence[str] | None) -> Clouds:
    path = piece.path
    with open_arrays(path) as file:
        labels = _labels(file, piece, part)
        points = _array(file, piece.points, path)
        _require_clouds(points, labels, part, path)
        names = [*COORDINATES, *(str(place) for place in range(4, points.shape[2] + 1))]
        if columns is not None and len(columns) != points.shape[2]:
            raise UserError(f"{path}: {points.shape[2]} columns, but data.columns names {len(columns)}; name each")
        beside = (
            {name: file[name] for name in file if name not in (*piece.points, *piece.labels)} if piece.alone else {}
        )
        chosen = _chosen(_scaled(points), names if columns is None else columns, features, beside, path)
    folder = f"{part}/{path.stem}" if piece.alone else part
    return Clouds(
        points=torch.from_numpy(chosen).flatten(0, 1),
        sizes=torch.full((len(chosen),), chosen.shape[1]),
        targets=torch.from_numpy(labels),
        names=[f"{folder}/{index}" for index in range(len(chosen))],
        stamps=[str(zlib.crc32(cloud.tobytes())) for cloud in chosen],
    )


def _require_clouds(points: np.ndarray, labels: np.ndarray, part: str, path: Path) -> None:
    if points.ndim != 3 or points.shape[2] < 3 or points.dtype.kind not in "iuf":
        raise UserError(
            f"{path}: {part} points are {points.dtype} {points.shape}; store numbers (n, points, 3 or more)"
        )
    if not len(points):
        raise UserError(f"{path}: it has no {part} clouds; give one or more of each class")
    if len(points) != len(labels):
        raise UserError(f"{path}: {len(points)} {part} clouds but {len(labels)} labels; give one label per cloud")


def _chosen(
    points: np.ndarray, names: Sequence[str], features: Sequence[str], beside: Mapping[str, Any], path: Path
) -> np.ndarray:
    """Return coordinates and features (n, points, 3 + F) float32, features of the array of points or of others."""
    if missing := [name for name in COORDINATES if name not in names]:
        raise UserError(f"{path}: no column {missing[0]}; it has {', '.join(names)}: name them by data.columns")
    parts = [points[:, :, [names.index(name) for name in COORDINATES]]]
    for feature in features:
        wanted = expanded([feature])
        if all(name in names for name in wanted):
            parts.append(points[:, :, [names.index(name) for name in wanted]])
            continue
        array = next((name for name in (feature, feature.removesuffix("s")) if name in beside), None)
        if array is None:
            lacking = next(name for name in wanted if name not in names)
            raise UserError(
                f"{path}: no column {lacking}; it has {', '.join([*names, *beside])}: name them by data.columns"
            )
        values = _array(beside, (array,), path)
        values = values != -1 if feature == MASK else _scaled(values)
        values = values.reshape(*values.shape[:2], -1)
        if values.shape != (*points.shape[:2], len(wanted)):
            raise UserError(
                f"{path}: array {array} is {values.shape}, and data.features asks for {len(wanted)} numbers of each of "
                f"{points.shape[1]} points of {len(points)} clouds; leave it out"
            )
        parts.append(values.astype(np.float32))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)


def _scaled(values: np.ndarray) -> np.ndarray:
    scale = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
    values = values.astype(np.float32)
    values /= scale
    return values


def _joined(clouds: Sequence[Clouds]) -> Clouds:
    """Return the clouds of several files as one."""
    if len(clouds) == 1:
        return clouds[0]
    return Clouds(
        points=torch.cat([part.points for part in clouds]),
        sizes=torch.cat([part.sizes for part in clouds]),
        targets=torch.cat([part.targets for part in clouds]),
        names=[name for part in clouds for name in part.names],
        stamps=[stamp for part in clouds for stamp in part.stamps or ()],
    )
