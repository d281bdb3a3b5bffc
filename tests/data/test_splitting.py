"""Division into training and validation."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkformer_pl.data import stratified_split


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
