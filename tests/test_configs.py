"""Every configuration is built and run for a few batches, under both arms."""

from pathlib import Path

import numpy as np
import pytest

from sinkformer_pl.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
EMBEDDED = ("pointcloud.yaml", "image.yaml", "text.yaml")  # their data come with the installation
FAST = ["--trainer.fast_dev_run", "2", "--trainer.accelerator", "cpu", "--data.batch_size", "4"]


@pytest.fixture
def clouds(tmp_path):
    """A file of forty clouds of 1100 points in four classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    points = rng.normal(size=(40, 1100, 3)) * (1 + labels[:, None, None] * np.array([1.0, 0.0, 0.5]))
    path = tmp_path / "clouds.npz"
    split = {
        "train_points": points[:28],
        "train_label": labels[:28],
        "test_points": points[28:],
        "test_label": labels[28:],
    }
    np.savez(path, **split)
    return path


@pytest.mark.parametrize("normalization", [[], ["--model.normalization", "Softmax"]], ids=["as it is", "Softmax"])
@pytest.mark.parametrize("name", NAMES)
def test_config_runs(name, normalization, clouds, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = CONFIGS / name
    data = [] if name in EMBEDDED else ["--data.root", str(clouds), "--data.num_workers", "0"]
    main(["fit", "--config", str(path), *data, *FAST, *normalization])
    assert f"training under {'Softmax()' if normalization else 'Sinkhorn(n_iters='}" in capsys.readouterr().out
    # The header says how to run it.
    assert f"python -m sinkformer_pl fit --config configs/{name}" in path.read_text()


def test_modelnet10_config_on_meshes_in_the_official_layout(real_data, tmp_path, monkeypatch, capsys):
    import zipfile

    with zipfile.ZipFile(real_data / "ModelNet10.zip") as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    run = ["--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    main(["fit", "--config", str(CONFIGS / "modelnet10.yaml"), "--data.root", str(tmp_path / "ModelNet10"), *run])
    assert "best.ckpt" in capsys.readouterr().out
    # The sampled points are kept under the root of the runs, not beside the meshes.
    assert any((tmp_path / "runs/cache").iterdir())
    assert {path.name for path in (tmp_path / "ModelNet10").iterdir()} == {
        *("bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet")
    }
