"""Wrong arguments and files: one line with the cause and the remedy, before anything is written."""

import pickle
import resource
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from sinkformer_pl.training.checkpoint_file import save_file
from tests import commands

OWN = ["--trainer.callbacks"]
STOPPER = [*OWN, "EarlyStopping", "--trainer.callbacks.monitor"]
EPOCH_END = "--trainer.callbacks.{}_on_train_epoch_end"
TWO = ["--trainer.devices", "2"]
COPIES = [("spawn", "spawn"), ("fork", "fork"), ("notebook", "fork")]
TWO_BATCHES = ["--trainer.accumulate_grad_batches", "2"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.normalization", "Sinkhrn"], ["Sinkhrn", "did you mean Sinkhorn?", "Softmax"]),
        (["--model.normalization", "no.such.Thing"], ["no.such.Thing", "Sinkhorn, SlicedTransport", "Softmax"]),
        (["--model.normalization", "torch.nn.Linear"], ["torch.nn.Linear", "AttentionNormalization"]),
        (["--model.normalization", "ScoreNormalization"], ["ScoreNormalization", "abstract"]),
        (["--model.normalization.n_itres", "3"], ["n_itres", "n_iters?"]),
        (["--model.normalization.temperature", "2"], ["Sinkhorn has no", "did you mean model.backbone.temperature?"]),
        (["--model.normalization.n_iters", "x"], ["model.normalization.n_iters", "whole number"]),
        (["--model.normalization.n_iters", "4"], ["n_iters", "odd"]),
        (["--model.normalization.n_iters", "0"], ["n_iters", "odd"]),
        (["--model.nomalization", "Softmax"], ["model.nomalization", "did you mean model.normalization?"]),
        (["--model.backbone.num_heads", "3"], ["num_heads=3", "dim=8"]),
        (["--model.backbone", "SetTransfrmer"], ["did you mean SetTransformer?"]),
        (["--model.backbone.pooling", "Sftmax"], ["model.backbone.pooling", "did you mean Softmax?", "cls, mean, max"]),
        (["--model.optimizer", "Adm"], ["did you mean Adam?"]),
        (["--model.optimizer.lr", "fast"], ["model.optimizer.lr", "a number"]),
        (["--model.schedule", "Cosine"], ["did you mean WarmupCosine?"]),
        (["--model.schedule.warmup", "2"], ["warmup", "[0, 1)"]),
        (["--model.optimizer.lr", "-1"], ["model.optimizer AdamW: Invalid learning rate: -1"]),
        (["--model.num_classes", "7"], ["model.num_classes", "data.num_classes"]),
        (["--model.label_smoothing", "1.5"], ["label_smoothing", "[0, 1)"]),
        (["--data.root", "x"], ["data.root", "ProceduralShapes has no argument root"]),
        (["--data.batch_size", "x"], ["data.batch_size", "whole number"]),
        (["--data.batch_size", "0"], ["batch_size", "1 or more"]),
        (["--data", "ProcedralShapes"], ["did you mean ProceduralShapes?"]),
        (["--data", "PointClouds", "--data.root", "nowhere"], ["nowhere", "no such file or folder"]),
        (["--trainer.max_epoch", "3"], ["did you mean trainer.max_epochs?"]),
        (["--trainer.max_epochs", "x"], ["trainer.max_epochs", "whole number"]),
        (["--plugins", "nosuch"], ["--plugins nosuch", "no module"]),
        (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt", "no such file"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml: no such file"]),
        (
            ["--model.backbone", "nowhere.Net"],
            ["model.backbone nowhere.Net: no class of this name: Python finds no mod"],
        ),
        (["--data", "nowhere.Data"], ["data nowhere.Data: no class of this name: Python finds no module nowhere"]),
        (["--trainer.callbacks", "EarlyStoping"], ["no class of this name; did you mean EarlyStopping?"]),
        (["--epochs", "2"], ["epochs: no such option; did you mean trainer.max_epochs?"]),
        (["--lr", "2"], ["lr: no such option; did you mean model.optimizer.lr?"]),
        (["--batch_size", "2"], ["batch_size: no such option; did you mean data.batch_size?"]),
        (["other.yaml"], ["other.yaml: a configuration is given by --config other.yaml"]),
        (["--model.optimizer", "Optimizer"], ["this is what all of them are; give one", "valid: ASGD, Adadelta"]),
        (
            ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks", "DeviceStatsMonitor"],
            ["twice, of which the last would count; add with --trainer.callbacks+=VALUE"],
        ),
        (["--data", "ClassificationData"], ["is abstract"]),
        (
            ["--trainer.accelerator", "cpu", "--trainer.strategy", "fsdp"],
            ["trainer.strategy fsdp: it needs GPUs", "give --trainer.strategy ddp"],
        ),
        (["--config", "tinny.yaml"], ["tinny.yaml: no such file; did you mean tiny.yaml?"]),
        (["--config"], ["--config", "needs a value"]),
        (["--config", "."], ["--config .", "a folder; give a .yaml file in it"]),
        (["--ckpt_path", "."], ["--ckpt_path .", "a folder"]),
        (["--model.normalization", "sinkformer_pl.normalizations.Sinkhrn"], ["did you mean", "Softmax"]),
        (["--model.normalization", "null"], ["model.normalization"]),
        (["--model.backbone.layer_norm", "mid"], ["model.backbone.layer_norm mid", "pre, post, none"]),
        (["--model.backbone.dim", "0"], ["dim must be at least 1"]),
        (["--model.backbone.temperature", "hot"], ["temperature hot", "a number", "learned"]),
        (["--model.backbone.temperature", "-1"], ["temperature must be a positive number or 'learned', got -1"]),
        (
            ["--model.normalization", "SlicedTransport", "--model.normalization.sort_temperature", "-1"],
            ["SlicedTransport: sort_temperature"],
        ),
        (["--model.backbone.in_features", "0"], ["in_features must be at least 1"]),
        (["--trainer.val_check_interval", "3"], ["trainer.val_check_interval 3", "an epoch has 2 batches"]),
        (["--trainer.val_check_interval", "0"], ["trainer.val_check_interval 0", "1 or more"]),
        (["--trainer.barebones", "true"], ["trainer.barebones", "leave it out"]),
        (["--trainer.accumulate_grad_batches", "0"], ["trainer.accumulate_grad_batches 0: give 1 or more"]),
        (["--trainer.check_val_every_n_epoch", "0"], ["trainer.check_val_every_n_epoch 0: give 1 or more"]),
        (["--trainer.gradient_clip_val", "-0.5"], ["trainer.gradient_clip_val -0.5: give 0 or more"]),
        (["--trainer.deterministic", "x"], ["trainer.deterministic x", "true or false", "warn"]),
        (["--trainer.precision", "transformer-engine"], ["transformer_engine", "not met"]),
        (["--require_finite", "x"], ["require_finite x: expected true or false"]),
        (["--trainer.precision", "17"], ["trainer.precision 17"]),
        (["--seed_everything", "-1"], ["seed_everything -1"]),
        (["--monitor", "val/acc"], ["monitor val/acc", "did you mean val/accuracy?"]),
        (["--name", "../out"], ["../out", "without slashes"]),
        (["--name", ""], ["without slashes"]),
        (["--data.train_size", "0"], ["data.train_size is 0: give 1 or more"]),
        (["--data.val_fraction", "0.2"], ["data.val_fraction", "ProceduralShapes has no argument val_fraction"]),
        (["--data", "PointClouds"], ["data.root"]),
        (["--trainer.default_root_dir", "tiny.yaml"], ["trainer.default_root_dir", "tiny.yaml"]),
        (["--trainer.default_root_dir", "s3://place"], ["s3://place: runs are kept on local file systems"]),
        (["--data.batch_size", "null"], ["data.batch_size null: give a value, or leave it out; its default is 32"]),
        (["--model.backbone.dim", "null"], ["model.backbone.dim null: give a value"]),
        (["--model.optimizer.lr", "null"], ["model.optimizer.lr null: give a value"]),
        (["--trainer.callbacks", "LearningRateFinder"], ["trainer.callbacks LearningRateFinder: it can't set what"]),
        (["--trainer.precision", "half"], ["trainer.precision half: expected", "bf16-mixed"]),
        (["--trainer.max_epochs", "0"], ["trainer.max_epochs 0: nothing would be trained"]),
        (["--trainer.max_steps", "0"], ["trainer.max_steps 0: nothing would be trained"]),
        *(
            (["--trainer.strategy", f"ddp_{kind}", *TWO], [f"({method})", "--trainer.strategy ddp,"])
            for kind, method in COPIES
        ),
        (["--trainer.limit_train_batches", "0"], ["trainer.limit_train_batches 0: of 2 batches none would be used"]),
        (["--trainer.limit_train_batches", "0.1"], ["trainer.limit_train_batches 0.1: of 2 batches none"]),
        (["--trainer.limit_val_batches", "0.1"], ["trainer.limit_val_batches 0.1: of 1 batches none"]),
        (["--trainer.overfit_batches", "0.6"], ["trainer.overfit_batches 0.6: of 1 batches for val none"]),
        (
            [*STOPPER, "train/loss", "--trainer.val_check_interval", "0.5"],
            ["EarlyStopping.monitor train/loss", "set its check_on_train_epoch_end to true"],
        ),
        (
            [*OWN, "ModelCheckpoint", "--trainer.callbacks.monitor", "train/loss", f"{EPOCH_END.format('save')}=false"],
            ["ModelCheckpoint.monitor train/loss", "set its save_on_train_epoch_end to true"],
        ),
        ([*STOPPER, "val/accuracy"], ["EarlyStopping.mode min: val/accuracy is best when highest", "mode to max"]),
        (
            [*STOPPER, "val/F1Score", "--model.metrics", "[F1Score]"],
            ["EarlyStopping.mode min: val/F1Score is best when highest", "mode to max"],
        ),
        (
            [*STOPPER, "val/loss", "--trainer.callbacks.mode", "max"],
            ["EarlyStopping.mode max: val/loss is best when lowest", "mode to min"],
        ),
        (
            [*STOPPER, "val/loss", "--trainer.limit_val_batches", "0"],
            ["EarlyStopping.monitor val/loss: nothing is validated", "train/loss"],
        ),
        (
            [*STOPPER, "val/loss", "--trainer.check_val_every_n_epoch", "2", f"{EPOCH_END.format('check')}=true"],
            ["EarlyStopping.check_on_train_epoch_end true: val/loss isn't there", "leave it out"],
        ),
        (
            [*OWN, "GradientAccumulationScheduler", "--trainer.callbacks.scheduling={0: 2}", *TWO_BATCHES],
            ["GradientAccumulationScheduler: it sets trainer.accumulate_grad_batches, which is 2"],
        ),
        (
            ["--trainer.callbacks", "LearningRateMonitor", "--trainer.logger", "false"],
            ["LearningRateMonitor: it writes to a logger, and trainer.logger is false"],
        ),
        (
            ["--trainer.max_epochs", "-1"],
            ["model.schedule WarmupCosine: it spans all steps of the training"],
        ),
        (
            ["--trainer.max_epochs", "null", "--trainer.max_time", "00:00:00:01"],
            ["model.schedule WarmupCosine: it spans all steps of the training, whose number isn't known"],
        ),
        (["--seed", "3"], ["seed: no such option; did you mean seed_everything?"]),
        (["--model.lr", "3"], ["did you mean model.optimizer.lr?"]),
        (["--model.num_heads", "3"], ["did you mean model.backbone.num_heads?"]),
        (["--n_iters", "3"], ["did you mean model.normalization.n_iters?"]),
        (["-name", "x"], ["-name: options begin with --"]),
        (["--data.train_size"], ["--data.train_size needs a value"]),
        (["--name", "a" * 300], ["name 'aaa", "at most 200"]),
        (["--data", "PointClouds", "--data.root=~/nowhere"], [str(Path("~/nowhere").expanduser())]),
        (["--config=~/nowhere.yaml"], [f"{Path('~/nowhere.yaml').expanduser()}: no such file"]),
        (["--print_config=skip_null"], ["--print_config=skip_null", "give --print_config alone"]),
        (["--trainer.num_nodes", "2"], ["trainer.num_nodes 2: this is one machine; start it by torchrun"]),
    ],
)
def test_wrong_flag(tiny, fail, flags, expected):
    message = fail("fit", "--config", tiny, *flags)
    assert all(part in message for part in expected), message


def test_a_fit_that_fails_before_its_training_leaves_no_folder(tiny, run, tmp_path, capfd):
    (tmp_path / "early.py").write_text(
        "import pytorch_lightning as pl\n\n\nclass Early(pl.Callback):\n"
        "    def on_fit_start(self, trainer, pl_module):\n        raise RuntimeError('too early')\n"
    )
    with pytest.raises(RuntimeError, match="too early"):
        run("fit", "--config", tiny, "--plugins", "early", "--trainer.callbacks", "early.Early")
    assert not (tmp_path / "runs").exists()


CODE = "{class_path: os.system, init_args: {command: touch owned}}"
"""What would run a command, were a function called as if it were a class."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("modle: {label_smoothing: 0}", ["modle"]),
        ("model: {label_smothing: 0}", ["label_smothing", "did you mean model.label_smoothing?"]),
        ("model: {label_smoothing: much}", ["model.label_smoothing", "a number"]),
        ("model: {normalization: {class_path: Sinkhorn, init_args: {n_itres: 3}}}", ["n_iters?"]),
        ("model: {num_classes: 7}", ["num_classes"]),
        ("model: !!python/object/apply:os.system [touch owned]", ["line 1", "python/object"]),
        ("name: !!python/name:os.system", ["line 1", "python/name", "plain values"]),
        ("data: !!python/object:sinkformer_pl.data.Digits {}", ["line 1", "python/object", "plain values"]),
        (f"model: {{optimizer: {CODE}}}", ["model.optimizer os.system", "no class"]),
        ("model: {optimizer: {class_path: json.dumps}}", ["model.optimizer json.dumps", "no class"]),
        (
            f"model: {{backbone: {{init_args: {{pooling: {CODE}}}}}}}",
            ["pooling os.system", "no class"],
        ),
        (
            f"trainer: {{callbacks: [{{class_path: LambdaCallback, init_args: {{on_fit_start: {CODE}}}}}]}}",
            ["on_fit_start os.system", "no class"],
        ),
        (
            "trainer: {callbacks: [{class_path: LambdaCallback, init_args: {on_fit_start: {class_path: json.dumps}}}]}",
            ["on_fit_start json.dumps", "no class"],
        ),
        ("model: {backbone: {class_path: torch.nn.Linear}}", ["model.backbone torch.nn.Linear: this class is no Back"]),
        (
            "model: {optimizer: {class_path: torch.nn.Linear}}",
            ["model.optimizer torch.nn.Linear: this class is no Opti"],
        ),
        ("data: {class_path: torch.nn.Linear}", ["data torch.nn.Linear", "LightningDataModule"]),
        ("trainer: {callbacks: [{class_path: torch.nn.Linear}]}", ["trainer.callbacks torch.nn.Linear", "no Callback"]),
        ("trainer: {logger: {class_path: torch.nn.Linear}}", ["trainer.logger torch.nn.Linear", "no Logger"]),
        ("model: {normalization: {class_path: Sinkhorn, init_args: 3}}", ["model.normalization", "init_args"]),
        ("model: {schedule: {class_path: StepDecay, init_args: {milestones: 1}}}", ["milestones 1: expected a list"]),
        (
            "model: {optimizer: {class_path: AdamW, init_args: {lr: .nan}}}",
            ["model.optimizer AdamW", "rate: nan; give"],
        ),
        ("trainer: some", ["trainer some: expected settings, such as trainer."]),
        ("trainer: 3", ["trainer 3: expected settings, such as trainer."]),
        ("name: " + "[" * 3000, ["wrong.yaml", "too deep"]),
        ("model: [", ["line"]),
        ("just words", ["key: value"]),
        ("", ["wrong.yaml", "empty"]),
        ("name: a\nname: b", ["wrong.yaml, line 1", "twice"]),
        ("plugins: 3", ["plugins 3"]),
        ("data: {init_args: &a {batch_size: 32, self: *a}}", ["wrong.yaml: more than 10,000 values, or aliases"]),
        ("data: {class_path: PointClouds, init_args: {root: ~/nowhere}}", [str(Path("~/nowhere").expanduser())]),
        ("model: {optimiser: {class_path: Adam}}", ["model.optimiser", "did you mean model.optimizer?"]),
        ("data: {class_path: null}", ["data: no class is named", "valid: "]),
        ("model: {backbone: {class_path: null}}", ["model.backbone: no class is named", "SetTransformer"]),
        ("data: {class_path: Digits, batch_size: 3}", ["its arguments stand beside class_path; put them under init"]),
        (
            "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/los}}]}",
            ["trainer.callbacks EarlyStopping.monitor val/los: no such metric; did you mean val/loss?"],
        ),
        (
            "trainer: {callbacks: [{class_path: ModelCheckpoint, init_args: {save_last: true}}]}",
            ["trainer.callbacks ModelCheckpoint.save_last: last.ckpt is written without it"],
        ),
    ],
)
def test_wrong_file(tiny, fail, tmp_path, text, expected):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    message = fail("fit", "--config", tiny, "--config", str(path))
    assert all(part in message for part in expected), message
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(:\n", "SyntaxError"),
        ("raise RuntimeError('no luck')", "no luck"),
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        (
            "from sinkformer_pl.normalizations import Softmax as Base, register\n"
            "@register\nclass Softmax(Base):\n    pass",
            "Softmax is taken",
        ),
    ],
)
def test_broken_plugin(tiny, fail, tmp_path, monkeypatch, code, expected):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    name = f"broken_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    assert expected in fail("fit", "--config", tiny, "--plugins", name)
    assert expected in fail("normalizations", "--plugins", name)


def test_plugin_that_forgets_its_base_class(tiny, fail, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "forgetful.py").write_text(
        "from sinkformer_pl.normalizations import ScoreNormalization\n"
        "class Forgetful(ScoreNormalization):\n"
        "    def __init__(self):\n        pass\n"
        "    def forward(self, scores, mask):\n        return scores\n"
    )
    assert "super().__init__()" in fail("fit", "--config", tiny, "--model.normalization", "forgetful.Forgetful")


def test_wrong_arrays_leave_no_trace(tiny, fail, tmp_path):
    points, labels = np.random.default_rng(0).normal(size=(8, 20, 3)), np.arange(8) % 2
    for broken, expected in (
        ({"train_label": labels[:5]}, "8 train clouds but 5 labels"),
        ({"train_points": np.where(np.arange(8)[:, None, None] == 3, np.nan, points)}, "not finite"),
        ({"classes": np.array(["a", "a"])}, "one name"),
        ({"test_label": np.where(np.arange(8) == 3, 6, labels)}, "a label 6, but no label 2"),
        ({"train_points": points * 1e30}, "too large for single precision"),
    ):
        good = {"train_points": points, "train_label": labels, "test_points": points, "test_label": labels}
        np.savez(tmp_path / "clouds.npz", **(good | broken))
        message = fail("fit", "--config", tiny, "--data", "PointClouds", "--data.root", "clouds.npz")
        assert expected in message


def test_wrong_command(fail):
    message = fail("tset")
    commands = ("fit", "validate", "test", "predict", "compare", "normalizations", "benchmark")
    assert all(command in message for command in commands)
    assert "--config" in fail("fit")
    for command in ("validate", "test", "predict"):
        assert "--ckpt_path" in fail(command)


def test_empty_folder_and_broken_mesh(tiny, fail, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no clouds" in fail("fit", "--config", tiny, "--data", "PointClouds", "--data.root", "empty")
    for part in ("train", "test"):
        for label in ("chair", "sofa"):
            folder = tmp_path / "meshes" / label / part
            folder.mkdir(parents=True)
            for number in range(3):
                (folder / f"{label}_{number}.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    (tmp_path / "meshes/sofa/test/sofa_2.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 -2\n")
    message = fail("fit", "--config", tiny, "--data", "PointClouds", "--data.root", "meshes")
    assert "sofa_2.off" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"OFF\n3 0 0\n0 0 0\n1 0 0\n0 1 0\n", "no faces"),
        (b"OFF\n3 1 0\n0 0 0\n1 0 nan\n0 1 0\n3 0 1 2\n", "point 1 is not finite"),
        (b"OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 3\n", "face 0 has an index outside 0 to 2"),
        (b"OFF\n3 2 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "3 vertices and 2 faces declared, but 4 lines follow"),
        (b"OFF\n4000000000 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n", "4000000000 vertices"),
        (b"OFF\n3 1 0\n1 1 1\n1 1 1\n1 1 1\n3 0 1 2\n", "no area"),
    ],
)
def test_a_bad_mesh_is_named_before_anything_is_written(tiny, fail, tmp_path, content, expected):
    for place in ("chair/train", "chair/test", "sofa/train", "sofa/test"):
        (tmp_path / "meshes" / place).mkdir(parents=True)
        for number in range(2):
            (tmp_path / "meshes" / place / f"{number}.off").write_text("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    (tmp_path / "meshes/sofa/test/1.off").write_bytes(content)
    message = fail("fit", "--config", tiny, "--data", "PointClouds", "--data.root", "meshes", "--data.pool_size", "16")
    assert message.startswith("error: meshes/sofa/test/1.off: ")
    assert expected in message
    assert "repair or remove the file" in message


def test_a_mesh_that_is_a_broken_link(tiny, fail, tmp_path):
    for place in ("chair/train", "chair/test", "sofa/train", "sofa/test"):
        (tmp_path / "meshes" / place).mkdir(parents=True)
        (tmp_path / "meshes" / place / "1.off").symlink_to("nowhere")
    message = fail("fit", "--config", tiny, "--data", "PointClouds", "--data.root", "meshes")
    assert "/1.off: No such file" in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], ["--normalizations", "--help"]),
        (["--normalizations", "Softmax,Sinkhorn", "--jobs", "x"], ["--jobs", "'x'"]),
        (["--normalizations", "Softmax,Sinkhorn", "--metric", "x"], ["--metric", "test/accuracy"]),
        (["--normalizations", "Softmax,Sinkhrn"], ["Sinkhrn"]),
        (["--normalizations", "Softmax,Sinkhorn(n_iters=2)"], ["n_iters", "odd"]),
        (["--normalizations", "Softmax,Sinkhorn", "--trainer.default_root_dir", "tiny.yaml"], ["tiny.yaml", "another"]),
    ],
)
def test_wrong_comparison(tiny, fail, flags, expected):
    message = fail("compare", "--config", tiny, *flags)
    assert all(part in message for part in expected), message


def test_wrong_options_of_other_commands(fail):
    assert "--nope" in fail("normalizations", "--nope")
    assert "--repeats" in fail("benchmark", "--repeats", "x")
    assert "nowhere/x.json" in fail("benchmark", "--suites", "plans", "--json", "nowhere/x.json")
    for option in ("--repeats", "--threads", "--batch", "--points"):
        assert f"{option} 0: give 1 or more" in fail("benchmark", "--training", option, "0")
    assert "--image_size 20: give a multiple of 16" in fail("benchmark", "--training", "--image_size", "20")
    # Before the minutes that steps take, not after them.
    assert "foo: options begin with --" in fail("benchmark", "--training", "--fit", "foo")


INTERRUPTED = """
import _thread, builtins, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process would ignore it
original, done = builtins.__import__, []
def interrupt_at_torch(name, *arguments, **named):
    if name == "torch" and not done:
        done.append(name)
        _thread.interrupt_main()
    return original(name, *arguments, **named)
builtins.__import__ = interrupt_at_torch
runpy.run_module("sinkformer_pl", run_name="__main__")
"""


@pytest.mark.parametrize("command", ["fit", "benchmark"])
def test_an_interrupt_before_anything_runs_is_a_line(command, tmp_path):
    argv = [sys.executable, "-c", INTERRUPTED, command]
    found = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (found.returncode, found.stderr) == (130, "stopped by SIGINT\n")


def test_tasks_of_an_interactive_allocation(tiny, run, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    with pytest.raises(SystemExit):
        run("fit", "--config", tiny)
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "--ntasks=4" in line
    assert "SLURM_JOB_NAME=interactive" in line


def test_a_seed_that_is_drawn_is_kept(tiny, run, tmp_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    seeds = []
    for number in range(2):
        run("fit", "--config", tiny, "--seed_everything", "true", "--trainer.max_steps", "1")
        config = tmp_path / f"runs/tiny/version_{number}/config.yaml"
        seeds.append(yaml.safe_load(config.read_text())["seed_everything"])
    assert seeds[0] != seeds[1]
    assert all(type(seed) is int for seed in seeds)


BLOWN_UP = """
import pytorch_lightning as pl


class BlowUp(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            batch.inputs[1] = float("inf")
"""


def test_a_run_whose_loss_breaks_ends_with_its_cause_unless_that_is_switched_off(
    tiny, run, tmp_path, monkeypatch, capfd
):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "blow_up.py").write_text(BLOWN_UP)
    callback = ["--plugins", "blow_up", "--trainer.callbacks", "blow_up.BlowUp", "--trainer.max_epochs", "2"]
    with pytest.raises(SystemExit) as exit_:
        run("fit", "--config", tiny, *callback)
    # Another seed or normalization might do, so that a comparison goes on.
    assert exit_.value.code == 1
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: epoch 1, step 2: batch 0 has a loss of nan: the inputs of train/")
    assert "runs/tiny/version_0/checkpoints/" in line
    folder = tmp_path / "runs/tiny/version_0/checkpoints"
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(folder / name, weights_only=True)
        assert checkpoint["global_step"] == 2
        assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    run("fit", "--config", tiny, *callback, "--require_finite", "false")
    assert "last.ckpt" in {path.name for path in (tmp_path / "runs/tiny/version_1/checkpoints").iterdir()}


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_wrong_checkpoints(trained, tiny, fail, tmp_path):
    good = (tmp_path / "runs/tiny/version_0/checkpoints/best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(good[: len(good) // 2])
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": Malicious()}, tmp_path / "bad.ckpt")
    (tmp_path / "raw.ckpt").write_bytes(pickle.dumps(Malicious()))
    for name, expected in (
        ("cut.ckpt", "damaged"),
        ("text.ckpt", "damaged"),
        ("empty.ckpt", "damaged"),
        ("other.ckpt", "state_dict"),
        ("bad.ckpt", "could run code"),
        ("raw.ckpt", "damaged"),
    ):
        message = fail("test", "--ckpt_path", name)
        assert name in message
        assert expected in message
    assert not (tmp_path / "owned").exists()


def test_checkpoints_that_name_what_they_may_not_or_what_is_gone(tiny, run, fail, tmp_path):
    """Plain data, which loads: no function or foreign class that they name is called."""
    run("fit", "--config", tiny)
    content = torch.load(tmp_path / "runs/tiny/version_0/checkpoints/best.ckpt", weights_only=True)
    function = yaml.safe_load(CODE)
    process = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "owned"]}}
    for part, spec, expected in (
        ("optimizer", function, "model.optimizer os.system: this is no class"),
        ("schedule", function, "model.schedule os.system: this is no class"),
        ("normalization", process, "model.normalization subprocess.Popen: this class is no AttentionNormalization"),
        ("optimizer", {"class_path": "json.dumps"}, "model.optimizer json.dumps: this is no class"),
        ("normalization", {"class_path": "torch.nn.Linear"}, "Linear: this class is no AttentionNormalization"),
        ("normalization", {"class_path": "plugin.Gone"}, "model.normalization plugin.Gone: no class of this name"),
    ):
        torch.save({**content, "hyper_parameters": {**content["hyper_parameters"], part: spec}}, "named.ckpt")
        for command in ("fit", "test"):
            assert expected in fail(command, "--ckpt_path", "named.ckpt")
    assert not (tmp_path / "owned").exists()


def test_checkpoints_put_together_by_hand(trained, tiny, fail, tmp_path):
    last = tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    weights = content["state_dict"]
    for key, value in (
        ("callbacks", "none"),
        ("sinkformer_pl_config", [1]),
        ("pytorch-lightning_version", None),
        ("state_dict", {**weights, "head.bias": None}),
        ("state_dict", {**weights, "head.bias": torch.ones(12).to_sparse()}),
        ("hyper_parameters", {**content["hyper_parameters"], "num_classes": torch.ones(1)}),
    ):
        save_file({**content, key: value}, "odd.ckpt")
        for command in ("test", "fit"):
            assert f"checkpoint odd.ckpt: its '{key}' is" in fail(command, "--ckpt_path", "odd.ckpt")
    for key, value in (("classes", [1]), ("preprocessing", {"mean": torch.ones(1)})):
        learnt = {**content["ProceduralShapes"]["sinkformer_pl_learnt"], key: value}
        save_file({**content, "ProceduralShapes": {"sinkformer_pl_learnt": learnt}}, "odd.ckpt")
        assert f"checkpoint odd.ckpt: its '{key}' is" in fail("test", "--ckpt_path", "odd.ckpt")
    for key, value in (
        ("global_step", -1),
        ("global_step", None),
        ("loops", {"fit_loop": []}),
        ("optimizer_states", []),
        ("lr_schedulers", None),
        ("callbacks", {"RunRecord": 3}),
    ):
        save_file({**content, key: value}, "odd.ckpt")
        message = fail("fit", "--ckpt_path", "odd.ckpt", "--trainer.max_epochs", "2")
        assert f"checkpoint odd.ckpt: its '{key}" in message
    save_file({**content, "state_dict": {**weights, "head.bias": torch.full((12,), torch.nan)}}, "odd.ckpt")
    assert "head.bias is not finite, so no training can resume" in fail("fit", "--ckpt_path", "odd.ckpt")
    del content["optimizer_states"]
    save_file(content, "odd.ckpt")
    assert "it has weights alone" in fail("fit", "--ckpt_path", "odd.ckpt")


def test_a_state_that_would_bring_back_other_arguments_of_the_optimizer_is_not_gone_on_with(trained, tiny, fail):
    message = fail("fit", "--config", tiny, "--ckpt_path", "last", "--model.optimizer.lr", "0.5")
    assert "optimizer.lr is 0.003 in the checkpoint, whose optimizer resumes with that, and 0.5 here" in message


def test_no_room_for_results_is_noticed_before_they_are_made(trained, tiny, fail):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for command in ("validate", "test", "predict"):
            message = fail(command, "--ckpt_path", "best", "--name", "tiny")
            assert "can't write in the folder runs/tiny/version_0 (File too large); give another" in message
        assert "can't write in the folder runs/new/version_0" in fail("fit", "--config", tiny, "--name", "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_optimizer_that_takes_no_dense_gradients(tiny, run, capfd):
    with pytest.raises(SystemExit):
        run("fit", "--config", tiny, "--model.optimizer", "SparseAdam")
    [line] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: SparseAdam does not support dense gradients")
    assert line.endswith("; give another optimizer")


def test_null_where_an_annotation_does_not_say(tiny, run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lenient.py").write_text(
        "from typing import Any\n"
        "from sinkformer_pl.tasks import Constant\n"
        "class Lenient(Constant):\n"
        "    def __init__(self, number: Any = 3, maybe: int | None = 3) -> None:\n"
        "        assert number is None and maybe is None\n"
    )
    nulls = ["--model.schedule.number", "null", "--model.schedule.maybe", "null"]
    run("fit", "--config", tiny, "--model.schedule", "lenient.Lenient", *nulls)


def test_limits_under_which_nothing_is_evaluated(trained, tiny, fail):
    for command, name in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        limit = f"trainer.limit_{name}_batches"
        assert f"{limit} 0: of 1 batches none" in fail(
            command, "--ckpt_path", "best", "--name", "tiny", f"--{limit}", "0"
        )


def test_checkpoint_of_another_model_names_what_differs(trained, tiny, fail, tmp_path):
    checkpoint = str(tmp_path / "runs/tiny/version_0/checkpoints/best.ckpt")
    message = fail("test", "--ckpt_path", checkpoint, "--model.backbone.dim", "16")
    assert "backbone.blocks.0.gather.attention.key.bias is (8,) in the checkpoint and (16,) in the model" in message
    assert " more. " in message
    message = fail("test", "--ckpt_path", checkpoint, "--model.backbone.depth", "1")
    assert "only in the checkpoint" in message


def test_number_of_classes_set_by_hand_in_a_file_is_refused(tiny, fail):
    text = yaml.safe_load(Path(tiny).read_text())
    text["model"]["num_classes"] = 3
    Path(tiny).write_text(yaml.safe_dump(text))
    assert "num_classes" in fail("fit", "--config", tiny)


def test_a_port_that_another_process_has(tiny, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ddp = ["--trainer.strategy", "ddp", "--trainer.devices", "1"]
        done = commands.run("fit", "--config", str(tiny), *ddp, cwd=tmp_path, env={"MASTER_PORT": port})
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "MASTER_PORT" in line
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").glob("*/*"))
