"""Surfaces: the right places, about evenly covered."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkformer_pl.data.pointclouds.shapes import FAMILIES, sample_shape

families = st.sampled_from(sorted(FAMILIES))
seeds = st.integers(0, 2**32 - 1)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def clean(family: str, seed: int, count: int = 200, **kwargs: float) -> np.ndarray:
    return sample_shape(family, rng(seed), count=count, **{"tilt": 0.0, "noise": 0.0, "occlusion": 0.0} | kwargs)


def evenness(family: str) -> float:
    """Return how much the local density varies, told by the distance to the 20th neighbour: 0.11 by chance alone."""
    points = FAMILIES[family](rng(3), 4000)
    distances = np.linalg.norm(points[:400, None] - points[None], axis=2)
    radius = np.partition(distances, 20, axis=1)[:, 20]
    return float(radius.std() / radius.mean())


@given(families, seeds, st.integers(1, 300), st.floats(0, 0.9))
def test_clouds_have_their_size_and_depend_on_the_generator_alone(family, seed, count, occlusion):
    cloud = sample_shape(family, rng(seed), count=count, tilt=0.5, noise=0.1, occlusion=occlusion)
    assert cloud.shape == (count, 3)
    assert cloud.dtype == np.float32
    assert np.isfinite(cloud).all()
    assert np.abs(cloud).max() < 5
    again = sample_shape(family, rng(seed), count=count, tilt=0.5, noise=0.1, occlusion=occlusion)
    assert np.array_equal(cloud, again)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_points_cover_a_surface_about_evenly(family):
    assert evenness(family) < 0.2


def test_the_outside_of_a_torus_has_more_points_as_it_has_more_area():
    points = FAMILIES["torus"](rng(0), 4000)
    distance = np.hypot(points[:, 0], points[:, 1])
    thickness = points[:, 2].max()
    assert (distance > 1).mean() == pytest.approx(0.5 + thickness / math.pi, abs=0.04)


def test_families_are_where_their_equations_say():
    for seed in range(5):
        torus = FAMILIES["torus"](rng(seed), 300)
        ring = np.hypot(torus[:, 0], torus[:, 1]) - 1
        assert np.ptp(np.hypot(ring, torus[:, 2])) < 1e-12
        box = FAMILIES["box"](rng(seed), 300)
        assert (np.isclose(np.abs(box), np.abs(box).max(axis=0), atol=0.02).any(axis=1)).all()
        tube = FAMILIES["tube"](rng(seed), 300)
        assert len(np.unique(np.hypot(tube[:, 0], tube[:, 1]).round(9))) == 2
        cone = FAMILIES["cone"](rng(seed), 3000)
        side = cone[cone[:, 2] > 0]
        assert np.linalg.matrix_rank(np.c_[np.hypot(side[:, 0], side[:, 1]), side[:, 2], np.ones(len(side))], 1e-6) == 2
        hourglass = FAMILIES["hourglass"](rng(seed), 300)
        assert np.ptp(np.abs(hourglass[:, 2]) / np.hypot(hourglass[:, 0], hourglass[:, 1])) < 1e-9


def test_proportions_differ():
    extents = np.array([np.ptp(FAMILIES["ellipsoid"](rng(seed), 500), axis=0) for seed in range(20)])
    assert (extents.std(axis=0) > 0.1).all()


def lean(seed: int, tilt: float) -> float:
    """Return the angle between a capsule's axis, its direction of largest spread, and z, whichever way it points."""
    axis = np.linalg.eigh(np.cov(clean("capsule", seed, 2000, tilt=tilt).T))[1][:, -1]
    return math.acos(min(1.0, abs(axis[2])))


def test_lean_is_anything_up_to_the_tilt():
    leans = [lean(seed, 1.0) for seed in range(40)]
    assert max(leans) <= 1.0 + 0.2
    assert np.histogram(leans, bins=4, range=(0, 1))[0].min() >= 4


def test_tilt_and_turn_keep_distances():
    upright, turned = clean("saddle", 1), clean("saddle", 1, tilt=1.0)
    lengths = [np.linalg.norm(cloud[:, None] - cloud[None], axis=2) for cloud in (upright, turned)]
    assert np.allclose(*lengths, atol=1e-5)
    assert not np.allclose(upright, turned, atol=0.05)


def test_noise_has_its_standard_deviation():
    error = clean("box", 2, 5000, noise=0.1) - clean("box", 2, 5000)
    assert error.std() == pytest.approx(0.1, rel=0.05)


def test_occlusion_cuts_along_a_plane():
    whole = [np.ptp(clean("ellipsoid", seed, 1000), axis=0).prod() for seed in range(40)]
    cut = [np.ptp(clean("ellipsoid", seed, 1000, occlusion=0.6), axis=0).prod() for seed in range(40)]
    assert np.mean(cut) < 0.9 * np.mean(whole)
