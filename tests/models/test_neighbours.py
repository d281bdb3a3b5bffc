"""Centres and neighbours, against numpy and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from sinkformer_pl.models.neighbours import farthest_points, nearest_neighbours, take

SIZES = [30, 17, 5, 1]


def clouds(seed=0, dtype=torch.float64):
    """Clouds of SIZES, padded on the left and on the right in turn by points far away."""
    points = torch.randn(len(SIZES), 30, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    mask = torch.stack([torch.arange(30) < size for size in SIZES])
    mask[1] = mask[1].flip(0)
    return points.where(mask[..., None], 1e6), mask


def greedy(points, count):
    nearest = np.linalg.norm(points - points.mean(0), axis=1)
    chosen = []
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = np.linalg.norm(points[:, None] - points[chosen], axis=2).min(1)
    return chosen


@pytest.mark.parametrize("count", [1, 4, 30])
def test_farthest_points_are_those_of_a_greedy_search(count):
    points, mask = clouds()
    chosen = farthest_points(points, mask, count)
    for i, size in enumerate(SIZES):
        members = mask[i].nonzero()[:, 0]
        wanted = members[greedy(points[i, mask[i]].numpy(), min(count, size))]
        assert chosen[i, :size].equal(wanted)
    assert farthest_points(points[:1], None, count).equal(chosen[:1])


def test_every_point_is_a_centre_before_any_is_twice():
    points, mask = clouds()
    points[0] = 0.25
    for count in (30, 100):
        chosen = farthest_points(points, mask, count)
        assert chosen.shape == (4, 30)
        for i, size in enumerate(SIZES):
            members = mask[i].nonzero()[:, 0]
            assert chosen[i, :size].sort().values.equal(members)
            assert set(chosen[i, size:].tolist()) <= {int(members[0])}


def test_the_order_of_the_points_changes_no_centre():
    points, mask = clouds()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    moved = farthest_points(points[:, order], mask[:, order], 10)
    for i, size in enumerate(SIZES):
        wanted = take(points, farthest_points(points, mask, 10))[i, :size]
        assert take(points[:, order], moved)[i, :size].equal(wanted)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_nearest_neighbours_are_those_of_scikit_learn(k):
    points, mask = clouds()
    queries = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = nearest_neighbours(queries, points, mask, k)
    assert found.shape == (4, 6, k)
    for i, size in enumerate(SIZES):
        near = NearestNeighbors(n_neighbors=min(k, size)).fit(points[i, mask[i]].numpy())
        wanted = mask[i].nonzero()[:, 0][torch.from_numpy(near.kneighbors(queries[i].numpy())[1])]
        assert found[i].equal(wanted[:, torch.arange(k) % size])
    assert nearest_neighbours(queries[:1], points[:1], None, k).equal(found[:1])


def test_a_cloud_without_points_is_left_to_its_mask():
    points, mask = clouds()
    mask[2] = False
    assert (farthest_points(points, mask, 8)[2] == 0).all()
    near = nearest_neighbours(points, points, mask, 4)[2]
    assert ((near >= 0) & (near < 30)).all()


def test_small_distances_far_from_the_origin_keep_their_digits():
    points, mask = clouds(dtype=torch.float32)
    points = (points * 256).round() / 256  # Exact after the shift.
    with torch.autocast("cpu", torch.bfloat16):
        near, far = nearest_neighbours(points + 512, points + 512, mask, 5), farthest_points(points + 512, mask, 9)
    distance = (take(points, near) - points[:, :, None]).norm(dim=-1)
    wanted = (take(points, nearest_neighbours(points, points, mask, 5)) - points[:, :, None]).norm(dim=-1)
    torch.testing.assert_close(distance[mask], wanted[mask])
    assert far[:3, :5].equal(farthest_points(points.double(), mask, 9)[:3, :5])


def test_half_precision():
    points, mask = clouds(dtype=torch.float32)
    points = points.where(mask[..., None], 0.0).bfloat16()
    assert farthest_points(points, mask, 9).equal(farthest_points(points.float(), mask, 9))
    near, wanted = (nearest_neighbours(x, x, mask, 5) for x in (points, points.float()))
    assert near.equal(wanted)


def test_one_operator_whatever_the_number_of_centres():
    points, mask = clouds()
    sizes = []

    def count_operators(graph, _example):
        sizes.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return graph

    for count in (2, 20):
        torch.compiler.reset()
        compiled = torch.compile(
            lambda points, mask, count=count: farthest_points(points, mask, count),
            fullgraph=True,
            backend=count_operators,
        )
        assert compiled(points, mask).equal(farthest_points(points, mask, count))
    assert sizes[0] == sizes[1]


def test_take():
    points, mask = clouds()
    index = nearest_neighbours(points[:, :7], points, mask, 3)
    assert take(points, index).equal(points[torch.arange(4)[:, None, None], index])
    assert take(points, index[..., 0]).equal(points[torch.arange(4)[:, None], index[..., 0]])
