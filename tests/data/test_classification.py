"""Splits and loaders that every modality shares."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sinkformer_pl.batch import Batch
from sinkformer_pl.data import ClassificationData, Draw, LabelledDataset, Split, stratified_split
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


@given(st.lists(st.integers(0, 4), max_size=60), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_split_is_a_partition_with_every_class_on_both_sides(targets, val_fraction, seed):
    labels = torch.tensor(targets, dtype=torch.int64)
    train, val = stratified_split(labels, val_fraction=val_fraction, seed=seed)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(targets)))
    assert train.tolist() == sorted(train.tolist())
    assert val.tolist() == sorted(val.tolist())
    for label in set(targets):
        in_train, in_val = int((labels[train] == label).sum()), int((labels[val] == label).sum())
        assert in_train >= 1
        assert in_val >= (in_train + in_val >= 2)
        exact = val_fraction * (in_train + in_val)
        assert abs(in_val - exact) <= 1 or in_val in (0, 1) or in_train == 1


def test_split_has_the_size_asked_for_and_depends_on_the_seed():
    labels = torch.arange(2800) % 13
    train, val = stratified_split(labels, val_fraction=400 / 2800, seed=0)
    assert len(train) == 2400
    assert len(val) == 400
    assert torch.equal(val, stratified_split(labels, val_fraction=400 / 2800, seed=0)[1])
    assert not torch.equal(val, stratified_split(labels, val_fraction=400 / 2800, seed=1)[1])


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=80), st.floats(0.05, 0.9), st.integers(0, 99)
)
def test_a_split_never_divides_a_group(samples, val_fraction, seed):
    labels = torch.tensor([label for label, _ in samples], dtype=torch.int64)
    groups = [f"group {number}" for _, number in samples]
    train, val = stratified_split(labels, val_fraction=val_fraction, seed=seed, groups=groups)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(samples)))
    assert not {groups[index] for index in train} & {groups[index] for index in val}
    if samples:
        assert len(train)
    if len({group for (label, _), group in zip(samples, groups, strict=True) if label == samples[0][0]}) >= 2:
        assert len(val)


def test_a_split_of_groups_is_as_stratified_as_the_groups_allow_and_depends_on_the_seed():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (2000,), generator=rng)
    groups = [str(number) for number in torch.randint(0, 300, (2000,), generator=rng).tolist()]
    _, val = stratified_split(labels, val_fraction=0.2, seed=0, groups=groups)
    shares = torch.bincount(labels[val], minlength=4) / torch.bincount(labels, minlength=4)
    assert shares.sub(0.2).abs().max() < 0.01
    assert torch.equal(val, stratified_split(labels, val_fraction=0.2, seed=0, groups=groups)[1])
    assert not torch.equal(val, stratified_split(labels, val_fraction=0.2, seed=1, groups=groups)[1])
    _, single = stratified_split(labels, val_fraction=0.2, seed=0, groups=[str(index) for index in range(2000)])
    wanted = torch.bincount(labels) * 0.2
    assert (torch.bincount(labels[single]) - wanted).abs().max() <= 0.5 + 1e-6


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batch_size", 0),
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
    with pytest.raises(UserError, match="the val split has no samples"):
        data((10, 0, 5)).setup()


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


@pytest.mark.filterwarnings("ignore:.*no sample in the train split")
@pytest.mark.parametrize(
    ("size", "batch_size", "sizes"), [(10, 4, [4, 4, 2]), (9, 4, [4, 4]), (3, 1, [1, 1, 1]), (1, 4, [1])]
)
def test_training_leaves_out_a_last_batch_of_one_only(size, batch_size, sizes):
    module = data((size, 4, 9), batch_size=batch_size)
    module.setup()
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


@pytest.mark.filterwarnings("ignore")
def test_two_processes_share_every_split(tmp_path):
    trainer(tmp_path, max_epochs=1, devices=2, strategy="ddp_fork").fit(
        Recorder(tmp_path), data((11, 5, 5), batch_size=2)
    )
    train = [indices(recorded(tmp_path, f"train-0-{rank}")) for rank in (0, 1)]
    assert [len(rank) for rank in train] == [5 - 1, 5 - 1]  # 5 each, and the last batch would hold a single one
    assert len({*train[0], *train[1]}) == 8
    val = [indices(recorded(tmp_path, f"val-0-{rank}")) for rank in (0, 1)]
    assert val == [[0, 2, 4], [1, 3]]


@pytest.mark.filterwarnings("ignore")
def test_overfitting_a_batch_works(tmp_path):
    trainer(tmp_path, max_epochs=2, overfit_batches=1).fit(Recorder(tmp_path), data(batch_size=4))
    assert recorded(tmp_path, "train-0-0") == recorded(tmp_path, "train-1-0")
    assert indices(recorded(tmp_path, "train-0-0")) == [0, 1, 2, 3]
