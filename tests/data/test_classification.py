"""What every modality shares: checks, loaders, epochs."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from sinkformer_pl.batch import Batch
from sinkformer_pl.data import ClassificationData, Draw, LabelledDataset, Split
from sinkformer_pl.errors import UserError


class Noise(LabelledDataset):
    """Sample i is i + 1 rows of noise that its draw's seed decides."""

    def inputs(self, draw: Draw) -> Tensor:
        return torch.rand(draw.index + 1, 3, generator=torch.Generator().manual_seed(draw.seed))


class NoiseData(ClassificationData):
    def __init__(self, targets: dict[Split, list[int]], **kwargs: Any) -> None:
        super().__init__(["a", "b", "c"], **kwargs)
        self.targets = targets
        self.made = 0

    def make_datasets(self) -> dict[Split, LabelledDataset]:
        self.made += 1
        return {
            split: Noise(torch.tensor(targets, dtype=torch.int64), [f"{split}/{i}" for i in range(len(targets))])
            for split, targets in self.targets.items()
        }


def data(sizes: tuple[int, int, int] = (10, 4, 5), **kwargs: Any) -> NoiseData:
    train, val, test = ([index % 3 for index in range(size)] for size in sizes)
    return NoiseData({"train": train, "val": val, "test": test}, **kwargs)


class Recorder(pl.LightningModule):
    """Writes the samples and inputs that each process got, one file for each of loop, epoch and rank."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def record(self, stage: str, batch: Batch) -> None:
        with (self.folder / f"{stage}-{self.current_epoch}-{self.global_rank}").open("a") as file:
            file.write(f"{batch.index.tolist()};{batch.inputs.sum().item()}\n")

    def training_step(self, batch: Batch) -> Tensor:
        self.record("train", batch)
        return self.weight * batch.inputs.mean()

    def validation_step(self, batch: Batch) -> None:
        self.record("val", batch)

    def test_step(self, batch: Batch) -> None:
        self.record("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **kwargs,
    )


def recorded(folder: Path, name: str) -> list[tuple[list[int], float]]:
    lines = [line.split(";") for line in (folder / name).read_text().splitlines()]
    return [([int(i) for i in indices.strip("[]").split(",")], float(total)) for indices, total in lines]


def indices(batches: list[tuple[list[int], float]]) -> list[int]:
    return [index for batch, _ in batches for index in batch]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
        ("batch_size", 2**31),
        ("num_workers", -1),
        ("val_fraction", 0.0),
        ("val_fraction", 1.0),
        ("val_fraction", float("nan")),
        ("seed", -1),
        ("seed", 2**63),
    ],
)
def test_arguments_out_of_range_are_refused_at_construction(key, value):
    with pytest.raises(UserError, match=f"data.{key} is {value}"):
        data(**{key: value})


def test_classes_are_known_before_setup():
    module = data()
    assert module.classes == ("a", "b", "c")
    assert module.num_classes == 3
    assert module.made == 0
    assert module.datasets == {}


def test_setup_makes_the_datasets_once():
    module = data()
    for stage in ("fit", "test", None):
        module.setup(stage)
    assert module.made == 1
    assert module.names("val") == ["val/0", "val/1", "val/2", "val/3"]


def test_an_empty_split_is_refused():
    for sizes, split in (((0, 4, 5), "train"), ((10, 0, 5), "val"), ((10, 4, 0), "test")):
        with pytest.raises(UserError, match=f"NoiseData: the {split} split has no samples; give some"):
            data(sizes).setup()


def test_classes_that_nothing_is_learnt_of_are_refused():
    with pytest.raises(UserError, match="NoiseData: 3 classes, but 2 training samples; give more samples"):
        data((2, 4, 5)).setup()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([], "here: no classes; give data of two or more"),
        (["a"], "here: one class, a; give data of two or more"),
        (["a", "b", "a"], "here: 2 classes of one name, a; give each its own"),
        (["a", "\ud800"], r"here: class '\\ud800' can't be written as UTF-8; rename it"),
    ],
)
def test_classes_that_cannot_be_told_apart_are_refused_with_the_root(classes, message):
    class Rooted(NoiseData):
        def __init__(self) -> None:
            self.root = Path("here")
            ClassificationData.__init__(self, classes)

    with pytest.raises(UserError, match=message):
        Rooted().num_classes  # noqa: B018


def test_classes_absent_from_a_split_are_counted():
    with pytest.warns(UserWarning, match="1 of 3 classes have no sample in the val split: c"):
        data((10, 2, 5)).setup()


@pytest.mark.filterwarnings("error")
def test_batches_are_padded_and_know_their_samples():
    module = data(batch_size=3)
    module.setup()
    first, last = module.test_dataloader()
    assert first.index.tolist() == [0, 1, 2]
    assert last.index.tolist() == [3, 4]
    assert first.target.tolist() == [0, 1, 2]
    assert first.target.dtype == first.index.dtype == torch.int64
    assert first.inputs.shape == (3, 3, 3)
    assert first.mask.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert (first.inputs[~first.mask] == 0).all()
    (predicted, *_) = module.predict_dataloader()
    assert torch.equal(predicted.inputs, first.inputs)


@pytest.mark.parametrize(
    ("size", "batch_size", "sizes"), [(10, 4, [4, 4, 2]), (9, 4, [4, 4]), (3, 1, [1, 1, 1]), (1, 4, [1])]
)
def test_training_leaves_out_a_last_batch_of_one_only(size, batch_size, sizes):
    module = data((size, 4, 9), batch_size=batch_size)
    module.datasets = module.make_datasets()
    assert [len(batch.index) for batch in module.train_dataloader()] == sizes
    assert sum(len(batch.index) for batch in module.test_dataloader()) == 9


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_epochs_differ_and_do_not_depend_on_workers(tmp_path):
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        trainer(folder, max_epochs=2).fit(Recorder(folder), data(num_workers=workers, batch_size=4))
    epochs = [recorded(tmp_path / "0", f"train-{epoch}-0") for epoch in (0, 1)]
    assert sorted(indices(epochs[0])) == list(range(10)) == sorted(indices(epochs[1]))
    assert indices(epochs[0]) != indices(epochs[1])
    assert not {total for _, total in epochs[0]} & {total for _, total in epochs[1]}
    assert recorded(tmp_path / "0", "val-0-0") == recorded(tmp_path / "0", "val-1-0")
    for name in ("train-0-0", "train-1-0", "val-0-0", "val-1-0"):
        assert recorded(tmp_path / "0", name) == recorded(tmp_path / "2", name)


def on(device: str, devices: int = 1) -> Any:
    """What is looked at of a Trainer, with a GPU that may not be there."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, num_devices=devices, global_rank=0, world_size=1, training=False)


def loader(module: ClassificationData, engine: Any) -> Any:
    module.setup()
    module.trainer = engine
    return module.train_dataloader()


def test_batches_come_from_processes_and_pinned_memory_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    for engine, workers, pinned in ((None, 0, False), (on("cpu"), 0, False), (on("cuda"), 5, True)):
        found = loader(data(), engine)
        assert (found.num_workers, found.pin_memory, found.persistent_workers) == (workers, pinned, workers > 0)
    # A share of the CPUs for each process, and all of one CPU for the training.
    assert [loader(data(), on("cuda", devices)).num_workers for devices in (2, 4, 8)] == [2, 0, 0]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    assert loader(data(), on("cuda")).num_workers == 8
    chosen = loader(data(num_workers=0, pin_memory=False), on("cuda"))
    assert (chosen.num_workers, chosen.pin_memory) == (0, False)
    assert loader(data(pin_memory=True), on("cpu")).pin_memory


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_pinned(workers):
    module = data(num_workers=workers)
    for batch in loader(module, on("cuda")):
        assert isinstance(batch, Batch)
        assert all(part.is_pinned() for part in batch if part is not None)


@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_every_split(tmp_path):
    trainer(tmp_path, max_epochs=1, devices=2, strategy="ddp_fork").fit(
        Recorder(tmp_path), data((11, 5, 5), batch_size=2)
    )
    train = [indices(recorded(tmp_path, f"train-0-{rank}")) for rank in (0, 1)]
    assert [len(rank) for rank in train] == [5 - 1, 5 - 1]  # 5 each, and the last batch would hold a single one
    assert len({*train[0], *train[1]}) == 8
    val = [indices(recorded(tmp_path, f"val-0-{rank}")) for rank in (0, 1)]
    assert val == [[0, 1, 4], [2, 3, 0]]  # the second 0 isn't counted


@pytest.mark.filterwarnings("ignore")
def test_overfitting_a_batch_works(tmp_path):
    trainer(tmp_path, max_epochs=2, overfit_batches=1).fit(Recorder(tmp_path), data(batch_size=4))
    assert recorded(tmp_path, "train-0-0") == recorded(tmp_path, "train-1-0")
    assert indices(recorded(tmp_path, "train-0-0")) == [0, 1, 2, 3]


def test_balanced_sampling_draws_classes_alike_for_any_number_of_workers(tmp_path):
    uneven = {"train": [0] * 60 + [1] * 30 + [2] * 10, "val": [0, 1, 2], "test": [0, 1, 2]}
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        module = NoiseData(uneven, sampling="balanced", batch_size=10, num_workers=workers)
        trainer(folder, max_epochs=3, limit_val_batches=0).fit(Recorder(folder), module)
    batches = [recorded(tmp_path / "0", f"train-{epoch}-0") for epoch in range(3)]
    assert batches == [recorded(tmp_path / "2", f"train-{epoch}-0") for epoch in range(3)]
    targets = torch.tensor(uneven["train"])[[index for epoch in batches for index in indices(epoch)]]
    assert len(targets) == 300
    # Four standard deviations of a count.
    assert (torch.bincount(targets, minlength=3) - 100).abs().max() < 4 * (300 * 2 / 9) ** 0.5
