"""A training resumes on the samples, and with the division, that its checkpoint knows."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from sinkformer_pl.data import ClassificationData, ImageFolder, PointClouds, ProceduralShapes, TextTable
from sinkformer_pl.errors import UserError
from sinkformer_pl.training.checkpoint_content import CONFIG_KEY, RESUME_KEY


def photos(root: Path, **arguments: Any) -> ClassificationData:
    if not root.exists():
        for number in range(60):
            path = root / ("test" if number < 4 else "train") / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    return ImageFolder(root, image_size=8, **arguments)


def table(root: Path, **arguments: Any) -> ClassificationData:
    if not root.exists():
        root.mkdir()
        for name, number in (("train", 60), ("test", 4)):
            rows = [f"{name} {row},{'ab'[row % 2]}\n" for row in range(number)]
            (root / f"{name}.csv").write_text("text,label\n" + "".join(rows))
    return TextTable(root, vocab_size=257, **arguments)


def arrays(root: Path, **arguments: Any) -> ClassificationData:
    if not root.exists():
        root.mkdir()
        points = np.random.default_rng(0).normal(size=(60, 5, 3))
        label = np.arange(60) % 2
        np.savez(root / "x.npz", train_points=points, train_label=label, test_points=points, test_label=label)
    return PointClouds(root / "x.npz", **arguments)


def meshes(root: Path, **arguments: Any) -> ClassificationData:
    for number in range(0 if root.exists() else 60):
        path = root / "ab"[number % 2] / ("test" if number < 4 else "train") / f"{number}.off"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 {number}\n3 0 1 2\n")
    return PointClouds(root, pool_size=4, **arguments)


def shapes(root: Path, **arguments: Any) -> ClassificationData:
    return ProceduralShapes(train_size=60, val_size=24, test_size=12, **arguments)


def ready(make: Callable[..., ClassificationData], root: Path, **arguments: Any) -> ClassificationData:
    data = make(root, **arguments)
    data.setup()
    return data


def rename(root: Path) -> None:
    path = next(root.glob("**/10.*"))
    path.rename(path.with_name(f"renamed{path.suffix}"))


def exchange_image(root: Path) -> None:
    Image.new("RGB", (9, 9), "green").save(next(root.glob("**/10.png")))


def exchange_mesh(root: Path) -> None:
    path = next(root.glob("**/10.off"))
    path.write_text(path.read_text().replace("1 0 0", "2.5 0 0"))


def move_to_other_class(root: Path) -> None:
    path = root / "train/a/10.png"
    path.rename(root / "train/b/10.png")


def exchange_text(root: Path) -> None:
    path = root / "train.csv"
    path.write_text(path.read_text().replace("train 10,", "train xx,"))


def exchange_label(root: Path) -> None:
    path = root / "train.csv"
    path.write_text(path.read_text().replace("train 10,a", "train 10,b"))


def exchange_rows(root: Path) -> None:
    path = root / "train.csv"
    head, first, second, *rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join([head, second, first, *rows]))


def exchange_points(root: Path) -> None:
    with np.load(root / "x.npz") as file:
        content = dict(file)
    content["train_points"][10] += 1
    np.savez(root / "x.npz", **content)


FILES = [photos, table, arrays, meshes]
CHANGES = [
    (photos, rename),
    (photos, exchange_image),
    (photos, move_to_other_class),
    (table, exchange_text),
    (table, exchange_label),
    (table, exchange_rows),
    (arrays, exchange_points),
    (meshes, rename),
    (meshes, exchange_mesh),
]


@pytest.mark.parametrize("make", [*FILES, shapes])
def test_the_same_samples_are_known_wherever_they_lie(tmp_path, make):
    checkpoint = {"Any": ready(make, tmp_path / "here").state_dict()}
    if (tmp_path / "here").exists():
        shutil.copytree(tmp_path / "here", tmp_path / "there")
    data = make(tmp_path / "there", batch_size=3)
    data.restore(checkpoint)
    data.setup()
    data.require_same_samples(checkpoint, "x.ckpt")


@pytest.mark.parametrize(("make", "change"), CHANGES)
def test_another_sample_is_noticed_though_their_number_is_the_same(tmp_path, make, change):
    checkpoint = {"Any": ready(make, tmp_path / "here").state_dict()}
    change(tmp_path / "here")
    with pytest.raises(UserError, match=r"--ckpt_path x\.ckpt: it was trained on other samples: .*Keep the data"):
        ready(make, tmp_path / "here").require_same_samples(checkpoint, "x.ckpt")


@pytest.mark.parametrize("make", FILES)
def test_a_validation_never_holds_samples_that_were_trained_on(tmp_path, make):
    before = ready(make, tmp_path / "here")
    checkpoint, trained = {"Any": before.state_dict()}, set(before.names("train"))
    for arguments in ({"seed": 3}, {"val_fraction": 0.3}, {"seed": 3, "val_fraction": 0.3}):
        data = ready(make, tmp_path / "here", **arguments)
        assert trained & set(data.names("val"))
        changed = [f"data.{name} was {getattr(before, name)}, now {value}" for name, value in arguments.items()]
        with pytest.raises(UserError, match="; ".join(changed)):
            data.require_same_samples(checkpoint)


@pytest.mark.parametrize("arguments", [{"seed": 3}, {"noise": 0.1}])
def test_other_shapes_of_the_same_names_are_noticed(tmp_path, arguments):
    checkpoint = {"Any": ready(shapes, tmp_path).state_dict()}
    with pytest.raises(UserError, match="content of the 60 training samples"):
        ready(shapes, tmp_path, **arguments).require_same_samples(checkpoint)


def test_an_older_checkpoint_is_compared_in_what_it_knows(tmp_path):
    data = ready(table, tmp_path / "here")
    number = len(data.datasets["train"])
    config = {"data": {"class_path": "TextTable", "init_args": {"val_fraction": 0.1}}}
    resume = {"data.seed": 0, "the number of training samples": number}
    for checkpoint in ({CONFIG_KEY: config, RESUME_KEY: resume}, {}):
        with pytest.warns(UserWarning, match=r"x\.ckpt: an older version, or another program, wrote it"):
            data.require_same_samples(checkpoint, "x.ckpt")
    for arguments, expected in (
        ({"seed": 3}, "data.seed was 0, now 3"),
        ({"val_fraction": 0.3}, "data.val_fraction was 0.1, now 0.3; 54 training samples, now 42"),
    ):
        with pytest.raises(UserError, match=expected):
            ready(table, tmp_path / "here", **arguments).require_same_samples({CONFIG_KEY: config, RESUME_KEY: resume})


class Model(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any) -> torch.Tensor:
        return self.weight * 1.0

    def test_step(self, batch: Any) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_lightning_alone_refuses_them_too(tmp_path):
    def trainer(epochs: int) -> pl.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        return pl.Trainer(max_epochs=epochs, default_root_dir=tmp_path, enable_checkpointing=False, **quiet)

    first, path = trainer(1), tmp_path / "x.ckpt"
    first.fit(Model(), datamodule=table(tmp_path / "here"))
    first.save_checkpoint(path)
    trainer(2).fit(Model(), datamodule=table(tmp_path / "here"), ckpt_path=path, weights_only=True)
    trainer(2).test(Model(), datamodule=table(tmp_path / "here", seed=3), ckpt_path=path, weights_only=True)
    with pytest.raises(UserError, match=r"x\.ckpt: it was trained on other samples: data\.seed was 0, now 3"):
        trainer(2).fit(Model(), datamodule=table(tmp_path / "here", seed=3), ckpt_path=path, weights_only=True)
