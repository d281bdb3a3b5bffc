"""Use a trained model on new inputs: `load` a checkpoint in Python, `stream` through files and tables."""

from sinkformer_pl.inference.attention import Attention
from sinkformer_pl.inference.model import TrainedModel, load
from sinkformer_pl.inference.results import Prediction, Predictions

__all__ = ["Attention", "Prediction", "Predictions", "TrainedModel", "load"]
