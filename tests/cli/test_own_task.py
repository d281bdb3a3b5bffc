"""A task of one's own, a regression on data that this package knows nothing of, in the place of `Classifier`."""

import json
import sys
from pathlib import Path

import pytest
import torch

from sinkformer_pl.training.checkpoint_file import read_checkpoint

TASK = '''
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import nn

from sinkformer_pl.factories import as_factory
from sinkformer_pl.models import MultiHeadAttention
from sinkformer_pl.normalizations import AttentionNormalization
from sinkformer_pl.ops import AttentionMask


class Sums(pl.LightningDataModule):
    """Sets of numbers and their sums."""

    def __init__(self, features: int = 2, size: int = 64):
        super().__init__()
        self.features, self.size = features, size

    def loader(self, seed):
        inputs = torch.randn(self.size, 5, self.features, generator=torch.Generator().manual_seed(seed))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, inputs.sum((1, 2))), batch_size=16)

    def train_dataloader(self):
        return self.loader(0)

    def val_dataloader(self):
        return self.loader(1)

    def test_dataloader(self):
        return self.loader(2)

    def predict_dataloader(self):
        return self.loader(2)


class Regression(pl.LightningModule):
    monitors = ("val/error", "train/error")
    from_data = {"features": "features"}

    def __init__(
        self, features: int, normalization: Callable[[], AttentionNormalization], width: int = 8, lr: float = 0.01
    ):
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Linear(features, width)
        self.attention = MultiHeadAttention(width, 2, as_factory(normalization, AttentionNormalization))
        self.head = nn.Linear(width, 1)
        self.lr = lr

    def forward(self, inputs):
        x = self.embed(inputs)
        return self.head(x + self.attention(x, x, AttentionMask())).sum((1, 2))

    def error(self, batch, name):
        inputs, target = batch
        error = (self(inputs) - target).square().mean()
        self.log(name, error, batch_size=len(target), on_step=False, on_epoch=True)
        return error

    def training_step(self, batch, batch_idx):
        return self.error(batch, "train/error")

    def validation_step(self, batch, batch_idx):
        self.error(batch, "val/error")

    def test_step(self, batch, batch_idx):
        self.error(batch, "test/error")

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)
'''

COMMON = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Flags that choose the task and its data."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_regression.py").write_text(TASK)
    return ["--model", "own_regression.Regression", "--data", "own_regression.Sums", *COMMON]


def test_it_is_trained_resumed_and_tested_from_its_checkpoint(own, run, tmp_path):
    chosen = ["--model.normalization", "Sinkhorn", "--model.normalization.n_iters", "5", "--data.features", "3"]
    printed = run("fit", *own, *chosen, "--trainer.max_epochs", "2", "--name", "sums")
    assert "training under Sinkhorn(n_iters=5)" in printed
    folder = tmp_path / "runs/sums/version_0"
    first = read_checkpoint(folder / "checkpoints/best.ckpt")
    assert first["hyper_parameters"]["features"] == 3
    assert first["state_dict"]["embed.weight"].shape == (8, 3)
    run("fit", "--ckpt_path", "last", "--name", "sums", "--trainer.max_epochs", "6")
    assert json.loads((folder / "fit.json").read_text())["epochs"] == 6
    printed = run("test", "--ckpt_path", "best", "--name", "sums", "--model.normalization", "Softmax")
    assert "testing under Softmax(), trained under Sinkhorn(n_iters=5)" in printed
    metrics = json.loads((folder / "test.json").read_text())["metrics"]
    assert metrics["test/error"] < 15  # the variance of the target
    # What the first monitor is best in is kept.
    assert torch.isfinite(read_checkpoint(folder / "checkpoints/best.ckpt")["state_dict"]["head.bias"]).all()


def test_what_is_wrong_with_its_arguments_is_said_as_of_a_classifier(own, fail):
    chosen = ["fit", *own, "--model.normalization", "Softmax"]
    message = fail(*chosen, "--model.wdith", "3")
    assert "model.wdith: Regression has no argument wdith; did you mean model.width?" in message
    message = fail(*chosen, "--model.features", "3")
    assert "model.features" in message
    assert "data.features" in message
    message = fail(*chosen, "--monitor", "val/eror")
    assert "val/error" in message
    assert "ProceduralShapes" in fail(*chosen, "--data", "ProceduralShapes")
    assert "model.normalization missing" in fail("fit", *own)


def test_predictions_that_are_no_probabilities_are_not_written(own, run, capfd):
    run("fit", *own, "--model.normalization", "Softmax", "--trainer.max_epochs", "1", "--name", "sums")
    with pytest.raises(SystemExit) as exit_:
        run("predict", "--ckpt_path", "last", "--name", "sums")
    assert exit_.value.code == 1
    assert "Regression.predict_step" in capfd.readouterr().err
    assert not Path("runs/sums/version_0/predictions.csv").exists()
