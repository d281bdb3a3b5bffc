"""What was learnt from data is the checkpoint's: class names, constants of images, the tokenizer of texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sinkformer_pl.data import ClassificationData, Draw, ImageFolder, PointClouds, TextTable, read_learnt
from sinkformer_pl.errors import UserError
from sinkformer_pl.training.checkpoint_content import CLASSES_KEY


def photos(root: Path, *, level: int = 100, classes: str = "abc") -> ClassificationData:
    rng = np.random.default_rng(0)
    for part in ("test", "train"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for number in range(4):
                values = rng.normal(100 if part == "test" else level, 30, (12, 15, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(values).save(root / part / name / f"{number}.png")
    return ImageFolder(root, image_size=8)


def table(root: Path, *, words: str = "one two three", classes: str = "abc") -> ClassificationData:
    root.mkdir()
    for name, text in (("train", words), ("test", "two three four")):
        rows = [f"{text} {number},{label}\n" for number in range(8) for label in classes]
        (root / f"{name}.csv").write_text("text,label\n" + "".join(rows))
    return TextTable(root, vocab_size=270, max_length=6)


def clouds(root: Path, *, classes: str = "abc") -> ClassificationData:
    root.mkdir()
    points = np.random.default_rng(0).normal(size=(8, 20, 3)).astype(np.float32)
    label = np.arange(8) % len(classes)
    parts = {
        f"{part}_{name}": value for part in ("train", "test") for name, value in (("points", points), ("label", label))
    }
    np.savez(root / "clouds.npz", classes=list(classes), **parts)
    return PointClouds(root / "clouds.npz", num_points=16)


def checkpoint_of(data: ClassificationData, path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds of data, as it is read."""
    data.setup()
    torch.save({type(data).__qualname__: data.state_dict()}, path)
    return torch.load(path, weights_only=True)


def shown(data: ClassificationData) -> dict[str, tuple[torch.Tensor, str]]:
    """Return the input and the class of each test sample, by its name."""
    dataset = data.datasets["test"]
    samples = [dataset[index] for index in range(len(dataset))]
    return {
        name: (sample.inputs, data.classes[sample.target]) for name, sample in zip(dataset.names, samples, strict=True)
    }


@pytest.mark.parametrize("make", [photos, table, clouds])
def test_inputs_are_made_from_a_checkpoint_without_any_data(tmp_path, make):
    data = make(tmp_path / "here")
    learnt = read_learnt(checkpoint_of(data, tmp_path / "x.ckpt"))
    assert learnt.classes == ("a", "b", "c")
    raw = {
        "photos": lambda: tmp_path / "here" / data.names("test")[5],
        "table": lambda: data.datasets["test"].texts[5],
        "clouds": lambda: torch.from_numpy(np.load(tmp_path / "here/clouds.npz")["test_points"][5]),
    }[make.__name__]()
    inputs = learnt.preprocessing(raw, seed=7)
    assert torch.equal(inputs, data.datasets["test"].inputs(Draw(5, 7)))
    assert learnt.preprocessing == data.preprocessing


def test_an_image_of_any_form_is_the_same_input(tmp_path):
    data = photos(tmp_path / "here")
    preprocessing = read_learnt(checkpoint_of(data, tmp_path / "x.ckpt")).preprocessing
    path = tmp_path / "here" / data.names("test")[0]
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert torch.equal(preprocessing(path), preprocessing(Image.open(path)))
    assert torch.equal(preprocessing(path), preprocessing(pixels))
    grey = pixels[:1]
    assert torch.equal(preprocessing(grey), preprocessing(grey.expand(3, -1, -1)))


OTHERS = [
    pytest.param(photos, {"level": 20}, id="darker training images"),
    pytest.param(photos, {"classes": "ca"}, id="images without a class"),
    pytest.param(photos, {"classes": "c"}, id="images of one class"),
    pytest.param(table, {"words": "five six seven"}, id="other training texts"),
    pytest.param(table, {"classes": "ca"}, id="texts without a class"),
    pytest.param(clouds, {"classes": "ca"}, id="clouds without a class, numbered otherwise"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("before", [True, False], ids=["before setup", "after setup"])
@pytest.mark.parametrize(("make", "other"), OTHERS)
def test_other_data_are_seen_with_what_the_checkpoint_has_learnt(tmp_path, make, other, before):
    checkpoint = checkpoint_of(make(tmp_path / "here"), tmp_path / "x.ckpt")
    preprocessing = read_learnt(checkpoint).preprocessing
    data = make(tmp_path / "there", **other)
    if not before:
        if len(data.classes) == 1:
            with pytest.raises(UserError, match="one class, c; give data of two or more"):
                data.setup()
            return
        data.setup()
    data.restore(checkpoint)
    data.setup()
    assert data.classes == ("a", "b", "c")
    assert data.preprocessing == preprocessing
    for name, (inputs, label) in shown(data).items():
        if make is photos:
            assert label == name.split("/")[1]
            assert torch.equal(inputs, preprocessing(tmp_path / "there" / name))
        elif make is table:
            rows = (tmp_path / "there/test.csv").read_text().splitlines()
            text, named = rows[int(name.partition(":")[2]) - 1].split(",")
            assert named == label
            assert torch.equal(inputs, preprocessing(text))
        else:
            assert label == other["classes"][int(name.partition("/")[2]) % 2]


def test_a_label_that_only_the_checkpoint_knows_is_a_class(tmp_path):
    checkpoint = checkpoint_of(table(tmp_path / "here"), tmp_path / "x.ckpt")
    data = table(tmp_path / "there", classes="ab")
    with (tmp_path / "there/test.csv").open("a") as file:
        file.write("a new one,c\n")
    with pytest.raises(UserError, match="'c', which is no class"):
        data.setup()
    data.restore(checkpoint)
    with pytest.warns(UserWarning, match="no sample in the train split: c"):
        data.setup()
    assert shown(data)["test.csv:18"][1] == "c"


def test_a_class_that_the_checkpoint_does_not_know_is_named(tmp_path):
    checkpoint = checkpoint_of(table(tmp_path / "here", classes="ab"), tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"2 in the checkpoint and 3 in the data; only in the data: c\."):
        table(tmp_path / "there").restore(checkpoint)


def test_a_second_checkpoint_may_know_fewer_classes(tmp_path):
    first = checkpoint_of(table(tmp_path / "abc"), tmp_path / "x.ckpt")
    second = checkpoint_of(table(tmp_path / "ba", classes="ba"), tmp_path / "y.ckpt")
    data = table(tmp_path / "there", classes="ab")
    data.setup()
    before = {name: label for name, (_, label) in shown(data).items()}
    for checkpoint in (first, second):
        data.restore(checkpoint)
        assert {name: label for name, (_, label) in shown(data).items()} == before


def test_constants_that_a_checkpoint_lacks_are_computed_with_a_word(tmp_path):
    checkpoint = {CLASSES_KEY: ["a", "b", "c"]}
    with pytest.raises(UserError, match="the checkpoint doesn't say how its inputs are made"):
        read_learnt(checkpoint)
    data = photos(tmp_path / "here")
    with pytest.warns(UserWarning, match="the checkpoint, of an older version, has no mean and standard deviation"):
        data.restore(checkpoint)
    other = ImageFolder(tmp_path / "here", image_size=8)
    for each in (data, other):
        each.setup()
    assert data.preprocessing == other.preprocessing


def test_constants_of_another_number_of_channels_are_refused(tmp_path):
    checkpoint = checkpoint_of(photos(tmp_path / "here"), tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=r"data\.channels is 1: the checkpoint's images have 3"):
        ImageFolder(tmp_path / "here", image_size=8, channels=1).restore(checkpoint)
