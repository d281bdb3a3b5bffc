"""A mean that no order of its terms changes; counts of what was taken for what."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, recall_score

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


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_a_mean_of_nothing_is_no_number():
    assert mean([]).isnan()
    assert mean([[]]).isnan()


def test_values_that_are_not_counted_are_left_out():
    metric = ExactMean()
    metric.update(torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True]))
    assert metric.compute() == 2.0


def test_counts_and_accuracies_are_those_of_scikit_learn():
    torch.manual_seed(0)
    scores, target = torch.randn(40, 5), torch.randint(3, (40,))
    # No sample is of class 3, for which some are taken, and none of class 4 nor taken for it.
    scores[:, 4] = -10.0
    target[::7] = UNCOUNTED
    metric = Confusion(5)
    metric.update(scores[:15], target[:15])
    metric.update(scores[15:], target[15:])
    found, counted = metric.compute(), target != UNCOUNTED
    truth, predicted = target[counted], scores.argmax(-1)[counted]
    assert (predicted == 3).any()
    assert found.tolist() == confusion_matrix(truth, predicted, labels=range(5)).tolist()
    assert accuracy(found).item() == pytest.approx(accuracy_score(truth, predicted))
    with warnings.catch_warnings(action="ignore"):  # of classes that are only predicted
        assert mean_accuracy(found).item() == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert accuracies(found)[:3].tolist() == pytest.approx(
        recall_score(truth, predicted, average=None, labels=[0, 1, 2])
    )
    assert accuracies(found)[3:].isnan().all()


def test_a_class_without_samples_has_no_accuracy_and_is_not_in_the_mean():
    metric = Confusion(3)
    metric.update(torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 0, 2, 2]))
    found = metric.compute()
    torch.testing.assert_close(accuracies(found), torch.tensor([0.5, float("nan"), 1.0]), equal_nan=True)
    assert mean_accuracy(found) == accuracy(found) == 0.75


def test_without_samples_there_is_no_accuracy():
    none = torch.zeros(5, 5, dtype=torch.int64)
    assert accuracy(none).isnan()
    assert mean_accuracy(none).isnan()
