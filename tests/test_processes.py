"""Two processes that train and evaluate together."""

import csv
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import commands

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


def command(folder: Path, *argv: str) -> str:
    """Run a command whose first process is forked, and whose second is a new one."""
    done = commands.run(*argv, *QUIET, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def require_equal_figures(folder: Path, size: int, batch_size: int) -> None:
    """Each sample is counted once, and all figures are those of one process to the last digit."""
    sizes = ["--data.test_size", str(size), "--data.batch_size", str(batch_size)]
    results = []
    for devices in ([], TWO):
        command(folder, "test", "--ckpt_path", "best", "--name", "pointcloud", *sizes, *devices)
        command(folder, "predict", "--ckpt_path", "best", "--name", "pointcloud", *sizes, *devices)
        run = folder / "runs/pointcloud/version_0"
        results.append((json.loads((run / "test.json").read_text()), (run / "predictions.csv").read_text()))
    alone, together = results
    confusion, metrics = together[0]["confusion"], together[0]["metrics"]
    assert sum(map(sum, confusion)) == len(together[1].splitlines()) - 1 == size
    assert together == alone
    # A class without a sample in the split has no figure.
    there = {name for name, row in zip(together[0]["classes"], confusion, strict=True) if sum(row)}
    each = {
        name.removeprefix(prefix): metrics[name]
        for name in metrics
        if name.startswith(prefix := "test/accuracy_class/")
    }
    assert each.keys() == there
    assert metrics["test/accuracy_macro"] == pytest.approx(statistics.fmean(each.values()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder in which the main configuration was trained for an epoch."""
    folder = tmp_path_factory.mktemp("processes")
    command(folder, "fit", "--config", str(CONFIG), *SMALL, "--trainer.max_epochs", "1")
    return folder


@pytest.mark.slow
def test_uneven_splits_are_evaluated_as_by_one_process(trained):
    """Of five batches the last is smaller; three of twelve classes have no sample."""
    require_equal_figures(trained, 9, 2)


@pytest.mark.slow
def test_main_config_trains_to_its_end_under_ddp_and_is_evaluated_alike(tmp_path):
    printed = command(tmp_path, "fit", "--config", str(CONFIG), *TWO, *SMALL)
    run = tmp_path / "runs/pointcloud/version_0"
    assert "`max_epochs=8` reached" in printed
    assert printed.count("training under Sinkhorn(n_iters=3)") == 1
    assert [path.name for path in (tmp_path / "runs/pointcloud").iterdir()] == ["version_0"]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert sorted({row["epoch"] for row in rows if row["val/loss"]}) == [str(epoch) for epoch in range(8)]
    # The one batch is the first process's.
    require_equal_figures(tmp_path, 12, 16)


FAULT = """
import os
import signal
import time

import pytorch_lightning as pl

from sinkformer_pl.errors import UserError


class Fault(pl.Callback):
    def __init__(self, rank: int, kind: str):
        self.rank, self.kind = rank, kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step < 2:
            return
        if trainer.global_rank != self.rank:
            if self.kind == "hang":
                time.sleep(1000)
        elif self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "nan":
            batch.inputs[1] = float("nan")
        elif self.kind == "bug":
            raise KeyError("the first cause")
        else:
            raise UserError("the first cause")
"""


def left_over(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("kind", "rank", "expected"),
    [
        ("user", 1, "error: the first cause"),
        pytest.param("bug", 0, "KeyError: 'the first cause'", marks=pytest.mark.slow),
        pytest.param("nan", 1, "error: epoch 0, step 2: batch 2 has a loss of nan: the", marks=pytest.mark.slow),
        pytest.param("kill", 0, "was ended", marks=pytest.mark.slow),
        pytest.param("kill", 1, "was ended by SIGKILL", marks=pytest.mark.slow),
        pytest.param("hang", 0, "error: the first cause", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_fails_ends_all_and_says_why_alone(tmp_path, kind, rank, expected):
    (tmp_path / "fault.py").write_text(FAULT)
    fault = ["--plugins", "fault", "--trainer.callbacks", "fault.Fault"]
    fault += ["--trainer.callbacks.rank", str(rank), "--trainer.callbacks.kind", kind]
    small = [*SMALL, "--model.backbone.dim", "8", "--model.backbone.num_heads", "2", "--data.num_points", "16"]
    out = tmp_path / "out"
    process = commands.start(
        "fit", "--config", str(CONFIG), *fault, *TWO, *QUIET, *small, cwd=tmp_path, out=out, err=out
    )
    try:
        process.join(300)
        assert process.exitcode not in (None, 0)
        deadline = time.monotonic() + 120
        while left_over(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left_over(process.pid)
    finally:
        if left_over(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    printed = out.read_text()
    assert printed.count(expected) == 1, printed
    assert printed.count("error: ") + printed.count("Traceback") == 1, printed
    assert "terminated with code" not in printed
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_under_torchrun_too_a_failure_is_said_once(tmp_path):
    (tmp_path / "fault.py").write_text(FAULT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    fault = ["--plugins", "fault", "--trainer.callbacks", "fault.Fault"]
    fault += ["--trainer.callbacks.rank", "1", "--trainer.callbacks.kind", "user"]
    done = subprocess.run(
        [*launcher, "-m", "sinkformer_pl", "fit", "--config", str(CONFIG), *fault, *TWO, *QUIET, *SMALL],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert done.stdout.count("error: ") == done.stdout.count("error: the first cause") == 1, done.stdout
    # The other process, which torchrun ends then.
    assert "stopped by" not in done.stdout


SIGNALLED = """
import os
import signal

import pytorch_lightning as pl


class Signalled(pl.Callback):
    def __init__(self, rank: int):
        self.rank = rank

    def strike(self, trainer):
        if trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_sanity_check_start(self, trainer, pl_module):
        self.strike(trainer)

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.strike(trainer)
"""


@pytest.mark.parametrize(
    ("moment", "rank"),
    [
        pytest.param("in a test", 1, marks=pytest.mark.slow),
        pytest.param("in a test", 0, marks=pytest.mark.slow),
        pytest.param("before the first step", 0, marks=pytest.mark.slow),
        pytest.param("before the first step", 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_process_ends_all_where_no_step_follows(trained, tmp_path, moment, rank):
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    argv = ["fit", "--config", str(CONFIG), "--trainer.num_sanity_val_steps", "2", *SMALL]
    if moment == "in a test":
        argv = ["test", "--ckpt_path", str(trained / "runs/pointcloud/version_0/checkpoints/best.ckpt")]
    argv += ["--plugins", "signalled", "--trainer.callbacks", "signalled.Signalled"]
    done = commands.run(*argv, "--trainer.callbacks.rank", str(rank), *TWO, *QUIET, cwd=tmp_path)
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    assert printed.count("stopped by SIGTERM") == 1, printed
    assert "Traceback" not in printed


SCRIPT = """
import os
import sys
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch

from sinkformer_pl.callbacks import RequireFinite
from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.errors import UserError
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.tasks import Classifier


class Overflow(pl.Callback):
    # Of the loss alone, of which the other process's gradients know nothing.
    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 2 and trainer.global_rank == 1:
            loss.data.fill_(float("inf"))


delay = int(sys.argv[1])
network = partial(SetTransformer, dim=8, num_heads=2, inducing_points=4)
optimizer = partial(torch.optim.AdamW, fused=delay > 0)
model = Classifier(network, Softmax, num_classes=12, optimizer=optimizer)
trainer = pl.Trainer(
    max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[Overflow(), RequireFinite(delay)],
)
try:
    trainer.fit(model, ProceduralShapes(train_size=96, val_size=24, test_size=24, batch_size=8))
except UserError as error:
    Path(f"rank{trainer.global_rank}").write_text(f"{error} (at {trainer.global_step})")
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_all_processes_stop_at_one_step_for_one_reason_from_python_too(tmp_path, delay):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(delay)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300, check=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "rank1").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert first.startswith("epoch 0, step 2: batch 2 has a loss of inf, of 8 samples (train/")
    assert first.endswith(f" (at {2 + delay})")


LATE = """
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytorch_lightning as pl

from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.models import SetTransformer
from sinkformer_pl.normalizations import Softmax
from sinkformer_pl.training.last_checkpoint import LastCheckpoint
from sinkformer_pl.training.resume import ResumeState
from sinkformer_pl.training.signals import Stopped, StopSignals
from sinkformer_pl.tasks import Classifier


class Strike(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_exception(self, trainer, pl_module, exception):
        assert isinstance(exception, Stopped), exception
        Path(f"rank{trainer.global_rank}").write_text(f"{exception.line} (epoch {trainer.current_epoch})")


model = Classifier(partial(SetTransformer, dim=8, num_heads=2, inducing_points=4), Softmax, num_classes=12)
last = LastCheckpoint(Path("last.ckpt"), StopSignals(), delay=int(sys.argv[1]))
trainer = pl.Trainer(
    max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[Strike(), ResumeState(), last],
)
trainer.fit(model, ProceduralShapes(train_size=96, val_size=24, test_size=24, batch_size=8))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("delay", "step"), [(2, 5), (100, 6)])
def test_all_processes_heed_a_signal_to_one_of_them_some_steps_later(tmp_path, delay, step):
    """After the last of six steps a validation follows, which isn't begun."""
    (tmp_path / "script.py").write_text(LATE)
    command = [sys.executable, "script.py", str(delay)]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300)
    deadline = time.monotonic() + 120
    while not (tmp_path / "rank1").is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    lines = [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)]
    assert lines == [f"stopped by SIGTERM at step {step}; resume with --ckpt_path last (epoch 0)"] * 2
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step
