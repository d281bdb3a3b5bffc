"""What all sources of point clouds share, on the smallest source."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sinkformer_pl.data import Augmentation, Clouds, Draw, EpochSampler, PointCloudData, Source
from sinkformer_pl.errors import UserError


def clouds(points: list[Tensor], part: str) -> Clouds:
    return Clouds(
        points=torch.cat(points),
        sizes=torch.tensor([len(cloud) for cloud in points]),
        targets=torch.arange(len(points)) % 2,
        names=[f"{part}/{index}" for index in range(len(points))],
    )


class GivenClouds(PointCloudData):
    def __init__(self, train: list[Tensor], test: list[Tensor], **kwargs: Any) -> None:
        super().__init__(["a", "b"], **kwargs)
        self.source = Source(clouds(train, "train"), clouds(test, "test"))

    def load(self) -> Source:
        return self.source


def random_clouds(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(10 + index, 3, generator=generator) * 5 + 3 for index in range(count)]


def given(**kwargs: Any) -> GivenClouds:
    module = GivenClouds(random_clouds(20, 0), random_clouds(6, 1), **kwargs)
    module.setup()
    return module


def set_epoch(loader: DataLoader, epoch: int) -> None:
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(epoch)


def rows(points: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in points.tolist()}


def test_splits_hold_each_cloud_once_and_unchanged_where_nothing_is_asked_for():
    module = given(standardize=False)
    raw = [*random_clouds(20, 0), *random_clouds(6, 1)]
    assert sorted([*module.names("train"), *module.names("val")]) == sorted(f"train/{i}" for i in range(20))
    assert module.names("test") == [f"test/{index}" for index in range(6)]
    for split, dataset in module.datasets.items():
        for index, name in enumerate(module.names(split)):
            place = int(name.split("/")[1])
            sample = dataset[Draw(index, 5)]
            assert torch.equal(sample.inputs, raw[place + 20 * (split == "test")])
            assert (sample.target, sample.index) == (place % 2, index)


def test_training_takes_another_subset_each_time_and_evaluation_one_for_each_seed():
    module = given(standardize=False, num_points=8)
    train = module.datasets["train"]
    raw = random_clouds(20, 0)[int(module.names("train")[3].split("/")[1])]
    subsets = [train[Draw(3, seed)].inputs for seed in range(20)]
    assert all(len(rows(subset)) == 8 and rows(subset) <= rows(raw) for subset in subsets)
    assert set().union(*map(rows, subsets)) == rows(raw)
    assert torch.equal(train[Draw(3, 0)].inputs, subsets[0])

    def evaluated(split: str, **kwargs: Any) -> Tensor:
        loader = getattr(given(num_points=8, batch_size=99, **kwargs), f"{split}_dataloader")()
        set_epoch(loader, kwargs.get("num_workers", 0))
        return next(iter(loader)).inputs

    for split in ("val", "test"):
        assert torch.equal(evaluated(split), evaluated(split, num_workers=2))
    assert not torch.equal(evaluated("test"), evaluated("test", seed=1))


def test_subsets_are_standardized():
    for sample in (given(num_points=8).datasets[split][0] for split in ("train", "val", "test")):
        assert torch.allclose(sample.inputs.mean(dim=0), torch.zeros(3), atol=1e-5)
        assert float(sample.inputs.square().mean()) == pytest.approx(1, abs=1e-4)


def test_augmentation_changes_training_only_and_keeps_the_stored_clouds():
    plain = given()
    augmented = given(augmentation=Augmentation(rotation=1.0, jitter=0.1))
    for _ in range(2):
        for split in ("train", "val", "test"):
            one, other = plain.datasets[split], augmented.datasets[split]
            same = [torch.equal(one[index].inputs, other[index].inputs) for index in range(len(one))]
            assert same == [split != "train"] * len(same)


def test_augmentation_differs_each_epoch_and_is_the_same_for_any_number_of_workers():
    def epoch(number: int, workers: int) -> list[Tensor]:
        module = given(augmentation=Augmentation(jitter=0.1, dropout=0.5), num_workers=workers, batch_size=5)
        loader = module.train_dataloader()
        set_epoch(loader, number)
        batches = list(loader)
        assert any(batch.mask is not None for batch in batches)
        return [batch.inputs for batch in batches]

    first, again, second = epoch(0, 0), epoch(0, 2), epoch(1, 0)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not any(
        one.shape == other.shape and torch.equal(one, other) for one, other in zip(first, second, strict=True)
    )


def test_clouds_of_unequal_size_come_padded_with_their_mask():
    module = given(batch_size=6, standardize=False)
    (batch,) = module.test_dataloader()
    assert batch.inputs.shape == (6, 15, 3)
    assert batch.inputs.dtype == torch.float32
    assert batch.mask.sum(dim=1).tolist() == [10, 11, 12, 13, 14, 15]
    assert torch.equal(batch.inputs[batch.mask], torch.cat(random_clouds(6, 1)))
    assert (batch.inputs[~batch.mask] == 0).all()


def test_clouds_of_equal_size_need_no_mask():
    (batch,) = given(batch_size=6, num_points=10).test_dataloader()
    assert batch.mask is None
    assert batch.inputs.shape == (6, 10, 3)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.randn(9, 3), "has 9 points; remove it or set data.num_points to 9 or less"),
        (torch.full((10, 3), float("nan")), "not finite"),
        (torch.randn(10, 3) * 1e20, "too large for single precision"),
        (torch.cat([torch.randn(9, 3), torch.tensor([[0.0, float("-inf"), 0.0]])]), "not finite"),
        (torch.full((10, 3), 2.0), "all its points in one place"),
        (torch.empty(0, 3), "has 0 points; remove it$"),
    ],
)
def test_an_unusable_cloud_is_named(part, bad, message):
    parts = {"train": random_clouds(8, 0), "test": random_clouds(8, 1)}
    parts[part][5] = bad
    with pytest.raises(UserError, match=f"GivenClouds: cloud {part}/5 .*{message}"):
        GivenClouds(**parts, num_points=10).setup()


def test_points_on_a_line_are_usable():
    line = torch.cat([torch.zeros(10, 2), torch.arange(10.0)[:, None]], dim=1)
    GivenClouds([line] * 8, [line] * 8).setup()


@pytest.mark.parametrize("num_points", [1, 0, -3])
def test_too_few_points_to_draw_are_refused_at_construction(num_points):
    with pytest.raises(UserError, match=r"data\.num_points"):
        GivenClouds([], [], num_points=num_points)


def test_features_stay_as_they_are_and_normals_turn_with_the_cloud():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(50, 3, generator=generator)
    normals = torch.nn.functional.normalize(points)
    cloud = torch.cat([points, torch.arange(50.0)[:, None], normals], dim=1)
    turn = Augmentation(rotation=3.0, scale=(0.5, 2.0))
    changed = turn(cloud, torch.Generator().manual_seed(1), normals=4)
    assert torch.equal(changed[:, 3], cloud[:, 3])
    assert torch.equal(changed[:, :3], turn(points, torch.Generator().manual_seed(1)))
    # Tangents of the surface stay at right angles to its normals.
    tangents = torch.linalg.cross(normals, torch.randn(50, 3, generator=generator))
    moved = turn(tangents, torch.Generator().manual_seed(1))
    assert (changed[:, 4:] * moved).sum(1).abs().max() < 1e-5
    assert torch.allclose(changed[:, 4:].norm(dim=1), torch.ones(50))
