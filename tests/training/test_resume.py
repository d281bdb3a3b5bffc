"""Trainings that are killed or stopped, and resumed in another process, compared to the last bit."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests import commands
from tests.cli.conftest import TINY
from tests.trials.kill_and_resume import differences

# Writes down what every training step sees; sends a signal to all processes of the training at a given moment.
WITNESS = """
import hashlib, os, signal, subprocess
import pytorch_lightning as pl
import torch
from sinkformer_pl.data import ProceduralShapes


class Witness(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        digest = hashlib.sha256(batch.inputs.numpy().tobytes()).hexdigest()
        with open(os.environ["SEEN"] + str(trainer.global_rank), "a") as file:
            print(trainer.current_epoch, batch_idx, trainer.global_step, batch.index.tolist(), digest, file=file)

    def on_after_backward(self, trainer, *args):
        self.strike(trainer, "train")

    def on_validation_batch_start(self, trainer, *args):
        if not trainer.sanity_checking:
            self.strike(trainer, "val")

    def strike(self, trainer, moment):
        wanted = os.environ.get("STRIKE", "").split()
        if wanted[:2] == [moment, str(trainer.global_step)] and trainer.is_global_zero:
            for _ in range(wanted.count("TWICE") + 1):
                # By another process, as a terminal or a scheduler does.
                whom = f"{'' if 'DDP' in wanted else '-'}{os.getpid()}"
                subprocess.run(["kill", "-" + wanted[2], "--", whom], start_new_session=True, check=True)


class Noise(pl.Callback):
    # Changes a batch before the step, as mixing of samples does.

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch.inputs.add_(0.01 * torch.randn_like(batch.inputs))


class Unhurried(ProceduralShapes):
    def make_datasets(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return super().make_datasets()
"""

POINTS = {
    **TINY,
    "plugins": ["witness"],
    "data": {
        "class_path": "ProceduralShapes",
        "init_args": {"train_size": 40, "val_size": 20, "test_size": 12, "batch_size": 8},
    },
    "model": {
        "normalization": "GumbelSinkhorn",
        "backbone": {
            "class_path": "SetTransformer",
            "init_args": {"dim": 8, "num_heads": 2, "inducing_points": 4, "dropout": 0.2},
        },
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.003}},
        "schedule": "WarmupCosine",
    },
    "trainer": {**TINY["trainer"], "max_epochs": 3, "log_every_n_steps": 2, "callbacks": ["witness.Witness"]},
}

TEXTS = {
    **POINTS,
    "data": {
        "class_path": "Docstrings",
        "init_args": {"batch_size": 64, "max_length": 16, "vocab_size": 300, "num_workers": 2},
    },
    "model": {
        **POINTS["model"],
        "normalization": "Softmax",
        "backbone": {
            "class_path": "TextTransformer",
            "init_args": {
                "vocab_size": 300,
                "max_length": 16,
                "dim": 8,
                "num_heads": 2,
                "depth": 1,
                "dropout": 0.2,
            },
        },
    },
    "trainer": {**POINTS["trainer"], "max_epochs": 2, "limit_train_batches": 8, "limit_val_batches": 2},
}


class Place:
    """A folder with a configuration, and the trainings in it."""

    def __init__(self, folder: Path, config: dict) -> None:
        self.folder = folder
        (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
        (folder / "witness.py").write_text(WITNESS)

    def fit(self, name: str, *argv: str, strike: str = "", status: int = 0) -> str:
        """Train in a process group of its own; returns what it printed, errors last."""
        argv = ["fit", "--config", "tiny.yaml", "--name", name, *argv]
        done = commands.run(*argv, cwd=self.folder, env={"STRIKE": strike, "SEEN": f"{name}.seen"})
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def seen(self, name: str, rank: int = 0) -> list[str]:
        """What the steps saw."""
        return (self.folder / f"{name}.seen{rank}").read_text().splitlines()

    def last(self, name: str) -> dict:
        return torch.load(self.run(name) / "checkpoints/last.ckpt", weights_only=True)

    def run(self, name: str) -> Path:
        [folder] = (self.folder / "runs" / name).glob("version_*")
        return folder

    def require_equal(self, name: str, step: int, reference: str = "alone", ranks: int = 1) -> None:
        """The run, resumed at a step, has seen what the reference saw, and ended where it did."""
        assert differences(self.run(reference), self.run(name)) == []
        for rank in range(ranks):
            seen = self.seen(reference, rank)
            assert self.seen(name, rank)[-len(seen) + step :] == seen[step:]


@pytest.fixture(scope="module")
def points(tmp_path_factory):
    """Point clouds with augmentation, dropout and a normalization that draws: 3 epochs of 5 steps."""
    place = Place(tmp_path_factory.mktemp("points"), POINTS)
    place.fit("alone")
    assert len({line.split("[")[1] for line in place.seen("alone")}) == 15
    return place


@pytest.mark.parametrize(
    ("strike", "every", "step", "workers"),
    [
        pytest.param("train 8 KILL", "3", 6, "2 0", id="in mid-epoch"),
        pytest.param("train 9 KILL", None, 5, "0 2", id="from the end of an epoch"),
    ],
)
def test_a_killed_training_goes_on_bit_for_bit(points, strike, every, step, workers):
    name = strike.replace(" ", "")
    first, then = (["--data.num_workers", number] for number in workers.split())
    points.fit(name, *(["--checkpoint_every", every] if every else []), *first, strike=strike, status=-signal.SIGKILL)
    assert points.last(name)["global_step"] == step
    points.fit(name, *then, "--ckpt_path", "last")
    points.require_equal(name, step)
    assert json.loads((points.run(name) / "fit.json").read_text())["resumed"] == [step // 5]


@pytest.mark.parametrize(
    ("strike", "step", "workers"),
    [
        pytest.param("train 6 TERM", 7, "2", id="in mid-epoch"),
        pytest.param("val 10 INT", 10, "2", id="in a validation"),
        pytest.param("train 3 USR1", 4, "0", id="before the last batch"),
    ],
)
def test_a_stopped_training_keeps_its_very_step(points, strike, step, workers):
    name, signal_name = strike.replace(" ", ""), "SIG" + strike.split()[2]
    number = getattr(signal, signal_name)
    printed = points.fit(name, "--data.num_workers", workers, strike=strike, status=128 + number)
    assert printed.splitlines()[-1] == f"stopped by {signal_name} at step {step}; resume with --ckpt_path last"
    assert "Traceback" not in printed
    assert points.last(name)["global_step"] == step
    assert not (points.run(name) / "fit.json").exists()
    points.fit(name, "--data.num_workers", workers, "--ckpt_path", "last")
    points.require_equal(name, step)


@pytest.mark.slow
def test_texts_sorted_by_length_go_on_bit_for_bit(tmp_path):
    place = Place(tmp_path, TEXTS)
    place.fit("alone")
    place.fit("stopped", strike="train 4 TERM", status=128 + signal.SIGTERM)
    place.fit("stopped", "--ckpt_path", "last")
    place.require_equal("stopped", 5)


def test_accumulated_gradients_steps_for_a_length_and_validations_within_an_epoch(tmp_path):
    trainer = {**POINTS["trainer"], "accumulate_grad_batches": 2, "max_steps": 8, "max_epochs": -1}
    trainer["val_check_interval"] = 2
    place = Place(tmp_path, {**POINTS, "trainer": trainer})
    place.fit("alone")
    # In the middle of a window, whose step is waited for; then in a validation.
    printed = place.fit("stopped", strike="train 1 TERM", status=128 + signal.SIGTERM)
    assert "stopped by SIGTERM at step 2;" in printed
    printed = place.fit("stopped", "--ckpt_path", "last", strike="val 4 TERM", status=128 + signal.SIGTERM)
    assert "stopped by SIGTERM at step 4;" in printed
    place.fit("stopped", "--ckpt_path", "last")
    assert differences(place.run("alone"), place.run("stopped")) == []
    assert list(dict.fromkeys(place.seen("stopped"))) == place.seen("alone")


@pytest.mark.parametrize("strikes", ["val 8 TERM, train 8 KILL", "train 6 TERM, val 8 TERM"])
def test_validations_within_an_epoch_are_done_whole_and_once(tmp_path, strikes):
    place = Place(tmp_path, {**POINTS, "trainer": {**POINTS["trainer"], "val_check_interval": 3}})
    place.fit("alone")
    again: list[str] = []
    for strike in strikes.split(", "):
        number = getattr(signal, f"SIG{strike.split()[2]}")
        place.fit("stopped", *again, strike=strike, status=-number if number == signal.SIGKILL else 128 + number)
        again = ["--ckpt_path", "last"]
    place.fit("stopped", *again)
    assert differences(place.run("alone"), place.run("stopped")) == []


def test_validations_that_count_over_epochs_stay_where_they_are(tmp_path):
    trainer = {**POINTS["trainer"], "val_check_interval": 7, "check_val_every_n_epoch": None}
    place = Place(tmp_path, {**POINTS, "trainer": trainer})
    place.fit("alone")
    place.fit("killed", "--checkpoint_every", "3", strike="train 8 KILL", status=-signal.SIGKILL)
    place.fit("killed", "--ckpt_path", "last")
    place.require_equal("killed", 7)


def test_another_accumulation_in_each_epoch_goes_on_bit_for_bit(tmp_path):
    """Of five batches, steps of two, two and one in the first epoch, of three and two in the second."""
    accumulation = {"class_path": "GradientAccumulationScheduler", "init_args": {"scheduling": {0: 2, 1: 3, 2: 1}}}
    trainer = {**POINTS["trainer"], "callbacks": ["witness.Witness", accumulation], "log_every_n_steps": 1}
    place = Place(tmp_path, {**POINTS, "trainer": trainer})
    place.fit("alone")
    assert place.last("alone")["global_step"] == 3 + 2 + 5
    place.fit("killed", "--checkpoint_every", "1", strike="train 4 KILL", status=-signal.SIGKILL)
    place.fit("killed", "--ckpt_path", "last")
    assert json.loads((place.run("killed") / "fit.json").read_text())["resumed"] == [1]
    assert differences(place.run("alone"), place.run("killed")) == []
    rows = (place.run("alone") / "metrics.csv").read_text().splitlines()
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("schedule", [pytest.param("Constant", marks=pytest.mark.slow), "WarmupCosine"])
def test_a_training_that_unfreezes_its_backbone_goes_on_bit_for_bit(tmp_path, schedule):
    unfreeze = {"class_path": "BackboneFinetuning", "init_args": {"unfreeze_backbone_at_epoch": 1}}
    trainer = {**POINTS["trainer"], "callbacks": ["witness.Witness", unfreeze], "log_every_n_steps": 1}
    model = {**POINTS["model"], "schedule": schedule, "freeze": "backbone.embed,backbone.blocks.0"}
    place = Place(tmp_path, {**POINTS, "model": model, "trainer": trainer})
    place.fit("alone")
    # In the first epoch, in that of the unfreezing, and in the next.
    place.fit("killed", "--checkpoint_every", "2", strike="train 3 KILL", status=-signal.SIGKILL)
    for strike in ("train 8 KILL", "train 13 KILL"):
        place.fit("killed", "--checkpoint_every", "2", "--ckpt_path", "last", strike=strike, status=-signal.SIGKILL)
    place.fit("killed", "--ckpt_path", "last")
    place.require_equal("killed", 12)


def test_callbacks_that_draw_numbers_or_average_weights_go_on_bit_for_bit(tmp_path):
    average = {"class_path": "EMAWeightAveraging", "init_args": {"decay": 0.5}}
    trainer = {**POINTS["trainer"], "callbacks": ["witness.Witness", "witness.Noise", average]}
    place = Place(tmp_path, {**POINTS, "trainer": trainer})
    place.fit("alone")
    place.fit("killed", "--checkpoint_every", "3", strike="train 4 KILL", status=-signal.SIGKILL)
    # Averaged weights are in the place of the trained ones then, so that the validation is finished first.
    place.fit("killed", "--ckpt_path", "last", strike="val 10 TERM", status=128 + signal.SIGTERM)
    place.fit("killed", "--ckpt_path", "last")
    place.require_equal("killed", 10)


def test_a_training_whose_steps_end_within_an_epoch_goes_on_within_it(tmp_path):
    place = Place(tmp_path, {**POINTS, "model": {**POINTS["model"], "schedule": "Constant"}})
    place.fit("alone", "--trainer.max_steps", "15")
    place.fit("parts", "--trainer.max_steps", "7")
    place.fit("parts", "--trainer.max_steps", "15", "--ckpt_path", "last")
    assert place.seen("parts") == place.seen("alone")
    # The best was written when the training was to have seven steps.
    assert differences(place.run("alone"), place.run("parts")) == ["best.ckpt: /lr_schedulers/0/steps: 15 and 7"]


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_go_on(points):
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "2"]
    points.fit("pair", *two)
    printed = points.fit("stopped-pair", *two, strike="train 3 TERM DDP", status=128 + signal.SIGTERM)
    assert printed.count("stopped by SIGTERM at step 4; resume with --ckpt_path last") == 1, printed
    assert len(points.seen("stopped-pair", 0)) == len(points.seen("stopped-pair", 1)) == 4
    points.fit("stopped-pair", *two, "--ckpt_path", "last")
    points.require_equal("stopped-pair", 4, "pair", ranks=2)


def test_a_second_ctrl_c_ends_it_at_once(points):
    printed = points.fit("impatient", strike="train 2 INT TWICE", status=128 + signal.SIGINT)
    assert printed.splitlines()[-1] == "stopped at once"
    assert not (points.run("impatient") / "checkpoints").exists()


def test_a_signal_before_the_training_ends_the_process(points):
    printed = points.fit("early", "--data", "witness.Unhurried", status=128 + signal.SIGTERM)
    assert printed.splitlines()[-1] == "stopped by SIGTERM"
    assert not (points.folder / "runs/early").exists()


@pytest.mark.slow
def test_kills_and_stops_at_random_moments_change_nothing(tmp_path):
    trial = Path(__file__).parents[1] / "trials/kill_and_resume.py"
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    argv = ["--config", "tiny.yaml", "--kills", "4", "--signals", "KILL,TERM", "--trainer.max_epochs", "4"]
    argv += ["--data.train_size", "480", "--data.batch_size", "8"]
    done = subprocess.run([sys.executable, str(trial), *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "equal to the last bit"
