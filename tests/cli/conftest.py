"""A run small enough to be made in a second, and the command line inside this process."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sinkformer_pl.cli import main

ROOT = Path(__file__).parents[2]
POINTCLOUD = str(ROOT / "configs/pointcloud.yaml")

TINY = {
    "name": "tiny",
    "data": {"class_path": "ProceduralShapes", "init_args": {"train_size": 48, "val_size": 24, "test_size": 26}},
    "model": {
        "normalization": "Sinkhorn",
        "backbone": {"class_path": "SetTransformer", "init_args": {"dim": 8, "num_heads": 2, "inducing_points": 4}},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.003}},
        "schedule": "WarmupCosine",
    },
    "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
}

Run = Callable[..., str]


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the runs of one training of the tiny run, for tests that look at it or copy it."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["fit", "--config", "tiny.yaml"])
    return folder / "runs"


@pytest.fixture
def trained(tiny_runs: Path, tmp_path: Path) -> Path:
    """Return the folder of a tiny run in the folder of the test, as `fit` would have left it there."""
    shutil.copytree(tiny_runs, tmp_path / "runs")
    return tmp_path / "runs/tiny/version_0"


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """Path of a YAML file of a tiny run."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return str(path)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in an empty folder; returns all that it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> str:
        capfd.readouterr()
        main(list(argv))
        captured = capfd.readouterr()
        return captured.out + captured.err

    return run


@pytest.fixture
def fail(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must be refused; returns the message, having checked that nothing was written."""

    def fail(*argv: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit_:
            run(*argv)
        assert exit_.value.code == 2
        message = capfd.readouterr().err
        lines = message[message.index("error: ") :].splitlines()
        assert len(lines) <= 2, message
        for raw in ("Traceback", "Union subtypes", "Parser key", "Namespace(", "<class '"):
            assert raw not in message
        assert len(lines[0]) < 700, message
        assert sorted(tmp_path.rglob("*")) == before
        return "\n".join(lines)

    return fail
