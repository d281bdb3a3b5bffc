"""Is it the normalization? The same training under several of them, run after run, and what came out."""

from sinkformer_pl.comparison.arms import Arm, read_arms
from sinkformer_pl.comparison.report import Difference, Summary, differences, summaries, write_report
from sinkformer_pl.comparison.results import Result, read_result
from sinkformer_pl.comparison.schedule import run_all
from sinkformer_pl.comparison.trial import Trial

__all__ = [
    "Arm",
    "Difference",
    "Result",
    "Summary",
    "Trial",
    "differences",
    "read_arms",
    "read_result",
    "run_all",
    "summaries",
    "write_report",
]
