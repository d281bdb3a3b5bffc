"""Speed and memory, always as ratios to a peer measured in the same run."""

from sinkformer_pl.benchmark.attention import SUITES, Case, Result, measure
from sinkformer_pl.benchmark.plans import compare_plans, published_step
from sinkformer_pl.benchmark.timing import Times, interleaved

__all__ = ["SUITES", "Case", "Result", "Times", "compare_plans", "interleaved", "measure", "published_step"]
