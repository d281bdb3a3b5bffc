"""Draws: complete, equal across ranks, reproducible."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkformer_pl.data import Draw, EpochSampler
from sinkformer_pl.errors import UserError

sizes = st.integers(0, 60)
worlds = st.integers(1, 5)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 1000)


def batched(items: Sequence[Draw], size: int) -> Iterator[Sequence[Draw]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def draws(
    size: int, *, seed: int = 0, epoch: int = 0, shuffle: bool, world_size: int = 1, batch_size: int = 1
) -> list[list[Draw]]:
    ranks = []
    for rank in range(world_size):
        sampler = EpochSampler(
            size, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size, batch_size=batch_size
        )
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    return ranks


@given(sizes, seeds, epochs, worlds, st.integers(1, 8))
def test_evaluation_deals_the_batches_of_a_single_process_to_ranks_in_step(size, seed, epoch, world_size, batch_size):
    ranks = draws(size, seed=seed, epoch=epoch, shuffle=False, world_size=world_size, batch_size=batch_size)
    alone = draws(size, seed=seed, epoch=0, shuffle=False)[0]
    assert [draw.index for draw in alone] == list(range(size))
    assert all(draw.counted for draw in alone)
    steps = [list(batched(rank, batch_size)) for rank in ranks]
    assert len({len(batches) for batches in steps}) == 1
    dealt = [batch for step in zip(*steps, strict=True) for batch in step]
    counted = [batch for batch in dealt if batch[0].counted]
    assert counted == list(batched(alone, batch_size))
    # Whoever has no batch in the last round takes one sample that isn't counted.
    assert all(len(batch) == 1 and not batch[0].counted for batch in dealt[len(counted) :])


@given(sizes, seeds, epochs, worlds)
def test_training_ranks_draw_equally_many_and_share_one_order(size, seed, epoch, world_size):
    if size < world_size:
        with pytest.raises(UserError, match="fewer devices"):
            draws(size, shuffle=True, world_size=world_size)
        return
    ranks = draws(size, seed=seed, epoch=epoch, shuffle=True, world_size=world_size)
    assert {len(rank) for rank in ranks} == {size // world_size}
    alone = draws(size, seed=seed, epoch=epoch, shuffle=True)[0]
    # Interleaved, the ranks give the order of a single process: draws and their seeds are those of any device count.
    interleaved = [draw for step in zip(*ranks, strict=True) for draw in step]
    assert interleaved == alone[: len(interleaved)]


@given(seeds, st.lists(epochs, min_size=2, max_size=2, unique=True))
def test_training_epochs_differ_in_order_and_seeds_and_can_be_repeated(seed, two_epochs):
    first, second = (draws(40, seed=seed, epoch=epoch, shuffle=True)[0] for epoch in two_epochs)
    assert [draw.index for draw in first] != [draw.index for draw in second]
    assert not {draw.seed for draw in first} & {draw.seed for draw in second}
    assert first == draws(40, seed=seed, epoch=two_epochs[0], shuffle=True)[0]
    assert sorted(draw.index for draw in first) == list(range(40))


def test_seeds_differ_between_samples_and_fit_into_torch():
    drawn = draws(5000, shuffle=False)[0]
    assert len({draw.seed for draw in drawn}) == 5000
    assert all(0 <= draw.seed < 2**63 for draw in drawn)


def test_another_seed_gives_another_order():
    assert draws(40, seed=1, shuffle=True) != draws(40, seed=2, shuffle=True)


@given(st.integers(1, 120), seeds, epochs, worlds, st.integers(1, 6))
def test_batches_of_similar_length_leave_the_draws_complete_and_the_ranks_equal(size, seed, epoch, world, batch_size):
    if size < world:
        return
    lengths = np.random.default_rng(seed).integers(1, 50, size).tolist()
    ranks = []
    for rank in range(world):
        sampler = EpochSampler(
            size, seed=seed, shuffle=True, rank=rank, world_size=world, lengths=lengths, batch_size=batch_size
        )
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1]) == size // world
        assert list(sampler) == ranks[-1]
    drawn = [draw for rank in ranks for draw in rank]
    assert len({draw.index for draw in drawn}) == size - size % world
    # Which seed a sample gets depends on neither its length nor the ranks.
    assert set(drawn) <= set(draws(size, seed=seed, epoch=epoch, shuffle=True)[0])


def test_batches_are_of_similar_length_over_all_ranks_and_come_in_random_order():
    lengths = np.random.default_rng(0).permutation(np.arange(6400))
    batches = []
    for rank in range(2):
        sampler = EpochSampler(
            6405, seed=0, shuffle=True, rank=rank, world_size=2, lengths=[*lengths, *[1] * 5], batch_size=16
        )
        order = [lengths[draw.index] if draw.index < 6400 else 1 for draw in sampler]
        batches.append(np.array(order[: 200 * 16]).reshape(200, 16))
    together = np.concatenate(batches, axis=1)
    assert np.median(np.ptp(together, axis=1)) < 6400 / 40
    means = together.mean(axis=1)
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.25
    sampler.set_epoch(1)
    neighbours = [draw.index for draw in sampler][:16]
    assert max(len({*neighbours} & {*row}) for row in batches[1].tolist()) < 16


@pytest.mark.parametrize("lengths", [None, list(range(40, 0, -1))], ids=["any order", "by length"])
def test_an_epoch_that_was_cut_off_goes_on_with_the_draws_that_are_left(lengths):
    for rank in range(2):
        sampler = EpochSampler(40, seed=3, shuffle=True, rank=rank, world_size=2, lengths=lengths, batch_size=4)
        sampler.set_epoch(2)
        whole = list(sampler)
        for start in (4, 16, 20):
            sampler.start = start
            assert list(sampler) == whole[start:]
            assert len(sampler) == 20


def test_evaluation_stays_in_order_whatever_the_lengths():
    sampler = EpochSampler(9, seed=0, shuffle=False, lengths=list(range(9, 0, -1)), batch_size=2)
    assert [draw.index for draw in sampler] == list(range(9))


def weighted(weights, *, rank=0, world_size=1, epoch=3, start=0, **more):
    sampler = EpochSampler(
        len(weights), seed=5, shuffle=True, rank=rank, world_size=world_size, weights=weights, batch_size=4, **more
    )
    sampler.set_epoch(epoch)
    sampler.start = start
    return list(sampler)


@pytest.mark.parametrize("lengths", [None, np.arange(90) % 7])
def test_weighted_draws_are_one_order_whatever_the_processes_and_go_on_anywhere(lengths):
    weights = np.arange(90) % 4
    alone = weighted(weights, lengths=lengths)
    assert len(alone) == 90
    assert weighted(weights, lengths=lengths, start=37) == alone[37:]
    if lengths is None:
        ranks = [weighted(weights, rank=rank, world_size=4) for rank in range(4)]
        assert [draw for step in zip(*ranks, strict=True) for draw in step] == alone[:88]
    assert all(weights[draw.index] for draw in alone)
    assert weighted(weights, lengths=lengths, epoch=4) != alone
    # One that is drawn more than once is changed otherwise each time.
    assert len({draw.index for draw in alone}) < 90
    assert len({draw.seed for draw in alone}) == 90


def test_weighted_draws_are_in_proportion_to_the_weights():
    weights = np.repeat([1.0, 3.0, 6.0], [500, 300, 100])
    drawn = np.concatenate([[draw.index for draw in weighted(weights, epoch=epoch)] for epoch in range(20)])
    found = np.bincount(np.searchsorted([500, 800], drawn, side="right"), minlength=3)
    expected = 18_000 * np.array([500, 900, 600]) / 2000
    # Four standard deviations of a count.
    assert (abs(found - expected) < 4 * np.sqrt(expected)).all()
