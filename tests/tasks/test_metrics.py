"""A mean that no order of its terms changes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sinkformer_pl.tasks.metrics import ExactMean

values = st.lists(st.floats(0, 100, width=32), min_size=1, max_size=60)


def mean(batches: list[list[float]]) -> torch.Tensor:
    metric = ExactMean()
    for batch in batches:
        metric.update(torch.tensor(batch))
    return metric.compute()


@given(values, st.randoms(use_true_random=False))
def test_the_mean_is_the_same_to_the_last_bit_for_any_batches_in_any_order(values, random):
    shuffled = random.sample(values, len(values))
    cut = random.randint(0, len(values))
    assert torch.equal(mean([values]), mean([shuffled[:cut], [], shuffled[cut:]]))
    torch.testing.assert_close(
        mean([values]).double(), torch.tensor(values, dtype=torch.float64).mean(), rtol=1e-6, atol=0
    )


def test_what_is_not_finite_shows():
    assert mean([[1.0, float("nan")], [2.0]]).isnan()
    assert mean([[1.0, float("inf")]]).isposinf()
