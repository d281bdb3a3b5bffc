"""Set the learning rate of each group of parameters at each optimizer step."""

import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from sinkformer_pl.errors import UserError
from sinkformer_pl.tasks.rate_plan import KEY, RatePlan
from sinkformer_pl.training.lightning_state import ends_epoch, ends_within_epoch
from sinkformer_pl.training.step_count import steps_in_epochs, steps_left


class ScheduledLR(LRScheduler):
    """Set the rate of each group of parameters at each optimizer step.

    It is the rate of the schedule, which starts from the optimizer's own, times the scale of the group: its "lr_scale",
    else its rate at the start as a share of the optimizer's. A group that is added later, as callbacks do that unfreeze
    parameters, has for its scale the rate that it was given as a share of the schedule's of the moment; so has one
    whose rate a callback sets. Where the schedule's is 0, shares are of the optimizer's own.

    Args:
        optimizer: the optimizer.
        plan: what the rate is.
        trainer: counts steps and epochs; its training data are set up.

    Raises:
        UserError: the training is too short for the warm-up, or too long for the schedule.
    """

    def __init__(self, optimizer: Optimizer, plan: RatePlan, trainer: pl.Trainer) -> None:
        self.plan, self.trainer = plan, trainer
        self.base: float = optimizer.defaults["lr"]
        self.rate = self.base
        self.scales: list[float] = []
        self.steps = steps_left(trainer)
        self.warmup = plan.warmup_steps(trainer)
        self.position = 0
        if self.steps is not None and self.warmup >= self.steps > 0:
            raise UserError(
                f"model.warmup: it takes {self.warmup} steps, and the training has {self.steps}; give less, or train "
                "longer"
            )
        self.scheduler = self._made() if plan.of_torch else None
        self._require_long_enough()
        super().__init__(optimizer)

    @override
    def get_lr(self) -> list[Any]:
        """Return the rate of each group, for `step`."""
        self._follow_groups()
        self._count_steps()
        self.rate = self._scheduled()
        return [scale * self.rate for scale in self.scales]

    def observe(self, stage: str, metrics: Mapping[str, Any]) -> None:
        """Let ReduceLROnPlateau look at its metric, unless the warm-up is under way.

        Args:
            stage: "train" or "val", what was just logged.
            metrics: all that are logged.

        Raises:
            UserError: the metric isn't among them.
        """
        monitor = self.plan.monitor
        if monitor is None or not monitor.startswith(f"{stage}/") or self.last_epoch < self.warmup:
            return
        if monitor not in metrics:
            raise UserError(f"{KEY}_monitor {monitor}: it isn't logged; logged are {', '.join(sorted(metrics))}")
        self._follow_groups()
        scheduler: Any = self.scheduler
        scheduler.step(float(metrics[monitor]))
        self.rate = self._scheduled()
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = scale * self.rate
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    @override
    def state_dict(self) -> dict[str, Any]:
        names = ("last_epoch", "_step_count", "_last_lr", "rate", "scales", "steps", "position")
        state = {name: getattr(self, name) for name in names}
        if self.scheduler is not None:
            [group] = self.scheduler.optimizer.param_groups
            state["scheduler"] = self.scheduler.state_dict()
            state["group"] = {name: value for name, value in group.items() if name != "params"}
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        scheduler, group = state.pop("scheduler", None), state.pop("group", {})
        if "scales" not in state:  # Of version 0.1, a LambdaLR's.
            rates = state["_last_lr"]
            state = {name: state[name] for name in ("last_epoch", "_step_count", "_last_lr")}
            state |= {"rate": rates[0], "scales": [_share(rate, rates[0] or self.base) for rate in rates]}
        self.__dict__.update(state)
        if self.scheduler is not None and scheduler is not None:
            self.scheduler.load_state_dict(dict(scheduler))
            self.scheduler.optimizer.param_groups[0].update(group)

    def _follow_groups(self) -> None:
        """Take over the rates of groups that are new, or were set by others since the last step."""
        last = getattr(self, "_last_lr", [])
        for place, group in enumerate(self.optimizer.param_groups):
            if place == len(self.scales):
                self.scales.append(group.get("lr_scale", _share(group["lr"], self.rate or self.base)))
            elif place < len(last) and group["lr"] != last[place]:
                self.scales[place] = _share(group["lr"], self.rate or self.base)

    def _count_steps(self) -> None:
        """Count the steps of the training anew; if there are more or fewer, continue as in a training of so many."""
        if self.last_epoch == 0:
            return
        left, before = steps_left(self.trainer), self.steps
        self.steps = None if left is None else self.last_epoch + left
        if not self.plan.spans or before is None or self.steps in (None, before):
            return
        since = "now" if self.trainer.ckpt_path is None else "the checkpoint"
        rank_zero_info(
            f"the learning rate continues as in a training of {self.steps} steps; up to {since} it was that of one of "
            f"{before} steps, so that it jumps and the result is that of neither"
        )
        if self.scheduler is not None:
            self.scheduler = self._made()
            for _ in range(self.position):
                _advance(self.scheduler)

    def _scheduled(self) -> float:
        """Return the schedule's rate for the step that comes."""
        step, begun = self.last_epoch, self.last_epoch - self.warmup
        if self.scheduler is None:
            length = (self.steps or 0) - self.warmup
            rate = self.base * self.plan.schedule(begun / length if begun > 0 and length > 0 else 0.0)
        else:
            if self.plan.by_epoch:
                due = self.position + (begun > 0 and ends_epoch(self.trainer))
            else:
                due = 0 if self.plan.on_plateau else max(begun, 0)
            while self.position < due:
                _advance(self.scheduler)
                self.position += 1
            self._take_momentum()
            rate = float(self.scheduler.optimizer.param_groups[0]["lr"])
        # The first step moves too: a rate of exactly 0 would waste it.
        return rate * max(step / self.warmup, 1e-3) if begun < 0 else rate

    def _take_momentum(self) -> None:
        """Give all groups the momentum of a scheduler that changes it, too."""
        if getattr(self.scheduler, "cycle_momentum", False):
            [reference] = self.scheduler.optimizer.param_groups  # type: ignore[union-attr]
            for group in self.optimizer.param_groups:
                group |= {name: reference[name] for name in ("momentum", "betas") if name in reference}

    def _made(self) -> LRScheduler:
        return self.plan.torch_scheduler(self._length() or 1)

    def _length(self) -> int | None:
        """Return how many intervals of PyTorch's scheduler the training has, if that is known."""
        if self.steps is None:
            return None
        steps = max(self.steps - self.warmup, 1)
        return math.ceil(steps / (steps_in_epochs(self.trainer, 1) or 1)) if self.plan.by_epoch else steps

    def _require_long_enough(self) -> None:
        """Refuse a number of steps behind which the scheduler has no rate."""
        most, wanted = getattr(self.scheduler, "total_steps", None), self._length()
        if most is not None and wanted is not None and most < wanted:
            what = "epochs" if self.plan.by_epoch else "steps"
            raise UserError(
                f"{KEY}.total_steps {most}: the training has {wanted} {what}; leave it out, or give at least so many"
            )


def show_metrics(module: pl.LightningModule, stage: str) -> None:
    """Let the schedule of a training look at what was just logged.

    Args:
        module: the task.
        stage: "train" or "val", what was logged.
    """
    trainer = module.trainer
    if trainer.state.fn != "fit" or trainer.sanity_checking:
        return
    # The rest of an epoch that ends early follows in a resumed training, which logs the whole.
    if stage == "train" and ends_within_epoch(trainer):
        return
    scheduler = module.lr_schedulers()
    if isinstance(scheduler, ScheduledLR):
        scheduler.observe(stage, trainer.callback_metrics)


def _advance(scheduler: LRScheduler) -> None:
    # A scheduler warns unless its optimizer has stepped.
    scheduler.optimizer.step()
    scheduler.step()


def _share(rate: float, whole: float) -> float:
    return rate / whole if whole else 1.0
