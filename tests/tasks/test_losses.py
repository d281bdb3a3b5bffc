"""Losses against PyTorch's, torchvision's and scikit-learn's."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight
from torchvision.ops import sigmoid_focal_loss

from sinkformer_pl.class_weights import balanced_weights, resolve
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier, CrossEntropy, FocalLoss, Loss

LOGITS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 3, 0, 0, 2])
HOLDS = (torch.randn(7, 4, generator=torch.Generator().manual_seed(1)) > 0.3).float()
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 4.0])


class Plain(Loss):
    """A user's own: cross-entropy by hand."""

    def forward(self, logits, target):
        return -logits.log_softmax(-1)[torch.arange(len(target)), target]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_is_pytorchs_to_the_last_bit(smoothing, weights):
    found = CrossEntropy().mean(LOGITS, CLASSES, class_weights=weights, label_smoothing=smoothing)
    assert torch.equal(found, F.cross_entropy(LOGITS, CLASSES, weight=weights, label_smoothing=smoothing))
    assert torch.equal(CrossEntropy()(LOGITS, CLASSES), F.cross_entropy(LOGITS, CLASSES, reduction="none"))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_a_loss_of_ones_own_is_weighted_as_pytorch_does(weights):
    torch.testing.assert_close(
        Plain().mean(LOGITS, CLASSES, class_weights=weights), F.cross_entropy(LOGITS, CLASSES, weight=weights)
    )


@pytest.mark.parametrize("loss", [CrossEntropy, FocalLoss, Plain])
def test_a_batch_of_classes_without_weight_moves_nothing(loss):
    logits = LOGITS.clone().requires_grad_()
    loss().mean(logits, torch.zeros_like(CLASSES), class_weights=torch.tensor([0.0, 1.0, 1.0, 1.0])).backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("loss", [CrossEntropy, FocalLoss])
def test_weights_of_multi_label_classes_are_those_of_positives(loss):
    loss = loss() if loss is CrossEntropy else loss(gamma=0.0)
    expected = F.binary_cross_entropy_with_logits(LOGITS, HOLDS, pos_weight=WEIGHTS)
    torch.testing.assert_close(loss.mean(LOGITS, HOLDS, class_weights=WEIGHTS), expected)
    assert loss(LOGITS, HOLDS).shape == (7, 4)


def test_label_smoothing_of_multi_label_targets_goes_to_both_answers():
    expected = F.binary_cross_entropy_with_logits(LOGITS, HOLDS * 0.8 + 0.1)
    torch.testing.assert_close(CrossEntropy().mean(LOGITS, HOLDS, label_smoothing=0.2), expected)


def test_focal_loss_is_that_of_its_paper_and_of_torchvision():
    held = LOGITS.softmax(-1)[torch.arange(7), CLASSES]
    torch.testing.assert_close(FocalLoss(gamma=3.0)(LOGITS, CLASSES), -((1 - held) ** 3) * held.log())
    expected = sigmoid_focal_loss(LOGITS, HOLDS, alpha=-1, gamma=3.0)
    torch.testing.assert_close(FocalLoss(gamma=3.0)(LOGITS, HOLDS), expected)


def test_label_smoothing_of_a_focal_loss_is_that_of_its_cross_entropy():
    found = FocalLoss(gamma=0.0).mean(LOGITS, CLASSES, class_weights=WEIGHTS, label_smoothing=0.2)
    losses = F.cross_entropy(LOGITS, CLASSES, reduction="none", label_smoothing=0.2)
    torch.testing.assert_close(found, (losses * WEIGHTS[CLASSES]).sum() / WEIGHTS[CLASSES].sum())
    held = LOGITS.softmax(-1)[torch.arange(7), CLASSES]
    found = FocalLoss(gamma=2.0).mean(LOGITS, CLASSES, label_smoothing=0.2)
    torch.testing.assert_close(found, ((1 - held) ** 2 * losses).mean())
    network = partial(SetTransformer, dim=8, num_heads=2)
    with pytest.raises(UserError, match=r"model\.label_smoothing 0\.2: Plain has none"):
        Classifier(network, Softmax, 4, loss=Plain, label_smoothing=0.2)


@pytest.mark.parametrize("target", [CLASSES, HOLDS])
def test_focal_loss_of_certain_samples_has_a_gradient(target):
    logits = (200 * (F.one_hot(target, 4) if target.ndim == 1 else target) - 100).float().requires_grad_()
    FocalLoss(gamma=0.5).mean(logits, target).backward()
    assert logits.grad.abs().max() < 1e-6
    with pytest.raises(UserError, match="gamma is -1: give 0 or more"):
        FocalLoss(gamma=-1)


def test_balanced_weights_are_scikit_learns_and_those_of_positives():
    found = balanced_weights(torch.bincount(CLASSES, minlength=5), len(CLASSES))
    expected = compute_class_weight("balanced", classes=np.arange(4), y=CLASSES.numpy())
    assert found.tolist() == pytest.approx([*expected, 1.0])
    found = balanced_weights(torch.tensor([2, 7, 0, 4]), 8, multi_label=True)
    assert found.tolist() == pytest.approx([6 / 2, 1 / 7, 1.0, 4 / 4])


@pytest.mark.parametrize(
    ("given", "expected"), [([1, 2, 0], [1, 2, 0]), ({"dog": 3.0}, [1, 3, 1]), ("balanced", [0.5, 0.5, 0.5])]
)
def test_weights_are_given_by_place_by_name_or_from_the_data(given, expected):
    assert resolve({1: 3.0}, ["0", "1"], None, "key").tolist() == [1.0, 3.0]
    assert resolve(given, ["cat", "dog", "cow"], torch.full((3,), 0.5), "key").tolist() == expected


@pytest.mark.parametrize(
    ("given", "facts"),
    [
        ([1.0, 2.0], ["2 weights for 3 classes", "cat, dog, cow"]),
        ({"dgo": 1.0}, ["no class dgo", "did you mean dog?", "cat, dog, cow"]),
        ([1.0, -1.0, 2.0], ["-1.0", "0 or more"]),
        ([float("inf"), 1.0, 2.0], ["inf"]),
        ([0, 0, 0], ["above 0"]),
        ("even", ["even", "balanced"]),
    ],
)
def test_wrong_weights(given, facts):
    with pytest.raises(UserError) as error:
        resolve(given, ["cat", "dog", "cow"], None, "model.class_weights")
    assert all(fact in str(error.value) for fact in ["model.class_weights", *facts])
    with pytest.raises(UserError, match="give a list"):
        resolve("balanced", ["cat", "dog"], None, "model.class_weights")
