"""Callbacks to choose by name in a configuration, or to hand to a Trainer."""

from sinkformer_pl.callbacks.attention_diagnostics import AttentionDiagnostics
from sinkformer_pl.callbacks.compile import Compile
from sinkformer_pl.callbacks.distillation import Distillation
from sinkformer_pl.callbacks.ema import EMA
from sinkformer_pl.callbacks.finite import RequireFinite
from sinkformer_pl.callbacks.gradual import Gradual

__all__ = ["EMA", "AttentionDiagnostics", "Compile", "Distillation", "Gradual", "RequireFinite"]
