"""Point clouds from the user's files: folders, a list, or one file of arrays."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sinkformer_pl.data.labels import Labels, labels_from
from sinkformer_pl.data.pointclouds.array_file import (
    ARRAY_SUFFIXES,
    ArrayFiles,
    load_array_files,
    one_file,
    read_array_classes,
)
from sinkformer_pl.data.pointclouds.base import Clouds, PointCloudData
from sinkformer_pl.data.pointclouds.cache import load_clouds
from sinkformer_pl.data.pointclouds.formats import MESHES
from sinkformer_pl.data.pointclouds.layouts import (
    EVERYTHING,
    LAYOUT,
    LIST_SUFFIXES,
    CloudFolder,
    Listing,
    find_folder,
    list_files,
    read_list,
)
from sinkformer_pl.data.pointclouds.modelnet import MODELNET_CLASSES, ModelNetName, fetch_modelnet
from sinkformer_pl.data.pointclouds.published import find_published
from sinkformer_pl.data.pointclouds.shape import require_features
from sinkformer_pl.data.reading import is_folder
from sinkformer_pl.data.source import Source
from sinkformer_pl.data.splitting import stratified_split
from sinkformer_pl.data.validation import warn_if_unused
from sinkformer_pl.errors import UserError


class PointClouds(PointCloudData):
    """Files of one cloud or mesh each, or .npz or HDF5 files of all clouds as arrays.

    Files: `.off`, `.ply`, `.obj`, `.stl`, `.pcd`, `.npy`, `.npz`, `.h5`, `.xyz`, `.txt` or `.csv`, in any case, under
    `<class>/train` and `<class>/test` (ModelNet's layout), `train/<class>` and `test/<class>` (perhaps also `val`), or
    `<class>` alone, in `root` or, divided into parts, in its folder `raw`, `ModelNet10` or `ModelNet40`. Or `root` is a
    .csv or .tsv file with columns `path` and `label`, and perhaps `split`; of any number of classes a cloud, there are
    several in a cell (`separator`), or a column for each (`label`). Points are drawn from the surface of a mesh
    once; a file of points has all of its own. Under a Trainer they are cached in the folder `cache` of its
    `default_root_dir`, never beside the files.

    Arrays: `train_points` and `test_points` (n, points, 3 or more), floats or integers (read as value / largest value
    of their type); `train_label` and `test_label` (n,) integers; optionally `classes`, the names. Also read are the
    names of the published ModelNet40 clouds: `tr_cloud`, `tr_label`, `test_cloud`, `test_label`.

    Published HDF5 files, arrays `data` and `label`: `root` is a folder with `train_files.txt`, `test_files.txt` and
    `shape_names.txt` (modelnet40_ply_hdf5_2048); or one with `training_objectdataset.h5` and `test_objectdataset.h5`
    (ScanObjectNN), or another training file of it, beside its test file.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        features: Sequence[str] = (),
        columns: Sequence[str] | None = None,
        download: ModelNetName | None = None,
        pool_size: int = 2048,
        test_fraction: float = 0.2,
        label: str | Sequence[str] = "label",
        separator: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at `root` and learn the classes; no points are read.

        Args:
            root: the folder, list or file of arrays.
            features: what a point has beside its coordinates: `normals`, `colours`, or names of columns such as
                `intensity`; of ScanObjectNN `mask`, 1 for the object and 0 for its background. The network's
                `in_features` is 3 and one for each column.
            columns: names of the columns of files that don't name them; None for x, y, z, "4", "5" and so on.
            download: what to fetch into `root` where that holds no meshes yet.
            pool_size: points drawn from each mesh, of which `num_points` takes a part.
            test_fraction: share of each class that is kept for the test, in (0, 1), where neither folders nor a list
                divide the files. Which clouds these are doesn't depend on `seed`: a test under another seed has no
                clouds that were trained on.
            label: column of the labels of a list; or several, one for each class, 1 where it holds, else 0.
            separator: what stands between the labels of a cloud of a list, such as "|"; None where each has one.
            **kwargs: what `PointCloudData` takes.

        Raises:
            UserError: nothing readable at `root`, or an argument out of its range.
        """
        self.root = Path(root)
        self.download: ModelNetName | None = download
        self.pool_size = pool_size
        self.test_fraction = test_fraction
        self.labels = labels_from(label, separator)
        require_features(features, "data.features")
        if pool_size < 2:
            raise UserError(f"data.pool_size is {pool_size}: give 2 or more")
        if not 0 < test_fraction < 1:
            raise UserError(f"data.test_fraction is {test_fraction}: give a share between 0 and 1, both excluded")
        self._arrays = self._find_arrays()
        if self.labels != Labels() and not (self.root.is_file() and self.root.suffix.lower() in LIST_SUFFIXES):
            raise UserError(
                f"data.label and data.separator are of lists of clouds, and {self.root} is none; leave them out, or "
                f"give a list, {' or '.join(LIST_SUFFIXES)}"
            )
        super().__init__(self._find_classes(), **kwargs)
        self.multi_label = self.labels.multi_label
        self.preprocessing = replace(
            self.preprocessing, features=tuple(features), columns=columns and tuple(columns), pool_size=pool_size
        )
        if self._arrays is None and self.num_points is not None and self.num_points > pool_size:
            self._require_pool(self.num_points)

    def prepare_data(self) -> None:
        """Fetch what is missing and fill the cache; Lightning calls this in one process only."""
        if self.root.is_file():
            if self.trainer and self._arrays is None:
                self.load()
            return
        if self._arrays is not None:
            return
        if self.download and self._folder() is None:
            fetch_modelnet(self.download, self.root)
        if self.trainer:
            self.load()

    def load(self) -> Source[Clouds]:
        """Read the file of arrays, or all files."""
        if self._arrays is not None:
            return load_array_files(
                self._arrays, features=self.preprocessing.features, columns=self.preprocessing.columns
            )
        listing = self._listing()
        if listing is None or listing.classes != self.found_classes:
            raise UserError(f"{self.root}: changed since the start; expected clouds of {', '.join(self.found_classes)}")
        cache = Path(self.trainer.default_root_dir) / "cache" if self.trainer else None
        parts = load_clouds(listing, self.preprocessing, cache)
        if EVERYTHING in parts:
            return self._divided(parts[EVERYTHING])
        if "val" in parts:
            warn_if_unused(self.val_fraction, f"the part val of {self.root}")
        return Source(**parts)

    def _find_arrays(self) -> ArrayFiles | None:
        if (published := find_published(self.root)) is not None:
            return published
        return one_file(self.root) if self.root.is_file() and self.root.suffix.lower() in ARRAY_SUFFIXES else None

    def _divided(self, clouds: Clouds) -> Source[Clouds]:
        train, test = stratified_split(clouds.targets, val_fraction=self.test_fraction, seed=0)
        if not len(test):
            raise UserError(f"{self.root}: no class has two clouds, one to train and one to test on; give more")
        return Source(clouds.subset(train), clouds.subset(test))

    def _folder(self) -> CloudFolder | None:
        return find_folder(self.root, prefer=self.download)

    def _listing(self) -> Listing | None:
        if self.root.is_file():
            return read_list(self.root, self.labels)
        folder = self._folder()
        return None if folder is None else list_files(folder)

    def _require_pool(self, num_points: int) -> None:
        listing = self._listing()
        files = [file for part in (listing.files.values() if listing else ()) for file in part]
        if listing is None or any(file.suffix.lower() in MESHES for file in files):
            raise UserError(
                f"data.num_points is {num_points}: give at most data.pool_size, {self.pool_size}, or raise it"
            )

    def _find_classes(self) -> tuple[str, ...]:
        if self._arrays is not None:
            return read_array_classes(self._arrays)
        if self.root.is_file():
            if self.root.suffix.lower() not in LIST_SUFFIXES:
                raise UserError(
                    f"{self.root}: not one of {', '.join(ARRAY_SUFFIXES)} (arrays), {', '.join(LIST_SUFFIXES)} (a "
                    "list); give such a file, or a folder"
                )
            return read_list(self.root, self.labels).classes
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
        raise UserError(f"{self.root}: no clouds; expected {LAYOUT}, or set data.download=ModelNet10")
