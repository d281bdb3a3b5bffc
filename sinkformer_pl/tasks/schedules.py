"""Learning-rate schedules: the factor on the base rate, as a function of the progress of training."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LRScheduler, MultiplicativeLR, SequentialLR

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


NOT_PLAIN = (LambdaLR, MultiplicativeLR, SequentialLR, ChainedScheduler)
"""Schedulers of PyTorch that take functions or other schedulers."""


def require_plain(scheduler: type[LRScheduler]) -> None:
    """Refuse a scheduler of PyTorch that can't be made from plain data.

    Raises:
        UserError: names it and what does the same.
    """
    if issubclass(scheduler, NOT_PLAIN) or scheduler is LRScheduler:
        raise UserError(
            f"model.schedule {scheduler.__name__}: it takes functions or other schedulers, which are no plain data; "
            "give another with model.warmup, or a Schedule of your own"
        )


def torch_schedulers() -> dict[str, type[LRScheduler]]:
    """Return PyTorch's schedulers that plain data can make, by name, and others that were imported."""
    found: dict[str, type[LRScheduler]] = {}
    pending = list(LRScheduler.__subclasses__())
    while pending:
        cls = pending.pop()
        pending += cls.__subclasses__()
        own = cls.__module__.startswith("sinkformer_pl.")
        if not (own or issubclass(cls, NOT_PLAIN) or cls.__name__.startswith("_")):
            found.setdefault(cls.__name__, cls)
    return dict(sorted(found.items()))


ScheduleFactory = Callable[[], Schedule] | Callable[[Optimizer], LRScheduler]
