"""A mean that no order of its terms changes; counts of what was taken for what."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from sinkformer_pl.batch import UNCOUNTED
from sinkformer_pl.tasks.metrics import Confusion, ExactMean, accuracies, accuracy, mean_accuracy

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


def test_values_that_are_not_counted_are_left_out():
    metric = ExactMean()
    metric.update(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True]))
    assert metric.compute() == 2.0


def test_counts_and_accuracies_are_those_of_torchmetrics():
    torch.manual_seed(0)
    scores, target = torch.randn(40, 5), torch.randint(3, (40,))
    # No sample is of class 3, and none of class 4 nor taken for it.
    scores[:, 4] = -10.0
    target[::7] = UNCOUNTED
    metric = Confusion(5)
    metric.update(scores[:15], target[:15])
    metric.update(scores[15:], target[15:])
    found = metric.compute()
    assert found.equal(multiclass_confusion_matrix(scores, target, 5, ignore_index=UNCOUNTED))
    for ours, average in ((accuracy, "micro"), (mean_accuracy, "macro"), (accuracies, None)):
        assert ours(found).equal(multiclass_accuracy(scores, target, 5, average=average, ignore_index=UNCOUNTED))
    assert accuracy(Confusion(5).compute()) == mean_accuracy(Confusion(5).compute()) == 0
