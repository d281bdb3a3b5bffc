"""Checkpoints: written so that the last good one survives, read safely, and compared with what they are used for.

`plugin` has the same for Lightning's Trainer; it isn't imported here, since Lightning takes seconds to import.
"""

from sinkformer_pl.checkpoints.files import load_file, read_checkpoint, save_file
from sinkformer_pl.checkpoints.form import CLASSES_KEY, CONFIG_KEY, METRICS_KEY
from sinkformer_pl.checkpoints.matching import (
    differing,
    require_classes,
    require_match,
    require_resumable,
    require_task,
)

__all__ = [
    "CLASSES_KEY",
    "CONFIG_KEY",
    "METRICS_KEY",
    "differing",
    "load_file",
    "read_checkpoint",
    "require_classes",
    "require_match",
    "require_resumable",
    "require_task",
    "save_file",
]
