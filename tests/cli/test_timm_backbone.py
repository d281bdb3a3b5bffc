"""A backbone of timm from the command line."""

import numpy as np
import pytest
import torch
from PIL import Image

from sinkformer_pl.data.learnt import read_learnt
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from tests.cli.conftest import ROOT

timm = pytest.importorskip("timm")

NAME = "vit_tiny_patch16_224.augreg_in21k"


def test_from_the_command_line_to_predictions(tmp_path, run):
    weights = tmp_path / "weights"
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model(NAME, in_chans=1, **small)
    timm.models.save_for_hf(model, weights, model_args=small, safe_serialization=True)
    backbone = ["--model.backbone", "TimmBackbone", "--model.backbone.name", NAME, "--model.backbone.channels", "1"]
    backbone += ["--model.backbone.pretrained", "weights", "--model.backbone.image_size", "32"]
    config = str(ROOT / "configs/image.yaml")
    short = ["--trainer.max_epochs", "1", "--data.train_size", "100", "--data.image_size", "32"]
    printed = run("fit", "--config", config, *backbone, *short, "--trainer.accelerator", "cpu")
    assert "taken over from TimmBackbone for the data: mean, std, interpolation, crop_pct" in printed
    best = "runs/image/version_0/checkpoints/best.ckpt"
    assert read_learnt(read_checkpoint(tmp_path / best)).preprocessing.crop_pct == 0.9
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(tmp_path / "grey.png")
    assert "1 predictions" in run("predict", "--ckpt_path", best, "grey.png")
    assert "model.pt2" in run("export", "--ckpt_path", best, "--format", "torch")
    run("inspect", "--ckpt_path", best)
    assert list((tmp_path / "runs/image/version_0").rglob("*.html"))
    resumed = run("fit", "--ckpt_path", "last", "--name", "image", "--trainer.max_epochs", "2")
    assert "taken over from" not in resumed
