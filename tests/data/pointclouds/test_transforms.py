"""Standardising and augmentation of clouds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkformer_pl.data import Augmentation
from sinkformer_pl.data.pointclouds.transforms import standardize
from sinkformer_pl.errors import UserError

seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def cloud(seed: int = 0, count: int = 50) -> torch.Tensor:
    return torch.randn(count, 3, generator=generator(seed)) * torch.tensor([3.0, 1.0, 0.5])


@given(seeds, st.floats(0.01, 100), st.floats(-10, 10))
def test_standardize_removes_place_and_size_only(seed, factor, shift):
    points = cloud(seed)
    result = standardize(points)
    torch.testing.assert_close(result.mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(result.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(standardize(points * factor + shift * factor), result, atol=1e-4, rtol=1e-4)
    # One factor for all axes, so proportions stay.
    ratio = (points - points.mean(dim=0)) / result
    torch.testing.assert_close(ratio, ratio[0, 0].expand(50, 3), rtol=1e-3, atol=0)


def test_standardize_maps_a_single_place_to_zero():
    assert torch.equal(standardize(torch.full((4, 3), 7.0)), torch.zeros(4, 3))


@given(seeds)
def test_augmentation_is_off_by_default(seed):
    points = cloud(seed)
    assert torch.equal(Augmentation()(points, generator(seed)), points)


@given(seeds)
def test_augmentation_depends_on_the_generator_alone_and_leaves_its_input(seed):
    points = cloud()
    before = points.clone()
    augment = Augmentation(rotation=1.0, scale=(0.5, 2.0), jitter=0.1, dropout=0.5)
    torch.manual_seed(seed)
    first = augment(points, generator(seed))
    torch.manual_seed(seed + 1)
    assert torch.equal(augment(points, generator(seed)), first)
    other = augment(points, generator(seed + 1))
    assert other.shape != first.shape or not torch.equal(other, first)
    assert torch.equal(points, before)


@given(seeds, st.floats(0, math.pi))
def test_rotation_turns_about_z_within_its_range(seed, rotation):
    points = cloud(seed).double()
    turned = Augmentation(rotation=rotation)(points, generator(seed))
    torch.testing.assert_close(turned[:, 2], points[:, 2])
    torch.testing.assert_close(turned.norm(dim=1), points.norm(dim=1))
    crossed = points[:, 0] * turned[:, 1] - points[:, 1] * turned[:, 0]
    angles = torch.atan2(crossed, (points * turned)[:, :2].sum(dim=1))
    torch.testing.assert_close(angles, angles[:1].expand(50))
    assert abs(float(angles[0])) <= rotation + 1e-9


def test_rotation_takes_both_directions():
    point = torch.tensor([[1.0, 0.0, 0.0]])
    angles = torch.stack([Augmentation(rotation=1.0)(point, generator(seed))[0, 1] for seed in range(50)]).asin()
    assert angles.min() < -0.7
    assert angles.max() > 0.7


@given(seeds)
def test_scale_stretches_each_axis_by_its_own_factor(seed):
    points = cloud(seed)
    ratio = Augmentation(scale=(0.5, 2.0))(points, generator(seed)) / points
    torch.testing.assert_close(ratio, ratio[:1].expand(50, 3))
    assert ((ratio >= 0.499) & (ratio <= 2.001)).all()
    assert len(set(ratio[0].tolist())) == 3


def test_jitter_has_its_standard_deviation():
    points = torch.zeros(20_000, 3)
    noise = Augmentation(jitter=0.25)(points, generator(0))
    assert float(noise.std()) == pytest.approx(0.25, rel=0.02)


@given(seeds, st.floats(0, 0.999), st.integers(1, 60))
def test_dropout_leaves_out_a_share_of_points_and_at_least_one_stays(seed, dropout, count):
    points = cloud(seed, count)
    left = Augmentation(dropout=dropout)(points, generator(seed))
    assert max(1, (1 - dropout) * count - 1e-9) <= len(left) <= count
    rows = {tuple(row) for row in points.tolist()}
    assert len({tuple(row) for row in left.tolist()} & rows) == len(left)


def test_dropout_gives_clouds_of_many_sizes():
    sizes = {len(Augmentation(dropout=0.5)(cloud(), generator(seed))) for seed in range(60)}
    assert len(sizes) > 10
    assert min(sizes) < 30
    assert max(sizes) > 45


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rotation", -1.0),
        ("rotation", math.nan),
        ("scale", (2.0, 1.0)),
        ("scale", (0.0, 1.0)),
        ("scale", (1.0, math.inf)),
        ("jitter", -0.1),
        ("jitter", math.inf),
        ("dropout", 1.0),
        ("dropout", -0.1),
    ],
)
def test_values_without_a_meaning_are_refused(name, value):
    with pytest.raises(UserError, match=f"augmentation.{name}"):
        Augmentation(**{name: value})
