"""Two processes that train and evaluate together."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIG = Path(__file__).parents[1] / "configs/pointcloud.yaml"
QUIET = [
    "--trainer.enable_progress_bar",
    "false",
    "--trainer.enable_model_summary",
    "false",
    "--trainer.accelerator",
    "cpu",
]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
SMALL = ["--data.train_size", "241", "--data.val_size", "25", "--data.test_size", "39"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


def command(folder: Path, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "sinkformer_pl", *argv, *QUIET], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_main_config_trains_to_its_end_under_ddp_and_is_evaluated_alike(folder):
    printed = command(folder, "fit", "--config", str(CONFIG), *TWO, *SMALL)
    run = folder / "runs/pointcloud/version_0"
    assert "`max_epochs=8` reached" in printed
    assert printed.count("training under Sinkhorn(n_iters=3)") == 1
    assert [path.name for path in (folder / "runs/pointcloud").iterdir()] == ["version_0"]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert sorted({row["epoch"] for row in rows if row["val/loss"]}) == [str(epoch) for epoch in range(8)]

    # An uneven split, 39 samples over two processes: each counted once, as one process counts them.
    results = []
    for devices in ([], TWO):
        command(folder, "test", "--ckpt_path", "best", "--name", "pointcloud", *devices)
        command(folder, "predict", "--ckpt_path", "best", "--name", "pointcloud", *devices)
        results.append((json.loads((run / "test.json").read_text()), (run / "predictions.csv").read_text()))
    (alone, alone_rows), (together, together_rows) = results
    assert sum(map(sum, together["confusion"])) == 39
    assert together["confusion"] == alone["confusion"]
    assert together["metrics"]["test/loss"] == pytest.approx(alone["metrics"]["test/loss"], rel=1e-5)
    table, other = (list(csv.DictReader(text.splitlines())) for text in (alone_rows, together_rows))
    assert [row["sample"] for row in table] == [row["sample"] for row in other]
    assert [row["class"] for row in table] == [row["class"] for row in other]
