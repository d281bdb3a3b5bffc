"""The layouts of published HDF5 files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sinkformer_pl.data import PointClouds
from sinkformer_pl.errors import UserError
from tests.optional import h5py

NAMES = ("ant", "bee", "cow")


def write(path: Path, count: int, seed: int, **more: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays = {
        "data": rng.normal(size=(count, 16, 3)).astype(np.float32),
        "label": (np.arange(count) % 3).astype(np.uint8)[:, None],
        "normal": rng.normal(size=(count, 16, 3)).astype(np.float32),
        **more,
    }
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return arrays


@pytest.fixture
def modelnet(tmp_path: Path) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    """Return a folder in the layout of modelnet40_ply_hdf5_2048, and what is in its files."""
    folder = tmp_path / "modelnet40_ply_hdf5_2048"
    folder.mkdir()
    names = {"train": ["ply_data_train0", "ply_data_train1"], "test": ["ply_data_test0"]}
    files = [*names["train"], *names["test"]]
    content = {name: write(folder / f"{name}.h5", 6, seed) for seed, name in enumerate(files)}
    for part, listed in names.items():
        lines = [f"data/modelnet40_ply_hdf5_2048/{name}.h5" for name in listed]
        (folder / f"{part}_files.txt").write_text("\n".join([*lines, ""]))
    (folder / "shape_names.txt").write_text("\n".join([*NAMES, ""]))
    return folder, content


def ready(root: Path, **kwargs: Any) -> PointClouds:
    module = PointClouds(root, **{"standardize": False} | kwargs)
    module.setup()
    return module


def test_modelnet40_is_read_from_its_lists_with_names_and_normals(modelnet):
    folder, content = modelnet
    for root in (folder, folder.parent):
        module = ready(root, features=["normals"])
        assert module.classes == NAMES
        assert {split: len(dataset) for split, dataset in module.datasets.items()} == {"train": 9, "val": 3, "test": 6}
        for dataset in module.datasets.values():
            for place, name in enumerate(dataset.names):
                _, file, index = name.split("/")
                arrays = content[file]
                expected = np.concatenate([arrays["data"][int(index)], arrays["normal"][int(index)]], axis=1)
                torch.testing.assert_close(dataset[place].inputs.sort(0)[0], torch.from_numpy(np.sort(expected, 0)))
                assert dataset[place].target == arrays["label"][int(index), 0]


def test_scan_objects_have_their_masks_as_a_feature(tmp_path):
    mask = np.where(np.arange(16) < 5, -1, np.arange(16)).astype(np.int32)
    for part, count in (("training", 20), ("test", 4)):
        for variant in ("", "_augmentedrot_scale75"):
            label = (np.arange(count) % 15).astype(np.int64)
            write(
                tmp_path / f"{part}_objectdataset{variant}.h5",
                count,
                len(part + variant),
                label=label,
                mask=np.tile(mask, (count, 1)),
            )
    module = ready(tmp_path, features=["mask"])
    assert module.classes[::7] == ("bag", "door", "toilet")
    cloud = module.datasets["test"][2].inputs
    assert cloud.shape == (16, 4)
    assert sorted(cloud[:, 3].tolist()) == [0.0] * 5 + [1.0] * 11
    with h5py.File(tmp_path / "test_objectdataset.h5") as file:
        coordinates = torch.from_numpy(file["data"][2])
    of_object = coordinates[5:]
    torch.testing.assert_close(cloud[cloud[:, 3] == 1][:, :3].sort(0)[0], of_object.sort(0)[0])
    harder = ready(tmp_path / "training_objectdataset_augmentedrot_scale75.h5")
    assert harder.names("test")[0] == "test/test_objectdataset_augmentedrot_scale75/0"
    assert harder.datasets["test"][2].inputs.shape == (16, 3)


def test_what_is_wrong_with_a_layout_is_one_line(modelnet, tmp_path):
    folder, _ = modelnet
    with pytest.raises(UserError, match=r"ply_data_train0\.h5: no column intensity; it has x, y, z, normal"):
        ready(folder, features=["intensity"])
    with pytest.raises(UserError, match=r"array normal is \(6, 16, 3\), and data\.features asks for 1 numbers of each"):
        ready(folder, features=["normal"])
    (folder / "shape_names.txt").write_text("ant\nbee\n")
    with pytest.raises(UserError, match=r"label 2 for 2 classes"):
        ready(folder)
    (folder / "ply_data_train1.h5").unlink()
    with pytest.raises(UserError, match=r"train_files\.txt: no file .*ply_data_train1\.h5; put it there, or correct"):
        ready(folder)
    write(tmp_path / "training_objectdataset.h5", 6, 0)
    (folder / "train_files.txt").unlink()
    with pytest.raises(UserError, match=r"training_objectdataset\.h5: no file test_objectdataset\.h5 beside it"):
        ready(tmp_path)
