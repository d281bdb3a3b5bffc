"""Point clouds from the user's files: a folder of meshes or one file of arrays."""

from pathlib import Path
from typing import Any

from sinkformer_pl.data.pointclouds.array_file import ARRAY_SUFFIXES, load_array_file, read_array_classes
from sinkformer_pl.data.pointclouds.base import PointCloudData, Source
from sinkformer_pl.data.pointclouds.mesh_folder import LAYOUT, MeshFolder, find_mesh_folder, load_mesh_folder
from sinkformer_pl.data.pointclouds.modelnet import MODELNET_CLASSES, ModelNetName, fetch_modelnet
from sinkformer_pl.data.reading import is_folder
from sinkformer_pl.errors import UserError


class PointClouds(PointCloudData):
    """A folder of .off meshes in the layout of ModelNet, or an .npz or HDF5 file of arrays.

    Folder: `<class>/train/*.off` and `<class>/test/*.off`, in `root` or in its folder `raw`, `ModelNet10` or
    `ModelNet40`. Points are drawn from the surfaces once and, under a Trainer, cached in the folder `cache` of its
    `default_root_dir`, never beside the meshes.

    File: `train_points` and `test_points` (n, points, 3), floats or integers (read as value / largest value of their
    type); `train_label` and `test_label` (n,) integers; optionally `classes`, the names. Also read are the names of
    the published ModelNet40 clouds: `tr_cloud`, `tr_label`, `test_cloud`, `test_label`.
    """

    def __init__(
        self, root: str | Path, *, download: ModelNetName | None = None, pool_size: int = 2048, **kwargs: Any
    ) -> None:
        """Look at `root` and learn the classes; no points are read.

        Args:
            root: the folder or file.
            download: what to fetch into `root` where that holds no meshes yet.
            pool_size: points drawn from each mesh, of which `num_points` takes a part; without meaning for a file.
            **kwargs: what `PointCloudData` takes.

        Raises:
            UserError: nothing readable at `root`, or an argument out of its range.
        """
        self.root = Path(root)
        self.download: ModelNetName | None = download
        self.pool_size = pool_size
        if pool_size < 2:
            raise UserError(f"data.pool_size is {pool_size}: give 2 or more")
        super().__init__(self._find_classes(), **kwargs)
        if not self.root.is_file() and self.num_points is not None and self.num_points > pool_size:
            raise UserError(
                f"data.num_points is {self.num_points}: give at most data.pool_size, {pool_size}, or raise it"
            )

    def prepare_data(self) -> None:
        """Fetch what is missing and fill the cache; Lightning calls this in one process only."""
        if self.root.is_file():
            return
        if self.download and self._folder() is None:
            fetch_modelnet(self.download, self.root)
        if self.trainer:
            self.load()

    def load(self) -> Source:
        """Read the file, or the points drawn from the meshes."""
        if self.root.is_file():
            return load_array_file(self.root)
        folder = self._folder()
        if folder is None or folder.classes != self.found_classes:
            listed = ", ".join(self.found_classes)
            raise UserError(f"{self.root}: changed since the start; expected meshes of {listed}")
        cache = Path(self.trainer.default_root_dir) / "cache" if self.trainer else None
        return load_mesh_folder(folder, pool_size=self.pool_size, cache=cache)

    def _folder(self) -> MeshFolder | None:
        return find_mesh_folder(self.root, prefer=self.download)

    def _find_classes(self) -> tuple[str, ...]:
        if self.root.is_file():
            if self.root.suffix not in ARRAY_SUFFIXES:
                listed = ", ".join(ARRAY_SUFFIXES)
                raise UserError(f"{self.root}: not one of {listed}, in small letters; give such a file or a folder")
            return read_array_classes(self.root)
        folder = self._folder()
        if folder is not None:
            return folder.classes
        if self.download:
            return MODELNET_CLASSES[self.download]
        if not self.root.exists():
            raise UserError(
                f"{self.root}: no such file or folder; set data.root to that of the clouds, or data.download=ModelNet10"
            )
        if not is_folder(self.root):
            raise UserError(f"{self.root}: neither a regular file nor a folder; give one of both")
        raise UserError(f"{self.root}: no meshes; expected {LAYOUT}, or set data.download=ModelNet10")
