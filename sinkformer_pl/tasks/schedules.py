"""Learning-rate schedules: the factor on the base rate, as a function of the progress of training."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from typing_extensions import override

from sinkformer_pl.errors import UserError


class Schedule(ABC):
    """A factor on the learning rate; `progress` runs from 0 at the first optimizer step towards 1 at the last."""

    @abstractmethod
    def __call__(self, progress: float) -> float:
        """Return the factor, at least 0, at a progress in [0, 1]."""


class Constant(Schedule):
    """The base rate throughout."""

    def __call__(self, progress: float) -> float:
        """Return 1."""
        return 1.0


class StepDecay(Schedule):
    """Multiply the rate by a factor at each milestone.

    Args:
        milestones: shares of the training at which the rate drops; [0.75] with 200 epochs is epoch 150.
        factor: what the rate is multiplied by.
    """

    def __init__(self, milestones: Sequence[float] = (0.75,), factor: float = 0.1) -> None:
        if not all(0 < milestone < 1 for milestone in milestones):
            raise UserError(f"StepDecay: milestones are shares of the training between 0 and 1, got {milestones}")
        self.milestones = milestones
        self.factor = factor

    def __call__(self, progress: float) -> float:
        """Return the factor, once for each milestone behind."""
        # A progress is a quotient of step counts; the tolerance keeps a milestone on its own step.
        return self.factor ** sum(progress + 1e-9 >= milestone for milestone in self.milestones)


class WarmupCosine(Schedule):
    """Linear warm-up, then half a cosine down to a floor.

    Args:
        warmup: share of the training in which the rate rises from (almost) 0, in [0, 1).
        floor: factor at the end, in [0, 1].
    """

    def __init__(self, warmup: float = 0.1, floor: float = 0.0) -> None:
        if not (0 <= warmup < 1 and 0 <= floor <= 1):
            raise UserError(f"WarmupCosine: warmup must be in [0, 1) and floor in [0, 1], got {warmup} and {floor}")
        self.warmup = warmup
        self.floor = floor

    def __call__(self, progress: float) -> float:
        """Return the factor."""
        if progress < self.warmup:
            # The first step moves too: a rate of exactly 0 would waste it.
            return max(progress / self.warmup, 1e-3)
        done = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * done)) / 2


class ScheduledLR(LambdaLR):
    """Set the rate of each group of parameters to its base rate times a factor of the step.

    A group that is added to the optimizer later, as callbacks do that unfreeze parameters, follows from the rate that
    it was given: whenever the rate of the first group changes, its own changes by the same factor.
    """

    @override
    def get_lr(self) -> list[Any]:
        """Return the rate of each group, for `step`."""
        rates, groups = super().get_lr(), self.optimizer.param_groups
        before = groups[0]["lr"]
        change = rates[0] / before if before else 1.0
        return [*rates, *(group["lr"] * change for group in groups[len(rates) :])]


ScheduleFactory = Callable[[], Schedule]
