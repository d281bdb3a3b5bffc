"""Draws: complete, equal across ranks, reproducible."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkformer_pl.data import Draw, EpochSampler
from sinkformer_pl.errors import UserError

sizes = st.integers(0, 60)
worlds = st.integers(1, 5)
seeds = st.integers(0, 2**63 - 1)
epochs = st.integers(0, 1000)


def draws(size: int, *, seed: int = 0, epoch: int = 0, shuffle: bool, world_size: int = 1) -> list[list[Draw]]:
    ranks = []
    for rank in range(world_size):
        sampler = EpochSampler(size, seed=seed, shuffle=shuffle, rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(sampler) == len(ranks[-1])
    return ranks


@given(sizes, seeds, epochs, worlds)
def test_evaluation_draws_each_sample_once_over_all_ranks_whatever_the_epoch(size, seed, epoch, world_size):
    ranks = draws(size, seed=seed, epoch=epoch, shuffle=False, world_size=world_size)
    assert sorted(draw.index for rank in ranks for draw in rank) == list(range(size))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    assert sorted(draw for rank in ranks for draw in rank) == draws(size, seed=seed, epoch=0, shuffle=False)[0]


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
