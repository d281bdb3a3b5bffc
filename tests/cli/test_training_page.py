"""The examples of docs/training.md run as they stand there."""

import csv
import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import ROOT

PAGE = (ROOT / "docs/training.md").read_text(encoding="utf-8")
SHORT = ["--trainer.max_epochs", "3", "--data.train_size", "64", "--data.val_size", "24", "--data.test_size", "24"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.log_every_n_steps", "1"]
SMALL = ["--model.backbone.dim", "8", "--model.backbone.num_heads", "2", "--model.normalization", "Softmax"]


def blocks(title: str, language: str) -> list[str]:
    """Return a section's examples in a language, in order."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def commands(title: str) -> list[list[str]]:
    """Return the arguments of a section's commands."""
    lines = [line for block in blocks(title, "sh") for line in block.splitlines()]
    argvs = [shlex.split(line) for line in lines]
    assert all(argv[:3] == ["python", "-m", "sinkformer_pl"] for argv in argvs)
    return [argv[3:] for argv in argvs]


@pytest.fixture
def place(tmp_path, run):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return run


def rates(folder: Path) -> list[dict[str, float]]:
    """Return the rates of each step."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("lr-")]
    return [{name: float(row[name]) for name in names} for row in rows if row[names[0]]]


def test_parameter_groups(place, tmp_path):
    argv, decayed = commands("Parameter groups and weight decay")
    place(*argv, *SHORT, *QUIET, *SMALL)
    [text] = blocks("Parameter groups and weight decay", "yaml")
    (tmp_path / "groups.yaml").write_text(text)
    files = ["--config", "configs/pointcloud.yaml", "--config", "groups.yaml", "--model.no_weight_decay", "null"]
    place("fit", *files, *SHORT, *QUIET, *SMALL)
    first, second = (rates(tmp_path / f"runs/pointcloud/version_{number}") for number in (0, 1))
    assert all(row["lr-AdamW/backbone.embed"] == pytest.approx(0.1 * row["lr-AdamW/rest"]) for row in first + second)
    assert set(second[0]) == {
        *("lr-AdamW/backbone.embed", "lr-AdamW/backbone.embed-no_decay", "lr-AdamW/backbone.pool,head"),
        *("lr-AdamW/rest", "lr-AdamW/rest-no_decay"),
    }
    place(*decayed, *SHORT, *QUIET, *SMALL)
    for row in rates(tmp_path / "runs/pointcloud/version_2"):
        assert [row[f"lr-AdamW/layer_{depth}"] / row["lr-AdamW/layer_3"] for depth in range(4)] == pytest.approx(
            [0.75**3, 0.75**2, 0.75, 1]
        )


def test_schedules(place, tmp_path):
    cycle, restarts, plateau = commands("Schedules and warm-up")
    for argv in (cycle, restarts, plateau):
        place(*argv, *SHORT, *QUIET, *SMALL)
    one, two, three = (rates(tmp_path / f"runs/pointcloud/version_{number}") for number in range(3))
    assert max(row["lr-AdamW"] for row in one) == pytest.approx(0.01, rel=0.1)
    # Two steps an epoch: a warm-up of one epoch, then a cosine of two.
    assert [row["lr-AdamW"] for row in two] == pytest.approx([2e-6, 1e-3, 2e-3, 2e-3, 1e-3, 1e-3])
    assert len(three) == 6
    [code] = blocks("Schedules and warm-up", "python")
    names: dict = {}
    exec(compile(code, "docs/training.md", "exec"), names)
    assert names["SquareRoot"]()(0.75) == 0.5


def test_averaged_weights(place, tmp_path):
    [argv] = commands("Averaged weights")
    place(*argv, *SHORT, *QUIET, *SMALL)
    config = yaml.safe_load((tmp_path / "runs/pointcloud/version_0/config.yaml").read_text())
    [average] = config["trainer"]["callbacks"]
    assert average["init_args"] == {"decay": 0.99, "warmup": True}
    place("test", "--ckpt_path", "best", "--name", "pointcloud", *QUIET[:2])
