"""An exponential moving average of the weights."""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor
from typing_extensions import override

from sinkformer_pl.errors import UserError
from sinkformer_pl.training import lightning_state


class EMA(WeightAveraging):
    """Average the weights over the optimizer steps, and evaluate with the average.

    The average starts from the weights after the first step. Step n + 1 moves it to the new weights by a share of
    1 - min(decay, (1 + n) / (10 + n)), so that it soon forgets the first ones, or of 1 - decay without `warmup`.
    Statistics of batch norms are averaged like weights; buffers of whole numbers are copied.

    Validations and the end of the training use the average, and so do checkpoints: `state_dict` has the average, and
    beside it "current_model_state" the trained weights, from which a training resumes.

    Unlike Lightning's EMAWeightAveraging it keeps the average on the device of the network, and doesn't wait for that.

    Args:
        decay: weight of the average so far, in [0, 1).
        warmup: whether the first steps have a smaller decay.

    Raises:
        UserError: a decay out of range.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay must be in [0, 1), got {decay}")
        super().__init__(multi_avg_fn=self._average)
        self.decay = decay
        self.warmup = warmup

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            lightning_state.begin_average(self, trainer)
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            # It is looked at after each step.
            average = lightning_state.average_of(self)
            average.n_averaged = average.n_averaged.cpu()

    def _average(self, averages: list[Tensor], weights: list[Tensor], _: Tensor) -> None:
        """Move averages to weights, all of one device and dtype, in place."""
        if not averages[0].is_floating_point():
            torch._foreach_copy_(averages, weights)
            return
        updates = int(lightning_state.average_of(self).n_averaged)
        decay = min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay
        torch._foreach_lerp_(averages, weights, 1 - decay)
