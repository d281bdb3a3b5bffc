"""What watches a run and writes its files."""

from sinkformer_pl.callbacks.attention_diagnostics import AttentionDiagnostics
from sinkformer_pl.callbacks.compile import Compile
from sinkformer_pl.callbacks.finite import RequireFinite
from sinkformer_pl.callbacks.last_checkpoint import LastCheckpoint
from sinkformer_pl.callbacks.loggers import AppendingCSVLogger
from sinkformer_pl.callbacks.predictions import PredictionWriter
from sinkformer_pl.callbacks.resume_state import ResumeState
from sinkformer_pl.callbacks.run_record import RunRecord
from sinkformer_pl.callbacks.signals import Stopped, StopSignals
from sinkformer_pl.callbacks.step_costs import StepCosts

__all__ = [
    "AppendingCSVLogger",
    "AttentionDiagnostics",
    "Compile",
    "LastCheckpoint",
    "PredictionWriter",
    "RequireFinite",
    "ResumeState",
    "RunRecord",
    "StepCosts",
    "StopSignals",
    "Stopped",
]
