"""Metrics by name against scikit-learn's, with classes that are absent and samples that aren't counted."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, log_loss, roc_auc_score
from torchmetrics import F1Score, Metric
from torchmetrics.classification import MulticlassRecall

from sinkformer_pl.batch import UNCOUNTED, Batch
from sinkformer_pl.errors import UserError
from sinkformer_pl.tasks.named_metrics import as_specs, named_metrics
from sinkformer_pl.tasks.stage_metrics import StageMetrics

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = 2 * torch.randn(60, 5, generator=GENERATOR)
# No sample is of class 3.
TARGET = torch.tensor([0, 1, 2, 4])[torch.randint(4, (60,), generator=GENERATOR)]
HOLDS = torch.rand(60, 5, generator=GENERATOR) < torch.tensor([0.2, 0.5, 0.7, 0.0, 0.4])
PRESENT = [0, 1, 2, 4]
CLASSES = ["a", "b", "c", "d", "e"]


class Sharpness(Metric):
    """A user's own."""

    def __init__(self, power: int = 1):
        super().__init__()
        self.power = power
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, probabilities, target):
        self.total += (probabilities.amax(-1) ** self.power).sum()
        self.count += len(target)

    def compute(self):
        return self.total / self.count


def figures(given, target, *, stage="val"):
    """Count in batches of seven, out of order, with padding, as two processes would."""
    several = target.ndim == 2
    named = named_metrics(as_specs(given), 5, multi_label=several)
    metrics = StageMetrics(stage, 5, multi_label=several, named=named)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    for places in order.split(7):
        padded = torch.cat([places, places[:1]])
        targets = target[padded].float() if several else target[padded].clone()
        targets[-1] = UNCOUNTED
        metrics.count(torch.zeros(len(padded)), LOGITS[padded], Batch(LOGITS, None, targets, padded))
    return {name: float(value) for name, value in metrics.figures(CLASSES).items()}


def test_figures_of_one_class_a_sample_are_those_of_scikit_learn():
    given = "F1Score, F1Score(average=weighted), AUROC, AUROC(average=weighted), AveragePrecision, CalibrationError"
    found = figures(given, TARGET)
    probabilities, truth = LOGITS.softmax(-1).numpy(), TARGET.numpy()
    guessed = probabilities.argmax(-1)
    assert found["F1Score"] == pytest.approx(f1_score(truth, guessed, average="macro"))
    assert found["F1Score(average=weighted)"] == pytest.approx(f1_score(truth, guessed, average="weighted"))
    each = [roc_auc_score(truth == label, probabilities[:, label]) for label in PRESENT]
    counts = [(truth == label).sum() for label in PRESENT]
    assert found["AUROC"] == pytest.approx(np.mean(each))
    assert found["AUROC(average=weighted)"] == pytest.approx(np.average(each, weights=counts))
    each = [average_precision_score(truth == label, probabilities[:, label]) for label in PRESENT]
    assert found["AveragePrecision"] == pytest.approx(np.mean(each))
    confidence, right = probabilities.max(-1), guessed == truth
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(right[bins == b].sum() - confidence[bins == b].sum()) for b in range(15)]
    assert found["CalibrationError"] == pytest.approx(sum(gaps) / 60, abs=1e-6)


def test_figures_of_multi_label_samples_are_those_of_scikit_learn():
    found = figures(["F1Score", "AUROC", "HammingDistance", "F1Score(average=none)"], HOLDS, stage="test")
    guessed, truth = (LOGITS > 0).numpy(), HOLDS.numpy()
    each = f1_score(truth, guessed, average=None, zero_division=0.0)
    assert found["accuracy"] == pytest.approx((guessed == truth).mean())
    assert found["exact_match"] == pytest.approx(accuracy_score(truth, guessed))
    assert found["f1_macro"] == pytest.approx(each[PRESENT].mean())
    assert [found[f"f1_class/{CLASSES[place]}"] for place in PRESENT] == pytest.approx(each[PRESENT])
    assert "f1_class/d" not in found
    assert found["HammingDistance"] == pytest.approx((guessed != truth).mean())
    areas = [roc_auc_score(truth[:, place], LOGITS[:, place]) for place in PRESENT]
    assert found["AUROC"] == pytest.approx(np.mean(areas))
    named = [found[f"F1Score(average=none)_class/{name}"] for name in CLASSES]
    assert named == pytest.approx(each)
    assert not [name for name in found if "confusion" in name]


def test_a_class_given_from_python_and_one_of_ones_own():
    found = figures([F1Score, MulticlassRecall, partial(Sharpness, power=2), "Sharpness"], TARGET)
    highest = LOGITS.softmax(-1).amax(-1)
    assert found["Sharpness"] == pytest.approx(float((highest**2).mean()))
    assert found["Sharpness()"] == pytest.approx(float(highest.mean()))
    assert found["F1Score"] == pytest.approx(f1_score(TARGET, LOGITS.argmax(-1), average="macro"))
    assert "MulticlassRecall" in found


def test_figures_of_two_classes():
    [metric] = named_metrics(as_specs("BinaryF1Score"), 2, multi_label=False)
    probabilities, target = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.3, 0.7]]), torch.tensor([1, 1, 0])
    assert metric(probabilities, target).item() == pytest.approx(0.5)
    [metric] = named_metrics(as_specs("BinaryAUROC"), 2, multi_label=False)
    assert metric(probabilities, torch.ones(3, dtype=torch.int64)).isnan()


def test_a_metric_of_classes_none_of_which_is_there_has_no_figure():
    [metric] = named_metrics(as_specs("AUROC"), 3, multi_label=False)
    assert math.isnan(metric(torch.full((4, 3), 1 / 3), torch.zeros(4, dtype=torch.int64)))


def test_what_is_best_when_lowest_is_known():
    names = "F1Score, CalibrationError, HammingDistance, AUROC"
    assert [metric.higher_is_better is False for metric in named_metrics(as_specs(names), 3, multi_label=False)] == [
        False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "multi_label", "facts"),
    [
        ("F1Scor", False, ["no metric", "did you mean F1Score?", "AUROC"]),
        ("CalibrationError", True, ["CalibrationError", "AUROC"]),
        ("MulticlassF1Score", True, ["MulticlassF1Score", "F1Score"]),
        ("BinaryAUROC", False, ["two classes", "AUROC"]),
        ("ROC", False, ["ROC", "tuple", "one number"]),
        ("ConfusionMatrix", False, ["one number"]),
        ("F1Score(avrage=macro)", False, ["avrage", "did you mean average?"]),
        ("F1Score(average=mean)", False, ["F1Score", "macro"]),
        ("F1Score(num_classes=4)", False, ["num_classes", "follows from the data"]),
        ("F1Score, F1Score()", False, ["twice"]),
        ("F1Score,,", False, ["AUROC(average=weighted)"]),
        ("torch.nn.Linear", False, ["Metric"]),
        ([{"class_path": "AUROC", "average": "macro"}], False, ["init_args"]),
    ],
)
def test_wrong_metrics(given, multi_label, facts):
    with pytest.raises(UserError) as error:
        named_metrics(as_specs(given), 3, multi_label=multi_label)
    assert all(fact in str(error.value) for fact in ["model.metrics", *facts])
    assert "\n" not in str(error.value)


def test_the_loss_is_a_mean_over_counted_samples():
    metrics = StageMetrics("val", 5)
    target = TARGET[:8].clone()
    losses = -LOGITS[:8].log_softmax(-1)[range(8), target]
    target[6:] = UNCOUNTED
    metrics.count(losses, LOGITS[:8], Batch(LOGITS, None, target, torch.arange(8)))
    expected = log_loss(TARGET[:6], LOGITS[:6].double().softmax(-1), labels=range(5))
    assert metrics.figures(CLASSES)["loss"].item() == pytest.approx(expected, rel=1e-5)
