"""Classes in the columns of tables, one or any number a row, for texts, images and point clouds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sinkformer_pl.data import ImageTable, PointClouds, TextTable
from sinkformer_pl.data.labels import Labels
from sinkformer_pl.data.table import Row
from sinkformer_pl.errors import UserError

CELLS = ["b| a", "", "c", "a|b|c", "b"]
"""Labels of rows; a, b, c."""

HOLDS = [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0]]


def rows(*cells, **columns):
    if columns:
        cells = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    else:
        cells = [{"label": cell} for cell in cells]
    return [Row(Path("t.csv"), line, cell) for line, cell in enumerate(cells, 2)]


def test_a_list_in_a_column_and_a_column_for_each_class_are_the_same_targets():
    listed = Labels("label", "|")
    assert listed.classes_of(rows(*CELLS)) == ["a", "b", "c"]
    found = listed.targets_of(rows(*CELLS), ["a", "b", "c"])
    assert found.dtype == torch.bool
    assert found.int().tolist() == HOLDS
    lists = [[part.strip() for part in cell.split("|") if part] for cell in CELLS]
    assert listed.targets_of(rows(*lists), ["a", "b", "c"]).int().tolist() == HOLDS
    columns = dict(zip("abc", np.array(HOLDS).T.tolist(), strict=True))
    columns["b"] = ["1.0", "0", "false", "True", True]
    each = Labels(["a", "b", "c"])
    assert each.classes_of(rows(**columns)) == ["a", "b", "c"]
    assert each.targets_of(rows(**columns), ["a", "b", "c"]).int().tolist() == HOLDS
    # By the names that a checkpoint has, in its order.
    assert each.targets_of(rows(**columns), ["c", "d", "b", "a"])[3].tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("labels", "cells", "facts"),
    [
        (Labels("label", "|"), ["a|x"], ["t.csv, line 2", "'x'", "a, b, c"]),
        (Labels("label", "|"), ["a|nan"], ["line 2", "'nan'", "empty"]),
        (Labels("label"), ["a|b"], ["'a|b'", "no class"]),
        (Labels("label"), [["a", "b"]], ["line 2", "data.separator"]),
    ],
)
def test_cells_that_say_no_class(labels, cells, facts):
    with pytest.raises(UserError) as error:
        labels.targets_of(rows(*cells), ["a", "b", "c"])
    assert all(fact in str(error.value) for fact in facts)


def test_arguments_and_cells_without_a_meaning():
    with pytest.raises(UserError, match="column b has '2'; give 1 where the class holds, else 0"):
        Labels(["a", "b"]).targets_of(rows(a=["1"], b=["2"]), ["a", "b"])
    with pytest.raises(UserError, match=r"data.separator \|: .*leave it out"):
        Labels(["a", "b"], "|")
    with pytest.raises(UserError, match=r"data\.separator is empty"):
        Labels("label", "")


def write(path, column):
    lines = [f"{name},{label}" for label, name in zip(CELLS * 4, column, strict=True)]
    path.write_text("\n".join(["path,label", *lines]))


def sets(module):
    module.setup()
    return {
        name: targets
        for split in ("train", "val", "test")
        for name, targets in zip(module.names(split), module.datasets[split].targets.int().tolist(), strict=True)
    }


def test_texts(tmp_path):
    for part in ("train", "test"):
        write(tmp_path / f"{part}.csv", [f"text {part} {place}" for place in range(20)])
    module = TextTable(tmp_path, text="path", separator="|", val_fraction=0.2)
    assert module.multi_label
    assert module.classes == ("a", "b", "c")
    found = sets(module)
    assert len(module.datasets["val"]) == 4
    assert [found[f"test.csv:{line}"] for line in range(2, 7)] == HOLDS
    assert [found[f"train.csv:{line}"] for line in range(2, 7)] == HOLDS


def test_images(tmp_path):
    for place in range(20):
        Image.fromarray(np.full((4, 4), place, np.uint8)).save(tmp_path / f"{place}.png")
    write(tmp_path / "train.csv", [f"{place}.png" for place in range(20)])
    module = ImageTable(tmp_path, train="train.csv", test="train.csv", separator="|", image_size=4, check_files=False)
    found = sets(module)
    assert module.multi_label
    assert [found[f"{place}.png"] for place in range(5)] == HOLDS


def test_point_clouds(tmp_path):
    for place in range(20):
        np.savetxt(tmp_path / f"{place}.xyz", np.random.default_rng(place).random((5, 3)))
    write(tmp_path / "list.csv", [f"{place}.xyz" for place in range(20)])
    module = PointClouds(tmp_path / "list.csv", separator="|")
    found = sets(module)
    assert module.multi_label
    assert len(module.datasets["test"]) == 4
    assert [found[f"{place}"] for place in range(5)] == HOLDS
    with pytest.raises(UserError, match=r"data.separator are of lists of clouds, and .* is none"):
        PointClouds(tmp_path, separator="|")
