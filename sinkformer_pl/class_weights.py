"""Weights of classes, for a loss or for sampling: given, or balanced by how often each class occurs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sinkformer_pl.errors import UserError, did_you_mean

ClassWeights = Literal["balanced"] | list[float] | dict[str, float]
"""A weight for each class, weights by class name (1 for the others), or "balanced"."""


def resolve(given: ClassWeights, classes: Sequence[str], balanced: Tensor | None, key: str) -> Tensor:
    """Return the weight of each class.

    Args:
        given: as the user wrote it.
        classes: C class names.
        balanced: (C,), what "balanced" stands for; None where the data don't say how often each class occurs.
        key: of the setting, for messages.

    Returns:
        (C,) float64, none below 0.

    Raises:
        UserError: another number of weights, a name that is no class, a weight below 0 or not finite, none above 0.
    """
    if isinstance(given, str):
        if given != "balanced":
            raise UserError(f"{key} {given}: give balanced, a list of weights, or weights by class name")
        if balanced is None:
            raise UserError(f"{key} balanced: these data don't say how often each class occurs; give a list of weights")
        return balanced.double()
    if isinstance(given, Mapping):
        # YAML reads names that are numbers as such.
        named = {str(name): weight for name, weight in given.items()}
        values = [named.get(name, 1.0) for name in classes]
        if unknown := [name for name in named if name not in classes]:
            raise UserError(f"{key}: no class {unknown[0]}{did_you_mean(unknown[0], classes)}; {_listed(classes)}")
    else:
        values = list(given)
        if len(values) != len(classes):
            raise UserError(
                f"{key}: {len(values)} weights for {len(classes)} classes; give one for each, in their order: "
                f"{_listed(classes)}"
            )
    if wrong := [value for value in values if not 0 <= value < math.inf]:
        raise UserError(f"{key}: a weight of {wrong[0]}; give finite numbers, 0 or more")
    if not any(values):
        raise UserError(f"{key}: all weights are 0; give one above 0")
    return torch.tensor(values, dtype=torch.float64)


def from_data(given: ClassWeights, data: Any, num_classes: int, *, multi_label: bool) -> Tensor:
    """Return the weight of each class in the loss of a training, (num_classes,) float64.

    Args:
        given: as the user wrote it.
        data: what may know `classes` and `class_counts`, of its training samples `datasets["train"]`.
        num_classes: C.
        multi_label: whether a sample has any number of classes.

    Raises:
        UserError: as of `resolve`.
    """
    counts, balanced = getattr(data, "class_counts", None), None
    if counts is not None:
        balanced = balanced_weights(counts, len(data.datasets["train"]), multi_label=multi_label)
    classes = getattr(data, "classes", ()) or [str(place) for place in range(num_classes)]
    return resolve(given, classes, balanced, "model.class_weights")


def balanced_weights(counts: Tensor, samples: int, *, multi_label: bool = False) -> Tensor:
    """Return the weights under which every class counts alike.

    Args:
        counts: (C,), how many samples each class has.
        samples: how many there are.
        multi_label: whether a sample has any number of classes.

    Returns:
        (C,) float64, 1 for a class without samples: samples / (classes with samples * samples of the class), as of
        scikit-learn's `class_weight="balanced"`; of multi-label data samples without the class / samples of the class.
    """
    shares = (samples - counts) / counts if multi_label else samples / (counts.count_nonzero() * counts)
    return shares.double().where(counts > 0, 1.0)


def _listed(classes: Sequence[str]) -> str:
    return f"the classes are {', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}"
