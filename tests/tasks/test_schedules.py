"""Learning-rate factors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkformer_pl.tasks import Constant, StepDecay, WarmupCosine

progress = st.floats(0, 1)


@given(progress)
def test_constant(at):
    assert Constant()(at) == 1


@given(progress, st.lists(st.floats(0.01, 0.99), max_size=4), st.floats(0.01, 1))
def test_step_decay_never_rises_and_drops_at_each_milestone(at, milestones, factor):
    schedule = StepDecay(milestones, factor)
    assert schedule(0) == 1
    assert schedule(1) == pytest.approx(factor ** len(milestones))
    assert schedule(at) >= schedule(min(at + 0.1, 1))
    for milestone in milestones:
        assert schedule(milestone) <= factor + 1e-12


@given(progress, st.floats(0, 0.9), st.floats(0, 1))
def test_warmup_cosine_rises_then_falls_to_its_floor(at, warmup, floor):
    schedule = WarmupCosine(warmup, floor)
    assert schedule(warmup) == pytest.approx(1)
    assert schedule(1) == pytest.approx(floor)
    assert 0 <= schedule(at) <= 1
    later = min(at + 0.05, 1)
    if later < warmup:
        assert schedule(at) <= schedule(later)
    elif at > warmup:
        assert schedule(at) >= schedule(later)


@pytest.mark.parametrize("make", [lambda: StepDecay([0.0]), lambda: StepDecay([1.0]), lambda: WarmupCosine(1.0)])
def test_values_without_a_meaning_are_refused(make):
    with pytest.raises(ValueError, match=r"between 0 and 1|must be in"):
        make()
