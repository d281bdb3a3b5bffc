"""What Lightning says and nobody can act on."""

import logging
import warnings


def quieten() -> None:
    """Drop it, from here on."""
    logging.getLogger("pytorch_lightning.utilities.rank_zero").addFilter(
        lambda record: not str(record.msg).startswith(("💡 Tip", "TPU available", "Loading `train_dataloader` to"))
    )
    logging.getLogger("lightning_fabric.utilities.seed").addFilter(lambda record: False)
    # That a launched process has failed; it says itself why, unless a signal ended it.
    logging.getLogger("lightning_fabric.strategies.launchers.subprocess_script").addFilter(
        lambda record: "terminated with code -" in record.getMessage()
    )
    for message in (
        ".*does not have many workers.*",
        ".*is smaller than the logging interval.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
        ".*LeafSpec.*",
        # Metrics are reduced over the processes before they are logged.
        ".*sync_dist=True.*",
        ".*torch.jit.script.*",
    ):
        warnings.filterwarnings("ignore", message)
