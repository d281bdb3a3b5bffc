"""Speed and memory, always as ratios to a peer measured in the same run."""

from sinkformer_pl.benchmark.attention import SUITES, Case, Result, measure
from sinkformer_pl.benchmark.busy import busy_cores
from sinkformer_pl.benchmark.plans import compare_plans
from sinkformer_pl.benchmark.published import Published
from sinkformer_pl.benchmark.timing import Times, interleaved
from sinkformer_pl.benchmark.training import Step, Waiting, compare_image_steps, compare_steps, measure_waiting

__all__ = [
    "SUITES",
    "Case",
    "Published",
    "Result",
    "Step",
    "Times",
    "Waiting",
    "busy_cores",
    "compare_image_steps",
    "compare_plans",
    "compare_steps",
    "interleaved",
    "measure",
    "measure_waiting",
]
