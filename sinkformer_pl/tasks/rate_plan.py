"""The learning rate over a training: a warm-up, then a schedule, of ours or of PyTorch's."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR, ReduceLROnPlateau
from typing_extensions import override

from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import as_factory, describe
from sinkformer_pl.tasks.schedules import Constant, Schedule, ScheduleFactory, WarmupCosine, require_plain
from sinkformer_pl.training.step_count import read_length, steps_of

Interval = Literal["step", "epoch"]

KEY = "model.schedule"

LENGTHS = {OneCycleLR: "total_steps", CosineAnnealingLR: "T_max"}
"""Arguments of PyTorch's schedulers that are the length of the training unless they are given."""


def length_argument(scheduler: type) -> str | None:
    """Return the argument of a scheduler of PyTorch that may be filled in with the length of the training, if any."""
    return LENGTHS.get(scheduler)


class RatePlan:
    """Plan the rate over a training: a warm-up, then a schedule.

    Args:
        schedule: makes a `Schedule`, or one of PyTorch's schedulers for an optimizer.
        warmup: optimizer steps, or a text such as "2 epochs", over which the rate rises linearly from (almost) 0, and
            behind which the schedule begins.
        interval: whether PyTorch's scheduler steps after each optimizer step (the default) or each epoch.
        monitor: the metric that ReduceLROnPlateau looks at, each time that it is logged; "val/loss" by default.
        defaults: of the optimizer.

    Raises:
        UserError: an argument out of range, or one that this schedule doesn't use.
    """

    def __init__(
        self,
        schedule: ScheduleFactory | Mapping[str, Any],
        warmup: int | str,
        interval: Interval | None,
        monitor: str | None,
        defaults: Mapping[str, Any],
    ) -> None:
        self.make = as_factory(schedule, (Schedule, LRScheduler))
        cls: Any = self.make.func if isinstance(self.make, functools.partial) else self.make
        self.cls: type = cls
        self.arguments = {
            "schedule": describe(self.make),
            "warmup": warmup,
            "schedule_interval": interval,
            "schedule_monitor": monitor,
        }
        """Arguments of the task, as plain data."""
        self.defaults = defaults
        self.warmup = read_length(warmup, "model.warmup")
        self.by_epoch = interval == "epoch"
        self.on_plateau = self.of_torch and issubclass(cls, ReduceLROnPlateau)
        self.monitor = (monitor or "val/loss") if self.on_plateau else None
        if interval is not None and (self.on_plateau or not self.of_torch):
            when = "each time its metric is logged" if self.on_plateau else "at each step"
            raise UserError(f"{KEY}_interval {interval}: {cls.__name__} changes the rate {when}; leave it out")
        if monitor is not None and not self.on_plateau:
            raise UserError(f"{KEY}_monitor {monitor}: {cls.__name__} looks at no metric; leave it out")
        if self.of_torch:
            require_plain(cls)
            made = self.torch_scheduler(100)
            self._require_direction(made)
        else:
            self.schedule: Schedule = self.make()
            if self.warmup[0] and isinstance(self.schedule, WarmupCosine) and self.schedule.warmup:
                raise UserError(f"model.warmup {warmup}: WarmupCosine has its own; set {KEY}.warmup to 0")

    @property
    def of_torch(self) -> bool:
        """Tell whether the schedule is one of PyTorch's."""
        return isinstance(self.cls, type) and issubclass(self.cls, LRScheduler)

    @property
    def filled(self) -> str | None:
        """Return the argument of PyTorch's scheduler that is filled in with the length of the training, if any."""
        name = length_argument(self.cls)
        given = self.make.keywords if isinstance(self.make, functools.partial) else {}
        if name is None or given.get(name) is not None:
            return None
        return None if given.get("epochs") and given.get("steps_per_epoch") else name

    @property
    def spans(self) -> bool:
        """Tell whether the rates depend on how many steps the training has."""
        if self.of_torch:
            return self.filled is not None
        return not isinstance(self.schedule, Constant)

    def require_endless(self) -> None:
        """Refuse a schedule that depends on how many steps the training has.

        Raises:
            UserError: names the schedule.
        """
        if self.spans:
            raise UserError(
                f"{KEY} {self.cls.__name__}: it spans all steps of the training, whose number isn't known; give "
                "trainer.max_epochs or trainer.max_steps"
            )

    def torch_scheduler(self, length: int) -> LRScheduler:
        """Make PyTorch's scheduler over an optimizer of one group that stands for all.

        Args:
            length: of the training, behind the warm-up, in its own intervals.

        Raises:
            UserError: it refuses its arguments.
        """
        filled = {} if self.filled is None else {self.filled: length}
        try:
            return self.make(_Reference(self.defaults), **filled)
        except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
            raise UserError(f"{KEY} {self.cls.__name__}: {error}; give another value") from error

    def warmup_steps(self, trainer: pl.Trainer) -> int:
        """Return the number of optimizer steps of the warm-up.

        Raises:
            UserError: it is given in epochs, and their length isn't known.
        """
        return steps_of(trainer, self.warmup, "model.warmup")

    def _require_direction(self, made: Any) -> None:
        """Refuse a monitor whose name says that it is better the other way."""
        if self.monitor is None:
            return
        if self.monitor.partition("/")[0] not in ("val", "train"):
            raise UserError(f"{KEY}_monitor {self.monitor}: give a metric of the training, val/... or train/...")
        wanted = "min" if "loss" in self.monitor else "max" if "accuracy" in self.monitor else made.mode
        if made.mode != wanted:
            raise UserError(
                f"{KEY}.mode {made.mode}: {self.monitor} is better the {'lower' if wanted == 'min' else 'higher'}; "
                f"give {wanted}"
            )


class _Reference(Optimizer):
    """An optimizer of one group that stands for all, with the options of a real one."""

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        super().__init__([torch.zeros(1)], dict(defaults))

    @override
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Do nothing."""
