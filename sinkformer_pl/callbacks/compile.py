"""torch.compile from a configuration."""

from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from typing_extensions import override

from sinkformer_pl.models.attention_core import AttentionCore

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

SMALLEST = 16
"""Tokens that a sample is padded to at the least."""


class Compile(pl.Callback):
    """Compile the blocks of the network in place when training starts; its weights keep their names.

    Blocks are the members with attention of the network's `nn.ModuleList`s and `nn.Sequential`s: those of one kind
    share their graphs, so that a deep network takes no longer to compile than a shallow one. A network without such
    blocks is compiled whole.

    Batches of samples of unequal sizes are padded further, to the next of 16, 24, 32, 48, 64, 96, ... tokens, by half
    at most. Their mask makes the results the same to rounding, dropout's draws aside. Evaluation, which would need
    graphs of its own, runs uncompiled.

    Args:
        backend: of `torch.compile`.
        mode: of `torch.compile`: "reduce-overhead" replays CUDA graphs, "max-autotune" tries kernels; None is
            "default".
        dynamic: whether sizes are variables from the first graph on; None lets torch see them change first.
        pad: whether batches are padded to few sizes.
    """

    def __init__(
        self, backend: str = "inductor", mode: Mode | None = None, dynamic: bool | None = None, pad: bool = True
    ) -> None:
        self.backend = backend
        self.mode = mode
        self.dynamic = dynamic
        self.pad = pad
        self._hook: Any = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile."""
        backbone: nn.Module = pl_module.backbone  # type: ignore[assignment]
        for block in blocks(backbone):
            block.compile(backend=self.backend, mode=self.mode, dynamic=self.dynamic)
        if self.pad:
            self._hook = backbone.register_forward_pre_hook(_pad)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Pad no longer."""
        if self._hook is not None:
            self._hook.remove()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Let what follows be compiled, and pad no longer."""
        torch.compiler.set_stance("default")
        self.on_fit_end(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let CUDA graphs take the memory of the step before, whose gradients are done with."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            torch.compiler.cudagraph_mark_step_begin()

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run the network as it is."""
        torch.compiler.set_stance("force_eager")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run its blocks compiled."""
        torch.compiler.set_stance("default")


def blocks(network: nn.Module) -> list[nn.Module]:
    """Find the members with attention of the network's lists of modules, the outermost; itself if there is none."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    members = [
        member
        for found in lists
        for member in found.children()
        if any(isinstance(m, AttentionCore) for m in member.modules())
    ]
    inner = {id(module) for member in members for module in member.modules() if module is not member}
    return [member for member in members if id(member) not in inner] or [network]


def next_size(tokens: int) -> int:
    """Find the least of 16, 24, 32, 48, 64, 96, ... that isn't smaller."""
    size = SMALLEST
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def _pad(network: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Pad inputs (B, N, ...) and their mask (B, N) in training; without a mask all samples are of one size."""
    inputs, mask = arguments[0], arguments[1] if len(arguments) > 1 else None
    if not network.training or mask is None:
        return None
    size = next_size(inputs.shape[1])
    # Of a network that learns positions.
    most = getattr(network, "max_length", None)
    size = size if most is None else max(min(size, most), inputs.shape[1])
    extra = size - inputs.shape[1]
    padding = (0, 0) * (inputs.ndim - 2) + (0, extra)
    return nn.functional.pad(inputs, padding), nn.functional.pad(mask, (0, extra))
