"""Leave out what Lightning says and nobody can act on; write warnings in a line."""

import logging
import warnings
from typing import Any


def filter_warnings() -> None:
    """Set the filters, from here on."""
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
        # What is frozen by name is meant to be, and a line says how much.
        r"Found \d+ module\(s\) in eval mode at the start of training.*",
        # Metrics are reduced over the processes before they are logged.
        ".*sync_dist=True.*",
        ".*torch.jit.script.*",
        # Files with damaged EXIF data are counted in one warning.
        ".*orrupt EXIF data.*",
        "Image appears to be a malformed MPO file.*",
        # A resumed run has its folder, and a new one its own best checkpoint.
        "Checkpoint directory .* exists and is not empty",
        "The dirpath has changed from",
    ):
        warnings.filterwarnings("ignore", message)
    warnings.formatwarning = _in_one_line


def _in_one_line(message: Warning | str, category: type[Warning], filename: str, *_: Any, **__: Any) -> str:
    # Where it was raised says something to developers alone, whose warnings have categories of their own.
    where = "" if category is UserWarning else f"{filename}: {category.__name__}: "
    return f"warning: {where}{' '.join(str(message).split())}\n"
