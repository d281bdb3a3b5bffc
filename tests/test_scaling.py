"""Several processes, accumulation, half precision, compilation: on, by a second configuration or under a launcher."""

import csv
import json
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from sinkformer_pl.cli import main
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import Sinkhorn
from sinkformer_pl.tasks import Classifier
from tests import commands

CONFIGS = Path(__file__).parents[1] / "configs"
POINTCLOUD = str(CONFIGS / "pointcloud.yaml")
SMALL = ["--data.train_size", "25", "--data.val_size", "12", "--data.test_size", "13", "--data.batch_size", "4"]
TINY = ["--model.backbone.dim", "8", "--model.backbone.num_heads", "2", "--model.backbone.inducing_points", "4"]
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
CPU = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]


def fragment(name: str) -> list[str]:
    return ["--config", POINTCLOUD, "--config", str(CONFIGS / f"add/{name}.yaml"), *SMALL, *TINY, *QUIET]


@pytest.mark.parametrize("name", ["bf16", "accumulate", "clip"])
def test_a_second_configuration(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["fit", *fragment(name), *CPU])
    assert (tmp_path / "runs/pointcloud/version_0/checkpoints/best.ckpt").is_file()


def test_a_compiled_network_trains_and_its_checkpoint_is_like_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = ["--config", str(CONFIGS / "image.yaml"), "--config", str(CONFIGS / "add/compile.yaml")]
    # The default backend takes minutes on a CPU.
    fast = ["--trainer.callbacks.init_args.backend", "eager", "--model.backbone.depth", "1"]
    few = ["--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1"]
    main(["fit", *configs, *fast, *few, *QUIET, *CPU])
    main(["test", "--ckpt_path", "best", "--name", "image", "--model.normalization", "Softmax", *CPU[:2]])
    result = json.loads((tmp_path / "runs/image/version_0/test.json").read_text())
    assert 0 <= result["metrics"]["test/accuracy"] <= 1


def test_fsdp_without_a_gpu_is_refused_in_one_line(no_cuda, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", *fragment("fsdp")])
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "trainer.accelerator" in line


def test_every_fragment_is_tried_here():
    names = {path.stem for path in (CONFIGS / "add").glob("*.yaml")}
    assert names == {"ddp", "fsdp", "bf16", "accumulate", "clip", "compile"}


@pytest.mark.slow
def test_under_torchrun(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    command = [*launcher, "-m", "sinkformer_pl", "fit", *fragment("ddp"), *CPU, "--trainer.devices", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("training under Sinkhorn(n_iters=3)") == 1
    assert [path.name for path in (tmp_path / "runs/pointcloud").iterdir()] == ["version_0"]
    run = tmp_path / "runs/pointcloud/version_0"
    assert (run / "checkpoints/best.ckpt").is_file()
    # 24 of 25 samples, in 3 batches of 4 for each of two processes.
    assert [row["steps"] for row in csv.DictReader((run / "costs.csv").open())] == ["3"]


KEEP = """
import pytorch_lightning as pl
import torch


class Keep(pl.Callback):
    def on_fit_end(self, trainer, pl_module):
        torch.save(pl_module.state_dict(), f"{trainer.world_size}-{trainer.global_rank}.pt")
"""


def test_two_processes_train_as_one_with_batches_twice_as_large(tmp_path):
    (tmp_path / "keep.py").write_text(KEEP)
    shared = ["--config", POINTCLOUD, *TINY, *QUIET, *CPU[:2], "--data.train_size", "48", "--data.val_size", "12"]
    shared += ["--model.optimizer", "SGD", "--model.optimizer.lr", "0.1", "--trainer.max_epochs", "2"]
    shared += ["--plugins", "keep", "--trainer.callbacks", "keep.Keep", "--data.num_workers", "0"]
    for size, devices in (("8", []), ("4", ["--trainer.devices", "2", "--trainer.strategy", "ddp"])):
        done = commands.run("fit", *shared, "--data.batch_size", size, *devices, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for name, weight in one.items():
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-6, msg=name)
        assert torch.equal(first[name], second[name]), name


def trained(batch_size: int, accumulate: int, size: int, epochs: int = 2) -> dict[str, torch.Tensor]:
    """Weights after training by plain SGD."""
    data = ProceduralShapes(train_size=size, val_size=12, test_size=12, batch_size=batch_size)
    pl.seed_everything(0, verbose=False)
    network = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4)
    optimizer = partial(torch.optim.SGD, lr=0.1)
    model = Classifier(network, partial(Sinkhorn, n_iters=3), num_classes=12, optimizer=optimizer)
    trainer = pl.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, data)
    return model.state_dict()


@pytest.mark.parametrize("size", [48, 42, 55])
def test_four_batches_of_four_are_one_of_sixteen(size):
    """Also where the last step of an epoch has fewer samples: 42 = 2 x 16 + 4 + 4 + 2, 55 = 3 x 16 + 4 + 3."""
    whole, parts = trained(16, 1, size), trained(4, 4, size)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=1e-6, msg=name)
