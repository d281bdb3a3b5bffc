"""A run: the folder in which it lies, what it writes there, how it is stopped and goes on."""

from sinkformer_pl.runs.best_checkpoint import BestCheckpoint
from sinkformer_pl.runs.folders import CHECKPOINTS, DEFAULT_NAME, DEFAULT_ROOT
from sinkformer_pl.runs.last_checkpoint import LastCheckpoint
from sinkformer_pl.runs.metrics_log import AppendingCSVLogger
from sinkformer_pl.runs.predictions import PredictionWriter
from sinkformer_pl.runs.record import RunRecord
from sinkformer_pl.runs.resume_state import ResumeState
from sinkformer_pl.runs.signals import Stopped, StopSignals
from sinkformer_pl.runs.step_costs import StepCosts

__all__ = [
    "CHECKPOINTS",
    "DEFAULT_NAME",
    "DEFAULT_ROOT",
    "AppendingCSVLogger",
    "BestCheckpoint",
    "LastCheckpoint",
    "PredictionWriter",
    "ResumeState",
    "RunRecord",
    "StepCosts",
    "StopSignals",
    "Stopped",
]
