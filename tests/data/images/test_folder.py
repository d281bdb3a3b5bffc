"""Folders of image files."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision import transforms as v1

from sinkformer_pl.data.images.decoding import decode_image
from sinkformer_pl.data.images.folder import ImageFolder
from sinkformer_pl.errors import UserError


@pytest.fixture(scope="module")
def photos(tmp_path_factory, real_data) -> Path:
    """Return the folder of unpacked photos of cats and dogs."""
    folder = tmp_path_factory.mktemp("photos")
    shutil.unpack_archive(real_data / "cats_and_dogs.tar", folder, filter="data")
    return folder / "cats_and_dogs"


def write(root: Path, *parts: str, classes: tuple[str, ...] = ("cat", "ant"), count: int = 4) -> Path:
    """Write different small images, in an order that is not sorted."""
    rng = np.random.default_rng(len(parts))
    for part in parts or ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for index in reversed(range(count)):
                path = root / part / name / f"{index}.png"
                Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(path)
    return root


def ready(root: Path, **kwargs: Any) -> ImageFolder:
    module = ImageFolder(root, **{"image_size": 6} | kwargs)
    module.setup()
    return module


def test_files_are_found_sorted_and_labelled_by_folder(tmp_path):
    write(tmp_path)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("hello")
    (tmp_path / "train" / "ant" / "._0.png").write_text("not an image")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "test" / "cat" / "deeper").mkdir()
    (tmp_path / "test" / "cat" / "0.png").rename(tmp_path / "test" / "cat" / "deeper" / "0.PNG")
    module = ImageFolder(tmp_path)
    assert module.classes == ("ant", "cat")
    assert module.datasets == {}
    with pytest.warns(
        UserWarning, match=r"1 file is left out, the first is train/ant/notes\.txt; images lie in train/"
    ):
        module.setup()
    assert module.names("test") == [
        *(f"test/ant/{index}.png" for index in range(4)),
        *(f"test/cat/{index}.png" for index in range(1, 4)),
        "test/cat/deeper/0.PNG",
    ]
    assert module.datasets["test"].targets.tolist() == [0] * 4 + [1] * 4
    assert sorted([*module.names("train"), *module.names("val")]) == [
        f"train/{name}/{index}.png" for name in ("ant", "cat") for index in range(4)
    ]


def test_images_outside_of_the_folders_of_classes_are_counted(tmp_path):
    write(tmp_path)
    for place in ("stray.jpg", "train/stray.jpg", "valid/ant/stray.JPG"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    (tmp_path / "README.txt").touch()
    with pytest.warns(
        UserWarning, match=r"3 files are left out, the first is stray\.jpg; images lie in train/CLASS"
    ) as said:
        ImageFolder(tmp_path).setup()
    assert sum("left out" in str(warning.message) for warning in said) == 1


def test_a_folder_val_takes_the_place_of_the_division(tmp_path):
    module = ready(write(tmp_path, "train", "val", "test"))
    assert len(module.datasets["train"]) == len(module.datasets["val"]) == 8
    assert all(name.startswith("val/") for name in module.names("val"))
    with warnings.catch_warnings(record=True) as caught:
        assert len(ready(tmp_path, train_size=4).datasets["val"]) == 8
    assert not any("val_fraction" in str(one.message) for one in caught)
    with pytest.warns(UserWarning, match=r"data\.val_fraction 0\.3 counts for nothing, validation is .*/val;"):
        assert len(ready(tmp_path, val_fraction=0.3).datasets["val"]) == 8


def test_a_root_of_another_layout_is_refused_with_what_was_found(tmp_path):
    for root, message in (
        (tmp_path / "absent", "no such folder"),
        (tmp_path, "an empty folder"),
    ):
        with pytest.raises(UserError, match=f"{root}: found {message}; expected train/CLASS"):
            ImageFolder(root)
    write(tmp_path / "photos", "train")
    with pytest.raises(UserError, match=f"{tmp_path}: found photos; expected"):
        ImageFolder(tmp_path)
    (tmp_path / "photos" / "test").write_text("")
    with pytest.raises(UserError, match=r"photos: found test \(a file\), train; expected"):
        ImageFolder(tmp_path / "photos")
    (tmp_path / "photos" / "test").unlink()
    with pytest.raises(UserError, match="photos: found train; expected"):
        ImageFolder(tmp_path / "photos")
    with pytest.raises(UserError, match=r"0\.png: found a file"):
        ImageFolder(tmp_path / "photos" / "train" / "ant" / "0.png")
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "train" / "cat.0.jpg").write_text("")
    with pytest.raises(UserError, match=r"train: found cat\.0\.jpg \(a file\); expected train/CLASS"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("name", ["test", "test/cat", "train/cat/deeper", "train/cat/0.png"])
def test_what_cannot_be_read_is_named_rather_than_left_out(here, refused, name):
    write(here)
    (here / "train" / "cat" / "deeper").mkdir()
    ready(here)
    with refused(here / name), pytest.raises(UserError, match=rf"^{name}: can't be read \(Permission denied\)"):
        ready(here)


def test_a_name_that_predictions_could_not_hold_and_a_pipe_are_refused(tmp_path):
    write(tmp_path)
    os.mkfifo(tmp_path / "test" / "cat" / "x.png")
    with pytest.raises(UserError, match=r"test/cat/x\.png: not a regular file"):
        ready(tmp_path)
    with pytest.raises(UserError, match=r"test/cat/x\.png: not a regular file"):
        list(ready(tmp_path, check_files=False).test_dataloader())
    (tmp_path / "test" / "cat" / "x.png").rename(tmp_path / "test" / "cat" / os.fsdecode(b"\xff.png"))
    with pytest.raises(UserError, match=r"test/cat/\\xff\.png: a name that isn't UTF-8"):
        ready(tmp_path)


def test_classes_without_images_are_warned_about(tmp_path):
    write(tmp_path)
    shutil.rmtree(tmp_path / "test" / "ant")
    (tmp_path / "train" / "bee").mkdir()
    with pytest.warns(UserWarning, match="no sample") as record:
        module = ready(tmp_path)
    assert module.classes == ("ant", "bee", "cat")
    messages = [str(warning.message) for warning in record]
    assert "1 of 3 classes have no sample in the train split: bee" in messages
    assert "1 of 3 classes have no sample in the val split: bee" in messages
    assert "2 of 3 classes have no sample in the test split: ant, bee" in messages
    for folder in (tmp_path / "test").iterdir():
        shutil.rmtree(folder)
    (tmp_path / "test" / "0.png").touch()
    with pytest.raises(UserError, match=rf"{tmp_path}/test: no images in folders of classes; found 0.png \(a file\);"):
        ready(tmp_path)


@pytest.mark.filterwarnings("ignore:.*no sample")
def test_no_training_images(tmp_path):
    write(tmp_path, count=0)
    with pytest.raises(UserError, match=f"{tmp_path}/train: no images in folders of classes; found ant, cat; expected"):
        ready(tmp_path)


def test_an_empty_folder_of_validation_images_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path}/val: no images .* found an empty folder; expected"):
        ready(tmp_path)


def test_one_image_of_each_class_cannot_be_divided(tmp_path):
    write(tmp_path, count=1)
    with pytest.raises(UserError, match=f"{tmp_path}: no class has two samples, one to train and one to validate on"):
        ready(tmp_path)


def test_test_images_among_the_training_images_are_counted(tmp_path):
    write(tmp_path)
    shutil.copy(tmp_path / "train" / "ant" / "2.png", tmp_path / "test" / "cat" / "copy.png")
    with pytest.warns(UserWarning, match=r"1 of 9 test files .*test/cat/copy\.png = .*train/ant/2\.png"):
        ready(tmp_path)


def test_a_broken_file_stops_the_setup_unless_asked_not_to(tmp_path):
    write(tmp_path)
    broken = tmp_path / "test" / "ant" / "1.png"
    broken.write_text("<html>")
    with pytest.raises(UserError, match=f"{broken}: can't be decoded"):
        ready(tmp_path)
    module = ready(tmp_path, check_files=False)
    with pytest.raises(UserError, match=f"{broken}: can't be decoded"):
        next(iter(module.test_dataloader()))


def test_real_photos_are_what_torchvision_decodes(photos):
    for path in sorted((photos / "test" / "dog").iterdir())[:20]:
        image = decode_image(path, 3)
        assert image.dtype == torch.uint8
        assert torch.equal(image, torch.from_numpy(np.array(datasets.folder.default_loader(path))).permute(2, 0, 1))


@pytest.mark.filterwarnings("error")
def test_real_photos(photos):
    module = ready(photos, image_size=32, train_size=200)
    assert module.classes == ("cat", "dog")
    assert {split: len(dataset) for split, dataset in module.datasets.items()} == {
        "train": 200,
        "val": 130,
        "test": 300,
    }
    assert 0.3 < module.mean.min() < module.mean.max() < 0.6
    assert 0.2 < module.std.min() < module.std.max() < 0.3
    # The oracle finds, decodes and resizes by other code.
    pipeline = v1.Compose(
        [v1.Resize(32), v1.CenterCrop(32), v1.ToTensor(), v1.Normalize(module.mean.tolist(), module.std.tolist())]
    )
    oracle = datasets.ImageFolder(str(photos / "test"), transform=pipeline)
    batches = list(module.test_dataloader())
    assert torch.cat([batch.target for batch in batches]).tolist() == oracle.targets
    inputs = torch.cat([batch.inputs for batch in batches])
    for index in range(0, 300, 10):
        torch.testing.assert_close(inputs[index], oracle[index][0], atol=2.5 / 255 / 0.2, rtol=0)


@pytest.mark.filterwarnings("error")
def test_real_photos_are_the_same_for_any_number_of_workers(photos):
    epochs = []
    for workers in (0, 2):
        module = ready(photos, image_size=32, train_size=100, num_workers=workers, check_files=False)
        epochs.append([batch.inputs for batch in module.train_dataloader()])
    assert len(epochs[0]) == 4
    assert all(map(torch.equal, *epochs))
