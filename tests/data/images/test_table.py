"""Images that tables list."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sinkformer_pl.data import ImageTable
from sinkformer_pl.data.images.decoding import decode_image
from sinkformer_pl.errors import UserError


def write(folder: Path, *names: str) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)).save(folder / name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of images and of tables of each of them."""
    for part in ("train", "test"):
        names = [f"{part}/{index}.png" for index in range(6)]
        write(tmp_path / "photos", *names)
        rows = [f"photos/{name},{'cat' if index % 2 else 'ant'}" for index, name in enumerate(names)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["path,label", *rows]))
    return tmp_path


def ready(root: Path, **kwargs: Any) -> ImageTable:
    module = ImageTable(root, **{"image_size": 6, "crop_area": 1.0, "flip": False} | kwargs)
    module.setup()
    return module


def shown(module: ImageTable, *splits: str) -> dict[str, str]:
    """Return the class of each name."""
    datasets = [module.datasets[split] for split in splits]
    return {
        name: module.classes[target]
        for dataset in datasets
        for name, target in zip(dataset.names, dataset.targets.tolist(), strict=True)
    }


def test_paths_are_relative_to_the_folder_of_their_table(folder):
    module = ready(folder)
    expected = {f"photos/train/{index}.png": "cat" if index % 2 else "ant" for index in range(6)}
    assert module.classes == ("ant", "cat")
    assert shown(module, "train", "val") == expected
    assert len(module.datasets["val"]) == 2
    pixels = module.datasets["test"].preprocessing.pixels(folder / "photos/test/3.png")
    assert torch.equal(pixels, decode_image(folder / "photos/test/3.png", 3))
    (folder / "photos/lists").mkdir()
    (folder / "photos/lists/all.tsv").write_text(
        "class\tfile\tpart\n"
        + "".join(f"{index % 2}\t../train/{index}.png\t{'train' if index < 4 else 'test'}\n" for index in range(6))
    )
    columns = {"path": 2, "label": "class", "split": "part"}
    module = ready(folder / "photos/lists/all.tsv", **columns, check_files=False)
    assert shown(module, "test") == {f"../train/{index}.png": str(index % 2) for index in (4, 5)}
    inputs = module.datasets["test"][0].inputs
    assert torch.equal(inputs, module.preprocessing(folder / "photos/train/4.png"))
    (folder / "photos/lists/train.csv").write_text((folder / "train.csv").read_text().replace("photos/", "../"))
    module = ready(folder, train="photos/lists/train")
    assert shown(module, "train", "val") == {name.replace("photos/", "../"): label for name, label in expected.items()}


def test_columns_go_by_number_where_there_is_no_header_and_a_split_may_have_its_own_table(folder):
    for part in ("train", "test"):
        rows = (folder / f"{part}.csv").read_text().splitlines()[1:]
        (folder / f"{part}_rows.csv").write_text("\n".join(rows))
    module = ready(
        folder, train="train_rows", test="test_rows.csv", val="test_rows", path=1, label=2, header=False, batch_size=2
    )
    assert len(module.datasets["train"]) == len(module.datasets["val"]) == len(module.datasets["test"]) == 6
    assert shown(module, "train") == {f"photos/train/{i}.png": "cat" if i % 2 else "ant" for i in range(6)}


def test_a_split_of_validation_in_a_column(folder):
    write(folder, *(f"{index}.png" for index in range(6)))
    parts = ("train", "train", "val", "val", "test", "test")
    rows = [f"{index}.png,{index % 2},{part}" for index, part in enumerate(parts)]
    (folder / "all.csv").write_text("\n".join(["path,label,split", *rows]))
    module = ready(folder / "all.csv")
    assert {split: list(module.names(split)) for split in ("train", "val", "test")} == {
        "train": ["0.png", "1.png"],
        "val": ["2.png", "3.png"],
        "test": ["4.png", "5.png"],
    }


def test_missing_files_are_named_before_an_image_is_decoded(folder):
    for index in (1, 3, 4, 5):
        (folder / f"photos/train/{index}.png").unlink()
    (folder / "photos/train/0.png").write_text("no image")
    with pytest.raises(UserError) as error:
        ready(folder)
    text = str(error.value)
    assert f"train.csv, line 3: no file {folder}/photos/train/1.png" in text
    assert "3 more are missing" in text
    assert "photos/train/4.png, ..." in text


def test_a_broken_image_is_named(folder):
    (folder / "photos/train/0.png").write_text("no image")
    with pytest.raises(UserError, match=r"photos/train/0\.png: can't be decoded"):
        ready(folder)


@pytest.mark.parametrize(
    ("arguments", "rows", "message"),
    [
        (
            {"path": "file"},
            "",
            r"train\.csv, line 1: no column file; it has path, label: name the columns by",
        ),
        ({"path": 3}, "", r"no column 3; it has path, label"),
        ({"path": "label"}, "", r"data\.path and data\.label are both label"),
        ({"split": "part"}, "", r"data\.split is part, but data\.root, .* is no table"),
        ({"train": "training"}, "", r"training: no such table; put training\.csv there"),
        ({"header": False}, "", r"no column path; it has 1, 2"),
        ({}, "\n,cat", r"train\.csv, line 8: column path has no path"),
        ({}, "\nphotos/train/1.png,", r"train\.csv, line 8: column label has no label"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(folder, arguments, rows, message):
    with (folder / "train.csv").open("a") as file:
        file.write(rows)
    with pytest.raises(UserError, match=message):
        ready(folder, **arguments)


def test_a_table_of_all_splits_needs_their_column_and_no_names_of_tables(folder):
    with pytest.raises(UserError, match=r"train\.csv, line 1: no column split; it has path, label"):
        ready(folder / "train.csv")
    with pytest.raises(UserError, match=r"data\.test is other, but data\.root, .*train\.csv, is a table with a column"):
        ready(folder / "train.csv", test="other")
    (folder / "all.csv").write_text("path,label,split\nphotos/train/0.png,ant,train\nphotos/train/1.png,cat,dev\n")
    with pytest.raises(UserError, match=r"all\.csv, line 3: column split has 'dev'; give one of train, test, val"):
        ready(folder / "all.csv")
    (folder / "all.csv").write_text("path,label,split\nphotos/train/0.png,ant,train\nphotos/train/1.png,cat,train\n")
    with pytest.raises(UserError, match=r"all\.csv: no row of split test in column split; give some"):
        ready(folder / "all.csv")
    (folder / "train.tsv").write_text("path\tlabel\n")
    with pytest.raises(UserError, match=r"train\.csv and train\.tsv; say which, such as --data\.train train\.csv"):
        ready(folder)
