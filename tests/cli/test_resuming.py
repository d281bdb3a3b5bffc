"""Messages and folders of a `fit` that resumes; in this process."""

import csv
import json
import os
import re
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from sinkformer_pl.data import ProceduralShapes
from sinkformer_pl.errors import UserError
from sinkformer_pl.training.checkpoint_content import METRICS_KEY
from sinkformer_pl.training.checkpoint_file import read_checkpoint
from sinkformer_pl.training.last_checkpoint import LastCheckpoint
from sinkformer_pl.training.metrics_csv import MetricsCSV
from sinkformer_pl.training.resume import RESUME_KEY, ResumeState
from sinkformer_pl.training.signals import Stopped, StopSignals
from tests import commands

LARGER = ["--data.train_size", "80", "--data.batch_size", "16"]


@pytest.fixture
def stopped(tiny, run, monkeypatch, capfd):
    """A run that was stopped before its third step of five."""

    def agreed(callback, trainer, received, late):
        return 15 if trainer.global_step == 2 else 0, late

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "_agreed", agreed)
        with pytest.raises(Stopped) as stopped:
            run("fit", "--config", tiny, *LARGER)
    assert stopped.value.code == 143
    assert capfd.readouterr().err.splitlines()[-1] == "stopped by SIGTERM at step 2; resume with --ckpt_path last"


def test_the_middle_of_an_epoch_needs_the_same_batches(tiny, run, stopped, tmp_path, capfd):
    with pytest.raises(SystemExit):
        run("fit", "--config", tiny, *LARGER, "--ckpt_path", "last", "--data.batch_size", "8")
    message = capfd.readouterr().err
    assert "after batch 2 of an epoch in which data.batch_size was 16, now 8" in message
    run("fit", "--config", tiny, *LARGER, "--ckpt_path", "last")
    assert torch.load(tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--data.seed", "3"], "data.seed was 0, now 3; "),
        (["--data.val_size", "36"], "data.val_fraction was 0.333333.*, now 0.428571.*; 24 validation samples, now 36"),
        (["--data.noise", "0.5"], "content of the 48 training samples"),
    ],
)
def test_other_samples_are_refused_at_the_end_of_an_epoch(trained, tiny, fail, flags, difference):
    message = fail("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_epochs", "2", *flags)
    assert re.search(rf"last\.ckpt: it was trained on other samples: .*{difference}.*train anew", message)


def test_other_samples_are_refused_in_the_middle_of_an_epoch(tiny, fail, stopped):
    message = fail("fit", "--config", tiny, *LARGER, "--ckpt_path", "last", "--data.noise", "0.5")
    assert "content of the 80 training samples" in message


def test_the_middle_of_an_epoch_needs_the_same_processes():
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), world_size=1, global_rank=0, ckpt_path="last.ckpt", checkpoint_callbacks=[]
    )
    saved = {"batch": 3, "batches": 5, "ranks": [{"random": {}, "metrics": {}}] * 2}
    with pytest.raises(UserError, match=r"last.ckpt: it was written in the middle of an epoch by 2 process\(es\)"):
        ResumeState().on_load_checkpoint(trainer, None, {RESUME_KEY: saved})
    ResumeState().on_load_checkpoint(trainer, None, {RESUME_KEY: {**saved, "batch": 0}})


def test_another_length_of_the_schedule_is_said(trained, tiny, run, caplog):
    with caplog.at_level("INFO"):
        run("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert "continues as in a training of 4 steps; up to the checkpoint it was that of one of 2 steps" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        run("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_epochs", "3", "--model.schedule", "Constant")
    assert "continues as in" not in caplog.text


def test_a_run_that_is_over_is_said_to_be(tiny, run, tmp_path):
    run("fit", "--config", tiny, "--trainer.max_epochs", "2")
    record = tmp_path / "runs/tiny/version_0/fit.json"
    before = record.read_text()
    record.unlink()
    printed = run("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert "nothing to do: the checkpoint has 2 epochs; raise trainer.max_epochs, 2, to train on" in printed
    assert record.read_text() == before
    more = ["--trainer.max_epochs", "5", "--trainer.max_steps", "3"]
    assert "raise trainer.max_steps, 3, to" in run("fit", "--config", tiny, "--ckpt_path", "last", *more)
    assert record.read_text() == before


def test_a_run_that_its_steps_ended_within_an_epoch_keeps_its_record(tiny, run, tmp_path):
    most = ["fit", "--config", tiny, "--trainer.max_epochs", "5", "--trainer.max_steps", "3"]
    run(*most)
    record = tmp_path / "runs/tiny/version_0/fit.json"
    before = record.read_text()
    assert json.loads(before)["epochs"] == 2
    assert "nothing to do: the checkpoint has 3 steps" in run(*most, "--ckpt_path", "last")
    assert record.read_text() == before
    record.unlink()
    run(*most, "--ckpt_path", "last")
    assert record.read_text() == before


def test_a_training_that_was_stopped_early_is_over_until_it_is_not_stopped_so(tiny, run, tmp_path, caplog):
    stopper = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    # Weights that don't move: nothing gets better.
    still = ["--trainer.callbacks.patience", "1", "--model.optimizer.lr", "0", "--trainer.max_epochs", "4"]
    run("fit", "--config", tiny, *stopper, *still)
    last = tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt"
    before = last.read_bytes()
    with caplog.at_level("INFO"):
        printed = run("fit", "--config", tiny, *stopper, *still, "--ckpt_path", "last")
    assert "nothing to do: EarlyStopping has ended this training; leave it out to train on" in printed
    assert "learning rate" not in caplog.text
    assert last.read_bytes() == before
    run("fit", "--config", tiny, *still[2:], "--trainer.callbacks", "null", "--ckpt_path", "last")
    assert json.loads((tmp_path / "runs/tiny/version_0/fit.json").read_text())["epochs"] == 4


@pytest.mark.parametrize(
    ("monitor", "threshold", "other"),
    [
        ("val/loss", ["stopping_threshold", "100"], "0.001"),
        ("val/loss", ["divergence_threshold", "0.001"], "100"),
        # The metric isn't among those of validation, which every checkpoint has.
        ("train/loss", ["stopping_threshold", "100"], "0.001"),
    ],
)
def test_a_training_that_a_threshold_ended_is_over_until_the_threshold_is_another(
    tiny, run, tmp_path, monitor, threshold, other
):
    name, value = threshold
    stopper = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", monitor]
    more = ["--trainer.max_epochs", "4", f"--trainer.callbacks.{name}"]
    run("fit", "--config", tiny, *stopper, *more, value)
    last = tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt"
    before = last.read_bytes()
    assert read_checkpoint(last)["epoch"] == 1
    printed = run("fit", "--config", tiny, *stopper, *more, value, "--ckpt_path", "last")
    assert "nothing to do: EarlyStopping has ended this training; leave it out" in printed
    assert last.read_bytes() == before
    run("fit", "--config", tiny, *stopper, *more, other, "--ckpt_path", "last")
    assert json.loads((tmp_path / "runs/tiny/version_0/fit.json").read_text())["epochs"] == 4


def test_patience_that_ended_before_the_least_number_of_epochs_ends_nothing(tiny, run, tmp_path):
    stopper = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    still = ["--trainer.callbacks.patience", "1", "--model.optimizer.lr", "0"]
    run("fit", "--config", tiny, *stopper, *still, "--trainer.max_epochs", "3", "--trainer.min_epochs", "5")
    more = ["--trainer.max_epochs", "9", "--trainer.min_epochs", "5"]
    run("fit", "--config", tiny, *stopper, *still, *more, "--ckpt_path", "last")
    assert json.loads((tmp_path / "runs/tiny/version_0/fit.json").read_text())["epochs"] == 5


def test_newer_runs_without_a_checkpoint_are_passed_over_with_a_word(trained, tiny, run, tmp_path):
    (tmp_path / "runs/tiny/version_1").mkdir()
    with pytest.warns(UserWarning, match=r"last is runs/tiny/version_0/.*; newer, and without one: version_1"):
        run("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_epochs", "2")


def test_a_checkpoint_of_the_users_own_stands_beside_the_best(tiny, run, fail, tmp_path):
    own = {"monitor": "val/accuracy", "mode": "max", "save_weights_only": True, "dirpath": "own", "filename": "own"}
    callbacks = {"trainer": {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": own}]}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(callbacks))
    run("fit", "--config", tiny, "--config", "own.yaml", "--trainer.max_epochs", "2", "--monitor", "val/loss")
    run("fit", "--config", tiny, "--config", "own.yaml", "--trainer.max_epochs", "3", "--ckpt_path", "last")
    folder = tmp_path / "runs/tiny/version_0"
    best = read_checkpoint(folder / "checkpoints/best.ckpt")
    assert json.loads((folder / "fit.json").read_text())["best"] == best[METRICS_KEY]
    assert "it has weights alone" in fail("fit", "--config", tiny, "--ckpt_path", "own/own.ckpt")


def test_a_checkpoint_with_a_slash_in_its_name_is_of_its_run(tiny, run, tmp_path):
    own = {"monitor": "val/accuracy", "filename": "{epoch}-{val/accuracy:.2f}"}
    callbacks = {"trainer": {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": own}]}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(callbacks))
    run("fit", "--config", tiny, "--config", "own.yaml", "--trainer.default_root_dir", "elsewhere")
    folder = tmp_path / "elsewhere/tiny/version_0"
    [path] = (folder / "checkpoints").glob("*/*.ckpt")
    assert str(folder / "test.json") in run("test", "--ckpt_path", str(path))
    run("inspect", "--ckpt_path", str(path), "--samples", "1")
    assert (folder / "inspect.html").is_file()
    run("fit", "--ckpt_path", str(path), "--trainer.max_epochs", "2")
    assert json.loads((folder / "fit.json").read_text())["epochs"] == 2
    assert [place.name for place in tmp_path.rglob("version_*")] == ["version_0"]
    assert not (tmp_path / "runs").exists()


def test_without_a_validation_there_is_no_best_checkpoint_which_is_said(tiny, run):
    printed = run("fit", "--config", tiny, "--trainer.check_val_every_n_epoch", "5")
    assert "no best.ckpt: nothing was validated" in printed
    assert "no checkpoint was written" not in printed
    assert "last.ckpt" in printed


@pytest.mark.parametrize("more", [[], ["--trainer.val_check_interval", "1"]])
def test_costs_of_batches_that_follow_no_other(tiny, run, tmp_path, more):
    size = "16" if more else "48"
    run("fit", "--config", tiny, "--data.batch_size", size, "--trainer.max_epochs", "2", *more)
    rows = list(csv.DictReader((tmp_path / "runs/tiny/version_0/costs.csv").open()))
    assert [(row["epoch"], row["steps"]) for row in rows] == [("0", "3" if more else "1"), ("1", "3" if more else "1")]
    assert all(float(row["seconds_per_step"]) > 0 and 0 <= float(row["waiting"]) < 1 for row in rows)


def test_the_best_in_a_metric_of_the_training_where_validations_come_earlier(tiny, run, tmp_path):
    run("fit", "--config", tiny, *LARGER, "--monitor", "train/loss", "--trainer.val_check_interval", "2")
    best = read_checkpoint(tmp_path / "runs/tiny/version_0/checkpoints/best.ckpt")
    assert best["global_step"] == 5


def test_callbacks_may_wait_for_rates_and_leniently_for_anything(tiny, run, tmp_path):
    stopper = {"class_path": "EarlyStopping", "init_args": {"monitor": "no/metric", "strict": False}}
    rate = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "lr-AdamW/decay", "dirpath": "rate"}}
    (tmp_path / "lenient.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [stopper, rate]}}))
    run("fit", "--config", tiny, "--config", "lenient.yaml", "--trainer.log_every_n_steps", "1")
    assert len(list((tmp_path / "rate").iterdir())) == 1


def test_a_training_without_an_end_has_the_same_rate_throughout(tiny, run, tmp_path):
    endless = ["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:01", "--model.schedule", "Constant"]
    run("fit", "--config", tiny, *endless)
    assert json.loads((tmp_path / "runs/tiny/version_0/fit.json").read_text())["steps"] > 0


def test_what_the_parser_can_not_write_is_written_as_text(tiny, run, tmp_path):
    swa = {"trainer": {"callbacks": [{"class_path": "StochasticWeightAveraging", "init_args": {"swa_lrs": 0.01}}]}}
    (tmp_path / "swa.yaml").write_text(yaml.safe_dump(swa))
    run("fit", "--config", tiny, "--config", "swa.yaml", "--trainer.max_epochs", "2")
    run("fit", "--config", "runs/tiny/version_0/config.yaml")
    first, second = ((tmp_path / f"runs/tiny/version_{k}/metrics.csv").read_text() for k in (0, 1))
    assert first == second


def test_a_training_that_unfroze_its_backbone_goes_on_with_what_unfroze_it(tiny, run, fail, tmp_path, capfd):
    unfreeze = ["--trainer.callbacks", "BackboneFinetuning", "--trainer.callbacks.unfreeze_backbone_at_epoch", "1"]
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert "BackboneFinetuning: 2 processes don't share" in fail("fit", "--config", tiny, *unfreeze, *two)
    run("fit", "--config", tiny, *unfreeze, "--trainer.max_epochs", "2")
    with pytest.raises(SystemExit):
        run("fit", "--ckpt_path", "last", "--name", "tiny", "--trainer.max_epochs", "3", "--trainer.callbacks", "null")
    [message] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "loaded state dict has a different number of parameter groups; resume with the callbacks" in message
    # Its argument that is a function is known from the checkpoint.
    run("fit", "--ckpt_path", "last", "--name", "tiny", "--trainer.max_epochs", "3")
    last = read_checkpoint(tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt")
    assert [round(group["lr"] / 0.003, 6) for group in last["optimizer_states"][0]["param_groups"]] == [0, 0, 0]
    assert last["epoch"] == 3


HOLDING = """
import time
from pathlib import Path
from sinkformer_pl.training.folder_lock import locked

with locked(Path("runs/tiny/version_0/.lock"), "taken"):
    Path("held").touch()
    time.sleep(1000)
"""


def test_two_processes_do_not_train_in_one_folder(trained, tiny, run, fail, tmp_path):
    other = commands.start("-c", HOLDING, cwd=tmp_path)
    while not (tmp_path / "held").exists():
        assert other.exitcode is None
        time.sleep(0.01)
    try:
        more = ["fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_epochs", "2"]
        assert "runs/tiny/version_0: another process trains there" in fail(*more)
        run("test", "--ckpt_path", "last", "--name", "tiny")
    finally:
        other.kill()
        other.join()
    run(*more)


def test_tensorboard_forgets_what_came_after_the_checkpoint(tiny, run, tmp_path):
    run("fit", "--config", tiny, "--trainer.max_epochs", "2")
    folder = tmp_path / "runs/tiny/version_0"
    first = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    run("fit", "--config", tiny, "--trainer.max_epochs", "3", "--ckpt_path", "last")
    newest = max(folder.glob("events.*"), key=lambda path: path.stat().st_mtime)
    marks = [event.step for event in EventFileLoader(str(newest)).Load() if event.session_log.status == 1]
    assert marks == [first]


def test_two_runs_that_begin_at_once_have_a_folder_each(tiny, run, tmp_path, monkeypatch):
    setup = ProceduralShapes.setup

    def another_is_quicker(self, stage=None):
        (tmp_path / "runs/tiny/version_0").mkdir(parents=True, exist_ok=True)
        setup(self, stage)

    monkeypatch.setattr(ProceduralShapes, "setup", another_is_quicker)
    assert "version_1" in run("fit", "--config", tiny)
    assert not list((tmp_path / "runs/tiny/version_0").iterdir())
    for place in ("metrics.csv", "config.yaml", "checkpoints/best.ckpt", "checkpoints/last.ckpt", "costs.csv"):
        assert (tmp_path / "runs/tiny/version_1" / place).is_file()


def test_a_run_that_was_moved_keeps_its_best_checkpoint(tiny, run, tmp_path):
    # Weights that don't move: the first epoch is the best, since none is better.
    run("fit", "--config", tiny, "--model.optimizer.lr", "0")
    (tmp_path / "runs").rename(tmp_path / "moved")
    checkpoints = tmp_path / "moved/tiny/version_0/checkpoints"
    printed = run("fit", "--ckpt_path", str(checkpoints / "last.ckpt"), "--trainer.max_epochs", "3")
    assert str(checkpoints) in printed
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["epoch"] == 3
    assert torch.load(checkpoints / "best.ckpt", weights_only=True)["epoch"] == 0


@pytest.mark.parametrize("every", ["0", "5x", "min", "-3"])
def test_wrong_interval(tiny, fail, every):
    assert f"checkpoint_every {every}: give a number of steps" in fail(
        "fit", "--config", tiny, f"--checkpoint_every={every}"
    )


@pytest.mark.parametrize(("every", "steps"), [("2", [2, 4, 5]), ("1h", [5])])
def test_the_interval_is_of_steps_or_of_time(tiny, run, monkeypatch, every, steps):
    written = []
    write = LastCheckpoint._write

    def watched(self, trainer):
        written.append(trainer.global_step)
        write(self, trainer)

    monkeypatch.setattr(LastCheckpoint, "_write", watched)
    run("fit", "--config", tiny, *LARGER, "--checkpoint_every", every)
    assert written == steps
    clock = iter(range(0, 10**9, 40))
    passing = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr("sinkformer_pl.training.last_checkpoint.time", passing)
    written.clear()
    run("fit", "--config", tiny, *LARGER, "--checkpoint_every", "1min")
    assert written == [1, 3, 5]


def test_a_log_that_goes_on_forgets_what_came_after_the_checkpoint(tmp_path):
    logger = MetricsCSV(tmp_path)
    for step in range(4):
        logger.log_metrics({"epoch": step // 2, "late" if step == 3 else "loss": step}, step=step)
    path = tmp_path / "metrics.csv"
    with path.open("a") as file:
        file.write("1,3,,")  # The process was killed in the middle of a row.

    again = MetricsCSV(tmp_path)
    assert again.file.length == 5
    again.rewind(step=3, rows=2)
    assert path.read_text().split() == ["epoch,loss,step", "0,0,0", "0,1,1"]
    again.log_metrics({"loss": 7}, step=2)
    assert again.file.length == 3
    assert [row["step"] for row in csv.DictReader(path.open())] == ["0", "1", "2"]
    again.rewind(step=0, rows=None)
    assert not path.exists()


def test_what_is_logged_twice_at_a_step_is_one_row(tmp_path):
    logger = MetricsCSV(tmp_path)
    for metrics in ({"rate": 1.0}, {"loss": 2.0}, {"rate": 1.0}, {"rate": 3.0}):
        logger.log_metrics(metrics, step=0)
    logger.log_metrics({"rate": 1.0}, step=1)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["rate"], row["loss"], row["step"]) for row in rows] == [
        ("1.0", "", "0"),
        ("", "2.0", "0"),
        ("3.0", "", "0"),
        ("1.0", "", "1"),
    ]


def test_a_monitor_of_rates_of_the_users_own_takes_the_place_of_ours(tiny, run, tmp_path):
    own = ["--trainer.callbacks", "LearningRateMonitor", "--trainer.callbacks.log_momentum", "true"]
    run("fit", "--config", tiny, *own, "--trainer.log_every_n_steps", "1")
    rows = list(csv.DictReader((tmp_path / "runs/tiny/version_0/metrics.csv").open()))
    rates = [row for row in rows if row["lr-AdamW/decay"]]
    assert [row["step"] for row in rates] == ["0", "1"]
    assert all(row["lr-AdamW/decay-momentum"] == "0.9" for row in rates)


def test_signals_are_handled_only_within_and_only_in_the_main_thread(monkeypatch):
    before = signal.getsignal(signal.SIGUSR1)
    signals = StopSignals()
    with signals.handled():
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stopped.value.code == 128 + signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)  # The process is ending already.
    assert signal.getsignal(signal.SIGUSR1) is before
    thread = threading.Thread(target=lambda: StopSignals().handled().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGUSR1) is before
