"""Names of version 0.1, for one version more: they are in `sinkformer_pl.training` now."""

import warnings

from sinkformer_pl.training.checkpoint_content import CLASSES_KEY, CONFIG_KEY, METRICS_KEY
from sinkformer_pl.training.checkpoint_file import load_file, read_checkpoint, save_file

warnings.warn(
    "sinkformer_pl.checkpoints will go: import from sinkformer_pl.training.checkpoint_file and checkpoint_io",
    FutureWarning,
    stacklevel=2,
)
