"""All clouds of a data set from its files, and a file that keeps them between runs."""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn

from sinkformer_pl.data.pointclouds.base import Clouds
from sinkformer_pl.data.pointclouds.layouts import Listing
from sinkformer_pl.data.pointclouds.preprocessing import CloudPreprocessing
from sinkformer_pl.data.pointclouds.shape import expanded
from sinkformer_pl.data.reading import cause
from sinkformer_pl.errors import UserError

Arrays = dict[str, np.ndarray]


def load_clouds(listing: Listing, preprocessing: CloudPreprocessing, cache: Path | None) -> dict[str, Clouds]:
    """Read the files of each part, or take them from the cache.

    Args:
        listing: the files.
        preprocessing: reads one.
        cache: a folder for one file per state of the files and arguments of reading; made where missing. None for no
            cache.

    Raises:
        UserError: a file that can't be read. A cache that can't be read or written is only warned about.
    """
    width = 3 + len(expanded(preprocessing.features))
    path = cache / f"clouds-{_key(listing, preprocessing)}.npz" if cache else None
    arrays = _read(path, {part: len(files) for part, files in listing.files.items()}, width) if path else None
    if arrays is None:
        arrays = {}
        for part, files in listing.files.items():
            clouds = [preprocessing.read(file).numpy() for file in files]
            arrays[part] = np.concatenate(clouds) if clouds else np.empty((0, width), np.float32)
            arrays[f"{part}_sizes"] = np.array([len(cloud) for cloud in clouds], dtype=np.int64)
        if path is not None:
            _write(path, arrays)
    return {
        part: Clouds(
            points=torch.from_numpy(arrays[part]),
            sizes=torch.from_numpy(arrays[f"{part}_sizes"]),
            targets=listing.targets[part],
            names=names_of(files, listing.root),
            stamps=[str(file.stat().st_size) for file in files],
        )
        for part, files in listing.files.items()
    }


def names_of(files: Sequence[Path], root: Path) -> list[str]:
    """Return the names of clouds: their paths below `root`, without a suffix where that tells them apart."""
    paths = [Path(os.path.relpath(file, root)) for file in files]
    short = [path.with_suffix("").as_posix() for path in paths]
    return short if len(set(short)) == len(short) else [path.as_posix() for path in paths]


def _key(listing: Listing, preprocessing: CloudPreprocessing) -> str:
    arguments = replace(preprocessing, num_points=None)  # without it, which doesn't matter to what is read
    digest = hashlib.sha256(repr(arguments).encode())
    for part, files in sorted(listing.files.items()):
        for file in files:
            try:
                status = file.stat()
            except OSError as error:
                raise UserError(f"{file}: {error.strerror}; repair or remove the file") from None
            name = os.path.relpath(file, listing.root)
            digest.update(f"\n{part} {name} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _read(path: Path, counts: dict[str, int], width: int) -> Arrays | None:
    """Return what the cache has, None where that is nothing."""
    # Broken bytes make numpy raise nearly anything.
    try:
        # Not the path's own method, which raises where it may not look.
        if not os.path.isfile(path):
            return None
        with np.load(path) as file:
            arrays = {name: file[name] for part in counts for name in (part, f"{part}_sizes")}
        for part, count in counts.items():
            points, sizes = arrays[part], arrays[f"{part}_sizes"]
            if sizes.shape != (count,) or points.dtype != np.float32 or points.shape != (sizes.sum(), width):
                raise ValueError(f"{part} is {points.dtype} {points.shape} for {len(sizes)} clouds")
    except Exception as error:
        rank_zero_warn(f"{path}: the cache can't be used ({cause(error)}); the files are read anew")
        return None
    return arrays


def _write(path: Path, arrays: Arrays) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".clouds-") as folder:
            written = Path(folder) / path.name
            np.savez(written, **arrays)  # type: ignore[arg-type]
            os.replace(written, path)
    except OSError as error:
        rank_zero_warn(f"{path.parent}: the cache can't be written ({cause(error)}); each run will read the files anew")
