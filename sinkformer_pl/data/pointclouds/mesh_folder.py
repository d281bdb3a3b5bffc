"""A folder of meshes in the layout of ModelNet: `<class>/train/*.off` and `<class>/test/*.off`."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_warn

from sinkformer_pl.data.pointclouds.base import Clouds, Source
from sinkformer_pl.data.pointclouds.mesh import read_off, sample_surface
from sinkformer_pl.data.reading import cause, files_ending, is_folder, list_folder
from sinkformer_pl.errors import UserError

LAYOUT = "<class>/train/*.off and <class>/test/*.off, in it or in its folder raw, ModelNet10 or ModelNet40"
_PARTS = ("train", "test")


class MeshFolder(NamedTuple):
    """Where the meshes lie.

    Attributes:
        path: the folder of the class folders.
        classes: their sorted names.
    """

    path: Path
    classes: tuple[str, ...]


def find_mesh_folder(root: Path, prefer: str | None) -> MeshFolder | None:
    """Look for the layout in `root` and in the places where ModelNet's archives and loaders put it.

    Args:
        root: an existing folder.
        prefer: the name of the place that wins where there are several.

    Returns:
        The folder, None where there is none.

    Raises:
        UserError: several, and no preference among them.
    """
    places = [root, *(root / name for name in ("raw", "ModelNet10", "ModelNet40"))]
    found = [MeshFolder(place, classes) for place in places if (classes := _classes(place))]
    preferred = [folder for folder in found if folder.path.name == prefer]
    if len(found) > 1 and not preferred:
        raise UserError(f"{root}: meshes in {' and '.join(str(f.path) for f in found)}; give one of them as root")
    chosen = preferred or found
    return chosen[0] if chosen else None


def load_mesh_folder(folder: MeshFolder, *, pool_size: int, cache: Path | None) -> Source:
    """Draw `pool_size` points from each mesh, or take them from the cache.

    Args:
        folder: the meshes.
        pool_size: points per mesh.
        cache: a folder for one file per state of the meshes and `pool_size`; made where missing. None for no cache.

    Raises:
        UserError: no meshes to train on or none to test on, or a mesh that cannot be read. A cache that can't be read
            or written is only warned about.
    """
    files = {part: _files(folder, part) for part in _PARTS}
    path = cache / f"meshes-{_key(files, folder.path, pool_size)}.npz" if cache else None
    pools = _read_pools(path, {part: (len(files[part]), pool_size, 3) for part in _PARTS}) if path else None
    if pools is None:
        pools = {part: _draw(files[part], folder.path, pool_size) for part in _PARTS}
        if path is not None:
            _write_pools(path, pools)
    return Source(*(_clouds(pools[part], files[part], folder) for part in _PARTS))


def _classes(folder: Path) -> tuple[str, ...]:
    if not is_folder(folder):
        return ()
    children, _ = list_folder(folder)
    return tuple(child.name for child in children if any(is_folder(child / part) for part in _PARTS))


def _files(folder: MeshFolder, part: str) -> list[Path]:
    """List the meshes of a part by class and name, so that no order depends on the file system."""
    places = [place for name in folder.classes if is_folder(place := folder.path / name / part)]
    files = [file for place in places for file in files_ending(place, ".off")]
    if not files:
        others = [file.name for place in places for file in list_folder(place)[1]]
        found = f", but {len(others)} other files, such as {others[0]}" if others else ""
        raise UserError(f"{folder.path}: no meshes in <class>/{part}{found}; put some there, as files *.off")
    return files


def _name(file: Path, root: Path) -> str:
    return file.relative_to(root).with_suffix("").as_posix()


def _key(files: dict[str, list[Path]], root: Path, pool_size: int) -> str:
    digest = hashlib.sha256(str(pool_size).encode())
    for file in (*files["train"], *files["test"]):
        try:
            status = file.stat()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; repair or remove the file") from None
        digest.update(f"\n{_name(file, root)} {status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _draw(files: list[Path], root: Path, pool_size: int) -> np.ndarray:
    pools = [sample_surface(read_off(file), _name(file, root), pool_size).numpy() for file in files]
    return np.stack(pools) if pools else np.empty((0, pool_size, 3), dtype=np.float32)


def _clouds(pools: np.ndarray, files: list[Path], folder: MeshFolder) -> Clouds:
    return Clouds(
        points=torch.from_numpy(pools).reshape(-1, 3),
        sizes=torch.full((len(pools),), pools.shape[1]),
        targets=torch.tensor([folder.classes.index(file.parts[-3]) for file in files], dtype=torch.int64),
        names=[_name(file, folder.path) for file in files],
    )


def _read_pools(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray] | None:
    """Return what the cache has, None where that is nothing."""
    # Broken bytes make numpy raise nearly anything.
    try:
        # Not the path's own method, which raises where it may not look.
        if not os.path.isfile(path):
            return None
        with np.load(path) as file:
            pools = {part: file[part] for part in _PARTS}
        for part, pool in pools.items():
            if pool.shape != shapes[part] or pool.dtype != np.float32:
                raise ValueError(f"{part} is {pool.dtype} {pool.shape}")
    except Exception as error:
        rank_zero_warn(f"{path}: the cache can't be used ({cause(error)}); points are drawn anew")
        return None
    return pools


def _write_pools(path: Path, pools: dict[str, np.ndarray]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".meshes-") as folder:
            written = Path(folder) / path.name
            np.savez(written, train=pools["train"], test=pools["test"])
            os.replace(written, path)
    except OSError as error:
        rank_zero_warn(f"{path.parent}: the cache can't be written ({cause(error)}); each run will draw points anew")
