"""torch.compile from a configuration."""

import pytorch_lightning as pl


class Compile(pl.Callback):
    """Compile the network in place when training starts; its weights keep their names.

    Args:
        backend: of `torch.compile`.
        dynamic: whether sizes are variables from the first graph on; None lets torch see them change first.
    """

    def __init__(self, backend: str = "inductor", dynamic: bool | None = None) -> None:
        self.backend = backend
        self.dynamic = dynamic

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile."""
        pl_module.backbone.compile(backend=self.backend, dynamic=self.dynamic)  # type: ignore[union-attr, operator]
