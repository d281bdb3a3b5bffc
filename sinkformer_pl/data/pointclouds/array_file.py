"""One file with all clouds as arrays: .npz or HDF5."""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sinkformer_pl.data.pointclouds.base import Clouds, Source
from sinkformer_pl.data.reading import cause, open_file
from sinkformer_pl.errors import UserError

ARRAY_SUFFIXES = (".npz", ".h5", ".hdf5")

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
    with _open(path) as file:
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


def load_array_file(path: Path) -> Source:
    """Read all clouds.

    Integers are read as value / largest value of their type, floats as they are.

    Raises:
        UserError: missing arrays or wrong shapes.
    """
    with _open(path) as file:
        return Source(train=_clouds(file, "train", path), test=_clouds(file, "test", path))


@contextmanager
def _open(path: Path) -> Iterator[Mapping[str, Any]]:
    # Before the libraries, which take long words to say that they may not read a file, or wait for a pipe.
    open_file(path).close()
    # Broken bytes and other people's formats make both raise nearly anything, also when an array is asked for.
    try:
        if path.suffix == ".npz":
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


def _clouds(file: Mapping[str, Any], part: str, path: Path) -> Clouds:
    labels = _labels(file, part, path)
    points = _array(file, _POINTS[part], path)
    if points.ndim != 3 or points.shape[2] != 3 or points.dtype.kind not in "iuf":
        raise UserError(f"{path}: {part} points are {points.dtype} {points.shape}; store numbers (n, points, 3)")
    if not len(points):
        raise UserError(f"{path}: it has no {part} clouds; give one or more of each class")
    if len(points) != len(labels):
        raise UserError(f"{path}: {len(points)} {part} clouds but {len(labels)} labels; give one label per cloud")
    scale = np.iinfo(points.dtype).max if points.dtype.kind in "iu" else 1
    points = points.astype(np.float32)
    points /= scale
    return Clouds(
        points=torch.from_numpy(points).reshape(-1, 3),
        sizes=torch.full((len(points),), points.shape[1]),
        targets=torch.from_numpy(labels),
        names=[f"{part}/{index}" for index in range(len(points))],
    )
