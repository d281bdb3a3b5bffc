"""Tasks: LightningModules that receive their backbone and their normalization."""

from sinkformer_pl.tasks.classification import Classifier
from sinkformer_pl.tasks.initialization import Initialization, init_from
from sinkformer_pl.tasks.losses import CrossEntropy, FocalLoss, Loss
from sinkformer_pl.tasks.outputs import Prediction
from sinkformer_pl.tasks.protocol import Task
from sinkformer_pl.tasks.schedules import Constant, Schedule, StepDecay, WarmupCosine

__all__ = [
    "Classifier",
    "Constant",
    "CrossEntropy",
    "FocalLoss",
    "Initialization",
    "Loss",
    "Prediction",
    "Schedule",
    "StepDecay",
    "Task",
    "WarmupCosine",
    "init_from",
]
