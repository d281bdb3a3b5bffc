"""Names of version 0.1, for one version more."""

from sinkformer_pl.training.checkpoint_io import VerifiedCheckpointIO, use_verified
