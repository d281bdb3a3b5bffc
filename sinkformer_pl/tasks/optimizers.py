"""How the optimizer is made: fused where the network is on a GPU."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.optim import Optimizer

from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import describe

OptimizerFactory = Callable[[Iterable], Optimizer]

FUSABLE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)

EXCLUSIVE = ("fused", "foreach", "capturable", "differentiable")
"""Arguments that choose an implementation; whoever gives one has chosen."""


def options_of(optimizer: OptimizerFactory) -> dict[str, Any]:
    """Return the options of an optimizer, "lr" among them; have a wrong one refused before a training starts.

    Raises:
        UserError: names the optimizer.
    """
    try:
        return optimizer([nn.Parameter(torch.zeros(1))]).defaults
    except ValueError as error:
        name = describe(optimizer)["class_path"].rpartition(".")[2]
        raise UserError(f"model.optimizer {name}: {error}; give another value") from error


def implementation(spec: Mapping[str, Any], trainer: pl.Trainer) -> dict[str, bool]:
    """The arguments to make an optimizer with, beside the user's: `fused=True` on a GPU where nothing is against it.

    Against it are a choice of the user's own, an optimizer or a strategy that can't, and clipping under 16-mixed
    precision, whose scale a fused optimizer takes out itself, behind the clipping.

    Args:
        spec: of the optimizer, as `describe` gives it.
        trainer: decides about device, precision and clipping.
    """
    arguments = spec.get("init_args", {})
    name = spec["class_path"].rpartition(".")[2]
    known = spec["class_path"].startswith("torch.optim.") and name in {cls.__name__ for cls in FUSABLE}
    chosen = any(arguments.get(key) for key in EXCLUSIVE) or arguments.get("fused") is False
    able = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    clipped = bool(trainer.gradient_clip_val) and _scales(trainer)
    on_gpu = trainer.strategy.root_device.type == "cuda"
    return {"fused": True} if on_gpu and known and able and not chosen and not clipped else {}


def clips_by_itself(trainer: pl.Trainer) -> bool:
    """Whether Lightning would refuse to clip the gradients of a fused optimizer, though there is no scale to mind."""
    return isinstance(trainer.precision_plugin, MixedPrecision) and not _scales(trainer)


def _scales(trainer: pl.Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None
