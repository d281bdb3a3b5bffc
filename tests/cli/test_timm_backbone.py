"""A backbone of timm from the command line, as docs/images.md has it."""

import re
import shlex

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sinkformer_pl.data.learnt import read_learnt
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from tests.cli.conftest import ROOT

timm = pytest.importorskip("timm")

SECTION = (
    (ROOT / "docs/images.md").read_text(encoding="utf-8").partition("\n## Networks of timm\n")[2].partition("\n## ")[0]
)
BEST = "runs/timm/version_0/checkpoints/best.ckpt"


@pytest.fixture
def place(tmp_path, run):
    """Return the function that runs a command, beside timm.yaml, a few photos and weights of a small model."""
    [text] = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
    (tmp_path / "timm.yaml").write_text(text.replace("pretrained: true", "pretrained: weights"))
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "FOLDER" / ("train" if number < 8 else "test") / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 255, (40, 36, 3), np.uint8)).save(folder / f"{number}.png")
    name = re.search(r"name: (vit_\S+)", text)[1]
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model(name, **small)
    timm.models.save_for_hf(model, tmp_path / "weights", model_args=small, safe_serialization=True)
    return run


def test_the_example_trains_and_its_checkpoint_is_used(place, tmp_path):
    quick = ["--data.image_size", "32", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    commands = [shlex.split(line)[3:] for line in re.findall(r"^python .*", SECTION, re.MULTILINE)]
    printed = place(*commands[0], *quick)
    assert "taken over from TimmBackbone for the data: mean, std, interpolation, crop_pct" in printed
    place(*commands[1], *quick, "--name", "softmax")
    first, second = (read_checkpoint(tmp_path / path) for path in (BEST, BEST.replace("timm", "softmax")))
    groups = [content["optimizer_states"][0]["param_groups"] for content in (first, second)]
    assert [sorted({group["lr_scale"] for group in each})[0] for each in groups] == [pytest.approx(0.7**5)] * 2
    numbers = [sum(len(group["params"]) for group in each) for each in groups]
    assert numbers[0] - numbers[1] == 2
    assert first["hyper_parameters"]["backbone"]["init_args"]["pretrained"] is False
    preprocessing = read_learnt(first).preprocessing
    assert (preprocessing.interpolation, preprocessing.crop_pct) == ("bicubic", 0.9)
    kept = yaml.safe_load((tmp_path / "runs/timm/version_0/config.yaml").read_text())
    assert kept["model"]["backbone"]["init_args"]["pretrained"] == str(tmp_path / "weights")
    for file in (tmp_path / "weights").iterdir():
        file.unlink()
    assert "1 predictions" in place("predict", "--ckpt_path", BEST, "FOLDER/test/class0/8.png")
    assert "model.pt2" in place("export", "--ckpt_path", BEST, "--format", "torch")
    place("inspect", "--ckpt_path", BEST)
    assert (tmp_path / "runs/timm/version_0/inspect.html").exists()
    assert "taken over from" not in place("fit", "--ckpt_path", BEST, "--trainer.max_epochs", "2")
