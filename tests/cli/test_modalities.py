"""Images and texts on the command line, beside the point clouds of the other tests."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from sinkformer_pl.data import Docstrings, TextTable

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SMALL = ["--model.backbone.dim", "16", "--model.backbone.num_heads", "2", "--model.backbone.depth", "1"]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_run_is_tested_and_predicted_from_its_checkpoint_alone(modality, run, tmp_path):
    run("fit", "--config", str(CONFIGS / f"{modality}.yaml"), *SHORT, *SMALL, "--trainer.limit_train_batches", "5")
    run("test", "--ckpt_path", "best", "--name", modality, "--trainer.limit_test_batches", "3")
    run("predict", "--ckpt_path", "best", "--name", modality, "--trainer.limit_predict_batches", "3")
    folder = tmp_path / f"runs/{modality}/version_0"
    assert 0 <= json.loads((folder / "test.json").read_text())["metrics"]["test/accuracy"] <= 1
    assert len((folder / "predictions.csv").read_text().splitlines()) > 60


def test_what_a_loaders_worker_finds_is_one_line_too(run, tmp_path, capfd):
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "photos" / place).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), "red").save(tmp_path / "photos" / place / f"{number}.png")
    broken = tmp_path / "photos/test/b/3.png"
    config, data = str(CONFIGS / "image.yaml"), ["--data", "ImageFolder", "--data.root", str(tmp_path / "photos")]
    arguments = ["--data.image_size", "8", "--data.check_files", "false", "--model.backbone.channels", "3", *SMALL]
    run("fit", "--config", config, *data, *arguments, *SHORT)
    broken.write_text("<html>")
    with pytest.raises(SystemExit):
        run("test", "--ckpt_path", "best", "--name", "image", "--data.num_workers", "1")
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {broken}: can't be decoded")
    assert "Traceback" not in line


def test_a_text_model_reads_other_data_through_its_own_tokenizer(run, tmp_path):
    run("fit", "--config", str(CONFIGS / "text.yaml"), *SHORT, *SMALL)
    run("test", "--ckpt_path", "best", "--name", "text")
    result = tmp_path / "runs/text/version_0/test.json"
    wanted = json.loads(result.read_text())["metrics"]["test/loss"]

    data = Docstrings()
    data.setup()
    for name, split in (("train", "val"), ("test", "test")):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            dataset = data.datasets[split]
            rows = zip(dataset.texts, (data.classes[target] for target in dataset.targets), strict=True)
            csv.writer(file).writerows([("text", "label"), *rows])
    table = [
        "--data",
        "TextTable",
        "--data.root",
        str(tmp_path),
        "--data.train",
        "train.csv",
        "--data.test",
        "test.csv",
    ]
    assert TextTable(root=str(tmp_path), train="train.csv", test="test.csv").classes == data.classes
    run(
        "test", "--ckpt_path", "best", "--name", "text", *table, "--data.max_length", "128", "--data.vocab_size", "4000"
    )
    assert json.loads(result.read_text())["metrics"]["test/loss"] == pytest.approx(wanted, rel=1e-4)
