"""Schedulers of PyTorch, groups of parameters and averaged weights in trainings that resume; in this process."""

import re

import pytest
import yaml

from sinkformer_pl.training.checkpoint_file import read_checkpoint
from sinkformer_pl.training.last_checkpoint import LastCheckpoint
from sinkformer_pl.training.signals import Stopped
from tests.trials.kill_and_resume import differences

PLATEAU = {
    "schedule": {"class_path": "ReduceLROnPlateau", "init_args": {"patience": 0, "mode": "max", "threshold": 0.9}},
    "schedule_monitor": "val/accuracy",
    "warmup": 2,
    "parameter_groups": [{"parameters": "head", "lr_scale": 3.0}],
    "layer_decay": 0.5,
}
CYCLE = {"schedule": {"class_path": "OneCycleLR", "init_args": {"max_lr": 0.1}}}
RESTARTS = {
    "schedule": {"class_path": "CosineAnnealingWarmRestarts", "init_args": {"T_0": 2}},
    "schedule_interval": "epoch",
    "warmup": "0.5 epochs",
}


@pytest.mark.parametrize(
    ("model", "rates"),
    [
        pytest.param(PLATEAU, {0.00125, 0.0025, 0.005, 0.01, 0.03}, id="plateau"),
        pytest.param(CYCLE, {2.029766}, id="cycle", marks=pytest.mark.slow),
        pytest.param(RESTARTS, {0.5}, id="restarts", marks=pytest.mark.slow),
    ],
)
def test_they_go_on_bit_for_bit(tiny, run, tmp_path, monkeypatch, model, rates):
    """Stopped within the second of three epochs, each of three steps, as by a signal."""
    more = {"model": model, "trainer": {"max_epochs": 3, "callbacks": [{"class_path": "EMA"}]}}
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(more))
    argv = ["fit", "--config", tiny, "--config", "more.yaml", "--data.batch_size", "16"]
    run(*argv, "--name", "alone")
    with monkeypatch.context() as patch:
        patch.setattr(
            LastCheckpoint, "_agreed", lambda _, trainer, received, late: (15 * (trainer.global_step == 5), late)
        )
        with pytest.raises(Stopped):
            run(*argv, "--name", "parts")
    run(*argv, "--name", "parts", "--ckpt_path", "last")
    assert differences(tmp_path / "runs/alone/version_0", tmp_path / "runs/parts/version_0") == []
    last = read_checkpoint(tmp_path / "runs/alone/version_0/checkpoints/last.ckpt")
    assert {round(group["lr"] / 0.003, 6) for group in last["optimizer_states"][0]["param_groups"]} == rates


def test_what_an_optimizer_or_scheduler_resumes_with_stays(tiny, run, tmp_path, capfd):
    cycle = ["--model.schedule", "OneCycleLR", "--model.schedule.max_lr", "0.1"]
    run("fit", "--config", tiny, *cycle, "--trainer.callbacks", "EMA")

    def refused(*flags):
        with pytest.raises(SystemExit):
            run("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_epochs", "2", *flags)
        return capfd.readouterr().err

    assert "schedule.max_lr is 0.1 in the checkpoint" in refused("--model.schedule.max_lr", "0.2")
    assert "schedule is torch.optim.lr_scheduler.OneCycleLR" in refused("--model.schedule", "Constant")
    assert "no_weight_decay is None in the checkpoint" in refused("--model.no_weight_decay", "[]")
    assert "parameter_groups is []" in refused("--model.parameter_groups", "[{parameters: head, lr_scale: 2}]")
    assert "layer_decay is None in the checkpoint" in refused("--model.layer_decay", "0.5")
    assert re.search(r"its weights are averages.*--trainer\.callbacks\+ EMA", refused("--trainer.callbacks", "null"))
    # The length of the training is filled in anew.
    run("fit", "--config", tiny, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    last = read_checkpoint(tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt")
    assert last["lr_schedulers"][0]["scheduler"]["total_steps"] == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model.schedule", "OneCycle"], ["did you mean OneCycleLR", "WarmupCosine", "ReduceLROnPlateau"]),
        (["--model.schedule", "OneCycleLR"], ["model.schedule.max_lr missing: OneCycleLR needs max_lr"]),
        (["--model.schedule", "CyclicLR", "--model.schedule.bas_lr", "1"], ["did you mean model.schedule.base_lr"]),
        (["--model.schedule", "ReduceLROnPlateau", "--model.schedule_monitor", "val/los"], ["val/los", "val/loss"]),
        (["--model.schedule", "ReduceLROnPlateau", "--trainer.limit_val_batches", "0"], ["nothing is validated"]),
        (["--model.warmup", "soon"], ["model.warmup soon: give a number of optimizer steps"]),
        (["--model.parameter_groups", "[{parameters: haed, lr_scale: 1}]"], ["parameter_groups haed", "head"]),
        (["--model.layer_decay", "2"], ["model.layer_decay must be in (0, 1], got 2"]),
        (
            ["--model.layer_decay", "0.5", "--trainer.callbacks", "BackboneFinetuning"],
            ["BackboneFinetuning", "model.layer_decay", "leave one of them out"],
        ),
        (
            ["--trainer.callbacks", "EMAWeightAveraging", "--trainer.callbacks.update_starting_at_step", "9"],
            ["update_starting_at_step", "EMA"],
        ),
    ],
)
def test_mistakes_are_a_line(tiny, fail, flags, said):
    message = fail("fit", "--config", tiny, *flags)
    assert all(part in message for part in said), message
