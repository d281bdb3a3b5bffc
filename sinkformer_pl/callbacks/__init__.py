"""What watches a run and writes its files."""

from sinkformer_pl.callbacks.loggers import AppendingCSVLogger
from sinkformer_pl.callbacks.predictions import PredictionWriter
from sinkformer_pl.callbacks.run_record import RunRecord
from sinkformer_pl.callbacks.step_costs import StepCosts

__all__ = ["AppendingCSVLogger", "PredictionWriter", "RunRecord", "StepCosts"]
