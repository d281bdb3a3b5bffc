"""Recognise by its curves a training that learnt nothing, or nothing more."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

FEW_STEPS = 500
"""Optimizer steps below which a network that is trained from scratch has seldom learnt anything."""

ENOUGH_STEPS = 1000
"""Steps that are recommended instead."""

LEARNT = 0.05
"""Share of the way from chance to an accuracy of 1 below which nothing was learnt."""

SHORTEST = 8
"""Fewest validated epochs of a training that can be told to overfit."""

RISE = 0.1
"""Least rise of the training accuracy while the validation accuracy doesn't."""

FOLLOWING = 0.05
"""Share of the rise of the training accuracy below which the validation accuracy is flat."""

BY_HEART, NEAR_CHANCE = 0.75, 0.2
"""Shares of the way from chance to 1: of an accuracy on samples learnt by heart, and on others."""

NEEDED = ("train/accuracy", "val/accuracy", "val/accuracy_macro")
"""Curves that are looked at, as far as they are there."""

OVERFITS = "it overfits; stop by EarlyStopping (docs/usage.md), or give more data, augmentation or dropout"


@dataclass(frozen=True)
class Progress:
    """Facts of a training that is over.

    Attributes:
        steps: optimizer steps in all.
        epochs: epochs in all.
        curves: values of `NEEDED` at the end of each epoch, by epoch; those that aren't known are absent or empty.
        majority: share of the most frequent class in the training samples; None for targets that aren't one class each.
        num_classes: number of classes.
        best: epoch of `best.ckpt`; None where there is none.
        ended_by: "max_epochs" or "max_steps"; None for anything else.
    """

    steps: int
    epochs: int
    curves: Mapping[str, Mapping[int, float]]
    majority: float | None
    num_classes: int
    best: int | None = None
    ended_by: str | None = None

    def last(self, name: str) -> float | None:
        """Return the last value of a curve, None for an empty one."""
        curve = self.curves.get(name)
        return curve[max(curve)] if curve else None


def warning_sign(progress: Progress) -> str | None:
    """Return a line about what went wrong in silence, with a remedy; None for a training without such signs.

    The first of these that holds:

    - fewer than `FEW_STEPS` steps, and the training accuracy is less than half the way from chance to 1;
    - the training accuracy is at chance, and so is the mean of the classes' validation accuracies, where it is known;
    - of at least `SHORTEST` validated epochs the best is among the first quarter, and the training accuracy has risen
      by `RISE` or more since;
    - from the mean over the first quarter of these to that over their second half the training accuracy has risen by
      `RISE` or more, and the validation accuracy by less than `FOLLOWING` of that, or the former is `BY_HEART` of the
      way from chance to 1 and the latter less than `NEAR_CHANCE`.

    Chance is the share of the most frequent class, and 1 / number of classes for the mean over classes.
    """
    return _few_steps(progress) or _at_chance(progress) or _peaked(progress) or _flat(progress)


def _few_steps(progress: Progress) -> str | None:
    accuracy = progress.last("train/accuracy")
    if not 0 < progress.steps < FEW_STEPS or accuracy is None or progress.majority is None:
        return None
    if _learnt(accuracy, progress.majority) >= 0.5:
        return None
    epochs = math.ceil(ENOUGH_STEPS * max(progress.epochs, 1) / progress.steps)
    remedy = {
        "max_epochs": f"train longer, --trainer.max_epochs {epochs}",
        "max_steps": f"train longer, --trainer.max_steps {ENOUGH_STEPS}",
    }.get(progress.ended_by or "", "let what ended it, such as EarlyStopping, wait longer")
    return (
        f"{progress.steps} optimizer steps in all, and a training accuracy of {accuracy:.2f}: few networks learn in "
        f"fewer than {FEW_STEPS} steps; {remedy}"
    )


def _at_chance(progress: Progress) -> str | None:
    accuracy, balanced = progress.last("train/accuracy"), progress.last("val/accuracy_macro")
    if accuracy is None or progress.majority is None or _learnt(accuracy, progress.majority) >= LEARNT:
        return None
    # Class weights and weighted sampling cost accuracy, but aren't at chance for each class.
    if balanced is not None and _learnt(balanced, 1 / progress.num_classes) >= LEARNT:
        return None
    return (
        f"the training accuracy, {accuracy:.2f}, is no better than always naming the most frequent class "
        f"({progress.majority:.2f}): nothing was learnt; try another rate, --model.optimizer.lr, and check the labels"
    )


def _peaked(progress: Progress) -> str | None:
    train, val, epochs = _both(progress)
    if len(epochs) < SHORTEST:
        return None
    place = max(range(len(epochs)), key=lambda place: (val[epochs[place]], place))  # the last of equal ones
    best, last = epochs[place], epochs[-1]
    if place >= len(epochs) / 4 or train[last] - train[best] < RISE:
        return None
    kept = ", which best.ckpt keeps" if progress.best == best else ""
    return (
        f"val/accuracy was best in epoch {best} of {last}, {val[best]:.2f}{kept}, and has not "
        f"risen since, while train/accuracy rose from {train[best]:.2f} to {train[last]:.2f}: {OVERFITS}"
    )


def _flat(progress: Progress) -> str | None:
    train, val, epochs = _both(progress)
    if len(epochs) < SHORTEST:
        return None
    parts = epochs[: len(epochs) // 4], epochs[len(epochs) // 2 :]
    (learnt, now), (before, after) = (
        [fmean(curve[epoch] for epoch in part) for part in parts] for curve in (train, val)
    )
    chance = progress.majority
    by_heart = chance is not None and _learnt(now, chance) >= BY_HEART and _learnt(after, chance) < NEAR_CHANCE
    if now - learnt < RISE or (after - before >= FOLLOWING * (now - learnt) and not by_heart):
        return None
    return (
        f"val/accuracy was {before:.2f} in the first quarter of the epochs and {after:.2f} in their second half, while "
        f"train/accuracy rose from {learnt:.2f} to {now:.2f}: {OVERFITS}"
    )


def _both(progress: Progress) -> tuple[Mapping[int, float], Mapping[int, float], list[int]]:
    """Return the curves of training and validation, and the epochs of which both are known."""
    train, val = (progress.curves.get(name, {}) for name in ("train/accuracy", "val/accuracy"))
    return train, val, sorted(val.keys() & train.keys())


def _learnt(accuracy: float, chance: float) -> float:
    """Return how far an accuracy is on the way from chance to 1."""
    return (accuracy - chance) / (1 - chance) if chance < 1 else 1.0
