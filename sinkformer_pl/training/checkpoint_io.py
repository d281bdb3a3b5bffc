"""Checkpoints that survive, for Lightning's Trainer."""

from typing import Any

from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from pytorch_lightning.strategies import Strategy
from typing_extensions import override

from sinkformer_pl.errors import UserError
from sinkformer_pl.training.checkpoint_file import load_file, save_file


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Write each checkpoint atomically and with a checksum, check it on loading, load tensors and plain data alone.

    `pl.Trainer(plugins=[VerifiedCheckpointIO()])`; the command line uses it by itself. Paths with a protocol, such as
    `s3://`, are written and read by Lightning, without a checksum. Sharded checkpoints (folders) never come here.
    """

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            UserError: it can't be written, or holds more than tensors and plain data; an older file stays.
            TypeError: there are `storage_options`, which nothing here takes.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            save_file(checkpoint, path)

    @override
    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint onto the CPU, or as `map_location` says.

        Raises:
            UserError: no such file, a damaged one, one with objects in it, or `weights_only=False`.
        """
        if weights_only is False:
            raise UserError(f"checkpoint {path}: weights_only=False could run code from it; leave it out")
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return load_file(path, map_location)


def use_verified(strategy: Strategy) -> None:
    """Let a strategy write and read checkpoints by `VerifiedCheckpointIO`, unless it has another plugin for that.

    Lightning's `AsyncCheckpointIO` stays, around it.
    """
    plugin = strategy.checkpoint_io
    if type(plugin) is TorchCheckpointIO:
        strategy.checkpoint_io = VerifiedCheckpointIO()
    elif type(plugin) is AsyncCheckpointIO and type(plugin.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AsyncCheckpointIO(VerifiedCheckpointIO())
