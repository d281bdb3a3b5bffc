"""Move a network from softmax to another normalization in the course of a training."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import nn
from typing_extensions import override

from sinkformer_pl.errors import UserError
from sinkformer_pl.normalizations.blend import Blend
from sinkformer_pl.training.step_count import read_length, steps_of


class Gradual(pl.Callback):
    """Raise the share of every `Blend` from 0, which is softmax, to the one that it was made with, step by step.

    The share is linear in the optimizer steps. A checkpoint has the share of its time, with which it is evaluated;
    `best.ckpt` is chosen among the validations at the final share, and EarlyStopping begins to count there. Epochs log
    it as `train/share`. In a network without a `Blend` nothing is moved, and a warning says so.

    Attributes:
        unfinished: the share isn't yet the final one.

    Args:
        over: optimizer steps, or a text such as "2 epochs", after which the share stays.

    Raises:
        UserError: a length that can't be read or is 0; at the start of a fit, a `Blend` whose share is learned.
    """

    def __init__(self, over: int | str = "1 epoch") -> None:
        self.over = over
        self._length = read_length(over, "Gradual.over")
        if not self._length[0]:
            raise UserError(f"Gradual.over {over}: nothing would be gradual; give 1 step or more")
        self._steps = 0
        self.unfinished = False

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        blends = _blends(pl_module)
        if not blends:
            rank_zero_warn(
                "Gradual: the network has no Blend, nothing is moved; give --model.normalization "
                "'Blend(target=Sinkhorn)', or leave the callback out"
            )
        if any(blend.learned for blend in blends):
            raise UserError("Gradual: Blend.learned is true, so its share is trained; leave one of the two out")
        self._steps = steps_of(trainer, self._length, "Gradual.over")
        _move(blends, trainer.global_step / self._steps)
        self.unfinished = bool(blends) and trainer.global_step < self._steps

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step <= self._steps:
            _move(_blends(pl_module), trainer.global_step / self._steps)
        if self.unfinished:
            for stopper in trainer.early_stopping_callbacks:
                _begin_anew(stopper)
        self.unfinished = self.unfinished and trainer.global_step < self._steps

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.unfinished and not trainer.should_stop:
            rank_zero_warn(
                f"Gradual: the training ended at step {trainer.global_step} of {self._steps}, before the final share, "
                "so there is no best.ckpt; train longer, or give less as Gradual.over"
            )
        self.unfinished = False

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if blends := _blends(pl_module):
            share = min(trainer.global_step / self._steps, 1.0) * blends[0].share
            pl_module.log("train/share", share, on_step=False, on_epoch=True)


def _blends(network: nn.Module) -> list[Blend]:
    return [module for module in network.modules() if isinstance(module, Blend)]


def _begin_anew(stopper: EarlyStopping) -> None:
    """Forget what was validated: the metrics of another network are nothing to improve on."""
    stopper.wait_count = 0
    stopper.best_score = torch.tensor(torch.inf if stopper.mode == "min" else -torch.inf)


def _move(blends: list[Blend], done: float) -> None:
    for blend in blends:
        blend.move(done)
