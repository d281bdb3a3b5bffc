"""A folder of meshes in the layout of ModelNet: `<class>/train/*.off` and `<class>/test/*.off`."""

import hashlib
import os
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from sinkformer_pl.data.pointclouds.base import Clouds, Source
from sinkformer_pl.data.pointclouds.mesh import read_off, sample_surface
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
        UserError: no meshes to train on or none to test on, a mesh that cannot be read, or a damaged cache file.
    """
    files = _files(folder)
    for part in _PARTS:
        if not files[part]:
            raise UserError(f"{folder.path}: no meshes in <class>/{part}; put some there, as files *.off")
    path = cache / f"meshes-{_key(files, folder.path, pool_size)}.npz" if cache else None
    if path is not None and path.exists():
        pools = _read_pools(path)
    else:
        pools = {part: _draw(files[part], folder.path, pool_size) for part in _PARTS}
        if path is not None:
            _write_pools(path, pools)
    return Source(*(_clouds(pools[part], files[part], folder) for part in _PARTS))


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        return ()
    children = (child for child in folder.iterdir() if not child.name.startswith("."))
    return tuple(sorted(child.name for child in children if any((child / part).is_dir() for part in _PARTS)))


def _files(folder: MeshFolder) -> dict[str, list[Path]]:
    """List the meshes of each part by class and name, so that no order depends on the file system."""
    return {
        part: [
            file
            for name in folder.classes
            for file in sorted((folder.path / name / part).glob("*.off"))
            if not file.name.startswith(".")
        ]
        for part in _PARTS
    }


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


def _read_pools(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return {part: file[part] for part in _PARTS}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged cache ({error}); delete the file") from None


def _write_pools(path: Path, pools: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez(file, train=pools["train"], test=pools["test"])
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
