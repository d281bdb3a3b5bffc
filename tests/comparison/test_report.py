"""Tables of a comparison, from results made by hand."""

import csv
import statistics
import warnings
from pathlib import Path

import pytest
from scipy import stats

from sinkformer_pl.comparison import Arm, Result, Trial, differences, summaries, write_report

SOFTMAX = (0.912, 0.893, 0.901, 0.917)
SINKHORN = (0.921, 0.899, 0.896, 0.930)


def result(name, seed, accuracy, **given):
    trial = Trial(Arm(name), seed, Path("nowhere"), ())
    if accuracy is None:
        return Result(trial, **{"status": "failed", **given})
    metrics = {"test/accuracy": accuracy, "test/loss": 1 - accuracy}
    curves = {"val/accuracy": {0: 0.5, 1: accuracy}, "train/loss": {0: 2.0, 1: 1.0}}
    measured = {"curves": curves, "seconds_per_step": 0.01 * (seed + 1), "waiting": 0.1, "peak_mb": 100.0}
    return Result(trial, **{"status": "done", "metrics": metrics, "best": {"val/accuracy": 0.9}, **measured, **given})


@pytest.fixture
def results():
    return [
        *(result("Softmax", seed, accuracy) for seed, accuracy in enumerate(SOFTMAX)),
        *(result("Sinkhorn", seed, accuracy) for seed, accuracy in enumerate(SINKHORN)),
    ]


def test_differences_are_paired_by_seed(results):
    [difference] = differences(results[::-1][4:] + results[4:], "test/accuracy")  # the order of seeds doesn't matter
    test = stats.ttest_rel(SINKHORN, SOFTMAX)
    interval = test.confidence_interval(0.95)
    assert (difference.label, difference.baseline) == ("Sinkhorn", "Softmax")
    assert difference.mean == pytest.approx(statistics.fmean(SINKHORN) - statistics.fmean(SOFTMAX))
    assert difference.interval == pytest.approx((interval.low, interval.high))
    assert difference.values == pytest.approx([b - a for a, b in zip(SOFTMAX, SINKHORN, strict=True)])


def test_only_seeds_that_both_have_make_a_pair(results):
    [difference] = differences(results[1:6], "test/accuracy")
    assert difference.values == pytest.approx([SINKHORN[1] - SOFTMAX[1]])
    assert difference.interval is None
    assert differences(results[2:6], "test/accuracy") == []


def test_nothing_is_dropped(results, tmp_path):
    unfinished = {"status": "unfinished", "curves": {"val/accuracy": {0: 0.3}}}
    results += [result("Softmax", 4, None), result("Sinkhorn", 4, None, **unfinished), result("Sinkhorn", 5, 0.1)]
    text = write_report(results, metric="test/accuracy", root=tmp_path, command="the command", machine="the machine")
    first, second = summaries(results, "test/accuracy")
    assert (len(first.values), first.missing) == (4, 1)
    assert (len(second.values), second.missing) == (5, 1)
    for line in (
        "| Softmax | 4, 1 missing | 91.70 | 90.65 | 90.58 | 89.30 | 1.08 | 25.0 | 100 |",
        "| Sinkhorn | 5, 1 missing | 93.00 | 89.90 | 74.92 | 10.00 | 36.32 | 30.0 | 100 |",
        "| Softmax | 4 | failed | - | - | - | - | - |",
        "| Sinkhorn | 5 | done | 10.00 | 90.00 | 60.0 | 10.0% | 100 |",
        "    the command",
        "the machine",
    ):
        assert line in text.splitlines()
    assert (tmp_path / "summary.md").read_text() == text
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert [(row["normalization"], row["seed"], row["status"]) for row in rows] == [
        (run.trial.arm.label, str(run.trial.seed), run.status) for run in results
    ]
    assert float(rows[0]["test/accuracy"]) == SOFTMAX[0]
    assert rows[8]["test/accuracy"] == ""
    curves = list(csv.DictReader((tmp_path / "curves.csv").open()))
    assert len(curves) == 9 * 2 + 1
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_when_all_runs_fail_nothing_warns(tmp_path):
    results = [result(name, 0, None) for name in ("Softmax", "Sinkhorn")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = write_report(results, metric="test/accuracy", root=tmp_path, command="", machine="")
    assert "| Softmax | 0, 1 missing | - |" in text


def test_of_a_loss_the_lowest_is_best(results, tmp_path):
    text = write_report(results, metric="test/loss", root=tmp_path, command="", machine="")
    named = write_report(results, metric="test/loss", root=tmp_path, command="", machine="", lowest=False)
    assert "| Softmax | 4 | 0.0830 | 0.0935 | 0.094" not in named
    assert "| Softmax | 4 | 0.0830 | 0.0935 | 0.094" in text


def test_resumed_runs_are_marked(results, tmp_path):
    results[0] = result("Softmax", 0, SOFTMAX[0], status="resumed")
    text = write_report(results, metric="test/accuracy", root=tmp_path, command="", machine="")
    assert "| Softmax | 4, 1 of them resumed |" in text
    assert "| Softmax | 0 | resumed | 91.20 |" in text
