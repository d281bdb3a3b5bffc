"""Names of version 0.1, for one version more: they are in `sinkformer_pl.training` now."""

import warnings

from sinkformer_pl.training.best_checkpoint import BestCheckpoint
from sinkformer_pl.training.costs_csv import StepCosts
from sinkformer_pl.training.last_checkpoint import LastCheckpoint
from sinkformer_pl.training.metrics_csv import MetricsCSV as AppendingCSVLogger
from sinkformer_pl.training.predictions_csv import PredictionWriter
from sinkformer_pl.training.resume import ResumeState
from sinkformer_pl.training.run_record import RunRecord
from sinkformer_pl.training.signals import Stopped, StopSignals

warnings.warn("sinkformer_pl.runs will go: import from sinkformer_pl.training", FutureWarning, stacklevel=2)
