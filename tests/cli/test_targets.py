"""Class weights, sampling, losses and metrics from the command line: what they do to a training."""

import csv
import json

import pytest
import torch

from sinkformer_pl.training.checkpoint_content import METRICS_KEY
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from sinkformer_pl.training.last_checkpoint import LastCheckpoint
from sinkformer_pl.training.signals import Stopped

UNEVEN = [
    *("--data.sampling", "{bowl: 9}", "--data.batch_size", "8", "--data.num_workers", "0"),
    *("--model.class_weights", "balanced", "--model.loss", "FocalLoss", "--model.loss.gamma", "1.5"),
    *("--model.metrics", "[F1Score, CalibrationError]", "--monitor", "val/CalibrationError"),
]


def test_a_training_resumes_within_an_epoch_to_the_same_bits(tiny, run, monkeypatch, tmp_path):
    epochs = ["--trainer.max_epochs", "3"]
    run("fit", "--config", tiny, *UNEVEN, *epochs, "--name", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "_agreed", lambda self, trainer, *_: (15 * (trainer.global_step == 8), False))
        with pytest.raises(Stopped):
            run("fit", "--config", tiny, *UNEVEN, *epochs, "--name", "cut")
    run("fit", "--ckpt_path", "last", "--name", "cut")
    whole, cut = (tmp_path / f"runs/{name}/version_0" for name in ("whole", "cut"))
    one, other = (read_checkpoint(folder / "checkpoints/last.ckpt") for folder in (whole, cut))
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    assert (whole / "metrics.csv").read_text() == (cut / "metrics.csv").read_text()
    # What was monitored is lowest in the epoch of the best checkpoint.
    with (whole / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/CalibrationError"]]
    by_epoch = {int(row["epoch"]): float(row["val/CalibrationError"]) for row in rows}
    assert len(by_epoch) == 3
    best = read_checkpoint(whole / "checkpoints/best.ckpt")
    assert best["epoch"] == min(by_epoch, key=by_epoch.__getitem__)
    assert best[METRICS_KEY]["val/CalibrationError"] == pytest.approx(min(by_epoch.values()), rel=1e-6)
    # A test needs nothing but the checkpoint.
    run("test", "--ckpt_path", str(whole / "checkpoints/best.ckpt"))
    metrics = json.loads((whole / "test.json").read_text())["metrics"]
    assert {"test/F1Score", "test/CalibrationError"} <= metrics.keys()


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--model.loss", "FocalLos"], ["model.loss FocalLos", "did you mean FocalLoss?", "CrossEntropy"]),
        (["--model.loss", "FocalLoss", "--model.loss.gama", "2"], ["model.loss.gama", "model.loss.gamma"]),
        (["--model.class_weights", "[1, 2]"], ["model.class_weights", "2 weights for 12 classes"]),
        (["--model.class_weights", "{bowel: 2}"], ["model.class_weights", "did you mean bowl?"]),
        (["--model.class_weights", "even"], ["model.class_weights even", "balanced"]),
        (["--data.sampling", "{bowel: 2}"], ["data.sampling", "did you mean bowl?"]),
        (["--data.sampling", "[0]"], ["data.sampling", "1 weights for 12 classes"]),
        (["--model.metrics", "[F1Scor]"], ["model.metrics F1Scor", "did you mean F1Score?"]),
        (["--model.metrics", "AUROC", "--monitor", "val/F1Score"], ["val/F1Score", "val/AUROC"]),
        (["--model.multi_label", "true"], ["model.multi_label", "follows from data.multi_label"]),
    ],
)
def test_what_does_not_fit_is_one_line_beforehand(tiny, fail, flags, facts):
    message = fail("fit", "--config", tiny, *flags)
    assert all(fact in message for fact in facts), message
